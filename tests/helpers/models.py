"""Tiny seeded CLIP models in open_clip's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch


def tiny_config(**vision: Any) -> dict[str, Any]:
    """Configuration of an open_clip model small enough to build in milliseconds."""
    return {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "patch_size": 16, "head_width": 32, **vision},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    }


def tiny_model(config: dict[str, Any] | None = None, *, quick_gelu: bool = True, seed: int = 0) -> torch.nn.Module:
    """A seeded open_clip model whose attention and logits are not uniform."""
    from open_clip.model import CLIP

    torch.manual_seed(seed)
    model = CLIP(**(config or tiny_config()), quick_gelu=quick_gelu)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name == "logit_scale":
                value.fill_(3.0)
            elif value.ndim >= 2:
                value.normal_(std=1.2 * value.shape[-1] ** -0.5)
            else:
                value.add_(0.1 * torch.randn_like(value))
    return model.eval()


def save_npz(path: Path, state: dict[str, torch.Tensor]) -> Path:
    np.savez(path, **{key: value.numpy() for key, value in state.items()})
    return path
