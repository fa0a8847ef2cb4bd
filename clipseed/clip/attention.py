"""Attention between patches, averaged over heads and the last blocks: what CAA spreads maps along."""

from __future__ import annotations

import torch
from torch import Tensor

from clipseed.clip.vision import DenseFeatures, VisionTower, attention_map


def attention_blocks(tower: VisionTower, layers: int) -> tuple[int, ...]:
    """Blocks before the last one that are among the last ``layers`` (all, if there are fewer)."""
    count = len(tower.blocks)
    return tuple(range(count - min(layers, count), count - 1))


def with_last(features: DenseFeatures, last: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Mean over ``blocks`` and the last block ``(B, n, n)`` float32; ``last`` is that block's own, ``(B, n, n)``."""
    if features.attention is None:
        return last
    return (features.attention * len(blocks) + last) / (len(blocks) + 1)


def patch_attention(tower: VisionTower, pixels: Tensor, layers: int) -> Tensor:
    """Attention between patches of the last ``layers`` blocks, averaged over heads and blocks.

    Args:
        tower: The frozen vision transformer.
        pixels: ``(B, 3, H, W)`` uint8, whole patches.
        layers: Number of blocks from the end; all of them, if there are fewer.

    Returns:
        ``(B, n, n)`` float32, rows are queries; prefix tokens are cut off, so rows do not sum to 1.
    """
    blocks = attention_blocks(tower, layers)
    features = tower.dense(tower.normalize(pixels), blocks)
    block = tower.blocks[-1]
    q, k, _ = block.split_heads(block.norm_1(features.tokens))
    first = tower.prefix_tokens
    last = attention_map(q, k)[:, :, first:, first:].mean(dim=1, dtype=torch.float32)
    return with_last(features, last, blocks)
