"""SAM models of any size: what describes one, building it, and small models as arrays without pickles."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from clipseed.errors import UsageError, WeightsError
from clipseed.sam.checkpoint import CONFIG_KEY, SamCheckpoint, read_sam_checkpoint
from clipseed.weights import check_fit, count_blocks, take_over

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
_DECODER_WIDTH = 256
"""Width of every published decoder. Their head count, 8, is in no tensor's shape."""


@dataclass(frozen=True)
class SamConfig:
    """Sizes of a SAM model; the defaults are those of the published ViT-B.

    Attributes:
        image_size: Side of the square that images are fitted into, a multiple of ``patch_size``.
        embed_dim: Width of the image encoder, a multiple of ``heads``.
        window_size: Side, in patches, of the windows of all blocks but ``global_attn_indexes``; 0 is global everywhere.
        out_chans: Width E of embeddings, prompts and decoder; a multiple of 8, and E/2 one of ``decoder_heads``.
        mask_in_chans: Hidden channels of the mask prompt's encoder.
    """

    image_size: int = 1024
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    window_size: int = 14
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)
    out_chans: int = _DECODER_WIDTH
    mask_in_chans: int = 16
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256


SIZES = {
    "vit_b": SamConfig(),
    "vit_l": SamConfig(embed_dim=1024, depth=24, heads=16, global_attn_indexes=(5, 11, 17, 23)),
    "vit_h": SamConfig(embed_dim=1280, depth=32, heads=16, global_attn_indexes=(7, 15, 23, 31)),
}


def size_name(config: SamConfig) -> str:
    """``vit_b``, ``vit_l``, ``vit_h``, or ``custom``."""
    return next((name for name, size in SIZES.items() if size == config), "custom")


def build_sam(config: SamConfig) -> Sam:
    """A freshly initialised model in float32 on the CPU, in evaluation mode; seed torch before.

    Raises:
        UsageError: segment_anything is not installed.
    """
    try:
        from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
    except ImportError as error:
        raise UsageError("SAM needs the package segment-anything: pip install 'clipseed[sam]'") from error

    grid = config.image_size // config.patch_size
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            out_chans=config.out_chans,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=config.window_size,
            global_attn_indexes=config.global_attn_indexes,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=config.out_chans,
            image_embedding_size=(grid, grid),
            input_image_size=(config.image_size, config.image_size),
            mask_in_chans=config.mask_in_chans,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=config.out_chans,
            transformer=TwoWayTransformer(
                depth=config.decoder_depth,
                embedding_dim=config.out_chans,
                num_heads=config.decoder_heads,
                mlp_dim=config.decoder_mlp_dim,
            ),
            iou_head_depth=config.iou_head_depth,
            iou_head_hidden_dim=config.iou_head_hidden_dim,
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )
    return sam.eval()


def save_sam(path: str | Path, sam: Sam, config: SamConfig) -> None:
    """Write a model as ``.npz``: tensors in half precision, and the configuration as JSON text. No pickles.

    Raises:
        WeightsError: a weight does not fit into half precision.
    """
    arrays: dict[str, Any] = {}
    for key, value in sam.state_dict().items():
        half = value.detach().cpu().half()
        if not torch.isfinite(half).all():
            raise WeightsError(f"{path}: tensor {key!r} does not fit into half precision")
        arrays[key] = half.numpy()
    arrays[CONFIG_KEY] = np.array(json.dumps(asdict(config)))
    np.savez_compressed(path, **arrays)


def load_sam(path: str | Path) -> Sam:
    """The model of a checkpoint file, in float32 on the CPU; see :func:`assemble`."""
    return assemble(read_sam_checkpoint(Path(path)))[0]


def assemble(checkpoint: SamCheckpoint) -> tuple[Sam, SamConfig]:
    """Build the model that a checkpoint's tensors belong to, in float32 on the CPU, frozen.

    Raises:
        WeightsError: not a SAM, or tensors are missing, left over, of another shape, or not finite.
        UsageError: segment_anything is not installed.
    """
    config = stated_config(checkpoint) or inferred_config(checkpoint)
    try:
        with torch.device("meta"):
            sam = build_sam(config)
    except (TypeError, ValueError, ZeroDivisionError, AssertionError, RuntimeError) as error:
        raise WeightsError(f"{checkpoint.path}: its configuration describes no possible SAM ({error})") from error
    state = {key: value.float() for key, value in checkpoint.state.items()}
    check_fit(state, sam.state_dict(), checkpoint.path, "fetch the file again")
    take_over(sam, state)
    for name, values in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):  # which checkpoints do not hold
        sam.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
    return sam, config


