"""``clipseed demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from clipseed.cli import options as shared
from clipseed.cli.console import Talker, percent, print_json, print_table
from clipseed.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("demo")(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demo's files.", rich_help_panel=shared.OUTPUT)] = Path(
        "demo"
    ),
    limit: shared.Limit = None,
    device: shared.Device = "auto",
    save_dataset: Annotated[
        Optional[Path],
        typer.Option(help="Only write the toy scenes there, as a VOC devkit.", rich_help_panel=shared.OUTPUT),
    ] = None,
    save_seed: Annotated[
        int,
        typer.Option(
            help="Scenes to save: 0 are the scored ones, other seeds new ones to train on.",
            min=0,
            rich_help_panel=shared.OUTPUT,
        ),
    ] = 0,
    json: shared.Json = False,
    quiet: shared.Quiet = False,
    debug: shared.Debug = False,
) -> int:
    """Run the whole pipeline on the built-in toy world: no downloads, no network."""
    talker = Talker(quiet)
    if save_dataset is None and save_seed:
        raise UsageError("--save-seed says which scenes --save-dataset writes; the demo itself runs on the scored ones")
    if save_dataset is not None:
        return _save(talker, save_dataset, save_seed, limit)
    from clipseed.jobs.demo import run_demo

    try:
        stages, preview = run_demo(out, limit, device, talker.track)
    finally:
        talker.close()
    if json:
        print_json({"stages": [stage.as_dict() for stage in stages], "preview": str(preview)})
    else:
        rows = []
        for s in stages:
            threshold = "-" if s.report.threshold is None else f"{s.report.threshold:g}"
            score = percent(s.report.scores.miou)
            rows.append((f"{s.name}: {s.title}", score, threshold, f"{s.images_per_second:.1f}", str(s.out)))
        print_table((f"toy world, {stages[0].report.images} images", "mIoU %", "threshold", "images/s", "file"), rows)
    talker.note(f"{preview}: some maps over their pictures")
    return 0


def _save(talker: Talker, folder: Path, seed: int, limit: int | None) -> int:
    from clipseed.store.files import storage_errors
    from clipseed.toy.dataset import HELD_OUT_COUNT, save_devkit

    with storage_errors(folder):
        count = save_devkit(folder, seed, limit or HELD_OUT_COUNT)
    talker.note(
        f"{folder}: {count} pictures as a VOC devkit; try\n"
        f"  cd {folder}\n"
        "  clipseed cam --dataset voc --classes toy --weights toy --out cams.h5\n"
        "  clipseed evaluate --gt SegmentationClass"
    )
    return 0
