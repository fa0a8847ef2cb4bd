"""The VOC metric: intersection over union from one confusion matrix over the whole data set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipseed.errors import InputError
from clipseed.types import IGNORE, LabelMask

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """Scores of one confusion matrix, as fractions; class 0 is the background.

    Attributes:
        class_iou: IoU per class; NaN where the class occurs neither in the ground truth nor in the prediction.
        miou: Mean IoU over the classes that occur in the ground truth (what the field reports).
        miou_foreground: The same without the background.
        miou_all: Mean over all classes with an IoU, also those only predicted; NaN-free classes as in ``class_iou``.
        pixel_accuracy: Share of scored pixels that are right.
        mean_accuracy: Mean recall over the classes that occur in the ground truth.
        frequency_weighted_iou: IoU weighted by the class's share of the ground truth.
        pixels: Scored pixels (ignored ones left out).
    """

    class_iou: npt.NDArray[np.float64]
    miou: float
    miou_foreground: float
    miou_all: float
    pixel_accuracy: float
    mean_accuracy: float
    frequency_weighted_iou: float
    pixels: int


def confusion(truth: LabelMask, prediction: LabelMask, classes: int) -> Counts:
    """Confusion matrix ``(classes, classes)``, rows truth, columns prediction; truth 255 is left out.

    Both arrays have the same shape and hold values below ``classes`` (see :func:`check_labels`).
    """
    scored = truth != IGNORE
    index = truth[scored].astype(np.int64) * classes + prediction[scored]
    return np.bincount(index, minlength=classes * classes).reshape(classes, classes)


def check_labels(labels: LabelMask, classes: int, where: str, *, allow_ignore: bool) -> None:
    """Raise :class:`InputError` when a mask holds a value that is no class (and not an allowed 255)."""
    values = np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
    bad = [int(v) for v in values if v >= classes and not (allow_ignore and v == IGNORE)]
    if bad:
        known = f"0 (background) to {classes - 1}" + (" and 255 (ignored)" if allow_ignore else "")
        raise InputError(
            f"{where}: holds the value {bad[0]}, but this class list has {known}: is it a label mask, made with the "
            "same class list?"
        )


def score(counts: Counts) -> Scores:
    """Turn a confusion matrix into scores.

    A class that occurs in the truth and is never predicted counts as 0; one that is only predicted has IoU 0 but does
    not enter :attr:`Scores.miou`.
    """
    hit = np.diag(counts).astype(np.float64)
    truth, predicted = counts.sum(axis=1).astype(np.float64), counts.sum(axis=0).astype(np.float64)
    union = truth + predicted - hit
    iou = np.divide(hit, union, out=np.full_like(hit, np.nan), where=union > 0)
    occurs = truth > 0
    total = truth.sum()
    recall = np.divide(hit, truth, out=np.zeros_like(hit), where=occurs)
    share = truth / total if total else truth
    return Scores(
        class_iou=iou,
        miou=_mean(iou[occurs]),
        miou_foreground=_mean(iou[1:][occurs[1:]]),
        miou_all=_mean(iou[union > 0]),
        pixel_accuracy=float(hit.sum() / total) if total else float("nan"),
        mean_accuracy=_mean(recall[occurs]),
        frequency_weighted_iou=float((share[occurs] * iou[occurs]).sum()) if total else float("nan"),
        pixels=int(total),
    )


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")
