"""``clipseed report``: one HTML page about one or more scored inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from clipseed.data.dataset import image_finder, relocated
from clipseed.data.types import check_id
from clipseed.defaults import REPORT_SHOWN, REPORT_TITLE
from clipseed.errors import ImageError, StoreError, UsageError
from clipseed.jobs.evaluate import EvaluateOptions, EvaluateReport, StartScoring, evaluate
from clipseed.report.gallery import Example, Gallery
from clipseed.report.page import Entry, render_page
from clipseed.store.files import write_text
from clipseed.store.label_mask_folder import LabelMaskFolder
from clipseed.store.manifest import Manifest
from clipseed.store.open import content_of, open_prediction

MOST_SHOWN = 200
"""Most images of a kind; each takes about 120 kB of the page."""


@dataclass(frozen=True)
class ReportOptions:
    """Everything ``clipseed report`` can be told.

    Attributes:
        inputs: CAMs or folders of masks.
        scoring: How to score them; its ``prediction`` is replaced by each input in turn.
        out: The HTML file.
        images: Folder of the images, instead of what an input itself says.
        root: Folder of the data set, the same.
        worst, best: How many images to show of either kind.
    """

    inputs: tuple[Path, ...]
    scoring: EvaluateOptions
    out: Path = Path("report.html")
    images: Path | None = None
    worst: int = REPORT_SHOWN
    best: int = REPORT_SHOWN
    title: str = REPORT_TITLE
    root: Path | None = None


@dataclass
class ReportResult:
    """What was written: the page, and per input its scores and what the page says about it."""

    out: Path
    reports: list[EvaluateReport] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    @property
    def unscored(self) -> int:
        """How many images were not scored, of the input that lacks most."""
        return max((report.unscored for report in self.reports), default=0)

    @property
    def notes(self) -> list[tuple[str, str]]:
        """Input and what should be known about its scores."""
        return [(entry.name, note) for entry in self.entries for note in entry.notes]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        inputs = [
            {**report.as_dict(), "worst": _shown(entry.gallery.worst), "best": _shown(entry.gallery.best)}
            for report, entry in zip(self.reports, self.entries, strict=True)
        ]
        return {"out": str(self.out), "inputs": inputs}


def _shown(examples: list[Example]) -> list[dict[str, Any]]:
    return [{"id": example.id, "miou": example.score} for example in examples]


def write_report(options: ReportOptions, start: Callable[[str], StartScoring] | None = None) -> ReportResult:
    """Score every input and write the page about them.

    Args:
        options: What to score, and where to write.
        start: From an input's name to the start callback of :func:`~clipseed.jobs.evaluate.evaluate`.

    Raises:
        UsageError: an option is missing or impossible.
        InputError, StoreError: files are missing, damaged or do not fit each other, or ``out`` cannot be written.
    """
    _check(options)
    result = ReportResult(options.out)
    names = _names(options.inputs)
    contents = [content_of(path) for path in options.inputs]
    all_masks = all(content == "label masks" for content in contents)
    for path, name, content in zip(options.inputs, names, contents, strict=True):
        scoring = replace(options.scoring, prediction=path)
        if content == "label masks" and not all_masks:
            scoring = replace(scoring, threshold=None, alphas=())  # they are for the CAMs beside the masks
        gallery = Gallery(options.worst, options.best)
        report = evaluate(scoring, start(name) if start else None, gallery.add)
        result.reports.append(report)
        result.entries.append(_entry(options, name, path, report, gallery))
    write_text(options.out, render_page(options.title, result.entries))
    return result


@dataclass(frozen=True)
class TrainingReport:
    """What was written about a segmenter: the page, its last step, and the best score where it was scored."""

    out: Path
    steps: int
    best: float | None


def write_training_report(segmenter: Path, out: Path, title: str) -> TrainingReport:
    """Write the page about how a segmenter learned.

    Args:
        segmenter: File of ``clipseed train``; what its run kept lies beside it.
        out: The HTML file.
        title: Heading.

    Raises:
        UsageError: the run's folder is not there any more.
        WeightsError: no segmenter.
        StoreError: ``out`` cannot be written.
    """
    from clipseed.report.training import render_training
    from clipseed.train.metrics import METRICS, read_metrics
    from clipseed.train.previews import read_previews
    from clipseed.train.running import training_folder
    from clipseed.train.segmenter import read_segmenter

    file = read_segmenter(segmenter)
    folder = training_folder(segmenter)
    metrics = read_metrics(folder / METRICS)
    if not metrics:
        raise UsageError(f"{segmenter}: nothing is known of its training; {folder / METRICS} is not there")
    scores = [row["validation"]["score"] for row in metrics if "validation" in row]
    best = max(scores) if scores else None
    steps = int(metrics[-1]["step"])
    subtitle = f"{segmenter}: {file.about['kind']}, {len(file.vocabulary.classes)} classes, {steps} steps"
    write_text(out, render_training(title, subtitle, metrics, read_previews(folder), file.about))
    return TrainingReport(out, steps, best)


def _check(options: ReportOptions) -> None:
    if not options.inputs:
        raise UsageError("name at least one CAM file or folder of label masks")
    for name, count in (("--worst", options.worst), ("--best", options.best)):
        if not 0 <= count <= MOST_SHOWN:
            raise UsageError(f"{name} {count}: give a number from 0 to {MOST_SHOWN}")
    if options.images is not None and options.root is not None:
        raise UsageError("--images and --root: give one of them")
    if options.images is not None and not options.images.is_dir():
        raise UsageError(f"--images {options.images}: no such folder")
    # Scoring may take long; what would fail at its end fails now.
    if options.out.is_dir():
        raise UsageError(f"--out {options.out}: is a folder; give the name of a file in it")
    if not options.out.parent.is_dir():
        raise StoreError(f"{options.out}: the folder {options.out.parent} does not exist")


def _names(paths: tuple[Path, ...]) -> list[str]:
    """Short names, all different: the last part of the path, or all of it, or with a number."""
    short = [path.name or str(path) for path in paths]
    names = [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({k})" for k, name in enumerate(names, 1)]


def _entry(options: ReportOptions, name: str, path: Path, report: EvaluateReport, gallery: Gallery) -> Entry:
    manifest = _manifest(path)
    chosen = report.threshold if report.alpha is None else report.alpha
    return Entry(
        name=name,
        path=report.prediction,
        ground_truth=report.ground_truth,
        split=report.split,
        images=report.images,
        class_names=report.names,
        scores=report.scores,
        counts=report.counts,
        setting=_setting(report),
        curve=(name, sorted(report.curve), chosen) if chosen is not None and len(report.curve) > 1 else None,
        axis="threshold" if report.alpha is None else "alpha",
        gallery=gallery,
        find=_Images(options, report, manifest),
        notes=_notes(report, gallery),
        manifest=manifest,
    )


def _setting(report: EvaluateReport) -> str:
    if report.alpha is not None:
        what = f"background (1 − max)^{report.alpha:g}"
    elif report.threshold is not None:
        what = f"threshold {report.threshold:g}"
    else:
        return "masks as they are"
    if len(report.curve) > 1:
        return f"{what}, the best of {len(report.curve)} tried on this ground truth"
    return f"{what}, fixed"


def _notes(report: EvaluateReport, gallery: Gallery) -> list[str]:
    """What the page has to say about incomplete scores."""
    notes = []
    if report.missing_ground_truth:
        notes.append(
            f"{len(report.missing_ground_truth)} predictions have no ground truth and were not scored: "
            f"{_some(report.missing_ground_truth)}"
        )
    if report.missing_predictions:
        where = f"images of split {report.split}" if report.split_given else "ground-truth masks"
        notes.append(
            f"{len(report.missing_predictions)} {where} have no prediction and were not scored: "
            f"{_some(report.missing_predictions)}"
        )
    if report.excluded_pixels:
        share = report.excluded_pixels / (report.excluded_pixels + report.scores.pixels)
        notes.append(f"{100 * share:.2f} % of the pixels were left out because the prediction is 255 there")
    if gallery.unscored:
        notes.append(f"{gallery.unscored} images have no score of their own, as all their ground truth is ignored")
    return notes


def _some(ids: list[str], count: int = 5) -> str:
    return ", ".join(ids[:count]) + (f" and {len(ids) - count} more" if len(ids) > count else "")


def _manifest(path: Path) -> Manifest | None:
    """The manifest of CAMs, or the one beside masks; ``None`` when there is none that can be read."""
    opened = open_prediction(path, verify=False)
    if isinstance(opened, LabelMaskFolder):
        return opened.manifest
    with opened as cams:
        return cams.manifest


class _Images:
    """Finds an example's image: below ``--images``, or where the manifest or the ground truth says.

    Raises:
        ImageError, InputError: it is not known where images are, this one is not there, or has another size.
    """

    def __init__(self, options: ReportOptions, report: EvaluateReport, manifest: Manifest | None) -> None:
        made = (manifest or {}).get("options")
        exif = isinstance(made, dict) and bool(made.get("exif"))
        self._any_size = options.scoring.resize_pred
        if options.root is not None:
            manifest = relocated(manifest or {}, None, options.root)
        dataset = _image_set(options.images, report.ground_truth, manifest)
        self._find = image_finder(dataset, exif=exif) if dataset else None

    def __call__(self, example: Example) -> Image:
        if self._find is None:
            raise ImageError("this input does not say where its images are; name the folder with --images")
        # An id from a damaged or foreign file must not lead out of the folder.
        image = self._find(check_id(example.id, "the report"))
        height, width = example.size
        if image.size != (width, height) and not self._any_size:
            raise ImageError(f"it is {image.width}x{image.height} pixels now, its ground truth {width}x{height}")
        return image


def _image_set(images: Path | None, truth: str, manifest: Manifest | None) -> dict[str, Any] | None:
    """What :func:`image_finder` needs, or ``None`` where the images cannot be known."""
    if images is not None:
        return {"images": str(images)}
    dataset = (manifest or {}).get("dataset")
    if isinstance(dataset, dict) and dataset.get("name") == "toy":
        seed = str(dataset.get("toy_seed") or 0)
        return {"name": "toy", "toy_seed": seed} if seed.isdecimal() and len(seed) < 20 else None
    if isinstance(dataset, dict) and dataset.get("images"):
        return dataset
    if truth.startswith("toy:"):
        return {"name": "toy", "toy_seed": truth.removeprefix("toy:")}
    beside = Path(truth).absolute().parent / "JPEGImages"
    return {"images": str(beside)} if beside.is_dir() else None
