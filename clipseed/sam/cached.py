"""Proposals and how they are stored: compressed, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from clipseed.errors import ImageError
from clipseed.formats.rle import compress
from clipseed.segments import Proposals, room_for
from clipseed.store.mask_cache import MaskCache
from clipseed.store.mask_records import NO_CLASS, MaskRecord

T = TypeVar("T", bound=np.generic)


def pack_proposals(
    identifier: str, size: tuple[int, int], proposals: Proposals, classes: Sequence[int] | None = None
) -> MaskRecord:
    """Masks of a picture as they are stored.

    Args:
        identifier: Sample id.
        size: The picture's height and width; the masks may be smaller.
        proposals: Its masks.
        classes: Class index that each mask was asked for.
    """
    codes = [compress(mask) for mask in proposals.masks]
    return MaskRecord(
        id=identifier,
        size=size,
        grid=proposals.size,
        rle_length=np.array([len(code) for code in codes], np.int32),
        rle=np.frombuffer(b"".join(codes), np.uint8),
        level=proposals.level,
        iou=proposals.iou,
        stability=proposals.stability,
        box=proposals.box,
        point=np.where(np.isnan(proposals.point), np.float32(-1), proposals.point),  # NaN is not equal to itself
        crop_box=proposals.crop_box,
        class_id=np.full(len(codes), NO_CLASS, np.int32) if classes is None else np.array(classes, np.int32),
    )


def unpack_proposals(record: MaskRecord) -> Proposals:
    """Masks of a stored record.

    Raises:
        ImageError: there are more than fit into memory.
        StoreError: a code is damaged.
    """
    room_for(len(record), record.grid, record.id)
    return Proposals(
        masks=record.masks(),
        level=record.level,
        iou=record.iou,
        stability=record.stability,
        box=record.box,
        point=np.where(record.point < 0, np.float32(np.nan), record.point),
        crop_box=record.crop_box,
    )


class CachedMasks:
    """A mask cache as a :class:`~clipseed.formats.open.MaskImport`. Its masks may be smaller than their picture."""

    def __init__(self, path: Path, *, verify: bool | None = None) -> None:
        self.cache = MaskCache(path, verify=verify)

    def ids(self) -> frozenset[str]:
        """Ids of all pictures that were looked at, with or without masks."""
        return frozenset(self.cache)

    def record(self, identifier: str, size: tuple[int, int]) -> MaskRecord:
        """What is stored of a picture of this height and width.

        Raises:
            ImageError: nothing, or the picture had another size.
        """
        if identifier not in self.cache:
            raise ImageError(f"{self.cache.path}: holds no picture {identifier!r}")
        found = self.cache[identifier]
        if found.size != size:
            raise ImageError(
                f"{self.cache.path}: its masks were made for a picture of {found.size[1]}x{found.size[0]} pixels, not "
                f"{size[1]}x{size[0]}"
            )
        return found

    def read(self, identifier: str, size: tuple[int, int]) -> Proposals:
        """Masks of a picture of this height and width, as they are stored.

        Raises:
            ImageError: none, or for another size, or too many for the memory.
            StoreError: damaged.
        """
        return unpack_proposals(self.record(identifier, size))


def enlarged(values: npt.NDArray[T], size: tuple[int, int]) -> npt.NDArray[T]:
    """Labels or masks ``(…, h, w)`` at another size ``(…, H, W)``: each pixel takes the value of the nearest one."""
    if values.shape[-2:] == size:
        return values
    rows, columns = (  # whole numbers, because pixels between two others must not depend on rounding
        (2 * np.arange(long) + 1) * short // (2 * long) for long, short in zip(size, values.shape[-2:], strict=True)
    )
    return values[..., rows[:, None], columns]
