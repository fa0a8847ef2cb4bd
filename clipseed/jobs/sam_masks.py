"""``clipseed sam-masks``: the segments of every image, once per data set, into a compact cache."""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from clipseed.data.dataset import DatasetOptions, open_dataset, recorded_set, relocated
from clipseed.data.paths import is_file, is_folder
from clipseed.data.stamps import UNKNOWN, FileStamp, file_stamp
from clipseed.data.types import ImageReader, ImageSet, Sample
from clipseed.defaults import SAM_MAX_SIDE, SamModel, SamPreset, SamPrompt, SegmentFormat
from clipseed.device import pick_device
from clipseed.errors import ClipseedError, ImageError, InputError, UsageError, WeightsError
from clipseed.formats.open import ForeignSegments
from clipseed.pseudo.prompted_segments import prompted_masks
from clipseed.runtime.images import (
    batches_in_flight,
    cam_sample,
    default_workers,
    misfit,
    one_by_one,
    recorded_reader,
)
from clipseed.runtime.run import Loading, RunOptions, RunReport, Start, open_engine, run
from clipseed.runtime.stream import BatchSize
from clipseed.runtime.work import Done, Work
from clipseed.sam.backend import Embedding, fitted_size
from clipseed.sam.generator import Limits, generate
from clipseed.sam.load import load_sam, same_sam
from clipseed.sam.model_backend import ModelBackend
from clipseed.sam.options import FMA, STOCK, ProposalOptions
from clipseed.store.cams import CamSet, open_cams
from clipseed.store.manifest import Manifest, package_versions
from clipseed.store.open import open_segments_of_any_kind
from clipseed.store.segment_records import SegmentRecord, pack_segments, segment_format
from clipseed.store.segments import SegmentSet
from clipseed.store.writer import RecordWriter, recorded_manifest

TOY = "toy"
PRESETS: dict[SamPreset, ProposalOptions] = {"fma": FMA, "stock": STOCK}
_TOY_WEIGHTS = Path(__file__).parents[1] / "data" / "toy" / "weights" / "sam.npz"
_WHERE = (
    "Meta's are sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth and sam_vit_h_4b8939.pth, at "
    "https://dl.fbaipublicfiles.com/segment_anything/NAME"
)


@dataclass(frozen=True)
class SamMasksOptions:
    """Everything ``clipseed sam-masks`` can be told.

    Attributes:
        out: ``NAME.h5`` or a folder.
        data: A data set, for its images only; ``None`` takes the images of ``cams``.
        cams: CAMs whose images are meant, and whose maps prompt SAM.
        images, root: Where the images of the CAMs, or their data set, are now, if they have moved.
        checkpoint: SAM's weights, or ``toy``; ``None``: ``toy`` for the toy set, else it is missing.
        model: ``auto``, or the size that the checkpoint must have.
        factory: ``module:function`` that makes another model, see :func:`~clipseed.sam.load.load_sam`.
        proposals: Settings of the grid.
        max_side: Longer images are shrunk to it first, and their masks have that size; 0: never.
        existing: Masks that exist already, taken instead of a model's.
        existing_kind: Their format.
        prompt: Ask for the classes of the CAMs instead of everything.
        run: Its batch size is that of images encoded at once with ``prompt``.
    """

    out: Path
    data: DatasetOptions | None = None
    cams: Path | None = None
    images: Path | None = None
    root: Path | None = None
    checkpoint: str | None = None
    model: SamModel = "auto"
    factory: str | None = None
    proposals: ProposalOptions = FMA
    max_side: int = SAM_MAX_SIDE
    existing: Path | None = None
    existing_kind: SegmentFormat = "auto"
    prompt: SamPrompt | None = None
    run: RunOptions = field(default_factory=RunOptions)

    @property
    def model_name(self) -> str:
        """The model, for people."""
        return f"SAM ({self.factory or Path(self.checkpoint or TOY).name})"

    @property
    def method(self) -> str:
        """Where masks come from: ``grid``, ``points``, ``boxes`` or ``import``."""
        return "import" if self.existing is not None else self.prompt or "grid"


@dataclass(frozen=True)
class Inputs:
    """What a run reads besides images, opened: CAMs whose images are meant, and segments that exist already."""

    cams: CamSet | None
    existing: ForeignSegments | None


