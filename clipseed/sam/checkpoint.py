"""Reading SAM weights from files without ever running code that a file brings along."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipseed.clip.checkpoint import file_sha256, read_checkpoint
from clipseed.errors import WeightsError

CONFIG_KEY = "config"
"""Name of the array (``.npz``) or metadata entry (``.safetensors``) that holds the configuration as JSON text."""


@dataclass(frozen=True)
class SamCheckpoint:
    """Tensors of one weights file.

    Attributes:
        state: State dict with Meta's names.
        config: The model's configuration as JSON text, where the file gives it.
        sha256: Digest of the file's bytes.
    """

    path: Path
    state: dict[str, Tensor]
    config: str | None
    sha256: str


def read_sam_checkpoint(path: Path) -> SamCheckpoint:
    """Read a ``torch.save`` file (``.pth``), ``.safetensors`` or ``.npz``.

    Raises:
        WeightsError: missing, damaged, of another kind, or containing anything but plain tensors.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such SAM checkpoint file (see --checkpoint)")
    if path.suffix == ".npz":
        state, config = _read_arrays(path)
        return SamCheckpoint(path, state, config, file_sha256(path))
    checkpoint = read_checkpoint(path)
    config = _safetensors_config(path) if path.suffix == ".safetensors" else None
    return SamCheckpoint(path, checkpoint.state, config, checkpoint.sha256)


def _read_arrays(path: Path) -> tuple[dict[str, Tensor], str | None]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            config = str(arrays[CONFIG_KEY]) if CONFIG_KEY in arrays.files else None
            state = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != CONFIG_KEY}
    except Exception as error:  # numpy and zipfile raise errors of many kinds on damaged files
        raise WeightsError(f"{path}: not a readable weights file ({type(error).__name__}: {error})") from error
    if not state:
        raise WeightsError(f"{path}: holds no tensors")
    return state, config


def _safetensors_config(path: Path) -> str | None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    return metadata.get(CONFIG_KEY)
