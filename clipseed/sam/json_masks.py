"""Existing masks in JSON: COCO's instances in one file, SA-1B's one file per picture."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipseed.data.labels import read_json
from clipseed.data.listing import clean_id
from clipseed.data.types import check_id
from clipseed.errors import ImageError, InputError, UsageError
from clipseed.sam.proposals import Proposals, from_masks
from clipseed.store.rle import decode_counts, unpack_counts

MAX_MASK_BYTES = 2**31
"""Masks of one picture that are held in memory together, one byte a pixel."""


class CocoInstances:
    """Masks of an instances file, crowds included, whatever their category; ids are file names without suffix."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            InputError: malformed.
        """
        self.path = path
        data = read_json(path, "a COCO annotation file")
        by_image: dict[int, list[dict[str, Any]]] = {}
        for number, item in enumerate(records(data, "annotations", path)):
            where = f"{path}: annotations[{number}]"
            by_image.setdefault(integer(item, "image_id", where), []).append({**item, "where": where})
        self._pictures: dict[str, list[dict[str, Any]]] = {}
        for number, item in enumerate(records(data, "images", path)):
            where = f"{path}: images[{number}]"
            name = item.get("file_name")
            if not isinstance(name, str):
                raise InputError(f"{where}: 'file_name' is not a text")
            self._pictures[clean_id(name, where)] = by_image.get(integer(item, "id", where), [])

    def ids(self) -> frozenset[str]:
        """Ids of all pictures the file lists, with or without masks."""
        return frozenset(self._pictures)

    def read(self, identifier: str, size: tuple[int, int]) -> Proposals:
        """Masks of a picture of this height and width, in the file's order.

        Raises:
            ImageError: the file does not list the picture, or its masks have another size or need too much memory.
            InputError: a malformed annotation.
            UsageError: polygons, and pycocotools is not installed.
        """
        if identifier not in self._pictures:
            raise ImageError(f"{self.path}: lists no picture {identifier!r}")
        found = self._pictures[identifier]
        masks = room_for(len(found), size, str(self.path))
        for mask, item in zip(masks, found, strict=True):
            mask[:] = decode_segmentation(item.get("segmentation"), size, item["where"])
        return from_masks(masks)


class Sa1b:
    """A folder of SA-1B files, one ``<id>.json`` per picture, with SAM's scores, points and crop boxes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ids(self) -> frozenset[str]:
        """Ids of all JSON files below the folder."""
        return ids_below(self.folder, ".json")

    def read(self, identifier: str, size: tuple[int, int]) -> Proposals:
        """Masks of a picture of this height and width; missing scores are 1, the level is whole.

        Raises:
            ImageError: no file, or its masks have another size or need too much memory.
            InputError: a malformed file or annotation.
            UsageError: polygons, and pycocotools is not installed.
        """
        path = self.folder / f"{check_id(identifier, str(self.folder))}.json"
        if not path.is_file():
            raise ImageError(f"{path}: no such mask file")
        found = records(read_json(path, "an SA-1B file"), "annotations", path)
        masks = room_for(len(found), size, str(path))
        iou, stability = np.ones(len(found), np.float32), np.ones(len(found), np.float32)
        point = np.full((len(found), 2), np.nan, np.float32)
        crop_box = np.tile(np.array([0, 0, size[1], size[0]], np.int32), (len(found), 1))
        for index, item in enumerate(found):
            where = f"{path}: annotations[{index}]"
            masks[index] = decode_segmentation(item.get("segmentation"), size, where)
            iou[index], stability[index] = (
                numbers(item.get(key, 1.0), 1, key, where)[0] for key in ("predicted_iou", "stability_score")
            )
            if item.get("point_coords"):
                coordinates = item["point_coords"]
                first = coordinates[0] if isinstance(coordinates, list) else coordinates
                point[index] = numbers(first, 2, "point_coords", where)
            if item.get("crop_box"):
                corner = np.clip(numbers(item["crop_box"], 4, "crop_box", where), -(2**31), 2**31 - 1)
                crop_box[index] = np.rint(corner).astype(np.int64)
        kept = np.flatnonzero(masks.any(axis=(1, 2)))
        bare = from_masks(masks)
        return replace(bare, iou=iou[kept], stability=stability[kept], point=point[kept], crop_box=crop_box[kept])


