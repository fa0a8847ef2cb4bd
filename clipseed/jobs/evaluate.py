"""``clipseed evaluate``: score CAMs or masks against ground truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clipseed.data.vocabulary import load_vocabulary, parse_vocabulary
from clipseed.defaults import PredIgnore
from clipseed.errors import InputError, UsageError
from clipseed.evaluate.confusion import Counts, Scores, check_labels, confusion, score
from clipseed.evaluate.per_image import ImageScores
from clipseed.evaluate.sources import MaskSource, find_ground_truth, find_split
from clipseed.evaluate.sweep import DEFAULT_THRESHOLDS, PowerSweep, ThresholdSweep
from clipseed.pseudo.rules import label_mask, thresholding
from clipseed.runtime.threads import ahead
from clipseed.store.cam_records import Cam
from clipseed.store.cams import CamSet
from clipseed.store.label_mask_folder import LabelMaskFolder
from clipseed.store.manifest import Manifest
from clipseed.store.open import open_prediction
from clipseed.types import IGNORE, LabelMask
from clipseed.wording import counted, some


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
    """Scores and what they were made from; ``counts`` is the confusion matrix, rows truth, columns prediction.

    ``coverage`` is the share of pixels with a ground truth that the prediction labels, anything but 255, and
    ``labelled`` are the scores there: the same as ``scores`` unless a predicted 255 counts as background.
    """

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
    coverage: float = 1.0
    labelled: Scores | None = None

    @property
    def unscored(self) -> int:
        """How many predictions, and images of a split that the user named, were not scored."""
        return len(self.missing_ground_truth) + (len(self.missing_predictions) if self.split_given else 0)

    @property
    def missing_matter(self) -> bool:
        """Whether ground truth without prediction is news: that of other splits than the predictions' is not."""
        return self.split_given or self.split == "all"

    @property
    def left_out(self) -> list[str]:
        """What was not scored, and why, in a line for each reason."""
        lines = []
        if ids := self.missing_ground_truth:
            has = counted(len(ids), "prediction has", "predictions have")
            lines.append(f"{has} no ground truth; not scored: {some(ids)}")
        if self.missing_predictions and self.missing_matter:
            ids, given = self.missing_predictions, self.split_given
            what = counted(len(ids), "image" if given else "ground-truth mask") + (f" of split {self.split}" * given)
            lines.append(f"{what} without a prediction; not scored: {some(ids)}")
        if self.excluded_pixels:
            share = self.excluded_pixels / (self.excluded_pixels + self.scores.pixels)
            lines.append(f"{100 * share:.2f} % of the pixels were left out because the prediction is 255 there")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``: fractions, ``None`` where there is no value."""
        scores = self.scores
        return {
            "miou": number(scores.miou),
            "miou_foreground": number(scores.miou_foreground),
            "miou_all": number(scores.miou_all),
            "class_iou": {name: number(iou) for name, iou in zip(self.names, scores.class_iou, strict=True)},
            "pixel_accuracy": number(scores.pixel_accuracy),
            "mean_accuracy": number(scores.mean_accuracy),
            "frequency_weighted_iou": number(scores.frequency_weighted_iou),
            "coverage": number(self.coverage),
            "miou_labelled": number((self.labelled or scores).miou),
            "images": self.images,
            "pixels": scores.pixels,
            "excluded_pixels": self.excluded_pixels,
            "split": self.split,
            "threshold": self.threshold,
            "alpha": self.alpha,
            "curve": [{"setting": setting, "miou": number(miou)} for setting, miou in self.curve],
            "prediction": self.prediction,
            "ground_truth": self.ground_truth,
            "missing_predictions": self.missing_predictions,
            "missing_ground_truth": self.missing_ground_truth,
        }


def number(value: float) -> float | None:
    """A score for ``--json``, which has no word for NaN."""
    return None if math.isnan(value) else float(value)


Advance = Callable[[int], None]
StartScoring = Callable[[int], Advance]
Each = Callable[[str, Counts, LabelMask, LabelMask], None]
NamedEach = Callable[[str, Counts, LabelMask, LabelMask, Sequence[str]], None]


def evaluate(
    options: EvaluateOptions,
    start: StartScoring | None = None,
    each: Each | None = None,
    images: ImageScores | None = None,
) -> EvaluateReport:
    """Score a CAMs output or a folder of masks.

    Args:
        options: What to score against what.
        start: Called with the number of images; returns the progress callback.
        each: Called for every scored image with its id, its own confusion matrix, truth and prediction, at the
            reported setting. CAMs are read a second time for it, as the best setting is known only after the first.
        images: Takes in the score of every image, the same way.

    Raises:
        UsageError: an option is missing or impossible.
        InputError, StoreError: files are missing, damaged or do not fit each other.
    """
    _check(options)
    prediction = open_prediction(options.prediction)
    if isinstance(prediction, LabelMaskFolder):
        return _evaluate_masks(options, prediction, start, _both(each, images))
    with prediction as cams:
        return _evaluate_cams(options, cams, start, _both(each, images))


def _both(each: Each | None, images: ImageScores | None) -> NamedEach | None:
    """One callback for both, which gets the names of the classes as well."""
    if each is None and images is None:
        return None

    def call(identifier: str, counts: Counts, truth: LabelMask, prediction: LabelMask, names: Sequence[str]) -> None:
        if each is not None:
            each(identifier, counts, truth, prediction)
        if images is not None:
            images.add(identifier, counts, truth, prediction, names)

    return call


def _check(options: EvaluateOptions) -> None:
    if options.threshold is not None and options.alphas:
        raise UsageError("--threshold and --alpha are two kinds of background score; give one")
    try:
        if options.threshold is not None:
            thresholding(threshold=options.threshold)
        for alpha in options.alphas:
            thresholding(alpha=alpha)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    if options.pred_ignore not in ("error", "background", "exclude"):
        raise UsageError(f"--pred-ignore {options.pred_ignore}: choose error, background or exclude")


@dataclass(frozen=True)
class _Match:
    """Which ids are scored, and what is missing on either side."""

    split: str
    ids: list[str]
    missing_predictions: list[str]
    missing_ground_truth: list[str]


def _match(
    options: EvaluateOptions, predicted: Sequence[str], truth: MaskSource, dataset: dict[str, Any] | None
) -> _Match:
    if options.split is not None:
        name, wanted = find_split(options.split, truth, dataset)
        have = set(predicted)
        missing_predictions = [key for key in wanted if key not in have]
        candidates = [key for key in wanted if key in have]
    else:
        name = str((dataset or {}).get("split") or "all")
        missing_predictions = sorted(truth.ids() - set(predicted))
        candidates = list(predicted)
    ids = [key for key in candidates if truth.has(key)]
    missing_ground_truth = [key for key in candidates if not truth.has(key)]
    if not ids:
        if not truth.ids() and isinstance(truth, LabelMaskFolder):
            raise InputError(f"{truth.name}: no .png masks here; ground truth is a folder of PNG masks")
        some = f"predictions such as {candidates[0]!r}" if candidates else "no predictions"
        raise InputError(f"{options.prediction} and {truth.name} have no image in common ({some})")
    return _Match(name, ids, missing_predictions, missing_ground_truth)


def _report(
    options: EvaluateOptions, truth: MaskSource, match: _Match, names: tuple[str, ...], counts: Counts
) -> EvaluateReport:
    return EvaluateReport(
        prediction=str(options.prediction),
        ground_truth=truth.name,
        split=match.split,
        images=len(match.ids),
        names=names,
        scores=score(counts),
        counts=counts,
        missing_predictions=match.missing_predictions,
        missing_ground_truth=match.missing_ground_truth,
        split_given=options.split is not None,
    )


class _Sweep(Protocol):
    settings: tuple[float, ...]

    def update(self, cam: Cam, truth: LabelMask) -> None: ...

    def matrices(self) -> list[Counts]: ...


def _evaluate_cams(
    options: EvaluateOptions, cams: CamSet, start: StartScoring | None, each: NamedEach | None
) -> EvaluateReport:
    manifest: Manifest = cams.manifest
    vocabulary = parse_vocabulary(manifest.get("vocabulary"), str(cams.path), "classes")
    if options.classes and load_vocabulary(options.classes).class_names != vocabulary.class_names:
        raise UsageError(f"--classes {options.classes}: the CAMs were made with other classes ({vocabulary.name})")
    names = ("background", *vocabulary.class_names)
    dataset = manifest.get("dataset")
    truth = find_ground_truth(options.gt, dataset, vocabulary=vocabulary, exif=_exif(manifest))
    match = _match(options, list(cams), truth, dataset)
    half = bool(manifest.get("options", {}).get("paper"))
    sweep: _Sweep
    if options.alphas:
        sweep = PowerSweep(len(names), options.alphas)
    else:
        settings = DEFAULT_THRESHOLDS if options.threshold is None else (options.threshold,)
        sweep = ThresholdSweep(len(names), settings, half=half)
    advance = start(len(match.ids) * (2 if each else 1)) if start else (lambda count: None)

    def load(identifier: str) -> tuple[Cam, LabelMask]:
        cam, mask = cams[identifier], truth.read(identifier)
        check_labels(mask, len(names), f"{truth.name}/{identifier}", allow_ignore=True)
        if mask.shape != cam.size:
            if not options.resize_pred:
                raise _size_error(identifier, cam.size, mask.shape)
            cam = replace(cam, size=(mask.shape[0], mask.shape[1]))
        return cam, mask

    for cam, mask in ahead(load, match.ids):
        sweep.update(cam, mask)
        advance(1)
    matrices = sweep.matrices()
    means = [score(matrix).miou for matrix in matrices]
    best = max(range(len(means)), key=lambda k: (-1.0 if math.isnan(means[k]) else means[k], -k))
    report = _report(options, truth, match, names, matrices[best])
    report.curve = list(zip(sweep.settings, means, strict=True))
    if options.alphas:
        report.alpha = sweep.settings[best]
    else:
        report.threshold = sweep.settings[best]
    if each:
        rules = thresholding(threshold=report.threshold, alpha=report.alpha, released=half)
        for cam, mask in ahead(load, match.ids):
            labels = label_mask(cam, rules)
            each(cam.id, confusion(mask, labels, len(names)), mask, labels, names)
            advance(1)
    return report


def _evaluate_masks(
    options: EvaluateOptions, predictions: LabelMaskFolder, start: StartScoring | None, each: NamedEach | None
) -> EvaluateReport:
    if options.threshold is not None or options.alphas:
        raise UsageError(f"--threshold and --alpha apply to CAMs; {options.prediction} holds finished masks")
    manifest = predictions.manifest or {}  # masks of ours say what they hold and belong to
    if options.classes is not None:
        vocabulary = load_vocabulary(options.classes)
    elif "vocabulary" in manifest:
        vocabulary = parse_vocabulary(manifest["vocabulary"], str(options.prediction), "classes")
    else:
        raise UsageError(f"{options.prediction}: say which classes the masks hold, --classes voc, coco, toy or FILE")
    dataset = manifest.get("dataset")
    if not isinstance(dataset, dict | None):
        raise InputError(f"{options.prediction}: its manifest is damaged ('dataset' is no mapping)")
    if options.gt is None and dataset is None:
        raise UsageError("--gt: name the folder with the ground-truth masks")
    predicted = sorted(predictions.ids())
    if not predicted:
        raise InputError(f"{options.prediction}: neither CAMs nor PNG masks in this folder")
    names = ("background", *vocabulary.class_names)
    truth = find_ground_truth(options.gt, dataset, vocabulary=vocabulary, exif=_exif(manifest))
    match = _match(options, predicted, truth, dataset)
    advance = start(len(match.ids)) if start else (lambda count: None)
    tally = _Tally(len(names), options.pred_ignore == "exclude")

    def load(identifier: str) -> tuple[LabelMask, LabelMask]:
        prediction, mask = predictions.read(identifier), truth.read(identifier)
        check_labels(mask, len(names), f"{truth.name}/{identifier}", allow_ignore=True)
        where = f"{predictions.name}/{identifier}.png"
        check_labels(prediction, len(names), where, allow_ignore=True)
        if options.pred_ignore == "error" and (prediction == IGNORE).any():
            raise InputError(
                f"{where}: holds 255 (ignore), which cannot be scored; say what it means with "
                "--pred-ignore background or --pred-ignore exclude"
            )
        if prediction.shape != mask.shape:
            if not options.resize_pred:
                raise _size_error(identifier, prediction.shape, mask.shape)
            prediction = _resized(prediction, mask.shape)
        return prediction, mask

    # The data come back in the order of the ids.
    for identifier, (prediction, mask) in zip(match.ids, ahead(load, match.ids), strict=True):
        image_counts = tally.add(mask, prediction)
        if each:
            each(identifier, image_counts, mask, prediction, names)
        advance(1)
    report = _report(options, truth, match, names, tally.counts)
    report.excluded_pixels = tally.unlabelled if tally.exclude else 0
    report.labelled, report.coverage = score(tally.labelled), tally.coverage
    return report


class _Tally:
    """Confusion matrices of masks in which 255 is left out, or counts as background; beside them those without 255."""

    def __init__(self, classes: int, exclude: bool) -> None:
        self.classes, self.exclude = classes, exclude
        self.counts = np.zeros((classes, classes), np.int64)
        self.labelled = self.counts.copy()
        self.unlabelled = 0

    def add(self, truth: LabelMask, prediction: LabelMask) -> Counts:
        """Take in one image, and give its own matrix."""
        unsure = prediction == IGNORE
        certain = np.where(unsure, np.uint8(0), prediction)
        known = np.where(unsure, np.uint8(IGNORE), truth)
        labelled = confusion(known, certain, self.classes)
        counts = labelled if self.exclude or not unsure.any() else confusion(truth, certain, self.classes)
        self.counts += counts
        self.labelled += labelled
        self.unlabelled += int((unsure & (truth != IGNORE)).sum())
        return counts

    @property
    def coverage(self) -> float:
        """Share of the pixels with a ground truth that are labelled."""
        labelled = int(self.labelled.sum())
        total = labelled + self.unlabelled
        return labelled / total if total else math.nan


def _exif(manifest: Manifest) -> bool:
    """Whether what a manifest describes lies on images as their EXIF turns them."""
    made = manifest.get("options")
    return isinstance(made, dict) and bool(made.get("exif"))


def _size_error(identifier: str, predicted: Sequence[int], truth: Sequence[int]) -> InputError:
    return InputError(
        f"{identifier}: the prediction is {predicted[1]}x{predicted[0]} pixels, the ground truth "
        f"{truth[1]}x{truth[0]}; if that is meant, give --resize-pred"
    )


def _resized(labels: LabelMask, shape: tuple[int, ...]) -> LabelMask:
    """Nearest neighbour."""
    from PIL import Image

    return np.asarray(Image.fromarray(labels).resize((shape[1], shape[0]), Image.Resampling.NEAREST))
