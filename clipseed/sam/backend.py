"""What the mask generator needs of a SAM, and images as it takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipseed.errors import ImageError, WeightsError
from clipseed.sam.options import LEVELS

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Embedding:
    """An encoded crop.

    Attributes:
        size: Height and width of the crop.
        content: What the backend keeps of it: image features, or the crop itself.
    """

    size: tuple[int, int]
    content: Any


@dataclass(frozen=True)
class Decoded:
    """Answers to P prompts, with M masks each: 3 (sub-part, part, whole) or 1 (whole).

    Attributes:
        masks: ``(P, M, h, w)`` float32, logits at the decoder's resolution, with or without what is padding of the
            crop; or a function that draws those of chosen masks, see :meth:`drawn`, because most masks are dropped for
            their predicted IoU and need not be drawn.
        iou: ``(P, M)`` float32, predicted IoU; a regression that may exceed 1.
    """

    masks: Tensor | Callable[[Tensor], Tensor]
    iou: Tensor

    def drawn(self, index: Tensor) -> Tensor:
        """Logits ``(S, h, w)`` of the masks with these numbers ``(S,)``: prompt times M plus mask, on any device."""
        index = index.to(self.iou.device)
        return self.masks.flatten(0, 1)[index] if isinstance(self.masks, Tensor) else self.masks(index)

    @cached_property
    def logits(self) -> Tensor:
        """Logits ``(P, M, h, w)`` of all masks."""
        if isinstance(self.masks, Tensor):
            return self.masks
        drawn = self.masks(torch.arange(self.iou.numel(), device=self.iou.device))
        return drawn.view(*self.iou.shape, *drawn.shape[1:])


class SamBackend(Protocol):
    """A SAM that encodes crops, answers prompts, and enlarges only the masks that are wanted.

    Attributes:
        mask_threshold: Logits above it belong to the mask.
        crops_at_once: Crops that may be encoded in one forward pass.
        working_pixels: Pixels that :meth:`upsample` needs for a mask besides the crop's own.
    """

    mask_threshold: float
    crops_at_once: int
    working_pixels: int

    def encode(self, crops: Sequence[Pixels]) -> list[Embedding]:
        """Encode crops, ``(H, W, 3)`` uint8 RGB each, sizes may differ."""
        ...

    def decode_prompts(
        self,
        embedding: Embedding,
        boxes: Floats | None = None,
        points: Floats | None = None,
        point_labels: npt.NDArray[np.integer] | None = None,
    ) -> Decoded:
        """Answer P prompts about one crop.

        Args:
            embedding: The crop.
            boxes: ``(P, 4)`` left, top, right, bottom in pixels of the crop.
            points: ``(P, N, 2)`` x, y in pixels of the crop: N joint points for each prompt.
            point_labels: ``(P, N)`` 1 on the object, 0 off it, -1 no point (filler). Default: all on it.
        """
        ...

    def upsample(self, embedding: Embedding, logits: Tensor) -> Tensor:
        """Logits of chosen masks, as :meth:`Decoded.drawn` gives them, at the crop's size: ``(S, H, W)``."""
        ...

    def manifest(self) -> dict[str, Any]:
        """Plain description for output files."""
        ...


def as_pixels(image: npt.NDArray[Any]) -> Pixels:
    """Any 8-bit image as ``(H, W, 3)`` RGB: grey is repeated, transparency composited onto white.

    Args:
        image: ``(H, W)``, or ``(H, W, C)`` with C = 1 (grey), 3 (RGB) or 4 (RGBA); uint8.

    Raises:
        ImageError: another type (floats would give wrong masks silently), another shape, or no pixel.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise ImageError(f"image has values of type {image.dtype}; SAM needs 8-bit values from 0 to 255 (uint8)")
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in {1, 3, 4}:
        raise ImageError(f"image has shape {image.shape}; needed is (height, width, 3), RGB")
    if 0 in image.shape:
        raise ImageError(f"image has shape {image.shape}: no pixel")
    if image.shape[2] == 1:
        image = np.repeat(image, 3, axis=2)
    elif image.shape[2] == 4:
        opaque = image[:, :, 3:].astype(np.float32) / 255
        image = np.rint(image[:, :, :3] * opaque + 255 * (1 - opaque)).astype(np.uint8)
    return np.ascontiguousarray(image)


def fitted_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width at which a crop's longer side is ``side``; the shorter one is at least 1 pixel.

    SAM itself fails where the shorter side rounds to 0, at ratios beyond about twice ``side``.
    """
    scale = side * 1.0 / max(size)
    height, width = (max(1, int(length * scale + 0.5)) for length in size)
    return height, width


class Prompts(NamedTuple):
    """Prompts as tensors, in the pixels of the fitted crop."""

    points: Tensor | None
    labels: Tensor | None
    boxes: Tensor | None
    number: int


def fit_prompts(
    size: tuple[int, int],
    side: int,
    device: torch.device,
    boxes: Floats | None,
    points: Floats | None,
    point_labels: npt.NDArray[np.integer] | None,
) -> Prompts:
    """Check prompts and scale them from a crop of ``size`` to the fitted crop.

    Raises:
        ValueError: shapes that do not belong together, or no prompt of either kind.
    """
    if boxes is None and points is None:
        raise ValueError("a prompt needs points, a box, or both")
    count = len(points if points is not None else boxes if boxes is not None else ())
    if boxes is not None and boxes.shape != (count, 4):
        raise ValueError(f"boxes have shape {boxes.shape}; needed is ({count}, 4)")
    if points is None:
        return Prompts(None, None, _scaled(boxes, size, side, device), count)
    if points.ndim != 3 or points.shape[2] != 2:
        raise ValueError(f"points have shape {points.shape}; needed is (prompts, points, 2)")
    if point_labels is None:
        point_labels = np.ones(points.shape[:2], np.int64)
    if point_labels.shape != points.shape[:2]:
        raise ValueError(f"point labels have shape {point_labels.shape}; the points need {points.shape[:2]}")
    labels = torch.from_numpy(np.asarray(point_labels, np.int32)).to(device)
    return Prompts(_scaled(points, size, side, device), labels, _scaled(boxes, size, side, device), count)


def _scaled(values: Floats | None, size: tuple[int, int], side: int, device: torch.device) -> Tensor | None:
    """Coordinates x, y, …, in float64, in which SAM itself computes them; Apple GPUs have float32 only."""
    if values is None:
        return None
    height, width = fitted_size(size, side)
    factors = np.array([width / size[1], height / size[0]])
    scaled = (np.asarray(values, np.float64).reshape(-1, 2) * factors).reshape(values.shape)
    tensor = torch.from_numpy(scaled)
    return (tensor.float() if device.type == "mps" else tensor).to(device)


def checked(logits: Tensor, iou: Tensor, count: int) -> Decoded:
    """A foreign decoder's answer, in float32.

    Raises:
        WeightsError: not three masks, or one, for each prompt.
    """
    masks = iou.shape[1] if iou.ndim == 2 else 0
    if masks not in {1, LEVELS} or iou.shape[0] != count or logits.shape[:2] != iou.shape:
        raise WeightsError(
            f"the SAM model answers {count} prompts with masks {tuple(logits.shape)} and scores {tuple(iou.shape)}; "
            "needed are three masks, or one, for each"
        )
    return Decoded(logits.float(), iou.float())
