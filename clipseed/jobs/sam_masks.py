"""``clipseed sam-masks``: the segments of every image, once per data set, into a compact cache."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clipseed.data.types import ImageReader, Sample
from clipseed.device import pick_device
from clipseed.errors import ClipseedError, ImageError
from clipseed.jobs.engine import (
    batches_in_flight,
    default_workers,
    misfit,
    one_by_one,
)
from clipseed.jobs.sam_loading import ExistingLoader, LoadedForSam, ShrinkingLoader, Stored, existing_masks
from clipseed.jobs.sam_options import (
    SamMasksOptions,
    SamMasksReport,
    check,
    find_checkpoint,
    find_images,
    masks_manifest,
)
from clipseed.pseudo.prompted_segments import prompted_masks
from clipseed.runtime.run import Loading, Start, open_engine, run
from clipseed.runtime.stream import BatchSize
from clipseed.runtime.work import Work
from clipseed.sam.backend import Embedding
from clipseed.sam.generator import Limits, generate
from clipseed.sam.load import load_sam, same_sam
from clipseed.sam.model_backend import ModelBackend
from clipseed.store.mask_records import MaskRecord, mask_format, pack_proposals
from clipseed.store.reader import Seeds
from clipseed.store.writer import RecordWriter, recorded_manifest

_UNIT_SIZE = {"cpu": 8}
_GPU_UNIT_SIZE = 32
"""Images per unit: what a kill can cost. SAM takes seconds for one on a GPU, minutes on a CPU."""
_IMPORT_UNIT = 64
_AHEAD = 4


def run_sam_masks(
    options: SamMasksOptions, start: Start | None = None, loading: Loading | None = None
) -> SamMasksReport:
    """Find and store the masks of a data set's images; resumes what an earlier run began.

    Args:
        options: What to do.
        start: Begins to show progress.
        loading: Called before a model is loaded; when there is nothing to do, none is.

    Raises:
        ClipseedError: see the modules it uses; images that cannot be read, or on which SAM fails, are skipped and
            reported instead.
    """
    check(options)
    images, seeds = find_images(options)
    recipe = MasksRecipe(options, images.reader, str(images.dataset.get("name")))
    say = partial(loading, options.model_name) if loading and options.existing is None else None
    with contextlib.closing(open_engine(recipe, options.run.cluster, recipe.known(), say)) as engine:
        about, shard = engine.about, options.run.shard
        manifest = masks_manifest(options, images, seeds, about)
        with RecordWriter(
            options.out, manifest, mask_format(), about["unit"], overwrite=options.run.overwrite, shard=shard
        ) as writer:
            files = {sample.id: images.reader.file(sample) for sample in images.samples if sample.id in writer.done}
            writer.forget_replaced(files)
            if seeds is not None and options.seeds is not None:
                with Seeds(options.seeds, verify=False) as source:
                    writer.follow(source.keys(), source.stamp)
            report = SamMasksReport(**vars(run(engine, writer, images.samples, start, shard=shard)))
    if report.stats.counters["cramped"]:
        report.notes.append("out of memory; went on with fewer points at once (--points-per-batch)")
    return report


@dataclass(frozen=True)
class MasksRecipe:
    """Loads what a run needs."""

    options: SamMasksOptions
    reader: ImageReader
    dataset: str

    def known(self) -> dict[str, Any] | None:
        """What the work would say of itself, if the output that is there was made with the same model."""
        options = self.options
        there = None if options.run.overwrite or options.existing or options.factory else recorded_manifest(options.out)
        if there is None or not isinstance(there.get("model"), dict):
            return None
        checkpoint, device, model = (
            find_checkpoint(options, self.dataset),
            pick_device(options.run.device),
            there["model"],
        )
        named = None if options.model == "auto" else options.model
        if not same_sam(model, checkpoint, device, precision=options.run.precision, size=named):
            return None
        return _about_model(model, checkpoint, device)

    def __call__(self) -> Work[Any, MaskRecord]:
        """Load it."""
        if self.options.existing is not None:
            return _Existing(self)
        return _Prompted(self) if self.options.prompt else _Grid(self)


def _about_model(model: dict[str, Any], checkpoint: Path | None, device: torch.device) -> dict[str, Any]:
    """Model, where its weights are, device, and images per unit."""
    return {
        "model": model,
        "weights": None if checkpoint is None else str(checkpoint.resolve()),
        "device": str(device),
        "unit": _UNIT_SIZE.get(device.type, _GPU_UNIT_SIZE),
    }


class _Masks(Work[Any, MaskRecord]):
    """What all sources of masks have in common."""

    def __init__(self, recipe: MasksRecipe, device: torch.device) -> None:
        super().__init__()
        self.options, self._reader, self.device = recipe.options, recipe.reader, device
        self.workers = self.options.run.workers if self.options.run.workers is not None else default_workers(device)
        self.ahead = _AHEAD + 2 * self.workers
        self.batch = BatchSize(1, 1)
        self.queue = batches_in_flight(device)

    def counted(self, record: MaskRecord) -> MaskRecord:
        """The record, after counting what is in it."""
        self.counters["masks"] += len(record)
        self.counters["without"] += int(not len(record))
        self.counters["bytes"] += len(record.rle)
        return record


class _Existing(_Masks):
    """Masks that exist already."""

    def __init__(self, recipe: MasksRecipe) -> None:
        super().__init__(recipe, torch.device("cpu"))
        assert self.options.existing is not None
        existing_masks.cache_clear()  # an earlier run of this process may have found other files there
        existing_masks(self.options.existing.resolve(), self.options.existing_kind)  # refused before workers start

    def about(self) -> dict[str, Any]:
        """No model."""
        return {"model": {}, "weights": None, "device": "no model", "unit": _IMPORT_UNIT}

    @property
    def loader(self) -> Callable[[Sample], Stored]:
        """Reads masks."""
        assert self.options.existing is not None
        return ExistingLoader(self._reader, self.options.existing.resolve(), self.options.existing_kind)

    def compute(self, items: Sequence[Stored]) -> list[MaskRecord]:
        """What was read."""
        return [self.counted(item.record) for item in items]


class _Segmenting(_Masks):
    """Masks that a SAM makes."""

    def __init__(self, recipe: MasksRecipe) -> None:
        options = recipe.options
        super().__init__(recipe, pick_device(options.run.device))
        self._checkpoint = checkpoint = find_checkpoint(options, recipe.dataset)
        size = None if options.model == "auto" else options.model
        self.backend = load_sam(
            checkpoint, self.device, factory=options.factory, precision=options.run.precision, size=size
        )
        if isinstance(self.backend, ModelBackend) and self.backend.small:
            self.one_by_one = one_by_one(self.device, 1)

    def about(self) -> dict[str, Any]:
        """Model, where its weights are, device, and images per unit."""
        return _about_model(self.backend.manifest(), self._checkpoint, self.device)

    @property
    def loader(self) -> ShrinkingLoader:
        """Decodes images as SAM sees them."""
        return ShrinkingLoader(self._reader, self.options.max_side)

    @abstractmethod
    def masks(self, item: LoadedForSam, given: Any) -> MaskRecord:
        """Masks of one image."""

    def attempt(self, item: LoadedForSam, given: Any = None) -> MaskRecord | ImageError:
        """Masks of one image, or why there are none; what is wrong with more than this image is raised."""
        try:
            return self.counted(replace(self.masks(item, given), stamp=item.stamp))
        except ImageError as error:
            return error
        except (ClipseedError, MemoryError):
            raise
        except Exception as error:  # SAM's code, or a user's
            if isinstance(error, RuntimeError) and any(word in str(error) for word in ("CUDA", "memory")):
                raise
            return ImageError(f"SAM failed on it ({type(error).__name__}: {str(error)[:200]})")


class _Grid(_Segmenting):
    """Everything in an image, from a grid of points."""

    def __init__(self, recipe: MasksRecipe) -> None:
        super().__init__(recipe)
        self._limits = Limits()

    def compute(self, items: Sequence[LoadedForSam]) -> list[MaskRecord | ImageError]:
        """Masks of a batch, image by image: one has hundreds of prompts."""
        return [self.attempt(item) for item in items]

    def masks(self, item: LoadedForSam, given: Any) -> MaskRecord:
        """Proposals for one image."""
        before = self._limits.points, self._limits.crops
        proposals = generate(self.backend, item.pixels, self.options.proposals, self._limits)
        self.counters["cramped"] += int(before != (self._limits.points, self._limits.crops))
        return pack_proposals(item.sample.id, item.size, proposals)


class _Prompted(_Segmenting):
    """Masks of the classes that an image's seeds show."""

    def __init__(self, recipe: MasksRecipe) -> None:
        super().__init__(recipe)
        assert self.options.seeds is not None
        self.seeds = Seeds(self.options.seeds, verify=False)
        together = self.options.run.batch_size or self.backend.crops_at_once
        self.batch = BatchSize(together, 1)
        self.ahead += together

    def compute(self, items: Sequence[LoadedForSam]) -> list[MaskRecord | ImageError]:
        """Masks of a batch, encoded together."""
        encoded = [item for item in items if item.sample.labels]
        try:
            embeddings = self.backend.encode([item.pixels for item in encoded]) if encoded else []
        except ImageError as error:
            if len(items) == 1:
                return [error]
            return [result for item in items for result in self.compute([item])]
        found = {item.sample.id: embedding for item, embedding in zip(encoded, embeddings, strict=True)}
        return [self.attempt(item, found.get(item.sample.id)) for item in items]

    def masks(self, item: LoadedForSam, given: Embedding | None) -> MaskRecord:
        """Answers to the prompts of one image."""
        assert self.options.prompt is not None
        seed = self.seeds[item.sample.id]
        problem = misfit(seed, item.size, item.stamp)
        if problem is not None:
            raise problem
        embedding = given or Embedding((item.pixels.shape[0], item.pixels.shape[1]), None)
        proposals, row = prompted_masks(self.backend, embedding, seed.cam, self.options.prompt, self.options.proposals)
        return pack_proposals(item.sample.id, item.size, proposals, seed.classes[row].tolist())
