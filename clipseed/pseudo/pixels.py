"""Label masks pixel by pixel: the one arg-max, the maps' size and range, and labels of pixels out of scores.

Shapes: K classes of an image; maps ``(K, h, w)`` on the patch grid or at the image's size ``(H, W)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipseed.pseudo.background import Background, Scores
from clipseed.types import IGNORE, LabelMask

Classes = Sequence[int] | npt.NDArray[np.integer]


@dataclass(frozen=True)
class PixelLabels:
    """Labels of an image and how sure each is.

    Attributes:
        labels: ``(H, W)`` uint8: 0 background, class index + 1.
        confidence: ``(H, W)``, the score of the label; float32 in [0, 1] where scores are.
    """

    labels: LabelMask
    confidence: Scores

    def sure(self, least: float | None) -> LabelMask:
        """The labels with 255 where they are less sure than ``least``; ``None``: as they are."""
        if least is None:
            return self.labels
        return np.where(self.confidence < least, np.uint8(IGNORE), self.labels)


def strongest(scores: Scores) -> tuple[npt.NDArray[np.int64], Scores]:
    """Row of the largest of scores ``(K, …)``, K at least 1, and that score, ``(…)`` each; of equal ones the first."""
    row = scores.argmax(axis=0)
    return row, np.take_along_axis(scores, row[None], axis=0)[0]


def label_scores(scores: Scores, classes: Classes, background: Background, *, exact: bool = False) -> PixelLabels:
    """Each pixel's strongest class where it scores more than the background, else background.

    Args:
        scores: ``(K, H, W)``, K may be 0; with a ``given`` background ``(1 + K, H, W)``, as a CRF's posterior.
        classes: Class index of each of the K.
        background: What it scores.
        exact: Compare in double precision, so that a threshold is not rounded to the type of the scores.
    """
    values = label_values(classes)
    ground, scores = background.apart(scores)
    if not len(scores):
        ground = background.score(np.zeros(scores.shape[1:], scores.dtype)) if ground is None else ground
        return PixelLabels(np.zeros(scores.shape[1:], np.uint8), ground)
    row, score = strongest(scores)
    if ground is None:
        ground = background.score(score.astype(np.float64) if exact else score)
    shown = score > ground
    return PixelLabels(np.where(shown, values[row + 1], np.uint8(0)), np.where(shown, score, ground))


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
    import torch

    from clipseed.minmax import RELEASED_FLOOR, minmax

    kept = np.maximum(np.asarray(maps, np.float32), 0)
    found: npt.NDArray[np.float32] = minmax(torch.from_numpy(kept), RELEASED_FLOOR if paper else 0.0).numpy()
    return found


def label_values(classes: Classes) -> LabelMask:
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
    classes: Classes,
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
    maps = finite(cams)
    if background.kind == "given":
        scores = resize_maps(maps, size)
    elif resize_first:
        scores = unit_range(resize_maps(maps, size), paper=paper)
    else:
        scores = resize_maps(unit_range(maps, paper=paper), size)
    return label_scores(scores, classes, background)
