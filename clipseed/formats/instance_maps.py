"""Maps of instances, superpixels or any partition: one PNG per image, a segment per value."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from clipseed.data.listing import ids_below
from clipseed.data.types import check_id
from clipseed.errors import InputError
from clipseed.formats.png import read_values, split_regions
from clipseed.segments import Segments
from clipseed.types import IGNORE


class InstanceMaps:
    """A folder of maps ``<id>.png``, 8 or 16 bits, grey or palette: instances, superpixels, any partition.

    Every value is a mask, 0 too: a map does not say whether 0 is background or a superpixel, and a mask on background
    does no harm. Only 255 in 8-bit maps is left out, VOC's boundary; superpixels of more than 255 regions need 16 bits.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ids(self) -> frozenset[str]:
        """Ids of all PNG files below the folder."""
        return ids_below(self.folder, ".png")

    def read(self, identifier: str, size: tuple[int, int]) -> Segments:
        """Masks of an image of this height and width, by ascending value.

        Raises:
            ImageError: no file, another size, or too many masks for the memory.
            InputError: damaged, or in colours.
        """
        path = self.folder / f"{check_id(identifier, str(self.folder))}.png"
        values = read_values(path, size)
        if values.ndim != 2:
            raise InputError(f"{path}: instance maps are palette or grey PNG; colours that are ids are coco-panoptic")
        return split_regions(values, IGNORE if values.dtype == np.uint8 else None, str(path))
