"""Images and class names as people have them in Python, as the streaming work takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from clipseed.data.background import choose_background
from clipseed.data.images import AnyImage, one_or_many, opened
from clipseed.data.types import Sample
from clipseed.data.vocabulary import Vocabulary, checked, load_vocabulary, named_vocabulary
from clipseed.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

R = TypeVar("R")
Classes = str | Path | Vocabulary | Sequence[str]
"""A built-in list (``voc``, ``coco``), a file, a vocabulary, or names."""


@dataclass(frozen=True)
class MemoryReader:
    """Images at hand, by the number that is their sample's id."""

    images: Sequence[AnyImage]

    def __call__(self, sample: Sample) -> Image:
        """The image, RGB.

        Raises:
            ImageError: it cannot be read.
        """
        return opened(self.images[int(sample.id)])

    def file(self, sample: Sample) -> Path | None:
        """The file that it is read from, if any."""
        image = self.images[int(sample.id)]
        return Path(image) if isinstance(image, str | Path) else None


@dataclass(frozen=True)
class Request:
    """Images and what each of them shows.

    Attributes:
        images: As they were given; ``single``: as one, not as a list.
        samples: Their labels as indices of the vocabulary.
        vocabulary: All classes.
    """

    images: Sequence[AnyImage]
    single: bool
    samples: tuple[Sample, ...]
    vocabulary: Vocabulary

    @property
    def reader(self) -> MemoryReader:
        """Opens the images."""
        return MemoryReader(self.images)


def requested(
    images: AnyImage | Sequence[AnyImage], labels: Sequence[str] | Sequence[Sequence[str]], classes: Classes | None,
    background: str | Sequence[str] | None,
) -> Request:  # fmt: skip
    """Read the arguments that :func:`clipseed.label` and :meth:`clipseed.FrozenClip.cams` share.

    Args:
        images: One image, or a list of them.
        labels: Class names that the image shows; of a list of images one list of names for each, or one for all.
        classes: The whole class list, by which masks are numbered; ``None``: the labels, in the order they come.
        background: Words that compete with the classes, or where they come from
            (:func:`~clipseed.data.background.choose_background`); ``None``: those of the list, or general ones.

    Raises:
        UsageError: labels do not belong to the images.
        InputError: a label is in no class list, or the list is malformed.
    """
    listed, single = one_or_many(images)
    if isinstance(labels, str):
        raise UsageError(f"labels are a list of class names: [{labels!r}]")
    if single or all(isinstance(label, str) for label in labels):
        rows = [[str(label) for label in labels] for _ in listed]
    else:
        rows = [list(row) for row in labels]
    if len(rows) != len(listed):
        raise UsageError(f"{len(listed)} images, but {len(rows)} lists of labels")
    vocabulary = _vocabulary(classes, rows)
    if isinstance(background, str):
        vocabulary = choose_background(vocabulary, background)
    elif background is not None:
        words = tuple(background)
        vocabulary = checked(
            Vocabulary(vocabulary.name, vocabulary.classes, words, vocabulary.templates, "given"), "background"
        )
    samples = tuple(
        Sample(str(number), Path(str(number)), vocabulary.indices(row, f"labels of image {number}"))
        for number, row in enumerate(rows)
    )
    return Request(listed, single, samples, vocabulary)


def _vocabulary(classes: Classes | None, rows: Sequence[Sequence[str]]) -> Vocabulary:
    if isinstance(classes, Vocabulary):
        return classes
    if isinstance(classes, str | Path):
        return load_vocabulary(classes)
    names = list(dict.fromkeys(label for row in rows for label in row)) if classes is None else list(classes)
    return named_vocabulary(names, "given", "labels" if classes is None else "classes")
