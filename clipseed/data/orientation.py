"""EXIF orientation: how a photo is stored, how viewers turn it, and masks that lie on the one or the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL.ExifTags import Base

from clipseed.data.images import opened_image

_BACK = {6: 8, 8: 6}


@dataclass(frozen=True)
class ImageHeader:
    """What an image's file says before its pixels are decoded.

    Attributes:
        size: Height and width as stored.
        orientation: 1 as stored; 2 to 8 as EXIF numbers mirror images and turns.
    """

    size: tuple[int, int]
    orientation: int = 1

    @property
    def shown(self) -> tuple[int, int]:
        """Height and width as viewers show it."""
        return self.size[::-1] if self.orientation >= 5 else self.size


def read_header(path: Path) -> ImageHeader:
    """Size and orientation of an image file.

    Raises:
        ImageError: missing, or not an image.
    """
    with opened_image(path) as image:
        orientation = image.getexif().get(Base.Orientation, 1)
        return ImageHeader((image.height, image.width), orientation if orientation in range(1, 9) else 1)


def turned(values: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """An array ``(H, W)`` or ``(K, H, W)`` on the stored pixels, as viewers show the image."""
    if orientation == 1:
        return values
    # Transposed first, then mirrored: eight cases of three choices.
    across = np.swapaxes(values, -1, -2) if orientation >= 5 else values
    rows = orientation in (3, 4, 7, 8)
    columns = orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(across[..., :: -1 if rows else 1, :: -1 if columns else 1])


def turned_back(values: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """An array on the pixels as viewers show them, as the file stores the image."""
    return turned(values, _BACK.get(orientation, orientation))
