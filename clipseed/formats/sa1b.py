"""SA-1B: one JSON file per image, with SAM's scores, points and crop boxes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from clipseed.data.json_fields import numbers, records
from clipseed.data.labels import read_json
from clipseed.data.listing import ids_below
from clipseed.data.types import check_id
from clipseed.errors import ImageError
from clipseed.formats.coco import decode_segmentation
from clipseed.segments import Segments, from_masks, room_for


class Sa1b:
    """A folder of SA-1B files, one ``<id>.json`` per image, with SAM's scores, points and crop boxes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ids(self) -> frozenset[str]:
        """Ids of all JSON files below the folder."""
        return ids_below(self.folder, ".json")

    def read(self, identifier: str, size: tuple[int, int]) -> Segments:
        """Masks of an image of this height and width; missing scores are 1, the level is whole.

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
