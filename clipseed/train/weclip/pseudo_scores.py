"""From CAMs and attention of images whose classes are known to refined scores of every pixel (section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from clipseed.train.weclip.labels import refined_scores, score_maps, spread_cams
from clipseed.train.weclip.options import WeclipOptions
from clipseed.train.weclip.refining import confirmed_map, static_map


def pseudo_scores(
    cams: Sequence[Tensor],
    attention: Sequence[Tensor],
    affinity: Tensor | None,
    pixels: Tensor,
    options: WeclipOptions,
    size: tuple[int, int],
) -> list[Tensor]:
    """Refined scores of background and classes of a batch.

    Args:
        cams: ``(K_b, h, w)`` of each image.
        attention: ``(B, n, n)`` of each block, at least as many from the end as the map needs.
        affinity: ``(B, n, n)`` of the decoder for the refinement module; ``None``: the mean attention.
        pixels: The images ``(B, 3, H, W)``, in any affine scale of their colours.
        options: Constants.
        size: Of the scores.

    Returns:
        ``(1 + K_b, H, W)`` for each image.
    """
    if affinity is None:
        spreading = static_map(attention[-options.static_layers :])
    else:
        spreading = confirmed_map(affinity, attention[-options.rfm_layers :], options.rfm_filter)
    scores = [score_maps(maps, size) for maps in spread_cams(cams, spreading, options.caa)]
    return refined_scores(scores, pixels, options.par_iterations)
