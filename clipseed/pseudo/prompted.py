"""Labels from SAM's answers to prompts for classes (S2C, CVPR 2024)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipseed.pseudo.background import Scores
from clipseed.pseudo.pixels import Classes, finite, label_values, resize_maps
from clipseed.types import LabelMask


def label_from_prompted_masks(
    logits: Scores,
    row: npt.NDArray[np.integer],
    cams: Scores,
    classes: Classes,
    *,
    paper: bool = False,
) -> LabelMask:
    """Labels from SAM's answers (S2C): score = mask logit times the mean of the class's map inside; the largest wins.

    Of several answers for one class each pixel takes the highest score. Where no score is positive there is background.

    Args:
        logits: ``(Q, H, W)`` mask logits at the image's size (above 0 is inside); Q may be 0.
        row: ``(Q,)`` row of the maps that each answer belongs to.
        cams: ``(K, h, w)``; resized, negative values cut off.
        classes: Class index of each of the K maps.
        paper: A score of exactly 0 is no background. An answer with an empty mask then makes everything that nobody
            else claims its own, for it scores 0 everywhere; by default it is left out.

    Returns:
        ``(H, W)`` uint8: 0 background, class index + 1.

    Raises:
        ValueError: answers and rows differ in number, or a row is not among the maps.
    """
    values = label_values(classes)
    if len(row) != len(logits) or len(cams) != len(classes):
        raise ValueError(f"{len(logits)} answers with {len(row)} rows, {len(cams)} maps for {len(classes)} classes")
    if len(row) and not (int(np.min(row)) >= 0 and int(np.max(row)) < len(cams)):
        raise ValueError(f"rows must be 0 to {len(cams) - 1}, not {np.asarray(row).tolist()}")
    size = (logits.shape[1], logits.shape[2])
    wide = np.maximum(resize_maps(finite(cams), size), 0)
    best = np.zeros(size, np.float32)
    labels = np.zeros(size, np.uint8)
    claimed = np.zeros(size, bool)
    for query in np.argsort(np.asarray(row), kind="stable"):  # equal scores: the first class keeps the pixel
        answer = np.asarray(logits[query], np.float32)
        inside = answer > 0
        weight = float(wide[row[query]][inside].mean(dtype=np.float64)) if inside.any() else 0.0
        score = answer * np.float32(weight)
        wins = (score >= 0) & (~claimed | (score > best)) if paper else score > best
        labels[wins], best[wins] = values[int(row[query]) + 1], score[wins]
        claimed |= wins
    return labels
