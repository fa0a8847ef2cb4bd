"""``clipseed demo``: the whole pipeline on the built-in world, offline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipseed.cam.methods import Method
from clipseed.data.dataset import DatasetOptions
from clipseed.data.toy.dataset import HELD_OUT_SEED, toy_scene
from clipseed.jobs.cam import CamOptions, run_cam
from clipseed.jobs.crf import CrfOptions, run_crf
from clipseed.jobs.evaluate import EvaluateOptions, EvaluateReport, evaluate
from clipseed.jobs.inspect import write_preview
from clipseed.jobs.refine import RefineOptions, run_refine
from clipseed.jobs.sam_masks import SamMasksOptions, run_sam_masks
from clipseed.jobs.sam_seed import SamSeedOptions, run_sam_seed
from clipseed.report.overlay import contact_sheet, label_overlay, maps_overlay
from clipseed.runtime.run import RunOptions
from clipseed.runtime.stream import StreamStats
from clipseed.sam.options import FMA
from clipseed.store.cams import CamSet
from clipseed.store.files import replacing, storage_errors
from clipseed.store.label_mask_folder import LabelMaskFolder
from clipseed.store.stages import CAM_OUTPUT, CRF_OUTPUT, SEED_OUTPUT, SEGMENTS_OUTPUT

GRID = replace(FMA, points_per_side=16, crop_layers=0)
"""FMA-WSSS's settings for images of 200 pixels: fewer points, no crops."""


STAGES = (
    ("gradcam", "plain Grad-CAM, to compare with"),
    ("cam", "softmax-GradCAM (CLIP-ES)"),
    ("caa", "CAA: maps spread along attention"),
    ("crf", "dense CRF on the maps of CAA"),
    ("sam-seed", "SAM segments on the maps of CAA"),
)
"""Name and title of every stage, in order."""
_SHOWN = 5


def expected_seconds(scenes: int) -> float:
    """About how long the demo takes on two idle cores: measured 55 s for 60 scenes, of them 3 s to start."""
    return 4 + 0.85 * scenes


@dataclass(frozen=True)
class Stage:
    """One step of the demo: its number from 1, name, output, score and speed."""

    number: int
    name: str
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


@dataclass(frozen=True)
class DemoResult:
    """What the demo made: its stages, and the overlays of pseudo-labels and of maps."""

    stages: list[Stage]
    previews: tuple[Path, Path]


Begin = Callable[[int, str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Progress:
    """How far a stage is: told the number of images, returns the callback that advances."""

    number: int
    title: str
    begin: Begin

    def __call__(self, todo: int, part: str = "") -> Callable[[int, StreamStats], None]:
        """Begin, ``part`` naming what a stage of several parts is at."""
        advance = self.begin(self.number, f"{self.title}{part}", todo)
        return lambda count, stats: advance(count)


Work = Callable[[Path, Path, Progress], StreamStats]


def run_demo(folder: Path, scenes: int, device: str, begin: Begin, tell: Callable[[Stage], None]) -> DemoResult:
    """Run all stages on the toy set into ``folder``.

    Args:
        folder: Made when missing; outputs of an earlier demo are replaced.
        scenes: How many of the scored scenes.
        device: As everywhere.
        begin: Called with a stage's number, title and number of images; returns what advances the progress display.
        tell: Called with every stage when it has been scored.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    data, how = DatasetOptions(dataset="toy", limit=scenes), RunOptions(device=device, overwrite=True)

    def cam(method: Method) -> Work:
        def work(source: Path, out: Path, progress: Progress) -> StreamStats:
            options = CamOptions(data=data, out=out, method=method, run=how)
            return run_cam(options, lambda image_set: lambda todo, done: progress(todo)).stats

        return work

    def caa(source: Path, out: Path, progress: Progress) -> StreamStats:
        options = RefineOptions("caa", source, out, run=how)
        return run_refine(options, lambda todo, done: progress(todo)).stats

    def crf(source: Path, out: Path, progress: Progress) -> StreamStats:
        options = CrfOptions(source, out, run=how)
        return run_crf(options, lambda todo, done: progress(todo)).stats

    def sam(source: Path, out: Path, progress: Progress) -> StreamStats:
        segments = SamMasksOptions(folder / SEGMENTS_OUTPUT, cams=source, proposals=GRID, run=how)
        run_sam_masks(segments, lambda todo, done: progress(todo, ": segments"))
        options = SamSeedOptions(source, folder / SEGMENTS_OUTPUT, out, run=RunOptions(workers=0, overwrite=True))
        return run_sam_seed(options, lambda todo, done: progress(todo, ": seeding")).stats

    maps, refined = folder / CAM_OUTPUT, folder / "cams-caa.h5"
    plan: tuple[tuple[Path, Path, Work], ...] = (
        (folder, folder / "gradcam.h5", cam("gradcam")),
        (folder, maps, cam("softmax-gradcam")),
        (maps, refined, caa),
        (refined, folder / CRF_OUTPUT, crf),
        (refined, folder / SEED_OUTPUT, sam),
    )
    stages: list[Stage] = []
    for number, ((name, title), (source, out, work)) in enumerate(zip(STAGES, plan, strict=True), start=1):
        began = time.perf_counter()
        stats = work(source, out, Progress(number, title, begin))
        seconds = time.perf_counter() - began
        scores = evaluate(EvaluateOptions(prediction=out))
        stages.append(Stage(number, name, out, scores, stats.computed / seconds))
        tell(stages[-1])
    return DemoResult(stages, _write_previews(folder, maps, refined))


def _write_previews(folder: Path, plain: Path, refined: Path) -> tuple[Path, Path]:
    """Overlays of some scenes, one column for each stage beside image and truth; and apart from it every map."""
    labels, maps = folder / "pseudo-labels.png", folder / "maps.png"
    kinds = (("CRF", LabelMaskFolder(folder / CRF_OUTPUT)), ("segments", LabelMaskFolder(folder / SEED_OUTPUT)))
    with CamSet(plain) as first, CamSet(refined) as cams:
        # Several classes show what the methods are for; the same scenes whatever their number.
        chosen = [key for key in cams if len(cams.classes(key)) > 1][:_SHOWN] or list(cams)[:_SHOWN]
        rows = []
        for key in chosen:
            scene, cam = toy_scene(HELD_OUT_SEED, key), cams[key]
            image, names = scene.image(), ", ".join(cams.class_names[k] for k in cam.classes)
            faint = (0.35 * image + 0.65 * 255).astype(np.uint8)  # strong colours are the classes' alone
            rows.append([
                (names, image),
                ("truth", label_overlay(faint, scene.mask())),
                ("CAM", maps_overlay(faint, first[key].upsampled(), cam.classes)),
                ("CAA", maps_overlay(faint, cam.upsampled(), cam.classes)),
                *((f"labels: {kind}", label_overlay(faint, masks.read(key))) for kind, masks in kinds),
            ])  # fmt: skip
    with replacing(labels) as temporary:
        contact_sheet(rows).save(temporary, format="PNG")
    write_preview(refined, maps, ids=tuple(chosen))
    return labels, maps
