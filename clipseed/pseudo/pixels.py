"""Label masks pixel by pixel, without segments: the baseline of FMA-WSSS, and what fills places that no mask covers.

Shapes: K classes of an image; maps ``(K, h, w)`` on the patch grid or at the image's size ``(H, W)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from clipseed.types import IGNORE, LabelMask

Scores = npt.NDArray[np.floating]

RELEASED_FLOOR = 1e-7
"""What the released code adds to the range it divides by; it decides where maps are tiny."""


@dataclass(frozen=True)
class Background:
    """What the background scores, next to class scores in [0, 1].

    Attributes:
        kind: ``power``: ``(1 - strongest class) ^ value``; ``threshold``: ``value`` everywhere; ``given``: the maps'
            first row, raised to ``value``, for maps that come with a background of their own.
        value: See there. Of a power, the larger, the more foreground.
    """

    kind: Literal["power", "threshold", "given"] = "power"
    value: float = 1.0

    def add_to(self, scores: Scores) -> Scores:
        """Class scores ``(K, …)`` (``given``: with background ``(1 + K, …)``) to ``(1 + K, …)``, background first."""
        if self.kind == "given":
            return np.concatenate([scores[:1] ** self.value, scores[1:]])
        if self.kind == "threshold":
            return np.concatenate([np.full_like(scores, self.value, shape=(1, *scores.shape[1:])), scores])
        strongest = np.clip(scores.max(axis=0, keepdims=True, initial=0), 0, 1)
        return np.concatenate([(1 - strongest) ** self.value, scores])


@dataclass(frozen=True)
class PixelLabels:
    """Labels of an image and how sure each is.

    Attributes:
        labels: ``(H, W)`` uint8: 0 background, class index + 1.
        confidence: ``(H, W)`` float32 in [0, 1], the score of the label.
    """

    labels: LabelMask
    confidence: npt.NDArray[np.float32]


def resize_maps(maps: Scores, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Maps ``(K, h, w)`` at another size ``(H, W)``, bilinear with half-pixel centres; float32."""
    import torch
    import torch.nn.functional as F

    narrow = np.ascontiguousarray(maps, np.float32)
    if narrow.shape[1:] == size or not len(narrow):
        return narrow.reshape(len(narrow), *size)
    wide = F.interpolate(torch.from_numpy(narrow)[None], size=size, mode="bilinear", align_corners=False)
    found: npt.NDArray[np.float32] = wide[0].numpy()
    return found


def finite(maps: Scores) -> npt.NDArray[np.float32]:
    """The maps with 0, no evidence, in place of NaN and infinities."""
    return np.nan_to_num(np.asarray(maps, np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def unit_range(maps: Scores, *, paper: bool = False) -> npt.NDArray[np.float32]:
    """Negative values cut off, then each map stretched to [0, 1] over its pixels; constant maps become 0.

    ``paper`` adds 1e-7 to the divisor, as the released code does: maps of the size of 1e-7 then stay small.
    """
    kept = np.maximum(np.asarray(maps, np.float32), 0)
    low = kept.min(axis=(1, 2), keepdims=True)
    span = kept.max(axis=(1, 2), keepdims=True) - low
    divisor = span + np.float32(RELEASED_FLOOR) if paper else np.where(span > 0, span, 1)
    found: npt.NDArray[np.float32] = (kept - low) / divisor
    return found


def label_values(classes: Sequence[int] | npt.NDArray[np.integer]) -> LabelMask:
    """Label of background and of each class: ``(1 + K,)``, 0 and then class index + 1.

    Raises:
        ValueError: an index that does not fit (labels are 1 to 254; 255 is ignore).
    """
    wide = np.asarray(classes, np.int64).reshape(-1)
    if wide.size and not (wide.min() >= 0 and wide.max() < IGNORE - 1):
        raise ValueError(f"class indices must be 0 to {IGNORE - 2}, not {wide.tolist()}")
    return np.concatenate([[0], wide + 1]).astype(np.uint8)


def label_pixels(
    cams: Scores,
    classes: Sequence[int] | npt.NDArray[np.integer],
    size: tuple[int, int],
    background: Background | None = None,
    *,
    resize_first: bool = True,
    paper: bool = False,
) -> PixelLabels:
    """Every pixel's strongest class, or background.

    Args:
        cams: ``(K, h, w)``; with a ``given`` background ``(1 + K, h, w)``, which is then not stretched to [0, 1].
        classes: Class index of each of the K maps.
        size: The image's height and width.
        background: Default ``(1 - strongest class) ^ 2``.
        resize_first: Resize, then stretch to [0, 1]; the other way round, peaks between patches are below 1.
        paper: As the released code, see :func:`unit_range`.
    """
    background = background or Background("power", 2.0)
    values = label_values(classes)
    maps = finite(cams)
    if background.kind == "given":
        scores = resize_maps(maps, size)
    elif resize_first:
        scores = unit_range(resize_maps(maps, size), paper=paper)
    else:
        scores = resize_maps(unit_range(maps, paper=paper), size)
    full = background.add_to(scores)
    best = full.argmax(axis=0)
    confidence = np.take_along_axis(full, best[None], axis=0)[0].astype(np.float32)
    return PixelLabels(values[best], confidence)
