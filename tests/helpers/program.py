"""Running the program, and modules of this folder, in a process of their own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

Runner = Callable[..., subprocess.CompletedProcess[str]]
"""The fixture ``clipseed``: words to exit code, stdout and stderr."""


def environment() -> dict[str, str]:
    """Environment of a process that imports ``helpers`` and computes on one thread."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
