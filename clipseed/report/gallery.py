"""Which images a report shows: the best and the worst, chosen while the scores stream by."""

from __future__ import annotations

import hashlib
import math
from array import array
from bisect import bisect
from dataclasses import dataclass

import numpy as np

from clipseed.evaluate.confusion import Counts, score
from clipseed.report.thumbnails import shrunk
from clipseed.types import LabelMask


@dataclass(frozen=True)
class Example:
    """One scored image.

    Attributes:
        score: Mean IoU over the classes in its own ground truth.
        size: ``(H, W)`` of its ground truth.
        truth, prediction: Masks, shrunk for showing.
        labels: Mask values in either of them, also those that shrinking lost.
    """

    id: str
    score: float
    size: tuple[int, int]
    truth: LabelMask
    prediction: LabelMask
    labels: tuple[int, ...]


class Gallery:
    """The ``worst`` and ``best`` so many images of an input, and the scores of all of them.

    No image is among both: of fewer images than asked for, each side has its part. Memory: eight bytes per image,
    and two small masks for each of those kept. Equal scores go by id. An image whose ground truth is all ignored has
    no score; it is only counted.
    """

    def __init__(self, worst: int, best: int) -> None:
        self._limits = (worst, best)
        self._low: list[Example] = []  # both in order of (score, id): the beginning of all scored images, and the end
        self._high: list[Example] = []
        self.scores = array("d")
        self.unscored = 0
        self._digest = 0

    def add(self, identifier: str, counts: Counts, truth: LabelMask, prediction: LabelMask) -> None:
        """Take in one image: its id, its own confusion matrix and both masks ``(H, W)``."""
        name = hashlib.blake2b(identifier.encode("utf-8", "surrogateescape"), digest_size=16).digest()
        self._digest ^= int.from_bytes(name, "big")
        value = score(counts).miou
        if math.isnan(value):
            self.unscored += 1
            return
        self.scores.append(value)
        made: Example | None = None
        for kept, limit, drop in ((self._low, self._limits[0], -1), (self._high, self._limits[1], 0)):
            place = bisect([(item.score, item.id) for item in kept], (value, identifier))
            full = len(kept) == limit
            if full and place == (0 if drop == 0 else limit):
                continue  # beyond those that are kept
            made = made or _example(identifier, value, truth, prediction)
            kept.insert(place, made)
            if full:
                del kept[drop]

    @property
    def worst(self) -> list[Example]:
        """The worst images, the worst first."""
        return self._low[: self._part()]

    @property
    def best(self) -> list[Example]:
        """The best images, the best first."""
        return self._high[::-1][: len(self.scores) - self._part()]

    def _part(self) -> int:
        """How many images the worst may be, so that none of them is among the best too."""
        wanted = sum(self._limits)
        return len(self.scores) * self._limits[0] // wanted if len(self.scores) < wanted else self._limits[0]

    @property
    def fingerprint(self) -> tuple[int, int]:
        """Equal for two inputs that were scored on the same images, in whatever order."""
        return len(self.scores) + self.unscored, self._digest

    @property
    def median(self) -> float:
        """Median score; NaN without any."""
        return float(np.median(self.scores)) if self.scores else float("nan")

    def histogram(self, bins: int = 20) -> list[int]:
        """How many images score in each of ``bins`` equal parts of [0, 1]."""
        return [int(count) for count in np.histogram(self.scores, bins=bins, range=(0.0, 1.0))[0]]


def _example(identifier: str, value: float, truth: LabelMask, prediction: LabelMask) -> Example:
    present = np.bincount(truth.ravel(), minlength=256) + np.bincount(prediction.ravel(), minlength=256)
    labels = tuple(int(label) for label in np.flatnonzero(present))
    size = (int(truth.shape[0]), int(truth.shape[1]))
    return Example(identifier, value, size, shrunk(truth), shrunk(prediction), labels)
