"""Semantic FPN (Kirillov et al., CVPR 2019), as DenseCLIP uses it: the plain baseline, and the end of other heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipseed.train.bridge.head import HeadOutput


class SemanticFpn(nn.Module):
    """From maps of strides 4 to 32 to logits at stride 4.

    Each level to one width (1x1), added from the coarsest to the finest, a 3x3 convolution each; then convolution,
    batch norm and ReLU for each level, brought to stride 4 and summed.

    Args:
        channels: Of the four maps.
        classes: With the background.
        width: Of everything inside.
        dropout: Share of hidden channels before the last layer.
    """

    def __init__(self, channels: Sequence[int], classes: int, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(inputs, width, 1) for inputs in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        self.chains = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            for _ in channels
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Logits ``(B, classes, h, w)`` at the size of the first map."""
        maps = [lateral(level) for lateral, level in zip(self.lateral, levels, strict=True)]
        for k in range(len(maps) - 1, 0, -1):
            maps[k - 1] = maps[k - 1] + F.interpolate(maps[k], size=maps[k - 1].shape[-2:], mode="nearest")
        size = maps[0].shape[-2:]
        total = None
        for smooth, chain, x in zip(self.smooth, self.chains, maps, strict=True):
            wide = chain(smooth(x))
            if wide.shape[-2:] != size:
                wide = F.interpolate(wide, size=size, mode="bilinear", align_corners=False)
            total = wide if total is None else total + wide
        return self.classifier(self.dropout(total))  # type: ignore[no-any-return]


class FpnHead(nn.Module):
    """No text at all."""

    def __init__(self, channels: Sequence[int], classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.fpn = SemanticFpn(channels, classes, width, dropout)

    def forward(self, levels: Sequence[Tensor], text: Tensor, allowed: Tensor | None = None) -> HeadOutput:
        """Logits at stride 4."""
        return HeadOutput(self.fpn(levels))

    def by_text(self, levels: Sequence[Tensor], text: Tensor, allowed: Tensor | None = None) -> Tensor | None:
        """There is none."""
        return None


def with_scores(levels: Sequence[Tensor], scores: Tensor) -> list[Tensor]:
    """The maps, those of stride 16 with the classes' scores ``(B, K, h, w)`` as further channels (DenseCLIP).

    Cosines over the temperature, where DenseCLIP takes cosines: its maps are CLIP's own, those of light networks are a
    hundred times larger than cosines, which would hardly be seen beside them.
    """
    return [*levels[:2], torch.cat([levels[2], scores.to(levels[2].dtype)], dim=1), levels[3]]
