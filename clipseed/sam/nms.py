"""Boxes of masks, and which masks stay of those whose boxes overlap much."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.ops import nms

from clipseed.sam.grid import Crop

EDGE_PIXELS = 20
"""A box this close to a crop's edge counts as cut off by it. An absolute number in SAM's generator."""


def mask_boxes(masks: Tensor) -> Tensor:
    """First column, first row, last column, last row of each mask: ``(S, H, W)`` bool to ``(S, 4)`` int64.

    An empty mask has a box of zeros.
    """
    rows, columns = masks.any(dim=2), masks.any(dim=1)
    first = [seen.to(torch.uint8).argmax(dim=1) for seen in (columns, rows)]
    last = [seen.shape[1] - 1 - seen.flip(1).to(torch.uint8).argmax(dim=1) for seen in (columns, rows)]
    boxes = torch.stack([*first, *last], dim=1)
    return boxes * rows.any(dim=1, keepdim=True)


def with_extent(corners: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """First column, first row, last column, last row to x, y, width, height, as in SAM's records without "+1"."""
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).astype(np.float32)


def corners_of(box: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """x, y, width, height to left, top, right, bottom: exact, as pixels are whole numbers below 2**24."""
    return np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1)


def cut_off(boxes: Tensor, crop: Crop, height: int, width: int) -> Tensor:
    """``(S,)`` bool: boxes ``(S, 4)`` in the crop's own pixels that lie at an edge of it inside the image."""
    shifted = boxes + boxes.new_tensor([crop.left, crop.top, crop.left, crop.top])
    at_crop = (shifted - shifted.new_tensor([crop.left, crop.top, crop.right, crop.bottom])).abs() <= EDGE_PIXELS
    at_image = (shifted - shifted.new_tensor([0, 0, width, height])).abs() <= EDGE_PIXELS
    return (at_crop & ~at_image).any(dim=1)


def suppress(boxes: npt.NDArray[Any], scores: npt.NDArray[np.float32], threshold: float) -> npt.NDArray[np.int64]:
    """Greedy non-maximum suppression: indices of the boxes that stay, best first, equal scores in their order.

    A box goes when its IoU with a better one is larger than ``threshold``; areas are without "+1", so a box of one row
    or column never makes another one go. On the CPU, so that every device gives the same order.

    Args:
        boxes: ``(S, 4)`` left, top, right, bottom (:func:`corners_of`).
        scores: ``(S,)``.
        threshold: IoU in [0, 1]; larger than 1 keeps all.
    """
    kept = nms(torch.from_numpy(boxes.astype(np.float32)), torch.from_numpy(scores.astype(np.float32)), threshold)
    result: npt.NDArray[np.int64] = kept.numpy()
    return result
