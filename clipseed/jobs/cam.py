"""``clipseed cam``: stream a data set through frozen CLIP and store its class activation maps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from clipseed.cam.methods import METHODS, Method, compute_cams
from clipseed.clip.model import DEFAULT_WEIGHTS, TOY_WEIGHTS, FrozenClip, Precision
from clipseed.clip.tagging import DEFAULT_TAG_THRESHOLD
from clipseed.clip.text import TextBank
from clipseed.data.dataset import DatasetOptions, open_dataset
from clipseed.data.types import ImageSet
from clipseed.errors import InputError, UsageError
from clipseed.jobs.engine import (
    LoadedViews,
    ViewLoader,
    default_workers,
    token_budget,
    unit_size_for,
    write_skipped,
)
from clipseed.jobs.refine_options import caa_manifest, caa_options, refine_manifest
from clipseed.refine.caa import CaaOptions, caa
from clipseed.runtime.decode import DecodePool
from clipseed.runtime.interrupt import interruptible
from clipseed.runtime.stream import BatchSize, StreamStats, Task, run_stream
from clipseed.store.manifest import Manifest, package_versions
from clipseed.store.records import SeedMap
from clipseed.store.writer import SeedWriter

if TYPE_CHECKING:
    from clipseed.jobs.tags import TagReport

DEFAULT_MAX_SIDE = 640


@dataclass(frozen=True)
class CamOptions:
    """Everything ``clipseed cam`` can be told.

    ``paper`` reproduces CLIP-ES's released code: its half-precision rounding, its word lists, native picture size,
    and maps stored in float32 so that later rounding is the released one. With ``refine`` the output is what
    ``clipseed refine caa`` would make of the maps; ``box_threshold`` as there.
    """

    data: DatasetOptions
    out: Path
    model: str | None = None
    weights: str | None = None
    device: str = "auto"
    precision: Precision = "auto"
    method: Method = "softmax-gradcam"
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    max_side: int = DEFAULT_MAX_SIDE
    min_side: int = 0
    paper: bool = False
    batch_size: int | None = None
    workers: int | None = None
    overwrite: bool = False
    refine: Literal["caa"] | None = None
    caa: CaaOptions = field(default_factory=CaaOptions)
    box_threshold: float | None = None
    tag_threshold: float = DEFAULT_TAG_THRESHOLD
    tag_top_k: int | None = None


@dataclass
class CamReport:
    """What a run did."""

    out: Path
    total: int
    found: int
    stats: StreamStats
    seconds: float
    model: dict[str, Any]
    device: str
    recomputed: int = 0
    notes: list[str] = field(default_factory=list)
    skipped_file: Path | None = None
    tags: TagReport | None = None


Advance = Callable[[int, StreamStats], None]
Start = Callable[[ImageSet, int, int], Advance]


def run_cam(options: CamOptions, start: Start | None = None, start_tags: Start | None = None) -> CamReport:
    """Compute and store the class activation maps of a data set; resumes what an earlier run began.

    Args:
        options: What to do.
        start: Called once with the data set, the number of pictures to do and the number done already; returns the
            progress callback.
        start_tags: The same for tagging pictures without labels, which comes first when the options ask for it.

    Raises:
        ClipseedError: see the modules it uses; pictures that cannot be read are skipped and reported instead.
    """
    _check(options)
    image_set = open_dataset(options.data)
    weights = options.weights or (TOY_WEIGHTS if options.data.dataset == "toy" else DEFAULT_WEIGHTS)
    clip = FrozenClip.load(options.model, weights, options.device, options.precision, released_rounding=options.paper)
    text = clip.encode_text(image_set.vocabulary)
    manifest = cam_manifest(options, image_set, clip)
    refinement = None
    if options.refine:
        refinement = caa_options(options.caa, options.box_threshold, image_set.vocabulary.name, options.paper)
        manifest = refine_manifest("caa", caa_manifest(refinement), manifest, clip.manifest(), clip.location)
    unit_size = unit_size_for(clip.tower.device)
    dtype = "float32" if options.paper else "float16"
    began = time.perf_counter()
    with SeedWriter(options.out, manifest, dtype, unit_size, overwrite=options.overwrite) as writer:
        tags = None
        if options.data.auto_labels:
            from clipseed.jobs.tags import tag_unlabelled

            image_set, tags = tag_unlabelled(options, image_set, clip, text, writer, start_tags)
        writer.forget_unlike({sample.id: sample.labels for sample in image_set.samples})
        job = _CamJob(options, image_set, clip, text, writer, refinement)
        stats = job.run(start)
        if tags is not None:
            stats.skipped = [(key, tags.skipped.get(key, reason)) for key, reason in stats.skipped]
        if stats.skipped and not writer.done:
            key, reason = stats.skipped[0]
            raise InputError(f"none of the {len(stats.skipped)} pictures could be used; the first, {key}: {reason}")
        ids = [sample.id for sample in image_set.samples]
        with interruptible(lambda: f"interrupted while finishing {options.out}; run the same command again"):
            writer.finish(ids)
            skipped = write_skipped(options.out, writer.portable, stats.skipped)
            writer.discard_parts()
    return CamReport(
        out=options.out,
        total=len(ids),
        found=job.found,
        stats=stats,
        seconds=time.perf_counter() - began,
        model=clip.manifest(),
        device=str(clip.tower.device),
        recomputed=job.recomputed,
        notes=writer.notes,
        skipped_file=skipped,
        tags=tags,
    )


def _check(options: CamOptions) -> None:
    if options.method not in METHODS:
        raise UsageError(f"--method {options.method}: choose one of {', '.join(METHODS)}")
    if not options.scales or any(not 0.1 <= scale <= 8 for scale in options.scales):
        raise UsageError("--scales: give factors between 0.1 and 8, such as 0.5,1.0,1.5")
    if options.batch_size is not None and options.batch_size < 1:
        raise UsageError("--batch-size: give auto or a number from 1")
    if options.workers is not None and options.workers < 0:
        raise UsageError("--workers: give auto or a number from 0")
    if not 0 < options.tag_threshold <= 1 or (options.tag_top_k is not None and options.tag_top_k < 1):
        raise UsageError("--tag-threshold: give a share above 0 and up to 1; --tag-top-k: a number from 1")
    if options.refine not in (None, "caa"):
        raise UsageError(
            f"--refine {options.refine}: only caa is made in the same pass; see clipseed refine for others"
        )
    if options.refine and 1.0 not in options.scales:
        raise UsageError("--refine caa needs 1 among the --scales, whose attention it spreads along")
    if options.max_side < 0 or options.min_side < 0:
        raise UsageError("--max-side and --min-side: give a number of pixels, or 0 for no limit")


def tag_settings(options: CamOptions) -> dict[str, Any]:
    """What a manifest says about labels that CLIP gave."""
    return {"labels": "auto", "tag_threshold": options.tag_threshold, "tag_top_k": options.tag_top_k}


def cam_manifest(options: CamOptions, image_set: ImageSet, clip: FrozenClip) -> Manifest:
    """Everything that decides the maps, and where the pictures are."""
    return {
        "kind": "cam",
        "method": options.method,
        "options": {
            "scales": list(options.scales),
            "flip": options.flip,
            "max_side": options.max_side,
            "min_side": options.min_side,
            "paper": options.paper,
            "exif": options.data.exif,
        },
        "model": clip.manifest(),
        "weights": clip.location,
        "max_pixels": options.data.max_pixels,
        "vocabulary": image_set.vocabulary.as_dict(),
        "dataset": {
            "name": image_set.name,
            "root": str(image_set.root) if image_set.root else None,
            "split": image_set.split,
            "ground_truth": image_set.ground_truth,
            **image_set.source,
            **(tag_settings(options) if options.data.auto_labels else {}),
        },
        "versions": package_versions(),
    }


class _CamJob:
    """One run: the loader, the batch function and the sink that the engine needs."""

    def __init__(
        self,
        options: CamOptions,
        image_set: ImageSet,
        clip: FrozenClip,
        text: TextBank,
        writer: SeedWriter,
        refinement: CaaOptions | None,
    ) -> None:
        self._options, self._set, self._clip, self._text, self._writer = options, image_set, clip, text, writer
        self._refinement = refinement
        self.found = len(writer.done & {sample.id for sample in image_set.samples})
        self.recomputed = 0

    def run(self, start: Start | None) -> StreamStats:
        """Do what is missing."""
        options, device = self._options, self._clip.tower.device
        samples = {sample.id: sample for sample in self._set.samples}
        units = self._writer.units(list(samples))
        unlabelled = [samples[key] for unit in units for key in unit.ids if samples[key].labels is None]
        tasks = [
            Task(unit.index, tuple(samples[key] for key in unit.ids if samples[key].labels is not None))
            for unit in units
        ]
        tasks = [task for task in tasks if task.samples]
        todo = sum(len(task.samples) for task in tasks)
        advance = start(self._set, todo, self.found) if start else (lambda count, stats: None)
        patch = self._clip.tower.patch
        loader = ViewLoader(self._set.reader, patch, options.scales, options.max_side, options.min_side)
        workers = options.workers if options.workers is not None else default_workers(device)
        batch = BatchSize(options.batch_size, token_budget(device))
        ahead = max(8, 2 * (options.batch_size or 8)) + 2 * workers
        with interruptible(self._hint), DecodePool(loader, workers, ahead) as pool:
            stats = run_stream(tasks, pool, self._compute, self._write, batch, advance)
        stats.skipped.extend((sample.id, "no labels are given for it") for sample in unlabelled)
        return stats

    def _hint(self) -> str:
        done = len(self._writer.done & {sample.id for sample in self._set.samples})
        return (
            f"interrupted; {done} of {len(self._set.samples)} pictures are safe in {self._writer.folder}. "
            "Run the same command again to go on."
        )

    def _compute(self, items: Sequence[LoadedViews]) -> list[SeedMap]:
        labels = [item.sample.labels or () for item in items]
        if not labels[0]:  # pictures that show no class need no model
            maps = [torch.zeros(0, *items[0].grid) for _ in items]
        else:
            device = self._clip.tower.device
            views = [
                torch.from_numpy(np.stack([item.views[k] for item in items])).to(device).permute(0, 3, 1, 2)
                for k in range(len(self._options.scales))
            ]
            options, grid = self._options, items[0].grid
            layers = self._refinement.layers if self._refinement else 0
            batch = compute_cams(
                self._clip, self._text, views, labels, grid, options.method, options.flip, options.paper, layers
            )
            maps = batch.maps
            if self._refinement and batch.attention is not None:
                # Rounded as `clipseed cam` would have stored them, so that one pass gives what two commands give.
                stored = maps if options.paper else [cam.half().float() for cam in maps]
                maps = caa(stored, batch.attention, self._refinement)
            self.recomputed += batch.recomputed
        return [
            SeedMap(item.sample.id, np.array(row, np.int32), cam.numpy(), item.size)
            for item, row, cam in zip(items, labels, maps, strict=True)
        ]

    def _write(self, task: Task, records: Sequence[SeedMap]) -> None:
        self._writer.write(task.index, records)
