"""Masks of an image's classes, asked for by prompts from their maps: one encoding and few prompts per image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from clipseed.defaults import SamPrompt
from clipseed.pseudo.background import Scores
from clipseed.pseudo.cam_prompts import box_prompts, point_prompts
from clipseed.sam.backend import Embedding, SamBackend
from clipseed.sam.candidates import stability_score
from clipseed.sam.cleanup import remove_small_regions
from clipseed.sam.options import LEVELS, ProposalOptions
from clipseed.segments import Segments, from_masks

_BATCH = 16
"""Answers enlarged at once; images have a few classes."""


def prompted_masks(
    backend: SamBackend, embedding: Embedding, cams: Scores, prompting: SamPrompt, options: ProposalOptions
) -> tuple[Segments, npt.NDArray[np.int64]]:
    """One mask for each prompt.

    ``points``: a query per class, its map's peaks as joint points, and of SAM's three masks the whole (S2C, CVPR 2024).
    ``boxes``: a query per region of each class's map, and the mask with the best predicted IoU, because a box says how
    large its object is. Masks without a pixel are left out.

    Args:
        backend: The model.
        embedding: The encoded image.
        cams: ``(K, h, w)`` maps of the image's classes.
        prompting: Kind of prompt.
        options: Of these ``stability_offset`` and ``min_region_area``.

    Returns:
        Masks at the embedding's size, and the row of the maps that each was asked for, ``(S,)``.
    """
    points = point_labels = boxes = None
    if prompting == "points":
        asked = point_prompts(cams, embedding.size)
        row, points, point_labels = asked.row, asked.points, asked.labels
    else:
        wanted = box_prompts(cams, embedding.size)
        row, boxes = wanted.row, wanted.boxes
    masks = np.zeros((len(row), *embedding.size), bool)
    level, iou, stability = np.zeros(len(row), np.int8), np.zeros(len(row), np.float32), np.zeros(len(row), np.float32)
    for start in range(0, len(row), _BATCH):
        some = slice(start, start + _BATCH)
        decoded = backend.decode_prompts(
            embedding,
            boxes=None if boxes is None else boxes[some],
            points=None if points is None else points[some],
            point_labels=None if point_labels is None else point_labels[some],
        )
        many = decoded.iou.shape[1]
        each = torch.arange(len(decoded.iou), device=decoded.iou.device)
        best = torch.full_like(each, many - 1) if boxes is None else decoded.iou.argmax(dim=1)
        full = backend.upsample(embedding, decoded.drawn(each * many + best))
        masks[some] = (full > backend.mask_threshold).cpu().numpy()
        stability[some] = stability_score(full, backend.mask_threshold, options.stability_offset).cpu().numpy()
        iou[some] = decoded.iou[each, best].cpu().numpy()
        level[some] = (best + LEVELS - many).cpu().numpy()  # a model with one mask per prompt gives wholes
    if options.min_region_area > 0:
        for mask in masks:
            mask[:] = remove_small_regions(mask, options.min_region_area)[0]
    kept = np.flatnonzero(masks.any(axis=(1, 2)))
    found = replace(from_masks(masks[kept]), level=level[kept], iou=iou[kept], stability=stability[kept])
    if points is not None and len(kept):
        found = replace(found, point=points[kept, 0])
    return found, row[kept]
