"""``clipseed crf``: seeds to label masks with a dense CRF over the classes present."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from clipseed.clip.model import pick_device
from clipseed.data.types import Sample
from clipseed.errors import ImageError, InputError, UsageError
from clipseed.jobs.crf_problem import Floats, NativeSolver, Problem, Solved
from clipseed.jobs.engine import LoadedPicture, PictureLoader, default_workers, misfit, recorded_reader, write_skipped
from clipseed.refine.crf import CLIP_ES, CrfParameters, dense_crf
from clipseed.runtime.decode import DecodePool
from clipseed.runtime.interrupt import interruptible
from clipseed.runtime.stream import BatchSize, StreamStats, Task, run_stream
from clipseed.store.manifest import Manifest, package_versions
from clipseed.store.mask_folder import MaskWriter
from clipseed.store.masks import IGNORE, Labels
from clipseed.store.reader import Seeds
from clipseed.store.records import SeedMap
from clipseed.store.writer import SeedWriter

Engine = Literal["torch", "pydensecrf"]
ENGINES: tuple[Engine, ...] = ("torch", "pydensecrf")
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
        paper: Half-precision scores and wrapped colours, as the released code; ``None``: as the seeds were made.
    """

    source: Path
    out: Path
    engine: Engine = "torch"
    parameters: CrfParameters = CLIP_ES
    alpha: float = 1.0
    confidence: float | None = None
    soft: Path | None = None
    paper: bool | None = None
    images: Path | None = None
    device: str = "auto"
    workers: int | None = None
    overwrite: bool = False


@dataclass
class CrfReport:
    """What a run did. ``unsure`` is the share of pixels that became 255 in this run."""

    source: Path
    out: Path
    total: int
    found: int
    stats: StreamStats
    seconds: float
    engine: str
    unsure: float = 0.0
    notes: list[str] = field(default_factory=list)
    skipped_file: Path | None = None


Advance = Callable[[int, StreamStats], None]
Start = Callable[[int, int], Advance]


def run_crf(options: CrfOptions, start: Start | None = None) -> CrfReport:
    """Make masks of seeds; resumes what an earlier run began.

    Raises:
        ClipseedError: see the modules it uses; pictures that cannot be read are skipped and reported.
    """
    _check(options)
    began = time.perf_counter()
    with Seeds(options.source) as seeds:
        recorded = seeds.manifest["options"]
        paper = bool(recorded.get("paper")) if options.paper is None else options.paper
        reader = recorded_reader(seeds.manifest, options.images)
        manifest = _manifest(options, seeds.manifest, paper)
        problem = Problem(options.source, reader, options.parameters, options.alpha, paper)
        with _Sinks(options, manifest) as sinks:
            sinks.forget_unlike({key: tuple(seeds.classes(key).tolist()) for key in seeds})
            job = _CrfJob(options, problem, seeds, sinks)
            stats = job.run(start)
            if stats.skipped and not sinks.done:
                key, reason = stats.skipped[0]
                raise InputError(f"none of the {len(stats.skipped)} pictures could be used; the first, {key}: {reason}")
            sinks.finish(list(seeds))
            skipped = write_skipped(options.out, False, stats.skipped)
        pixels = max(1, job.pixels)
        return CrfReport(
            options.source, options.out, len(seeds), job.found, stats, time.perf_counter() - began, options.engine,
            job.unsure / pixels, sinks.notes, skipped,
        )  # fmt: skip


def _check(options: CrfOptions) -> None:
    if options.engine not in ENGINES:
        raise UsageError(f"--engine {options.engine}: choose one of {', '.join(ENGINES)}")
    if options.engine == "pydensecrf" and importlib.util.find_spec("pydensecrf") is None:
        raise UsageError("--engine pydensecrf: it is not installed; pip install 'clipseed[crf]' (needs a C++ compiler)")
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


def _manifest(options: CrfOptions, source: Manifest, paper: bool) -> Manifest:
    kept = {key: source["options"].get(key) for key in ("exif", "max_side", "min_side")}
    made = {"alpha": options.alpha, "confidence": options.confidence, "paper": paper, "engine": options.engine}
    return {
        "kind": "crf",
        "method": "dense-crf",
        "options": {**kept, **asdict(options.parameters), **made},
        "source": {key: source[key] for key in ("kind", "method", "options", "source") if key in source},
        "model": source["model"],
        "weights": source.get("weights"),
        "vocabulary": source["vocabulary"],
        "dataset": source["dataset"],
        "versions": package_versions(),
    }


@dataclass(frozen=True)
class Mask:
    """A finished picture: its mask, the classes of its seeds, and its posterior where it is kept."""

    id: str
    classes: tuple[int, ...]
    labels: Labels
    soft: SeedMap | None


