"""The one skeleton of every command that takes a data set to an output: what is to do, doing it, and what came of it.

A command opens what it reads, says in a manifest what decides its output, and opens an engine (:func:`open_engine`) and
a writer; :func:`run` does the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from clipseed.data.types import Sample
from clipseed.defaults import Precision
from clipseed.errors import InputError, UsageError
from clipseed.runtime.interrupt import interruptible
from clipseed.runtime.stream import Advance, StreamStats
from clipseed.runtime.work import Deferred, Engine, LocalEngine, Recipe
from clipseed.store.empty import EmptyLabels
from clipseed.store.shards import WHOLE, Shard
from clipseed.store.units import Unit
from clipseed.store.writer import Finished

if TYPE_CHECKING:
    from clipseed.runtime.cluster import ClusterOptions

R = TypeVar("R")
R_contra = TypeVar("R_contra", contravariant=True)

Start = Callable[[int, int], Advance]
"""Called once with the number of images to do and of those done before; returns the progress callback."""
Loading = Callable[[str], None]
"""Called with a model's name before it is loaded, which takes seconds."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where and how a command runs: nothing here decides what is in its output.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        precision: Of the network.
        batch_size: Images computed together; ``None``: as many as the device works well with.
        workers: Decoding processes; ``None``: as many as the device needs.
        overwrite: Delete what is there first.
        shard: Which part of the units is this run's.
        cluster: Where to run instead of this process.
    """

    device: str = "auto"
    precision: Precision = "auto"
    batch_size: int | None = None
    workers: int | None = None
    overwrite: bool = False
    shard: Shard = WHOLE
    cluster: ClusterOptions | None = None

    def check(self) -> None:
        """Raise :class:`~clipseed.errors.UsageError` for numbers that mean nothing."""
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError("--batch-size: give auto or a number from 1")
        if self.workers is not None and self.workers < 0:
            raise UsageError("--workers: give auto or a number from 0")


@dataclass(kw_only=True)
class RunReport:
    """What a run did.

    Attributes:
        out: What was written to; ``None``: results were kept in memory.
        total: Images that were this run's to do; ``done_before``: those that an earlier run had done.
        seconds: Time for computing what was computed, from the first image to the last; loading a model is not in it.
        loading: Seconds in which models were loaded, or workers of a cluster came up.
        skipped_file: List of what was left out; ``None`` when nothing was.
        open_shards: How many other runs' shards are still missing.
        empty: Labels that came to nothing; ``None`` where results have no labels.
        ignored_share: Of the pixels in this run's label masks, how many are 255; ``None`` where it makes none.
        model, device: What computed; ``None`` where there was no model, or where it does not matter.
    """

    out: Path | None
    total: int
    done_before: int
    stats: StreamStats
    seconds: float
    loading: float = 0.0
    notes: list[str] = field(default_factory=list)
    skipped_file: Path | None = None
    open_shards: int = 0
    empty: EmptyLabels | None = None
    ignored_share: float | None = None
    model: dict[str, Any] = field(default_factory=dict)
    device: str | None = None

    @property
    def recomputed(self) -> int:
        """Images that gave NaN or infinity in half precision."""
        return self.stats.counters["recomputed"]


class Output(Protocol[R_contra]):
    """Where results go; the writers of :mod:`clipseed.store` are such."""

    @property
    def out(self) -> Path | None:
        """What is written; ``None``: nothing, results are kept in memory."""
        ...

    @property
    def folder(self) -> Path | None:
        """Where finished units are while the run goes on; ``None``: nowhere that outlives it."""
        ...

    @property
    def notes(self) -> list[str]:
        """What is to be told about what was there before."""
        ...

    @property
    def done(self) -> frozenset[str] | set[str]:
        """Ids that are stored already."""
        ...

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """Results that were not stored for what they are, with reasons."""
        ...

    def own(self, items: Sequence[str]) -> list[str]:
        """Those of all ids that are this run's to do."""
        ...

    def units(self, samples: Sequence[Sample]) -> list[Unit]:
        """This run's units, without what is done."""
        ...

    def write(self, unit: Unit, records: Sequence[R_contra]) -> None:
        """Store a unit's results; images that were skipped are simply not among them."""
        ...

    def finish(self, ids: Sequence[str], skipped: Sequence[tuple[str, str]] = ()) -> Finished:
        """End the run, and with the last of several the whole output."""
        ...


def open_engine(
    recipe: Recipe[R],
    cluster: ClusterOptions | None,
    about: dict[str, Any] | None = None,
    loading: Callable[[], None] | None = None,
) -> Deferred[R]:
    """Load the work here, or in the workers of a Ray cluster: when there is something to do, if ``about`` is known."""

    def start() -> Engine[R]:
        if loading:
            loading()
        if cluster is None:
            return LocalEngine(recipe)
        from clipseed.runtime.cluster import RayEngine

        return RayEngine(recipe, cluster)

    return Deferred(start, about)


def run(
    engine: Deferred[R],
    output: Output[R],
    samples: Sequence[Sample],
    start: Start | None = None,
    *,
    shard: Shard = WHOLE,
    unusable: Mapping[str, str] | None = None,
    may_be_empty: bool = False,
) -> RunReport:
    """Compute what is missing in an output, and finish it.

    Args:
        engine: Computes.
        output: An entered writer.
        samples: The whole data set, in order.
        start: Begins to show progress.
        shard: As the output has it.
        unusable: Ids of samples that cannot be computed, with reasons: they are skipped before anything is loaded.
        may_be_empty: That everything had to be skipped is no error of this run; another one follows and says so.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; what is finished is stored, and the message says so.
        InputError: a run of the whole had to skip everything.
        ClipseedError: as engine and output raise them.
    """
    unusable = unusable or {}
    ids = [sample.id for sample in samples]
    own = output.own(ids)
    done_before = len(output.done & set(own))
    missing = output.units(samples)
    refused = [(key, unusable[key]) for unit in missing for key in unit.ids if key in unusable]
    units = [Unit(unit.index, tuple(s for s in unit.samples if s.id not in unusable)) for unit in missing]
    units = [unit for unit in units if unit.samples]
    loaded = engine.loading
    began = time.perf_counter()
    with interruptible(lambda: _hint(output, own)):
        advance = start(sum(len(unit.samples) for unit in units), done_before) if start else None
        stats = engine.run(units, output.write, advance)
    seconds = time.perf_counter() - began - (engine.loading - loaded)
    stats.computed -= len(output.left_out)
    stats.skipped += [*output.left_out, *refused]
    if stats.skipped and not output.done and shard.whole and not may_be_empty:
        key, reason = stats.skipped[0]
        raise InputError(f"none of the {len(stats.skipped)} images could be used; the first, {key}: {reason}")
    finishing = f"interrupted while finishing {output.out or 'the run'}. Run the same command again to go on."
    with interruptible(lambda: finishing):
        finished = output.finish(ids, stats.skipped)
    about = engine.about
    return RunReport(
        out=output.out,
        total=len(own),
        done_before=done_before,
        stats=stats,
        seconds=seconds,
        loading=engine.loading,
        notes=output.notes,
        skipped_file=finished.skipped_file,
        open_shards=finished.open_shards,
        empty=finished.empty,
        ignored_share=finished.ignored_share,
        model=about.get("model") or {},
        device=about.get("device"),
    )


def _hint(output: Output[Any], own: Sequence[str]) -> str:
    if output.folder is None:
        return "interrupted; nothing was kept"
    return (
        f"interrupted; {len(output.done & set(own))} of {len(own)} images are safe in {output.folder}. "
        "Run the same command again to go on."
    )
