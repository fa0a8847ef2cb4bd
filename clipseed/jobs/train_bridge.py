"""``clipseed train bridge``: a light network with one of four heads, from label masks or from CAMs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipseed.clip.model import FrozenClip, model_name
from clipseed.data.dataset import open_dataset
from clipseed.data.paths import is_file, is_folder
from clipseed.data.types import ImageSet
from clipseed.data.vocabulary import Vocabulary
from clipseed.defaults import BRIDGE_BATCH, BRIDGE_STEPS, BRIDGE_TOY_STEPS
from clipseed.device import dtype_name, pick_dtype
from clipseed.digest import file_sha256
from clipseed.errors import InputError, UsageError
from clipseed.store.open import content_of
from clipseed.train.augment import Augmentation
from clipseed.train.bridge.data import CamCrops, CamMasks
from clipseed.train.bridge.network import BridgeNetwork, fresh_segmenter
from clipseed.train.bridge.options import BridgeOptions, preset
from clipseed.train.bridge.text import random_tokens, read_tokens, tokens_of
from clipseed.train.bridge.trainer import TextSegmentation
from clipseed.train.crops import GivenMasks, LabelledCrops, fingerprint, given_masks
from clipseed.train.loop import Status
from clipseed.train.running import TrainReport, source_of, usable_samples
from clipseed.train.segmenter import Segmenter, save_segmenter
from clipseed.train.segmenter_run import SegmenterOptions, Training, Validation, train_segmenter, validation_set
from clipseed.wording import counted

CLIP, RANDOM = "clip", "random"
_RANDOM_WIDTH = 512
"""That of ViT-B/16's text features."""


@dataclass(frozen=True, kw_only=True)
class TrainBridgeOptions(SegmenterOptions):
    """Everything ``clipseed train bridge`` can be told.

    Attributes:
        backbone: As timm calls it.
        backbone_weights: File with its weights; random ones without.
        masks: Folder of label masks, ``toy``, or CAMs: a file or a folder.
        soft: CAM file with the scores behind label masks.
        text: ``clip``, ``random``, or an ``.npy`` file of text features, background first.
        constants: Of :class:`~clipseed.train.bridge.options.BridgeOptions`, those that are not to be the defaults.
    """

    backbone: str
    masks: str
    backbone_weights: Path | None = None
    soft: Path | None = None
    text: str = CLIP
    constants: Mapping[str, Any] = field(default_factory=dict)


def run_train_bridge(
    options: TrainBridgeOptions, report: Callable[[Status], None], note: Callable[[str], None]
) -> TrainReport:
    """Train a light network, or go on with what an earlier run began.

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
    masks, cams = _masks(options, image_set)
    given = {**preset(vocabulary.name), **({"loss": "collision"} if cams is not None else {}), **options.constants}
    bridge = BridgeOptions(**given)
    bridge.check()
    if bridge.loss != "ce" and cams is None:
        raise UsageError(f"--loss {bridge.loss} is for soft labels: name CAMs with --masks FILE.h5")
    samples, unlabelled = usable_samples(image_set, masks, note)
    scored = None if options.val is None else validation_set(options)
    steps = options.steps or (BRIDGE_TOY_STEPS if vocabulary.name == "toy" else BRIDGE_STEPS)
    text, clip = _text(options, vocabulary, note)
    module = fresh_segmenter(options.backbone, text, bridge, options.seed, options.backbone_weights)
    # Asking a toy sample for its labels lays out its scene; all of them have labels.
    labelled = image_set.name == "toy" or all(sample.labels is not None for sample in samples)
    if not labelled and options.data.labels is not None:
        note(f"{options.data.labels} lacks some of the images: no class is taken to be absent from any")
    trainer = TextSegmentation(module, bridge, steps, labelled=labelled)
    augmentation = Augmentation(bridge.crop, bridge.scales, bridge.mirror)
    if cams is None:
        data = LabelledCrops(samples, image_set.reader, augmentation, masks)
    else:
        data = CamCrops(samples, image_set.reader, augmentation, cams, masks.classes)
    dtype = pick_dtype(options.precision, options.device)
    network = {"backbone": options.backbone, "text": options.text if options.text in (CLIP, RANDOM) else "file"}
    settings: dict[str, Any] = {
        "kind": "bridge", "network": network, "options": bridge.manifest(), "precision": dtype_name(dtype),
        "backbone_weights": None if options.backbone_weights is None else file_sha256(options.backbone_weights),
        "text": hashlib.sha256(text.numpy().tobytes()).hexdigest(),
        "classes": [item.name for item in vocabulary.classes], **fingerprint(image_set, samples, masks),
    }  # fmt: skip
    segmenter = Segmenter(BridgeNetwork(module, options.device, {}), vocabulary, {}, options.out)
    batch = options.batch or BRIDGE_BATCH
    note(
        f"{image_set.name} {image_set.split}: {counted(len(samples), 'image')} with {'CAMs' if cams else 'masks'} of "
        f"{masks.source.name}, {counted(steps, 'step')} of {batch}"
    )
    about = {"network": network, "options": bridge.manifest(), "source": source_of(settings, image_set, steps)}

    def save(path: Path, weights: Mapping[str, Tensor], more: Mapping[str, Any]) -> None:
        save_segmenter(path, "bridge", weights, vocabulary, clip, {**about, **more})

    validate = None if scored is None else Validation(segmenter, options.folder, None, *scored)
    half = dtype is not torch.float32
    model = {"weights": f"{options.backbone} with {bridge.head}", "precision": dtype_name(dtype)}
    return train_segmenter(
        options, Training(trainer, data, settings, validate, save, steps, batch, half, options.init), report, note,
        model=model, unlabelled=unlabelled,
    )  # fmt: skip


def _masks(options: TrainBridgeOptions, image_set: ImageSet) -> tuple[GivenMasks, CamMasks | None]:
    """What to learn from; CAMs are masks, too, and something more.

    Raises:
        InputError: CAMs of other classes.
        UsageError: ``--soft`` beside CAMs.
    """
    path, classes = Path(options.masks), len(image_set.vocabulary.classes) + 1
    if not ((is_file(path) or is_folder(path)) and content_of(path) == "CAMs"):
        return given_masks(options.masks, image_set, soft=options.soft), None
    if options.soft is not None:
        raise UsageError("--soft belongs to label masks: CAMs in --masks are scores themselves")
    cams = CamMasks(path)
    if cams.cams.class_names != image_set.vocabulary.class_names:
        raise InputError(
            f"--masks {path}: CAMs of {len(cams.cams.class_names)} classes that are not the {classes - 1} of "
            f"{image_set.vocabulary.name}; give the class list that they were made with: --classes"
        )
    return GivenMasks(cams, classes), cams


def _text(
    options: TrainBridgeOptions, vocabulary: Vocabulary, note: Callable[[str], None]
) -> tuple[Tensor, FrozenClip | None]:
    """Texts ``(1 + K, D)``, and the CLIP that read them."""
    if options.text == RANDOM:
        return random_tokens(len(vocabulary.classes) + 1, _RANDOM_WIDTH, options.seed), None
    if options.text != CLIP:
        return read_tokens(Path(options.text), vocabulary), None
    note(f"loading {model_name(options.model, options.chosen_weights)}")
    clip = FrozenClip.load(options.model, options.chosen_weights, "cpu", "fp32")
    return tokens_of(clip.encode_text(vocabulary)), clip
