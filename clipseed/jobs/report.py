"""``clipseed report``: one HTML page about one or more scored inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from clipseed.data.dataset import image_finder, relocated
from clipseed.data.types import check_id
from clipseed.data.vocabulary import load_vocabulary, parse_vocabulary
from clipseed.defaults import LABEL_THRESHOLD, REPORT_SHOWN, REPORT_TITLE
from clipseed.errors import ClipseedError, ImageError, InputError, StoreError, UsageError
from clipseed.jobs.evaluate import EvaluateOptions, EvaluateReport, StartScoring, evaluate, number
from clipseed.pseudo.rules import label_mask, thresholding
from clipseed.report.gallery import Example, Gallery
from clipseed.report.page import Entry, render_page
from clipseed.report.survey import Survey, areas_of
from clipseed.report.unscored import Shown, SurveyedInput, render_unscored
from clipseed.store.cam_records import Cam
from clipseed.store.cams import CamSet
from clipseed.store.files import write_text
from clipseed.store.label_mask_folder import LabelMaskFolder
from clipseed.store.manifest import Manifest
from clipseed.store.open import content_of, open_prediction
from clipseed.types import LabelMask
from clipseed.wording import counted

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


@dataclass
class SurveyResult:
    """What was written about inputs without a truth: the page, and what it says of each input and of single images."""

    out: Path
    inputs: list[SurveyedInput]
    worth: list[tuple[str, str]]

    @property
    def notes(self) -> list[tuple[str, str]]:
        """Input and what should be known about it."""
        return [(one.name, note) for one in self.inputs for note in one.notes]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "out": str(self.out),
            "inputs": [
                {
                    "input": one.name, "images": len(one.survey.images), "coverage": one.survey.coverage,
                    "foreground": one.survey.foreground, "empty_labels": one.survey.empty,
                    "classes": [{**vars(item), "median": number(item.median)} for item in one.survey.classes],
                }
                for one in self.inputs
            ],
            "worth_a_look": [{"id": key, "why": why} for key, why in self.worth],
        }  # fmt: skip


def _shown(examples: list[Example]) -> list[dict[str, Any]]:
    return [{"id": example.id, "miou": example.score} for example in examples]


def write_report(
    options: ReportOptions, start: Callable[[str], StartScoring] | None = None
) -> ReportResult | SurveyResult:
    """Score every input and write the page about them; without any ground truth, about what they hold.

    Args:
        options: What to score, and where to write.
        start: From an input's name to the start callback of :func:`~clipseed.jobs.evaluate.evaluate`.

    Raises:
        UsageError: an option is missing or impossible.
        InputError, StoreError: files are missing, damaged or do not fit each other, or ``out`` cannot be written.
    """
    _check(options)
    if options.scoring.gt is None and not any(_truth_known(path) for path in options.inputs):
        return _survey(options, start)
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
    notes = report.left_out
    if report.coverage < 1 and report.labelled is not None:
        there = report.labelled.miou
        notes.append(f"{100 * report.coverage:.2f} % of the pixels are labelled; mean IoU there {100 * there:.2f} %")
    if gallery.unscored:
        notes.append(
            f"{counted(gallery.unscored, 'image has', 'images have')} no score: all their ground truth is ignored"
        )
    return notes


def _manifest(path: Path) -> Manifest | None:
    """The manifest of CAMs, or the one beside masks; ``None`` when there is none that can be read."""
    opened = open_prediction(path, verify=False)
    if isinstance(opened, LabelMaskFolder):
        return opened.manifest
    with opened as cams:
        return cams.manifest


def _truth_known(path: Path) -> bool:
    """Whether an input says where its ground truth is."""
    dataset = (_manifest(path) or {}).get("dataset")
    return isinstance(dataset, dict) and dataset.get("ground_truth") is not None


# Without a truth ------------------------------------------------------------------------------------------------------


class _Source:
    """An input without a truth: CAMs, labelled by a threshold, or label masks."""

    def __init__(self, options: ReportOptions, name: str, path: Path, stack: ExitStack) -> None:
        self.name, self.path = name, path
        self._opened = opened = open_prediction(path)
        if isinstance(opened, CamSet):
            stack.enter_context(opened)
        self.manifest = opened.manifest
        self.cams = opened if isinstance(opened, CamSet) else _made_from(opened.manifest, stack)
        self.cams_from = name if isinstance(opened, CamSet) else "" if self.cams is None else self.cams.path.name
        self._rules = thresholding(threshold=options.scoring.threshold or LABEL_THRESHOLD)
        vocabulary = (self.manifest or {}).get("vocabulary")
        self.names: tuple[str, ...] = ()
        if options.scoring.classes is not None:
            self.names = load_vocabulary(options.scoring.classes).class_names
        elif vocabulary is not None:
            self.names = parse_vocabulary(vocabulary, str(path), "classes").class_names

    @property
    def setting(self) -> str:
        """How labels come about."""
        if not isinstance(self._opened, CamSet):
            return "label masks"
        return f"CAMs, labelled at threshold {self._rules.seeding.pixel_background.value:g}"

    def ids(self) -> list[str]:
        """All images."""
        return list(self._opened) if isinstance(self._opened, CamSet) else sorted(self._opened.ids())

    def mask(self, identifier: str) -> LabelMask | None:
        """The label mask of an image; ``None`` where there is none."""
        if isinstance(self._opened, CamSet):
            return label_mask(self._opened[identifier], self._rules) if identifier in self._opened else None
        return self._opened.read(identifier) if self._opened.has(identifier) else None

    def labels(self, identifier: str) -> tuple[int, ...] | None:
        """Classes that an image is said to show; ``None``: not known."""
        if isinstance(self._opened, CamSet):
            return tuple(self._opened.classes(identifier).tolist())
        return self._opened.note(identifier).classes


def _made_from(manifest: Manifest | None, stack: ExitStack) -> CamSet | None:
    """The CAMs that masks were made from, where they are still there."""
    source = (manifest or {}).get("input")
    try:
        found = open_prediction(Path(str(source))) if source else None
    except ClipseedError:
        return None
    return stack.enter_context(found) if isinstance(found, CamSet) else None


def _survey(options: ReportOptions, start: Callable[[str], StartScoring] | None) -> SurveyResult:
    """Write the page about inputs without a truth."""
    with ExitStack() as stack:
        names = _names(options.inputs)
        sources = [
            _Source(options, name, path, stack) for name, path in zip(names, options.inputs, strict=True)
        ]  # fmt: skip
        inputs = []
        for source in sources:
            ids = source.ids()
            if not ids:
                raise InputError(f"{source.path}: neither CAMs nor PNG masks in this folder")
            advance = start(source.name)(len(ids)) if start else (lambda count: None)
            survey = Survey(source.names)
            for key in ids:
                mask = source.mask(key)
                if mask is not None:
                    survey.add(areas_of(key, source.labels(key), mask))
                advance(1)
            inputs.append(SurveyedInput(source.name, survey, source.setting, [], source.manifest))
        last = inputs[-1].survey  # the most refined, as people list them
        worth = [(image.id, why) for image, why in last.worth_a_look(options.worst)]
        others = [image.id for image in last.others(options.best, [key for key, _ in worth])]
        find = _finder(options, sources)
        page = render_unscored(
            options.title, inputs, [_look(sources, find, key, why) for key, why in worth],
            [_look(sources, find, key, "") for key in others],
        )  # fmt: skip
    write_text(options.out, page)
    return SurveyResult(options.out, inputs, worth)


def _finder(options: ReportOptions, sources: Sequence[_Source]) -> Callable[[str], Image]:
    manifest = next((source.manifest for source in sources if source.manifest), {})
    if options.root is not None:
        manifest = relocated(manifest, None, options.root)
    dataset = _image_set(options.images, "", manifest)
    if dataset is None:
        return _unknown_place
    return image_finder(dataset, exif=bool((manifest.get("options") or {}).get("exif")))


def _unknown_place(identifier: str) -> Image:
    raise ImageError("this input does not say where its images are; name the folder with --images")


def _look(sources: Sequence[_Source], find: Callable[[str], Image], key: str, why: str) -> Shown:
    photo: Image | str
    try:
        photo = find(check_id(key, "the report"))
    except ClipseedError as error:
        photo = str(error)
    cams: dict[str, tuple[str, Cam]] = {}
    masks = []
    for source in sources:
        if source.cams is not None and key in source.cams:
            cams.setdefault(str(source.cams.path.resolve()), (source.cams_from, source.cams[key]))
        mask = source.mask(key)
        if mask is not None:
            masks.append((source.name, mask))
    return Shown(key, why, photo, list(cams.values()), masks)


# With a truth ---------------------------------------------------------------------------------------------------------


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
    if not truth:
        return None
    return {"images": str(beside)} if beside.is_dir() else None
