"""Every constant of learning prompts, and which of them the published settings have otherwise."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from clipseed.defaults import (
    PROMPT_BATCH,
    PROMPT_CROP,
    PROMPT_LENGTH,
    PROMPT_LR,
    PROMPT_MOMENTUM,
    PROMPT_WARM_UP,
    PROMPT_WARM_UP_LR,
    PROMPT_WEIGHT_DECAY,
    ActivationReduction,
    ContrastReduction,
    NamePosition,
    PositiveClasses,
    PromptTask,
)
from clipseed.errors import UsageError


@dataclass(frozen=True)
class PromptOptions:
    """What decides learned prompts, besides data, tower and number of steps. Defaults: VOC's classification task.

    Attributes:
        task: ``classification``: from image labels; ``segmentation``: from coarse pseudo-labels.
        sharing: ``shared``, ``class``, or a file of groups (:func:`~clipseed.train.prompts.layout.make_layout`).
        position, length, nameless: Of the prompts, likewise.
        words: Text whose token embeddings every context begins as, in place of random numbers; its tokens are then the
            ``length``.
        deviation: Of a random context.
        lr, momentum, weight_decay: Of SGD.
        warm_up, warm_up_lr: Steps at a small rate, and that rate.
        schedule: Length of the schedule; ``None``: that of the run. The published COCO runs stop earlier.
        crop, sides, jitter, mirror: Augmentation; see :class:`clipseed.train.augment.Augmentation`. Without ``sides``
            images keep their size.
        positives: Of the segmentation task: classes that the cropped mask shows (``crop``), or the image's labels.
        contrast, contrast_scale: Of :func:`~clipseed.train.prompts.losses.contrastive_loss`.
        activation, squared, through_peak, background_floor: Of :func:`~clipseed.train.prompts.losses.activation_loss`.
        relative: Of the segmentation task: each map is divided by its peak before the loss, gradient included. As
            published (``False``), the loss has the maps' scale, and maps that vanish minimise it.
        softmax_floor: See :func:`clipseed.clip.text.masked_softmax`.
    """

    task: PromptTask = "classification"
    sharing: str = "shared"
    position: NamePosition = "end"
    length: int = PROMPT_LENGTH
    nameless: int | None = None
    words: str | None = None
    deviation: float = 0.015
    lr: float = PROMPT_LR
    momentum: float = PROMPT_MOMENTUM
    weight_decay: float = PROMPT_WEIGHT_DECAY
    warm_up: int = PROMPT_WARM_UP
    warm_up_lr: float = PROMPT_WARM_UP_LR
    schedule: int | None = None
    crop: int = PROMPT_CROP
    sides: tuple[int, int] | None = (288, 480)
    jitter: bool = True
    mirror: float = 0.5
    positives: PositiveClasses = "crop"
    contrast: ContrastReduction = "pairs"
    contrast_scale: float = 1.0
    activation: ActivationReduction = "pixels"
    squared: bool = False
    through_peak: bool = False
    background_floor: float = 0.0
    relative: bool = False
    softmax_floor: float = 0.0

    def manifest(self) -> dict[str, Any]:
        """Plain data for files."""
        return {**asdict(self), "sides": None if self.sides is None else list(self.sides)}

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            UsageError: naming the option.
        """
        for name, option in (("length", "--context-length"), ("crop", "--crop"), ("schedule", "--schedule")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{option} {value}: at least 1")
        if self.nameless is not None and not 0 <= self.nameless <= 1000:
            raise UsageError(f"--nameless {self.nameless}: a number from 0 to 1000")
        if self.warm_up < 0:
            raise UsageError(f"--warm-up {self.warm_up}: at least 0")
        if not 0 < self.lr < 1e6 or not 0 < self.warm_up_lr < 1e6:
            raise UsageError("--lr, --warm-up-lr: give ordinary positive numbers")
        if not 0 <= self.weight_decay < 1e3 or not 0 <= self.momentum < 1 or not 0 <= self.deviation < 1e3:
            raise UsageError("--weight-decay, --momentum, --deviation: give ordinary numbers from 0; momentum below 1")
        if self.sides is not None and (len(self.sides) != 2 or not 1 <= self.sides[0] <= self.sides[1] <= 10_000):
            raise UsageError("--sides: give two numbers of pixels, the smaller first, such as 288,480")
        if not 0 <= self.mirror <= 1:
            raise UsageError(f"--mirror {self.mirror}: from 0 to 1")
        if not 0 <= self.softmax_floor < 1 or not 0 <= self.background_floor < 1e3 or not 0 < self.contrast_scale < 1e3:
            raise UsageError("--softmax-floor, --background-floor, --contrast-scale: give ordinary numbers from 0")


@dataclass(frozen=True)
class Published:
    """How long a published run is, and in how many parts it takes a batch."""

    steps: int
    accumulate: int = 1
    batch: int = PROMPT_BATCH


_VOC_SEGMENTATION: dict[str, Any] = {"sharing": "class", "position": "front", "deviation": 0.0125}
_COCO: dict[str, Any] = {"sides": (318, 530), "warm_up": 1000, "positives": "image"}
_TOY: dict[str, Any] = {"crop": 160, "sides": None, "jitter": False, "warm_up": 20, "lr": 0.01}
"""For the toy world: its images are small, and its CLIP knows objects at their own size only."""


def preset(task: PromptTask, vocabulary: str, background: int) -> dict[str, Any]:
    """Options that the published settings have otherwise.

    Args:
        task: What is learned.
        vocabulary: Its name; COCO's and the toy world's have their own, all others get VOC's.
        background: How many background words it has: nameless prompts take their place in VOC's segmentation task.
    """
    found: dict[str, Any] = {"task": task}
    if vocabulary.startswith("coco"):
        return found | _COCO | {"schedule": 20_500 if task == "classification" else 75_000}
    if task == "segmentation":
        found |= _VOC_SEGMENTATION | {"nameless": background}
    return found | (_TOY if vocabulary == "toy" else {})


def published(task: PromptTask, vocabulary: str) -> Published:
    """Length of the published runs; those of COCO end at the checkpoint that its authors used."""
    segmentation = task == "segmentation"
    if vocabulary.startswith("coco"):
        return Published(45_000, 8) if segmentation else Published(6150, 4)
    if vocabulary == "toy":
        return Published(400)
    return Published(17_000) if segmentation else Published(1800)
