"""``clipseed inspect``: what an output holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipseed.data.dataset import image_finder, relocated
from clipseed.data.paths import is_folder, never_ends
from clipseed.errors import ImageError, InputError, StoreError
from clipseed.report.overlay import Pixels, contact_sheet, heat_overlay, label_overlay
from clipseed.segments import enlarged
from clipseed.store.cams import CamSet, class_names
from clipseed.store.empty import EmptyLabels, EmptyList, empty_maps, listed_earlier, read_empty
from clipseed.store.feature_records import feature_format
from clipseed.store.features import FeatureSet
from clipseed.store.files import replacing
from clipseed.store.formats import format_of
from clipseed.store.layout import RecordFormat
from clipseed.store.manifest import Manifest
from clipseed.store.record_set import UNIT_PATTERN
from clipseed.store.segment_records import segment_format, unpack_segments
from clipseed.store.segments import SegmentSet
from clipseed.types import NO_CLASS


@dataclass(frozen=True)
class Inspection:
    """A summary of CAMs.

    Attributes:
        maps: Number of class activation maps.
        per_class: Class name to number of images.
        grid_range: Smallest and largest ``(h, w)``.
        empty: LabelMask whose maps are zero everywhere, among those looked at, with reasons.
        checked: How many images were looked at for that.
    """

    path: Path
    manifest: Manifest
    files: int
    bytes: int
    images: int
    without_class: int
    maps: int
    per_class: dict[str, int]
    grid_range: tuple[tuple[int, int], tuple[int, int]] | None
    cam_dtype: str
    empty: EmptyLabels
    checked: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            **vars(self), "path": str(self.path), "empty": self.empty.as_dict(), "empty_maps": len(self.empty.labels)
        }  # fmt: skip


def inspect_cams(path: Path, *, verify: bool = False, look_at: int = 2000) -> Inspection:
    """Summarise a CAM file or folder.

    Args:
        path: What to look at.
        verify: Check all checksums, whatever the size.
        look_at: Look for empty maps in this many images.

    Raises:
        StoreError: missing, not ours, or damaged.
    """
    with CamSet(path, verify=True if verify else None) as cams:
        names = cams.class_names
        counts = np.zeros(len(names), np.int64)
        for file in cams.files:
            found = file.class_counts
            counts[: len(found)] += found
        grids = np.concatenate([file.grids for file in cams.files])
        ids = list(cams)[:look_at]
        order = np.argsort(grids.prod(axis=1), kind="stable")
        ends = tuple((int(grids[k][0]), int(grids[k][1])) for k in (order[0], order[-1])) if len(grids) else None
        without = int(sum((np.diff(file.class_offsets) == 0).sum() for file in cams.files))
        return Inspection(
            path=path,
            manifest=cams.manifest,
            files=len(cams.files),
            bytes=sum(file.path.stat().st_size for file in cams.files),
            images=len(cams),
            without_class=without,
            maps=int(counts.sum()),
            per_class={name: int(count) for name, count in zip(names, counts, strict=True)},
            grid_range=ends if ends is None else (ends[0], ends[1]),
            cam_dtype=cams.files[0].cam_dtype,
            empty=_empty(cams, ids),
            checked=len(ids),
        )


def _empty(cams: CamSet, ids: list[str]) -> EmptyLabels:
    """Labels of some images whose maps are empty, with the stages and reasons that are listed beside the CAMs."""
    listed = listed_earlier(read_empty(cams.path), cams.manifest)
    found = EmptyList(cams.path, cams.manifest, earlier=listed)
    for key in ids:
        cam = cams[key]
        classes = cam.classes.tolist()
        found.add(key, classes, empty_maps(classes, cam.maps))
    return found.found()


def write_preview(
    path: Path, out: Path, count: int = 4, ids: tuple[str, ...] = (), images: Path | None = None,
    root: Path | None = None,
) -> list[str]:  # fmt: skip
    """Write an overlay of some images' maps to a PNG; returns their ids.

    Raises:
        InputError: no such id, or none of the images can be found any more.
        StoreError: the CAMs are damaged, or ``out`` cannot be written.
    """
    with CamSet(path) as cams:
        dataset = relocated(cams.manifest, images, root)["dataset"]
        find = image_finder(dataset, exif=bool(cams.manifest["options"].get("exif")))
        unknown = [key for key in ids if key not in cams]
        if unknown:
            raise InputError(f"{path}: holds no image {unknown[0]!r}")
        chosen = list(ids) or _spread([key for key in cams if len(cams[key].classes)], count)
        rows, problems = [], []
        for key in chosen:
            try:
                rows.append(_row(cams, key, np.asarray(find(key))))
            except ImageError as error:
                problems.append(str(error))
        if not rows:
            raise InputError(f"{path}: nothing to show: {problems[0] if problems else 'no image shows a class'}")
        with replacing(out) as temporary:
            contact_sheet(rows).save(temporary, format="PNG")
        return chosen


def _spread(keys: list[str], count: int) -> list[str]:
    """Evenly spaced members of a list."""
    step = max(1, len(keys) // max(1, count))
    return keys[::step][:count]


def _row(cams: CamSet, key: str, image: Pixels) -> list[tuple[str, Pixels]]:
    cam = cams[key]
    if image.shape[:2] != cam.size:
        raise ImageError(f"{key}: the image has another size now")
    row = [(key, image)]
    for class_id, heat in zip(cam.classes, cam.upsampled(), strict=True):
        row.append((cams.class_names[class_id], heat_overlay(image, heat)))
    return row


_LEVELS = ("sub-part", "part", "whole")
_COLOURS = 254


@dataclass(frozen=True)
class SegmentInspection:
    """A summary of a segments file.

    Attributes:
        without_masks: Images that have none.
        shrunk: Images whose masks are smaller than themselves.
        per_image: Fewest, median and most masks of an image.
        bytes_per_image: Of the files.
        bytes_per_mask: Of the compressed masks alone.
        levels: Number of masks by level.
        per_class: Class name to number of masks, where they were asked for.
    """

    path: Path
    manifest: Manifest
    files: int
    bytes: int
    images: int
    without_masks: int
    shrunk: int
    masks: int
    per_image: tuple[int, float, int]
    bytes_per_image: float
    bytes_per_mask: float
    levels: dict[str, int]
    per_class: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {**vars(self), "path": str(self.path)}


def holds_segment_records(path: Path) -> bool:
    """Whether a file or folder of units holds masks rather than CAMs; false where nothing can be read."""
    return _holds(path, segment_format())


def holds_features(path: Path) -> bool:
    """Whether a file or folder of units holds features; false where nothing can be read."""
    return _holds(path, feature_format())


def _holds(path: Path, form: RecordFormat[Any]) -> bool:
    files = sorted(path.glob(UNIT_PATTERN)) if is_folder(path) else [path]
    if never_ends(files[0] if files else path):
        return False
    try:
        return bool(files) and format_of(files[0]).name == form.name
    except StoreError:
        return False


@dataclass(frozen=True)
class FeatureInspection:
    """A summary of a features file; ``length``: values of each feature, 0 where there is none."""

    path: Path
    manifest: Manifest
    files: int
    bytes: int
    images: int
    length: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {**vars(self), "path": str(self.path)}


def inspect_features(path: Path, *, verify: bool = False) -> FeatureInspection:
    """Summarise a features file.

    Args:
        path: A file, or a folder of units.
        verify: Check all checksums, whatever the size.

    Raises:
        StoreError: missing, not ours, or damaged.
    """
    with FeatureSet(path, verify=True if verify else None) as features:
        size = sum(file.path.stat().st_size for file in features.files)
        first = next(iter(features.values()), None)
        length = 0 if first is None else len(first.values)
        return FeatureInspection(path, features.manifest, len(features.files), size, len(features), length)


def inspect_segments(path: Path, *, verify: bool = False) -> SegmentInspection:
    """Summarise a segments file.

    Args:
        path: A file, or a folder of units.
        verify: Check all checksums, whatever the size.

    Raises:
        StoreError: missing, not ours, or damaged.
    """
    with SegmentSet(path, verify=True if verify else None) as cache:
        files = cache.files
        counts = np.concatenate([np.diff(file.index["mask_offset"]) for file in files])
        codes = sum(int(file.index["rle_offset"][-1]) for file in files)
        shrunk = sum(int((file.index["size"] != file.grids).any(axis=1).sum()) for file in files)
        names = class_names(cache.manifest, path) if cache.manifest["vocabulary"] else ()
        try:
            level = np.concatenate([file.file["level"][...] for file in files])
            class_id = np.concatenate([file.file["class_id"][...] for file in files])
        except OSError as error:
            raise StoreError(f"{path}: damaged, its levels and classes cannot be read back") from error
        size = sum(file.path.stat().st_size for file in files)
        asked = np.bincount(class_id[class_id != NO_CLASS], minlength=len(names))
        return SegmentInspection(
            path=path,
            manifest=cache.manifest,
            files=len(files),
            bytes=size,
            images=len(cache),
            without_masks=int((counts == 0).sum()),
            shrunk=shrunk,
            masks=int(counts.sum()),
            per_image=(int(counts.min()), float(np.median(counts)), int(counts.max())) if len(counts) else (0, 0, 0),
            bytes_per_image=size / max(1, len(cache)),
            bytes_per_mask=codes / max(1, int(counts.sum())),
            levels={name: int((level == number).sum()) for number, name in enumerate(_LEVELS)},
            per_class={name: int(count) for name, count in zip(names, asked, strict=False) if count},
        )


def write_segment_preview(
    path: Path, out: Path, count: int = 4, ids: tuple[str, ...] = (), images: Path | None = None,
    root: Path | None = None,
) -> list[str]:  # fmt: skip
    """Write some images with their masks in colours, small ones on top, to a PNG; returns their ids.

    Raises:
        InputError: no such id, or none of the images can be found any more.
        StoreError: the cache is damaged, or ``out`` cannot be written.
    """
    with SegmentSet(path) as cache:
        dataset = relocated(cache.manifest, images, root)["dataset"]
        find = image_finder(dataset, exif=bool(cache.manifest["options"].get("exif")))
        unknown = [key for key in ids if key not in cache]
        if unknown:
            raise InputError(f"{path}: holds no image {unknown[0]!r}")
        keys = list(cache)
        chosen = list(ids) or keys[:: max(1, len(keys) // max(1, count))][:count]
        rows, problems = [], []
        for key in chosen:
            try:
                rows.append(_mask_row(cache, key, np.asarray(find(key))))
            except ImageError as error:
                problems.append(str(error))
        if not rows:
            raise InputError(f"{path}: nothing to show: {problems[0] if problems else 'it holds no image'}")
        with replacing(out) as temporary:
            contact_sheet(rows).save(temporary, format="PNG")
        return chosen


def _mask_row(cache: SegmentSet, key: str, image: Pixels) -> list[tuple[str, Pixels]]:
    record = cache[key]
    if image.shape[:2] != record.size:
        raise ImageError(f"{key}: the image has another size now")
    proposals = unpack_segments(record)
    colours = np.zeros(record.grid, np.uint8)
    for index in np.argsort(-proposals.area, kind="stable"):
        colours[proposals.masks[index]] = index % _COLOURS + 1
    return [(key, image), (f"{len(record)} masks", label_overlay(image, enlarged(colours, record.size)))]
