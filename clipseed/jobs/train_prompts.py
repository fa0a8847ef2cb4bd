"""``clipseed train prompts``: context vectors around class names, from image labels or from coarse pseudo-labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipseed.clip.model import FrozenClip, model_name
from clipseed.data.dataset import open_dataset
from clipseed.data.types import ImageSet, Sample
from clipseed.defaults import PromptTask
from clipseed.errors import InputError, UsageError, WeightsError
from clipseed.store.label_mask_folder import LabelMaskFolder
from clipseed.train.augment import Augmentation, Jitter
from clipseed.train.checkpoint import is_ours
from clipseed.train.crops import GivenMasks, LabelledCrops, fingerprint, given_masks
from clipseed.train.loop import Status, train
from clipseed.train.prompts.contexts import LearnedContext, PromptTexts, context_of_words, fresh_context
from clipseed.train.prompts.files import read_prompts, released_context, save_prompts
from clipseed.train.prompts.layout import PromptLayout, make_layout
from clipseed.train.prompts.options import PromptOptions, preset, published
from clipseed.train.prompts.trainers import ClassificationPrompts, SegmentationPrompts
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
from clipseed.wording import counted

_LARGE_IMAGE = 448
"""Sides of an ordinary image, by which memory is reckoned before any is read."""


@dataclass(frozen=True, kw_only=True)
class TrainPromptsOptions(TrainOptions):
    """Everything ``clipseed train prompts`` can be told.

    Attributes:
        task: What is learned.
        seeds: Folder of coarse pseudo-labels, for the segmentation task.
        constants: Of :class:`~clipseed.train.prompts.options.PromptOptions`, those that are not to be the vocabulary's.
        context_seed: Of a fresh context; the order of images and their augmentation have ``seed``.
        cache: No augmentation: every image is seen as a whole, and what the frozen CLIP gives for it is kept in memory.
    """

    task: PromptTask = "classification"
    seeds: str | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    context_seed: int = 0
    cache: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainPromptsReport(TrainReport):
    """What a run did; ``unseen``: classes that no image is labelled with."""

    unseen: Sequence[str] = ()


def run_train_prompts(
    options: TrainPromptsOptions, report: Callable[[Status], None], note: Callable[[str], None]
) -> TrainPromptsReport:
    """Learn prompts, or go on with what an earlier run began.

    Args:
        options: What to do.
        report: Called with the state of training every few steps.
        note: Called with lines for people.

    Raises:
        ClipseedError: see the modules it uses.
    """
    options.check()
    if (options.seeds is not None) != (options.task == "segmentation"):
        raise UsageError(
            "--seeds: coarse pseudo-labels, which --task segmentation needs and classification has no use for"
        )
    if options.data.templates:
        raise UsageError("--template: learned prompts have none; leave it out")
    image_set = open_dataset(options.data)
    vocabulary = image_set.vocabulary
    chosen = _constants(options, image_set)
    chosen.check()
    masks = _masks(options, image_set)
    samples, left_out = usable_samples(image_set, masks, note)
    if masks is not None and chosen.positives == "image":
        samples, left_out = _labelled(samples, left_out)
    unseen = _unseen(image_set, samples, masks)
    if unseen:
        note(f"{len(unseen)} classes are in no image ({', '.join(unseen[:5])} …): nothing is learned about them")
    length = published(options.task, vocabulary.name)
    steps = options.steps or length.steps
    batch, accumulate = options.batch or length.batch, options.accumulate or length.accumulate
    note(f"loading {model_name(options.model, options.chosen_weights)}")
    clip = FrozenClip.load(options.model, options.chosen_weights, options.device, options.precision)
    refuse_other_crop(chosen.crop, clip)
    written = None if chosen.words is None else context_of_words(clip, chosen.words)
    if written is not None:
        chosen = replace(chosen, length=len(written))
        chosen.check()
    layout = make_layout(vocabulary, chosen.sharing, chosen.position, chosen.length, chosen.nameless)
    texts = PromptTexts(clip, layout, chosen.softmax_floor)
    learned, start, loop_init = _start(options, texts, chosen, written)
    if options.cache and masks is not None:
        patches = (_LARGE_IMAGE // clip.tower.patch) ** 2
        refuse_large_cache(len(samples), 4 * patches * clip.info.embed_dim)
    kind = ClassificationPrompts if masks is None else SegmentationPrompts
    trainer = kind(clip.tower, texts, learned, chosen, steps, cached=options.cache)
    # One crop of each image for ever would miss what lies outside of it.
    patch = clip.tower.patch if options.cache else None
    data = LabelledCrops(samples, image_set.reader, _augmentation(chosen), masks, patch=patch)
    settings: dict[str, Any] = {
        "kind": "prompts", "options": chosen.manifest(), "tower": clip.info.sha256, "precision": clip.precision,
        "classes": list(vocabulary.class_names), "layout": layout.as_dict(), "context_seed": options.context_seed,
        "start": start, "cache": options.cache, **fingerprint(image_set, samples, masks),
    }  # fmt: skip
    if chosen.positives == "image" and masks is not None:
        settings["labels"] = fingerprint(image_set, samples, None).get("labels")
    lost = LostImages(options, trainer.skipped)
    what = "labels" if masks is None else f"masks of {masks.source.name}"
    note(
        f"{image_set.name} {image_set.split}: {counted(len(samples), 'image')} with {what}, "
        f"{counted(steps, 'step')} of {batch}"
    )
    half = clip.tower.dtype is not torch.float32
    loop = options.loop(steps, batch, accumulate, half=half, init=loop_init)
    train(trainer, data, loop, settings, None, lost.watching(report), note)
    if first_process():
        about = {
            "task": options.task, "options": chosen.manifest(), "step": steps,
            "source": source_of(settings, image_set, steps),
        }  # fmt: skip
        save_prompts(options.out, learned.context, vocabulary, layout, clip, about)
        lost.write()
    return TrainPromptsReport(
        out=options.out, folder=options.folder, steps=steps, images=len(samples), model=clip.manifest(),
        device=str(options.device), unlabelled=left_out, skipped=lost.all, skipped_file=lost.path, unseen=unseen,
    )  # fmt: skip


def _augmentation(chosen: PromptOptions) -> Augmentation:
    jitter = Jitter() if chosen.jitter else None
    return Augmentation(chosen.crop, (1.0, 1.0), chosen.mirror, sides=chosen.sides, jitter=jitter)


def _constants(options: TrainPromptsOptions, image_set: ImageSet) -> PromptOptions:
    vocabulary = image_set.vocabulary
    settled = {**preset(options.task, vocabulary.name, len(vocabulary.background)), **options.constants}
    plain = {"jitter": False, "mirror": 0.0}
    if options.cache and "sides" in options.constants:
        raise UsageError("--sides: with --cache images are seen whole, at the size that clipseed cam sees")
    return PromptOptions(**{**settled, **without_augmentation(options.constants, plain, cache=options.cache)})


def _masks(options: TrainPromptsOptions, image_set: ImageSet) -> GivenMasks | None:
    """Coarse pseudo-labels.

    Raises:
        InputError: they are missing, or those of other classes.
    """
    if options.seeds is None:
        return None
    masks = given_masks(options.seeds, image_set, "--seeds")
    source = masks.source
    names = list(image_set.vocabulary.class_names)
    recorded = (source.manifest or {}).get("vocabulary") if isinstance(source, LabelMaskFolder) else None
    theirs = recorded.get("classes") if isinstance(recorded, dict) else None
    if isinstance(theirs, list) and [item.get("name") for item in theirs if isinstance(item, dict)] != names:
        raise InputError(
            f"--seeds {options.seeds}: label masks of other classes ({len(theirs)} of them) than those of "
            f"{image_set.vocabulary.name}; give the class list that they were made with, with --classes"
        )
    return masks


def _labelled(samples: Sequence[Sample], left_out: list[str]) -> tuple[Sequence[Sample], list[str]]:
    """Images whose labels are known as well."""
    usable = [sample for sample in samples if sample.labels is not None]
    if not usable:
        raise InputError("--positives image: none of the images has labels; give --labels, or --positives crop")
    return usable, [*left_out, *(sample.id for sample in samples if sample.labels is None)]


def _unseen(image_set: ImageSet, samples: Sequence[Sample], masks: GivenMasks | None) -> list[str]:
    """Names of classes that no image has; none where labels are not known, or all images of the toy world are there."""
    if image_set.name == "toy" and masks is None:
        return []
    labelled = [sample.labels for sample in samples if sample.labels is not None]
    seen = {label for labels in labelled for label in labels}
    return [name for place, name in enumerate(image_set.vocabulary.class_names) if labelled and place not in seen]


def _start(
    options: TrainPromptsOptions, texts: PromptTexts, chosen: PromptOptions, written: Tensor | None
) -> tuple[LearnedContext, str | None, Path | None]:
    """The context to begin with, the digest of an authors' file that it is from, and what the loop is to start from."""
    layout: PromptLayout = texts.layout
    if options.init is None and written is not None:
        return LearnedContext(written.expand(layout.shape(texts.width)).clone()), None, None
    if options.init is None:
        return LearnedContext(fresh_context(layout, texts.width, chosen.deviation, options.context_seed)), None, None
    if options.init.suffix == ".safetensors" and is_ours(options.init):
        read_prompts(options.init)  # one clear error where it is something else
        empty: Tensor = fresh_context(layout, texts.width, 0.0, 0)
        return LearnedContext(empty), None, options.init
    context, sha256 = released_context(options.init)
    wanted = layout.shape(texts.width)
    if tuple(context.shape) != wanted:
        raise WeightsError(f"--init {options.init}: a context of shape {tuple(context.shape)}, not {wanted}")
    return LearnedContext(context), sha256, None
