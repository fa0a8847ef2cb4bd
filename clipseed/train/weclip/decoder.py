"""WeCLIP's decoder: what is trained on top of frozen CLIP (Zhang et al., CVPR 2024, section 3.2).

Shapes: B images, n = h * w patches, L levels (blocks of the tower), D width of their tokens, C width of the decoder,
K classes with the background.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clipseed.clip.vision import QUICK_GELU_SLOPE, attend, merge_heads


class Projection(nn.Module):
    """Two linear layers with a ReLU between them, applied to every token of one level."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.second = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(…, D)`` to ``(…, C)``."""
        return self.second(self.first(tokens).relu())  # type: ignore[no-any-return]


class DecoderBlock(nn.Module):
    """Residual self-attention and an MLP four times as wide, both behind a layer norm; QuickGELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens ``(B, n, C)``, each ``(B, heads, n, C / heads)``."""
        batch, count, width = x.shape
        parts = self.qkv(self.norm_1(x)).view(batch, count, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """``(B, n, C)`` to the same."""
        x = x + self.out(merge_heads(attend(*self.split_heads(x))))
        hidden = self.up(self.norm_2(x))
        return x + self.down(hidden * torch.sigmoid(QUICK_GELU_SLOPE * hidden))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """From the tokens of several levels to class logits on the patch grid.

    An MLP for each level, one linear layer that fuses them, transformer blocks without positions, a linear head.

    Args:
        levels: How many levels it is given.
        token_width: Width of their tokens.
        classes: Classes with the background.
        width: Of everything inside; a multiple of ``heads``.
        blocks: Transformer blocks.
        heads: Attention heads of each.
    """

    def __init__(
        self, levels: int, token_width: int, classes: int, width: int = 256, blocks: int = 3, heads: int = 8
    ) -> None:
        super().__init__()
        self.token_width, self.heads = token_width, heads
        self.projections = nn.ModuleList(Projection(token_width, width) for _ in range(levels))
        self.fusion = nn.Linear(levels * width, width)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads) for _ in range(blocks))
        self.head = nn.Linear(width, classes)

    @property
    def width(self) -> int:
        """Width C of the fused tokens."""
        return self.fusion.out_features

    @property
    def classes(self) -> int:
        """Classes with the background."""
        return self.head.out_features

    def fuse(self, levels: Sequence[Tensor]) -> Tensor:
        """Fused tokens F_u ``(B, n, C)`` of patch tokens ``(B, n, D)``, one tensor for each level."""
        return self.fusion(torch.cat([project(x) for project, x in zip(self.projections, levels, strict=True)], dim=-1))  # type: ignore[no-any-return]

    def decode(self, fused: Tensor, grid: tuple[int, int]) -> Tensor:
        """Logits ``(B, K, h, w)`` of fused tokens."""
        for block in self.blocks:
            fused = block(fused)
        return self.head(fused).transpose(1, 2).unflatten(2, grid)  # type: ignore[no-any-return]

    def forward(self, levels: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Logits ``(B, K, h, w)`` of patch tokens, without dropout."""
        return self.decode(self.fuse(levels), grid)


def kept_channels(seeds: Sequence[int], width: int, dropout: float) -> Tensor:
    """Which channels each image keeps: ``(B, 1, C)``, 0 or ``1 / (1 - dropout)``.

    Whole channels are dropped, as the paper's code does. What is dropped follows from the seed of each image, so that
    it is the same however a batch is shared among processes.
    """
    drawn = [torch.rand(1, width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return (torch.stack(drawn) >= dropout).float() / (1 - dropout)
