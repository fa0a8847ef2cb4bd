"""What all heads have in common: from the maps of a backbone and the texts of the classes to logits.

Shapes: B images, K texts, background first, D their width; levels are the backbone's maps of strides 4, 8, 16 and 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

TAU = 0.07
"""Temperature of all scores by text: LSeg's fixed scale is 1 / 0.07."""


@dataclass(frozen=True)
class HeadOutput:
    """What a head says of a batch.

    Attributes:
        logits: ``(B, K, h, w)``: the prediction.
        scores: ``(B, K, h', w')``: logits by text, ``cosine / tau``, to be learned beside the prediction, where they
            are not the prediction itself; ``None`` where there are none.
    """

    logits: Tensor
    scores: Tensor | None = None


class Head(Protocol):
    """A head; an ``nn.Module``."""

    def __call__(self, levels: Sequence[Tensor], text: Tensor, allowed: Tensor | None = None) -> HeadOutput:
        """Logits.

        Args:
            levels: Four maps ``(B, C_i, h_i, w_i)``.
            text: ``(K, D)`` of length 1; other texts than it was trained with only for :meth:`by_text`.
            allowed: ``(B, K)`` texts that pixels may attend to; all where there is none.
        """
        ...

    def by_text(self, levels: Sequence[Tensor], text: Tensor, allowed: Tensor | None = None) -> Tensor | None:
        """Logits ``(B, K, h, w)`` of any texts; ``None`` where a head cannot score by text."""
        ...


def fused_top(levels: Sequence[Tensor]) -> Tensor:
    """The maps of strides 16 and 32 as one of stride 16: at 32, images of common size have too few positions."""
    top = F.interpolate(levels[3], size=levels[2].shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([levels[2], top], dim=1)
