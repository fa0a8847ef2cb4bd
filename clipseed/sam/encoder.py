"""SAM's image encoder with attention that stays in the processor's cache.

Attention between all 4,096 places of an image has 12 · 4,096² scores in a ViT-B, 800 MB in float32, which the stock
encoder writes and reads five times. Here they are made, biased, normalised and used piece by piece. The numbers are
the same up to the rounding of sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SCORES_AT_ONCE = {"cpu": 1 << 18}
_GPU_SCORES_AT_ONCE = 1 << 27
"""Scores of one piece: on a CPU 1 MB, which its second cache holds; on a GPU enough for large products."""


class PlainEncoder:
    """The encoder of a model for which :func:`~clipseed.sam.plain.has_plain_encoder` holds, in its own weights."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``(B, E, h, w)`` of normalised images ``(B, 3, side, side)``."""
        from segment_anything.modeling.image_encoder import window_partition, window_unpartition

        encoder = self._encoder
        values = encoder.patch_embed(images)
        if encoder.pos_embed is not None:
            values = values + encoder.pos_embed
        for block in encoder.blocks:
            normal = block.norm1(values)
            if block.window_size > 0:
                windows, padded = window_partition(normal, block.window_size)
                seen = attend(block.attn, windows)
                seen = window_unpartition(seen, block.window_size, padded, values.shape[1:3])
            else:
                seen = attend(block.attn, normal)
            values = values + seen
            values = values + block.mlp(block.norm2(values))
        features: Tensor = encoder.neck(values.permute(0, 3, 1, 2))
        return features


def attend(attention: Any, values: Tensor) -> Tensor:
    """Attention between the places of each grid ``(B, h, w, C)``, with relative positions in two addends.

    The score of query place (i, j) for key place (k, l) is ``q·k / sqrt(d) + q·r_h[i - k] + q·r_w[j - l]``.
    """
    from segment_anything.modeling.image_encoder import get_rel_pos

    count, height, width, _ = values.shape
    places = height * width
    parts = attention.qkv(values).view(count, places, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    queries, keys, content = parts.reshape(3, count * attention.num_heads, places, -1).unbind(0)
    grids = queries.unflatten(1, (height, width))
    if attention.use_rel_pos:
        rows = torch.einsum("nhwc,hkc->nhwk", grids, get_rel_pos(height, height, attention.rel_pos_h))
        columns = torch.einsum("nhwc,wkc->nhwk", grids, get_rel_pos(width, width, attention.rel_pos_w))
    seen = torch.empty_like(queries)
    limit = _SCORES_AT_ONCE.get(values.device.type, _GPU_SCORES_AT_ONCE)
    heads_at_once = max(1, limit // places**2)
    rows_at_once = max(1, min(height, limit // (width * places)))
    for head in range(0, len(queries), heads_at_once):
        some = slice(head, head + heads_at_once)
        turned = keys[some].transpose(1, 2)
        for top in range(0, height, rows_at_once):
            band = slice(top, top + rows_at_once)
            scores = torch.bmm((grids[some, band] * attention.scale).flatten(1, 2), turned)
            if attention.use_rel_pos:
                biased = scores.view(len(scores), -1, width, height, width)
                biased += rows[some, band, :, :, None]
                biased += columns[some, band, :, None, :]
            seen[some, top * width : (top + rows_at_once) * width] = torch.bmm(scores.softmax(dim=-1), content[some])
    joined = seen.view(count, attention.num_heads, height, width, -1).permute(0, 2, 3, 1, 4).flatten(3)
    output: Tensor = attention.proj(joined)
    return output
