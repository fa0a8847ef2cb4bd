"""Maps to the unary of a CRF, and its posterior to a label mask (CLIP-ES, section 9 of its supplement)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipseed.pseudo.background import Background
from clipseed.pseudo.pixels import Classes, PixelLabels, label_scores
from clipseed.refine.crf import clip_es_unary
from clipseed.types import LabelMask

Floats = npt.NDArray[np.float32]


def maps_unary(maps: Floats, alpha: float = 1.0, *, released: bool = False) -> Floats:
    """Negative log probabilities ``(1 + K, H, W)`` of background and classes.

    Args:
        maps: Class scores ``(K, H, W)`` in [0, 1].
        alpha: Exponent of the background's score ``(1 - max) ** alpha``.
        released: In half precision, as the released code.
    """
    scores = maps.astype(np.float16) if released else maps
    return clip_es_unary(Background("power", alpha).add_to(scores), released=released)


def posterior_labels(posterior: Floats, classes: Classes, confidence: float | None = None) -> LabelMask:
    """The most probable label of each pixel: ``(H, W)`` uint8, 0 background, class index + 1.

    Args:
        posterior: Probabilities ``(1 + K, H, W)``, background first.
        classes: The K class indices.
        confidence: Pixels whose largest probability is below become 255; ``None``: none.
    """
    return posterior_pixels(posterior, classes).sure(confidence)


def posterior_pixels(posterior: Floats, classes: Classes) -> PixelLabels:
    """The same with how probable each label is."""
    return label_scores(posterior, classes, Background("given"))
