"""Pseudo-labels of a batch: CAMs spread along a map, brought to the pixels, and refined along colours (section 3.3).

Shapes: B images, n = h * w patches, K_b classes of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.cam.gradcam import index_on
from clipseed.defaults import PAR_ITERATIONS
from clipseed.refine.affinity import balance
from clipseed.refine.caa import CaaOptions, spread_within_boxes
from clipseed.refine.par import refine_par


def spread_cams(cams: Sequence[Tensor], spreading: Tensor, options: CaaOptions) -> list[Tensor]:
    """CAMs ``(K_b, h, w)`` of each image, spread along its map.

    Args:
        cams: In [0, 1].
        spreading: ``(B, n, n)`` of :mod:`clipseed.train.weclip.refining`; balanced here.
        options: CAA's, whose arithmetic this is: box threshold, Sinkhorn rounds, power.

    Returns:
        One ``(K_b, h, w)`` for each image, on the map's device, min-max normalised.
    """
    spread = spread_within_boxes(cams, balance(spreading, options.rounds), options)
    return [maps.to(spreading.device) for maps in spread]


def score_maps(cams: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores ``(1 + K, H, W)`` of background and classes, from CAMs ``(K, h, w)`` in [0, 1] (bilinear).

    The background scores what is missing to 1 for the strongest class.
    """
    if not len(cams):
        return torch.ones(1, *size, device=cams.device)
    wide = F.interpolate(cams[None], size=size, mode="bilinear", align_corners=False)[0]
    return torch.cat([1 - wide.amax(dim=0, keepdim=True), wide])


def refined_scores(scores: Sequence[Tensor], images: Tensor, iterations: int = PAR_ITERATIONS) -> list[Tensor]:
    """Scores after pixel-adaptive refinement (PAR).

    Args:
        scores: ``(1 + K_b, H, W)`` for each image, of one size.
        images: ``(B, 3, h, w)`` in any affine scale of their colours, brought to ``H x W`` where they differ.
        iterations: Of PAR; 0 leaves scores as they are.
    """
    found = list(scores)
    for maps in sorted({len(rows) for rows in scores} - {1}):  # background alone stays what it is
        chosen = [k for k, rows in enumerate(scores) if len(rows) == maps]
        images_of = images[index_on(chosen, images.device)]
        refined = refine_par(torch.stack([scores[k] for k in chosen]), images_of, iterations)
        for place, k in enumerate(chosen):
            found[k] = refined[place]
    return found


def strongest(scores: Sequence[Tensor], labels: Sequence[Sequence[int]]) -> Tensor:
    """Label masks ``(B, H, W)`` uint8: of each pixel the strongest of background (0) and classes (index + 1).

    Args:
        scores: ``(1 + K_b, H, W)`` for each image, all of one size.
        labels: Class indices of each image, in the order of its scores.
    """
    masks = []
    for rows, present in zip(scores, labels, strict=True):
        values = index_on([0, *(label + 1 for label in present)], rows.device).to(torch.uint8)
        masks.append(values[rows.argmax(dim=0)])
    return torch.stack(masks)
