"""``clipseed demo``: the whole pipeline on the built-in world, offline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipseed.cam.methods import Method
from clipseed.data.dataset import DatasetOptions
from clipseed.jobs.cam import CamOptions, run_cam
from clipseed.jobs.crf import CrfOptions, run_crf
from clipseed.jobs.evaluate import evaluate
from clipseed.jobs.evaluate_options import EvaluateOptions, EvaluateReport
from clipseed.jobs.inspect import write_preview
from clipseed.jobs.refine import run_refine
from clipseed.jobs.refine_options import RefineOptions
from clipseed.jobs.sam_masks import run_sam_masks
from clipseed.jobs.sam_options import SamMasksOptions
from clipseed.jobs.sam_seed import SamSeedOptions, run_sam_seed
from clipseed.runtime.stream import StreamStats
from clipseed.sam.options import FMA
from clipseed.store.files import storage_errors

GRID = replace(FMA, points_per_side=16, crop_layers=0)
"""FMA-WSSS's settings for pictures of 200 pixels: fewer points, no crops."""


@dataclass(frozen=True)
class Stage:
    """One step of the demo: its name, output, score and speed."""

    name: str
    title: str
    out: Path
    report: EvaluateReport
    images_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        scores = self.report.as_dict()
        kept = ("miou", "class_iou", "pixel_accuracy", "images", "threshold")
        return {
            "name": self.name,
            "out": str(self.out),
            "images_per_second": round(self.images_per_second, 2),
            **{key: scores[key] for key in kept},
        }


Work = Callable[[Path, Path, "Progress"], StreamStats]


@dataclass(frozen=True)
class Progress:
    """How far a stage is: told the number of pictures, returns the callback that advances."""

    title: str
    begin: Callable[[str, int], Callable[[int], None]]

    def __call__(self, todo: int) -> Callable[[int, StreamStats], None]:
        """Begin."""
        advance = self.begin(self.title, todo)
        return lambda count, stats: advance(count)


def run_demo(
    folder: Path, limit: int | None, device: str, begin: Callable[[str, int], Callable[[int], None]]
) -> tuple[list[Stage], Path]:
    """Run all stages on the toy set into ``folder``; returns their scores and the overlay picture.

    Args:
        folder: Made when missing; outputs of an earlier demo are replaced.
        limit: Only the first so many scenes.
        device: As everywhere.
        begin: Called with a stage's title and its number of pictures; returns what advances the progress display.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    data = DatasetOptions(dataset="toy", limit=limit)

    def cam(method: Method) -> Work:
        def work(source: Path, out: Path, progress: Progress) -> StreamStats:
            options = CamOptions(data=data, out=out, method=method, device=device, overwrite=True)
            return run_cam(options, lambda image_set, todo, done: progress(todo)).stats

        return work

    def caa(source: Path, out: Path, progress: Progress) -> StreamStats:
        options = RefineOptions("caa", source, out, device=device, overwrite=True)
        return run_refine(options, lambda todo, done: progress(todo)).stats

    def crf(source: Path, out: Path, progress: Progress) -> StreamStats:
        options = CrfOptions(source, out, device=device, overwrite=True)
        return run_crf(options, lambda todo, done: progress(todo)).stats

    def sam(source: Path, out: Path, progress: Progress) -> StreamStats:
        segments = SamMasksOptions(folder / "masks.h5", seeds=source, proposals=GRID, device=device, overwrite=True)
        run_sam_masks(segments, lambda todo, done: progress(todo))
        options = SamSeedOptions(source, folder / "masks.h5", out, workers=0, overwrite=True)
        return run_sam_seed(options, lambda todo, done: Progress("+ SAM-based seeding", begin)(todo)).stats

    plan: tuple[tuple[str, str, str, str, Work], ...] = (
        ("gradcam", "Grad-CAM (no competition)", "", "gradcam.h5", cam("gradcam")),
        ("cam", "softmax-GradCAM with background words", "", "cams.h5", cam("softmax-gradcam")),
        ("caa", "+ class-aware attention affinity", "cams.h5", "cams-caa.h5", caa),
        ("crf", "+ dense CRF", "cams-caa.h5", "pseudo", crf),
        ("sam", "instead: SAM's segments, SAM-based seeding", "cams-caa.h5", "seeds", sam),
    )
    stages: list[Stage] = []
    for name, title, source, file, work in plan:
        began = time.perf_counter()
        stats = work(folder / source, folder / file, Progress(title, begin))
        seconds = time.perf_counter() - began
        scores = evaluate(EvaluateOptions(prediction=folder / file), lambda total: begin("evaluate", total))
        stages.append(Stage(name, title, folder / file, scores, stats.computed / seconds))
    preview = folder / "preview.png"
    write_preview(folder / "cams-caa.h5", preview, count=5)
    return stages, preview
