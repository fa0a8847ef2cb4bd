"""``clipseed export-model``: a light segmenter for other programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipseed.errors import UsageError
from clipseed.store.files import refuse_unwritable
from clipseed.train.onnx_file import export_onnx, quantize_onnx, refuse_missing_packages


@dataclass(frozen=True)
class ExportModelOptions:
    """Everything ``clipseed export-model`` can be told.

    Attributes:
        segmenter: File of ``clipseed train bridge``.
        onnx: ``NAME.onnx`` to write.
        int8: The same with 8-bit weights.
    """

    segmenter: Path
    onnx: Path
    int8: Path | None = None


@dataclass(frozen=True)
class ExportModelReport:
    """What was written: files with their bytes, and the metadata in them."""

    files: Mapping[Path, int]
    metadata: Mapping[str, Any]


def run_export_model(options: ExportModelOptions) -> ExportModelReport:
    """Write what was asked for.

    Raises:
        ClipseedError: see :mod:`clipseed.train.onnx_file`.
    """
    named = {"--onnx": options.onnx, "--int8": options.int8}
    for option, path in named.items():
        if path is not None and path.suffix != ".onnx":
            raise UsageError(f"{option} {path}: give the name of an .onnx file")
        refuse_unwritable(path, option)
    if options.int8 is not None and options.int8.resolve() == options.onnx.resolve():
        raise UsageError(f"--onnx and --int8 are both {options.onnx}; give each its own name")
    refuse_missing_packages()
    about = export_onnx(options.segmenter, options.onnx)
    if options.int8 is not None:
        quantize_onnx(options.onnx, options.int8)
    written = [path for path in named.values() if path is not None]
    return ExportModelReport({path: path.stat().st_size for path in written}, about)