class _Sinks:
    """Where results go: masks always, posteriors on request; a picture is done when both have it."""

    def __init__(self, options: CrfOptions, manifest: Manifest) -> None:
        self._masks = MaskWriter(options.out, manifest, overwrite=options.overwrite)
        self._soft = (
            SeedWriter(options.soft, manifest, "float16", _UNIT_SIZE, overwrite=options.overwrite)
            if options.soft
            else None
        )

    def __enter__(self) -> _Sinks:
        self._masks.__enter__()
        try:
            if self._soft:
                self._soft.__enter__()
        except BaseException:
            self._masks.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        if self._soft:
            self._soft.__exit__(*error)
        self._masks.__exit__(*error)

    @property
    def done(self) -> set[str]:
        return self._masks.done & self._soft.done if self._soft else self._masks.done

    @property
    def notes(self) -> list[str]:
        return [*self._masks.notes, *(self._soft.notes if self._soft else [])]

    def forget_unlike(self, classes: Mapping[str, tuple[int, ...]]) -> None:
        self._masks.forget_unlike(classes)
        if self._soft:
            self._soft.forget_unlike(classes)

    def write(self, index: int, results: Sequence[Mask]) -> None:
        for mask in results:
            self._masks.write(mask.id, mask.labels, mask.classes)
        if self._soft:
            soft = [mask.soft for mask in results if mask.soft is not None and mask.id not in self._soft.done]
            self._soft.write(index, soft)

    def finish(self, ids: Sequence[str]) -> None:
        if self._soft:
            self._soft.finish(ids)
            self._soft.discard_parts()


class _CrfJob:
    def __init__(self, options: CrfOptions, problem: Problem, seeds: Seeds, sinks: _Sinks) -> None:
        self.options, self.problem, self.seeds, self.sinks = options, problem, seeds, sinks
        self.device = pick_device(options.device if options.engine == "torch" else "cpu")
        self.found = len(sinks.done & set(seeds))
        self.unsure = self.pixels = 0

    def run(self, start: Start | None) -> StreamStats:
        """Do what is missing."""
        ids = list(self.seeds)
        size = _UNIT_SIZE
        cut = [[key for key in ids[k : k + size] if key not in self.sinks.done] for k in range(0, len(ids), size)]
        tasks = [
            Task(index, tuple(Sample(key, Path(key), tuple(self.seeds.classes(key).tolist())) for key in keys))
            for index, keys in enumerate(cut)
            if keys
        ]
        todo = sum(len(task.samples) for task in tasks)
        advance = start(todo, self.found) if start else (lambda count, stats: None)
        native = self.options.engine == "pydensecrf"
        workers = self.options.workers
        if workers is None:
            workers = (os.cpu_count() or 1) if native else default_workers(self.device)
        loader: Any = NativeSolver(self.problem) if native else PictureLoader(self.problem.reader)
        compute: Any = self._label_solved if native else self._solve
        budget = _PIXEL_BUDGET.get(self.device.type, _GPU_PIXEL_BUDGET) // 64
        hint = f"interrupted; run the same command again to go on ({self.options.out} has what is done)"

        def write(task: Task, results: Sequence[Mask]) -> None:
            self.sinks.write(task.index, results)

        # The C++ engine never runs in this process, where its crash would be ours.
        pool = DecodePool(loader, max(1, workers) if native else workers, 8 + 2 * workers)
        with interruptible(lambda: hint), pool:
            return run_stream(tasks, pool, compute, write, BatchSize(1 if native else None, budget), advance)

    def _solve(self, items: Sequence[LoadedPicture]) -> list[Mask | ImageError]:
        seeds = [self.seeds[item.sample.id] for item in items]
        found: list[Mask | ImageError | None] = [
            misfit(seed, item.size) for seed, item in zip(seeds, items, strict=True)
        ]
        fit = [k for k, problem in enumerate(found) if problem is None]
        if not len(seeds[0].classes):
            posteriors = [np.ones((1, *seeds[k].size), np.float32) for k in fit]
        else:
            posteriors = self._posteriors([(seeds[k], items[k]) for k in fit])
        for k, posterior in zip(fit, posteriors, strict=True):
            found[k] = self._labelled(seeds[k], posterior)
        return [result for result in found if result is not None]

    def _posteriors(self, chosen: Sequence[tuple[SeedMap, LoadedPicture]]) -> list[Floats]:
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
        return [self._labelled(self.seeds[item.picture.sample.id], item.posterior) for item in items]

    def _labelled(self, seed: SeedMap, posterior: Floats) -> Mask:
        keys = np.concatenate([[0], seed.classes + 1]).astype(np.uint8)
        labels: Labels = keys[posterior.argmax(axis=0)]
        if self.options.confidence is not None:
            unsure = posterior.max(axis=0) < self.options.confidence
            labels[unsure] = IGNORE
            self.unsure += int(unsure.sum())
        self.pixels += labels.size
        soft = SeedMap(seed.id, seed.classes, posterior[1:], seed.size) if self.options.soft else None
        return Mask(seed.id, tuple(seed.classes.tolist()), labels, soft)
