"""PNG files whose values are labels or segments: reading and writing values, and cutting a map into segments."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from clipseed.errors import ImageError, InputError
from clipseed.formats.palette import Colors, voc_palette
from clipseed.segments import Segments, from_masks, room_for
from clipseed.types import LabelMask


def read_values(path: Path, size: tuple[int, int] | None = None) -> npt.NDArray[np.generic]:
    """Stored values of a PNG: palette indices or grey ``(H, W)``, colours ``(H, W, 3)``; transparency is dropped.

    Args:
        path: The file.
        size: Height and width it must have. Looked at before anything is decoded.

    Raises:
        ImageError: missing, or of another size.
        InputError: not an image, or damaged.
    """
    with _opened(path) as image:
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


def read_colors(path: Path) -> npt.NDArray[np.uint8]:
    """Colors ``(H, W, 3)`` of a PNG; palettes are looked up, grey becomes three equal channels.

    Raises:
        ImageError: missing.
        InputError: not an image, or damaged.
    """
    with _opened(path) as image:
        return np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A PNG, open; what goes wrong inside is told with its name."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            yield image
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


def index_image(labels: LabelMask) -> Image.Image:
    """Labels ``(H, W)`` as an image whose palette has all 256 VOC colors.

    A shorter palette would let Pillow store 1, 2 or 4 bits per pixel, which torchvision's decoder does not unpack.
    """
    image = Image.fromarray(np.ascontiguousarray(labels), mode="P")
    image.putpalette(voc_palette().tobytes())
    return image


def index_png(labels: LabelMask) -> bytes:
    """Labels ``(H, W)`` as a PNG whose pixels are the values themselves, 8 bits each, shown in VOC colors."""
    return _png(index_image(labels))


def color_png(labels: LabelMask, colors: Colors) -> bytes:
    """Labels ``(H, W)`` as an RGB PNG, each value in its color."""
    return _png(Image.fromarray(colors[labels]))


def wide_png(values: npt.NDArray[np.integer[Any]]) -> bytes:
    """Values ``(H, W)`` below 2 to the 24 as an RGB PNG: R + 256 G + 65536 B, as COCO's panoptic maps have them."""
    wide = values.astype(np.int64)
    return _png(Image.fromarray(np.stack([wide & 255, wide >> 8 & 255, wide >> 16], axis=-1).astype(np.uint8)))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
