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

_PROMPTS_AT_ONCE = {"cpu": 4}
"""Prompts that go through the transformer together. On a CPU their places (4 MB each) should stay in its cache."""


@dataclass(frozen=True)
class ImageSide:
    """What all prompts about an image share.

    Attributes:
        places: ``(1, N, E)`` image features and the code for "no mask given".
        coded: ``(1, N, E)`` the same with position code.
        keys: ``(1, H, N, d)`` of the first layer's attention from tokens to places.
        values: ``(1, H, N, d)`` likewise.
        queries: ``(1, H, N, d)`` of the first layer's attention from places to tokens.
    """

    places: Tensor
    coded: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor


def is_plain(sam: Any) -> bool:
    """Whether prompt encoder and mask decoder are segment_anything's own, down to every layer, and nothing hooks in.

    Subclasses and look-alikes may compute something else: they run their own code.
    """
    try:
        from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
        from segment_anything.modeling.common import LayerNorm2d, MLPBlock
        from segment_anything.modeling.mask_decoder import MLP
        from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
    except ImportError:
        return False
    own = {MaskDecoder, TwoWayTransformer, TwoWayAttentionBlock, Attention, MLPBlock, MLP, LayerNorm2d}
    torch_own = {nn.Linear, nn.LayerNorm, nn.Embedding, nn.ConvTranspose2d, nn.Sequential, nn.ModuleList, nn.GELU, nn.ReLU}
    decoder = sam.mask_decoder
    return (
        type(decoder) is MaskDecoder
        and type(decoder.transformer) is TwoWayTransformer
        and type(sam.prompt_encoder) is PromptEncoder
        and all(type(module) in own | torch_own and _untouched(module) for module in decoder.modules())
        and _untouched(sam.prompt_encoder)
    )


def _untouched(module: nn.Module) -> bool:
    return "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


