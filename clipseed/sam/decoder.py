"""SAM's mask decoder (arXiv 2304.02643, appendix A) with fewer operations for the same numbers.

What prompts have in common is computed once per image, what only some prompts need is computed for those. Of P prompts
with T tokens each (about 7) about an image of N places (4,096), most of the stock decoder's work projects all N places
for every prompt, although T tokens look at them. With H heads of width d, keys ``x W + b`` and a query ``q``,

    q · (x W + b) = x · (W q) + q · b                       scores: project the query, not the places
    Σ a_n (x_n W + b) = (Σ a_n x_n) W + b                   values: project the mean, because Σ a_n = 1
    Σ_h Σ_t a_nht v_ht O_h + o = Σ_ht a_nht (v_ht O_h + o/H)   output: project T values, not N means

so that products with d·H columns become products with H·T, and ``q · b`` of the first line cancels in a softmax over
places. In the first layer the places are the image's own, the same for every prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipseed.sam.backend import Decoded
from clipseed.sam.options import LEVELS

_PROMPTS_AT_ONCE = {"cpu": 2}
"""Prompts that go through the transformer together. On a CPU their places (4 MB each) should stay in its cache."""

FINER = 4
"""Masks have this many times as many rows and columns as the grid of places."""


@dataclass(frozen=True)
class ImageSide:
    """What all prompts about an image share.

    Attributes:
        places: ``(1, N, E)`` image features and the code for "no mask given".
        keys: ``(1, H, N, d)`` of the first layer's attention from tokens to places.
        values: ``(1, H, N, d)`` likewise.
        queries: ``(1, H, N, d)`` of the first layer's attention from places to tokens.
    """

    places: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor


class PlainDecoder:
    """The decoder of a model for which :func:`~clipseed.sam.plain.has_plain_decoder` holds, in its own weights.

    Args:
        decoder: ``MaskDecoder`` of segment_anything, float32.
        code: ``(1, E, h, w)`` position code of the places.
        dtype: In which places are kept and multiplied; tokens are float32 always.
    """

    def __init__(self, decoder: Any, code: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype
        self._decoder, self._transformer = decoder, decoder.transformer
        self._grid = (code.shape[2], code.shape[3])
        self._code = _rows(code).to(dtype)
        self._filters = decoder.output_hypernetworks_mlps[1:]
        self._own_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])

    def image_side(self, features: Tensor, dense: Tensor) -> ImageSide:
        """What prompts share about features ``(1, E, h, w)``; ``dense`` is the code for no mask, ``(1, E, h, w)``."""
        places = _rows(features + dense)
        coded = places + self._code.float()
        first = self._transformer.layers[0]
        into, back = first.cross_attn_token_to_image, first.cross_attn_image_to_token
        return ImageSide(
            places=places.to(self._dtype),
            keys=_heads(into, into.k_proj(coded)),
            values=_heads(into, into.v_proj(places)),
            queries=_heads(back, back.q_proj(coded)),
        )

    def answer(self, image: ImageSide, sparse: Tensor, shown: tuple[int, int]) -> Decoded:
        """Three masks for each prompt, drawn only where they are asked for.

        Args:
            image: From :meth:`image_side`.
            sparse: ``(P, n, E)`` tokens of the prompts.
            shown: Rows and columns of places that are to be drawn, from the upper left.
        """
        prompts = torch.cat([self._own_tokens.expand(len(sparse), -1, -1), sparse], dim=1)
        at_once = _PROMPTS_AT_ONCE.get(sparse.device.type, len(prompts))
        parts = [self._transform(image, some) for some in torch.split(prompts, at_once)]
        tokens = torch.cat([part[0] for part in parts])
        places = [one.unflatten(0, self._grid)[: shown[0], : shown[1]] for part in parts for one in part[1]]
        iou = self._decoder.iou_prediction_head(tokens[:, 0])[:, 1:]
        return Decoded(lambda index: self._drawn(places, tokens[:, 2:], index), iou)

    def _transform(self, image: ImageSide, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``(P, T, E)`` and places ``(P, N, E)`` after the two-way transformer."""
        transformer = self._transformer
        tokens, places, coded = prompts, image.places, image.places
        for index, layer in enumerate(transformer.layers):
            query = tokens if layer.skip_first_layer_pe else tokens + prompts
            seen = _attention(layer.self_attn, query, query, tokens)
            tokens = layer.norm1(seen if layer.skip_first_layer_pe else tokens + seen)
            into, back = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
            if index == 0:
                seen = _look_at_shared(into, tokens + prompts, image.keys, image.values)
            else:
                seen = _look(into, tokens + prompts, places, coded)
            tokens = layer.norm2(tokens + seen)
            tokens = layer.norm3(tokens + layer.mlp(tokens))
            if index == 0:
                scores = _scores_of_shared(back, tokens + prompts, image.queries)
            else:
                scores = _scores(back, tokens + prompts, coded)
            places = _normal(layer.norm4, _told(back, scores, tokens, places))
            coded = places + self._code
        seen = _look(transformer.final_attn_token_to_image, tokens + prompts, places, coded)
        return transformer.norm_final_attn(tokens + seen), places

    def _drawn(self, places: Sequence[Tensor], tokens: Tensor, index: Tensor) -> Tensor:
        """Logits ``(S, 4h, 4w)`` of the masks with these numbers; each prompt's places are enlarged once.

        Args:
            places: ``(h, w, E)`` of each prompt.
            tokens: ``(P, n, E)``, beginning with those of the masks.
            index: ``(S,)`` prompt times 3 plus mask.
        """
        filters = torch.stack([mlp(tokens[:, mask]) for mask, mlp in enumerate(self._filters)], dim=1)
        height, width = places[0].shape[:2]
        logits = tokens.new_empty(len(index), FINER * height, FINER * width)
        prompts, owner = torch.unique(index // LEVELS, return_inverse=True)
        at_once = _PROMPTS_AT_ONCE.get(tokens.device.type, len(prompts))
        for start, some in zip(range(0, len(prompts), at_once), prompts.split(at_once), strict=True):
            wide = self._enlarged(torch.stack([places[prompt] for prompt in some.tolist()]))
            drawn = torch.bmm(filters[some].to(wide.dtype), wide.transpose(1, 2)).flatten(0, 1)
            rows = torch.nonzero((owner >= start) & (owner < start + at_once))[:, 0]
            drawn = drawn[(owner[rows] - start) * LEVELS + index[rows] % LEVELS]
            # A place has two by two pixels, and each of those again.
            pixels = drawn.view(-1, height, width, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
            logits[rows] = pixels.reshape(-1, *logits.shape[1:]).float()
        return logits

    def _enlarged(self, places: Tensor) -> Tensor:
        """Features of every fine pixel, ``(P, N · 16, E / 8)`` of ``(P, h, w, E)``: place, row and column, and again.

        A transposed convolution by 2 with stride 2 is a product for every place on its own.
        """
        first, norm, activation, second, last = self._decoder.output_upscaling
        wide = activation(_normal(norm, _spread(first, places.flatten(0, 2))))
        enlarged: Tensor = last(_spread(second, wide)).unflatten(0, (len(places), -1))
        return enlarged


def _rows(image: Tensor) -> Tensor:
    """``(1, E, h, w)`` to ``(1, h · w, E)``."""
    return image.flatten(2).transpose(1, 2).contiguous()


def _spread(convolution: nn.ConvTranspose2d, rows: Tensor) -> Tensor:
    """``(n, E)`` to ``(4n, F)``: each row's four pixels, row by row."""
    weight = convolution.weight.permute(2, 3, 1, 0).reshape(-1, convolution.in_channels).to(rows.dtype)
    bias = None if convolution.bias is None else convolution.bias.repeat(4).to(rows.dtype)
    return F.linear(rows, weight, bias).view(-1, convolution.out_channels)


def _normal(norm: Any, rows: Tensor) -> Tensor:
    """A layer norm over the last axis in the rows' own precision."""
    weight, bias = norm.weight.to(rows.dtype), norm.bias.to(rows.dtype)
    return F.layer_norm(rows, rows.shape[-1:], weight, bias, norm.eps)


def _heads(attention: Any, values: Tensor) -> Tensor:
    """``(P, n, H · d)`` to ``(P, H, n, d)``."""
    return values.view(*values.shape[:2], attention.num_heads, -1).transpose(1, 2)


def _by_head(attention: Any, weight: Tensor) -> Tensor:
    """A projection's weight ``(H · d, E)`` as ``(H, d, E)``."""
    return weight.reshape(attention.num_heads, -1, *weight.shape[1:])


def _attention(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    projected = attention.q_proj(query), attention.k_proj(key), attention.v_proj(value)
    asked, known, content = (_heads(attention, values) for values in projected)
    seen = F.scaled_dot_product_attention(asked, known, content)
    output: Tensor = attention.out_proj(seen.transpose(1, 2).flatten(2))
    return output


def _look_at_shared(attention: Any, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of tokens ``(P, T, E)`` to places that all prompts share: their tokens stand in one row."""
    flat = _heads(attention, attention.q_proj(query.flatten(0, 1)[None]))
    seen = F.scaled_dot_product_attention(flat, keys, values)
    output: Tensor = attention.out_proj(seen[0].transpose(0, 1).flatten(1)).view(query.shape)
    return output


def _look(attention: Any, query: Tensor, places: Tensor, coded: Tensor) -> Tensor:
    """Attention of tokens ``(P, T, E)`` to each prompt's own places ``(P, N, E)``."""
    asked = _heads(attention, attention.q_proj(query))
    heads, width = asked.shape[1], asked.shape[3]
    folded = torch.einsum("phtd,hde->phte", asked, _by_head(attention, attention.k_proj.weight)).flatten(1, 2)
    # Fused attention with so few, so wide queries is no faster, and without AMX far slower in bfloat16.
    weights = torch.bmm((folded * width**-0.5).to(coded.dtype), coded.transpose(1, 2)).softmax(dim=2)
    mean = torch.bmm(weights, places).float().view(len(query), heads, query.shape[1], -1)
    seen = torch.einsum("phte,hde->pthd", mean, _by_head(attention, attention.v_proj.weight)).flatten(2)
    output: Tensor = attention.out_proj(seen + attention.v_proj.bias)
    return output


def _scores_of_shared(attention: Any, key: Tensor, queries: Tensor) -> Tensor:
    """Scores ``(P, H, T, N)`` of tokens ``(P, T, E)`` for places that all prompts share."""
    keys = _heads(attention, attention.k_proj(key.flatten(0, 1)[None]))[0]
    scores: Tensor = keys * keys.shape[2] ** -0.5 @ queries[0].transpose(1, 2)
    return scores.view(len(scores), *key.shape[:2], -1).transpose(0, 1)


def _scores(attention: Any, key: Tensor, coded: Tensor) -> Tensor:
    """Scores ``(P, H, T, N)`` of tokens ``(P, T, E)`` for each prompt's own places."""
    keys = _heads(attention, attention.k_proj(key))
    keys = keys * keys.shape[3] ** -0.5
    folded = torch.einsum("phtd,hde->phte", keys, _by_head(attention, attention.q_proj.weight)).flatten(1, 2)
    offset = torch.einsum("phtd,hd->pht", keys, _by_head(attention, attention.q_proj.bias)).flatten(1)[:, :, None]
    scores = torch.baddbmm(offset.to(coded.dtype), folded.to(coded.dtype), coded.transpose(1, 2))
    return scores.view(*keys.shape[:3], -1)


def _told(attention: Any, scores: Tensor, value: Tensor, places: Tensor) -> Tensor:
    """Places ``(P, N, E)`` with what the tokens ``(P, T, E)`` tell them."""
    weights = scores.softmax(dim=2).to(places.dtype).flatten(1, 2)
    values = _heads(attention, attention.v_proj(value))
    output = _by_head(attention, attention.out_proj.weight.T)
    told = torch.einsum("phtd,hde->phte", values, output) + attention.out_proj.bias / attention.num_heads
    return torch.baddbmm(places, weights.transpose(1, 2), told.flatten(1, 2).to(places.dtype))
