"""COCO instances: one JSON file with polygons or run-length masks; read as segments, written from label masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipseed.data.json_fields import integer, numbers, records
from clipseed.data.labels import read_json
from clipseed.data.listing import clean_id
from clipseed.errors import ImageError, InputError, UsageError
from clipseed.formats.rle import compress, decode_counts, unpack_counts
from clipseed.formats.writing import SPLIT, ClassTable, Encoded, Item, TextFile, Writer, compact, regions
from clipseed.segments import Segments, from_masks, room_for


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
        self._images: dict[str, list[dict[str, Any]]] = {}
        for number, item in enumerate(records(data, "images", path)):
            where = f"{path}: images[{number}]"
            name = item.get("file_name")
            if not isinstance(name, str):
                raise InputError(f"{where}: 'file_name' is not a text")
            self._images[clean_id(name, where)] = by_image.get(integer(item, "id", where), [])

    def ids(self) -> frozenset[str]:
        """Ids of all images the file lists, with or without masks."""
        return frozenset(self._images)

    def read(self, identifier: str, size: tuple[int, int]) -> Segments:
        """Masks of an image of this height and width, in the file's order.

        Raises:
            ImageError: the file does not list the image, or its masks have another size or need too much memory.
            InputError: a malformed annotation.
            UsageError: polygons, and pycocotools is not installed.
        """
        if identifier not in self._images:
            raise ImageError(f"{self.path}: lists no image {identifier!r}")
        found = self._images[identifier]
        masks = room_for(len(found), size, str(self.path))
        for mask, item in zip(masks, found, strict=True):
            mask[:] = decode_segmentation(item.get("segmentation"), size, item["where"])
        return from_masks(masks)


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
        raise ImageError(f"{where}: a mask of {stated[1]}x{stated[0]} pixels for an image of {size[1]}x{size[0]}")
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
            raise ImageError(f"{where}: a polygon lies far outside an image of {width}x{height} pixels")
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise UsageError(f"{where}: polygons need pycocotools; pip install 'clipseed[sam]'") from error
    filled: npt.NDArray[np.bool_] = coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))).astype(bool)
    return filled


class CocoWriter(Writer):
    """``annotations/instances_train.json``: for each class of an image one run-length mask with box and area.

    Category ids are mask values; the background, where it is annotated, has the one behind the last class, and 255 is a
    category of its own.
    """

    placements = ("reference", "copy", "link")
    ignores = ("keep", "background", "drop")
    background = None
    _path = f"annotations/instances_{SPLIT}.json"

    def image_path(self, identifier: str, suffix: str) -> str:
        """In ``images/train``."""
        return f"images/{SPLIT}/{identifier}{suffix}"

    def encode(self, item: Item) -> Encoded:
        """The image's record and its annotations."""
        height, width = item.size
        name = item.image.removeprefix(f"images/{SPLIT}/")
        image = {"id": item.number, "file_name": name, "height": height, "width": width}
        found = [
            compact({
                "id": item.number * 256 + value, "image_id": item.number,
                "category_id": category_id(value, self.table), "iscrowd": 0, "area": int(pixels.sum()),
                "bbox": box(pixels), "segmentation": {"size": [height, width], "counts": compress(pixels).decode()},
            })
            for value, _, pixels in regions(item.labels, self.table)
        ]  # fmt: skip
        return Encoded({}, {self._path: (compact(image), ",\n".join(found))})

    def texts(self) -> list[TextFile]:
        """The annotation file."""
        categories = [
            {"id": category_id(value, self.table), "name": name, "supercategory": ""}
            for value, name in self.table.annotated.items()
        ]
        head = f'{{"info":{{}},"licenses":[],"categories":{compact(categories)},\n"images":[\n'
        return [TextFile(self._path, (head, '\n],\n"annotations":[\n', "\n]}\n"))]


def category_id(value: int, table: ClassTable) -> int:
    """Category of a mask value: itself, and for the background the number behind the last class, as 0 is no id."""
    return value or len(table.names) + 1


def box(pixels: npt.NDArray[np.bool_]) -> list[int]:
    """Left, top, width and height around the pixels of a mask that is not empty."""
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