@dataclass(kw_only=True)
class SamMasksReport(RunReport):
    """What a run did."""

    @property
    def masks(self) -> int:
        """Masks made in this run."""
        return self.stats.counters["masks"]

    @property
    def per_image(self) -> float:
        """Masks per image of this run."""
        return self.masks / max(1, self.stats.computed)


def proposal_options(preset: SamPreset, **overrides: Any) -> ProposalOptions:
    """A preset with some of its values replaced; ``None`` keeps the preset's.

    Raises:
        UsageError: an impossible value.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    for name, value in given.items():
        if not math.isfinite(value):
            raise UsageError(f"--{name.replace('_', '-').removeprefix('pred-')} {value}: give a number")
    return replace(PRESETS[preset], **given)


def check(options: SamMasksOptions) -> None:
    """Raise :class:`~clipseed.errors.UsageError` for what cannot be meant."""
    if (options.data is None) == (options.cams is None):
        raise UsageError("images come from --dataset or from --seeds; give one of them")
    if options.prompt and options.cams is None:
        raise UsageError(f"--prompt {options.prompt} needs --seeds, the maps to take prompts from")
    if options.existing is not None and (options.prompt or options.checkpoint or options.factory):
        raise UsageError("--import takes masks as they are; --checkpoint, --sam-factory and --prompt need a model")
    if options.run.batch_size is not None and (options.run.batch_size < 1 or not options.prompt):
        raise UsageError("--batch-size: auto or a number from 1, with --prompt; otherwise see --points-per-batch")
    options.run.check()
    if options.max_side < 0 or 0 < options.max_side < _LEAST_SIDE:
        raise UsageError(f"--max-side: give a number of pixels from {_LEAST_SIDE}, or 0 for no limit")


def find_checkpoint(options: SamMasksOptions, dataset: str) -> Path | None:
    """The file of SAM's weights; ``None`` where a factory needs none.

    Raises:
        UsageError: none is named.
        WeightsError: it is not there.
    """
    named = options.checkpoint or (TOY if dataset == TOY and not options.factory else None)
    if named is None:
        if options.factory:
            return None
        raise UsageError(f"--checkpoint FILE: name SAM's weights. {_WHERE}")
    path = _TOY_WEIGHTS if named == TOY else Path(named)
    if not (is_file(path) or (options.factory and is_folder(path))):  # what a factory reads is its own matter
        raise WeightsError(f"--checkpoint {named}: no such file. {_WHERE}")
    return path


def find_images(options: SamMasksOptions, cams: CamSet | None) -> ImageSet:
    """The images: of the CAMs where there are any, else of the data set.

    Raises:
        ClipseedError: the data set is missing or malformed.
    """
    if cams is None:
        assert options.data is not None
        return open_dataset(options.data)
    manifest = relocated(cams.manifest, options.images, options.root)
    samples = [cam_sample(cams, key) for key in cams]
    return recorded_set(manifest, samples, recorded_reader(manifest), str(cams.path))


def open_existing(options: SamMasksOptions) -> ForeignSegments | None:
    """Segments that exist already, opened so that what is wrong with them is said before workers start.

    Raises:
        ClipseedError: they cannot be opened, or need not be imported.
    """
    if options.existing is None:
        return None
    existing = open_segments_of_any_kind(options.existing, options.existing_kind)
    if isinstance(existing, SegmentSet):
        raise UsageError(f"--import {options.existing}: is a segments file already; use it as it is")
    return existing


def masks_manifest(options: SamMasksOptions, images: ImageSet, inputs: Inputs, about: dict[str, Any]) -> Manifest:
    """Everything that decides the masks, and where the images are."""
    cams = None if inputs.cams is None else inputs.cams.manifest
    settings: dict[str, Any] = {"exif": images.exif}
    source: dict[str, Any] = {}
    if options.method != "import":
        settings["max_side"] = options.max_side
    if options.method == "grid":
        settings |= options.proposals.manifest()
    elif options.prompt:
        settings["stability_offset"] = options.proposals.stability_offset
        settings["min_region_area"] = options.proposals.min_region_area
        assert cams is not None
        source = {key: cams[key] for key in ("kind", "method", "options", "model", "source") if key in cams}
    elif inputs.existing is not None:
        source = dict(inputs.existing.manifest())
    return {
        "kind": "sam-masks",
        "method": options.method,
        "options": settings,
        "source": source,
        "model": about["model"],
        "weights": about["weights"],
        "max_pixels": images.max_pixels,
        "vocabulary": cams["vocabulary"] if cams and options.prompt else {},
        "dataset": images.manifest,
        **({"input": str(options.cams.resolve())} if options.cams is not None else {}),
        "versions": package_versions(),
    }


@dataclass(frozen=True)
class LoadedForSam:
    """A decoded image, shrunk to what SAM sees of it: ``(h, w, 3)`` uint8."""

    sample: Sample
    size: tuple[int, int]
    pixels: npt.NDArray[np.uint8]
    stamp: FileStamp = UNKNOWN

    @property
    def key(self) -> tuple[int, ...]:
        """Images of all sizes are encoded together."""
        return ()

    @property
    def cost(self) -> int:
        """Each is as much work as any other, because SAM's input has one size."""
        return 1


