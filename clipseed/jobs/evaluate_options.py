"""What ``clipseed evaluate`` can be told, and what it reports."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipseed.defaults import PredIgnore
from clipseed.evaluate.confusion import Counts, Scores


@dataclass(frozen=True)
class EvaluateOptions:
    """Everything ``clipseed evaluate`` can be told.

    Attributes:
        threshold: One constant background score instead of the sweep.
        alphas: CLIP-ES's background exponents instead of constant scores.
        pred_ignore: What a predicted 255 is: an error, background, or a pixel left out of the score.
        resize_pred: Bring predictions to the ground truth's size instead of refusing other sizes.
    """

    prediction: Path
    gt: str | None = None
    classes: str | None = None
    split: str | None = None
    threshold: float | None = None
    alphas: tuple[float, ...] = ()
    pred_ignore: PredIgnore = "error"
    resize_pred: bool = False


@dataclass
class EvaluateReport:
    """Scores and what they were made from; ``counts`` is the confusion matrix, rows truth, columns prediction."""

    prediction: str
    ground_truth: str
    split: str
    images: int
    names: tuple[str, ...]
    scores: Scores
    counts: Counts
    threshold: float | None = None
    alpha: float | None = None
    curve: list[tuple[float, float]] = field(default_factory=list)
    missing_predictions: list[str] = field(default_factory=list)
    missing_ground_truth: list[str] = field(default_factory=list)
    split_given: bool = False
    excluded_pixels: int = 0

    @property
    def unscored(self) -> int:
        """How many predictions, and images of a split that the user named, were not scored."""
        return len(self.missing_ground_truth) + (len(self.missing_predictions) if self.split_given else 0)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``: fractions, ``None`` where there is no value."""
        scores = self.scores
        return {
            "miou": _number(scores.miou),
            "miou_foreground": _number(scores.miou_foreground),
            "miou_all": _number(scores.miou_all),
            "class_iou": {name: _number(iou) for name, iou in zip(self.names, scores.class_iou, strict=True)},
            "pixel_accuracy": _number(scores.pixel_accuracy),
            "mean_accuracy": _number(scores.mean_accuracy),
            "frequency_weighted_iou": _number(scores.frequency_weighted_iou),
            "images": self.images,
            "pixels": scores.pixels,
            "excluded_pixels": self.excluded_pixels,
            "split": self.split,
            "threshold": self.threshold,
            "alpha": self.alpha,
            "curve": [{"setting": setting, "miou": _number(miou)} for setting, miou in self.curve],
            "prediction": self.prediction,
            "ground_truth": self.ground_truth,
            "missing_predictions": self.missing_predictions,
            "missing_ground_truth": self.missing_ground_truth,
        }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
