"""Label Studio's run-length code of brush masks.

A stream of bits, the highest first: the number of bytes (32 bits), bits per value less 1 (5), and four sizes less 1 (4
bits each); then blocks of a bit that says whether one value is repeated, two bits that choose one of the sizes, the
block's length less 1 in so many bits, and the value, or as many values as the block is long. The bytes are an image's
red, green, blue and alpha, pixel by pixel, row by row; the alpha is the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clipseed.errors import InputError
from clipseed.formats.rle import Mask, runs_of

_SIZES = np.array([3, 4, 8, 16])
_VALUE_BITS = 8
_OPAQUE = 127
"""Alpha above this is inside: brushes have soft edges."""


def brush_code(mask: Mask) -> bytes:
    """The code of a mask ``(H, W)``: inside all four channels are 255, outside 0."""
    runs = runs_of(mask.T) * 4
    values = (np.arange(len(runs)) % 2) * 255
    pieces = -(-runs // 65536)  # what one block can hold
    lengths = np.full(int(pieces.sum()), 65536)
    ends = np.cumsum(pieces)[pieces > 0] - 1
    lengths[ends] = (runs - (pieces - 1) * 65536)[pieces > 0]
    values = np.repeat(values, pieces)
    which = np.searchsorted(1 << _SIZES, lengths)
    size = _SIZES[which]
    blocks = ((((4 | which) << size) | (lengths - 1)) << _VALUE_BITS) | values
    head = [(mask.size * 4, 32), (_VALUE_BITS - 1, 5), *((int(bits) - 1, 4) for bits in _SIZES)]
    codes = np.concatenate([[code for code, _ in head], blocks]).astype(np.int64)
    widths = np.concatenate([[bits for _, bits in head], 3 + size + _VALUE_BITS]).astype(np.int64)
    position = np.arange(int(widths.sum())) - np.repeat(np.cumsum(widths) - widths, widths)
    bits = (np.repeat(codes, widths) >> (np.repeat(widths, widths) - 1 - position)) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def brush_mask(code: Sequence[Any], size: tuple[int, int], where: str) -> Mask:
    """Mask ``(H, W)`` from the numbers that Label Studio stores.

    Raises:
        InputError: not such a code, or of an image of another size.
    """
    if not all(type(number) is int and 0 <= number < 256 for number in code):
        raise InputError(f"{where}: 'rle' must be bytes")
    bits = np.unpackbits(np.array(code, np.uint8))
    text = bits.tobytes().translate(bytes.maketrans(b"\0\1", b"01"))
    count, at = _number(text, 0, 32, where), 32
    if count != size[0] * size[1] * 4:
        raise InputError(f"{where}: a mask of {count // 4} pixels for an image of {size[1]}x{size[0]}")
    if _number(text, at, 5, where) != _VALUE_BITS - 1:
        raise InputError(f"{where}: 'rle' has values of other than 8 bits")
    sizes = [_number(text, at + 5 + 4 * k, 4, where) + 1 for k in range(4)]
    at += 21
    values = np.empty(count, np.uint8)
    done = 0
    while done < count:
        repeated, chosen = text[at : at + 1] == b"1", sizes[_number(text, at + 1, 2, where)]
        length = _number(text, at + 3, chosen, where) + 1
        at += 3 + chosen
        many = 1 if repeated else length
        stored = bits[at : at + many * _VALUE_BITS]
        if done + length > count or len(stored) < many * _VALUE_BITS:
            raise InputError(f"{where}: 'rle' does not fill the image, or is cut off")
        values[done : done + length] = np.packbits(stored)
        at, done = at + many * _VALUE_BITS, done + length
    inside: npt.NDArray[np.bool_] = values[3::4].reshape(size) > _OPAQUE
    return inside


def _number(text: bytes, start: int, bits: int, where: str) -> int:
    found = text[start : start + bits]
    if len(found) < bits:
        raise InputError(f"{where}: 'rle' is cut off")
    return int(found, 2)
