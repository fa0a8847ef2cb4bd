"""COCO's panoptic format: colour PNGs whose colours are segment ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from clipseed.data.json_fields import integer, records
from clipseed.data.labels import read_json
from clipseed.data.listing import clean_id, ids_below
from clipseed.errors import ImageError, InputError
from clipseed.formats.coco import box, category_id
from clipseed.formats.palette import voc_palette
from clipseed.formats.png import read_values, split_regions, wide_png
from clipseed.formats.writing import SPLIT, Encoded, Item, TextFile, Writer, compact, regions
from clipseed.segments import Segments
from clipseed.types import IGNORE


class CocoPanoptic:
    """COCO's panoptic format: colour PNGs in which a segment's id is R + 256 G + 65536 B; 0 belongs to no segment.

    The source is the JSON file, whose PNGs lie in the folder of the same name beside it, or such a folder itself.
    """

    def __init__(self, source: Path) -> None:
        """List the images.

        Raises:
            InputError: a malformed JSON file, or no PNG folder beside it.
        """
        if source.is_dir():
            self._files = {identifier: source / f"{identifier}.png" for identifier in ids_below(source, ".png")}
            return
        data = read_json(source, "a COCO panoptic file")
        folder = source.with_suffix("")
        if not folder.is_dir():
            raise InputError(f"{source}: its PNG files should be in {folder}, which is no folder")
        names = {}
        for number, item in enumerate(records(data, "images", source)):
            names[integer(item, "id", f"{source}: images[{number}]")] = item.get("file_name")
        self._files = {}
        for number, item in enumerate(records(data, "annotations", source)):
            where = f"{source}: annotations[{number}]"
            png = item.get("file_name")
            image = names.get(integer(item, "image_id", where))
            if not isinstance(png, str) or not isinstance(image, str):
                raise InputError(f"{where}: 'file_name', or that of its image, is missing")
            self._files[clean_id(image, where)] = folder / f"{clean_id(png, where)}.png"

    def ids(self) -> frozenset[str]:
        """Ids of all images that have a PNG."""
        return frozenset(self._files)

    def read(self, identifier: str, size: tuple[int, int]) -> Segments:
        """Segments of an image of this height and width, by ascending id.

        Raises:
            ImageError: no such image, another size, or too many segments for the memory.
            InputError: damaged, or not in colours.
        """
        path = self._files.get(identifier)
        if path is None:
            raise ImageError(f"no panoptic PNG for the image {identifier!r}")
        colours = read_values(path, size)
        if colours.ndim != 3:
            raise InputError(f"{path}: panoptic maps are RGB; this one has palette indices or grey values")
        wide = colours.astype(np.int32)
        return split_regions(wide[..., 0] + 256 * wide[..., 1] + 65536 * wide[..., 2], 0, str(path))


class PanopticWriter(Writer):
    """``annotations/panoptic_train.json`` and its PNGs; each class of an image is one segment, "stuff".

    Void (0) is what readers ignore, so 255 becomes void; the background is a category.
    """

    placements = ("reference", "copy", "link")
    _folder = f"annotations/panoptic_{SPLIT}"

    def image_path(self, identifier: str, suffix: str) -> str:
        """In ``images/train``."""
        return f"images/{SPLIT}/{identifier}{suffix}"

    def encode(self, item: Item) -> Encoded:
        """The PNG, the image's record and its segments."""
        height, width = item.size
        ids = np.zeros(256, np.int32)
        ids[list(self._segments)] = [category_id(value, self.table) for value in self._segments]
        segments = [
            {"id": int(ids[value]), "category_id": int(ids[value]), "area": int(pixels.sum()), "bbox": box(pixels),
             "iscrowd": 0}
            for value, _, pixels in regions(item.labels, self.table) if value in self._segments
        ]  # fmt: skip
        name = item.image.removeprefix(f"images/{SPLIT}/")
        image = {"id": item.number, "file_name": name, "height": height, "width": width}
        annotation = {"image_id": item.number, "file_name": f"{item.id}.png", "segments_info": segments}
        return Encoded(
            {f"{self._folder}/{item.id}.png": wide_png(ids[item.labels])},
            {f"{self._folder}.json": (compact(image), compact(annotation))},
        )

    @property
    def _segments(self) -> dict[int, str]:
        return {value: name for value, name in self.table.annotated.items() if value != IGNORE}

    def texts(self) -> list[TextFile]:
        """The JSON file."""
        palette = voc_palette()
        categories = [
            {"id": category_id(value, self.table), "name": name, "supercategory": "", "isthing": 0,
             "color": palette[value].tolist()}
            for value, name in self._segments.items()
        ]  # fmt: skip
        head = f'{{"info":{{}},"licenses":[],"categories":{compact(categories)},\n"images":[\n'
        return [TextFile(f"{self._folder}.json", (head, '\n],\n"annotations":[\n', "\n]}\n"))]