class PlainDecoder:
    """The decoder of a model for which :func:`is_plain` holds, in its own weights.

    Args:
        decoder: ``MaskDecoder`` of segment_anything, in evaluation mode.
        code: ``(1, E, h, w)`` position code of the places.
    """

    def __init__(self, decoder: Any, code: Tensor) -> None:
        self._decoder, self._transformer = decoder, decoder.transformer
        self._grid = (code.shape[2], code.shape[3])
        self._code = _rows(code)
        self._own_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])

    def image_side(self, features: Tensor, dense: Tensor) -> ImageSide:
        """What prompts share about features ``(1, E, h, w)``; ``dense`` is the code for no mask, ``(1, E, h, w)``."""
        places = _rows(features + dense)
        coded = places + self._code
        first = self._transformer.layers[0]
        into, back = first.cross_attn_token_to_image, first.cross_attn_image_to_token
        return ImageSide(
            places=places,
            coded=coded,
            keys=_heads(into, into.k_proj(coded)),
            values=_heads(into, into.v_proj(places)),
            queries=_heads(back, back.q_proj(coded)),
        )

    def answer(self, image: ImageSide, sparse: Tensor) -> Decoded:
        """Three masks for each prompt, drawn only where they are asked for.

        Args:
            image: From :meth:`image_side`.
            sparse: ``(P, n, E)`` tokens of the prompts.
        """
        own = self._own_tokens.expand(len(sparse), -1, -1)
        prompts = torch.cat([own, sparse], dim=1)
        step = _PROMPTS_AT_ONCE.get(sparse.device.type, len(prompts))
        parts = [self._transform(image, some) for some in prompts.split(step)]
        tokens = torch.cat([part[0] for part in parts])
        places = [part[1] for part in parts]
        iou = self._decoder.iou_prediction_head(tokens[:, 0])[:, 1:]
        masks = tokens[:, 2 : 1 + self._decoder.num_mask_tokens]

        def draw(index: Tensor) -> Tensor:
            return self._draw(places, step, masks, index)

        return Decoded(draw, iou)

    def _transform(self, image: ImageSide, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``(P, T, E)`` and places ``(P, N, E)`` after the two-way transformer."""
        transformer = self._transformer
        tokens, places, coded = prompts, image.places, image.coded
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
            places = layer.norm4(_told(back, scores, tokens, places))
            coded = places + self._code
        seen = _look(transformer.final_attn_token_to_image, tokens + prompts, places, coded)
        return transformer.norm_final_attn(tokens + seen), places

    def _draw(self, places: Sequence[Tensor], step: int, masks: Tensor, index: Tensor) -> Tensor:
        """Logits ``(S, 4h, 4w)`` of the masks with these numbers among P·3: each prompt's places are enlarged once."""
        count = masks.shape[1]
        height, width = self._grid
        logits = masks.new_empty(len(index), 4 * height, 4 * width)
        prompts, which = torch.unique(index // count, return_inverse=True)
        for number, prompt in enumerate(prompts.tolist()):
            rows = torch.nonzero(which == number)[:, 0]
            wide = self._enlarged(places[prompt // step][prompt % step])
            numbers = (index[rows] % count).tolist()
            mlps = self._decoder.output_hypernetworks_mlps
            filters = torch.stack([mlps[1 + mask](masks[prompt, mask]) for mask in numbers])
            drawn = filters @ wide.T
            # The pixels of a place, two by two, and of each of those, two by two, into rows and columns.
            logits[rows] = drawn.view(-1, height, width, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, 4 * height, 4 * width)
        return logits

    def _enlarged(self, places: Tensor) -> Tensor:
        """Features of every fine pixel, ``(N · 16, E / 8)``: place, then row and column in it, then once more.

        A transposed convolution by 2 with stride 2 is a product for every place on its own.
        """
        first, norm, activation, second, last = self._decoder.output_upscaling
        wide = activation(F.layer_norm(_spread(first, places), (first.out_channels,), norm.weight, norm.bias, norm.eps))
        return last(_spread(second, wide))


def _rows(image: Tensor) -> Tensor:
    """``(1, E, h, w)`` to ``(1, h · w, E)``."""
    return image.flatten(2).transpose(1, 2).contiguous()


def _spread(convolution: nn.ConvTranspose2d, rows: Tensor) -> Tensor:
    """``(n, E)`` to ``(4n, F)``: each row's four pixels, row by row."""
    weight = convolution.weight.permute(2, 3, 1, 0).reshape(-1, convolution.in_channels)
    assert convolution.bias is not None
    return F.linear(rows, weight, convolution.bias.repeat(4)).view(-1, convolution.out_channels)


def _heads(attention: Any, values: Tensor) -> Tensor:
    """``(P, n, H · d)`` to ``(P, H, n, d)``."""
    return values.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)


def _by_head(attention: Any, weight: Tensor) -> Tensor:
    """A projection's weight ``(H · d, E)`` as ``(H, d, E)``."""
    return weight.unflatten(0, (attention.num_heads, -1))


def _attention(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    projected = attention.q_proj(query), attention.k_proj(key), attention.v_proj(value)
    seen = F.scaled_dot_product_attention(*(_heads(attention, values) for values in projected))
    return attention.out_proj(seen.transpose(1, 2).flatten(2))


def _look_at_shared(attention: Any, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of tokens ``(P, T, E)`` to places that all prompts share: their tokens stand in one row."""
    flat = _heads(attention, attention.q_proj(query.flatten(0, 1)[None]))
    seen = F.scaled_dot_product_attention(flat, keys, values)
    return attention.out_proj(seen[0].transpose(0, 1).flatten(1)).view(query.shape)


def _look(attention: Any, query: Tensor, places: Tensor, coded: Tensor) -> Tensor:
    """Attention of tokens ``(P, T, E)`` to each prompt's own places ``(P, N, E)``."""
    asked = _heads(attention, attention.q_proj(query))
    heads, width = asked.shape[1], asked.shape[3]
    folded = torch.einsum("phtd,hde->phte", asked, _by_head(attention, attention.k_proj.weight)).flatten(1, 2)
    mean = F.scaled_dot_product_attention(folded[:, None], coded[:, None], places[:, None], scale=width**-0.5)
    mean = mean[:, 0].unflatten(1, (heads, -1))
    seen = torch.einsum("phte,hde->pthd", mean, _by_head(attention, attention.v_proj.weight)).flatten(2)
    return attention.out_proj(seen + attention.v_proj.bias)


def _scores_of_shared(attention: Any, key: Tensor, queries: Tensor) -> Tensor:
    """Scores ``(P, H, T, N)`` of tokens ``(P, T, E)`` for places that all prompts share."""
    keys = _heads(attention, attention.k_proj(key.flatten(0, 1)[None]))[0]
    scores = keys * keys.shape[2] ** -0.5 @ queries[0].transpose(1, 2)
    return scores.unflatten(1, key.shape[:2]).transpose(0, 1)


def _scores(attention: Any, key: Tensor, coded: Tensor) -> Tensor:
    """Scores ``(P, H, T, N)`` of tokens ``(P, T, E)`` for each prompt's own places."""
    keys = _heads(attention, attention.k_proj(key))
    keys = keys * keys.shape[3] ** -0.5
    folded = torch.einsum("phtd,hde->phte", keys, _by_head(attention, attention.q_proj.weight)).flatten(1, 2)
    offset = torch.einsum("phtd,hd->pht", keys, _by_head(attention, attention.q_proj.bias)).flatten(1)[:, :, None]
    return torch.baddbmm(offset, folded, coded.transpose(1, 2)).unflatten(1, keys.shape[1:3])


def _told(attention: Any, scores: Tensor, value: Tensor, places: Tensor) -> Tensor:
    """Places ``(P, N, E)`` with what the tokens ``(P, T, E)`` tell them."""
    weights = scores.softmax(dim=2).flatten(1, 2)
    values = _heads(attention, attention.v_proj(value))
    output = _by_head(attention, attention.out_proj.weight.T)
    told = torch.einsum("phtd,hde->phte", values, output) + attention.out_proj.bias / attention.num_heads
    return torch.baddbmm(places, weights.transpose(1, 2), told.flatten(1, 2))
