"""``clipseed merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._console import Console, print_json
from clipseed.cli._groups import grouped
from clipseed.cli._run import tell_empty
from clipseed.wording import counted


@grouped
def merge(
    *,
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="OUTPUTS", help="Outputs of the same command: NAME.h5, folder of units, or folders of masks."
        ),
    ],
    out: Annotated[
        Optional[Path],
        shared.output_option(help="The file, or for masks the folder; without it one unfinished NAME.h5 is finished."),
    ] = None,
    output: shared.OutputArguments,
) -> int:
    """Make one output out of what several runs made.

    Runs with --shard on one disk need it only when one of them was never finished. Examples:

      clipseed merge cams.h5

      clipseed merge node-1/cams.h5 node-2/cams.h5 --out cams.h5
    """
    from clipseed.jobs.merge import run_merge

    console = Console(output.quiet)
    report = run_merge(sources, out)
    for note in report.notes:
        console.warn(note)
    twice = f", {report.repeated} of them more than once" if report.repeated else ""
    console.note(f"{report.out}: {counted(report.images, 'image')} out of {counted(report.files, 'file')}{twice}")
    if report.empty is not None and report.empty.labels:
        tell_empty(console, report.empty)
    if output.json:
        empty = {} if report.empty is None else {"empty": report.empty.as_dict()}
        print_json({"out": str(report.out), "files": report.files, "images": report.images, **empty})
    return 0
