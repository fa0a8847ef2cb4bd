"""``clipseed demo``: the whole pipeline on the built-in world, offline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipseed.cam.methods import Method
from clipseed.data.dataset import DatasetOptions
from clipseed.jobs.cam import CamOptions, Start, run_cam
from clipseed.jobs.evaluate import EvaluateOptions, EvaluateReport, evaluate
from clipseed.jobs.inspect import write_preview
from clipseed.store.files import storage_errors


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


_CAM_STAGES: tuple[tuple[str, str, str, Method], ...] = (
    ("gradcam", "Grad-CAM (no competition)", "gradcam.h5", "gradcam"),
    ("cam", "softmax-GradCAM with background words", "cams.h5", "softmax-gradcam"),
)


def run_demo(
    folder: Path,
    limit: int | None,
    device: str,
    start: Callable[[str], Start],
    scoring: Callable[[int], Callable[[int], None]],
) -> tuple[list[Stage], Path]:
    """Run all stages on the toy set into ``folder``; returns their scores and the overlay picture.

    Args:
        folder: Made when missing; outputs of an earlier demo are replaced.
        limit: Only the first so many scenes.
        device: As everywhere.
        start: From a stage's title to the start callback of :func:`~clipseed.jobs.cam.run_cam`.
        scoring: Start callback of :func:`~clipseed.jobs.evaluate.evaluate`.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    data = DatasetOptions(dataset="toy", limit=limit)
    stages = []
    for name, title, file, method in _CAM_STAGES:
        options = CamOptions(data=data, out=folder / file, method=method, device=device, overwrite=True)
        report = run_cam(options, start(title))
        scores = evaluate(EvaluateOptions(prediction=options.out), scoring)
        stages.append(Stage(name, title, options.out, scores, report.stats.computed / report.seconds))
    preview = folder / "preview.png"
    write_preview(stages[-1].out, preview, count=5)
    return stages, preview
