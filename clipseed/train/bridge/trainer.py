"""A text segmenter as a trainer: prediction and scores by text learn from label masks or soft labels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clipseed.clip.text import present_mask
from clipseed.train.bridge.data import SoftCrops
from clipseed.train.bridge.losses import hidden, label_loss, soft_loss, without_absent
from clipseed.train.bridge.network import TextSegmenter
from clipseed.train.bridge.options import BridgeOptions
from clipseed.train.bridge.photometric import varied
from clipseed.train.bridge.schedule import poly_factor
from clipseed.train.crops import Crops
from clipseed.train.distributed import current_team


class TextSegmentation:
    """Everything learns but the texts.

    Args:
        module: What learns.
        options: All constants.
        steps: Length of the run.
        labelled: The labels of a batch's images say which classes they show; otherwise any class may be anywhere.

    Attributes:
        skipped: Ids of images that could not be read, with reasons, as far as batches have told.
    """

    def __init__(self, module: TextSegmenter, options: BridgeOptions, steps: int, *, labelled: bool) -> None:
        self.module: nn.Module = module
        self._module, self.options, self.steps, self._labelled = module, options, steps, labelled
        self.skipped: dict[str, str] = {}

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW; no decay for norms, biases and scalars, another rate for the backbone."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, value in self.module.named_parameters():
            groups.setdefault((name.startswith("backbone."), value.ndim > 1), []).append(value)
        options = self.options
        # The head first: metrics show the learning rate of the first group.
        return torch.optim.AdamW(
            [
                {
                    "params": groups[key], "lr": options.lr * (options.backbone_lr if key[0] else 1),
                    "weight_decay": options.weight_decay if key[1] else 0.0,
                }
                for key in sorted(groups, key=lambda key: (key[0], not key[1]))
            ]
        )  # fmt: skip

    def schedule(self, step: int) -> float:
        """Warm-up and polynomial."""
        return poly_factor(step, self.steps, self.options.warm_up_of(self.steps), self.options.least)

    def losses(self, batch: Crops, step: int) -> Mapping[str, Tensor]:
        """``loss``, and its parts ``segmentation`` and, where scores are learned beside it, ``scores``."""
        self.skipped.update(batch.skipped)
        options, team = self.options, current_team()
        pixels = varied(batch.pixels, batch.seeds) if options.photometric else batch.pixels
        labels, soft = batch.known, batch.soft if isinstance(batch, SoftCrops) else None
        allowed = self._allowed(batch)
        found = self._module(pixels, allowed if options.mask_text else None)
        with torch.autocast(pixels.device.type, enabled=False):
            if allowed is not None:
                labels, soft = without_absent(labels, soft, allowed, options.absent)

            def loss(logits: Tensor) -> Tensor:
                logits = logits.float()
                if allowed is not None and options.absent == "mask":
                    logits = hidden(logits, allowed)
                if soft is not None and options.loss != "ce":
                    return soft_loss(logits, soft, batch.known, options.loss, team)
                return label_loss(logits, labels, batch.confidence, options.confidence, team)

            segmentation = loss(found.logits)
            if found.scores is None:
                return {"loss": segmentation, "segmentation": segmentation}
            scores = loss(found.scores)
        return {"loss": segmentation + options.score_weight * scores, "segmentation": segmentation, "scores": scores}

    def _allowed(self, batch: Crops) -> Tensor | None:
        """``(B, 1 + K)``: background, and the classes that each image is known to show."""
        if not self._labelled:
            return None
        classes = len(self._module.text) - 1
        present = present_mask(batch.labels, classes, batch.pixels.device)
        return torch.nn.functional.pad(present, (1, 0), value=True)
