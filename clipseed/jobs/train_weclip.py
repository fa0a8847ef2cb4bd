"""``clipseed train weclip``: a decoder on frozen CLIP, from images and image-level labels, or from masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from clipseed.clip.model import FrozenClip, model_name
from clipseed.clip.text import TextBank
from clipseed.data.dataset import open_dataset
from clipseed.data.types import ImageSet, Sample
from clipseed.defaults import WECLIP_BATCH
from clipseed.errors import ImageError, InputError, UsageError, WeightsError
from clipseed.evaluate.confusion import check_labels, confusion, score
from clipseed.evaluate.sources import MaskSource, find_ground_truth
from clipseed.train.augment import Augmentation
from clipseed.train.checkpoint import is_ours, read_weights
from clipseed.train.crops import GivenMasks, LabelledCrops, fingerprint
from clipseed.train.inference import ViewOptions, shown
from clipseed.train.loop import BEST, Status, train
from clipseed.train.previews import SHOWN, keep_preview
from clipseed.train.prompts.files import read_prompts, text_of
from clipseed.train.running import (
    LostImages,
    TrainOptions,
    TrainReport,
    first_process,
    refuse_large_cache,
    refuse_other_crop,
    source_of,
    usable_samples,
    without_augmentation,
)
from clipseed.train.segmenter import Segmenter, save_segmenter
from clipseed.train.weclip.cache import bytes_for_each
from clipseed.train.weclip.decoder import Decoder
from clipseed.train.weclip.labels import strongest
from clipseed.train.weclip.network import WeclipNetwork, fresh_decoder, sizes
from clipseed.train.weclip.options import WeclipOptions, default_steps, preset
from clipseed.train.weclip.released import decoder_of, decoder_state
from clipseed.train.weclip.trainer import Weclip
from clipseed.types import LabelMask
from clipseed.weights import read_weights as read_foreign_weights


@dataclass(frozen=True, kw_only=True)
class TrainWeclipOptions(TrainOptions):
    """Everything ``clipseed train weclip`` can be told.

    Attributes:
        val: Split that is scored every ``val_every`` steps, of the same data set; ``val_limit``: only its first images.
        gt: Ground truth of that split; default: the data set's own.
        constants: Of :class:`~clipseed.train.weclip.options.WeclipOptions`, those that are not to be the vocabulary's.
        paper: As the authors' code.
        masks: Folder of label masks to learn from instead of image-level labels, or ``toy``.
        soft: CAM file with the scores behind them.
        cache: No augmentation: every image has one crop, and what the frozen CLIP gives for it is kept in memory.
        prompts: Learned prompts, in place of the vocabulary's words.
    """

    val: str | None = None
    val_every: int = 1000
    val_limit: int | None = None
    gt: str | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    paper: bool = False
    masks: str | None = None
    soft: Path | None = None
    cache: bool = False
    prompts: Path | None = None

    @property
    def best(self) -> Path:
        """The segmenter with the best validation."""
        return self.out.with_name(f"{self.out.stem}-best.safetensors")


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
    if options.val_every < 1:
        raise UsageError(f"--val-every {options.val_every}: too small")
    learned = (
        None if options.prompts is None else read_prompts(options.prompts, options.data.classes, options.data.dataset)
    )
    image_set = open_dataset(options.data if learned is None else learned.dataset(options.data))
    vocabulary = image_set.vocabulary
    plain = without_augmentation(options.constants, {"scales": (1.0, 1.0), "mirror": 0.0}, cache=options.cache)
    weclip = WeclipOptions(**{**preset(vocabulary.name, released=options.paper), **options.constants, **plain})
    weclip.check()
    masks = _masks(options, image_set)
    if learned is not None and masks is not None:
        raise UsageError("--prompts: with --masks no text is read; leave one of them out")
    samples, unlabelled = usable_samples(image_set, masks, note)
    validation_set = None if options.val is None else _validation_set(options)
    steps = options.steps if options.steps is not None else default_steps(vocabulary.name)
    note(f"loading {model_name(options.model, options.chosen_weights)}")
    clip = FrozenClip.load(options.model, options.chosen_weights, options.device, options.precision)
    refuse_other_crop(weclip.crop, clip)
    decoder = fresh_decoder(clip, len(vocabulary.classes) + 1, weclip, options.seed)
    loop_init, init = _start(options.init, decoder)
    text = None if masks is not None else text_of(clip, vocabulary, learned)
    if options.cache:
        layers = max(weclip.static_layers, weclip.rfm_layers)
        refuse_large_cache(len(samples), bytes_for_each(clip.tower, weclip.crop, layers))
    trainer = Weclip(clip.tower, text, decoder, weclip, steps, cached=options.cache)
    augmentation = Augmentation(weclip.crop, weclip.scales, weclip.mirror)
    data = LabelledCrops(samples, image_set.reader, augmentation, masks, fixed=options.cache)
    settings: dict[str, Any] = {
        "kind": "weclip", "options": weclip.manifest(), "tower": clip.info.sha256, "precision": clip.precision,
        "classes": [item.name for item in vocabulary.classes],
        "prompts": None if text is None else vocabulary.as_dict(),
        **({} if learned is None else {"learned": learned.sha256}),
        "start": init, "cache": options.cache, **fingerprint(image_set, samples, masks),
    }  # fmt: skip
    segmenter = Segmenter(WeclipNetwork(clip, decoder, weclip), vocabulary, {}, options.out)
    lost = LostImages(options, trainer.skipped)
    batch, accumulate = options.batch or WECLIP_BATCH, options.accumulate or 1
    what = "labels" if masks is None else f"masks of {masks.source.name}"
    note(f"{image_set.name} {image_set.split}: {len(samples)} images with {what}, {steps} steps of {batch}")
    every = options.val_every if validation_set else 0
    best = train(
        trainer, data, options.loop(clip, steps, batch, accumulate, validate_every=every, init=loop_init), settings,
        None if validation_set is None else _Validation(segmenter, options.folder, text, *validation_set),
        lost.watching(report), note,
    )  # fmt: skip
    about: dict[str, Any] = {
        "network": sizes(decoder),
        "options": weclip.manifest(),
        "source": source_of(settings, image_set, steps),
    }
    if learned is not None:
        about["prompts"] = learned.sha256
    best_out = None
    if first_process():
        save_segmenter(options.out, "weclip", decoder.state_dict(), vocabulary, clip, {**about, "step": steps})
        if best is not None:
            best_out = options.best
            weights, _ = read_weights(options.folder / BEST)
            save_segmenter(best_out, "weclip", weights, vocabulary, clip, {**about, **best})
        lost.write()
    return TrainReport(
        options.out, options.folder, steps, len(samples), clip.manifest(), str(options.device), unlabelled, lost.all,
        lost.path, best, best_out,
    )  # fmt: skip


def _masks(options: TrainWeclipOptions, image_set: ImageSet) -> GivenMasks | None:
    if options.masks is None:
        if options.soft is not None:
            raise UsageError("--soft belongs to --masks: the scores behind given masks")
        return None
    source = find_ground_truth(options.masks, image_set.manifest, "--masks", image_set.vocabulary, image_set.exif)
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


def _validation_set(options: TrainWeclipOptions) -> tuple[ImageSet, MaskSource]:
    image_set = open_dataset(replace(options.data, split=options.val, limit=options.val_limit))
    truth = find_ground_truth(options.gt, image_set.manifest, vocabulary=image_set.vocabulary, exif=image_set.exif)
    if not any(truth.has(sample.id) for sample in image_set.samples):
        raise InputError(f"--val {options.val}: none of its {len(image_set.samples)} images has a mask in {truth.name}")
    return image_set, truth


class _Validation:
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
