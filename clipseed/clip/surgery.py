"""Attention surgery: dense patch features of frozen CLIP, with the last attention replaced by one that stays local.

A CLIP's own patch tokens are trained for nothing: the last attention collects what the image as a whole shows. Three
known ways around it, none of which trains anything:

- :func:`value_patches` (MaskCLIP, ECCV 2022): no attention at all, ``y_i = W_o v_i``;
- :func:`neighbour_patches` (NACLIP, WACV 2025): keys attend to like keys nearby;
- :func:`dual_path` (the untrained part of ExCEL, CVPR 2025; CLIP Surgery, 2023): a second residual stream through the
  last blocks that takes self-correlation attention only.

All leave out the MLP, and the first two the residual stream too ("reduced last block"): they carry the global part.

Shapes: B images, N = p + n tokens (p prefix tokens first), n patches of a grid ``h x w``, D width, E joint space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.clip.vision import VisionTower, attend, attention_map, merge_heads, scaled

Heads = Literal["sum", "mean"]
SVC_BLOCKS = 5
NACLIP_SIGMA = 5.0


@dataclass(frozen=True)
class DualPath:
    """Both streams behind the last block.

    Attributes:
        patches: ``(B, n, D)`` patch tokens of the new path.
        image: ``(B, E)`` the model's own image feature, from the original path, not normalised.
        grid: Patch grid ``(h, w)``.
    """

    patches: Tensor
    image: Tensor
    grid: tuple[int, int]


def value_patches(tower: VisionTower, tokens: Tensor) -> Tensor:
    """Every patch's own value through the last block's output map: ``(B, N, D)`` to ``(B, n, D)`` (MaskCLIP)."""
    block = tower.blocks[-1]
    _, _, v = block.split_heads(block.norm_1(tokens[:, tower.prefix_tokens :]))
    return scaled(block.out(merge_heads(v)), block.scale_1)


def neighbour_patches(tower: VisionTower, tokens: Tensor, grid: tuple[int, int], sigma: float = NACLIP_SIGMA) -> Tensor:
    """Reduced last block with ``A = softmax(k k^T / sqrt(d) + G)`` (NACLIP): ``(B, N, D)`` to ``(B, n, D)``.

    ``G`` is :func:`vicinity` between patches and 0 where a prefix token takes part.
    """
    block = tower.blocks[-1]
    _, k, v = block.split_heads(block.norm_1(tokens))
    first = tower.prefix_tokens
    bonus = F.pad(vicinity(grid, sigma, tokens.device), (first, 0)).to(k.dtype)
    attended = F.scaled_dot_product_attention(k[:, :, first:], k, v, attn_mask=bonus)
    return scaled(block.out(merge_heads(attended)), block.scale_1)


def vicinity(grid: tuple[int, int], sigma: float, device: torch.device) -> Tensor:
    """``exp(-|p_i - p_j|^2 / (2 sigma^2))`` between all patches ``(n, n)``; positions and sigma in patches, float32."""
    row, column = (torch.arange(side, dtype=torch.float32, device=device) for side in grid)
    along, across = ((line[:, None] - line).square() for line in (row, column))
    square = (along[:, None, :, None] + across[None, :, None, :]).flatten(0, 1).flatten(1)
    return torch.exp(-square / (2 * sigma**2))


def self_correlation(q: Tensor, k: Tensor, v: Tensor, heads: Heads = "sum") -> Tensor:
    """``(softmax(q q^T) + softmax(k k^T) + softmax(v v^T)) / 3`` over heads ``(B, H, N, d)``: ``(B, N, N)`` float32.

    One attention for all heads (ExCEL). Rows sum to the number of heads (``sum``) or to 1 (``mean``). One of the three
    is held at a time.
    """
    total: Tensor | None = None
    for x in (q, k, v):
        found = attention_map(x, x).sum(dim=1, dtype=torch.float32)
        total = found if total is None else total.add_(found)
    assert total is not None
    return total / (3 if heads == "sum" else 3 * q.shape[1])


def dual_path(tower: VisionTower, pixels: Tensor, blocks: int = SVC_BLOCKS, heads: Heads = "sum") -> DualPath:
    """Run normalised pixels ``(B, 3, H, W)`` along two paths through the last ``blocks`` blocks (ExCEL's SVC).

    The original path is the model as it is. The new one leaves it before the first of those blocks and adds
    ``W_o A v`` per block, with :func:`self_correlation` and the values of the *original* path, and no MLP.

    Args:
        tower: The frozen vision transformer.
        pixels: Sides are multiples of the patch size.
        blocks: How many; all where the model has fewer.
        heads: Whether the heads' shared attention is their sum, as ExCEL has it, or their mean. The final norm takes
            the scale out again, so the sum only weighs the new blocks more, by the number of heads, against the stream
            they start from. On the toy (3 heads) SVC scores 70.4 with the sum and 68.1 with the mean; with the sum
            over the last 1, 3, 5 and 7 blocks 54.0, 65.9, 70.4 and 70.2.

    Raises:
        ValueError: ``blocks`` is less than 1.
    """
    if blocks < 1:
        raise ValueError(f"the new path needs at least 1 block, not {blocks}")
    tokens, grid = tower.embed(pixels)
    first = max(0, len(tower.blocks) - blocks)
    fresh = tokens
    for position, block in enumerate(tower.blocks):
        if position == first:
            fresh = tokens
        q, k, v = block.split_heads(block.norm_1(tokens))
        if position >= first:
            shared = self_correlation(q, k, v, heads).to(v.dtype)
            fresh = fresh + scaled(block.out(shared @ merge_heads(v)), block.scale_1)
        tokens = block.finish(tokens, attend(q, k, v))
    return DualPath(fresh[:, tower.prefix_tokens :], tower.pool(tokens), grid)


def project(tower: VisionTower, patches: Tensor) -> Tensor:
    """Unit features ``(…, E)`` of tokens ``(…, D)`` in the joint space: final norm, then projection; float32."""
    return F.normalize(tower.norm_post(patches).float() @ tower.projection.float(), dim=-1)
