"""A frozen tower with a trained decoder: what a file of WeCLIP segments with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipseed.clip.model import FrozenClip
from clipseed.clip.text import TextBank
from clipseed.defaults import PAR_POSITION_WEIGHT, PixelStatistics
from clipseed.errors import WeightsError
from clipseed.train.weclip.affinity import token_affinity
from clipseed.train.weclip.decoder import Decoder
from clipseed.train.weclip.frozen import look, pixels_of, see
from clipseed.train.weclip.options import WeclipOptions
from clipseed.train.weclip.pseudo_scores import pseudo_scores
from clipseed.weights import check_fit


class WeclipNetwork:
    """A :class:`~clipseed.train.inference.Network`.

    Args:
        clip: Frozen.
        decoder: Trained on its tokens; moved to its device.
        options: That it was trained with.
    """

    def __init__(self, clip: FrozenClip, decoder: Decoder, options: WeclipOptions) -> None:
        self.clip, self.options = clip, options
        self.decoder = decoder.to(clip.tower.device)

    @property
    def patch(self) -> int:
        """The tower's."""
        return self.clip.tower.patch

    @property
    def device(self) -> torch.device:
        """The tower's."""
        return self.clip.tower.device

    @property
    def statistics(self) -> PixelStatistics:
        """What images are normalised with."""
        return self.options.statistics

    def describe(self) -> dict[str, Any]:
        """The frozen model, and where its weights are."""
        return {"model": self.clip.manifest(), "weights": self.clip.location}

    def logits(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` from 0 to 255 to ``(B, K, h, w)``, float32; without dropout."""
        tower = self.clip.tower
        half = self.device.type == "cuda" and tower.dtype is not torch.float32
        sight = look(tower, pixels_of(tower, images, self.statistics))
        training = self.decoder.training
        self.decoder.eval()
        with torch.autocast(self.device.type, tower.dtype if half else torch.bfloat16, enabled=half):
            found: Tensor = self.decoder(sight.levels, sight.grid)
        self.decoder.train(training)
        return found.float()

    def pseudo_scores(
        self, images: Tensor, labels: Sequence[Sequence[int]], size: tuple[int, int], text: TextBank
    ) -> list[Tensor]:
        """Refined scores of images whose labels are known: the paper's pseudo-labels, made after training.

        Args:
            images: ``(B, 3, H, W)`` of one size, 0 to 255.
            labels: Class indices of each.
            size: Of the scores.
            text: Prototypes of the vocabulary.

        Returns:
            ``(1 + K_b, H, W)`` of background and classes for each image, in [0, 1].
        """
        tower, options = self.clip.tower, self.options
        pixels = pixels_of(tower, images, self.statistics)
        seen = see(tower, text, pixels, labels, options.rfm_layers, released=options.released)
        affinity = token_affinity(self.decoder.fuse(seen.levels))
        scores = pseudo_scores(seen.cams, seen.attention, affinity, pixels, options, size)
        growth = (1 + PAR_POSITION_WEIGHT) ** options.par_iterations
        return [rows / growth if len(rows) > 1 else rows for rows in scores]


def sizes(decoder: Decoder) -> dict[str, int]:
    """What :func:`restored` makes the same decoder of."""
    return {
        "levels": len(decoder.projections), "token_width": decoder.token_width, "classes": decoder.classes,
        "width": decoder.width, "blocks": len(decoder.blocks), "heads": decoder.heads,
    }  # fmt: skip


def fresh_decoder(clip: FrozenClip, classes: int, options: WeclipOptions, seed: int) -> Decoder:
    """A new decoder for a tower; its random weights follow from the seed.

    Args:
        clip: Frozen.
        classes: With the background.
        options: Of which the sizes are taken.
        seed: Of torch's generator, whose state is left as it was.

    Raises:
        WeightsError: the tower has a single block, so that there are no tokens before the last.
    """
    blocks = len(clip.tower.blocks)
    if blocks < 2:
        raise WeightsError(f"{clip.info.weights}: a tower of one block; a decoder needs those before the last")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(blocks - 1, clip.tower.width, classes, options.width, options.blocks, options.heads)


def restored(clip: FrozenClip, weights: Mapping[str, Tensor], about: Mapping[str, Any], path: Path) -> WeclipNetwork:
    """A network out of a file's weights and description.

    Raises:
        WeightsError: they do not fit.
    """
    try:
        decoder = Decoder(**about["network"])
        options = WeclipOptions(**{**about["options"], "scales": tuple(about["options"]["scales"])})
    except (KeyError, TypeError) as error:
        raise WeightsError(f"{path}: its description of the decoder cannot be read ({error})") from error
    check_fit(weights, decoder.state_dict(), path, "it is damaged")
    decoder.load_state_dict(dict(weights))
    refuse_other_tower(decoder, clip, path)
    return WeclipNetwork(clip, decoder, options)


def refuse_other_tower(decoder: Decoder, clip: FrozenClip, path: Path) -> None:
    """Raise :class:`~clipseed.errors.WeightsError` where a decoder's shape does not fit a tower."""
    made = sizes(decoder)
    there = (len(clip.tower.blocks) - 1, clip.tower.width)
    if (made["levels"], made["token_width"]) != there:
        raise WeightsError(
            f"{path}: a decoder for {made['levels']} + 1 blocks of width {made['token_width']}, but "
            f"{clip.info.weights} has {there[0]} + 1 of width {there[1]}; name its CLIP with --weights"
        )
