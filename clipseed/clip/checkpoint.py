"""CLIP weights from files, and what the files themselves tell about the model they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from clipseed.errors import WeightsError
from clipseed.weights import read_weights

Activation = Literal["quickgelu", "gelu"]
_INSIDE = ("encoder.", "clip.")
"""Prefixes under which checkpoints of segmenters keep the whole CLIP that they were trained on (WeCLIP's do)."""
_BOOKKEEPING = {"input_resolution", "context_length", "vocab_size", "attn_mask", "visual.input_resolution"}


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of one weights file and what the file itself tells about the model they belong to.

    Attributes:
        state: State dict with open_clip's (= OpenAI's) names.
        activation: ``quickgelu`` when the file can only be OpenAI's; ``None`` when it does not tell.
        config: Content of an ``open_clip_config.json`` beside the file, if any.
        sha256: Digest of the file's bytes.
    """

    path: Path
    state: dict[str, Tensor]
    activation: Activation | None
    config: dict[str, Any] | None
    sha256: str


def read_checkpoint(path: Path) -> Checkpoint:
    """Read ``.safetensors``, ``.npz``, a ``torch.save`` file, or OpenAI's TorchScript archive.

    Args:
        path: The file, or a folder holding ``open_clip_config.json`` and one weights file.

    Raises:
        WeightsError: missing, damaged, of another kind, or containing anything but plain tensors.
    """
    read = read_weights(_file_in(path) if path.is_dir() else path)
    state = {key: value for key, value in clip_state(read.state).items() if key not in _BOOKKEEPING}
    if not state:
        raise WeightsError(f"{read.path}: holds no tensors")
    activation: Activation | None = "quickgelu" if read.scripted or _is_openai_mixed_precision(state) else None
    return Checkpoint(read.path, state, activation, _sidecar(read.path), read.sha256)


def clip_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's tensors under OpenAI's names: all of a file, or those of the CLIP inside a segmenter's checkpoint.

    Tables of positions that such a checkpoint holds for one image's size are left out.
    """
    for prefix in _INSIDE:
        if f"{prefix}visual.conv1.weight" in state:
            inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            table = "visual.positional_embedding"
            return {key: value for key, value in inside.items() if key == table or not key.startswith(table)}
    return dict(state)


def _file_in(folder: Path) -> Path:
    for pattern in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "*.safetensors", "*.bin", "*.pt"):
        if found := sorted(folder.glob(pattern)):
            return found[0]
    raise WeightsError(f"{folder}: no weights file in this folder (looked for *.safetensors, *.bin, *.pt)")


def _sidecar(path: Path) -> dict[str, Any] | None:
    config = path.parent / "open_clip_config.json"
    if not config.is_file():
        return None
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{config}: not valid JSON ({error})") from error
    return data if isinstance(data, dict) and isinstance(data.get("model_cfg"), dict) else None


def _is_openai_mixed_precision(state: dict[str, Tensor]) -> bool:
    """OpenAI's checkpoints keep linear weights in half precision and everything else in single.

    That survives conversion to other file types and to float32: the linear weights stay exact in half precision, the
    embeddings and norms do not. No other published CLIP has this pattern.
    """

    def exact(key: str) -> bool | None:
        value = state.get(key)
        return None if value is None else bool((value.to(torch.float16).to(value.dtype) == value).all())

    linear = [exact(f"visual.transformer.resblocks.0.{key}") for key in ("attn.in_proj_weight", "mlp.c_fc.weight")]
    others = [exact("visual.positional_embedding"), exact("visual.class_embedding")]
    single = [state[key].dtype == torch.float32 for key in ("visual.class_embedding",) if key in state]
    return linear == [True, True] and others == [False, False] and all(single)