def stated_config(checkpoint: SamCheckpoint) -> SamConfig | None:
    """The configuration that a file itself gives, as :func:`save_sam` writes it.

    Raises:
        WeightsError: it is not one.
    """
    if checkpoint.config is None:
        return None
    names = {item.name for item in fields(SamConfig)}
    try:
        stated = json.loads(checkpoint.config)
        if unknown := sorted(stated.keys() - names):
            raise WeightsError(f"{checkpoint.path}: unknown sizes in its configuration: {', '.join(unknown)}")
        config = SamConfig(**stated)
        return replace(config, global_attn_indexes=tuple(config.global_attn_indexes))
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{checkpoint.path}: its configuration is not readable ({error})") from error


def inferred_config(checkpoint: SamCheckpoint) -> SamConfig:
    """Sizes of a SAM in Meta's layout, read off the shapes of its tensors.

    A block's relative position table is ``(2 side - 1, width of a head)``, with ``side`` that of its window: that
    gives heads, windows and the blocks without windows. The decoder's heads are in no shape, so its width must be the
    published one.

    Raises:
        WeightsError: not such a checkpoint.
    """
    state, path = checkpoint.state, checkpoint.path
    _refuse_relatives(state, path)
    try:
        position = state["image_encoder.pos_embed"]
        grid, embed_dim = position.shape[1], position.shape[3]
        patch = state["image_encoder.patch_embed.proj.weight"].shape[-1]
        depth = count_blocks(state, "image_encoder.blocks.")
        tables = [state[f"image_encoder.blocks.{index}.attn.rel_pos_h"] for index in range(depth)]
        sides = [(table.shape[0] + 1) // 2 for table in tables]
        windows = sorted({side for side in sides if side != grid})
        iou_layers = count_blocks(state, "mask_decoder.iou_prediction_head.layers.")
        config = SamConfig(
            image_size=grid * patch,
            patch_size=patch,
            embed_dim=embed_dim,
            depth=depth,
            heads=embed_dim // tables[0].shape[1],
            mlp_ratio=state["image_encoder.blocks.0.mlp.lin1.weight"].shape[0] / embed_dim,
            window_size=windows[0] if windows else 0,
            global_attn_indexes=tuple(index for index, side in enumerate(sides) if side == grid) if windows else (),
            out_chans=state["image_encoder.neck.0.weight"].shape[0],
            mask_in_chans=state["prompt_encoder.mask_downscaling.3.weight"].shape[0],
            decoder_depth=count_blocks(state, "mask_decoder.transformer.layers."),
            decoder_mlp_dim=state["mask_decoder.transformer.layers.0.mlp.lin1.weight"].shape[0],
            iou_head_depth=iou_layers,
            iou_head_hidden_dim=state["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0],
        )
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise WeightsError(f"{path}: a SAM checkpoint in Meta's layout with parts missing ({error})") from error
    if config.out_chans != _DECODER_WIDTH:
        raise WeightsError(
            f"{path}: a SAM with a decoder {config.out_chans} wide; its head count is in no tensor, so the file must "
            "state its configuration (clipseed.sam.architecture.save_sam writes it)"
        )
    return config


def _refuse_relatives(state: dict[str, Tensor], path: Path) -> None:
    """Say what a file is when it is not a plain SAM but something that users take for one."""
    if any(key.startswith("visual.") for key in state) or "logit_scale" in state:
        raise WeightsError(f"{path}: a CLIP checkpoint, not a SAM; give it with --weights")
    if any(key.startswith("image_encoder.trunk.") or key.startswith("sam_mask_decoder.") for key in state):
        raise WeightsError(f"{path}: a SAM 2 checkpoint; use --sam-factory MODULE:FUNCTION with its own predictor")
    if any(key.startswith("mask_decoder.hf_") for key in state):
        raise WeightsError(f"{path}: an HQ-SAM checkpoint; use --sam-factory MODULE:FUNCTION with its own predictor")
    if "image_encoder.patch_embed.seq.0.c.weight" in state:
        raise WeightsError(f"{path}: a MobileSAM checkpoint; use --sam-factory MODULE:FUNCTION with its own predictor")
    parts = ("image_encoder.", "prompt_encoder.", "mask_decoder.")
    if not all(any(key.startswith(part) for key in state) for part in parts):
        raise WeightsError(
            f"{path}: not a SAM checkpoint (no tensors of an image encoder, a prompt encoder and a mask decoder)"
        )
