"""The class tokens' texts: background first, then the classes, one unit vector each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.clip.text import TextBank
from clipseed.data.vocabulary import Vocabulary
from clipseed.errors import InputError


def tokens_of(bank: TextBank) -> Tensor:
    """Texts ``(1 + K, D)`` of length 1: the background is the mean of all words that compete with the classes.

    Raises:
        InputError: there is no such word.
    """
    if not len(bank.background):
        raise InputError("no words for the background: leave --background none out, or name some")
    background = F.normalize(bank.background.mean(dim=0, keepdim=True), dim=-1)
    return torch.cat([background, bank.classes]).float().cpu().clone()


def random_tokens(count: int, width: int, seed: int) -> Tensor:
    """Random texts ``(count, width)`` of length 1: what is learned with them is not owed to language."""
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def read_tokens(path: Path, vocabulary: Vocabulary) -> Tensor:
    """Texts ``(1 + K, D)`` out of an ``.npy`` file, brought to length 1.

    Raises:
        InputError: no such file, no floating array, or another number of rows than classes and background.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"--text {path}: no such file (clip, random, or an .npy file)") from error
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"--text {path}: no .npy file of numbers ({error})") from error
    rows = len(vocabulary.classes) + 1
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind != "f" or values.shape[0] != rows:
        shape = getattr(values, "shape", ())
        raise InputError(
            f"--text {path}: {tuple(shape)}, but {rows} rows are needed: the background first, then the "
            f"{rows - 1} classes of {vocabulary.name}, one feature of floating numbers each"
        )
    text = torch.from_numpy(values.astype(np.float32))
    if not torch.isfinite(text).all() or (text.norm(dim=-1) == 0).any():
        raise InputError(f"--text {path}: holds NaN, infinity, or a row of zeros")
    return F.normalize(text, dim=-1)
