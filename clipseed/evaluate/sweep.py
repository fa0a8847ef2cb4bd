"""Scoring class activation maps: every background threshold at once, from one pass over the pixels.

A pixel belongs to its strongest class when that class's score exceeds the background's, else to the background. So for
constant thresholds only the strongest class and its score matter, and a histogram of the score per (true class,
strongest class) holds the confusion matrices of all thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipseed.evaluate.confusion import Counts, confusion
from clipseed.pseudo.pixels import label_values, strongest
from clipseed.pseudo.rules import label_mask, thresholding
from clipseed.store.cam_records import Cam
from clipseed.types import IGNORE, LabelMask

DEFAULT_THRESHOLDS: tuple[float, ...] = tuple(round(0.01 * k, 2) for k in range(1, 100))


class ThresholdSweep:
    """Confusion matrices for constant background thresholds.

    A pixel is foreground where the largest map exceeds the threshold strictly; among equal maps the first class in
    label order wins.

    Args:
        classes: Number of classes with the background.
        thresholds: Ascending, in [0, 1).
        half: Round maps and thresholds to half precision first, as CLIP-ES's released code does.
    """

    def __init__(self, classes: int, thresholds: Sequence[float] = DEFAULT_THRESHOLDS, *, half: bool = False) -> None:
        self.classes = classes
        self.settings = tuple(float(t) for t in thresholds)
        self._type = np.dtype(np.float16 if half else np.float32)
        self._edges = np.array(self.settings, np.float16 if half else np.float64).astype(np.float64)
        self._histogram = np.zeros((classes, classes, len(self.settings) + 1), np.int64)

    def update(self, cam: Cam, truth: LabelMask) -> None:
        """Add one image; ``truth`` has the CAM's size, 255 is left out."""
        scored = truth != IGNORE
        true_class = truth[scored].astype(np.int64)
        if len(cam.classes) == 0:
            self._histogram[:, 0, 0] += np.bincount(true_class, minlength=self.classes)
            return
        row, score = strongest(cam.upsampled().astype(self._type, copy=False))
        label = label_values(cam.classes)[1:][row]
        passed = np.searchsorted(self._edges, score[scored].astype(np.float64), side="left")
        bins = len(self.settings) + 1
        index = (true_class * self.classes + label[scored]) * bins + passed
        self._histogram += np.bincount(index, minlength=self._histogram.size).reshape(self._histogram.shape)

    def matrices(self) -> list[Counts]:
        """One confusion matrix per threshold."""
        # Pixels in bin b exceed the first b thresholds.
        above = self._histogram[:, :, ::-1].cumsum(axis=2)[:, :, ::-1]
        found = []
        for position in range(len(self.settings)):
            foreground = above[:, :, position + 1]
            matrix = foreground.copy()
            matrix[:, 0] += (above[:, :, 0] - foreground).sum(axis=1)
            found.append(matrix)
        return found


class PowerSweep:
    """Confusion matrices for CLIP-ES's background score ``(1 - max) ** alpha``, in half precision as there."""

    def __init__(self, classes: int, exponents: Sequence[float]) -> None:
        self.classes = classes
        self.settings = tuple(float(a) for a in exponents)
        self._matrices = [np.zeros((classes, classes), np.int64) for _ in self.settings]

    def update(self, cam: Cam, truth: LabelMask) -> None:
        """Add one image; ``truth`` has the CAM's size, 255 is left out."""
        for matrix, exponent in zip(self._matrices, self.settings, strict=True):
            matrix += confusion(truth, label_mask(cam, thresholding(alpha=exponent)), self.classes)

    def matrices(self) -> list[Counts]:
        """One confusion matrix per exponent."""
        return self._matrices
