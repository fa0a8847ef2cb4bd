"""``clipseed sam-seed``: label masks out of class activation maps and the segments of a mask cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipseed.data.paths import is_folder
from clipseed.data.stamps import FileStamp
from clipseed.data.types import Sample
from clipseed.errors import ImageError, InputError, UsageError
from clipseed.evaluate.sources import MaskFolder
from clipseed.formats.open import Kind, imported_masks
from clipseed.jobs.engine import (
    check_empty,
    earlier_in_seeds,
    one_by_one,
    usable_cores,
)
from clipseed.jobs.sam_seeder import Seeded, Seeder, forget, masks_at, seeds_at
from clipseed.pseudo.rules import RuleOptions, Rules, decide
from clipseed.runtime.run import RunOptions, RunReport, Start, open_engine, run
from clipseed.runtime.stream import BatchSize
from clipseed.runtime.work import Work
from clipseed.store.empty import Earlier, EmptyPolicy, earlier_in, without_pixel
from clipseed.store.files import write_skipped
from clipseed.store.manifest import Manifest, package_versions
from clipseed.store.mask_cache import MaskCache, holds_cache
from clipseed.store.mask_folder import MaskWriter, read_mask_manifest
from clipseed.store.masks import mask_note
from clipseed.store.reader import Seeds, class_names
from clipseed.store.record_set import UNIT_PATTERN
from clipseed.types import IGNORE

_UNIT_SIZE = 64
_WORTH_WORKERS = 200
"""Images from which on worker processes, which take seconds to start, are worth it."""
MISSING_LIST = "without-masks.csv"


@dataclass(frozen=True)
class SamSeedOptions:
    """Everything ``clipseed sam-seed`` can be told.

    Attributes:
        source: Seeds, or for voting a folder of label masks.
        masks: A mask cache, or existing masks in another format.
        masks_kind: That format.
        rules: How images are labelled.
        empty: What becomes of the mask of an image in which some label got no pixel
            (:class:`~clipseed.store.mask_folder.MaskWriter`).
    """

    source: Path
    masks: Path
    out: Path
    masks_kind: Kind = "auto"
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
    check_empty(options.empty)
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
    manifest = _manifest(source.manifest, chosen, rules.method, about_masks, options.source)
    recipe = partial(_SeedWork, options, rules, source.label_map, len(source.classes))
    with (
        contextlib.closing(open_engine(recipe, options.run.cluster)) as engine,
        MaskWriter(
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
        return earlier_in_seeds(seeds_at(path.resolve()))

    def there(key: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        classes = mask_note(path / f"{key}.png").classes or ()
        return classes, without_pixel(classes, MaskFolder(path).read(key))

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
        with Seeds(path) as seeds:
            classes = {key: tuple(seeds.classes(key).tolist()) for key in seeds}
            return _Source(seeds.manifest, classes, {key: seeds.stamp(key) for key in seeds}, False)
    keys = sorted(MaskFolder(path).ids())
    if not keys:
        raise InputError(f"{path}: neither seeds nor PNG masks in this folder")
    manifest = read_mask_manifest(path) or {}
    if "vocabulary" in manifest:
        class_names(manifest, path)
    notes = {key: mask_note(path / f"{key}.png") for key in keys}
    stamps = {key: note.image for key, note in notes.items()}
    return _Source(manifest, {key: note.classes for key, note in notes.items()}, stamps, True)


def _look_at_masks(options: SamSeedOptions, source: _Source) -> tuple[bool, dict[str, Any], frozenset[str] | None]:
    """Whether the masks were made for classes, what the manifest says about them, and the ids that they know."""
    if options.rules.method == "pixel":
        return False, {}, None
    if not holds_cache(options.masks):
        found = masks_at(options.masks.resolve(), options.masks_kind)
        return False, dict(imported_masks(options.masks, options.masks_kind)), found.ids()
    if options.masks_kind != "auto":
        raise UsageError(f"--masks-kind {options.masks_kind}: {options.masks} is a mask cache")
    masks = MaskCache(options.masks)
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


def _manifest(
    source: Manifest, chosen: dict[str, Any], method: str, masks: dict[str, Any], made_from: Path
) -> Manifest:
    before = source.get("options") or {}
    kept = {key: before[key] for key in ("exif", "max_side", "min_side") if key in before}
    origin = {key: source[key] for key in ("kind", "method", "options", "source") if key in source}
    there: dict[str, Any] = {key: source[key] for key in ("model", "weights", "vocabulary", "dataset") if key in source}
    return {
        "kind": "sam-seed",
        "method": method,
        "options": {**kept, **chosen},
        "source": {**origin, "masks": masks},
        **there,
        "input": str(made_from.resolve()),
        "versions": package_versions(),
    }


@dataclass(frozen=True)
class _Ahead:
    """An image that is to be labelled by a thread of the run: nothing is decoded before."""

    sample: Sample
    key: tuple[int, ...] = ()
    cost: int = 1


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
    def loader(self) -> Callable[[Sample], Seeded | _Ahead]:
        """Label images in workers."""
        return self._seeder if self.workers else _Ahead

    def compute(self, items: Sequence[Seeded | _Ahead]) -> list[Seeded | ImageError]:
        """What was labelled."""
        return [self._labelled(item) for item in items]

    def _labelled(self, item: Seeded | _Ahead) -> Seeded | ImageError:
        if isinstance(item, _Ahead):
            try:
                item = self._seeder(item.sample)
            except ImageError as error:
                return error
        self.counters["pixels"] += item.labels.size
        self.counters["unsure"] += int(np.count_nonzero(item.labels == IGNORE))
        self.counters["masks"] += item.masks
        self.counters["without"] += int(not item.masks)
        return item
