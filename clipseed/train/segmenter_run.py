"""What the training of all segmenters shares: scoring them on the way, and writing them, the best one too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from clipseed.clip.text import TextBank
from clipseed.data.dataset import open_dataset
from clipseed.data.types import ImageSet, Sample
from clipseed.errors import ImageError, InputError, UsageError
from clipseed.evaluate.confusion import check_labels, confusion, score
from clipseed.evaluate.sources import MaskSource, find_ground_truth
from clipseed.train.checkpoint import Settings, read_weights
from clipseed.train.data import TrainingData
from clipseed.train.inference import ViewOptions, shown
from clipseed.train.loop import BEST, Status, Trainer, train
from clipseed.train.previews import SHOWN, keep_preview
from clipseed.train.running import LostImages, TrainOptions, TrainReport, first_process
from clipseed.train.segmenter import Segmenter
from clipseed.train.weclip.labels import strongest
from clipseed.train.weclip.network import WeclipNetwork
from clipseed.types import LabelMask


@dataclass(frozen=True, kw_only=True)
class SegmenterOptions(TrainOptions):
    """How a segmenter is scored while it is trained.

    Attributes:
        val: Split that is scored every ``val_every`` steps, of the same data set; ``val_limit``: only its first images.
        gt: Ground truth of that split; default: the data set's own.
    """

    val: str | None = None
    val_every: int = 1000
    val_limit: int | None = None
    gt: str | None = None

    @property
    def best(self) -> Path:
        """The segmenter with the best validation."""
        return self.out.with_name(f"{self.out.stem}-best.safetensors")

    def check(self) -> None:
        """As of :class:`~clipseed.train.running.TrainOptions`."""
        super().check()
        if self.val_every < 1:
            raise UsageError(f"--val-every {self.val_every}: too small")


class SkippingTrainer(Trainer, Protocol):
    """A trainer that tells which images could not be read."""

    skipped: dict[str, str]


@dataclass(frozen=True)
class Training:
    """One run of any trainer.

    Attributes:
        trainer, data, settings, validate: As of :func:`~clipseed.train.loop.train`.
        save: Writes a segmenter: its path, its weights, and ``step`` and perhaps ``score`` for its description.
        steps, batch: Of the run.
        bfloat16: Networks run under autocast.
        init: What the loop starts from.
    """

    trainer: SkippingTrainer
    data: TrainingData
    settings: Settings
    validate: Callable[[int], Mapping[str, float]] | None
    save: Callable[[Path, Mapping[str, Tensor], Mapping[str, Any]], None]
    steps: int
    batch: int
    bfloat16: bool = False
    init: Path | None = None


def train_segmenter(
    options: SegmenterOptions, training: Training, report: Callable[[Status], None], note: Callable[[str], None], *,
    model: Mapping[str, Any], unlabelled: Sequence[str],
) -> TrainReport:  # fmt: skip
    """Train, write the segmenter and the one that scored best, and list the images that could not be read."""
    lost = LostImages(options, training.trainer.skipped)
    every = options.val_every if training.validate else 0
    loop = options.loop(
        training.steps, training.batch, options.accumulate or 1, half=training.bfloat16, validate_every=every,
        init=training.init,
    )  # fmt: skip
    best = train(
        training.trainer, training.data, loop, training.settings, training.validate, lost.watching(report), note
    )
    best_out = None
    if first_process():
        training.save(options.out, training.trainer.module.state_dict(), {"step": training.steps})
        if best is not None:
            best_out = options.best
            training.save(best_out, read_weights(options.folder / BEST)[0], best)
        lost.write()
    return TrainReport(
        options.out, options.folder, training.steps, len(training.data), model, str(options.device), unlabelled,
        lost.all, lost.path, best, best_out,
    )  # fmt: skip


def validation_set(options: SegmenterOptions) -> tuple[ImageSet, MaskSource]:
    """The images of ``--val``, and their ground truth.

    Raises:
        InputError: none of them has any.
    """
    image_set = open_dataset(replace(options.data, split=options.val, limit=options.val_limit))
    truth = find_ground_truth(options.gt, image_set.manifest, vocabulary=image_set.vocabulary, exif=image_set.exif)
    if not any(truth.has(sample.id) for sample in image_set.samples):
        raise InputError(f"--val {options.val}: none of its {len(image_set.samples)} images has a mask in {truth.name}")
    return image_set, truth


class Validation:
    """Scores a segmenter as ``clipseed evaluate`` does: one confusion matrix over all images with ground truth."""

    def __init__(
        self, segmenter: Segmenter, folder: Path, text: TextBank | None, image_set: ImageSet, truth: MaskSource
    ) -> None:
        self._segmenter, self._reader, self._truth = segmenter, image_set.reader, truth
        self._folder, self._text = folder, text
        self._samples: list[Sample] = [sample for sample in image_set.samples if truth.has(sample.id)]

    def __call__(self, step: int) -> dict[str, float]:
        """Mean IoU (``score``) and pixel accuracy."""
        classes = len(self._segmenter.classes) + 1
        counts = np.zeros((classes, classes), np.int64)
        view = ViewOptions()
        for place, sample in enumerate(self._samples):
            try:
                image = self._reader(sample)
            except ImageError:
                continue
            truth = self._truth.read(sample.id)
            if truth.shape != (image.height, image.width):
                raise InputError(f"{self._truth.name}: the mask of {sample.id} has another size than its image")
            check_labels(truth, classes, f"{self._truth.name}: {sample.id}", allow_ignore=True)
            prediction = self._segmenter.predict(image, view)
            counts += confusion(truth, prediction, classes)
            if place < SHOWN:
                masks = {"prediction": prediction, **self._pseudo_label(image, sample)}
                keep_preview(self._folder, place, step, image, truth, masks)
        found = score(counts)
        return {"score": found.miou, "pixel_accuracy": found.pixel_accuracy}

    def _pseudo_label(self, image: Image, sample: Sample) -> dict[str, LabelMask]:
        """What the decoder would learn about an image now, where its classes are known."""
        network = self._segmenter.network
        if self._text is None or not sample.labels or not isinstance(network, WeclipNetwork):
            return {}
        labels = [tuple(sorted(sample.labels))]
        pixels = shown(image, network.patch, ViewOptions())[None].to(network.device)
        with torch.inference_mode():
            scores = network.pseudo_scores(pixels, labels, (image.height, image.width), self._text)
            return {"pseudo": strongest(scores, labels)[0].cpu().numpy()}
