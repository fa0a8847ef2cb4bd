"""Safe decoding: any image file to 8-bit RGB, or an :class:`~clipseed.errors.ImageError` that says why not."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from clipseed.data.paths import CAMERA_SUFFIXES, never_ends
from clipseed.data.types import Sample
from clipseed.defaults import MAX_PIXELS
from clipseed.errors import ImageError
from clipseed.wording import counted

# Formats that only decode pixels; Pillow's others run interpreters (EPS, WMF) or read several files.
_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000")


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of the formats that this Pillow was built with."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@dataclass(frozen=True)
class FileReader:
    """Reads sample files.

    Attributes:
        exif: Turn the image as its EXIF orientation says. Off by default, because masks of existing data sets
            align with the pixels as stored.
        max_pixels: Larger images are refused from their header, before any memory is spent on them.
    """

    exif: bool = False
    max_pixels: int = MAX_PIXELS

    def __call__(self, sample: Sample) -> Image.Image:
        """Decode ``sample.path``; see :func:`read_image`."""
        return read_image(sample.path, exif=self.exif, max_pixels=self.max_pixels)

    def file(self, sample: Sample) -> Path:
        """``sample.path``."""
        return sample.path


def read_image(path: Path, *, exif: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one file to 8-bit RGB.

    16-bit and float images are scaled, not saturated; transparency is composited onto white; CMYK, palette, grey and
    1-bit images are converted; of an animation the first frame is taken.

    Raises:
        ImageError: missing, empty, truncated, not an image, or larger than ``max_pixels``.
    """
    with opened_image(path) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(f"{path}: {width}x{height} pixels are more than the limit of {max_pixels} (--max-pixels)")
        image.load()
        turned = ImageOps.exif_transpose(image) if exif else image
        return to_rgb(turned)


@contextlib.contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    """An image file, open, nothing decoded yet; what goes wrong inside is an :class:`ImageError` that says why.

    Raises:
        ImageError: missing, empty, truncated, or not an image.
    """
    if never_ends(path):
        raise ImageError(f"{path}: a pipe or a device, not an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning: max_pixels decides instead.
            with Image.open(path, formats=_formats()) as image:
                yield image
    except ImageError:
        raise
    except FileNotFoundError as error:
        hidden = " (hidden files are not looked at)" if path.name.startswith(".") else ""
        raise ImageError(f"{path}: no such file{hidden}") from error
    except UnidentifiedImageError as error:
        kind = "is empty" if _size(path) == 0 else "is not an image in a supported format"
        if path.suffix.lower() in CAMERA_SUFFIXES:
            kind += "; convert it to JPEG or PNG"
        raise ImageError(f"{path}: {kind}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: refused, its header promises an enormous image ({error})") from error
    except PermissionError as error:
        raise ImageError(f"{path}: may not be read") from error
    except MemoryError as error:
        raise ImageError(f"{path}: too large to decode in memory") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files.
        raise ImageError(f"{path}: damaged or truncated ({type(error).__name__}: {error})") from error


_PEEKED = 64
_ORIENTATION = 0x0112


def peculiarities(paths: Sequence[Path], *, exif: bool) -> list[str]:
    """Notes about what the first files of a folder hold that will not be seen: EXIF orientations, further frames.

    Only headers are read; what cannot be read is not told here.
    """
    turned = frames = 0
    looked = paths[:_PEEKED]
    for path in looked:
        if never_ends(path):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(path, formats=_formats()) as image:
                    turned += image.getexif().get(_ORIENTATION, 1) not in (0, 1)
                    frames += image.format != "MPO" and getattr(image, "n_frames", 1) > 1
        except Exception:  # noqa: S112 - decoders raise nearly anything; decoding says it
            continue
    notes = []
    of = counted(len(looked), "image") if len(looked) == len(paths) else f"the first {len(looked)} images"
    if turned and not exif:
        notes.append(f"{turned} of {of} carry an EXIF orientation and are taken as stored; --exif turns them")
    if frames:
        notes.append(f"{frames} of {of} have several frames or pages; the first is taken")
    return notes


AnyImage = Image.Image | str | Path | npt.NDArray[np.generic]
"""An image as people have it in Python: Pillow's, a path, or an array ``(H, W, 3)`` or ``(H, W)``."""


def one_or_many(images: AnyImage | Sequence[AnyImage]) -> tuple[list[AnyImage], bool]:
    """Images as a list, and whether it was one alone; a list or tuple is several, everything else one."""
    single = not isinstance(images, list | tuple)
    return ([images] if single else list(images)), single  # type: ignore[list-item, arg-type]


def opened(image: AnyImage) -> Image.Image:
    """Any image as 8-bit RGB; see :func:`read_image` for files and :func:`to_rgb` for what becomes of the rest.

    Raises:
        ImageError: it cannot be read, or the array is none of an image.
    """
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    array = np.asarray(image)
    if array.ndim == 2 and array.dtype == np.uint8:
        return Image.fromarray(array).convert("RGB")
    if array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8:
        return to_rgb(Image.fromarray(array))
    raise ImageError(
        f"an array {array.shape} of {array.dtype} is no image; give (H, W, 3) of uint8, the channels red, green, blue"
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB without losing range or showing hidden colours."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I;16") or image.mode in {"I", "F"}:
        return Image.fromarray(_scale_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode in {"LA", "La", "PA", "RGBA", "RGBa"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, rgba).convert("RGB")
    return image.convert("RGB")


def _scale_to_8_bits(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Grey values of unknown depth to 8 bits.

    Unsigned 16-bit is divided by 257; other data are taken as [0, 1], [0, 255] or [0, 65535] when they fit there (so
    that a dark image stays dark) and stretched from their own range otherwise. NaN becomes 0.
    """
    if values.dtype == np.uint16:
        return (values.astype(np.float32) / 257 + 0.5).astype(np.uint8)
    grey = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(grey.min()), float(grey.max())
    if low >= 0 and high <= 1 and values.dtype.kind == "f":
        top = 1.0
    elif low >= 0 and high <= 255:
        top = 255.0
    elif low >= 0 and high <= 65535:
        top = 65535.0
    else:
        grey, top = grey - low, max(high - low, 1e-12)
    return (grey * (255 / top) + 0.5).clip(0, 255).astype(np.uint8)


def patch_grid(height: int, width: int, patch: int, max_side: int = 0, min_side: int = 0) -> tuple[int, int]:
    """Patch grid ``(rows, columns)`` at which an image is analysed.

    Sides are rounded up to whole patches, as CLIP-ES does. An image whose longer side exceeds ``max_side`` is first
    shrunk to it, one whose shorter side is below ``min_side`` enlarged to it (0 switches either off; the cap wins).
    """
    scale = 1.0
    if min_side and min(height, width) < min_side:
        scale = min_side / min(height, width)
    if max_side and max(height, width) * scale > max_side:
        scale = max_side / max(height, width)
    rows, columns = (max(1, -(-round(side * scale) // patch)) for side in (height, width))
    return rows, columns


def resize_to_grid(image: Image.Image, grid: tuple[int, int], patch: int) -> npt.NDArray[np.uint8]:
    """Stretch an image to whole patches: ``(rows * patch, columns * patch, 3)`` uint8.

    Pillow's bicubic filter on 8 bits, as in CLIP-ES: its rounding is part of the published numbers.
    """
    size = (grid[1] * patch, grid[0] * patch)
    resized = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(resized)
