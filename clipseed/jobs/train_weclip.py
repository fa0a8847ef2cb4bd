"""``clipseed train weclip``: a decoder on frozen CLIP, from images and image-level labels, or from masks."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from clipseed.clip.model import FrozenClip, chosen_weights, model_name
from clipseed.clip.text import TextBank
from clipseed.data.dataset import DatasetOptions, open_dataset
from clipseed.data.types import ImageSet, Sample
from clipseed.defaults import WECLIP_BATCH, Precision
from clipseed.errors import ImageError, InputError, UsageError, WeightsError
from clipseed.evaluate.confusion import check_labels, confusion, score
from clipseed.evaluate.sources import MaskSource, find_ground_truth
from clipseed.store.files import refuse_unwritable, storage_errors, write_skipped
from clipseed.train.augment import Augmentation
from clipseed.train.checkpoint import Settings, read_weights
from clipseed.train.data import TrainingData
from clipseed.train.inference import ViewOptions, shown
from clipseed.train.loop import BEST, LoopOptions, Status, Trainer, train
from clipseed.train.previews import SHOWN, keep_preview
from clipseed.train.segmenter import Segmenter, is_ours, save_segmenter, training_folder
from clipseed.train.weclip.cache import refuse_too_large
from clipseed.train.weclip.data import GivenMasks, LabelledCrops, fingerprint, trainable
from clipseed.train.weclip.decoder import Decoder
from clipseed.train.weclip.labels import strongest
from clipseed.train.weclip.network import WeclipNetwork, fresh_decoder, sizes
from clipseed.train.weclip.options import WeclipOptions, default_steps, preset
from clipseed.train.weclip.released import decoder_of, decoder_state
from clipseed.train.weclip.trainer import Weclip
from clipseed.types import LabelMask
from clipseed.weights import read_weights as read_foreign_weights

SKIPPED = "skipped.csv"


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How any segmenter is trained: nothing here is peculiar to a method.

    Attributes:
        data: What to learn from.
        out: ``NAME.safetensors``; checkpoint and metrics go to the folder ``NAME-training`` beside it.
        model, weights: The frozen CLIP.
        steps: ``None``: as published for the vocabulary.
        batch: Images per step, over all processes.
        val: Split that is scored every ``val_every`` steps, of the same data set; ``val_limit``: only its first images.
        gt: Ground truth of that split; default: the data set's own.
        init: A segmenter whose weights are the start.
    """

    data: DatasetOptions
    out: Path
    model: str | None = None
    weights: str | None = None
    steps: int | None = None
    batch: int = WECLIP_BATCH
    accumulate: int = 1
    seed: int = 0
    keep_every: int = 500
    val: str | None = None
    val_every: int = 1000
    val_limit: int | None = None
    gt: str | None = None
    init: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "auto"
    workers: int = 0
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """Where the run keeps what it needs to go on."""
        return training_folder(self.out)

    @property
    def best(self) -> Path:
        """The segmenter with the best validation."""
        return self.out.with_name(f"{self.out.stem}-best.safetensors")

    @property
    def chosen_weights(self) -> str:
        """Tag or file of the model's weights."""
        return chosen_weights(self.weights, self.data.dataset)

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            UsageError: naming the option.
        """
        if self.out.suffix != ".safetensors":
            raise UsageError(f"--out {self.out}: give the name of a .safetensors file")
        refuse_unwritable(self.out, "--out")
        for name in ("val_every", "keep_every", "seed"):
            if getattr(self, name) < (0 if name == "seed" else 1):
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: too small")


@dataclass(frozen=True, kw_only=True)
class TrainWeclipOptions(TrainOptions):
    """Everything ``clipseed train weclip`` can be told.

    Attributes:
        constants: Of :class:`~clipseed.train.weclip.options.WeclipOptions`, those that are not to be the vocabulary's.
        paper: As the authors' code.
        masks: Folder of label masks to learn from instead of image-level labels, or ``toy``.
        soft: CAM file with the scores behind them.
        cache: No augmentation: every image has one crop, and what the frozen CLIP gives for it is kept in memory.
    """

    constants: Mapping[str, Any] = field(default_factory=dict)
    paper: bool = False
    masks: str | None = None
    soft: Path | None = None
    cache: bool = False


@dataclass(frozen=True)
class TrainReport:
    """What a run did.

    Attributes:
        best: ``{"step": …, "score": …}`` of the best validation, and ``best_out`` the segmenter of that step.
        unlabelled: Ids of images that could not be used for want of labels or masks.
        skipped: Images that could not be read, with reasons, and ``skipped_file`` their list.
    """

    out: Path
    folder: Path
    steps: int
    images: int
    model: Mapping[str, Any]
    device: str
    best: Mapping[str, Any] | None
    best_out: Path | None
    unlabelled: Sequence[str]
    skipped: Mapping[str, str]
    skipped_file: Path | None


def run_train_weclip(
    options: TrainWeclipOptions,
    report: Callable[[Status], None],
    note: Callable[[str], None],
) -> TrainReport:
    """Train a decoder, or go on with what an earlier run began.

    Args:
        options: What to do.
        report: Called with the state of training every few steps.
        note: Called with lines for people.

    Raises:
        ClipseedError: see the modules it uses.
    """
    options.check()
    image_set = open_dataset(options.data)
    vocabulary = image_set.vocabulary
    plain: dict[str, Any] = {"scales": (1.0, 1.0), "mirror": 0.0} if options.cache else {}
    if given := sorted(plain.keys() & options.constants.keys()):
        raise UsageError(f"--{given[0]}: --cache is for runs without augmentation")
    weclip = WeclipOptions(**{**preset(vocabulary.name, released=options.paper), **options.constants, **plain})
    weclip.check()
    masks = _masks(options, image_set)
    samples, unlabelled = trainable(image_set, masks)
    if unlabelled:
        what = "labels" if masks is None else "mask"
        note(f"{len(unlabelled)} of {len(image_set.samples)} images have no {what} ({unlabelled[0]} …); left out")
    scored = None if options.val is None else validation_set(options)
    steps = options.steps if options.steps is not None else default_steps(vocabulary.name)
    note(f"loading {model_name(options.model, options.chosen_weights)}")
    clip = FrozenClip.load(options.model, options.chosen_weights, options.device, options.precision)
    if weclip.crop % clip.tower.patch:
        raise UsageError(f"--crop {weclip.crop}: give a multiple of a patch's {clip.tower.patch} pixels")
    decoder = fresh_decoder(clip, len(vocabulary.classes) + 1, weclip, options.seed)
    loop_init, init = _start(options.init, decoder)
    text = None if masks is not None else clip.encode_text(vocabulary)
    if options.cache:
        refuse_too_large(clip.tower, len(samples), weclip.crop, max(weclip.static_layers, weclip.rfm_layers))
    trainer = Weclip(clip.tower, text, decoder, weclip, steps, cached=options.cache)
    augmentation = Augmentation(weclip.crop, weclip.scales, weclip.mirror)
    data = LabelledCrops(samples, image_set.reader, augmentation, masks, fixed=options.cache)
    settings: dict[str, Any] = {
        "kind": "weclip", "options": weclip.manifest(), "tower": clip.info.sha256, "precision": clip.precision,
        "classes": [item.name for item in vocabulary.classes],
        "prompts": None if text is None else vocabulary.as_dict(),
        "start": init, "cache": options.cache, **fingerprint(image_set, samples, masks),
    }  # fmt: skip
    segmenter = Segmenter(WeclipNetwork(clip, decoder, weclip), vocabulary, {}, options.out)
    what = "labels" if masks is None else f"masks of {masks.source.name}"
    note(f"{image_set.name} {image_set.split}: {len(samples)} images with {what}, {steps} steps of {options.batch}")
    about = {"network": sizes(decoder), "options": weclip.manifest(), "source": source_of(settings, image_set, steps)}

    def save(path: Path, weights: Mapping[str, Tensor], more: Mapping[str, Any]) -> None:
        save_segmenter(path, "weclip", weights, vocabulary, clip, {**about, **more})

    half = options.device.type == "cuda" and clip.tower.dtype is not torch.float32
    validate = None if scored is None else Validation(segmenter, options.folder, text, *scored)
    return train_segmenter(
        options, Training(trainer, data, settings, validate, save, steps, half, loop_init), report, note,
        model=clip.manifest(), unlabelled=unlabelled,
    )  # fmt: skip


class SkippingTrainer(Trainer, Protocol):
    """A trainer that tells which images could not be read."""

    skipped: dict[str, str]


@dataclass(frozen=True)
class Training:
    """One run of any trainer.

    Attributes:
        trainer, data, settings, validate: As of :func:`~clipseed.train.loop.train`.
        save: Writes a segmenter: its path, its weights, and ``step`` and perhaps ``score`` for its description.
        steps: Of the run.
        bfloat16: Networks run under autocast.
        init: What the loop starts from.
    """

    trainer: SkippingTrainer
    data: TrainingData
    settings: Settings
    validate: Callable[[int], Mapping[str, float]] | None
    save: Callable[[Path, Mapping[str, Tensor], Mapping[str, Any]], None]
    steps: int
    bfloat16: bool = False
    init: Path | None = None


def train_segmenter(
    options: TrainOptions, training: Training, report: Callable[[Status], None], note: Callable[[str], None], *,
    model: Mapping[str, Any], unlabelled: Sequence[str],
) -> TrainReport:  # fmt: skip
    """Train, write the segmenter and the one that scored best, and list the images that could not be read."""
    first = os.environ.get("RANK", "0") == "0"
    lost = LostImages(options.folder / SKIPPED, training.trainer.skipped, options.overwrite)

    def watch(status: Status) -> None:
        lost.write()
        report(status)

    best = train(
        training.trainer, training.data,
        LoopOptions(
            options.folder, training.steps, options.batch, accumulate=options.accumulate, seed=options.seed,
            device=options.device, bfloat16=training.bfloat16, workers=options.workers, keep_every=options.keep_every,
            validate_every=options.val_every if training.validate else 0, init=training.init,
            overwrite=options.overwrite,
        ),
        training.settings, training.validate, watch, note,
    )  # fmt: skip
    best_out = None
    if first:
        training.save(options.out, training.trainer.module.state_dict(), {"step": training.steps})
        if best is not None:
            best_out = options.best
            training.save(best_out, read_weights(options.folder / BEST)[0], best)
        lost.write()
    return TrainReport(
        options.out, options.folder, training.steps, len(training.data), model, str(options.device), best, best_out,
        unlabelled, lost.all, lost.path if lost.all else None,
    )  # fmt: skip


def source_of(settings: Settings, image_set: ImageSet, steps: int) -> dict[str, Any]:
    """Where a segmenter comes from, for whoever finds the file."""
    kept = {key: settings[key] for key in ("dataset", "split", "labels", "toy_seed", "masks") if key in settings}
    return {**kept, **{key: str(value) for key, value in image_set.source.items()}, "steps": steps}


def _masks(options: TrainWeclipOptions, image_set: ImageSet) -> GivenMasks | None:
    if options.masks is None:
        if options.soft is not None:
            raise UsageError("--soft belongs to --masks: the scores behind given masks")
        return None
    source = find_ground_truth(options.masks, image_set.manifest, "--masks")
    return GivenMasks(source, len(image_set.vocabulary.classes) + 1, options.soft)


def _start(path: Path | None, decoder: Decoder) -> tuple[Path | None, str | None]:
    """What the loop is to start from, and, where the start is an authors' checkpoint, its digest."""
    if path is None:
        return None, None
    if path.suffix == ".safetensors" and is_ours(path):
        return path, None
    file = read_foreign_weights(path)
    theirs = decoder_of(decoder_state(file.state, path), path, decoder.heads)
    if sizes(theirs) != sizes(decoder):
        differ = [f"{name} {there}, not {here}" for (name, there), here in
                  zip(sizes(theirs).items(), sizes(decoder).values(), strict=True) if there != here]  # fmt: skip
        raise WeightsError(f"--init {path}: weights of another decoder ({', '.join(differ)})")
    decoder.load_state_dict(theirs.state_dict())
    return None, file.sha256


def validation_set(options: TrainOptions) -> tuple[ImageSet, MaskSource]:
    """The images of ``--val``, and their ground truth.

    Raises:
        InputError: none of them has any.
    """
    image_set = open_dataset(replace(options.data, split=options.val, limit=options.val_limit))
    truth = find_ground_truth(options.gt, image_set.manifest)
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


class LostImages:
    """Images that could not be read, of this run and of those before that it goes on from."""

    def __init__(self, path: Path, now: dict[str, str], overwrite: bool) -> None:
        self.path, self._now = path, now
        self._before: dict[str, str] = {}
        if not overwrite and path.is_file():
            with path.open(encoding="utf-8", newline="") as stream:
                self._before = {row["id"]: row["reason"] for row in csv.DictReader(stream)}

    @property
    def all(self) -> dict[str, str]:
        """Ids and reasons."""
        return {**self._before, **self._now}

    def write(self) -> None:
        """Write their list; an old one goes where there are none."""
        with storage_errors(self.path):
            write_skipped(self.path, sorted(self.all.items()))