@dataclass(frozen=True)
class ShrinkingLoader:
    """Decodes a sample, and shrinks what is longer than ``max_side`` as SAM itself would; runs in worker processes."""

    reader: ImageReader
    max_side: int

    def __call__(self, sample: Sample) -> LoadedForSam:
        """Decode one sample.

        Raises:
            ImageError: it cannot be read.
        """
        stamp = file_stamp(self.reader.file(sample))
        return shrunk_for_sam(sample, self.reader(sample), stamp, self.max_side)


def shrunk_for_sam(sample: Sample, image: Image.Image, stamp: FileStamp, max_side: int) -> LoadedForSam:
    """A decoded image as SAM sees it: shrunk where it is longer than ``max_side`` (0: never)."""
    size = (image.height, image.width)
    if max_side and max(size) > max_side:
        height, width = fitted_size(size, max_side)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return LoadedForSam(sample, size, np.asarray(image).copy(), stamp)


@dataclass(frozen=True)
class ExistingLoader:
    """Reads an image's masks from files, after looking at the image for its size; runs in worker processes."""

    reader: ImageReader
    segments: ForeignSegments

    def __call__(self, sample: Sample) -> Done[SegmentRecord]:
        """Read and compress one image's masks.

        Raises:
            ImageError: image or masks are missing, damaged, or do not fit each other.
        """
        stamp = file_stamp(self.reader.file(sample))
        image = self.reader(sample)
        size = (image.height, image.width)
        try:
            proposals = self.segments.read(sample.id, size)
        except InputError as error:  # one damaged file is no reason to stop
            raise ImageError(str(error)) from error
        return Done(replace(pack_segments(sample.id, size, proposals), stamp=stamp))


_LEAST_SIDE = 16
"""Pixels below which no segment is left to find."""
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
    with contextlib.ExitStack() as opened:
        cams = None if options.cams is None else opened.enter_context(open_cams(options.cams))
        inputs = Inputs(cams, open_existing(options))
        images = find_images(options, cams)
        recipe = MasksRecipe(options, inputs, images.reader, images.name)
        say = partial(loading, options.model_name) if loading and options.existing is None else None
        engine = opened.enter_context(
            contextlib.closing(open_engine(recipe, options.run.cluster, recipe.known(), say))
        )  # fmt: skip
        about, shard = engine.about, options.run.shard
        manifest = masks_manifest(options, images, inputs, about)
        writer = opened.enter_context(
            RecordWriter(
                options.out, manifest, segment_format(), about["unit"], overwrite=options.run.overwrite, shard=shard
            )
        )
        files = {sample.id: images.reader.file(sample) for sample in images.samples if sample.id in writer.done}
        writer.forget_replaced(files)
        if cams is not None:
            writer.follow(cams.keys(), cams.stamp)
        report = SamMasksReport(**vars(run(engine, writer, images.samples, start, shard=shard)))
    if report.stats.counters["cramped"]:
        report.notes.append("out of memory; went on with fewer points at once (--points-per-batch)")
    return report


@dataclass(frozen=True)
class MasksRecipe:
    """Loads what a run needs."""

    options: SamMasksOptions
    inputs: Inputs
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

    def __call__(self) -> Work[Any, SegmentRecord]:
        """Load it."""
        if self.options.existing is not None:
            return _Existing(self)
        return _Prompted(self) if self.options.prompt else GridMasks(self)


