"""Images to test with."""

from __future__ import annotations

import numpy as np
from PIL import Image


def photo(seed: int, height: int, width: int) -> Image.Image:
    """A smooth colourful image."""
    rng = np.random.default_rng(seed)
    knots = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return knots.resize((width, height), Image.Resampling.BICUBIC)
