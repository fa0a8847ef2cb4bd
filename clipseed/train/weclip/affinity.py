"""Which patches belong together: the decoder's own affinity, and what the pseudo-labels say (section 3.3).

Shapes: B images, n = h * w patches of one grid.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from clipseed.types import IGNORE

SAME, DIFFERENT = 1, 0


def token_affinity(fused: Tensor) -> Tensor:
    """``sigmoid(F F^T)`` ``(B, n, n)`` of fused tokens ``(B, n, C)``, float32: neither scaled nor normalised."""
    tokens = fused.float()
    return torch.sigmoid(tokens @ tokens.transpose(1, 2))


def pair_labels(labels: Tensor, patch: int, radius: int | None = None) -> Tensor:
    """Whether two patches have the same label: ``(B, n, n)`` uint8, 1 same, 0 different, ``IGNORE``.

    The label of a patch is that of its upper left pixel. Two patches of background are the same, too.

    Args:
        labels: ``(B, H, W)`` uint8, whole patches.
        patch: Side of a patch in pixels.
        radius: Only pairs within a square window of so many patches to each side count; ``None``: all.
    """
    cells = labels[:, ::patch, ::patch]
    grid = (cells.shape[1], cells.shape[2])
    flat = cells.flatten(1)
    pairs = (flat[:, :, None] == flat[:, None, :]).to(torch.uint8)
    unknown = flat == IGNORE
    unknown = unknown[:, :, None] | unknown[:, None, :]
    if radius is not None:
        unknown = unknown | ~near(grid, radius).to(labels.device)
    return pairs.masked_fill_(unknown, IGNORE)


@lru_cache(maxsize=8)
def near(grid: tuple[int, int], radius: int) -> Tensor:
    """``(n, n)`` booleans: at most ``radius`` rows and columns apart."""
    rows = torch.arange(grid[0]).repeat_interleave(grid[1])
    columns = torch.arange(grid[1]).repeat(grid[0])
    return ((rows[:, None] - rows).abs() <= radius) & ((columns[:, None] - columns).abs() <= radius)
