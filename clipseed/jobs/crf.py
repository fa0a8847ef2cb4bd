"""``clipseed crf``: CAMs to label masks with a dense CRF over the classes present."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipseed.data.dataset import relocated
from clipseed.data.types import ImageReader, Sample
from clipseed.defaults import CRF_ALPHA, CrfSolver, EmptyPolicy
from clipseed.device import pick_device
from clipseed.errors import ImageError, UsageError
from clipseed.pseudo.posterior import maps_unary, posterior_labels
from clipseed.refine.crf import CLIP_ES, CrfParameters, clip_es_colours, dense_crf
from clipseed.runtime.images import (
    LARGE_IMAGE,
    ImageLoader,
    LoadedImage,
    batches_in_flight,
    cam_sample,
    default_workers,
    earlier_in_cams,
    misfit,
    one_by_one,
    recorded_reader,
    usable_cores,
)
from clipseed.runtime.run import RunOptions, RunReport, Start, open_engine, run
from clipseed.runtime.stream import BatchSize
from clipseed.runtime.work import Done, Work
from clipseed.store.cam_records import Cam
from clipseed.store.cams import CamSet
from clipseed.store.manifest import Manifest, label_manifest
from clipseed.store.scored_masks import ScoredMask, ScoredMaskWriter

_UNIT_SIZE = 16
_PIXEL_BUDGET = {"cpu": 200_000}
_GPU_PIXEL_BUDGET = 6_000_000


Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Problem:
    """What the CRF of an image is given; survives pickling, because one solver runs in worker processes."""

    parameters: CrfParameters
    alpha: float
    paper: bool

    def unary(self, cam: Cam) -> Floats:
        """Negative log probabilities ``(1 + K, H, W)`` of background and classes."""
        return maps_unary(cam.upsampled(), self.alpha, released=self.paper)

    def colours(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The image as the colour kernel sees it."""
        return clip_es_colours(pixels) if self.paper else pixels

    def solved(
        self, cams: Sequence[Cam], images: Sequence[npt.NDArray[np.uint8]], device: torch.device
    ) -> list[Floats]:
        """Posterior ``(1 + K, H, W)`` of each of a batch of images ``(H, W, 3)``; all or none of them have classes.

        Raises:
            UsageError: a kernel is impossible.
        """
        if not cams or not len(cams[0].classes):
            return [np.ones((1, *cam.size), np.float32) for cam in cams]
        unaries = [torch.from_numpy(self.unary(cam)).to(device) for cam in cams]
        colours = [torch.from_numpy(self.colours(pixels).copy()).to(device) for pixels in images]
        try:
            return [posterior.cpu().numpy() for posterior in dense_crf(unaries, colours, self.parameters)]
        except ValueError as error:
            raise UsageError(f"--smooth-xy, --colour-xy, --colour-rgb: {error}") from error


@dataclass(frozen=True)
class NativeSolver:
    """Decodes an image and runs the C++ solver on it, in a worker process: a crash there costs that image only."""

    problem: Problem
    cams: CamSet
    reader: ImageReader

    def __call__(self, sample: Sample) -> Done[tuple[str, Floats]]:
        """Solve one image: its id and posterior ``(1 + K, H, W)``.

        Raises:
            ImageError: it cannot be read, or does not fit its CAMs.
        """
        from clipseed.refine.crf_native import native_crf

        image = ImageLoader(self.reader)(sample)
        cam = self.cams[sample.id]
        problem = misfit(cam, image.size, image.stamp)
        if problem is not None:
            raise problem
        if not len(cam.classes):
            return Done((sample.id, np.ones((1, *image.size), np.float32)))
        posterior = native_crf(self.problem.unary(cam), self.problem.colours(image.pixels), self.problem.parameters)
        return Done((sample.id, posterior))


