"""``clipseed threshold``: CAMs to label masks, each pixel by its own CAMs, with no CRF and no segments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clipseed.data.dataset import relocated
from clipseed.data.types import Sample
from clipseed.defaults import EmptyPolicy
from clipseed.errors import ImageError, UsageError
from clipseed.pseudo.rules import Rules, label_mask, thresholding
from clipseed.runtime.images import cam_sample, earlier_in_cams, misfit, one_by_one
from clipseed.runtime.run import RunOptions, RunReport, Start, open_engine, run
from clipseed.runtime.stream import BatchSize
from clipseed.runtime.threads import OneByOne
from clipseed.runtime.work import Done, Work
from clipseed.store.cams import CamSet
from clipseed.store.label_mask_writer import Labelled, LabelMaskWriter
from clipseed.store.manifest import Manifest, label_manifest

_UNIT_SIZE = 64


@dataclass(frozen=True)
class ThresholdOptions:
    """Everything ``clipseed threshold`` can be told.

    Attributes:
        source: CAMs of patches or pixels. Those made with ``--paper`` are compared in half precision, as ``evaluate``
            does.
        threshold: The background scores this everywhere, 0 to below 1.
        alpha: Instead: it scores ``(1 - max) ** alpha``.
        empty: What becomes of the mask of an image in which some label got no pixel
            (:class:`~clipseed.store.label_mask_writer.LabelMaskWriter`).
        images, root: Where the images, or their data set, are now, if they have moved: no image is read, but the
            masks say where they are.
    """

    source: Path
    out: Path
    threshold: float | None = None
    alpha: float | None = None
    empty: EmptyPolicy = "background"
    images: Path | None = None
    root: Path | None = None
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(kw_only=True)
class ThresholdReport(RunReport):
    """What a run did."""

    source: Path


def run_threshold(options: ThresholdOptions, start: Start | None = None) -> ThresholdReport:
    """Make label masks of CAMs; resumes what an earlier run began.

    Raises:
        ClipseedError: see the modules it uses; images whose CAMs are no numbers are skipped and reported.
    """
    _check(options)
    with CamSet(options.source) as cams:
        manifest = _manifest(options, relocated(cams.manifest, options.images, options.root))
        with (
            contextlib.closing(open_engine(partial(_ThresholdWork, options, cams), options.run.cluster)) as engine,
            LabelMaskWriter(
                options.out, manifest, _UNIT_SIZE, overwrite=options.run.overwrite, shard=options.run.shard,
                empty=options.empty, earlier=earlier_in_cams(cams),
            ) as writer,
        ):  # fmt: skip
            writer.follow({key: tuple(cams.classes(key).tolist()) for key in cams}, cams.stamp)
            samples = [cam_sample(cams, key) for key in cams]
            done = run(engine, writer, samples, start, shard=options.run.shard)
        return ThresholdReport(**vars(done), source=options.source)


def _check(options: ThresholdOptions) -> None:
    if options.threshold is None and options.alpha is None:
        raise UsageError(
            "--threshold or --alpha: say what the background scores (clipseed evaluate finds the best threshold)"
        )
    if options.threshold is not None and options.alpha is not None:
        raise UsageError("--threshold and --alpha are two kinds of background score; give one")
    try:
        thresholding(threshold=options.threshold, alpha=options.alpha)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    if options.source.resolve() == options.out.resolve():
        raise UsageError(f"--out {options.out}: are the CAMs as well; choose another folder")
    options.run.check()


def _released(source: Manifest) -> bool:
    return bool(source["options"].get("paper"))


def _manifest(options: ThresholdOptions, source: Manifest) -> Manifest:
    chosen = {
        "threshold": options.threshold, "alpha": options.alpha, "paper": _released(source), "empty": options.empty,
    }  # fmt: skip
    return label_manifest(source, options.source, "threshold", "strongest", chosen)


class _ThresholdWork(Work[Done[Sample], Labelled]):
    """CAMs to label masks. No image is decoded, so workers are threads: as many as are asked for, else one per core."""

    def __init__(self, options: ThresholdOptions, cams: CamSet) -> None:
        super().__init__()
        self.cams = cams
        self.rules: Rules = thresholding(
            threshold=options.threshold, alpha=options.alpha, released=_released(cams.manifest)
        )
        self.workers = 0
        threads = options.run.workers
        self.one_by_one = OneByOne(threads, 1) if threads else one_by_one(torch.device("cpu"), 1)
        self.ahead = 4
        self.batch = BatchSize(1, 1)

    def about(self) -> dict[str, Any]:
        """Any worker gives the same masks."""
        return {}

    @property
    def loader(self) -> Callable[[Sample], Done[Sample]]:
        """Hands samples on as they are."""
        return Done

    def compute(self, items: Sequence[Done[Sample]]) -> list[Labelled | ImageError]:
        """Label masks of some images."""
        return [self._labelled(item.result.id) for item in items]

    def _labelled(self, identifier: str) -> Labelled | ImageError:
        cam = self.cams[identifier]
        problem = misfit(cam, cam.size)
        if problem is not None:
            return problem
        return Labelled(cam.id, label_mask(cam, self.rules), tuple(cam.classes.tolist()), cam.stamp)
