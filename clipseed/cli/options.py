"""Options that several commands share, defined once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from clipseed.errors import UsageError

_MOST_WORKERS = 1024
ANY = "any"
"""What ``--allow-skipped`` alone stands for."""
DATA = "Data set"
MODEL = "Model"
RUN = "Run"
OUTPUT = "Output"

Dataset = Annotated[
    str, typer.Option(help="voc, coco, folder or toy (built in).", rich_help_panel=DATA, show_default=False)
]
Root = Annotated[
    Optional[Path],
    typer.Option(help="Folder of the devkit (default: $CLIPSEED_VOC or the working folder).", rich_help_panel=DATA),
]
Images = Annotated[Optional[Path], typer.Option(help="Folder with the images (folder, coco).", rich_help_panel=DATA)]
MovedImages = Annotated[
    Optional[Path], typer.Option(help="Where the images are now, if they have moved.", rich_help_panel=DATA)
]
MovedRoot = Annotated[
    Optional[Path],
    typer.Option(help="Where the data set is now, if it has moved (voc, coco).", rich_help_panel=DATA),
]
Split = Annotated[
    Optional[str],
    typer.Option(help="train, trainaug, val, or a file with one id per line.", rich_help_panel=DATA),
]
LabelsFile = Annotated[
    Optional[Path],
    typer.Option("--labels", help="Image-level labels: CSV, one-hot CSV, JSON or text.", rich_help_panel=DATA),
]
LabelsOrAuto = Annotated[
    Optional[str],
    typer.Option(
        "--labels",
        help="Image-level labels: CSV, one-hot CSV, JSON or text; auto: CLIP tags images that have none.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
TagThreshold = Annotated[
    Optional[float],
    typer.Option(
        help="--labels auto: a tag scores at least this share of the best word's score (default: 0.25).",
        rich_help_panel=DATA,
        min=0.0,
        max=1.0,
    ),
]
TagTopK = Annotated[
    Optional[int], typer.Option(help="--labels auto: at most so many tags an image.", rich_help_panel=DATA, min=1)
]
Classes = Annotated[
    Optional[str],
    typer.Option(help="Class names and words: voc, coco, coco-corrected, toy or a file.", rich_help_panel=DATA),
]
Background = Annotated[
    Optional[str],
    typer.Option(
        help="Words that compete with the classes: none, general, those of voc or coco, or a file with one per line "
        "(default: the class list's; general where it names none).",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
Templates = Annotated[
    Optional[list[str]],
    typer.Option("--template", help="Prompt with one {}; several are averaged.", rich_help_panel=DATA),
]
Exif = Annotated[bool, typer.Option("--exif", help="Turn images as their EXIF orientation says.", rich_help_panel=DATA)]
MaxPixels = Annotated[int, typer.Option(help="Refuse larger images before decoding them.", rich_help_panel=DATA, min=1)]
Limit = Annotated[Optional[int], typer.Option(help="Only the first N images.", rich_help_panel=DATA, min=1)]

Model = Annotated[
    Optional[str],
    typer.Option(help="open_clip name, e.g. ViT-B-16 (default: ViT-B-16, or read off a file).", rich_help_panel=MODEL),
]
Weights = Annotated[
    Optional[str],
    typer.Option(help="Pretrained tag, file, or toy (default: openai; toy for --dataset toy).", rich_help_panel=MODEL),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=RUN)]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.", rich_help_panel=RUN)]
BatchSize = Annotated[str, typer.Option(help="auto, or images per batch.", rich_help_panel=RUN)]
Workers = Annotated[
    str, typer.Option(help="auto, or decoding processes (0: a thread of this one).", rich_help_panel=RUN)
]
Empty = Annotated[
    str,
    typer.Option(
        help="Masks of images in which some label got no pixel: background (they stay as they are), ignore (0 becomes "
        "255) or skip (not written).",
        rich_help_panel=OUTPUT,
    ),
]
Shard = Annotated[
    Optional[str],
    typer.Option(
        help="i/n: only the i-th of n shards, counted from 1 (default: what torchrun or Slurm say).",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
Engine = Annotated[str, typer.Option(help="local, or ray: the workers of a Ray cluster.", rich_help_panel=RUN)]
RayAddress = Annotated[
    Optional[str],
    typer.Option(help="Of the cluster (default: $RAY_ADDRESS, or here).", rich_help_panel=RUN, show_default=False),
]
RayWorkers = Annotated[
    str, typer.Option(help="auto (one per GPU, or as fit the CPUs), or a number.", rich_help_panel=RUN)
]
RayCpus = Annotated[str, typer.Option(help="CPUs of each worker without GPU: auto or a number.", rich_help_panel=RUN)]
RunReport = Annotated[
    Optional[Path],
    typer.Option(
        "--report",
        help="Write counts, timings and skipped inputs to this JSON file.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
AllowSkipped = Annotated[
    Optional[str],
    typer.Option(
        "--allow-skipped",
        metavar="[N]",
        help="End with 0, not 3, although up to N images (alone: any number) were left out.",
        autocompletion=lambda: [ANY],
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Start again, deleting what is there.", rich_help_panel=OUTPUT)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=OUTPUT)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress, no notes; errors only.", rich_help_panel=OUTPUT)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=OUTPUT)]


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


def given(**options: Any) -> dict[str, Any]:
    """The options that were given; the others keep the job's own defaults."""
    return {name: value for name, value in options.items() if value is not None}


def numbers(text: str, option: str) -> tuple[float, ...]:
    """``0.5,1.0`` to a tuple.

    Raises:
        UsageError: not numbers.
    """
    try:
        found = tuple(float(part) for part in text.split(",") if part.strip())
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
