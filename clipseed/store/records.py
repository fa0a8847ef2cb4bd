"""What one picture's seeds are in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clipseed.store.layout import Arrays


@dataclass(frozen=True)
class SeedMap:
    """Class activation maps of one picture.

    Attributes:
        id: Sample id.
        classes: ``(K,)`` class indices, in label order; mask value = index + 1.
        cam: ``(K, h, w)`` float32 in [0, 1] on the patch grid.
        size: ``(H, W)`` of the picture in pixels.
    """

    id: str
    classes: npt.NDArray[np.int32]
    cam: npt.NDArray[np.float32]
    size: tuple[int, int]

    def upsampled(self) -> npt.NDArray[np.float32]:
        """Maps at the picture's size: ``(K, H, W)`` float32, bilinear with half-pixel centres (as CLIP-ES's code)."""
        import cv2

        height, width = self.size
        out = np.empty((len(self.classes), height, width), np.float32)
        for index, cam in enumerate(self.cam):
            out[index] = cv2.resize(cam, (width, height), interpolation=cv2.INTER_LINEAR)
        return out


def pack(records: Iterable[SeedMap], cam_dtype: str) -> Arrays:
    """Flatten records into the arrays of one file (offsets start at 0)."""
    items = list(records)
    counts = np.array([len(item.classes) for item in items], np.int64)
    lengths = np.array([item.cam.size for item in items], np.int64)
    ids = [item.id.encode("utf-8", "surrogateescape") for item in items]
    return {
        "id": np.array(ids, dtype=f"S{max([1, *map(len, ids)])}"),
        "size": np.array([item.size for item in items], np.int32).reshape(-1, 2),
        "grid": np.array([item.cam.shape[1:] for item in items], np.int32).reshape(-1, 2),
        "class_offset": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "class_id": _joined([item.classes for item in items], "i4"),
        "cam_offset": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "cam": _joined([item.cam.ravel() for item in items], cam_dtype),
    }


def _joined(parts: list[npt.NDArray[Any]], dtype: str) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)
