"""WeCLIP's golden model and arrays, ready to compute with."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor

from clipseed.clip.checkpoint import clip_state
from clipseed.clip.text import TextBank
from clipseed.clip.vision import VisionTower, tower_from
from clipseed.train.weclip.decoder import Decoder
from clipseed.train.weclip.released import decoder_of, decoder_state

from helpers.golden import WECLIP_DATA, arrays

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


TINY = ["train", "weclip", "--dataset", "toy", "--split", "train", "--limit", "12", "--device", "cpu", "--crop", "64",
        "--width", "16", "--heads", "2", "--blocks", "1", "--par-iterations", "2", "--steps", "6", "-q"]  # fmt: skip
"""The command line that trains a segmenter in seconds; ``--out`` is to be added."""


def stored(name: str) -> dict[str, np.ndarray]:
    return arrays(WECLIP_DATA / f"{name}.npz")


def tensor(name: str, key: str) -> Tensor:
    return torch.from_numpy(stored(name)[key])


@lru_cache
def weights() -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in stored("weights").items()}


@lru_cache
def tower() -> VisionTower:
    """The frozen tower, with ImageNet's statistics as its own."""
    state = {key.removeprefix("visual."): value for key, value in clip_state(weights()).items() if "visual" in key}
    width, _, patch, _ = state["conv1.weight"].shape
    side = math.isqrt(len(state["positional_embedding"]) - 1)
    layers = len({key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")})
    visual = VisionTransformer(
        side * patch, patch, width, layers, int(weights()["clip_heads"]), 4, output_dim=state["proj"].shape[1],
        act_layer=QuickGELU,
    )  # fmt: skip
    visual.load_state_dict(state)
    return tower_from(visual, *IMAGENET, torch.device("cpu"), torch.float32)


@lru_cache
def text() -> TextBank:
    scale = float(weights()["clip.logit_scale"].exp())
    return TextBank(weights()["fg_text_features"], weights()["bg_text_features"], scale)


def decoder() -> Decoder:
    """A new one each time: tests train it."""
    state = decoder_state(weights(), Path("weights.npz"))
    return decoder_of(state, Path("weights.npz"), int(weights()["dec_heads"])).eval()


def labels_of(onehot: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(int(k) for k in np.flatnonzero(row)) for row in onehot]
