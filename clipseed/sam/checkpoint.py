"""SAM weights from files, and the configuration that a file may state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from clipseed.errors import WeightsError
from clipseed.weights import read_weights

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
    read = read_weights(path)
    return SamCheckpoint(path, read.state, read.texts.get(CONFIG_KEY), read.sha256)
