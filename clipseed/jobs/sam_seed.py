"""``clipseed sam-seed``: label masks out of class activation maps and the segments of a segments file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipseed.data.paths import is_folder
from clipseed.data.stamps import FileStamp
from clipseed.data.types import Sample
from clipseed.defaults import EmptyPolicy, SegmentFormat
from clipseed.errors import ImageError, InputError, UsageError
from clipseed.evaluate.sources import LabelMaskFolder
from clipseed.formats.open import SegmentSource, imported_masks, open_segments
from clipseed.pseudo.rules import RuleOptions, Rules, decide, label_mask, voted_labels
from clipseed.runtime.images import earlier_in_cams, misfit, one_by_one, usable_cores
from clipseed.runtime.run import RunOptions, RunReport, Start, open_engine, run
from clipseed.runtime.stream import BatchSize
from clipseed.runtime.work import Done, Work
from clipseed.segments import Segments, from_masks
from clipseed.store.cams import CamSet, class_names
from clipseed.store.empty import Earlier, earlier_in, without_pixel
from clipseed.store.files import write_skipped
from clipseed.store.label_mask_writer import Labelled, LabelMaskWriter, read_label_mask_manifest
from clipseed.store.label_masks import label_mask_note
from clipseed.store.manifest import Manifest, label_manifest
from clipseed.store.record_set import UNIT_PATTERN
from clipseed.store.segment_records import unpack_segments
from clipseed.store.segments import SegmentSet, holds_segments
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
    forget()
    try:
        return _run(options, start)
    finally:
        forget()


def _run(options: SamSeedOptions, start: Start | None) -> SamSeedReport:
    source = _look_at_source(options.source)
    asked, about_masks, known = _look_at_masks(options, source)
    name = (source.manifest.get("vocabulary") or {}).get("name")
    rules = decide(options.rules, str(name), label_map=source.label_map, asked=asked)
    if rules.method == "pixel":
        about_masks, known = {}, None
    missing = _missing(options, source, known)
    chosen = {**rules.manifest(), "empty": options.empty}
    manifest = label_manifest(source.manifest, options.source, "sam-seed", rules.method, chosen, masks=about_masks)
    recipe = partial(_SeedWork, options, rules, source.label_map, len(source.classes))
    with (
        contextlib.closing(open_engine(recipe, options.run.cluster)) as engine,
        LabelMaskWriter(
            options.out, manifest, _UNIT_SIZE, overwrite=options.run.overwrite, shard=options.run.shard,
            empty=options.empty, earlier=_earlier(options.source, source),
        ) as writer,
    ):  # fmt: skip
        writer.follow(source.classes, lambda key: source.stamps[key])
        listed = write_skipped(options.out / MISSING_LIST, [(key, f"not in {options.masks}") for key in missing])
        samples = [Sample(key, Path(key), classes) for key, classes in source.classes.items()]
        done = run(engine, writer, samples, start, shard=options.run.shard)
        done.stats.counters["unsure"] += writer.ignored
    return SamSeedReport(
        **vars(done), source=options.source, method=rules.method, missing=len(missing), missing_file=listed
    )


def _earlier(path: Path, source: _Source) -> Earlier:
    """Answers whether a label had come to nothing in the source already, and since which stage."""
    if not source.label_map:
        return earlier_in_cams(cams_at(path.resolve()))

    def there(key: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        classes = label_mask_note(path / f"{key}.png").classes or ()
        return classes, without_pixel(classes, LabelMaskFolder(path).read(key))

    return earlier_in(path, source.manifest, there)


def _refuse_places(options: SamSeedOptions) -> None:
    for name, path in (("the source", options.source), ("--masks", options.masks)):
        if path.resolve() == options.out.resolve():
            raise UsageError(f"--out {options.out}: is {name} as well; choose another folder")


@dataclass(frozen=True)
class _Source:
    """What is labelled: its manifest, and by id classes, where they are known without looking at pixels, and images."""

    manifest: Manifest
    classes: Mapping[str, tuple[int, ...] | None]
    stamps: Mapping[str, FileStamp]
    label_map: bool


def _look_at_source(path: Path) -> _Source:
    if not is_folder(path) or any(path.glob(UNIT_PATTERN)):
        with CamSet(path) as cams:
            classes = {key: tuple(cams.classes(key).tolist()) for key in cams}
            return _Source(cams.manifest, classes, {key: cams.stamp(key) for key in cams}, False)
    keys = sorted(LabelMaskFolder(path).ids())
    if not keys:
        raise InputError(f"{path}: neither CAMs nor PNG masks in this folder")
    manifest = read_label_mask_manifest(path) or {}
    if "vocabulary" in manifest:
        class_names(manifest, path)
    notes = {key: label_mask_note(path / f"{key}.png") for key in keys}
    stamps = {key: note.image for key, note in notes.items()}
    return _Source(manifest, {key: note.classes for key, note in notes.items()}, stamps, True)


def _look_at_masks(options: SamSeedOptions, source: _Source) -> tuple[bool, dict[str, Any], frozenset[str] | None]:
    """Whether the masks were made for classes, what the manifest says about them, and the ids that they know."""
    if options.rules.method == "pixel":
        return False, {}, None
    if not holds_segments(options.masks):
        found = masks_at(options.masks.resolve(), options.masks_kind)
        return False, dict(imported_masks(options.masks, options.masks_kind)), found.ids()
    if options.masks_kind != "auto":
        raise UsageError(f"--masks-kind {options.masks_kind}: {options.masks} is a segments file")
    masks = SegmentSet(options.masks)
    manifest = masks.manifest
    asked = bool(manifest["vocabulary"])
    if asked and not source.label_map:
        theirs, ours = class_names(manifest, options.masks), class_names(source.manifest, options.source)
        if theirs != ours:
            raise UsageError(
                f"{options.masks}: its masks were asked for with other classes than those of {options.source}"
            )
    about: dict[str, Any] = {
        key: manifest[key] for key in ("kind", "method", "options", "source", "model") if key in manifest
    }
    ids = masks.ids()
    masks.close()
    return asked, about, ids


def _missing(options: SamSeedOptions, source: _Source, known: frozenset[str] | None) -> list[str]:
    """Ids of the source that the masks do not know.

    Raises:
        InputError: they know none of them.
    """
    if known is None:
        return []
    missing = [key for key in source.classes if key not in known]
    if missing and len(missing) == len(source.classes):
        there = f"its first is {min(known)!r}" if known else "it holds no image at all"
        raise InputError(
            f"{options.masks}: holds masks of none of the {len(missing)} images of {options.source} (the first is "
            f"{missing[0]!r}, {there}); was it made for another data set?"
        )
    return missing


@dataclass(frozen=True)
class Seeded(Labelled):
    """A finished image, with the number of its segments."""

    masks: int = 0


@lru_cache(maxsize=2)
def cams_at(path: Path) -> CamSet:
    """Opened once per process."""
    return CamSet(path, verify=False)


@lru_cache(maxsize=2)
def masks_at(path: Path, kind: SegmentFormat) -> SegmentSource:
    """Opened once per process."""
    return SegmentSet(path, verify=False) if holds_segments(path) else open_segments(path, kind)


@lru_cache(maxsize=2)
def _ids(path: Path, kind: SegmentFormat) -> frozenset[str]:
    return masks_at(path, kind).ids()


def forget() -> None:
    """Close what is open: the next run of this process may find other files under these names."""
    for opened in (cams_at, masks_at, _ids):
        opened.cache_clear()


@dataclass(frozen=True)
class Seeder:
    """Labels one image, from opening its maps and masks to the finished label mask; runs in worker processes."""

    source: Path
    masks: Path
    kind: SegmentFormat
    rules: Rules
    label_map: bool

    def __call__(self, sample: Sample) -> Done[Seeded]:
        """Label one image.

        Raises:
            ImageError: its maps or masks cannot be used.
            StoreError: a file is damaged.
        """
        try:
            return Done(self._voted(sample) if self.label_map else self._seeded(sample))
        except InputError as error:  # one damaged file is no reason to stop
            raise ImageError(str(error)) from error

    def _voted(self, sample: Sample) -> Seeded:
        labels = LabelMaskFolder(self.source).read(sample.id)
        stamp = label_mask_note(self.source / f"{sample.id}.png").image
        proposals, _ = self._proposals(sample.id, (labels.shape[0], labels.shape[1]), stamp)
        found = voted_labels(self.rules, labels, proposals.masks)
        classes = sample.labels
        if classes is None:
            classes = tuple(int(value) - 1 for value in np.unique(labels) if value not in (0, IGNORE))
        return Seeded(sample.id, found, classes, stamp, len(proposals))

    def _seeded(self, sample: Sample) -> Seeded:
        cam = cams_at(self.source)[sample.id]
        problem = misfit(cam, cam.size)
        if problem is not None:
            raise problem
        proposals, asked = self._proposals(sample.id, cam.size, cam.stamp)
        labels = label_mask(cam, self.rules, proposals, asked)
        return Seeded(sample.id, labels, tuple(cam.classes.tolist()), cam.stamp, len(proposals))

    def _proposals(self, identifier: str, size: tuple[int, int], stamp: FileStamp) -> tuple[Segments, Any]:
        """Masks of an image, none where there are none, and the class that each was asked for.

        Raises:
            ImageError: they cannot be used, or were made from another image.
        """
        if self.rules.method == "pixel" or identifier not in _ids(self.masks, self.kind):
            found = from_masks(np.zeros((0, *size), bool))
            return found, np.zeros(0, np.int32)
        masks = masks_at(self.masks, self.kind)
        if isinstance(masks, SegmentSet):
            record = masks.record(identifier, size)
            if record.stamp.differs(stamp):
                raise ImageError(f"{self.masks}: its segments are those of another image; run clipseed sam-masks again")
            return unpack_segments(record), record.class_id
        found = masks.read(identifier, size)
        return found, np.full(len(found), NO_CLASS, np.int32)


class _SeedWork(Work[Any, Seeded]):
    """Maps and masks to label masks: everything happens where images are loaded, or without workers in threads."""

    def __init__(self, options: SamSeedOptions, rules: Rules, label_map: bool, images: int) -> None:
        super().__init__()
        self._seeder = Seeder(options.source.resolve(), options.masks.resolve(), options.masks_kind, rules, label_map)
        workers = options.run.workers
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
        self.counters["pixels"] += item.labels.size
        self.counters["unsure"] += int(np.count_nonzero(item.labels == IGNORE))
        self.counters["masks"] += item.masks
        self.counters["without"] += int(not item.masks)
        return item
