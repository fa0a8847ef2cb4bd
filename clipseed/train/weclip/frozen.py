"""What the frozen CLIP gives for a batch: tokens for the decoder, attention to spread along, and CAMs.

Shapes: B images, n = h * w patches, D width of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipseed.cam.gradcam import LastBlock, gradcam, normalize, pair_index, run_last_block
from clipseed.clip.text import TextBank, present_mask
from clipseed.clip.vision import VisionTower
from clipseed.defaults import PixelStatistics

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Sight:
    """One forward pass of the frozen tower.

    Attributes:
        levels: Patch tokens ``(B, n, D)`` behind every block but the last.
        grid: ``(h, w)``.
        attention: Attention between patches ``(B, n, n)``, averaged over heads, of the blocks from the end that were
            asked for; prefix tokens are cut off, so rows do not sum to 1.
        last: The last block's forward pass; ``None`` where it was not asked for.
    """

    levels: tuple[Tensor, ...]
    grid: tuple[int, int]
    attention: tuple[Tensor, ...]
    last: LastBlock | None


@dataclass(frozen=True)
class Seen:
    """All that training takes from the frozen tower for a batch.

    Attributes:
        levels, grid, attention: As of :class:`Sight`.
        cams: ``(K_b, h, w)`` in [0, 1] for each image; none without text.
        probability: ``(P,)`` of each (image, class) pair.
    """

    levels: tuple[Tensor, ...]
    grid: tuple[int, int]
    attention: tuple[Tensor, ...]
    cams: list[Tensor]
    probability: Tensor


def see(
    tower: VisionTower, text: TextBank | None, pixels: Tensor, labels: Sequence[Sequence[int]], layers: int,
    *, released: bool = False,
) -> Seen:  # fmt: skip
    """Look at a batch, and make its CAMs where there is text; see :func:`look` and :func:`initial_cams`."""
    sight = look(tower, pixels, 0 if text is None else layers)
    if text is None:
        return Seen(sight.levels, sight.grid, (), [], pixels.new_zeros(0))
    cams, probability = initial_cams(tower, text, sight, labels, released=released)
    return Seen(sight.levels, sight.grid, sight.attention, cams, probability)


def pixels_of(tower: VisionTower, images: Tensor, statistics: PixelStatistics) -> Tensor:
    """The tower's input from bytes ``(B, 3, H, W)``, cut off to whole patches at the right and below.

    A convolution does the same on a CPU; a side that is no multiple of the patch is stretched back with the logits.
    """
    height, width = (side // tower.patch * tower.patch for side in images.shape[-2:])
    images = images[..., :height, :width]
    return tower.normalize(images, *((IMAGENET_MEAN, IMAGENET_STD) if statistics == "imagenet" else ()))


def look(tower: VisionTower, pixels: Tensor, layers: int = 0) -> Sight:
    """Run the tower on its input ``(B, 3, H, W)``.

    Args:
        tower: Frozen.
        pixels: Normalised.
        layers: Blocks from the end whose attention is wanted; all, if there are fewer. Without any, the last block
            does not run.
    """
    count, first = len(tower.blocks), tower.prefix_tokens
    wanted = range(count - min(layers, count), count - 1)
    seen = tower.dense(pixels, block_tokens=range(count - 1), block_attention=wanted)
    attention = [seen.block_attention[block][:, first:, first:] for block in wanted]
    last = run_last_block(tower, seen.tokens) if layers else None
    if last is not None:
        attention.append(last.mean_attention())
    levels = tuple(seen.block_tokens[block][:, first:] for block in range(count - 1))
    return Sight(levels, seen.grid, tuple(attention), last)


def initial_cams(
    tower: VisionTower, text: TextBank, sight: Sight, labels: Sequence[Sequence[int]], *, released: bool = False
) -> tuple[list[Tensor], Tensor]:
    """CAMs of all classes of all images, in one closed-form pass, and how probable CLIP finds the classes.

    Args:
        tower: The tower that looked.
        text: Prototypes of the vocabulary.
        sight: With the last block.
        labels: Present classes of each image.
        released: Differentiate probabilities, not their logarithms, and normalise as the released code.

    Returns:
        One ``(K_b, h, w)`` in [0, 1] for each image, and the probability ``(P,)`` of each (image, class) pair.
    """
    assert sight.last is not None
    raw = gradcam(tower, sight.last, text, labels, sight.grid, "softmax" if released else "log-softmax")
    counts = [len(row) for row in labels]
    device = raw.device
    probabilities = text.probabilities(sight.last.feature, present_mask(labels, len(text.classes), device))
    image, label = pair_index(labels, device)
    cams = list(torch.split(normalize(raw, released=released), counts))
    return cams, probabilities[image, label]