@dataclass(frozen=True)
class CrfOptions:
    """Everything ``clipseed crf`` can be told.

    Attributes:
        source: CAMs of patches or pixels.
        alpha: Exponent of the background score ``(1 - max) ** alpha``; CLIP-ES: 1.
        confidence: Pixels whose largest posterior is below become 255; CLIP-ES: 0.95. ``None``: never.
        soft: CAM file for the posterior of the classes (that of the background is what is missing to 1).
        empty: What becomes of the mask of an image in which some label got no pixel
            (:class:`~clipseed.store.label_mask_writer.LabelMaskWriter`).
        paper: Half-precision scores and wrapped colours, as the released code; ``None``: as the CAMs were made.
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
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(kw_only=True)
class CrfReport(RunReport):
    """What a run did."""

    source: Path
    solver: str


def run_crf(options: CrfOptions, start: Start | None = None) -> CrfReport:
    """Make masks of CAMs; resumes what an earlier run began.

    Raises:
        ClipseedError: see the modules it uses; images that cannot be read are skipped and reported.
    """
    _check(options)
    with CamSet(options.source) as cams:
        manifest = _manifest(options, relocated(cams.manifest, options.images, options.root))
        with (
            contextlib.closing(open_engine(partial(_CrfWork, options, cams), options.run.cluster)) as engine,
            ScoredMaskWriter(
                options.out,
                options.soft,
                manifest,
                _UNIT_SIZE,
                overwrite=options.run.overwrite,
                shard=options.run.shard,
                empty=options.empty,
                earlier=earlier_in_cams(cams),
            ) as writer,
        ):
            writer.follow({key: tuple(cams.classes(key).tolist()) for key in cams}, cams.stamp)
            samples = [cam_sample(cams, key) for key in cams]
            done = run(engine, writer, samples, start, shard=options.run.shard)
        return CrfReport(**vars(done), source=options.source, solver=options.solver)


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
    places = {"the CAMs": options.source, "--out": options.out, "--soft": options.soft}
    named = [(name, path.resolve()) for name, path in places.items() if path is not None]
    for (one, first), (other, second) in combinations(named, 2):
        if first == second:
            raise UsageError(f"{one} and {other} are both {first}; give each its own place")
    options.run.check()


def _paper(options: CrfOptions, source: Manifest) -> bool:
    return bool(source["options"].get("paper")) if options.paper is None else options.paper


def _manifest(options: CrfOptions, source: Manifest) -> Manifest:
    paper = _paper(options, source)
    made = {
        "alpha": options.alpha, "confidence": options.confidence, "paper": paper, "solver": options.solver,
        "empty": options.empty,
    }  # fmt: skip
    return label_manifest(source, options.source, "crf", "dense-crf", {**asdict(options.parameters), **made})


class _CrfWork(Work[Any, ScoredMask]):
    """CAMs to masks."""

    def __init__(self, options: CrfOptions, cams: CamSet) -> None:
        super().__init__()
        self.options, self.cams = options, cams
        self.reader = recorded_reader(relocated(cams.manifest, options.images, options.root))
        self.problem = Problem(options.parameters, options.alpha, _paper(options, cams.manifest))
        self.native = options.solver == "pydensecrf"
        self.device = pick_device("cpu" if self.native else options.run.device)
        workers = options.run.workers
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
        return NativeSolver(self.problem, self.cams, self.reader) if self.native else ImageLoader(self.reader)

    def compute(self, items: Sequence[Any]) -> Sequence[ScoredMask | ImageError]:
        """Masks of a batch."""
        return self._label_solved(items) if self.native else self._solve(items)

    def _solve(self, items: Sequence[LoadedImage]) -> list[ScoredMask | ImageError]:
        cams = [self.cams[item.sample.id] for item in items]
        results: list[ScoredMask | ImageError | None] = [
            misfit(cam, item.size, item.stamp) for cam, item in zip(cams, items, strict=True)
        ]
        fit = [k for k, problem in enumerate(results) if problem is None]
        posteriors = self.problem.solved([cams[k] for k in fit], [items[k].pixels for k in fit], self.device)
        for k, posterior in zip(fit, posteriors, strict=True):
            results[k] = self._labelled(cams[k], posterior)
        return [result for result in results if result is not None]

    def _label_solved(self, items: Sequence[Done[tuple[str, Floats]]]) -> list[ScoredMask]:
        return [self._labelled(self.cams[key], posterior) for key, posterior in (item.result for item in items)]

    def _labelled(self, cam: Cam, posterior: Floats) -> ScoredMask:
        labels = posterior_labels(posterior, cam.classes, self.options.confidence)
        soft = replace(cam, maps=posterior[1:]) if self.options.soft else None
        return ScoredMask(cam.id, labels, tuple(cam.classes.tolist()), cam.stamp, soft)