def decode_segmentation(segmentation: Any, size: tuple[int, int], where: str) -> npt.NDArray[np.bool_]:
    """Mask ``(H, W)`` from a COCO ``segmentation``: polygons, or run lengths as a list or compressed.

    Raises:
        ImageError: run lengths of another size.
        InputError: malformed.
        UsageError: polygons, and pycocotools is not installed.
    """
    if isinstance(segmentation, list):
        return _fill(segmentation, size, where)
    if not isinstance(segmentation, dict):
        raise InputError(f"{where}: 'segmentation' is neither polygons nor a run-length code")
    stated = segmentation.get("size")
    if not isinstance(stated, list) or len(stated) != 2 or not all(type(side) is int for side in stated):
        raise InputError(f"{where}: the segmentation's 'size' is not [height, width]")
    if tuple(stated) != size:
        raise ImageError(f"{where}: a mask of {stated[1]}x{stated[0]} pixels for a picture of {size[1]}x{size[0]}")
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        counts = unpack_counts(counts, where)
    if not isinstance(counts, list):
        raise InputError(f"{where}: the segmentation's 'counts' is neither a list nor a text")
    return decode_counts(counts, size, where)


def _fill(polygons: list[Any], size: tuple[int, int], where: str) -> npt.NDArray[np.bool_]:
    """Union of polygons ``[x, y, x, y, …]``, with COCO's own rasterisation."""
    height, width = size
    if not polygons:
        return np.zeros(size, bool)
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise InputError(f"{where}: a polygon is x, y of three or more corners")
        found = numbers(polygon, len(polygon), "segmentation", where)
        # Corners far outside would make the rasteriser walk there, edge pixel by edge pixel.
        if np.abs(found).max() > 4 * max(height, width) + 100:
            raise ImageError(f"{where}: a polygon lies far outside a picture of {width}x{height} pixels")
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise UsageError(f"{where}: polygons need pycocotools; pip install 'clipseed[sam]'") from error
    filled: npt.NDArray[np.bool_] = coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))).astype(bool)
    return filled


def room_for(count: int, size: tuple[int, int], where: str) -> npt.NDArray[np.bool_]:
    """Empty masks ``(count, H, W)``.

    Raises:
        ImageError: they would take more than ``MAX_MASK_BYTES``.
    """
    height, width = size
    if count * height * width > MAX_MASK_BYTES:
        raise ImageError(f"{where}: {count} masks of {width}x{height} pixels need more than 2 GiB; shrink the picture")
    return np.zeros((count, height, width), bool)


def ids_below(folder: Path, suffix: str) -> frozenset[str]:
    """Paths without suffix of all files below a folder that have this suffix, hidden ones left out."""
    found = (path.relative_to(folder) for path in folder.rglob(f"*{suffix}"))
    return frozenset(path.with_suffix("").as_posix() for path in found if not path.name.startswith("."))


def records(data: Any, key: str, path: Path) -> list[dict[str, Any]]:
    """A list of mappings at the top of a file.

    Raises:
        InputError: there is none.
    """
    found = data.get(key) if isinstance(data, dict) else None
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise InputError(f"{path}: {key!r} is not a list of mappings")
    return found


def integer(item: dict[str, Any], key: str, where: str) -> int:
    """An integer of a mapping.

    Raises:
        InputError: missing or something else.
    """
    value = item.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{where}: {key!r} is not an integer")
    return value


def numbers(value: Any, count: int, key: str, where: str) -> list[float]:
    """So many finite numbers, a single one also without a list.

    Raises:
        InputError: something else.
    """
    found = value if isinstance(value, list) else [value]
    try:
        good = len(found) == count and all(
            isinstance(entry, int | float) and not isinstance(entry, bool) and math.isfinite(entry) for entry in found
        )
    except OverflowError:  # an integer beyond the range of floats
        good = False
    if not good:
        raise InputError(f"{where}: {key!r} must be {'a number' if count == 1 else f'{count} numbers'}")
    return [float(entry) for entry in found]
