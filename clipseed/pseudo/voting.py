"""Mask voting: an existing label map, made by any method, snapped to masks (SEPL, arXiv 2305.05803).

Each class in turn takes the masks that are mostly its own, or that hold most of it. What a mask says replaces what the
label map said inside it; outside all masks the label map stands.

Shapes: S masks ``(S, H, W)``, label map ``(H, W)``; C labels that occur.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipseed.pseudo.pooling import Masks
from clipseed.types import IGNORE, LabelMask

MAJORITY = 0.5
SHARE = 0.85


@dataclass(frozen=True)
class VotingOptions:
    """What decides a vote.

    Attributes:
        majority: A mask goes to a class that fills at least this share of it (``paper``: more than this share).
        share: … or whose pixels it holds at least this share of, however large the mask; ``None`` switches that off,
            which saves small objects' masks from large labels and costs objects that were only labelled in part.
        keep_uncovered: Labelled pixels under no mask keep their label; without, they become background.
        paper: As SEPL's program: masks that an earlier class took no longer count as cover, so that stray pixels of
            later classes show through them, and unknown pixels (255) become background. Otherwise a pixel under any
            mask is covered, and 255 stays 255 where no class took it over.
    """

    majority: float = MAJORITY
    share: float | None = SHARE
    keep_uncovered: bool = True
    paper: bool = False


def label_counts(labels: LabelMask, masks: Masks) -> tuple[LabelMask, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Foreground labels that occur ``(C,)`` ascending, their pixels in each mask ``(C, S)``, and in all ``(C,)``."""
    total = np.bincount(labels.ravel(), minlength=IGNORE + 1)
    present = np.flatnonzero(total[1:IGNORE]) + 1
    rows = [np.bincount(labels[mask], minlength=IGNORE + 1) for mask in masks]
    counts = np.array(rows, np.int64).reshape(len(masks), IGNORE + 1)
    return present.astype(np.uint8), counts[:, present].T, total[present]


def vote(labels: LabelMask, masks: Masks, options: VotingOptions | None = None) -> LabelMask:
    """Refine a label map with masks. The order of the masks does not matter; empty masks count for nothing.

    Classes take masks in ascending order, a mask goes to the first that may have it, and where masks of several classes
    overlap the later class covers the earlier one, as in the published rule.

    Args:
        labels: ``(H, W)`` uint8: 0 background, 1 to 254 classes, 255 unknown.
        masks: ``(S, H, W)`` bool; S may be 0.
        options: Default: correct cover; SEPL's own behaviour with ``paper=True``.

    Returns:
        ``(H, W)`` uint8, with no class that ``labels`` lacks.

    Raises:
        ValueError: the masks are not of the label map's size.
    """
    options = options or VotingOptions()
    if masks.shape[1:] != labels.shape:
        raise ValueError(f"masks of size {masks.shape[1:]} for a label map of size {labels.shape}")
    masks = masks[masks.any(axis=(1, 2))]
    area = masks.sum(axis=(1, 2), dtype=np.int64)
    present, counts, totals = label_counts(labels, masks)
    wins = counts > options.majority * area if options.paper else counts >= options.majority * area
    if options.share is not None:
        wins |= counts >= options.share * totals[:, None]
    free = np.ones(len(masks), bool)
    covered = masks.any(axis=0)
    refined = np.where(labels == IGNORE, IGNORE, 0).astype(np.uint8) if not options.paper else np.zeros_like(labels)
    for label, won in zip(present, wins, strict=True):
        if options.paper:
            covered = masks[free].any(axis=0)
        taken = free & won
        refined[masks[taken].any(axis=0)] = label
        if options.keep_uncovered:
            refined[(labels == label) & ~covered] = label
        free &= ~taken
    return refined
