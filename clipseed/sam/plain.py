"""Which models are segment_anything's own down to every layer, so that faster programs for the same numbers hold."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import nn

from clipseed.sam.options import LEVELS

_LAYERS = {
    nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.LayerNorm, nn.Embedding, nn.Sequential, nn.ModuleList, nn.GELU, nn.ReLU
}  # fmt: skip


def has_plain_encoder(sam: Any) -> bool:
    """Whether the image encoder is ``ImageEncoderViT`` and nothing in it was exchanged or hooked into.

    Subclasses and look-alikes may compute something else: they run their own code.
    """
    try:
        from segment_anything.modeling import ImageEncoderViT
        from segment_anything.modeling.common import LayerNorm2d, MLPBlock
        from segment_anything.modeling.image_encoder import Attention, Block, PatchEmbed
    except ImportError:
        return False
    own = {ImageEncoderViT, Block, Attention, PatchEmbed, MLPBlock, LayerNorm2d}
    return type(sam.image_encoder) is ImageEncoderViT and _made_of(sam.image_encoder, own)


def has_plain_decoder(sam: Any) -> bool:
    """Likewise for prompt encoder and mask decoder, with three masks for each prompt."""
    try:
        from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
        from segment_anything.modeling.common import LayerNorm2d, MLPBlock
        from segment_anything.modeling.mask_decoder import MLP
        from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
        from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
    except ImportError:
        return False
    own = {MaskDecoder, TwoWayTransformer, TwoWayAttentionBlock, Attention, MLPBlock, MLP, LayerNorm2d}
    prompts = {PromptEncoder, PositionEmbeddingRandom, LayerNorm2d}
    decoder = sam.mask_decoder
    return (
        type(decoder) is MaskDecoder
        and type(decoder.transformer) is TwoWayTransformer
        and decoder.num_multimask_outputs == LEVELS
        and type(sam.prompt_encoder) is PromptEncoder
        and _made_of(decoder, own)
        and _made_of(sam.prompt_encoder, prompts)
    )


def _made_of(module: nn.Module, own: Set[type[nn.Module]]) -> bool:
    known = own | _LAYERS
    return not any(
        type(part) not in known or "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks
        for part in module.modules()
    )
