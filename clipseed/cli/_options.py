"""Options that several commands share, each defined once, and the groups that commands take them in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, get_args

import typer

from clipseed.defaults import (
    CAM_MAX_SIDE,
    MAX_PIXELS,
    TAG_THRESHOLD,
    WEIGHTS,
    DatasetName,
    EmptyPolicy,
    EngineName,
    Precision,
    PredIgnore,
)
from clipseed.defaults import MODEL as MODEL_NAME
from clipseed.errors import UsageError

if TYPE_CHECKING:
    from clipseed.jobs.evaluate import EvaluateOptions

_MOST_WORKERS = 1024
ANY = "any"
"""What ``--allow-skipped`` alone stands for."""
AUTO, FOLDERS = "auto", "folders"
"""Words that ``--labels`` takes instead of a file."""
SOFTMAX_FLOOR = (
    "Added to the softmax's sum, whose exponentials are those of distances to the strongest of all classes, absent "
    "ones too; FMA-WSSS's code: 1e-5 (default: 0, the exact softmax)."
)
data_option = partial(typer.Option, rich_help_panel="Data set")
model_option = partial(typer.Option, rich_help_panel="Model")
method_option = partial(typer.Option, rich_help_panel="Method")
score_option = partial(typer.Option, rich_help_panel="Scoring")
train_option = partial(typer.Option, rich_help_panel="Training")
run_option = partial(typer.Option, rich_help_panel="Run")
output_option = partial(typer.Option, rich_help_panel="Output")

# Options of a few commands -------------------------------------------------------------------------------------------

MovedImages = Annotated[Optional[Path], data_option(help="Where the images are now, if they have moved.")]
MovedRoot = Annotated[Optional[Path], data_option(help="Where the data set is now, if it has moved (voc, coco).")]
Split = Annotated[
    Optional[str], data_option(help="train, trainaug, val, or a file with one id per line; toy: held-out, train.")
]
Labels = Annotated[
    Optional[str],
    data_option(
        help="What each image shows: CSV, one-hot CSV, JSON or text; folders: each lies in its class's folder; auto: "
        "CLIP tags images that have none."
    ),
]
TagThreshold = Annotated[
    Optional[float],
    data_option(
        help=f"--labels auto: a tag scores at least this share of the best word's score (default: {TAG_THRESHOLD}).",
        min=0.0,
        max=1.0,
    ),
]
TagTopK = Annotated[Optional[int], data_option(help="--labels auto: at most so many tags an image.", min=1)]


def _class_lists() -> list[str]:
    from clipseed.data.vocabulary import builtin_vocabularies

    return list(builtin_vocabularies())


Classes = Annotated[
    Optional[str],
    data_option(help="Class names and words: voc, coco, coco-corrected, toy or a file.", autocompletion=_class_lists),
]
Background = Annotated[
    Optional[str],
    data_option(
        help="Words that compete with the classes: none, general, those of voc or coco, or a file with one per "
        "line (default: the class list's; general where it names none)."
    ),
]
Template = Annotated[Optional[list[str]], data_option(help="Prompt with one {}; several are averaged.")]
Permissive = Annotated[
    bool, model_option("--permissive", help="Refuse weights that are not known to be free for commercial use.")
]
Prompts = Annotated[
    Optional[Path],
    data_option(help="Learned prompts (clipseed train prompts, or FMA-WSSS's own) in place of the words of --classes."),
]
Device = Annotated[str, run_option(help="auto, cpu, cuda, cuda:N or mps.")]
PrecisionOption = Annotated[Precision, run_option("--precision", help="Numbers that the model computes with.")]
BatchSize = Annotated[str, run_option(help="auto, or images per batch.")]
Workers = Annotated[str, run_option(help="auto, or decoding processes (0: a thread of this one).")]
Empty = Annotated[
    EmptyPolicy,
    output_option(
        help="Masks of images in which some label got no pixel: background (they stay as they are), ignore (0 becomes "
        "255) or skip (not written)."
    ),
]
AllowSkipped = Annotated[
    Optional[str],
    output_option(
        "--allow-skipped",
        metavar="[N]",
        help="End with 0, not 3, although up to N images (alone: any number) were left out.",
        autocompletion=lambda: [ANY],
    ),
]
Json = Annotated[bool, output_option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, output_option("--debug", help="Show tracebacks.")]


# Groups ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DatasetArguments:
    """Which data set, and where it is."""

    dataset: Annotated[
        Optional[DatasetName],
        data_option(help="voc, coco, folder, or toy, which is built in (default: folder, with --images)."),
    ] = None
    root: Annotated[
        Optional[Path], data_option(help="Folder of the devkit (default: $CLIPSEED_VOC or the working folder).")
    ] = None
    images: Annotated[Optional[Path], data_option(help="Folder with the images (folder, coco).")] = None
    split: Split = None

    def __post_init__(self) -> None:
        if self.dataset is None and self.images is None:
            raise UsageError("name the images: --images DIR, or --dataset voc, coco or toy")
        if self.dataset is None:
            object.__setattr__(self, "dataset", "folder")


@dataclass(frozen=True, kw_only=True)
class ReadingArguments:
    """Which of the images are read, and how."""

    limit: Annotated[Optional[int], data_option(help="Only the first N images.", min=1)] = None
    exif: Annotated[bool, data_option("--exif", help="Turn images as their EXIF orientation says.")] = False
    max_pixels: Annotated[int, data_option(help="Refuse larger images before decoding them.", min=1)] = MAX_PIXELS


@dataclass(frozen=True, kw_only=True)
class TowerArguments:
    """Which CLIP."""

    model: Annotated[
        Optional[str], model_option(help=f"open_clip name (default: {MODEL_NAME}, or read off a file).")
    ] = None
    weights: Annotated[
        Optional[str], model_option(help=f"Pretrained tag, file, or toy (default: {WEIGHTS}; toy for --dataset toy).")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ModelArguments(TowerArguments):
    """Which CLIP, and the size at which it sees images."""

    max_side: Annotated[int, model_option(help="Shrink longer images to this side; 0: never.", min=0)] = CAM_MAX_SIDE
    min_side: Annotated[int, model_option(help="Enlarge shorter images to this side; 0: never.", min=0)] = 0


@dataclass(frozen=True, kw_only=True)
class ComputeArguments:
    """Where CLIP runs, in which type, and how many images at once."""

    device: Device = "auto"
    precision: PrecisionOption = "auto"
    batch_size: BatchSize = "auto"

    def parsed(self) -> dict[str, Any]:
        """As the jobs' options have them."""
        batch_size = auto_or_number(self.batch_size, "--batch-size")
        return {"device": self.device, "precision": self.precision, "batch_size": batch_size}


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """What every command has that streams a data set into an output."""

    workers: Workers = "auto"
    shard: Annotated[
        Optional[str],
        run_option(help="i/n: only the i-th of n shards, counted from 1 (default: what torchrun or Slurm say)."),
    ] = None
    engine: Annotated[EngineName, run_option(help="ray: the workers of a Ray cluster.")] = "local"
    ray_address: Annotated[Optional[str], run_option(help="Of the cluster (default: $RAY_ADDRESS, or here).")] = None
    ray_workers: Annotated[str, run_option(help="auto (one per GPU, or as fit the CPUs), or a number.")] = "auto"
    ray_cpus: Annotated[str, run_option(help="CPUs of each worker without GPU: auto or a number.")] = "auto"
    overwrite: Annotated[bool, output_option("--overwrite", help="Start again, deleting what is there.")] = False
    allow_skipped: AllowSkipped = None
    report: Annotated[
        Optional[Path], output_option(help="Write counts, timings and skipped inputs to this JSON file.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """How anything is trained; see :class:`clipseed.train.running.TrainOptions`."""

    accumulate: Annotated[
        Optional[int],
        train_option(help="Parts that each process takes its batch in (default: 1, or as published).", min=1),
    ] = None
    seed: Annotated[int, train_option(help="Of first weights, order, augmentation and dropout.", min=0)] = 0
    init: Annotated[Optional[Path], train_option(help="Start from the weights of this file. Not for going on.")] = None
    device: Device = "auto"
    precision: PrecisionOption = "auto"
    workers: Annotated[int, run_option(help="Processes that read images; 0: between the steps.", min=0, max=1024)] = 0
    keep_every: Annotated[int, run_option(help="Steps between checkpoints.", min=1)] = 500
    overwrite: Annotated[bool, output_option("--overwrite", help="Begin anew, deleting what is there.")] = False
    allow_skipped: AllowSkipped = None

    def parsed(self) -> dict[str, Any]:
        """As the jobs' options have them."""
        from clipseed.device import pick_device

        general = {key: value for key, value in vars(self).items() if key not in {"device", "allow_skipped"}}
        return {**general, "device": pick_device(self.device)}


@dataclass(frozen=True, kw_only=True)
class ValidationArguments:
    """How a segmenter is scored while it is trained."""

    val: Annotated[
        Optional[str],
        train_option(help="Split that is scored while training; the best stays as NAME-best.safetensors."),
    ] = None
    val_every: Annotated[int, train_option(help="Steps between two scores.", min=1)] = 1000
    val_limit: Annotated[Optional[int], train_option(help="Score only its first N images.", min=1)] = None
    gt: Annotated[
        Optional[str], train_option(help="Folder of its ground-truth masks (default: the data set's own).")
    ] = None


@dataclass(frozen=True, kw_only=True)
class OutputArguments:
    """How a command talks."""

    json: Json = False
    quiet: Annotated[bool, output_option("--quiet", "-q", help="No progress, no notes; errors only.")] = False
    debug: Debug = False


@dataclass(frozen=True, kw_only=True)
class ScoringArguments:
    """How predictions are scored against ground truth."""

    gt: Annotated[
        Optional[str],
        score_option(
            help="Folder of ground-truth masks, below here or the data set's root (default: the data set's own)."
        ),
    ] = None
    classes: Annotated[Optional[str], score_option(help="voc, coco, toy or a file; CAMs bring their own.")] = None
    split: Annotated[Optional[str], score_option(help="Score only this list: a name in the devkit, or a file.")] = None
    threshold: Annotated[
        Optional[float], score_option(help="One background score for CAMs instead of the best of a sweep.")
    ] = None
    alpha: Annotated[
        Optional[str], score_option(help="CLIP-ES's background exponents, e.g. 1,2 (the best counts).")
    ] = None
    pred_ignore: Annotated[PredIgnore, score_option(help="What a predicted 255 is.")] = "error"
    resize_pred: Annotated[bool, score_option("--resize-pred", help="Resize predictions of another size.")] = False

    def of(self, prediction: Path) -> EvaluateOptions:
        """What the job is told.

        Raises:
            UsageError: ``--alpha`` is no list of numbers.
        """
        from clipseed.jobs.evaluate import EvaluateOptions

        alphas = () if self.alpha is None else numbers(self.alpha, "--alpha")
        return EvaluateOptions(
            prediction, self.gt, self.classes, self.split, self.threshold, alphas, self.pred_ignore, self.resize_pred
        )


def label_source(
    labels: str | None, threshold: float | None, top_k: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``--labels`` as data sets take it, and the options of tagging that were given.

    Raises:
        UsageError: options of tagging without tagging.
    """
    tagging = given(tag_threshold=threshold, tag_top_k=top_k)
    if tagging and labels != AUTO:
        raise UsageError("--tag-threshold and --tag-top-k belong to --labels auto")
    named = Path(labels) if labels is not None and labels not in (AUTO, FOLDERS) else None
    return {"labels": named, "auto_labels": labels == AUTO, "folder_labels": labels == FOLDERS}, tagging


# Values ---------------------------------------------------------------------------------------------------------------


def listed(choices: Any) -> str:
    """The choices of a ``Literal`` in a sentence, where they are too long for a column of the help."""
    return ", ".join(get_args(choices))


def workers_of(text: str) -> int | None:
    """``--workers``: ``auto`` to ``None``, or a number of processes that a machine can take."""
    found = auto_or_number(text, "--workers")
    if found is not None and found > _MOST_WORKERS:
        raise UsageError(f"--workers {text}: give auto or a number up to {_MOST_WORKERS}")
    return found


def auto_or_number(text: str, option: str) -> int | None:
    """``auto`` to ``None``, digits to a number.

    Raises:
        UsageError: anything else.
    """
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise UsageError(f"{option} {text[:40]}: give auto or a number")
    return int(text)


def with_values(words: Sequence[str]) -> list[str]:
    """A command line in which ``--allow-skipped`` without a number says ``any``.

    Typer knows no option whose value may be left out, so the word after it decides: digits, or ``any``, are its value.
    """
    filled = list(words)
    for k, word in enumerate(words):
        if word == "--":
            break
        following = words[k + 1] if k + 1 < len(words) else ""
        if word == "--allow-skipped" and following != ANY and not (following.isascii() and following.isdigit()):
            filled[k] = f"{word}={ANY}"
    return filled


def allowed_skips(text: str | None) -> float:
    """``--allow-skipped``: how many inputs may be left out, infinity for any number.

    Raises:
        UsageError: not a number.
    """
    if text is None:
        return 0
    if text == ANY:
        return math.inf
    number = auto_or_number(text, "--allow-skipped")
    if number is None:
        raise UsageError(f"--allow-skipped {text}: give a number, or nothing for any number")
    return number


def refuse_no_png(path: Path | None, option: str) -> None:
    """Raise UsageError for a picture whose name promises another format than PNG."""
    if path is not None and path.suffix.lower() != ".png":
        raise UsageError(f"{option} {path}: it becomes a PNG; give NAME.png")


def given(**options: Any) -> dict[str, Any]:
    """The options that were given; the others keep the job's own defaults."""
    return {name: value for name, value in options.items() if value is not None}


def numbers(text: str, option: str) -> tuple[float, ...]:
    """``0.5,1.0`` to a tuple.

    Raises:
        UsageError: not numbers.
    """
    try:
        found = tuple(float(part) for part in text.split(",")) if text.strip(" ,") else ()
    except ValueError as error:
        raise UsageError(f"{option} {text[:40]}: give numbers separated by commas") from error
    if not found:
        raise UsageError(f"{option}: give at least one number")
    return found


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """``1,2`` to a tuple.

    Raises:
        UsageError: not whole numbers.
    """
    found = numbers(text, option)
    if not all(value.is_integer() for value in found):
        raise UsageError(f"{option} {text[:40]}: give whole numbers separated by commas")
    return tuple(map(int, found))
