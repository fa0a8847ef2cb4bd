"""``clipseed sam-seed``: label masks out of class activation maps and the segments of a segments file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipseed.data.stamps import FileStamp
from clipseed.data.types import Sample
from clipseed.defaults import EmptyPolicy, SegmentFormat
from clipseed.errors import ImageError, InputError, UsageError
from clipseed.formats.open import ForeignSegments
from clipseed.pseudo.rules import RuleOptions, Rules, decide, label_mask, voted_labels
from clipseed.runtime.images import earlier_in_cams, misfit, one_by_one, usable_cores
from clipseed.runtime.run import RunOptions, RunReport, Start, open_engine, run
from clipseed.runtime.stream import BatchSize
from clipseed.runtime.work import Done, Work
from clipseed.segments import Segments, from_masks
from clipseed.store.cam_records import Cam
from clipseed.store.cams import CamSet, class_names
from clipseed.store.empty import Earlier, earlier_in, without_pixel
from clipseed.store.files import write_skipped
from clipseed.store.label_mask_folder import LabelMaskFolder
from clipseed.store.label_mask_writer import Labelled, LabelMaskWriter
from clipseed.store.manifest import Manifest, label_manifest
from clipseed.store.open import Prediction, SegmentsOfAnyKind, open_prediction, open_segments_of_any_kind
from clipseed.store.segment_records import unpack_segments
from clipseed.store.segments import SegmentSet
from clipseed.types import IGNORE, NO_CLASS

_UNIT_SIZE = 64
_WORTH_WORKERS = 200
"""Images from which on worker processes, which take seconds to start, are worth it."""
MISSING_LIST = "without-masks.csv"


@dataclass(frozen=True)
class SamSeedOptions:
    """Everything ``clipseed sam-seed`` can be told.

    Attributes:
        source: CAMs, or for voting a folder of label masks.
        masks: A segments file, or existing masks in another format.
        masks_kind: That format.
        rules: How images are labelled.
        empty: What becomes of the mask of an image in which some label got no pixel
            (:class:`~clipseed.store.label_mask_writer.LabelMaskWriter`).
    """

    source: Path
    masks: Path
    out: Path
    masks_kind: SegmentFormat = "auto"
    rules: RuleOptions = field(default_factory=RuleOptions)
    empty: EmptyPolicy = "background"
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(kw_only=True)
class SamSeedReport(RunReport):
    """What a run did.

    Attributes:
        method: How labels came about.
        missing: Images of the source that the masks do not know.
        missing_file: Where they are listed.
    """

    source: Path
    method: str
    missing: int = 0
    missing_file: Path | None = None


def run_sam_seed(options: SamSeedOptions, start: Start | None = None) -> SamSeedReport:
    """Make label masks; resumes what an earlier run began.

    Raises:
        ClipseedError: see the modules it uses; images whose maps or masks cannot be used are skipped and reported.
    """
    options.run.check()
    _refuse_places(options)
    with contextlib.ExitStack() as opened:
        inputs = _open(options, opened)
        name = (inputs.manifest.get("vocabulary") or {}).get("name")
        rules = decide(options.rules, str(name), label_map=inputs.label_map, asked=inputs.prompted)
        chosen = {**rules.manifest(), "empty": options.empty}
        manifest = label_manifest(
            inputs.manifest, options.source, "sam-seed", rules.method, chosen, masks=_segments_manifest(inputs.segments)
        )
        missing = _missing(options, inputs)
        seeder = Seeder(inputs.source, inputs.segments, rules)
        recipe = partial(_SeedWork, options.run.workers, seeder, len(inputs.classes))
        engine = opened.enter_context(contextlib.closing(open_engine(recipe, options.run.cluster)))
        writer = opened.enter_context(
            LabelMaskWriter(
                options.out, manifest, _UNIT_SIZE, overwrite=options.run.overwrite, shard=options.run.shard,
                empty=options.empty, earlier=_earlier(inputs.source),
            )
        )  # fmt: skip
        writer.follow(inputs.classes, lambda key: inputs.stamps[key])
        listed = write_skipped(options.out / MISSING_LIST, [(key, f"not in {options.masks}") for key in missing])
        samples = [Sample(key, Path(key), classes) for key, classes in inputs.classes.items()]
        done = run(engine, writer, samples, start, shard=options.run.shard)
    return SamSeedReport(
        **vars(done), source=options.source, method=rules.method, missing=len(missing), missing_file=listed
    )


def _earlier(source: Prediction) -> Earlier:
    """Answers whether a label had come to nothing in the source already, and since which stage."""
    if isinstance(source, CamSet):
        return earlier_in_cams(source)

    def there(key: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        classes = source.note(key).classes or ()
        return classes, without_pixel(classes, source.read(key))

    return earlier_in(source.folder, source.manifest or {}, there)


def _refuse_places(options: SamSeedOptions) -> None:
    for name, path in (("the source", options.source), ("--masks", options.masks)):
        if path.resolve() == options.out.resolve():
            raise UsageError(f"--out {options.out}: is {name} as well; choose another folder")


@dataclass(frozen=True)
class _Inputs:
    """What a run reads, opened.

    Attributes:
        source: What is labelled.
        manifest: The source's.
        classes: By image id, where they are known without looking at pixels.
        stamps: The source's image files by image id.
        segments: ``None`` where the method needs none.
    """

    source: Prediction
    manifest: Manifest
    classes: Mapping[str, tuple[int, ...] | None]
    stamps: Mapping[str, FileStamp]
    segments: SegmentsOfAnyKind | None

    @property
    def label_map(self) -> bool:
        """Whether label masks are labelled anew, rather than CAMs."""
        return isinstance(self.source, LabelMaskFolder)

    @property
    def prompted(self) -> bool:
        """Whether the segments are answers to prompts for classes."""
        return isinstance(self.segments, SegmentSet) and bool(self.segments.manifest["vocabulary"])


def _open(options: SamSeedOptions, opened: contextlib.ExitStack) -> _Inputs:
    """Open source and segments.

    Raises:
        ClipseedError: one of them is missing or damaged, or they do not fit each other.
    """
    source = open_prediction(options.source)
    if isinstance(source, CamSet):
        opened.enter_context(source)
        manifest = source.manifest
        classes: dict[str, tuple[int, ...] | None] = {key: tuple(source.classes(key).tolist()) for key in source}
        stamps = {key: source.stamp(key) for key in source}
    else:
        ids = sorted(source.ids())
        if not ids:
            raise InputError(f"{options.source}: neither CAMs nor PNG masks in this folder")
        manifest = source.manifest or {}
        if "vocabulary" in manifest:
            class_names(manifest, options.source)
        notes = {key: source.note(key) for key in ids}
        classes = {key: note.classes for key, note in notes.items()}
        stamps = {key: note.image for key, note in notes.items()}
    segments = None
    if options.rules.method != "pixel":
        segments = open_segments_of_any_kind(options.masks, options.masks_kind)
    if isinstance(segments, SegmentSet):
        opened.enter_context(segments)
    inputs = _Inputs(source, manifest, classes, stamps, segments)
    _refuse_other_classes(options, inputs)
    return inputs


def _refuse_other_classes(options: SamSeedOptions, inputs: _Inputs) -> None:
    if not inputs.prompted or inputs.label_map:
        return
    assert isinstance(inputs.segments, SegmentSet)
    if class_names(inputs.segments.manifest, options.masks) != class_names(inputs.manifest, options.source):
        raise UsageError(f"{options.masks}: its masks were asked for with other classes than those of {options.source}")


def _missing(options: SamSeedOptions, inputs: _Inputs) -> list[str]:
    """Ids of the source that the segments do not know.

    Raises:
        InputError: they know none of them.
    """
    if inputs.segments is None:
        return []
    known = inputs.segments.ids()
    missing = [key for key in inputs.classes if key not in known]
    if missing and len(missing) == len(inputs.classes):
        there = f"its first is {min(known)!r}" if known else "it holds no image at all"
        raise InputError(
            f"{options.masks}: holds masks of none of the {len(missing)} images of {options.source} (the first is "
            f"{missing[0]!r}, {there}); was it made for another data set?"
        )
    return missing


def _segments_manifest(segments: SegmentsOfAnyKind | None) -> dict[str, Any]:
    if segments is None:
        return {}
    if isinstance(segments, ForeignSegments):
        return segments.manifest()
    parts = ("kind", "method", "options", "source", "model")
    return {key: segments.manifest[key] for key in parts if key in segments.manifest}


@dataclass(frozen=True)
class Seeded(Labelled):
    """A finished image, with the number of its segments."""

    masks: int = 0


@dataclass(frozen=True)
class Seeder:
    """Labels one image, from reading its maps and segments to the finished label mask; runs in worker processes.

    Attributes:
        source: What is read; ``None``: CAMs come from memory (:meth:`seeded`).
    """

    source: Prediction | None
    segments: SegmentsOfAnyKind | None
    rules: Rules

    def __call__(self, sample: Sample) -> Done[Seeded]:
        """Label one image.

        Raises:
            ImageError: its maps or segments cannot be used.
            StoreError: a file is damaged.
        """
        assert self.source is not None
        try:
            return Done(
                self.seeded(self.source[sample.id])
                if isinstance(self.source, CamSet)
                else self._voted(self.source, sample)
            )
        except InputError as error:  # one damaged file is no reason to stop
            raise ImageError(str(error)) from error

    def _voted(self, source: LabelMaskFolder, sample: Sample) -> Seeded:
        labels, stamp = source.read(sample.id), source.note(sample.id).image
        segments, _ = self._segments(sample.id, (labels.shape[0], labels.shape[1]), stamp)
        classes = sample.labels
        if classes is None:
            classes = tuple(int(value) - 1 for value in np.unique(labels) if value not in (0, IGNORE))
        return Seeded(sample.id, voted_labels(self.rules, labels, segments.masks), classes, stamp, len(segments))

    def seeded(self, cam: Cam) -> Seeded:
        """The label mask of an image whose CAMs are at hand.

        Raises:
            ImageError: its maps or segments cannot be used.
        """
        problem = misfit(cam, cam.size)
        if problem is not None:
            raise problem
        segments, prompted_class = self._segments(cam.id, cam.size, cam.stamp)
        # Only FMA's regions take raw maps: where classes meet in one segment, their scale decides.
        labels = label_mask(cam if self.rules.method == "fma" else cam.unit(), self.rules, segments, prompted_class)
        return Seeded(cam.id, labels, tuple(cam.classes.tolist()), cam.stamp, len(segments))

    def _segments(
        self, identifier: str, size: tuple[int, int], stamp: FileStamp
    ) -> tuple[Segments, npt.NDArray[np.int32]]:
        """Segments of an image, none where there are none, and the class that each was asked for.

        Raises:
            ImageError: they cannot be used, or were made from another image.
        """
        if self.segments is None or identifier not in self.segments:
            return from_masks(np.zeros((0, *size), bool)), np.zeros(0, np.int32)
        if isinstance(self.segments, SegmentSet):
            record = self.segments.record(identifier, size)
            if record.stamp.differs(stamp):
                raise ImageError(
                    f"{self.segments.path}: its segments are those of another image; run clipseed sam-masks again"
                )
            return unpack_segments(record), record.class_id
        segments = self.segments.read(identifier, size)
        return segments, np.full(len(segments), NO_CLASS, np.int32)


class _SeedWork(Work[Any, Seeded]):
    """Maps and masks to label masks: everything happens where images are loaded, or without workers in threads."""

    def __init__(self, workers: int | None, seeder: Seeder, images: int) -> None:
        super().__init__()
        self._seeder = seeder
        if workers is None:
            workers = usable_cores() if images >= _WORTH_WORKERS else 0
        self.workers = 0 if workers == 1 else workers
        self.one_by_one = None if self.workers else one_by_one(torch.device("cpu"), 1)
        self.ahead = 4 + 2 * self.workers
        self.batch = BatchSize(1, 1)

    def about(self) -> dict[str, Any]:
        """Any worker gives the same masks."""
        return {}

    @property
    def loader(self) -> Callable[[Sample], Done[Any]]:
        """Label images in workers; without them samples are handed on as they are, and threads label."""
        return self._seeder if self.workers else Done

    def compute(self, items: Sequence[Done[Any]]) -> list[Seeded | ImageError]:
        """What was labelled."""
        return [self._labelled(item.result) for item in items]

    def _labelled(self, item: Seeded | Sample) -> Seeded | ImageError:
        if isinstance(item, Sample):
            try:
                item = self._seeder(item).result
            except ImageError as error:
                return error
        self.counters["masks"] += item.masks
        self.counters["without"] += int(not item.masks)
        return item
