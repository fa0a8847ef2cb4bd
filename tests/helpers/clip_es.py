"""CLIP-ES's golden models and images, ready to compute with."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from clipseed.clip import FrozenClip
from clipseed.clip.text import TextBank
from clipseed.data import load_vocabulary
from clipseed.data.images import patch_grid, resize_to_grid, to_rgb

from helpers.golden import CLIP_ES_DATA, vocabulary


@lru_cache
def load_set(folder: str) -> tuple[FrozenClip, TextBank]:
    weights = CLIP_ES_DATA / folder / "weights.npz"
    clip = FrozenClip.load(weights=weights, device="cpu", precision="fp32", released_rounding=True)
    return clip, clip.encode_text(load_vocabulary(vocabulary(folder)))


def pixels_of(arrays: dict[str, np.ndarray], patch: int = 16) -> tuple[torch.Tensor, tuple[int, int]]:
    image = to_rgb(Image.fromarray(arrays["image"]))
    grid = patch_grid(image.height, image.width, patch)
    return torch.from_numpy(resize_to_grid(image, grid, patch).copy()).permute(2, 0, 1)[None], grid
