"""Class-aware attention affinity: maps spread along attention, from boxes around their peaks (CLIP-ES, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipseed.cam.gradcam import minmax
from clipseed.refine.affinity import POWER, SINKHORN_ROUNDS, balance, spread
from clipseed.refine.boxes import box_masks

BOX_THRESHOLD = 0.4
COCO_BOX_THRESHOLD = 0.7
LAYERS = 8


@dataclass(frozen=True)
class CaaOptions:
    """Constants of CAA.

    Attributes:
        box_threshold: Share of a map's peak that its boxes enclose; CLIP-ES: 0.4 on VOC, 0.7 on COCO.
        layers: Blocks from the end whose attention is averaged.
        rounds: Sinkhorn rounds.
        power: How often maps are multiplied with the affinity.
        boxes: Confine the sources to the boxes; without, this is the paper's plain attention affinity.
        released: As the released code: boxes end before the grid's last row and column, 1e-7 in the normalisation.
    """

    box_threshold: float = BOX_THRESHOLD
    layers: int = LAYERS
    rounds: int = SINKHORN_ROUNDS
    power: int = POWER
    boxes: bool = True
    released: bool = False


def caa(cams: Sequence[Tensor], attention: Tensor, options: CaaOptions | None = None) -> list[Tensor]:
    """Refine the maps of a batch of pictures of one grid.

    Args:
        cams: One ``(K, h, w)`` per picture, in [0, 1]; K may differ and may be 0.
        attention: ``(B, n, n)`` mean attention between patches (:func:`clipseed.clip.attention.patch_attention`).
        options: Constants.

    Returns:
        One ``(K, h, w)`` float32 CPU tensor per picture, min-max normalised. A map without a positive value stays zero.
    """
    options = options or CaaOptions()
    return spread_within_boxes(cams, balance(attention, options.rounds), options)


def spread_within_boxes(cams: Sequence[Tensor], affinity: Tensor, options: CaaOptions) -> list[Tensor]:
    """Box mask, spreading and normalisation for any affinity ``(B, n, n)``; see :func:`caa`."""
    most = max(len(cam) for cam in cams)
    height, width = cams[0].shape[-2:]
    sources = torch.zeros(len(cams), most, height, width)
    for picture, cam in zip(sources, cams, strict=True):
        kept = cam.float().cpu()
        if options.boxes:
            masks = box_masks(kept.numpy(), options.box_threshold, released=options.released)
            kept = kept * torch.from_numpy(masks.astype(np.float32))
        picture[: len(cam)] = kept
    reached = spread(affinity, sources.to(affinity.device), options.power)
    refined = minmax(reached, 1e-7 if options.released else 0.0).cpu()
    return [maps[: len(cam)] for maps, cam in zip(refined, cams, strict=True)]
