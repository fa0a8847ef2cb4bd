"""Learned prompts as trainers: the tower is frozen, and what learns is the context alone.

The classification task needs nothing of an image but its feature. The segmentation task needs its maps, which are
linear in the texts' gradient: ``CAM_c = tau p_c B (t_c - sum over k of p_k t_k)``
(:func:`~clipseed.cam.gradcam.cam_basis`, :func:`~clipseed.cam.gradcam.score_direction`). So plain autograd through the
closed form reaches the prompts, nothing is differentiated twice, and where crops are fixed the tower is needed once for
each image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipseed.cam.gradcam import cam_basis, gradcam, pair_index, run_last_block, score_direction
from clipseed.clip.text import TextBank, present_mask
from clipseed.clip.vision import VisionTower
from clipseed.train.crops import Crops
from clipseed.train.distributed import current_team
from clipseed.train.prompts.contexts import LearnedContext, PromptTexts
from clipseed.train.prompts.losses import activation_loss, contrastive_loss
from clipseed.train.prompts.options import PromptOptions
from clipseed.train.prompts.schedule import learning_rate_factor
from clipseed.types import IGNORE


class _PromptTrainer:
    """What both tasks share.

    Args:
        tower: Frozen.
        texts: Encodes the prompts.
        learned: Its context.
        options: All constants.
        steps: Length of the run.

    Attributes:
        skipped: Ids of images that could not be read, with reasons, as far as batches have told.
    """

    def __init__(
        self, tower: VisionTower, texts: PromptTexts, learned: LearnedContext, options: PromptOptions, steps: int,
    ) -> None:  # fmt: skip
        self.module: nn.Module = learned
        self.tower, self.texts, self.options = tower, texts, options
        self._learned = learned
        self._schedule = options.schedule or steps
        self.skipped: dict[str, str] = {}

    def optimizer(self) -> torch.optim.Optimizer:
        """SGD with momentum on the context alone."""
        options = self.options
        return torch.optim.SGD(
            self.module.parameters(), options.lr, options.momentum, weight_decay=options.weight_decay
        )

    def schedule(self, step: int) -> float:
        """A small rate, then half a cosine."""
        options = self.options
        return learning_rate_factor(step, self._schedule, options.warm_up, options.warm_up_lr / options.lr)


class ClassificationPrompts(_PromptTrainer):
    """Prompts that tell the classes of an image from all others (L_MCL).

    Args:
        cached: Remember features: crops must be the same whenever an image comes again.
    """

    def __init__(
        self, tower: VisionTower, texts: PromptTexts, learned: LearnedContext, options: PromptOptions, steps: int,
        *, cached: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(tower, texts, learned, options, steps)
        self._features: dict[int, Tensor] | None = {} if cached else None

    def losses(self, batch: Crops, step: int) -> Mapping[str, Tensor]:
        """The loss, and the mean probability of the images' classes among all classes."""
        self.skipped.update(batch.skipped)
        return self.step(self._seen(batch), batch.labels)

    def step(self, features: Tensor, labels: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """The same from image features ``(N, E)``."""
        options, layout = self.options, self.texts.layout
        text = self.texts.features(self._learned.context, range(layout.classes))
        with torch.autocast(features.device.type, enabled=False):
            bank = self.texts.compared(text)
            logits = bank.logits(features)
            positive = present_mask(labels, layout.classes, logits.device)
            loss = contrastive_loss(logits, positive, options.contrast, options.contrast_scale, current_team())
            shown = current_team().mean((logits.detach().softmax(dim=1) * positive).sum(), positive.sum())
        return {"loss": loss, "probability": shown}

    def _seen(self, batch: Crops) -> Tensor:
        if self._features is None:
            return feature_of(self.tower, batch.pixels)
        for place, index in enumerate(batch.indices):
            if index not in self._features:  # each by itself, so that nothing depends on who shares a batch with it
                self._features[index] = feature_of(self.tower, batch.images[place][None])
        return torch.cat([self._features[index] for index in batch.indices])


@dataclass(frozen=True)
class Basis:
    """What the maps of an image follow from: its feature ``(1, E)``, :func:`cam_basis` ``(n, E)``, and its grid."""

    feature: Tensor
    basis: Tensor
    grid: tuple[int, int]


class SegmentationPrompts(_PromptTrainer):
    """Prompts whose maps look like coarse pseudo-labels (L_CAL).

    Args:
        cached: Remember what maps follow from: crops must be the same whenever an image comes again. Without, maps are
            made of the few directions that a step needs, which costs far less than all of them.
    """

    def __init__(
        self, tower: VisionTower, texts: PromptTexts, learned: LearnedContext, options: PromptOptions, steps: int,
        *, cached: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(tower, texts, learned, options, steps)
        self._bases: dict[int, Basis] | None = {} if cached else None

    def losses(self, batch: Crops, step: int) -> Mapping[str, Tensor]:
        """The loss, its parts, and the mean probability of the positive classes."""
        self.skipped.update(batch.skipped)
        labels = batch.labels
        if self.options.positives == "crop":
            labels = [_classes_in(mask) for mask in batch.known]
        present = sorted({label for row in labels for label in row})
        text = self.texts.bank(self._learned.context, present)
        with torch.autocast(batch.pixels.device.type, enabled=False):
            cams, features = self._cams(batch, text, labels)
            return self.step(cams, features, text, labels, batch.known)

    def step(
        self, cams: Tensor, features: Tensor, text: TextBank, labels: Sequence[Sequence[int]], masks: Tensor
    ) -> dict[str, Tensor]:
        """The same from raw maps ``(P, h, w)`` and features ``(N, E)``."""
        options = self.options
        image, label = pair_index(labels, cams.device)
        if options.relative:
            # A map without a positive value has no peak to be measured by: it stays as it is, about 0.
            peak = cams.amax(dim=(1, 2), keepdim=True)
            cams = cams / torch.where(peak > 0, peak, torch.ones_like(peak))
        inside, outside = activation_loss(
            cams, image, label, masks, options.activation, squared=options.squared, through_peak=options.through_peak,
            floor=options.background_floor, team=current_team(),
        )  # fmt: skip
        with torch.no_grad():
            probability = text.probabilities(features, present_mask(labels, len(text.classes), cams.device))
            shown = current_team().mean(probability[image, label].sum(), torch.tensor(len(label), device=cams.device))
        loss = inside + outside + 0 * self._learned.context.sum()  # a batch without any pair has a gradient, of 0
        return {"loss": loss, "foreground": inside, "background": outside, "probability": shown}

    def _cams(self, batch: Crops, text: TextBank, labels: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Raw maps ``(P, h, w)``, of whole images at the size of what is known of them, and features ``(N, E)``."""
        if self._bases is None:
            with torch.no_grad():
                dense = self.tower.dense(self.tower.normalize(batch.pixels))
                state = run_last_block(self.tower, dense.tokens)
            return gradcam(self.tower, state, text, labels, dense.grid), state.feature
        for place, index in enumerate(batch.indices):
            if index not in self._bases:
                self._bases[index] = basis_of(self.tower, batch.images[place][None])
        rows = [self._bases[index] for index in batch.indices]
        features = torch.cat([row.feature for row in rows])
        size = (batch.known.shape[-2], batch.known.shape[-1])
        return cams_from_bases(rows, features, text, labels, size), features


def feature_of(tower: VisionTower, pixels: Tensor) -> Tensor:
    """Mean patch features ``(N, E)`` of crops ``(N, 3, S, S)``, without gradient."""
    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        return run_last_block(tower, tower.dense(tower.normalize(pixels)).tokens).feature


def basis_of(tower: VisionTower, pixels: Tensor) -> Basis:
    """What the maps of one crop ``(1, 3, S, S)`` follow from."""
    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        dense = tower.dense(tower.normalize(pixels))
        state = run_last_block(tower, dense.tokens)
        return Basis(state.feature, cam_basis(tower, state)[0], dense.grid)


def cams_from_bases(
    rows: Sequence[Basis], features: Tensor, text: TextBank, labels: Sequence[Sequence[int]], size: tuple[int, int]
) -> Tensor:
    """Raw maps, as of :func:`~clipseed.cam.gradcam.gradcam`, without the tower; all at one size ``(P, H, W)``."""
    image, label = pair_index(labels, features.device)
    if not len(image):
        return torch.zeros(0, *size, device=features.device)
    present = present_mask(labels, len(text.classes), features.device)
    direction = score_direction(features, text, present, image, label, "softmax")
    parts = torch.split(direction, [len(row) for row in labels])
    maps = []
    for part, row in zip(parts, rows, strict=True):
        if len(part):
            narrow = (part @ row.basis.T).view(1, len(part), *row.grid)
            maps.append(F.interpolate(narrow, size=size, mode="bilinear", align_corners=False)[0])
    return torch.cat(maps)


def _classes_in(mask: Tensor) -> tuple[int, ...]:
    """Class indices that a mask ``(H, W)`` shows, ascending."""
    return tuple(value - 1 for value in torch.unique(mask).tolist() if value not in (0, IGNORE))
