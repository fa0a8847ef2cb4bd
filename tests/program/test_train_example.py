"""The training example: what it learns from masks, that it goes on after a kill, and the pipeline around it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from clipseed.cli.main import main
from clipseed.data.toy.world import lay_out
from clipseed.store.label_masks import read_label_mask, write_label_mask
from clipseed.store.toy_devkit import save_devkit
from clipseed.train.checkpoint import read_checkpoint
from clipseed.train.loop import CHECKPOINT, METRICS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_segmenter.py"
TRAINING_SEED = 9000


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("train_segmenter", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Devkits ``train`` (30 scenes) and ``val`` (10 scenes)."""
    folder = tmp_path_factory.mktemp("scenes")
    save_devkit(folder / "train", TRAINING_SEED, 30)
    save_devkit(folder / "val", count=10)
    return folder


def command(scenes: Path, out: Path, *more: object) -> list[str]:
    train, val = scenes / "train", scenes / "val"
    words = ["--images", train / "JPEGImages", "--masks", train / "SegmentationClass", "--classes", "toy",
             "--val-images", val / "JPEGImages", "--gt", val / "SegmentationClass",
             "--crop", 96, "--batch-size", 6, "--lr", 2e-3, "--device", "cpu", "--out", out, *more]  # fmt: skip
    return [sys.executable, str(SCRIPT), *map(str, words)]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
def test_it_learns(scenes: Path, tmp_path: Path) -> None:
    """A few epochs: the loss falls, and the score passes that of a mask without objects."""
    done = run(command(scenes, tmp_path / "out", "--epochs", 15))
    assert done.returncode == 0, done.stderr
    losses = [float(text) for text in re.findall(r"loss ([\d.]+)", done.stderr)]
    assert len(losses) == 15
    assert np.mean(losses[-3:]) < 0.75 * losses[0]
    predictions = tmp_path / "out" / "predictions"
    assert sorted(path.name for path in predictions.iterdir()) == [f"toy_{k:06d}.png" for k in range(10)]
    assert all(
        read_label_mask(path).shape == lay_out(0, k).size for k, path in enumerate(sorted(predictions.iterdir()))
    )
    first, last = done.stdout.splitlines()
    assert first == f"clipseed evaluate {predictions} --gt {scenes / 'val' / 'SegmentationClass'} --classes toy"
    found = float(re.fullmatch(r"mIoU ([\d.]+) % on 10 images", last)[1])
    masks = [lay_out(0, k).mask() for k in range(10)]
    background = np.mean(np.concatenate([mask.ravel() == 0 for mask in masks]))
    classes = len(set(np.concatenate([np.unique(mask) for mask in masks])))
    assert found > 100 * background / classes + 2


