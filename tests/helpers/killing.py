"""Kills a command at random moments, again and again; run by test_kills.py in a process of its own.

Everything is imported once, and each run is a fork of that state: 25 kills take seconds instead of minutes, and they
hit the run instead of its imports. Usage: ``-m helpers.killing FOLDER KILLS SEED -- words...``: a command that writes
its output into FOLDER/out. Prints one line per kill: how far the run had come.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import cv2  # noqa: F401
import open_clip  # noqa: F401
import segment_anything  # noqa: F401
import torch

torch.set_num_threads(1)

from clipseed.cli.main import main  # noqa: E402
from clipseed.jobs import cam, crf, label, predict, refine, sam_masks, sam_seed  # noqa: E402
from clipseed.runtime import features  # noqa: E402
from clipseed.runtime import images as engine  # noqa: E402
from clipseed.store import tags  # noqa: E402
from clipseed.store.label_masks import read_label_mask  # noqa: E402
from clipseed.store.open import format_of  # noqa: E402
from clipseed.store.record_file import RecordFile  # noqa: E402

PAUSE = 0.02


def slowed(function):
    def slow(*words, **options):
        time.sleep(PAUSE)
        return function(*words, **options)

    return slow


def fork(words: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 70
    try:
        code = main(words)
    finally:
        os._exit(code)


def content(folder: Path) -> dict[str, bytes]:
    """All files of a finished output."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def compare(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """The output must be that of an undisturbed run."""
    different = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    assert not different, f"other than in an undisturbed run: {different[:5]}"


def listing(folder: Path) -> list[Path]:
    """Files under final names; folders may vanish meanwhile."""
    found = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    return [path for path in found if path.suffix in {".h5", ".png", ".csv"} and not path.name.startswith(".tmp-")]


def check(folder: Path) -> int:
    """Everything under a final name is whole; returns how many files there are."""
    files = listing(folder)
    for path in files:
        if path.suffix == ".h5":
            RecordFile(path, format_of(path), verify=True).close()
        elif path.suffix == ".png":
            read_label_mask(path)
    return len(files)


def finished(child: int, folder: Path | None, growth: int = 0, delay: float = 0.0) -> bool:
    """Kill a run some time after it has written so many files more; whether it was through before.

    Moments are chosen by what the run has done, because a busy machine makes any clock meaningless. Without a folder it
    is left alone.
    """
    grown = growth + len(listing(folder)) if folder else 0
    moment = float("inf")
    deadline = time.monotonic() + 120
    while time.monotonic() < min(moment, deadline):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, f"exit code {os.waitstatus_to_exitcode(status)}"
            return True
        if folder and moment == float("inf") and len(listing(folder)) >= grown:
            moment = time.monotonic() + delay
        time.sleep(0.002)
    assert time.monotonic() < deadline, "the run hangs"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def whole_run(words: list[str]) -> float:
    began = time.monotonic()
    assert finished(fork(words), None)
    return time.monotonic() - began


def empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


if __name__ == "__main__":
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    words = sys.argv[5:]
    engine._UNIT_SIZE["cpu"] = refine._PIXEL_UNIT = 3
    crf._UNIT_SIZE = sam_seed._UNIT_SIZE = sam_masks._UNIT_SIZE["cpu"] = 3
    cam.compute_cams = slowed(cam.compute_cams)
    features.image_features = slowed(features.image_features)
    tags._SAVE_EVERY = 0.0
    refine._Spreading.refined = slowed(refine._Spreading.refined)
    crf._CrfWork._solve = slowed(crf._CrfWork._solve)
    label.LabelWork.compute = slowed(label.LabelWork.compute)
    predict.unit_size_for = lambda device: 3
    predict.PredictWork.compute = slowed(predict.PredictWork.compute)
    sam_masks.generate = slowed(sam_masks.generate)
    sam_seed.Seeder.__call__ = slowed(sam_seed.Seeder.__call__)
    out = folder / "out"
    out.mkdir()
    duration = whole_run(words)
    expected = content(out)
    empty(out)
    chance = random.Random(seed)
    count = rounds = 0
    while count < kills:
        growth = chance.choice((0, 0, 1, 1, 2, 3))
        delay = chance.uniform(0, 0.05 if growth else 0.8 * duration)
        if finished(fork(words), out, growth, delay):
            compare(content(out), expected)
            empty(out)
            rounds += 1
        else:
            count += 1
            print(f"kill {count}: {check(out)} files")
    whole_run(words)
    compare(content(out), expected)
    print(f"{kills} kills in {rounds + 1} outputs, {duration:.2f} s undisturbed")
