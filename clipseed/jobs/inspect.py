"""``clipseed inspect``: what an output of records holds, and a preview of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipseed.data.dataset import image_finder, relocated
from clipseed.data.paths import is_folder
from clipseed.errors import ImageError, InputError, StoreError, UsageError
from clipseed.report.overlay import Pixels, contact_sheet, fitted, heat_overlay, label_overlay, map_caption
from clipseed.segments import enlarged
from clipseed.store.cams import CamSet, class_names
from clipseed.store.empty import EmptyLabels, EmptyList, empty_maps, listed_earlier, read_empty
from clipseed.store.features import FeatureSet
from clipseed.store.files import replacing
from clipseed.store.manifest import Manifest
from clipseed.store.open import Records, content_of, open_records
from clipseed.store.segment_records import unpack_segments
from clipseed.store.segments import SegmentSet
from clipseed.types import NO_CLASS

_LOOK_AT = 2000
"""Images whose maps are read, to find those that are empty."""
_LEVELS = ("sub-part", "part", "whole")
_COLOURS = 254


@dataclass(frozen=True)
class Inspection:
    """A summary of an output: its manifest, and its size in files, bytes and images."""

    path: Path
    manifest: Manifest
    files: int
    bytes: int
    images: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {**vars(self), "path": str(self.path)}


@dataclass(frozen=True)
class CamInspection(Inspection):
    """A summary of CAMs.

    Attributes:
        without_class: Images that have no class.
        maps: Number of class activation maps.
        per_class: Class name to number of images.
        grid_range: Smallest and largest ``(h, w)``.
        cam_dtype: Type of the stored maps.
        empty: Labels whose maps are zero everywhere, among those looked at, with reasons.
        checked: How many images were looked at for that.
    """

    without_class: int
    maps: int
    per_class: dict[str, int]
    grid_range: tuple[tuple[int, int], tuple[int, int]] | None
    cam_dtype: str
    empty: EmptyLabels
    checked: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {**super().as_dict(), "empty": self.empty.as_dict(), "empty_maps": len(self.empty.labels)}


@dataclass(frozen=True)
class SegmentInspection(Inspection):
    """A summary of a segments file.

    Attributes:
        without_masks: Images that have none.
        shrunk: Images whose masks are smaller than themselves.
        masks: Number of masks.
        per_image: Fewest, median and most masks of an image.
        bytes_per_image: Of the files.
        bytes_per_mask: Of the compressed masks alone.
        levels: Number of masks by level.
        per_class: Class name to number of masks, where they were asked for.
    """

    without_masks: int
    shrunk: int
    masks: int
    per_image: tuple[int, float, int]
    bytes_per_image: float
    bytes_per_mask: float
    levels: dict[str, int]
    per_class: dict[str, int]


@dataclass(frozen=True)
class FeatureInspection(Inspection):
    """A summary of a features file; ``length``: values of each feature, 0 where there is none."""

    length: int


AnyInspection = CamInspection | SegmentInspection | FeatureInspection


def inspect_output(path: Path, *, verify: bool = False) -> AnyInspection:
    """Summarise CAMs, segments or features.

    Args:
        path: A file, or a folder of units.
        verify: Check all checksums, whatever the size.

    Raises:
        StoreError: missing, not ours, or damaged.
        UsageError: label masks.
    """
    if is_folder(path) and content_of(path) == "label masks" and next(path.rglob("*.png"), None) is not None:
        raise UsageError(f"{path}: holds label masks; clipseed report {path} shows them over their images")
    with open_records(path, verify=True if verify else None) as records:
        if isinstance(records, CamSet):
            return _inspect_cams(records)
        return _inspect_segments(records) if isinstance(records, SegmentSet) else _inspect_features(records)


def _size(records: Records) -> dict[str, Any]:
    """What an inspection says of any output."""
    return {
        "path": records.path,
        "manifest": records.manifest,
        "files": len(records.files),
        "bytes": sum(file.path.stat().st_size for file in records.files),
        "images": len(records),
    }


def _inspect_cams(cams: CamSet) -> CamInspection:
    names = cams.class_names
    counts = np.zeros(len(names), np.int64)
    for file in cams.files:
        images_of = file.class_counts
        counts[: len(images_of)] += images_of
    grids = np.concatenate([file.grids for file in cams.files])
    order = np.argsort(grids.prod(axis=1), kind="stable")
    ends = tuple((int(grids[k][0]), int(grids[k][1])) for k in (order[0], order[-1])) if len(grids) else None
    ids = list(cams)[:_LOOK_AT]
    return CamInspection(
        **_size(cams),
        without_class=int(sum((np.diff(file.class_offsets) == 0).sum() for file in cams.files)),
        maps=int(counts.sum()),
        per_class={name: int(count) for name, count in zip(names, counts, strict=True)},
        grid_range=ends if ends is None else (ends[0], ends[1]),
        cam_dtype=cams.files[0].cam_dtype,
        empty=_empty(cams, ids),
        checked=len(ids),
    )


def _empty(cams: CamSet, ids: Sequence[str]) -> EmptyLabels:
    """Labels of some images whose maps are empty, with the stages and reasons that are listed beside the CAMs."""
    listed = listed_earlier(read_empty(cams.path), cams.manifest)
    empty = EmptyList(cams.path, cams.manifest, earlier=listed)
    for key in ids:
        cam = cams[key]
        classes = cam.classes.tolist()
        empty.add(key, classes, empty_maps(classes, cam.maps))
    return empty.found()


def _inspect_segments(segments: SegmentSet) -> SegmentInspection:
    files, size = segments.files, _size(segments)
    counts = np.concatenate([np.diff(file.index["mask_offset"]) for file in files])
    codes = sum(int(file.index["rle_offset"][-1]) for file in files)
    names = class_names(segments.manifest, segments.path) if segments.manifest["vocabulary"] else ()
    try:
        level = np.concatenate([file.file["level"][...] for file in files])
        class_id = np.concatenate([file.file["class_id"][...] for file in files])
    except OSError as error:
        raise StoreError(f"{segments.path}: damaged, its levels and classes cannot be read back") from error
    per_class = np.bincount(class_id[class_id != NO_CLASS], minlength=len(names))
    return SegmentInspection(
        **size,
        without_masks=int((counts == 0).sum()),
        shrunk=sum(int((file.index["size"] != file.grids).any(axis=1).sum()) for file in files),
        masks=int(counts.sum()),
        per_image=(int(counts.min()), float(np.median(counts)), int(counts.max())) if len(counts) else (0, 0, 0),
        bytes_per_image=size["bytes"] / max(1, len(segments)),
        bytes_per_mask=codes / max(1, int(counts.sum())),
        levels={name: int((level == number).sum()) for number, name in enumerate(_LEVELS)},
        per_class={name: int(count) for name, count in zip(names, per_class, strict=False) if count},
    )


def _inspect_features(features: FeatureSet) -> FeatureInspection:
    first = next(iter(features.values()), None)
    return FeatureInspection(**_size(features), length=0 if first is None else len(first.values))


def write_preview(
    path: Path, out: Path, count: int = 4, ids: tuple[str, ...] = (), images: Path | None = None,
    root: Path | None = None,
) -> list[str]:  # fmt: skip
    """Write some images with their maps, or with their segments in colours, to a PNG; returns their ids.

    Raises:
        UsageError: features.
        InputError: no such id, or none of the images can be found any more.
        StoreError: the records are damaged, or ``out`` cannot be written.
    """
    with open_records(path) as records:
        if isinstance(records, FeatureSet):
            raise UsageError("--preview: features are nothing to look at")
        dataset = relocated(records.manifest, images, root)["dataset"]
        find = image_finder(dataset, exif=bool(records.manifest["options"].get("exif")))
        unknown = [key for key in ids if key not in records]
        if unknown:
            raise InputError(f"{path}: holds no image {unknown[0]!r}")
        rows, problems, chosen = [], [], list(ids) or _spread(_worth_showing(records), count)
        for key in chosen:
            try:
                image = np.asarray(find(key))
                if image.shape[:2] != records[key].size:
                    raise ImageError(f"{key}: the image has another size now")
                image = fitted(image)
                row = _map_row(records, key, image) if isinstance(records, CamSet) else _mask_row(records, key, image)
                rows.append([(key, image), *row])
            except ImageError as error:
                problems.append(str(error))
        if not rows:
            nothing = "no image shows a class" if isinstance(records, CamSet) else "it holds no image"
            raise InputError(f"{path}: nothing to show: {problems[0] if problems else nothing}")
        with replacing(out) as temporary:
            contact_sheet(rows).save(temporary, format="PNG")
        return chosen


def _worth_showing(records: CamSet | SegmentSet) -> list[str]:
    return [key for key in records if not isinstance(records, CamSet) or len(records.classes(key))]


def _spread(keys: list[str], count: int) -> list[str]:
    """Evenly spaced members of a list."""
    step = max(1, len(keys) // max(1, count))
    return keys[::step][:count]


def _map_row(cams: CamSet, key: str, image: Pixels) -> list[tuple[str, Pixels]]:
    """Each class's map over the image."""
    cam = replace(cams[key], size=image.shape[:2])
    maps = zip(cam.classes, cam.upsampled(), strict=True)
    return [(map_caption(cams.class_names[class_id], heat), heat_overlay(image, heat)) for class_id, heat in maps]


def _mask_row(segments: SegmentSet, key: str, image: Pixels) -> list[tuple[str, Pixels]]:
    """All segments over the image, small ones on top."""
    record = segments[key]
    proposals = unpack_segments(record)
    colours = np.zeros(record.grid, np.uint8)
    for index in np.argsort(-proposals.area, kind="stable"):
        colours[proposals.masks[index]] = index % _COLOURS + 1
    return [(f"{len(record)} masks", label_overlay(image, enlarged(colours, image.shape[:2])))]
