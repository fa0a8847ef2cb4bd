"""What the training commands share: their options, images that are lost on the way, and what a run reports."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clipseed.clip.model import FrozenClip, chosen_weights
from clipseed.data.dataset import DatasetOptions
from clipseed.data.types import ImageSet, Sample
from clipseed.defaults import Precision
from clipseed.errors import UsageError
from clipseed.store.files import refuse_unwritable, storage_errors, write_skipped
from clipseed.train.crops import GivenMasks, trainable
from clipseed.train.loop import LoopOptions, Status

SKIPPED = "skipped.csv"


def training_folder(trained: Path) -> Path:
    """Where the run of ``NAME.safetensors``, or of ``NAME-best.safetensors``, kept its metrics: ``NAME-training``."""
    return trained.with_name(f"{trained.stem.removesuffix('-best')}-training")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How anything is trained on a frozen CLIP: nothing here is peculiar to a method.

    Attributes:
        data: What to learn from.
        out: ``NAME.safetensors``; checkpoint and metrics go to the folder ``NAME-training`` beside it.
        model, weights: The frozen CLIP.
        steps: ``None``: as published for the vocabulary.
        batch, accumulate: Images per step, over all processes, and in how many parts each takes them; ``None``
            likewise.
        init: A trained file whose weights are the start.
    """

    data: DatasetOptions
    out: Path
    model: str | None = None
    weights: str | None = None
    steps: int | None = None
    batch: int | None = None
    accumulate: int | None = None
    seed: int = 0
    keep_every: int = 500
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
        for name, least in (("keep_every", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: too small")

    def loop(self, steps: int, batch: int, accumulate: int, *, half: bool, **more: Any) -> LoopOptions:
        """As the loop has them; ``half``: networks compute in bfloat16, on a GPU."""
        return LoopOptions(
            self.folder, steps, batch, accumulate=accumulate, seed=self.seed, device=self.device,
            bfloat16=half and self.device.type == "cuda", workers=self.workers,
            keep_every=self.keep_every, overwrite=self.overwrite, **more,
        )  # fmt: skip


@dataclass(frozen=True)
class TrainReport:
    """What a run did.

    Attributes:
        best: ``{"step": …, "score": …}`` of the best validation, and ``best_out`` what was trained by that step.
        unlabelled: Ids of images that could not be used for want of labels or masks.
        skipped: Images that could not be read, with reasons, and ``skipped_file`` their list.
    """

    out: Path
    folder: Path
    steps: int
    images: int
    model: Mapping[str, Any]
    device: str
    unlabelled: Sequence[str]
    skipped: Mapping[str, str]
    skipped_file: Path | None
    best: Mapping[str, Any] | None = None
    best_out: Path | None = None


class LostImages:
    """Images that could not be read, of this run and of those before that it goes on from.

    Args:
        options: Of the run.
        now: Filled by the trainer.
    """

    def __init__(self, options: TrainOptions, now: dict[str, str]) -> None:
        self._path, self._now = options.folder / SKIPPED, now
        self._before: dict[str, str] = {}
        if not options.overwrite and self._path.is_file():
            with self._path.open(encoding="utf-8", newline="") as stream:
                self._before = {row["id"]: row["reason"] for row in csv.DictReader(stream)}

    @property
    def all(self) -> dict[str, str]:
        """Ids and reasons."""
        return {**self._before, **self._now}

    @property
    def path(self) -> Path | None:
        """Their list, where there are any."""
        return self._path if self.all else None

    def write(self) -> None:
        """Write the list."""
        with storage_errors(self._path):
            write_skipped(self._path, sorted(self.all.items()))

    def watching(self, report: Callable[[Status], None]) -> Callable[[Status], None]:
        """The callback of progress, which keeps the list up to date."""

        def watch(status: Status) -> None:
            self.write()
            report(status)

        return watch


def usable_samples(
    image_set: ImageSet, masks: GivenMasks | None, note: Callable[[str], None]
) -> tuple[Sequence[Sample], list[str]]:
    """:func:`~clipseed.train.crops.trainable`, and a line about what is left out."""
    samples, left_out = trainable(image_set, masks)
    if left_out:
        what = "labels" if masks is None else "mask"
        note(f"{len(left_out)} of {len(image_set.samples)} images have no {what} ({left_out[0]} …); left out")
    return samples, left_out


def refuse_other_crop(crop: int, clip: FrozenClip) -> None:
    """Raise :class:`~clipseed.errors.UsageError` where crops are not made of whole patches."""
    if crop % clip.tower.patch:
        raise UsageError(f"--crop {crop}: give a multiple of a patch's {clip.tower.patch} pixels")


def refuse_large_cache(images: int, one: int) -> None:
    """Find out before the work whether a cache of so many bytes for each image fits into the machine's memory.

    Raises:
        UsageError: it does not.
    """
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if images * one > 0.8 * there:
        raise UsageError(
            f"--cache: {images} images need {images * one / 2**30:.0f} GiB, and the machine has {there / 2**30:.0f}; "
            "leave it out, or take fewer images with --limit"
        )


def without_augmentation(constants: Mapping[str, Any], plain: Mapping[str, Any], *, cache: bool) -> dict[str, Any]:
    """What ``--cache`` fixes, where it is given.

    Raises:
        UsageError: one of these was asked for as well.
    """
    if not cache:
        return {}
    if given := sorted(plain.keys() & constants.keys()):
        raise UsageError(f"--{given[0]}: --cache is for runs without augmentation")
    return dict(plain)


def first_process() -> bool:
    """Whether this process writes files and talks, before the processes have met."""
    return os.environ.get("RANK", "0") == "0"


def source_of(settings: Mapping[str, Any], image_set: ImageSet, steps: int) -> dict[str, Any]:
    """Where a trained file comes from, for whoever finds it."""
    kept = {key: settings[key] for key in ("dataset", "split", "labels", "toy_seed", "masks") if key in settings}
    return {**kept, **{key: str(value) for key, value in image_set.source.items()}, "steps": steps}
