"""Small SAMs: random ones, ones whose masks are usable, and factories that give them to the program."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clipseed.sam.architecture import SamConfig, build_sam
from clipseed.sam.model_backend import ModelBackend, SamInfo

CPU = torch.device("cpu")
INFO = SamInfo("custom", None, None)
TOY = SamConfig(
    image_size=96,
    patch_size=8,
    embed_dim=24,
    depth=3,
    heads=3,
    mlp_ratio=2.0,
    window_size=5,
    global_attn_indexes=(1, 2),
    out_chans=32,
    mask_in_chans=8,
    decoder_depth=1,
    decoder_heads=2,
    decoder_mlp_dim=40,
    iou_head_depth=2,
    iou_head_hidden_dim=12,
)
SMALL = replace(TOY, out_chans=256, decoder_heads=8)
"""As wide as published decoders, so that its sizes can be read off its tensors."""
SWAY = 0.1


def tiny_sam_config(image_size: int = 64, width: int = 64) -> SamConfig:
    return SamConfig(
        image_size=image_size,
        embed_dim=32,
        depth=2,
        heads=2,
        window_size=3,
        global_attn_indexes=(1,),
        out_chans=width,
        decoder_heads=4,
        decoder_mlp_dim=32,
        iou_head_hidden_dim=16,
    )


def tiny_sam(image_size: int = 64, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build_sam(tiny_sam_config(image_size))


class NestedBlobs(nn.Module):
    """Three nested blobs around each point, their size swaying with the image's features where the point is."""

    def __init__(self, sway: float = 0.0) -> None:
        super().__init__()
        self.sway = sway

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        code = sparse_prompt_embeddings[:, 0]
        width = code.shape[1]
        closeness = torch.einsum("pc,chw->phw", code, image_pe[0]) / (width / 2)
        closeness = nn.functional.interpolate(closeness[:, None], scale_factor=4.0, mode="bilinear")
        shift = self.sway * torch.tanh(code @ image_embeddings.mean(dim=(0, 2, 3)))
        limits = torch.tensor([0.75, 0.5, 0.2]) + shift[:, None]
        logits = 200 * (closeness - limits[:, :, None, None])
        return logits, torch.tensor([0.90, 0.93, 0.97]).repeat(len(code), 1) + shift[:, None] * 0.3


def blob_sam(image_size: int = 64, seed: int = 0, sway: float = 0.0) -> Any:
    sam = tiny_sam(image_size, seed)
    for embedding in sam.prompt_encoder.point_embeddings:
        nn.init.zeros_(embedding.weight)
    sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix *= 0.3
    sam.mask_decoder = NestedBlobs(sway)
    return sam


def backend_of(sam: Any) -> ModelBackend:
    return ModelBackend(sam, CPU, torch.float32, INFO)


def toy_sam(config: SamConfig = TOY, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sam = build_sam(config)
    with torch.no_grad():  # position tables start as zeros, which would hide a mistake in reading them
        for value in sam.parameters():
            value.add_(0.02 * torch.randn_like(value))
    return sam


# Factories for --sam-factory ------------------------------------------------------------------------------------------


def blobs(checkpoint: str | None, device: str) -> Any:
    """A model whose masks are usable and depend on the image."""
    return blob_sam(sway=SWAY)


def slow_blobs(checkpoint: str | None, device: str) -> Any:
    sam = blob_sam(sway=SWAY)
    sam.image_encoder.register_forward_hook(lambda *words: time.sleep(0.1))
    return sam


def moody(checkpoint: str | None, device: str) -> Any:
    """Fails on dark images."""
    sam = blob_sam(sway=SWAY)

    def refuse(module: Any, inputs: tuple[Tensor]) -> None:
        if float(inputs[0].mean()) < -1:
            raise ValueError("too dark to see")

    sam.image_encoder.register_forward_pre_hook(refuse)
    return sam


class CrampedBlobs(NestedBlobs):
    """Room for four points at once."""

    def forward(self, image_embeddings: Tensor, image_pe: Tensor, sparse_prompt_embeddings: Tensor,
                dense_prompt_embeddings: Tensor, multimask_output: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        if len(sparse_prompt_embeddings) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super().forward(
            image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output
        )


def cramped(checkpoint: str | None, device: str) -> Any:
    sam = blob_sam(sway=SWAY)
    sam.mask_decoder = CrampedBlobs(SWAY)
    return sam
