"""Label masks as 8-bit PNG: written with the VOC palette, read from whatever people have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from clipseed.data.paths import never_ends
from clipseed.data.stamps import UNKNOWN, FileStamp
from clipseed.errors import InputError
from clipseed.formats.palette import voc_palette
from clipseed.formats.png import index_image
from clipseed.store.files import replacing
from clipseed.types import LabelMask

_CLASSES, _EMPTY, _IMAGE = "clipseed-classes", "clipseed-empty", "clipseed-image"
_FORMATS = ("PNG", "BMP", "GIF", "TIFF")
_ROWS = 1 << 22
"""Pixels whose colours are looked up at once."""


@dataclass(frozen=True)
class LabelMaskNote:
    """What a mask of ours says about itself, in text chunks of the PNG.

    Attributes:
        classes: Class indices that it was made for; ``None`` where it does not say (not ours).
        empty: Those of them that got no pixel.
        image: Digest of the image's file; unknown where it does not say.
    """

    classes: tuple[int, ...] | None = None
    empty: tuple[int, ...] = ()
    image: FileStamp = UNKNOWN


NO_NOTE = LabelMaskNote()


def write_label_mask(path: Path, labels: LabelMask, note: LabelMaskNote = NO_NOTE) -> None:
    """Write labels ``(H, W)`` as a palette PNG (mode ``P``, VOC colours), atomically.

    :func:`label_mask_note` reads its note.

    Raises:
        StoreError: it cannot be written.
    """
    chunks = PngInfo()
    if note.classes is not None:
        chunks.add_text(_CLASSES, " ".join(map(str, note.classes)))
    if note.image.known:
        chunks.add_text(_IMAGE, note.image.sha256.hex())
    if note.empty:
        chunks.add_text(_EMPTY, " ".join(map(str, note.empty)))
    with replacing(path) as temporary:
        index_image(labels).save(temporary, format="PNG", pnginfo=chunks)


def label_mask_note(path: Path) -> LabelMaskNote:
    """What a mask says about itself, read from its header; nothing where it is not ours."""
    try:
        with _opened(path) as image:
            classes, empty, digest = (image.info.get(name) for name in (_CLASSES, _EMPTY, _IMAGE))
        return LabelMaskNote(
            None if classes is None else _numbers(classes),
            _numbers(empty or ""),
            UNKNOWN if digest is None else FileStamp(sha256=bytes.fromhex(str(digest))),
        )
    except Exception:  # decoders raise nearly anything on damaged files
        return NO_NOTE


def _numbers(text: object) -> tuple[int, ...]:
    return tuple(int(word) for word in str(text).split())


def _opened(path: Path) -> Image.Image:
    """Open a mask, whatever its name: images without loss only, as Pillow's other formats may run interpreters."""
    if never_ends(path):
        raise InputError(f"{path}: a pipe or a device, not a mask")
    return Image.open(path, formats=_FORMATS)


def read_label_mask(path: Path) -> LabelMask:
    """Read labels ``(H, W)``: palette indices, grey values, or RGB in VOC colours.

    Pillow only: OpenCV would turn palette indices into colours.

    Raises:
        InputError: missing, damaged, values beyond 255, or colours that are not VOC's.
    """
    try:
        with _opened(path) as image:
            image.load()
            if image.mode in {"P", "L"}:
                return np.array(image)
            if image.mode == "1":
                return np.asarray(image).astype(np.uint8)
            if image.mode.startswith("I"):
                return _narrow(np.asarray(image), path)
            if image.mode in {"RGB", "RGBA"}:
                return _from_colours(np.asarray(image.convert("RGB")), path)
            mode = image.mode
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such mask") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: refused, its header promises an enormous mask ({error})") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not an image") from error
    except InputError:
        raise
    except Exception as error:  # as above
        raise InputError(f"{path}: damaged mask ({type(error).__name__}: {error})") from error
    raise InputError(f"{path}: masks are palette or grey PNG, not mode {mode}")


def _narrow(values: npt.NDArray[np.generic], path: Path) -> LabelMask:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 255:
        raise InputError(f"{path}: label {low if low < 0 else high} does not fit into 8 bits")
    return values.astype(np.uint8)


@lru_cache(maxsize=1)
def _colour_table() -> npt.NDArray[np.int32]:
    palette = voc_palette().astype(np.int64)
    table: npt.NDArray[np.int32] = np.full(1 << 24, -1, np.int32)
    table[(palette[:, 0] << 16) | (palette[:, 1] << 8) | palette[:, 2]] = np.arange(256)
    return table


def _from_colours(pixels: npt.NDArray[np.uint8], path: Path) -> LabelMask:
    found = np.empty(pixels.shape[:2], np.uint8)
    rows = max(1, _ROWS // max(1, pixels.shape[1]))
    for first in range(0, len(pixels), rows):
        wide = pixels[first : first + rows].astype(np.int32)
        labels = _colour_table()[(wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]]
        if labels.min() < 0:
            row, column = (int(k[0]) for k in np.nonzero(labels < 0))
            colour = tuple(int(value) for value in wide[row, column])
            raise InputError(
                f"{path}: colour {colour} at row {first + row}, column {column} is not in the VOC colour map; "
                "masks must be palette or grey PNG with label values"
            )
        found[first : first + rows] = labels
    return found
