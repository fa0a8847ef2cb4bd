"""Runs that are killed, stopped or interrupted: nothing is lost, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipseed.store.cams import open_cams

from helpers.images import photo

IMAGES = 40


@pytest.fixture
def command(tmp_path: Path, tiny_weights: Path) -> list[str]:
    """A run of 40 images in units of 5, slowed down so that there is a middle to be killed in."""
    images = tmp_path / "photos"
    images.mkdir()
    for number in range(IMAGES):
        photo(number, 48 + number % 3 * 16, 64).save(images / f"{number:03d}.png")
    (tmp_path / "labels.txt").write_text("".join(f"{k:03d} {k % 2}\n" for k in range(IMAGES)))
    (tmp_path / "classes.txt").write_text("rust\ncrack\n")
    code = (
        "import os, sys, time, clipseed.jobs.cam as job, clipseed.runtime.images as engine\n"
        "from clipseed.cli.main import main\n"
        "engine._UNIT_SIZE['cpu'] = 5\n"
        "compute = job.compute_cams\n"
        "def slow(*words):\n"
        "    time.sleep(float(os.environ.get('PAUSE', 0.03)))\n"
        "    return compute(*words)\n"
        "job.compute_cams = slow\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ["cam", "--dataset", "folder", "--images", images, "--labels", tmp_path / "labels.txt", "--classes",
             tmp_path / "classes.txt", "--weights", tiny_weights, "--device", "cpu"]  # fmt: skip
    return [sys.executable, "-c", code, *map(str, words)]


def start(command: list[str], out: Path, pause: float = 0.03) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PAUSE": str(pause)}
    return subprocess.Popen([*command, "--out", str(out)], env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_units(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    parts = out.with_name(out.name + ".parts")
    deadline = time.monotonic() + 60
    while len(list(parts.glob("unit-*.h5"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def finish(command: list[str], out: Path) -> str:
    process = start(command, out)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return errors


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption(number: signal.Signals, code: int, command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "cams.h5"
    process = start(command, out, pause=0.2)
    wait_for_units(out, 2, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "images are safe in" in errors
    assert "Run the same command again to go on" in errors
    assert "Traceback" not in errors
    done = len(open_cams(tmp_path / "cams.h5.parts"))
    assert f"{done} of {IMAGES} images are safe" in errors
    assert f"{done} done already" in finish(command, out)
    assert len(open_cams(out)) == IMAGES


@pytest.mark.slow
def test_a_second_run_is_refused_while_the_first_goes_on(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "cams.h5"
    first = start(command, out, pause=1)
    wait_for_units(out, 1, first)
    second = start(command, out)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 1
    assert "another run is writing it" in errors
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    finish(command, out)
    assert len(open_cams(out)) == IMAGES


@pytest.mark.slow
def test_workers_end_with_a_killed_run(command: list[str], tmp_path: Path) -> None:
    """Decoding processes must not outlive a main process that was killed."""
    process = start([*command, "--workers", "2"], tmp_path / "cams.h5")
    wait_for_units(tmp_path / "cams.h5", 1, process)
    listing = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    children = [int(word) for word in listing.stdout.split()]
    assert children
    process.kill()
    process.wait()
    deadline = time.monotonic() + 15
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "decoding workers are still alive"
        time.sleep(0.1)
