"""PNG files whose values are segments: reading stored values, and cutting a map into segments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from clipseed.errors import ImageError, InputError
from clipseed.segments import Segments, from_masks, room_for


def read_values(path: Path, size: tuple[int, int] | None = None) -> npt.NDArray[np.generic]:
    """Stored values of a PNG: palette indices or grey ``(H, W)``, colours ``(H, W, 3)``; transparency is dropped.

    Args:
        path: The file.
        size: Height and width it must have. Looked at before anything is decoded.

    Raises:
        ImageError: missing, or of another size.
        InputError: not an image, or damaged.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if size is not None and image.size != (size[1], size[0]):
                raise ImageError(
                    f"{path}: masks of {image.size[0]}x{image.size[1]} pixels for an image of {size[1]}x{size[0]}"
                )
            image.load()
            if image.mode in {"RGB", "RGBA"}:
                return np.asarray(image.convert("RGB"))
            if image.mode == "LA":
                return np.asarray(image)[..., 0]
            return np.asarray(image)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such mask file") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not a PNG") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files.
        raise InputError(f"{path}: damaged mask ({type(error).__name__}: {error})") from error


def split_regions(values: npt.NDArray[np.generic], left_out: int | None, where: str) -> Segments:
    """A mask for each value of a map ``(H, W)``, ascending, but for the one that is left out.

    Raises:
        ImageError: there are more than fit into memory.
    """
    kinds, region = np.unique(values, return_inverse=True)
    region = region.reshape(values.shape)
    kept = [index for index, kind in enumerate(kinds) if left_out is None or int(kind) != left_out]
    masks = room_for(len(kept), (values.shape[0], values.shape[1]), where)
    for mask, index in zip(masks, kept, strict=True):
        np.equal(region, index, out=mask)
    return from_masks(masks)
