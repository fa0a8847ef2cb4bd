"""``clipseed refine``: read seeds, look at the pictures again, store refined seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipseed.cam.dense import dense_features, similarities
from clipseed.clip.attention import patch_attention
from clipseed.clip.model import FrozenClip, pick_device
from clipseed.data.types import Sample
from clipseed.data.vocabulary import parse_vocabulary
from clipseed.errors import ImageError, InputError, UsageError, WeightsError
from clipseed.jobs.engine import (
    LoadedPicture,
    LoadedViews,
    PictureLoader,
    ViewLoader,
    default_workers,
    misfit,
    recorded_reader,
    token_budget,
    unit_size_for,
    write_skipped,
)
from clipseed.jobs.refine_options import (
    RefineOptions,
    RefineReport,
    Start,
    caa_manifest,
    caa_options,
    check,
    default_out,
    refine_manifest,
)
from clipseed.refine.affinity import balance
from clipseed.refine.caa import caa, spread_within_boxes
from clipseed.refine.distribution import distribution_affinity
from clipseed.refine.par import refine_par
from clipseed.runtime.decode import DecodePool
from clipseed.runtime.interrupt import interruptible
from clipseed.runtime.stream import BatchSize, StreamStats, Task, run_stream
from clipseed.store.manifest import Manifest
from clipseed.store.reader import Seeds
from clipseed.store.records import SeedMap
from clipseed.store.writer import SeedWriter


def run_refine(options: RefineOptions, start: Start | None = None) -> RefineReport:
    """Refine seeds; resumes what an earlier run began.

    Args:
        options: What to do.
        start: Called with the number of pictures to do and done; returns the progress callback.

    Raises:
        ClipseedError: see the modules it uses; pictures that cannot be read are skipped and reported.
    """
    check(options)
    out = options.out or default_out(options.source, options.method)
    with Seeds(options.source) as seeds:
        if out.resolve() == options.source.resolve():
            raise UsageError(f"--out {out}: is the file that is being refined")
        job: _Refinement = _Par(options, seeds) if options.method == "par" else _Spreading(options, seeds)
        began = time.perf_counter()
        dtype = "float32" if seeds.manifest["options"].get("paper") else "float16"
        unit = unit_size_for(job.device)
        with SeedWriter(out, job.manifest, dtype, unit, overwrite=options.overwrite) as writer:
            writer.forget_unlike({key: tuple(seeds.classes(key).tolist()) for key in seeds})
            found = len(writer.done & set(seeds))
            stats = job.run(writer, found, start)
            if stats.skipped and not writer.done:
                key, reason = stats.skipped[0]
                raise InputError(f"none of the {len(stats.skipped)} pictures could be used; the first, {key}: {reason}")
            with interruptible(lambda: f"interrupted while finishing {out}; run the same command again"):
                writer.finish(list(seeds))
                skipped = write_skipped(out, writer.portable, stats.skipped)
                writer.discard_parts()
        return RefineReport(
            source=options.source,
            out=out,
            total=len(seeds),
            found=found,
            stats=stats,
            seconds=time.perf_counter() - began,
            device=str(job.device),
            recomputed=job.recomputed,
            notes=writer.notes,
            skipped_file=skipped,
        )


class _Refinement:
    """What the refinements share: streaming the pictures of stored seeds."""

    manifest: Manifest
    device: torch.device

    def __init__(self, options: RefineOptions, seeds: Seeds) -> None:
        self.options, self.seeds = options, seeds
        self.recomputed = 0
        self.reader = recorded_reader(seeds.manifest, options.images)

    def run(self, writer: SeedWriter, found: int, start: Start | None) -> StreamStats:
        """Refine what is missing."""
        tasks = [
            Task(unit.index, tuple(Sample(key, Path(key), self._labels(key)) for key in unit.ids))
            for unit in writer.units(list(self.seeds))
        ]
        todo = sum(len(task.samples) for task in tasks)
        advance = start(todo, found) if start else (lambda count, stats: None)
        workers = self.options.workers if self.options.workers is not None else default_workers(self.device)
        batch = BatchSize(self.options.batch_size, token_budget(self.device))
        hint = f"interrupted; run the same command again to go on ({writer.folder} has what is done)"

        def write(task: Task, records: Sequence[SeedMap]) -> None:
            writer.write(task.index, records)

        with interruptible(lambda: hint), DecodePool(self.loader(), workers, 16 + 2 * workers) as pool:
            return run_stream(tasks, pool, self.each, write, batch, advance)

    def _labels(self, key: str) -> tuple[int, ...]:
        return tuple(int(k) for k in self.seeds.classes(key))

    def loader(self) -> Callable[[Sample], Any]:
        raise NotImplementedError

    def compute(self, items: Sequence[Any], seeds: list[SeedMap]) -> list[SeedMap]:
        raise NotImplementedError

    def each(self, items: Sequence[Any]) -> list[SeedMap | ImageError]:
        """Refine a batch, leaving out pictures that do not fit their seeds."""
        seeds = [self.seeds[item.sample.id] for item in items]
        found: list[SeedMap | ImageError | None] = [
            misfit(seed, item.size) for seed, item in zip(seeds, items, strict=True)
        ]
        fit = [k for k, problem in enumerate(found) if problem is None]
        if fit:
            refined = self.compute([items[k] for k in fit], [seeds[k] for k in fit])
            for k, result in zip(fit, refined, strict=True):
                found[k] = result
        return [result for result in found if result is not None]


class _Spreading(_Refinement):
    """CAA and the class-distribution affinity: maps spread between patches."""

    def __init__(self, options: RefineOptions, seeds: Seeds) -> None:
        super().__init__(options, seeds)
        source = seeds.manifest
        recorded = source["options"]
        if source["method"] in ("par", "dense-crf"):
            raise UsageError(f"{options.source}: holds maps of pixels; refine {options.method} works on patch maps")
        paper = bool(recorded.get("paper")) if options.paper is None else options.paper
        self.caa = caa_options(options.caa, options.box_threshold, str(source["vocabulary"].get("name")), paper)
        model = source["model"]
        name = None if model["model"] == "inferred" else model["model"]
        weights = options.weights or source.get("weights") or model["weights"]
        self.clip = FrozenClip.load(name, weights, options.device, options.precision, released_rounding=paper)
        if self.clip.info.sha256 != model["sha256"]:
            raise WeightsError(f"--weights {weights}: not the weights that {options.source} was made with")
        self.device = self.clip.tower.device
        constants = caa_manifest(self.caa)
        if options.method == "js":
            self.text = self.clip.encode_text(parse_vocabulary(source["vocabulary"], str(options.source), "classes"))
            constants["temperature"] = options.temperature
        self.manifest = refine_manifest(options.method, constants, source, self.clip.manifest(), self.clip.location)

    def loader(self) -> ViewLoader:
        recorded = self.seeds.manifest["options"]
        limits = (int(recorded.get("max_side") or 0), int(recorded.get("min_side") or 0))
        return ViewLoader(self.reader, self.clip.tower.patch, (1.0,), *limits)

    def compute(self, items: Sequence[LoadedViews], seeds: list[SeedMap]) -> list[SeedMap]:
        if not len(seeds[0].classes):
            return seeds
        for item, seed in zip(items, seeds, strict=True):
            if seed.cam.shape[1:] != item.grid:
                raise InputError(f"{item.sample.id}: its maps are not on the patch grid of the model")
        pixels = torch.from_numpy(np.stack([item.views[0] for item in items])).to(self.device).permute(0, 3, 1, 2)
        cams = [torch.from_numpy(seed.cam) for seed in seeds]
        maps = self._maps(self.clip, pixels, cams)
        broken = [k for k, found in enumerate(maps) if not torch.isfinite(found).all()]
        if broken and self.clip.exact is not self.clip:
            self.recomputed += len(broken)
            again = self._maps(self.clip.exact, pixels[broken], [cams[k] for k in broken])
            for k, found in zip(broken, again, strict=True):
                maps[k] = found
        return [
            SeedMap(seed.id, seed.classes, found.nan_to_num(0.0).numpy(), seed.size)
            for seed, found in zip(seeds, maps, strict=True)
        ]

    @torch.inference_mode()
    def _maps(self, clip: FrozenClip, pixels: Tensor, cams: list[Tensor]) -> list[Tensor]:
        attention = patch_attention(clip.tower, pixels, self.caa.layers)
        if self.options.method == "caa":
            return caa(cams, attention, self.caa)
        scores = similarities(dense_features(clip, pixels, "svc"), self.text)
        affinity = balance(distribution_affinity(scores, attention, self.options.temperature), self.caa.rounds)
        return spread_within_boxes(cams, affinity, self.caa)


class _Par(_Refinement):
    """Pixel-adaptive refinement: maps follow the colours of the picture, at its full size."""

    def __init__(self, options: RefineOptions, seeds: Seeds) -> None:
        super().__init__(options, seeds)
        self.device = pick_device(options.device)
        source = seeds.manifest
        constants = {**asdict(options.par), "dilations": list(options.par.dilations)}
        self.manifest = refine_manifest("par", constants, source, source["model"], str(source.get("weights")))

    def loader(self) -> PictureLoader:
        return PictureLoader(self.reader)

    @torch.inference_mode()
    def compute(self, items: Sequence[LoadedPicture], seeds: list[SeedMap]) -> list[SeedMap]:
        if not len(seeds[0].classes):
            return seeds
        maps = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(seed.upsampled()) for seed in seeds], batch_first=True)
        pixels = torch.from_numpy(np.stack([item.pixels for item in items])).to(self.device).permute(0, 3, 1, 2)
        par = self.options.par
        refined = refine_par(
            maps.to(self.device), pixels, par.iterations, par.dilations, par.sharpness, par.position_weight
        )
        refined /= (1 + par.position_weight) ** par.iterations  # its weights sum to more than 1
        found = refined.clamp_(0, 1).cpu().numpy()
        return [
            SeedMap(seed.id, seed.classes, rows[: len(seed.classes)], seed.size)
            for seed, rows in zip(seeds, found, strict=True)
        ]
