"""``clipseed crf``: seeds to label masks with a dense CRF over the classes present."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clipseed.data.dataset import relocated
from clipseed.data.stamps import UNKNOWN, FileStamp
from clipseed.defaults import CRF_ALPHA, CrfSolver, EmptyPolicy
from clipseed.device import pick_device
from clipseed.errors import ImageError, UsageError
from clipseed.jobs.crf_problem import Floats, NativeSolver, Problem, Solved
from clipseed.jobs.engine import (
    LARGE_IMAGE,
    ImageLoader,
    LoadedImage,
    batches_in_flight,
    count_empty,
    default_workers,
    earlier_in_seeds,
    misfit,
    one_by_one,
    open_engine,
    recorded_reader,
    refuse_if_nothing,
    seed_sample,
    usable_cores,
)
from clipseed.refine.crf import CLIP_ES, CrfParameters, dense_crf
from clipseed.runtime.interrupt import interruptible
from clipseed.runtime.stream import Advance, BatchSize, StreamStats, Task
from clipseed.runtime.work import Work
from clipseed.store.empty import Earlier, EmptyLabels
from clipseed.store.manifest import Manifest, package_versions
from clipseed.store.mask_folder import MaskWriter
from clipseed.store.reader import Seeds
from clipseed.store.records import SeedMap
from clipseed.store.seed_writer import SeedWriter
from clipseed.store.shards import WHOLE, Shard
from clipseed.store.writer import Finished
from clipseed.types import IGNORE, LabelMask

if TYPE_CHECKING:
    from clipseed.runtime.cluster import ClusterOptions

_UNIT_SIZE = 16
_PIXEL_BUDGET = {"cpu": 200_000}
_GPU_PIXEL_BUDGET = 6_000_000


@dataclass(frozen=True)
class CrfOptions:
    """Everything ``clipseed crf`` can be told.

    Attributes:
        source: Seeds of patches or pixels.
        alpha: Exponent of the background score ``(1 - max) ** alpha``; CLIP-ES: 1.
        confidence: Pixels whose largest posterior is below become 255; CLIP-ES: 0.95. ``None``: never.
        soft: Seeds file for the posterior of the classes (that of the background is what is missing to 1).
        empty: What becomes of the mask of an image in which some label got no pixel
            (:class:`~clipseed.store.mask_folder.MaskWriter`).
        paper: Half-precision scores and wrapped colours, as the released code; ``None``: as the seeds were made.
        images, root: Where the images, or their data set, are now, if they have moved.
    """

    source: Path
    out: Path
    solver: CrfSolver = "torch"
    parameters: CrfParameters = CLIP_ES
    alpha: float = CRF_ALPHA
    confidence: float | None = None
    soft: Path | None = None
    empty: EmptyPolicy = "background"
    paper: bool | None = None
    images: Path | None = None
    root: Path | None = None
    device: str = "auto"
    workers: int | None = None
    overwrite: bool = False
    shard: Shard = WHOLE
    cluster: ClusterOptions | None = None


@dataclass
class CrfReport:
    """What a run did."""

    source: Path
    out: Path
    total: int
    found: int
    stats: StreamStats
    seconds: float
    solver: str
    notes: list[str] = field(default_factory=list)
    skipped_file: Path | None = None
    open_shards: int = 0
    empty: EmptyLabels | None = None

    @property
    def unsure(self) -> float:
        """Share of pixels that became 255 in this run."""
        return self.stats.counters["unsure"] / max(1, self.stats.counters["pixels"])


Start = Callable[[int, int], Advance]


def run_crf(options: CrfOptions, start: Start | None = None) -> CrfReport:
    """Make masks of seeds; resumes what an earlier run began.

    Raises:
        ClipseedError: see the modules it uses; images that cannot be read are skipped and reported.
    """
    _check(options)
    began = time.perf_counter()
    with Seeds(options.source) as seeds:
        manifest = _manifest(options, relocated(seeds.manifest, options.images, options.root))
        with (
            contextlib.closing(open_engine(partial(_CrfWork, options), options.cluster)) as engine,
            _Sinks(options, manifest, earlier_in_seeds(seeds)) as sinks,
        ):
            sinks.follow({key: tuple(seeds.classes(key).tolist()) for key in seeds}, seeds.stamp)
            tasks, mine = _tasks(seeds, sinks, options.shard)
            found = len(sinks.done.intersection(mine))
            hint = f"interrupted; run the same command again to go on ({options.out} has what is done)"
            with interruptible(lambda: hint):
                advance = start(sum(len(task.samples) for task in tasks), found) if start else None
                stats = engine.run(tasks, lambda task, masks: sinks.write(task.index, masks), advance)
            count_empty(stats, sinks.masks)
            refuse_if_nothing(stats, sinks.done, options.shard)
            with interruptible(lambda: f"interrupted while finishing {options.out}; run the same command again"):
                finished = sinks.finish(list(seeds), stats.skipped, mine)
        return CrfReport(
            options.source, options.out, len(mine), found, stats, time.perf_counter() - began, options.solver,
            sinks.notes, finished.skipped_file, finished.open_shards, finished.empty,
        )  # fmt: skip


def _tasks(seeds: Seeds, sinks: _Sinks, shard: Shard) -> tuple[list[Task], list[str]]:
    """Units of the shard with what is missing of them, and all ids of the shard."""
    ids = list(seeds)
    units = [(k, ids[start : start + _UNIT_SIZE]) for k, start in enumerate(range(0, len(ids), _UNIT_SIZE))]
    mine = [(k, keys) for k, keys in units if shard.takes(k)]
    missing = ((k, [key for key in keys if key not in sinks.done]) for k, keys in mine)
    tasks = [Task(k, tuple(seed_sample(seeds, key) for key in keys)) for k, keys in missing if keys]
    return tasks, [key for _, keys in mine for key in keys]


def _check(options: CrfOptions) -> None:
    if options.solver == "pydensecrf" and importlib.util.find_spec("pydensecrf") is None:
        raise UsageError("--solver pydensecrf: it is not installed; pip install 'clipseed[crf]' (needs a C++ compiler)")
    try:
        options.parameters.check()
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    if not 0.01 <= options.alpha <= 100:
        raise UsageError(f"--alpha {options.alpha}: give an exponent from 0.01 to 100")
    if options.confidence is not None and not 0 < options.confidence <= 1:
        raise UsageError(f"--confidence {options.confidence}: give a probability above 0, up to 1 (0.95 in the paper)")
    places = {"the seeds": options.source, "--out": options.out, "--soft": options.soft}
    named = [(name, path.resolve()) for name, path in places.items() if path is not None]
    for (one, first), (other, second) in combinations(named, 2):
        if first == second:
            raise UsageError(f"{one} and {other} are both {first}; give each its own place")
    if options.workers is not None and options.workers < 0:
        raise UsageError("--workers: give auto or a number from 0")


def _paper(options: CrfOptions, source: Manifest) -> bool:
    return bool(source["options"].get("paper")) if options.paper is None else options.paper


def _manifest(options: CrfOptions, source: Manifest) -> Manifest:
    paper = _paper(options, source)
    kept = {key: source["options"].get(key) for key in ("exif", "max_side", "min_side")}
    made = {
        "alpha": options.alpha, "confidence": options.confidence, "paper": paper, "solver": options.solver,
        "empty": options.empty,
    }  # fmt: skip
    return {
        "kind": "crf",
        "method": "dense-crf",
        "options": {**kept, **asdict(options.parameters), **made},
        "source": {key: source[key] for key in ("kind", "method", "options", "source") if key in source},
        "model": source["model"],
        "weights": source.get("weights"),
        "vocabulary": source["vocabulary"],
        "dataset": source["dataset"],
        "input": str(options.source.resolve()),
        "versions": package_versions(),
    }


@dataclass(frozen=True)
class Mask:
    """A finished image: its mask, the classes of its seeds, and its posterior where it is kept."""

    id: str
    classes: tuple[int, ...]
    labels: LabelMask
    soft: SeedMap | None
    stamp: FileStamp = UNKNOWN


class _Sinks:
    """Where results go: masks always, posteriors on request; an image is done when both have it."""

    def __init__(self, options: CrfOptions, manifest: Manifest, earlier: Earlier) -> None:
        self.masks = MaskWriter(
            options.out, manifest, overwrite=options.overwrite, shard=options.shard, empty=options.empty,
            earlier=earlier,
        )  # fmt: skip
        self._soft = (
            SeedWriter(
                options.soft,
                manifest,
                "float16",
                _UNIT_SIZE,
                overwrite=options.overwrite,
                shard=options.shard,
                earlier=earlier,
            )
            if options.soft
            else None
        )

    def __enter__(self) -> _Sinks:
        self.masks.__enter__()
        try:
            if self._soft:
                self._soft.__enter__()
        except BaseException:
            self.masks.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        if self._soft:
            self._soft.__exit__(*error)
        self.masks.__exit__(*error)

    @property
    def done(self) -> set[str]:
        return self.masks.done & self._soft.done if self._soft else self.masks.done

    @property
    def notes(self) -> list[str]:
        return [*self.masks.notes, *(self._soft.notes if self._soft else [])]

    def follow(self, classes: Mapping[str, tuple[int, ...]], stamp: Callable[[str], FileStamp]) -> None:
        self.masks.follow(classes, stamp)
        if self._soft:
            self._soft.forget_unlike(classes)
            self._soft.follow(classes.keys(), stamp)

    def write(self, index: int, results: Sequence[Mask]) -> None:
        for mask in results:
            self.masks.write(mask.id, mask.labels, mask.classes, mask.stamp)
        if self._soft:
            soft = [mask.soft for mask in results if mask.soft is not None and mask.id not in self._soft.done]
            self._soft.write(index, soft)

    def finish(self, ids: Sequence[str], skipped: Sequence[tuple[str, str]], mine: Sequence[str]) -> Finished:
        if self._soft:
            self._soft.finish(ids, skipped)
        return self.masks.finish(skipped, mine)


class _CrfWork(Work[Any, Mask]):
    """Seeds to masks."""

    def __init__(self, options: CrfOptions) -> None:
        super().__init__()
        self.options = options
        self.seeds = Seeds(options.source, verify=False)
        reader = recorded_reader(relocated(self.seeds.manifest, options.images, options.root))
        paper = _paper(options, self.seeds.manifest)
        self.problem = Problem(options.source, reader, options.parameters, options.alpha, paper)
        self.native = options.solver == "pydensecrf"
        self.device = pick_device("cpu" if self.native else options.device)
        workers = options.workers
        if workers is None:
            workers = usable_cores() if self.native else default_workers(self.device)
        # The C++ solver never runs in this process, where its crash would be ours.
        self.workers = max(1, workers) if self.native else workers
        self.ahead = 8 + 2 * workers
        self.queue = batches_in_flight(self.device)
        budget = _PIXEL_BUDGET.get(self.device.type, _GPU_PIXEL_BUDGET) // 64
        self.batch = BatchSize(1 if self.native else None, budget)
        self.one_by_one = None if self.native else one_by_one(self.device, LARGE_IMAGE)

    def about(self) -> dict[str, Any]:
        """Any worker gives the same masks."""
        return {}

    @property
    def loader(self) -> Any:
        """Decodes an image; with the C++ solver it solves its problem as well."""
        return NativeSolver(self.problem) if self.native else ImageLoader(self.problem.reader)

    def compute(self, items: Sequence[Any]) -> Sequence[Mask | ImageError]:
        """Masks of a batch."""
        return self._label_solved(items) if self.native else self._solve(items)

    def _solve(self, items: Sequence[LoadedImage]) -> list[Mask | ImageError]:
        seeds = [self.seeds[item.sample.id] for item in items]
        found: list[Mask | ImageError | None] = [
            misfit(seed, item.size, item.stamp) for seed, item in zip(seeds, items, strict=True)
        ]
        fit = [k for k, problem in enumerate(found) if problem is None]
        if not len(seeds[0].classes):
            posteriors = [np.ones((1, *seeds[k].size), np.float32) for k in fit]
        else:
            posteriors = self._posteriors([(seeds[k], items[k]) for k in fit])
        for k, posterior in zip(fit, posteriors, strict=True):
            found[k] = self._labelled(seeds[k], posterior)
        return [result for result in found if result is not None]

    def _posteriors(self, chosen: Sequence[tuple[SeedMap, LoadedImage]]) -> list[Floats]:
        if not chosen:
            return []
        unaries = [torch.from_numpy(self.problem.unary(seed)).to(self.device) for seed, _ in chosen]
        images = [torch.from_numpy(self.problem.colours(item.pixels).copy()).to(self.device) for _, item in chosen]
        try:
            found = dense_crf(unaries, images, self.problem.parameters)
        except ValueError as error:
            raise UsageError(f"--smooth-xy, --colour-xy, --colour-rgb: {error}") from error
        return [posterior.cpu().numpy() for posterior in found]

    def _label_solved(self, items: Sequence[Solved]) -> list[Mask]:
        return [self._labelled(self.seeds[item.image.sample.id], item.posterior) for item in items]

    def _labelled(self, seed: SeedMap, posterior: Floats) -> Mask:
        keys = np.concatenate([[0], seed.classes + 1]).astype(np.uint8)
        labels: LabelMask = keys[posterior.argmax(axis=0)]
        if self.options.confidence is not None:
            unsure = posterior.max(axis=0) < self.options.confidence
            labels[unsure] = IGNORE
            self.counters["unsure"] += int(unsure.sum())
        self.counters["pixels"] += labels.size
        soft = replace(seed, cam=posterior[1:]) if self.options.soft else None
        return Mask(seed.id, tuple(seed.classes.tolist()), labels, soft, seed.stamp)
