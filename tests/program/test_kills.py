"""kill -9 at 5 or 12 random moments of every long command: nothing is lost, the end is that of an undisturbed run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from clipseed.cli.main import main
from clipseed.data.toy.dataset import HELD_OUT_SEED, toy_id, toy_scene
from clipseed.data.vocabulary import load_vocabulary

from helpers.program import environment
from helpers.weclip import TINY

SMALL = ["--dataset", "folder", "--images", "small"]
LABELLED = [*SMALL, "--classes", "toy", "--labels", "labels.csv"]
CAM = ["cam", *LABELLED, "--weights", "toy", "--device", "cpu"]
SAM = ["sam-masks", *SMALL, "--device", "cpu"]
BLOBS = ["--sam-factory", "helpers.sam:blobs", "--preset", "stock", "--points-per-side", "3"]
COMMANDS = {
    "cam": [*CAM, "--out", "out/cams.h5"],
    "cam to shards": [*CAM, "--out", "out/cams"],
    "tags": [*CAM, "--labels", "auto", "--out", "out/cams.h5"],
    "prompts": ["prompts", *CAM[1:], "--features", "out/features.h5"],
    "refine": ["refine", "caa", "cams.h5", "--out", "out/cams-caa.h5", "--device", "cpu"],
    "crf": ["crf", "cams.h5", "--out", "out/pseudo", "--soft", "out/soft.h5", "--device", "cpu", "--iterations", "1"],
    "threshold": ["threshold", "cams.h5", "--threshold", "0.4", "--out", "out/pseudo"],
    "predict": ["predict", "w.safetensors", *SMALL, "--device", "cpu", "--out", "out/predictions", "--soft",
                "out/soft.h5"],
    "label": ["label", *LABELLED, "--weights", "toy", "--device", "cpu", "--recipe", "svc", "--out", "out/pseudo",
              "--keep", "out/cams.h5"],
    "sam-masks": [*SAM, *BLOBS, "--out", "out/segments.h5"],
    "sam-seed": ["sam-seed", "cams.h5", "--out", "out/pseudo-sam", "--workers", "0"],
}  # fmt: skip
FEWER = dict.fromkeys(("cam to shards", "tags", "prompts", "threshold", "predict", "label"), 5)
"""Of commands that store through the same writers as the others."""


def small_scenes(folder: Path, count: int) -> None:
    """Scenes of the built-in world at a quarter of their size, with a table of their classes."""
    (folder / "small").mkdir()
    names = load_vocabulary("toy").class_names
    rows = ["id,label"]
    for index in range(count):
        scene = toy_scene(HELD_OUT_SEED, toy_id(index))
        height, width = scene.size
        image = Image.fromarray(scene.image()).resize((width // 4, height // 4))
        image.save(folder / "small" / f"{index:03d}.png")
        rows += [f"{index:03d},{names[k]}" for k in scene.labels]
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_kills(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small_scenes(tmp_path, 45 if name in ("cam", "cam to shards", "prompts", "refine") else 30)
    if name in ("refine", "threshold", "crf", "sam-seed"):
        assert main([*CAM, "--out", "cams.h5"]) == 0
    if name == "predict":
        assert main([*TINY, "--out", "w.safetensors"]) == 0
    if name == "sam-seed":
        assert main([*SAM, *BLOBS, "--out", "segments.h5"]) == 0
    kills = FEWER.get(name, 12)
    done = subprocess.run(
        [sys.executable, "-m", "helpers.killing", str(tmp_path), str(kills), "7", "--", *COMMANDS[name]],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == kills + 1
    # The kills hit the middle: most of them found some work done, and not always equally much.
    assert len({line.split(": ")[1] for line in lines[:-1]}) >= kills // 5, done.stdout
