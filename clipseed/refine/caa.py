"""Class-aware attention affinity: maps spread along attention, from boxes around their peaks (CLIP-ES, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from clipseed.defaults import BOX_THRESHOLD, CAA_LAYERS, SINKHORN_ROUNDS, SPREAD_POWER
from clipseed.minmax import RELEASED_FLOOR, minmax
from clipseed.refine.affinity import balance, spread
from clipseed.refine.boxes import box_masks

Source = Literal["score", "raw"]


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
    layers: int = CAA_LAYERS
    rounds: int = SINKHORN_ROUNDS
    power: int = SPREAD_POWER
    boxes: bool = True
    released: bool = False


FMA_WSSS: dict[str, tuple[CaaOptions, Source]] = {
    "voc-coarse": (CaaOptions(0.4, rounds=1), "score"),
    "voc-fine": (CaaOptions(0.5, rounds=1), "raw"),
    "coco-coarse": (CaaOptions(0.6, rounds=1), "raw"),
    "coco-fine": (CaaOptions(power=0), "raw"),
}
"""FMA-WSSS's constants and sources for :func:`caa_of_raw`; its fine CAMs on COCO are not refined."""


def caa(cams: Sequence[Tensor], attention: Tensor, options: CaaOptions | None = None) -> list[Tensor]:
    """Refine the maps of a batch of images of one grid.

    Args:
        cams: One ``(K, h, w)`` per image, in [0, 1]; K may differ and may be 0.
        attention: ``(B, n, n)`` mean attention between patches (:func:`clipseed.clip.attention.patch_attention`).
        options: Constants.

    Returns:
        One ``(K, h, w)`` float32 CPU tensor per image, min-max normalised. A map without a positive value stays zero.
    """
    options = options or CaaOptions()
    return spread_within_boxes(cams, balance(attention, options.rounds), options)


def spread_within_boxes(cams: Sequence[Tensor], affinity: Tensor, options: CaaOptions) -> list[Tensor]:
    """Box mask, spreading and normalisation for any affinity ``(B, n, n)``; see :func:`caa`."""
    refined = _reach(cams, cams, affinity, options)
    return [minmax(maps, RELEASED_FLOOR if options.released else 0.0) for maps in refined]


def caa_of_raw(
    cams: Sequence[Tensor], attention: Tensor, options: CaaOptions, source: Source = "score"
) -> list[Tensor]:
    """Refine maps of any scale, and leave the result at the scale it has: CAA as FMA-WSSS uses it.

    Boxes are drawn on the score, which is the map without its negative values, stretched to [0, 1]; what spreads is
    the score or the raw map.

    Args:
        cams: One raw ``(K, h, w)`` per image, signed; K may differ and may be 0.
        attention: ``(B, n, n)``, see :func:`caa`.
        options: Constants; see ``FMA_WSSS``. ``power`` 0 returns the source as it is, not even cut to the boxes.
        source: ``score`` or ``raw``.

    Returns:
        One ``(K, h, w)`` float32 CPU tensor per image, not normalised; signed where the source is.
    """
    scores = [minmax(cam.float().cpu().clamp_min(0), RELEASED_FLOOR if options.released else 0.0) for cam in cams]
    sources = scores if source == "score" else [cam.float().cpu() for cam in cams]
    if options.power == 0:
        return list(sources)
    return _reach(scores, sources, balance(attention, options.rounds), options)


def _reach(scores: Sequence[Tensor], sources: Sequence[Tensor], affinity: Tensor, options: CaaOptions) -> list[Tensor]:
    """What spreads from within the boxes of the scores."""
    most = max(len(cam) for cam in sources)
    height, width = sources[0].shape[-2:]
    padded = torch.zeros(len(sources), most, height, width)
    for number, (score, cam) in enumerate(zip(scores, sources, strict=True)):
        kept = cam.float().cpu()
        if options.boxes:
            masks = box_masks(score.detach().float().cpu().numpy(), options.box_threshold, released=options.released)
            kept = kept * torch.from_numpy(masks.astype(np.float32))
        padded[number, : len(cam)] = kept
    reached = spread(affinity, padded.to(affinity.device), options.power).cpu()
    return [maps[: len(cam)] for maps, cam in zip(reached, sources, strict=True)]
