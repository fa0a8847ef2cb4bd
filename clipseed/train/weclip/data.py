"""What a decoder learns from: augmented crops of images whose classes, or whose masks, are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Crops:
    """A batch.

    Attributes:
        pixels: ``(B, 3, S, S)`` uint8.
        known: ``(B, S, S)`` uint8: 255 outside of the image, inside 0, or the label of a given mask.
        labels: Class indices of each image.
        seeds: Of each sample, for what else is random about it; none for nothing random.
        confidence: ``(B, S, S)`` of given masks, where there is one.
    """

    pixels: Tensor
    known: Tensor
    labels: Sequence[Sequence[int]]
    seeds: Sequence[int] = ()
    confidence: Tensor | None = None
