"""What single images score, for finding those that are worth a look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipseed.evaluate.confusion import Counts, score
from clipseed.store.files import csv_text
from clipseed.types import IGNORE, LabelMask


@dataclass(frozen=True)
class ImageScore:
    """One image.

    Attributes:
        miou: Mean IoU over the classes in its ground truth; NaN where all of that is ignored.
        coverage: Share of the pixels with a ground truth that the prediction labels; NaN as before.
        missed: Names of classes in the ground truth that no pixel was predicted to be; the background aside.
        invented: Names of classes that were predicted and are not there, where the ground truth says anything.
    """

    id: str
    miou: float
    coverage: float
    missed: tuple[str, ...]
    invented: tuple[str, ...]


class ImageScores:
    """Collects the scores of all images; about 200 bytes for each."""

    def __init__(self) -> None:
        self.found: list[ImageScore] = []

    def add(
        self, identifier: str, counts: Counts, truth: LabelMask, prediction: LabelMask, names: Sequence[str]
    ) -> None:
        """Take in one image: its own confusion matrix, and both masks ``(H, W)``, 255 for what is not known."""
        known = truth != IGNORE
        there = np.bincount(truth[known], minlength=256) > 0
        predicted = np.bincount(prediction[known], minlength=256) > 0
        covered = known & (prediction != IGNORE)
        total = int(known.sum())
        missed, invented = (
            tuple(names[k] for k in np.flatnonzero(found).tolist() if 0 < k < len(names))
            for found in (there & ~predicted, predicted & ~there)
        )
        coverage = int(covered.sum()) / total if total else math.nan
        self.found.append(ImageScore(identifier, score(counts).miou, coverage, missed, invented))

    def worst(self, count: int) -> list[ImageScore]:
        """The lowest scores, the worst first; images without any are not among them."""
        scored = [item for item in self.found if not math.isnan(item.miou)]
        return sorted(scored, key=lambda item: (item.miou, item.id))[:count]

    def csv(self) -> str:
        """A table ``id,miou,coverage,missed,invented``, the worst images first; fractions, names joined by ``;``."""
        rows = []
        for item in [*self.worst(len(self.found)), *(item for item in self.found if math.isnan(item.miou))]:
            numbers = ["" if math.isnan(value) else f"{value:.6f}" for value in (item.miou, item.coverage)]
            rows.append([item.id, *numbers, ";".join(item.missed), ";".join(item.invented)])
        return csv_text(("id", "miou", "coverage", "missed", "invented"), rows)
