"""From a decoder's answers about one crop to the masks that pass the thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipseed.sam.backend import Decoded, Embedding, SamBackend
from clipseed.sam.grid import Crop
from clipseed.sam.nms import cut_off, mask_boxes, with_extent
from clipseed.sam.options import LEVELS, ProposalOptions
from clipseed.segments import WHOLE, SegmentColumns, joined_columns

_WORKING_FLOATS = 1 << 25
"""Masks enlarged at once need about this many floats (128 MB)."""


@dataclass(frozen=True, kw_only=True)
class Candidates(SegmentColumns):
    """Masks of one crop; boxes and points are in the image's pixels.

    Attributes:
        packed: ``(S, bytes)`` uint8: the masks' pixels in the crop row by row, a bit each; decoders give hundreds.
    """

    packed: npt.NDArray[np.uint8]

    def take(self, kept: npt.NDArray[np.int64]) -> Candidates:
        """Those with these indices, in this order."""
        return Candidates(packed=self.packed[kept], **self.columns(kept))

    @staticmethod
    def joined(parts: Sequence[Candidates]) -> Candidates:
        """All of them, in order; at least one part."""
        return Candidates(packed=np.concatenate([part.packed for part in parts]), **joined_columns(parts))


def passing(
    backend: SamBackend,
    embedding: Embedding,
    decoded: Decoded,
    points: npt.NDArray[np.float64],
    crop: Crop,
    image: tuple[int, int],
    options: ProposalOptions,
) -> Candidates:
    """Masks that pass the thresholds, are not cut off by the crop and not empty; by point, then level.

    The predicted IoU is looked at first: most masks fail there, and only the others are drawn and enlarged.

    Args:
        backend: The model that answered.
        embedding: The crop.
        decoded: Answers to the points.
        points: ``(P, 2)`` x, y in pixels of the crop.
        crop: Where the crop is.
        image: Height and width of the image.
        options: Thresholds.
    """
    per_point = decoded.iou.shape[1]
    level = (torch.arange(LEVELS) if per_point == LEVELS else torch.tensor([WHOLE])).repeat(len(points))
    iou = decoded.iou.flatten().cpu()
    chosen = torch.arange(len(iou))
    if options.pred_iou_threshold > 0:
        chosen = chosen[iou + torch.tensor(options.level_bonus)[level] > options.pred_iou_threshold]
    height, width = embedding.size
    corner = np.array([crop.left, crop.top])
    step = max(1, _WORKING_FLOATS // (backend.working_pixels + 2 * height * width))
    parts = [_nothing(embedding.size)]
    if not len(chosen):
        return parts[0]
    for some, logits in zip(torch.split(chosen, step), torch.split(decoded.drawn(chosen), step), strict=True):
        full = backend.upsample(embedding, logits)
        good, stability, box, packed = _good(full, backend.mask_threshold, crop, image, options)
        some = some[good]
        point = points[some.numpy() // per_point]
        parts.append(
            Candidates(
                packed=packed,
                level=level[some].numpy().astype(np.int8),
                iou=iou[some].numpy(),
                stability=stability,
                box=with_extent(box + corner[[0, 1, 0, 1]]),
                point=(point + corner).astype(np.float32),
                crop_box=np.tile(np.array([*corner, crop.size[1], crop.size[0]], np.int32), (len(some), 1)),
            )
        )
    return Candidates.joined(parts)


def stability_score(logits: Tensor, threshold: float, offset: float) -> Tensor:
    """``(S,)`` area above ``threshold + offset`` over area above ``threshold - offset``; 0 where both are 0.

    Since the one area lies inside the other, this is the IoU of the two. In [0, 1].
    """
    inner, outer = ((logits > limit).sum(dim=(1, 2)) for limit in (threshold + offset, threshold - offset))
    return inner / outer.clamp(min=1)


def _good(
    full: Tensor, threshold: float, crop: Crop, image: tuple[int, int], options: ProposalOptions
) -> tuple[Tensor, npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Which masks of ``(S, H, W)`` logits are good; and of those stability, boxes and packed masks."""
    stability = stability_score(full, threshold, options.stability_offset)
    index = torch.arange(len(full), device=full.device)
    if options.stability_threshold > 0:
        index = index[stability >= options.stability_threshold]
    masks = full[index] > threshold
    boxes = mask_boxes(masks)
    good = ~cut_off(boxes, crop, *image) & masks.flatten(1).any(dim=1)
    index, masks = index[good], masks[good]
    packed = np.packbits(masks.flatten(1).cpu().numpy(), axis=1)
    return index.cpu(), stability[index].cpu().numpy(), boxes[good].cpu().numpy(), packed


def _nothing(size: tuple[int, int]) -> Candidates:
    return Candidates(packed=np.packbits(np.zeros((0, size[0] * size[1]), np.bool_), axis=1), **joined_columns([]))
