"""From what the frozen CLIP saw of images whose classes are known to refined scores of every pixel (section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from clipseed.clip.text import TextBank
from clipseed.clip.vision import VisionTower
from clipseed.train.weclip.frozen import Sight, initial_cams
from clipseed.train.weclip.labels import refined_scores, score_maps, spread_cams
from clipseed.train.weclip.options import WeclipOptions
from clipseed.train.weclip.refining import confirmed_map, static_map


def pseudo_scores(
    tower: VisionTower,
    text: TextBank,
    sight: Sight,
    affinity: Tensor | None,
    pixels: Tensor,
    labels: Sequence[Sequence[int]],
    options: WeclipOptions,
    size: tuple[int, int],
) -> tuple[list[Tensor], Tensor]:
    """Refined scores of background and classes of a batch whose labels are known.

    Args:
        tower: The frozen tower.
        text: Prototypes of the vocabulary.
        sight: What the tower saw, with its last block and the attention of as many blocks as the map needs.
        affinity: ``(B, n, n)`` of the decoder for the refinement module; ``None``: the mean attention.
        pixels: The images ``(B, 3, h, w)``, in any affine scale of their colours.
        labels: Class indices of each image.
        options: Constants.
        size: Of the scores.

    Returns:
        ``(1 + K_b, H, W)`` for each image, and the probability ``(P,)`` of each (image, class) pair.
    """
    cams, probability = initial_cams(tower, text, sight, labels, released=options.released)
    if affinity is None:
        spreading = static_map(sight.attention)
    else:
        spreading = confirmed_map(affinity, sight.attention, options.rfm_filter)
    scores = [score_maps(maps, size) for maps in spread_cams(cams, spreading, options.caa)]
    return refined_scores(scores, pixels, options.par_iterations), probability
