"""The toy world as a data set: 300 held-out scenes, drawn on demand, and the same as a VOC devkit on disk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipseed.data.toy.shapes import CLASS_NAMES
from clipseed.data.toy.world import Scene, lay_out
from clipseed.data.types import ImageSet, Sample
from clipseed.data.vocabulary import Vocabulary
from clipseed.errors import InputError

HELD_OUT_SEED = 0
HELD_OUT_COUNT = 300
"""The scored scenes. The shipped weights come from seeds 1000 and above only (see ``tools/toy/train_clip.py``)."""
TRAIN_SEED = 100
TRAIN_COUNT = 2000
"""Scenes to train segmenters on: neither the shipped weights nor any score has seen them."""
SPLITS = {"held-out": (HELD_OUT_SEED, HELD_OUT_COUNT), "train": (TRAIN_SEED, TRAIN_COUNT)}


@dataclass(frozen=True)
class ToyReader:
    """Draws the image of a toy sample."""

    seed: int

    def __call__(self, sample: Sample) -> Image.Image:
        """Render the scene that the sample's id names."""
        return Image.fromarray(toy_scene(self.seed, sample.id).image())

    def file(self, sample: Sample) -> None:
        """There is none."""
        return


class _ToySamples(Sequence[Sample]):
    """Samples of the world, laid out when asked for."""

    def __init__(self, seed: int, count: int) -> None:
        self._seed, self._count = seed, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:  # type: ignore[override]
        if isinstance(index, slice):
            return [self._sample(k) for k in range(*index.indices(self._count))]
        return self._sample(range(self._count)[index])

    def _sample(self, index: int) -> Sample:
        identifier = toy_id(index)
        return Sample(identifier, Path(f"{identifier}.png"), lay_out(self._seed, index).labels)


def toy_id(index: int) -> str:
    """Sample id of a scene."""
    return f"toy_{index:06d}"


def is_toy_id(identifier: str) -> bool:
    """Whether an id is that of a scene, drawn or saved as a devkit."""
    return re.fullmatch(r"toy_\d{6,}", identifier) is not None


def toy_scene(seed: int, identifier: str) -> Scene:
    """Scene that a toy sample id names.

    Raises:
        InputError: not a toy id.
    """
    number = identifier.removeprefix("toy_")
    if number == identifier or not number.isdecimal() or len(number) > 20:
        raise InputError(f"{identifier!r} is not an image of the toy set")
    return lay_out(seed, int(number))


def toy_mask(seed: int, identifier: str) -> npt.NDArray[np.uint8]:
    """Ground truth of a toy sample: 0 background, class index + 1."""
    return toy_scene(seed, identifier).mask()


def toy_set(vocabulary: Vocabulary, seed: int = HELD_OUT_SEED, count: int = HELD_OUT_COUNT) -> ImageSet:
    """The toy data set.

    Raises:
        InputError: the vocabulary does not list the toy classes in their order.
    """
    if vocabulary.class_names != CLASS_NAMES:
        raise InputError(f"--classes {vocabulary.name}: the toy set needs the classes {', '.join(CLASS_NAMES)}")
    samples: Sequence[Sample] = _ToySamples(seed, count)
    split = next((name for name, given in SPLITS.items() if given == (seed, count)), f"seed-{seed}")
    return ImageSet("toy", None, split, samples, vocabulary, ToyReader(seed), f"toy:{seed}", {"toy_seed": seed})
