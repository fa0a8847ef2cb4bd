"""The tiny SAM before training: its sizes, and a start from which a short training is enough.

A SAM of random numbers needs thousands of steps to notice where its prompt is, and as many to draw anything finer than
patches. Here attention starts as a similarity, both of SAM's position codes start equal, and the colours of a patch's
4 x 4 cells have a way from the pixels to the masks. Cells are the pixels of the decoder's low-resolution masks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipseed.sam.architecture import SamConfig, build_sam

CONFIG = SamConfig(
    image_size=192,
    patch_size=8,
    embed_dim=128,
    depth=6,
    heads=2,
    mlp_ratio=2.0,
    window_size=8,
    global_attn_indexes=(2, 5),
    out_chans=96,
    decoder_heads=2,
    decoder_mlp_dim=192,
    iou_head_hidden_dim=96,
)
_COLOURS = 48
"""Channels that start as the colours of a patch's 4 x 4 cells."""
_GAIN = 3.0
"""The least whole number for which nine of ten good wholes have a stability score of 0.95 or above (docs/toy.md)."""


def build(config: SamConfig = CONFIG) -> Any:
    """The untrained model, always the same. At least 48 channels wide everywhere."""
    torch.manual_seed(0)
    sam = build_sam(config)
    with torch.no_grad():
        _align_attention(sam, config)
        _lead_colours_through(sam, config)
    return sam


def _align_attention(sam: Any, config: SamConfig) -> None:
    """Equal queries and keys; equal position codes; small codes of the kinds of tokens."""
    code = sam.prompt_encoder.get_dense_pe()[0].permute(1, 2, 0)
    free = config.embed_dim - _COLOURS
    repeats = -(-free // code.shape[-1])
    sam.image_encoder.pos_embed[0, :, :, _COLOURS:] = 0.5 * code.repeat(1, 1, repeats)[..., :free]
    for block in sam.image_encoder.blocks:
        weight = block.attn.qkv.weight
        weight[config.embed_dim : 2 * config.embed_dim] = weight[: config.embed_dim]
    tokens = [*sam.prompt_encoder.point_embeddings, sam.prompt_encoder.not_a_point_embed]
    for embedding in (*tokens, sam.mask_decoder.iou_token, sam.mask_decoder.mask_tokens):
        embedding.weight.mul_(0.2)
    decoder = sam.mask_decoder.transformer
    crossing = [decoder.final_attn_token_to_image]
    for layer in decoder.layers:
        crossing += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in crossing:
        torch.nn.init.orthogonal_(attention.q_proj.weight, gain=2.0)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        torch.nn.init.orthogonal_(attention.v_proj.weight)
        attention.out_proj.weight.copy_(attention.v_proj.weight.T)


def _lead_colours_through(sam: Any, config: SamConfig) -> None:
    """Let the first channels be the mean colours of a patch's cells, and the upscaling hand each cell its own."""
    encoder, cell = sam.image_encoder, config.patch_size // 4
    patch = encoder.patch_embed.proj
    patch.weight[:_COLOURS] = 0
    patch.bias[:_COLOURS] = 0
    for row, column, colour in np.ndindex(4, 4, 3):
        rows, columns = slice(cell * row, cell * (row + 1)), slice(cell * column, cell * (column + 1))
        patch.weight[_channel(row, column, colour), colour, rows, columns] = 1 / cell**2
    for block in encoder.blocks:
        block.attn.proj.weight.mul_(0.3)
        block.mlp.lin2.weight.mul_(0.3)
    narrow, spread = encoder.neck[0], encoder.neck[2]
    narrow.weight[:_COLOURS] = 0
    narrow.weight[range(_COLOURS), range(_COLOURS)] = 1
    spread.weight.mul_(0.1)
    spread.weight[range(config.out_chans), range(config.out_chans), 1, 1] += 1
    first, second = sam.mask_decoder.output_upscaling[0], sam.mask_decoder.output_upscaling[3]
    signs = ((0, 1.0), (12, -1.0)) if first.weight.shape[1] >= 24 else ((0, 1.0),)
    first.weight.mul_(0.5)
    second.weight.mul_(0.5)
    for row, column, colour in np.ndindex(4, 4, 3):
        middle = _channel(row % 2, column % 2, colour, 2)
        for offset, sign in signs:  # both signs, since the activation between them cuts one off
            first.weight[_channel(row, column, colour), middle + offset, row // 2, column // 2] += sign
    for row, column, colour in np.ndindex(2, 2, 3):
        for offset, sign in signs:
            second.weight[_channel(row, column, colour, 2) + offset, colour, row, column] += sign
            if second.weight.shape[1] > 5:
                second.weight[_channel(row, column, colour, 2) + offset, colour + 3, row, column] -= sign


def _channel(row: int, column: int, colour: int, width: int = 4) -> int:
    return (row * width + column) * 3 + colour


class CellHead(torch.nn.Linear):
    """Reads features of the 4 x 4 cells of a patch off its embedding. Only training has it."""

    def __init__(self, embedding: int, features: int = 16) -> None:
        super().__init__(embedding, 16 * features)
        with torch.no_grad():
            self.weight.mul_(0.3)
            for row, column, colour in np.ndindex(4, 4, 3):
                cell = (row * 4 + column) * features
                self.weight[cell + colour, _channel(row, column, colour)] += 1

    def forward(self, embedding: Tensor) -> Tensor:
        """``(E, g, g)`` to ``(4 g, 4 g, features)``."""
        grid = embedding.shape[-1]
        tiles = super().forward(embedding.permute(1, 2, 0)).view(grid, grid, 4, 4, -1)
        return tiles.permute(0, 2, 1, 3, 4).reshape(4 * grid, 4 * grid, -1)


def sharpen(sam: Any, gain: float = _GAIN) -> Any:
    """Multiply the mask logits, in place. Masks stay as they are, their stability scores rise.

    SAM's stability score compares the masks at logits of 1 and -1; what it says depends on the scale of logits, which
    after a short training is smaller than that of SAM.
    """
    with torch.no_grad():
        for network in sam.mask_decoder.output_hypernetworks_mlps:
            network.layers[-1].weight.mul_(gain)
            network.layers[-1].bias.mul_(gain)
    return sam
