"""The bridge as a head: its scores beside the map before the FPN, or as the prediction itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from clipseed.train.bridge.fpn import SemanticFpn, with_scores
from clipseed.train.bridge.head import HeadOutput, fused_top
from clipseed.train.bridge.text_bridge import TextBridge


class BridgeHead(nn.Module):
    """A :class:`~clipseed.train.bridge.text_bridge.TextBridge` on the maps of strides 16 and 32.

    Args:
        channels: Of the four maps.
        classes: Texts, with the background.
        text_dim: Their width.
        fpn_width, dropout: Of the FPN; a width of 0 leaves it out, and scores are the prediction.
        bridge: Further arguments of the bridge.
    """

    def __init__(
        self, channels: Sequence[int], classes: int, text_dim: int, fpn_width: int, dropout: float, **bridge: Any
    ) -> None:
        super().__init__()
        self.bridge = TextBridge(channels[2] + channels[3], text_dim, **bridge)
        with_fpn = [*channels[:2], channels[2] + classes, channels[3]]
        self.fpn = SemanticFpn(with_fpn, classes, fpn_width, dropout) if fpn_width else None

    def forward(self, levels: Sequence[Tensor], text: Tensor, allowed: Tensor | None = None) -> HeadOutput:
        """Logits at stride 4 and scores at stride 16, or the scores alone."""
        scores = self.by_text(levels, text, allowed)
        return HeadOutput(scores) if self.fpn is None else HeadOutput(self.fpn(with_scores(levels, scores)), scores)

    def by_text(self, levels: Sequence[Tensor], text: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The scores alone."""
        score: Tensor = self.bridge(fused_top(levels), text, allowed)["score"]
        return score / self.bridge.tau
