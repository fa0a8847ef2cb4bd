"""What label masks hold, without a truth to score them against: areas of classes, coverage, images worth a look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from clipseed.types import IGNORE, LabelMask

USUAL = 4
"""How many images must show a class before one of them is called unusual."""
_FACTOR = 4.0
"""Areas that are so many times the median, or its part, are unusual."""
_MISSING, _UNSURE = 100.0, 10.0
"""What a label without pixel, and a mask that is mostly 255, weigh beside the logarithm of an area's ratio."""


@dataclass(frozen=True)
class ImageAreas:
    """What the mask of one image holds.

    Attributes:
        labels: Class indices that it was made for; ``None``: not known.
        areas: Share of the image by mask value, 0 and 255 among them; only what is there.
    """

    id: str
    labels: tuple[int, ...] | None
    areas: dict[int, float]
    pixels: int

    @property
    def missing(self) -> tuple[int, ...]:
        """Labels that got no pixel."""
        return tuple(k for k in self.labels or () if k + 1 not in self.areas)

    @property
    def invented(self) -> tuple[int, ...]:
        """Classes that have pixels and are no label."""
        shown = sorted(value - 1 for value in self.areas if value not in (0, IGNORE))
        return () if self.labels is None else tuple(k for k in shown if k not in self.labels)


@dataclass(frozen=True)
class ClassAreas:
    """What all masks hold of one class.

    Attributes:
        labelled: Images that are labelled with it (where labels are known); ``shown``: those in which it has pixels.
        share: Of all pixels.
        median: Median share of an image that shows it; NaN where none does.
    """

    index: int
    name: str
    labelled: int
    shown: int
    share: float
    median: float


def areas_of(identifier: str, labels: Sequence[int] | None, mask: LabelMask) -> ImageAreas:
    """Count the pixels of a mask ``(H, W)``."""
    counts = np.bincount(mask.ravel(), minlength=256)
    areas = {int(value): float(counts[value] / mask.size) for value in np.flatnonzero(counts)}
    return ImageAreas(identifier, None if labels is None else tuple(labels), areas, int(mask.size))


class Survey:
    """All masks of an input.

    Args:
        names: Of the classes; more than are known are called by their mask value.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self.images: list[ImageAreas] = []

    def add(self, image: ImageAreas) -> None:
        """Take in one mask."""
        self.images.append(image)

    def name(self, index: int) -> str:
        """What a class is called."""
        return self._names[index] if index < len(self._names) else f"mask value {index + 1}"

    @property
    def pixels(self) -> int:
        """Of all masks."""
        return sum(image.pixels for image in self.images)

    @property
    def coverage(self) -> float:
        """Share of pixels that are labelled, not 255; NaN without any."""
        return 1 - self._share(IGNORE)

    @property
    def foreground(self) -> float:
        """Share of pixels that show a class; NaN without any."""
        return self.coverage - self._share(0)

    @property
    def empty(self) -> int:
        """Labels without a pixel."""
        return sum(len(image.missing) for image in self.images)

    def _share(self, value: int) -> float:
        return sum(i.areas.get(value, 0.0) * i.pixels for i in self.images) / self.pixels if self.pixels else math.nan

    @cached_property
    def classes(self) -> list[ClassAreas]:
        """All classes that are labelled or shown; ask when all masks are in."""
        there = {k for image in self.images for k in (*(image.labels or ()), *_shown(image))}
        return [self._class(k) for k in sorted(there)]

    def _class(self, index: int) -> ClassAreas:
        shares = [image.areas[index + 1] for image in self.images if index + 1 in image.areas]
        labelled = sum(index in (image.labels or ()) for image in self.images)
        median = float(np.median(shares)) if shares else math.nan
        return ClassAreas(index, self.name(index), labelled, len(shares), self._share(index + 1), median)

    def worth_a_look(self, count: int) -> list[tuple[ImageAreas, str]]:
        """Images that are most likely wrong, with the reasons, the most striking first; at most ``count``."""
        known = {item.index: item for item in self.classes}
        found = []
        for image in self.images:
            weight, reasons = self._striking(image, known)
            if reasons:
                found.append((-weight, image.id, image, "; ".join(reasons)))
        return [(image, why) for _, _, image, why in sorted(found, key=lambda item: item[:2])[:count]]

    def _striking(self, image: ImageAreas, known: dict[int, ClassAreas]) -> tuple[float, list[str]]:
        reasons = [f"no pixel of {self.name(k)}" for k in image.missing]
        reasons += [f"{self.name(k)}, which is no label of it" for k in image.invented]
        weight = _MISSING * len(reasons)
        unsure = image.areas.get(IGNORE, 0.0)
        if unsure > 0.5:
            weight += _UNSURE * unsure
            reasons.append(f"{100 * unsure:.0f} % is 255")
        for k in _shown(image):
            usual, area = known[k], image.areas[k + 1]
            ratio = abs(math.log(area / usual.median))
            if usual.shown > USUAL and ratio > math.log(_FACTOR):
                weight += ratio
                reasons.append(f"{usual.name} on {100 * area:.1f} % (usually {100 * usual.median:.1f} %)")
        return weight, reasons

    def others(self, count: int, without: Sequence[str]) -> list[ImageAreas]:
        """Images from all over the input, evenly spread."""
        left = [image for image in self.images if image.id not in set(without)]
        step = max(1, len(left) // max(1, count))
        return left[::step][:count]


def _shown(image: ImageAreas) -> list[int]:
    return [value - 1 for value in image.areas if value not in (0, IGNORE)]
