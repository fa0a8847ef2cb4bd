"""``clipseed train weclip``: a decoder on frozen CLIP, from images and image-level labels, or from masks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from clipseed.clip.model import FrozenClip, model_name
from clipseed.data.types import ImageSet
from clipseed.defaults import TAG_THRESHOLD, WECLIP_BATCH
from clipseed.errors import UsageError, WeightsError
from clipseed.jobs.cam import CamOptions, CamRecipe, CamWork, check, open_with_prompts, tag_unlabelled
from clipseed.runtime.run import RunOptions, open_engine
from clipseed.store.files import storage_errors
from clipseed.train.augment import Augmentation
from clipseed.train.checkpoint import is_ours
from clipseed.train.crops import GivenMasks, LabelledCrops, fingerprint, given_masks
from clipseed.train.loop import Status
from clipseed.train.prompts.files import PromptFile, text_of
from clipseed.train.running import (
    TrainReport,
    refuse_large_cache,
    refuse_other_crop,
    source_of,
    usable_samples,
    without_augmentation,
)
from clipseed.train.segmenter import Segmenter, save_segmenter
from clipseed.train.segmenter_run import SegmenterOptions, Training, Validation, train_segmenter, validation_set
from clipseed.train.weclip.cache import bytes_for_each
from clipseed.train.weclip.decoder import Decoder
from clipseed.train.weclip.network import WeclipNetwork, fresh_decoder, sizes
from clipseed.train.weclip.options import WeclipOptions, default_steps, preset
from clipseed.train.weclip.released import decoder_of, decoder_state
from clipseed.train.weclip.trainer import Weclip
from clipseed.weights import read_weights as read_foreign_weights
from clipseed.wording import counted


@dataclass(frozen=True, kw_only=True)
class TrainWeclipOptions(SegmenterOptions):
    """Everything ``clipseed train weclip`` can be told.

    Attributes:
        constants: Of :class:`~clipseed.train.weclip.options.WeclipOptions`, those that are not to be the vocabulary's.
        paper: As the authors' code.
        masks: Folder of label masks to learn from instead of image-level labels, or ``toy``.
        soft: CAM file with the scores behind them.
        cache: No augmentation: every image has one crop, and what the frozen CLIP gives for it is kept in memory.
        prompts: Learned prompts, in place of the vocabulary's words.
        tag_threshold, tag_top_k: As of ``clipseed cam --labels auto``, for images that have no labels.
    """

    constants: Mapping[str, Any] = field(default_factory=dict)
    paper: bool = False
    masks: str | None = None
    soft: Path | None = None
    cache: bool = False
    prompts: Path | None = None
    tag_threshold: float = TAG_THRESHOLD
    tag_top_k: int | None = None

    @property
    def tagging(self) -> CamOptions:
        """How images without labels get some; the label file goes to the run's folder."""
        device = RunOptions(device=str(self.device), precision=self.precision, workers=self.workers)
        return CamOptions(
            self.data, self.folder / "labels", self.model, self.weights, tag_threshold=self.tag_threshold,
            tag_top_k=self.tag_top_k, prompts=self.prompts, run=device,
        )  # fmt: skip


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
    image_set, learned = open_with_prompts(options.data, options.prompts)

    @cache
    def loaded() -> FrozenClip:
        note(f"loading {model_name(options.model, options.chosen_weights)}")
        return FrozenClip.load(options.model, options.chosen_weights, options.device, options.precision)

    if options.data.auto_labels and options.masks is None:
        image_set = _tagged(options, image_set, learned, loaded, note)
    vocabulary = image_set.vocabulary
    plain = without_augmentation(options.constants, {"scales": (1.0, 1.0), "mirror": 0.0}, cache=options.cache)
    weclip = WeclipOptions(**{**preset(vocabulary.name, released=options.paper), **options.constants, **plain})
    weclip.check()
    masks = _masks(options, image_set)
    if learned is not None and masks is not None:
        raise UsageError("--prompts: with --masks no text is read; leave one of them out")
    samples, unlabelled = usable_samples(image_set, masks, note)
    scored = None if options.val is None else validation_set(options)
    steps = options.steps if options.steps is not None else default_steps(vocabulary.name)
    clip = loaded()
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
    batch = options.batch or WECLIP_BATCH
    what = "labels" if masks is None else f"masks of {masks.source.name}"
    note(
        f"{image_set.name} {image_set.split}: {counted(len(samples), 'image')} with {what}, "
        f"{counted(steps, 'step')} of {batch}"
    )
    about: dict[str, Any] = {
        "network": sizes(decoder),
        "options": weclip.manifest(),
        "source": source_of(settings, image_set, steps),
        **({} if learned is None else {"prompts": learned.sha256}),
    }

    def save(path: Path, weights: Mapping[str, Tensor], more: Mapping[str, Any]) -> None:
        save_segmenter(path, "weclip", weights, vocabulary, clip, {**about, **more})

    half = clip.tower.dtype is not torch.float32
    validate = None if scored is None else Validation(segmenter, options.folder, text, *scored)
    return train_segmenter(
        options, Training(trainer, data, settings, validate, save, steps, batch, half, loop_init), report, note,
        model=clip.manifest(), unlabelled=unlabelled,
    )  # fmt: skip


def _tagged(
    options: TrainWeclipOptions, image_set: ImageSet, learned: PromptFile | None, loaded: Callable[[], FrozenClip],
    note: Callable[[str], None],
) -> ImageSet:  # fmt: skip
    """The data set with CLIP's tags where there are no labels; of several processes one makes them.

    Raises:
        StoreError: the label file was edited.
    """
    tagging = options.tagging
    check(tagging)
    recipe = CamRecipe(tagging, image_set.vocabulary, image_set.reader, learned)

    def work() -> CamWork:
        return CamWork(recipe, loaded())

    with storage_errors(options.folder):
        options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "labels.csv"
    with FileLock(options.folder / ".labels.lock"), contextlib.closing(open_engine(work, None)) as engine:
        manifest, _ = recipe.manifest(image_set, engine.about)
        image_set, tags = tag_unlabelled(tagging.run, image_set, engine, file, manifest, engine.about["unit"])
    if tags.alike:
        note("warning: the tags do not tell the images apart; look at them, or try other words or another model")
    note(f"{file}: {counted(tags.tagged, 'image')} tagged by CLIP, {tags.without_class} of them without any class")
    return image_set


def _masks(options: TrainWeclipOptions, image_set: ImageSet) -> GivenMasks | None:
    if options.masks is None:
        if options.soft is not None:
            raise UsageError("--soft belongs to --masks: the scores behind given masks")
        return None
    return given_masks(options.masks, image_set, soft=options.soft)


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
