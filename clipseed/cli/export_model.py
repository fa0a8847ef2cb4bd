"""``clipseed export-model``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from clipseed.cli import _options as shared
from clipseed.cli._console import Console, print_json
from clipseed.cli._groups import grouped


@grouped
def export_model(
    *,
    segmenter: Annotated[Path, typer.Argument(help="File of clipseed train bridge.")] = Path("bridge.safetensors"),
    onnx: Annotated[Path, shared.output_option(help="NAME.onnx to write.")],
    int8: Annotated[
        Optional[Path], shared.output_option(help="NAME.onnx with 8-bit weights, under a third of the size.")
    ] = None,
    output: shared.OutputArguments,
) -> int:
    """Write a light segmenter as an ONNX file, which runs without torch and clipseed.

    Example:

      clipseed export-model bridge.safetensors --onnx bridge.onnx --int8 bridge-int8.onnx
    """
    from clipseed.jobs.export_model import ExportModelOptions, run_export_model

    console = Console(output.quiet)
    with console:
        console.note(f"exporting {segmenter}")
        done = run_export_model(ExportModelOptions(segmenter, onnx, int8))
    for path, size in done.files.items():
        console.note(f"{path}: {size / 1e6:.1f} MB, {len(done.metadata['classes'])} classes with the background")
    if output.json:
        print_json({"files": {str(path): size for path, size in done.files.items()}, "metadata": dict(done.metadata)})
    return 0
