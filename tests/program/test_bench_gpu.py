"""The GPU benchmark runs from beginning to end on a CPU, so that nothing silly stops it on a card that is lent."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "bench_gpu.py"
DOCS = Path(__file__).parents[2] / "docs" / "performance.md"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_and_is_rendered(tmp_path: Path) -> None:
    out, page = tmp_path / "gpu.json", tmp_path / "performance.md"
    page.write_text(DOCS.read_text())
    # Neither installed nor on the path, and in another folder: as on a machine that has only the checkout.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *map(str, words)]
        return subprocess.run(command, check=False, cwd=tmp_path, env=env, capture_output=True, text=True)

    made = run("--device", "cpu", "--tiny", "--out", out)
    assert made.returncode == 0, made.stderr[-3000:]
    result = json.loads(out.read_text())
    assert list(result["parts"]) == ["check", "model", "files", "crf", "batches", "refine", "sam"]
    assert not [part for part in result["parts"].values() if "error" in part]
    assert result["left_out"] == []
    checked = result["parts"]["check"]["results"]
    assert {"cam fp32", "caa fp32", "js fp32", "par", "crf", "sam-masks fp32", "sam-seed"} <= set(checked)
    # A CPU beside itself is equal.
    assert {checked[name][checked[name]["counts"]] for name in checked if "bf16" not in name} == {0.0}
    assert checked["sam-masks fp32"]["segments"] > 0
    assert {goal["what"] for goal in result["goals"]} == {"cam", "caa", "crf", "cam from files", "caa from files"}

    assert run("--render", out, "--into", page).returncode == 0
    assert run("--render", out, "--into", page).returncode == 0  # a second time, over its own table
    text = page.read_text()
    assert "No number has been measured" not in text
    assert "| caa, JPEG to HDF5 |" in text
    assert text.count("bench-gpu: begin") == text.count("bench-gpu: end") == 1


def test_what_is_beyond_its_tolerance_or_fails_is_said(bench: ModuleType) -> None:
    machine = {"device": "cpu", "torch": "2", "cores": 1, "commit": "c", "date": "d"}
    off = {"largest": 0.5, "counts": "largest", "tolerance": 0.002, "ok": False}
    result = {"machine": machine, "parts": {"check": {"images": 2, "results": {"par": off}}, "crf": {"error": "no"}}}
    lines = bench.table(result)
    assert "| par | largest difference of a value | 0.50000 | 0.002 | **not met**" in lines
    assert "Not measured in this run: crf." in lines


def test_batches_are_those_that_the_stream_makes(bench: ModuleType) -> None:
    from clipseed.runtime.stream import BatchSize

    # Three grids; units of five images end with rests.
    sizes = [(32, 32), (32, 48), (32, 32), (32, 32), (48, 48), (32, 32), (32, 48)]
    most = [BatchSize(None, 10).limit(rows * columns + 1) for rows, columns in ((2, 2), (2, 3), (3, 3))]
    assert most == [2, 1, 1]
    assert sorted(bench.batches_of(sizes, 5, 10)) == sorted([(2, 2), (1, 2), (1, 1), (1, 1), (1, 2), (1, 1)])
    fill = bench.fill_of(sizes, 5, 10)
    assert fill["images_per_batch"] == pytest.approx(7 / 6)
    assert fill["fill"] == pytest.approx((1 + 0.5 + 1 + 1 + 0.5 + 1) / 6)
    assert fill["fill_by_image"] == pytest.approx((2 + 0.5 + 1 + 1 + 0.5 + 1) / 7)


def test_segments_that_are_missing_count_as_lost(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    class Record:
        def __init__(self, *masks: list[int]) -> None:
            self._masks = np.array(masks, bool).reshape(len(masks), 1, 4)

        def __len__(self) -> int:
            return len(self._masks)

        def masks(self) -> np.ndarray:
            return self._masks

    caches = {Path("a"): {"x": Record([1, 1, 0, 0], [0, 0, 1, 1])}, Path("b"): {"x": Record([1, 1, 0, 0])}}

    class Cache(dict):  # type: ignore[type-arg]
        def __init__(self, path: Path) -> None:
            super().__init__(caches[path])

        def __enter__(self) -> Cache:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(bench, "SegmentSet", Cache)
    found = bench.segment_differences(Path("a"), Path("b"))
    assert found["lost"] == pytest.approx(1 / 3)  # of three segments one has no match
    assert (found["segments_cpu"], found["segments"]) == (2, 1)
