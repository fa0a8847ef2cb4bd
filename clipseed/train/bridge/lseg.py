"""The head of LSeg (Li et al., ICLR 2022): pixel embeddings, compared with the texts, and nothing between the two.

Its pixel embeddings come from the backbone's levels through the same Semantic FPN as the other heads, where LSeg has a
DPT.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from clipseed.train.bridge.fpn import SemanticFpn
from clipseed.train.bridge.head import TAU, HeadOutput
from clipseed.train.bridge.text_bridge import cosines


class LsegHead(nn.Module):
    """Logits are cosines over a fixed temperature."""

    def __init__(self, channels: Sequence[int], text_dim: int, width: int, dropout: float) -> None:
        super().__init__()
        self.fpn = SemanticFpn(channels, text_dim, width, dropout)

    def forward(self, levels: Sequence[Tensor], text: Tensor, allowed: Tensor | None = None) -> HeadOutput:
        """Logits at stride 4."""
        return HeadOutput(self.by_text(levels, text, allowed))

    def by_text(self, levels: Sequence[Tensor], text: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The same."""
        return cosines(self.fpn(levels), text)[0] / TAU
