"""Commands that look at what is there need no model, so they start without torch, which takes seconds to load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from clipseed.cli.main import main

from helpers.program import environment

WITHOUT = "import sys; sys.modules['torch'] = None; from clipseed.cli.main import main; sys.exit(main(sys.argv[1:]))"
"""Python refuses to import a module that is ``None``."""


LINES = (
    "evaluate pseudo", "evaluate whole.h5", "report whole.h5 pseudo --out page.html",
    "inspect whole.h5 --preview preview.png", "export pseudo --format coco --out coco",
    "export pseudo --format cvat --out cvat", "merge shared.h5 --out merged.h5",
)  # fmt: skip


def test_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    toy = ["--dataset", "toy", "--limit", "2", "--device", "cpu", "-q"]
    assert main(["cam", *toy, "--out", "shared.h5", "--shard", "1/2"]) == 0  # both images: a unit is not cut
    assert main(["cam", *toy, "--out", "whole.h5"]) == 0
    assert main(["threshold", "whole.h5", "--threshold", "0.4", "--out", "pseudo", "-q"]) == 0
    for line in LINES:
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT, *line.split()], env=environment(), capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
