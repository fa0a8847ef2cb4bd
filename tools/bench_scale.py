"""How ``cam``, ``refine`` and ``crf`` grow with the number of images, and what shares and Ray add (docs/scale.md).

``python tools/bench_scale.py --count 20000``. Images are generated, small, JPEG; the model is the built-in tiny one,
so that what is measured is everything around the model. Every run is a process of its own; its memory and its counts
come from ``--report``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("car", "house", "tree", "cup")


def make_images(folder: Path, count: int) -> None:
    """Images in folders of a thousand, and their labels."""
    rng = np.random.default_rng(0)
    lines = ["id,label"]
    for number in range(count):
        key = f"{number // 1000:04d}/{number:07d}"
        path = folder / "photos" / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = ((48, 64), (64, 48), (64, 64), (48, 80))[number % 4]
        pixels = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=85)
        lines += [f"{key},{CLASSES[k]}" for k in {number % 4, number // 4 % 4}]
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def run(folder: Path, *words: object, check: bool = True) -> dict[str, float]:
    """One command; what its report says, and the wall time of the process."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    began = time.perf_counter()
    command = [sys.executable, "-m", "clipseed", *map(str, words), "--report", str(report)]
    subprocess.run(command, cwd=folder, check=check, capture_output=True, text=True, env={**os.environ})
    found = json.loads(report.read_text()) if report.exists() else {}
    return {**found, "wall": time.perf_counter() - began}


def show(name: str, found: dict[str, float], count: int) -> None:
    print(f"{name:34} {count:7d}  {found['seconds']:8.1f} s  {found['images_per_second'] or 0:8.1f} images/s  "
          f"{found['peak_memory_mb']:6.0f} MB  {found['bottleneck']}", flush=True)  # fmt: skip


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
    return sum(item.stat().st_size for item in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--shares", type=int, default=4)
    arguments = parser.parse_args()
    count = arguments.count
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder, count)
        data = ("--dataset", "folder", "--images", "photos", "--labels", "labels.csv", "--classes", "classes.txt",
                "--weights", "toy", "--device", "cpu")  # fmt: skip
        print(f"{'stage':34} images   seconds         rate         peak memory, limit")
        for some in (100, 1_000, 10_000):
            if some < count:
                show("cam", run(folder, "cam", *data, "--limit", some, "--out", f"cams-{some}.h5"), some)
        whole = run(folder, "cam", *data, "--out", "cams.h5")
        show("cam", whole, count)
        show("cam, nothing left to do", {**run(folder, "cam", *data, "--out", "cams.h5"), "bottleneck": ""}, 0)
        for number in range(arguments.shares):
            part = run(folder, "cam", *data, "--out", "shared.h5", "--shard", f"{number + 1}/{arguments.shares}")
            show(f"cam --shard {number + 1}/{arguments.shares}", part, int(part["images"]))
        same = (folder / "shared.h5").read_bytes() == (folder / "cams.h5").read_bytes()
        print(f"the file of {arguments.shares} shares is that of one run: {same}")
        show("refine caa", run(folder, "refine", "caa", "cams.h5", "--out", "cams-caa.h5"), count)
        show("crf", run(folder, "crf", "cams-caa.h5", "--out", "pseudo"), count)
        for output in ("photos", "cams.h5", "cams-caa.h5", "pseudo"):
            print(f"{output:12} {size_of(folder / output) / count:8.0f} bytes an image")


if __name__ == "__main__":
    main()