def _about_model(model: dict[str, Any], checkpoint: Path | None, device: torch.device) -> dict[str, Any]:
    """Model, where its weights are, device, and images per unit."""
    return {
        "model": model,
        "weights": None if checkpoint is None else str(checkpoint.resolve()),
        "device": str(device),
        "unit": _UNIT_SIZE.get(device.type, _GPU_UNIT_SIZE),
    }


class _Masks(Work[Any, SegmentRecord]):
    """What all sources of masks have in common."""

    def __init__(self, recipe: MasksRecipe, device: torch.device) -> None:
        super().__init__()
        self.options, self._reader, self.device = recipe.options, recipe.reader, device
        self.workers = self.options.run.workers if self.options.run.workers is not None else default_workers(device)
        self.ahead = _AHEAD + 2 * self.workers
        self.batch = BatchSize(1, 1)
        self.queue = batches_in_flight(device)

    def counted(self, record: SegmentRecord) -> SegmentRecord:
        """The record, after counting what is in it."""
        self.counters["masks"] += len(record)
        self.counters["without"] += int(not len(record))
        self.counters["bytes"] += len(record.rle)
        return record


class _Existing(_Masks):
    """Masks that exist already."""

    def __init__(self, recipe: MasksRecipe) -> None:
        super().__init__(recipe, torch.device("cpu"))
        assert recipe.inputs.existing is not None
        self._existing = recipe.inputs.existing

    def about(self) -> dict[str, Any]:
        """No model."""
        return {"model": {}, "weights": None, "device": "no model", "unit": _IMPORT_UNIT}

    @property
    def loader(self) -> Callable[[Sample], Done[SegmentRecord]]:
        """Reads masks."""
        return ExistingLoader(self._reader, self._existing)

    def compute(self, items: Sequence[Done[SegmentRecord]]) -> list[SegmentRecord]:
        """What was read."""
        return [self.counted(item.result) for item in items]


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
    def masks(self, item: LoadedForSam, given: Any) -> SegmentRecord:
        """Masks of one image."""

    def attempt(self, item: LoadedForSam, given: Any = None) -> SegmentRecord | ImageError:
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


class GridMasks(_Segmenting):
    """Everything in an image, from a grid of points."""

    def __init__(self, recipe: MasksRecipe) -> None:
        super().__init__(recipe)
        self._limits = Limits()

    def compute(self, items: Sequence[LoadedForSam]) -> list[SegmentRecord | ImageError]:
        """Masks of a batch, image by image: one has hundreds of prompts."""
        return [self.attempt(item) for item in items]

    def masks(self, item: LoadedForSam, given: Any) -> SegmentRecord:
        """Segments for one image."""
        before = self._limits.points, self._limits.crops
        proposals = generate(self.backend, item.pixels, self.options.proposals, self._limits)
        self.counters["cramped"] += int(before != (self._limits.points, self._limits.crops))
        return pack_segments(item.sample.id, item.size, proposals)


class _Prompted(_Segmenting):
    """Masks of the classes that an image's CAMs show."""

    def __init__(self, recipe: MasksRecipe) -> None:
        super().__init__(recipe)
        assert recipe.inputs.cams is not None
        self.cams = recipe.inputs.cams
        together = self.options.run.batch_size or self.backend.crops_at_once
        self.batch = BatchSize(together, 1)
        self.ahead += together

    def compute(self, items: Sequence[LoadedForSam]) -> list[SegmentRecord | ImageError]:
        """Masks of a batch, encoded together."""
        encoded = [item for item in items if item.sample.labels]
        try:
            embeddings = self.backend.encode([item.pixels for item in encoded]) if encoded else []
        except ImageError as error:
            if len(items) == 1:
                return [error]
            return [result for item in items for result in self.compute([item])]
        by_id = {item.sample.id: embedding for item, embedding in zip(encoded, embeddings, strict=True)}
        return [self.attempt(item, by_id.get(item.sample.id)) for item in items]

    def masks(self, item: LoadedForSam, given: Embedding | None) -> SegmentRecord:
        """Answers to the prompts of one image."""
        assert self.options.prompt is not None
        cam = self.cams[item.sample.id]
        problem = misfit(cam, item.size, item.stamp)
        if problem is not None:
            raise problem
        embedding = given or Embedding((item.pixels.shape[0], item.pixels.shape[1]), None)
        proposals, row = prompted_masks(self.backend, embedding, cam.maps, self.options.prompt, self.options.proposals)
        return pack_segments(item.sample.id, item.size, proposals, cam.classes[row].tolist())