@pytest.mark.slow
def test_a_killed_run_goes_on(scenes: Path, tmp_path: Path) -> None:
    """SIGKILL after the first checkpoint, then the same command: the weights are those of an undisturbed run."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(command(scenes, whole, "--epochs", 3)).returncode == 0
    words = command(scenes, broken, "--epochs", 3)
    kept = broken / CHECKPOINT
    with subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not kept.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert read_checkpoint(kept).step in {5, 10}  # 30 scenes, 6 at once
    done = run(words)
    assert done.returncode == 0, done.stderr
    assert re.search(r"going on after step (5|10) of 15", done.stderr)
    assert "step 5/15" not in done.stderr
    assert kept.read_bytes() == (whole / CHECKPOINT).read_bytes()
    assert (broken / METRICS).read_bytes() == (whole / METRICS).read_bytes()
    refused = run([*words, "--lr", "0.5"])
    assert refused.returncode == 1
    assert "made with other settings (lr 0.002 -> 0.5); choose another --out" in refused.stderr
    write_label_mask(scenes / "train" / "SegmentationClass" / "toy_000000.png", lay_out(TRAINING_SEED, 0).mask() // 2)
    assert "made with other settings (data " in run(words).stderr
    write_label_mask(scenes / "train" / "SegmentationClass" / "toy_000000.png", lay_out(TRAINING_SEED, 0).mask())
    assert not list(broken.glob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "classifier"),
    [("deeplabv3_mobilenet_v3_large", "mobilenet_v3_large"), ("deeplabv3_resnet50", "resnet50")],
)
def test_backbones_come_from_a_file(example: ModuleType, tmp_path: Path, name: str, classifier: str) -> None:
    from torchvision import models

    weights = getattr(models, classifier)(weights=None).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    network = example.build_network(name, 4, tmp_path / "weights.pth").eval()
    own = network.network.backbone.state_dict()
    prefix = "features." if "mobilenet" in name else ""
    assert all(torch.equal(value, weights[prefix + key]) for key, value in own.items())
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 64, 80)).shape == (1, 4, 64, 80)
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for file in ("other.pth", "nowhere.pth"):
        with pytest.raises(example.InputError, match=f"{file}: not torchvision's weights for {name}"):
            example.build_network(name, 4, tmp_path / file)


def test_small_network_takes_any_size(example: ModuleType) -> None:
    network = example.build_network("small", 4).eval()
    with torch.inference_mode():
        assert network(torch.zeros(2, 3, 65, 91)).shape == (2, 4, 17, 23)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "1"], "--batch-size: at least 2"),
        (["--epochs", "0"], "--epochs, --crop: at least 1"),
        (["--lr", "0"], "--lr: more than 0"),
        (["--confidence", "95"], "--confidence: from 0 to 1"),
        (["--backbone-weights", "x.pth"], "the small network has no pretrained backbone"),
    ],
)
def test_wrong_options(example: ModuleType, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(["--images", "a", "--masks", "b", "--val-images", "c", *words])
    assert message in capsys.readouterr().err


def test_wrong_folders(example: ModuleType, scenes: Path, tmp_path: Path) -> None:
    val, out = scenes / "val", tmp_path / "out"
    common = ["--images", str(val / "JPEGImages"), "--val-images", str(val / "JPEGImages"), "--out", str(out)]
    with pytest.raises(example.InputError, match="10 masks do not fill one batch of 16"):
        example.main([*common, "--masks", str(val / "SegmentationClass"), "--batch-size", "16"])
    (tmp_path / "list.txt").write_text("toy_000001\nnowhere\n")
    with pytest.raises(example.InputError, match=r"list.txt: no image for 1 of its ids: nowhere"):
        example.main([*common, "--masks", str(val / "SegmentationClass"), "--val-list", str(tmp_path / "list.txt")])


def test_training_scenes_are_not_the_scored_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = tmp_path / "train"
    assert main(["demo", "--save-dataset", str(train), "--save-seed", "9000", "--limit", "3"]) == 0
    assert (train / "ImageSets/Segmentation/train.txt").read_text().split() == [f"toy_{k:06d}" for k in range(3)]
    assert not (train / "ImageSets/Segmentation/val.txt").exists()
    written = read_label_mask(train / "SegmentationClass" / "toy_000002.png")
    np.testing.assert_array_equal(written, lay_out(9000, 2).mask())
    capsys.readouterr()
    assert main(["demo", "--save-dataset", str(train), "--limit", "3"]) == 1  # would mix the two
    assert "holds scenes of another seed (train.txt); choose another folder" in capsys.readouterr().err
    np.testing.assert_array_equal(read_label_mask(train / "SegmentationClass" / "toy_000002.png"), written)
    assert main(["demo", "--save-seed", "3"]) == 2
    assert "--save-seed says which scenes --save-dataset writes" in capsys.readouterr().err


def make(*words: object) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    line = ["make", "--no-print-directory", "-f", str(ROOT / "examples" / "toy" / "Makefile"), *map(str, words)]
    # Nothing of the make that may be running these tests.
    environment = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    return subprocess.run(
        line, env={**environment, "PATH": path}, capture_output=True, text=True, timeout=280, check=False
    )


def test_toy_makefile(tmp_path: Path) -> None:
    shown = make("help").stdout
    for target in ("segmenter", "data", "cams", "refined", "masks", "scores", "help"):
        assert re.search(rf"^{target}\s+\S", shown, re.MULTILINE)
    planned = make("-n", f"OUT={tmp_path}/run").stdout
    steps = ["--save-dataset", "clipseed cam", "clipseed refine caa", "clipseed crf", "train_segmenter.py"]
    assert [planned.index(step) for step in steps] == sorted(planned.index(step) for step in steps)


@pytest.mark.slow
def test_toy_makefile_up_to_the_maps(tmp_path: Path) -> None:
    words = (f"OUT={tmp_path}/run", "TRAIN=4", "VAL=3", "CAM_OPTIONS=--device cpu --quiet")
    done = make("data", "cams", *words)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run" / "train" / "JPEGImages").iterdir())) == 4
    assert len(list((tmp_path / "run" / "val" / "JPEGImages").iterdir())) == 3
    assert "Nothing to be done" in make("cams", *words).stdout
    found = make("--eval", "print: ; clipseed inspect $(OUT)/cams.h5 --json", "print", *words)
    assert json.loads(found.stdout[found.stdout.index("{") :])
