"""``clipseed demo``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

from clipseed.cli import _options as shared
from clipseed.cli._console import Console, TableRows, duration, percent, print_json
from clipseed.cli._groups import grouped
from clipseed.errors import UsageError
from clipseed.wording import counted

if TYPE_CHECKING:
    from clipseed.jobs.demo import Stage

_SCENES = 60


@grouped
def demo(
    *,
    out: Annotated[Path, shared.output_option(help="Folder for the demo's files.")] = Path("demo"),
    scenes: Annotated[
        Optional[int],
        shared.data_option(
            "--scenes",
            "--limit",
            help=f"How many scenes (default: {_SCENES}; with --save-dataset 300, as in the tables of docs/).",
            min=1,
        ),
    ] = None,
    device: shared.Device = "auto",
    save_dataset: Annotated[
        Optional[Path], shared.output_option(help="Only write the toy scenes there, as a VOC devkit.")
    ] = None,
    save_seed: Annotated[
        int,
        shared.output_option(help="Scenes to save: 0 are the scored ones, other seeds new ones to train on.", min=0),
    ] = 0,
    output: shared.OutputArguments,
) -> int:
    """Run the whole pipeline on the built-in toy world: no downloads, no network."""
    console = Console(output.quiet)
    if save_dataset is None and save_seed:
        raise UsageError("--save-seed says which scenes --save-dataset writes; the demo itself runs on the scored ones")
    if save_dataset is not None:
        return _save(console, save_dataset, save_seed, scenes)
    from clipseed.data.toy.dataset import HELD_OUT_COUNT
    from clipseed.jobs.demo import STAGES, expected_seconds, run_demo

    count = scenes or _SCENES
    if count > HELD_OUT_COUNT:
        raise UsageError(f"--scenes {count}: the demo scores up to {HELD_OUT_COUNT}; --save-dataset writes any number")
    console.note(
        f"{len(STAGES)} stages on {count} scenes of the built-in world, about {duration(expected_seconds(count))} on "
        "two idle cores; Ctrl-C stops it"
    )
    titles = [_title(number, len(STAGES), title) for number, (_, title) in enumerate(STAGES, start=1)]
    columns = (f"toy world, {count} images", "mIoU %", "threshold", "images/s", "file")
    widths = (max(map(len, (columns[0], *titles))), 6, 9, 8, len(str(out / "cams-caa.h5")))
    table = None if output.json else TableRows(columns, widths)

    def tell(stage: Stage) -> None:
        if table is None:
            console.note(f"{stage.name}: {percent(stage.report.scores.miou)} % mIoU")
            return
        threshold = "-" if stage.report.threshold is None else f"{stage.report.threshold:g}"
        score = percent(stage.report.scores.miou)
        table.add((titles[stage.number - 1], score, threshold, f"{stage.images_per_second:.1f}", str(stage.out)))

    with console:
        result = run_demo(
            out,
            count,
            device,
            lambda number, title, total: console.track(_title(number, len(STAGES), title), total),
            tell,
        )
    if output.json:
        print_json({"stages": [s.as_dict() for s in result.stages], "previews": list(map(str, result.previews))})
    labels, maps = result.previews
    console.note(
        f"\n{labels}: images, their truth, CAM, CAA, labels by CRF and by segments\n{maps}: every map by itself\n"
        "\nTry next:\n" + "\n".join(f"  {line}" for line in _next_commands(out))
    )
    return 0


def _title(number: int, of: int, title: str) -> str:
    return f"{number}/{of} {title}"


def _next_commands(out: Path) -> list[str]:
    """Commands to go on with, as they can be typed here."""
    import shlex

    program, folder = _program(), shlex.quote(str(out))
    return [
        f"{program} report {folder}/cams.h5 {folder}/cams-caa.h5 {folder}/pseudo {folder}/pseudo-sam "
        f"--out {folder}/report.html",
        f"{program} inspect {folder}/cams-caa.h5 --preview {folder}/more.png --count 12",
        f"{program} demo --save-dataset {folder}/devkit  # a VOC devkit to try the other commands on",
    ]


def _program(*, anywhere: bool = False) -> str:
    """How to call this program: by name where it is on the PATH, else as now, or so that it works ``anywhere``."""
    if shutil.which("clipseed"):
        return "clipseed"
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{sys.executable} -m clipseed"
    return str(called.absolute() if anywhere else called)


def _save(console: Console, folder: Path, seed: int, scenes: int | None) -> int:
    from clipseed.data.toy.dataset import HELD_OUT_COUNT
    from clipseed.store.files import storage_errors
    from clipseed.store.toy_devkit import save_devkit

    with storage_errors(folder, "--save-dataset"):
        count = save_devkit(folder, seed, scenes or HELD_OUT_COUNT)
    program = _program(anywhere=True)
    console.note(
        f"{folder}: {counted(count, 'image')} as a VOC devkit; try\n"
        f"  cd {folder}\n"
        f"  {program} cam --dataset voc --classes toy --weights toy --out cams.h5\n"
        f"  {program} evaluate --gt SegmentationClass"
    )
    return 0
