"""WeCLIP as a trainer: pseudo-labels of every crop in every step, and a decoder that learns from them.

The tower is frozen and gives tokens, attention and CAMs; the decoder fuses the tokens; the affinity of the fused tokens
helps, without gradient, to refine the CAMs; refined CAMs become pseudo-labels; decoder and affinity learn from these
(Zhang et al., CVPR 2024). With masks that are given, the decoder learns from those, and no text is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from clipseed.clip.text import TextBank
from clipseed.clip.vision import VisionTower
from clipseed.train.crops import Crops
from clipseed.train.distributed import current_team
from clipseed.train.losses import confidence_guided_loss
from clipseed.train.weclip.affinity import pair_labels, token_affinity
from clipseed.train.weclip.cache import SeenCache
from clipseed.train.weclip.decoder import Decoder, kept_channels
from clipseed.train.weclip.frozen import Seen, pixels_of, see
from clipseed.train.weclip.labels import strongest
from clipseed.train.weclip.losses import affinity_loss, balanced_loss
from clipseed.train.weclip.options import WeclipOptions
from clipseed.train.weclip.pseudo_scores import pseudo_scores
from clipseed.train.weclip.schedule import learning_rate_factor
from clipseed.types import IGNORE

SATURATED = 0.99
"""Affinities above it hardly learn any more: the sigmoid is flat there."""


class Weclip:
    """Decoder on a frozen tower.

    Args:
        tower: Frozen CLIP; it is not part of :attr:`module`.
        text: Prototypes of the classes and background words; ``None`` with given masks.
        decoder: What learns.
        options: All constants.
        steps: Length of the run.
        cached: Remember what the tower saw of each image: crops must be the same whenever an image comes again.

    Attributes:
        skipped: Ids of images that could not be read, with reasons, as far as batches have told.
    """

    def __init__(
        self, tower: VisionTower, text: TextBank | None, decoder: Decoder, options: WeclipOptions, steps: int,
        *, cached: bool = False,
    ) -> None:  # fmt: skip
        self.module: nn.Module = decoder
        self.tower, self.text, self.options, self.steps = tower, text, options, steps
        self._decoder = decoder
        self.skipped: dict[str, str] = {}
        self.cache = SeenCache(self._see_all) if cached else None

    def _see_all(self, pixels: Tensor, labels: Sequence[Sequence[int]]) -> Seen:
        """With the attention that any step needs."""
        layers = max(self.options.rfm_layers, self.options.static_layers)
        return see(self.tower, self.text, pixels, labels, layers, released=self.options.released)

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW on the decoder alone."""
        return torch.optim.AdamW(
            self.module.parameters(), self.options.lr, (0.9, 0.999), 1e-8, self.options.weight_decay
        )

    def schedule(self, step: int) -> float:
        """Warm-up, then linearly down."""
        return learning_rate_factor(step, self.steps, self.options.warm_up)

    def losses(self, batch: Crops, step: int) -> Mapping[str, Tensor]:
        """Losses of augmented crops, and what tells whether training is healthy."""
        self.skipped.update(batch.skipped)
        pixels = pixels_of(self.tower, batch.pixels, self.options.statistics)
        return self.step(pixels, batch, step)

    def step(self, pixels: Tensor, batch: Crops, step: int) -> dict[str, Tensor]:
        """The same from the tower's input ``(B, 3, H, W)``.

        Returns:
            ``loss``; its parts ``segmentation`` and ``affinity``; ``saturated``, the share of affinities above 0.99;
            and ``probability``, the mean probability that CLIP gives to the images' classes: where it is tiny, words
            and images do not belong together, and maps are noise.
        """
        options = self.options
        confirmed = options.confirmed(step, self.steps)
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            if self.cache is not None:
                seen = self.cache(batch.indices, pixels, batch.labels)
            else:
                layers = options.rfm_layers if confirmed else options.static_layers
                seen = see(self.tower, self.text, pixels, batch.labels, layers, released=options.released)
        fused = self._decoder.fuse(seen.levels)
        if options.dropout and batch.seeds:
            fused = fused * kept_channels(batch.seeds, self._decoder.width, options.dropout).to(fused)
        logits = self._decoder.decode(fused, seen.grid)
        found: dict[str, Tensor] = {}
        with torch.autocast(pixels.device.type, enabled=False):
            affinity = token_affinity(fused)
            if self.text is None:
                labels = batch.known
            else:
                with torch.no_grad():
                    labels = self._labels(seen, affinity if confirmed else None, pixels, batch)
                found["probability"] = current_team().mean(
                    seen.probability.sum(), torch.tensor(len(seen.probability), device=pixels.device)
                )
            return self._losses(logits.float(), affinity, labels, batch.confidence) | found

    def _labels(self, seen: Seen, affinity: Tensor | None, pixels: Tensor, batch: Crops) -> Tensor:
        """Pseudo-labels ``(B, H, W)`` of the crops."""
        if self.cache is not None and affinity is None:
            return self.cache.labels(batch.indices, lambda: self._made(seen, None, pixels, batch))
        return self._made(seen, affinity, pixels, batch)

    def _made(self, seen: Seen, affinity: Tensor | None, pixels: Tensor, batch: Crops) -> Tensor:
        size = (pixels.shape[-2], pixels.shape[-1])
        scores = pseudo_scores(seen.cams, seen.attention, affinity, pixels, self.options, size)
        labels = strongest(scores, batch.labels)
        if self.options.supervise_padding:
            return labels
        return labels.masked_fill(batch.known == IGNORE, IGNORE)

    def _losses(self, logits: Tensor, affinity: Tensor, labels: Tensor, confidence: Tensor | None) -> dict[str, Tensor]:
        options, team = self.options, current_team()
        if self.text is None:
            if confidence is not None:
                labels = labels.masked_fill(confidence < options.confidence, IGNORE)
            counted = (labels != IGNORE).sum()
            total = confidence_guided_loss(logits, labels, reduction="sum")
            segmentation = team.mean(total, counted)
        else:
            segmentation = balanced_loss(logits, labels, team)
        pairs = pair_labels(labels, self.tower.patch, options.radius)
        together = affinity_loss(affinity, pairs, team)
        return {
            "loss": segmentation + options.affinity_weight * together,
            "segmentation": segmentation,
            "affinity": together,
            "saturated": (affinity.detach() > SATURATED).float().mean(),
        }
