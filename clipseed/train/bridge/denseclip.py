"""A head in the style of DenseCLIP (Rao et al., CVPR 2022): refined texts, and their scores beside the map.

The context decoder of DenseCLIP looks at the image's pixel embeddings and gives each text a small change; pixels never
see the texts (one way). Where DenseCLIP has the attention pooling of CLIP's image encoder, other backbones have a
projection of their own. Texts are fixed here, for every head alike; DenseCLIP also learns words before them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipseed.train.bridge.fpn import SemanticFpn, with_scores
from clipseed.train.bridge.head import TAU, HeadOutput, fused_top
from clipseed.train.bridge.text_bridge import TEXT_STEP, cosines


class ContextDecoder(nn.Module):
    """Three transformer layers from texts to their changes, which attend to the pixels and to their mean."""

    def __init__(self, text_dim: int, width: int, heads: int, layers: int = 3, dropout: float = 0.1) -> None:
        super().__init__()
        self.memory = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width), nn.LayerNorm(width))
        self.enter = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, text_dim))

    def forward(self, text: Tensor, pixels: Tensor) -> Tensor:
        """Changes ``(B, K, D)`` of texts ``(K, D)``, from pixel embeddings ``(B, D, h, w)``."""
        flat = pixels.flatten(2).transpose(1, 2)
        memory = self.memory(torch.cat([flat.mean(dim=1, keepdim=True), flat], dim=1))
        x = self.enter(text).expand(len(pixels), -1, -1)
        for layer in self.layers:
            x = layer(x, memory)
        return self.leave(x)  # type: ignore[no-any-return]


class DenseclipHead(nn.Module):
    """Scores by refined text, concatenated to the map of stride 16 before the FPN."""

    def __init__(
        self, channels: Sequence[int], classes: int, text_dim: int, width: int, dropout: float, decoder_width: int,
        heads: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.project = nn.Conv2d(channels[2] + channels[3], text_dim, 1)
        self.decoder = ContextDecoder(text_dim, decoder_width, heads)
        self.gamma = nn.Parameter(torch.full((text_dim,), TEXT_STEP))
        self.fpn = SemanticFpn([*channels[:2], channels[2] + classes, channels[3]], classes, width, dropout)

    def forward(self, levels: Sequence[Tensor], text: Tensor, allowed: Tensor | None = None) -> HeadOutput:
        """Logits at stride 4, and scores at stride 16."""
        scores = self.by_text(levels, text, allowed)
        return HeadOutput(self.fpn(with_scores(levels, scores)), scores)

    def by_text(self, levels: Sequence[Tensor], text: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The scores alone."""
        embeddings = self.project(fused_top(levels))
        change = self.decoder(text.detach(), F.normalize(embeddings.float(), dim=1))
        return cosines(embeddings, text.detach() + self.gamma * change.float())[0] / TAU
