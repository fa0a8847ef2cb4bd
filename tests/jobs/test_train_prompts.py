"""Whole runs of ``clipseed train prompts``, what its files serve for, going on, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipseed
from clipseed.cli.main import main
from clipseed.clip.attention import patch_attention
from clipseed.clip.model import FrozenClip
from clipseed.data.images import resize_to_grid
from clipseed.data.toy.dataset import toy_scene
from clipseed.digest import file_sha256
from clipseed.refine.caa import FMA_WSSS, caa_of_raw
from clipseed.store.label_masks import read_label_mask, write_label_mask
from clipseed.store.manifest import recorded_prompts
from clipseed.store.toy_devkit import save_devkit
from clipseed.train.checkpoint import read_weights
from clipseed.train.metrics import read_metrics
from clipseed.train.prompts.files import read_prompts

from helpers.program import environment

CPU = ["--device", "cpu"]
TOY = ["train", "prompts", "--dataset", "toy", "--split", "train", "--limit", "10", "--batch-size", "4", *CPU]
SMALL = ["--context-length", "4", "--crop", "64", "--keep-every", "4", "--warm-up", "2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def manifest(path: str) -> dict[str, Any]:
    return clipseed.open_cams(path).manifest


@pytest.mark.slow
def test_from_labels_to_fine_seeds(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts, raw maps, FMA's refinement, coarse seeds, and the same from these; the hash goes along to the end."""
    run = [*TOY, *SMALL, "--steps", "10", "--cache"]
    assert main([*run, "--task", "classification", "--out", "c.safetensors", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["steps"], told["images"], told["skipped"]) == (10, 10, [])
    rows = read_metrics(here / "c-training" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows[0]["lr"] == pytest.approx(1e-5)
    assert rows[-1]["loss"] < rows[0]["loss"]
    weights, about = read_weights(here / "c.safetensors")
    clip = FrozenClip.load(weights="toy", device="cpu")
    assert list(weights) == ["context"]
    assert (about["text_sha256"], about["layout"]["position"]) == (clip.text_sha256, "end")
    assert about["source"]["split"] == "train"
    words = ["--dataset", "toy", "--limit", "4", *CPU]
    assert main(["cam", *words, "--prompts", "c.safetensors", "--raw", "--out", "cams.h5"]) == 0
    assert main(["cam", *words, "--prompts", "c.safetensors", "--out", "unit.h5"]) == 0
    sha256 = file_sha256(here / "c.safetensors")
    assert recorded_prompts(manifest("cams.h5")) == sha256
    with clipseed.open_cams("cams.h5") as raw, clipseed.open_cams("unit.h5") as unit:
        for key in raw:
            maps = raw[key].maps
            assert maps.min() < 0  # signed, and of the gradient's size
            assert np.abs(maps).max() < 0.5
            cut = np.maximum(maps, 0)
            cut -= cut.min(axis=(1, 2), keepdims=True)
            scaled = cut / np.maximum(cut.max(axis=(1, 2), keepdims=True), 1e-30)
            np.testing.assert_allclose(unit[key].maps, scaled, atol=2e-3)
            wide = raw[key].upsampled()
            assert wide.min() == 0
            assert set(wide.max(axis=(1, 2)).round(6)) <= {0.0, 1.0}
    for preset in ("fma-voc-coarse", "fma-voc-fine", "fma-coco-coarse"):
        assert main(["refine", "caa", "cams.h5", "--preset", preset, "--out", f"{preset}.h5", *CPU]) == 0
        constants, source = FMA_WSSS[preset.removeprefix("fma-")]
        found = manifest(f"{preset}.h5")
        assert (found["options"]["raw"], found["options"]["box_threshold"]) == (True, constants.box_threshold)
        assert recorded_prompts(found) == sha256
        with clipseed.open_cams("cams.h5") as raw, clipseed.open_cams(f"{preset}.h5") as refined:
            key = next(iter(raw))
            image = toy_scene(0, key).image()
            grid = raw[key].maps.shape[1:]
            view = resize_to_grid(Image.fromarray(image), grid, clip.tower.patch).copy()
            attention = patch_attention(clip.tower, torch.from_numpy(view).permute(2, 0, 1)[None], constants.layers)
            (expected,) = caa_of_raw(
                [torch.from_numpy(raw[key].maps)], attention, replace(constants, released=True), source
            )
            np.testing.assert_allclose(refined[key].maps, expected, rtol=1e-3, atol=1e-7)
    save_segments = ["sam-masks", *words, "--points-per-side", "4", "--crop-layers", "0", "--out", "segments.h5"]
    assert main(save_segments) == 0
    assert main(["sam-seed", "fma-voc-coarse.h5", "--preset", "voc-coarse", "--out", "coarse", "--allow-skipped"]) == 0
    stored = json.loads((here / "coarse" / "manifest.json").read_text())
    assert recorded_prompts(stored) == sha256
    fine = ["train", "prompts", "--dataset", "toy", "--limit", "4", "--batch-size", "4", *CPU, *SMALL, "--steps", "4"]
    fine += ["--task", "segmentation", "--seeds", "coarse", "--cache", "--out", "f.safetensors"]
    assert main(fine) == 0
    assert read_prompts(here / "f.safetensors").layout.contexts == 18
    assert main(["cam", *words, "--prompts", "f.safetensors", "--out", "fine.h5"]) == 0
    # Other prompts are other settings, told by name.
    assert main(["cam", *words, "--prompts", "f.safetensors", "--raw", "--out", "cams.h5"]) == 1
    assert "--prompts" in capsys.readouterr().err


@pytest.mark.slow
def test_prompts_serve_every_method(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All methods of ``cam``, ``refine js``, tagging, WeCLIP and its refined pseudo-labels read learned prompts."""
    assert main([*TOY, *SMALL, "--steps", "2", "--cache", "--quiet", "--out", "p.safetensors"]) == 0
    words = ["--dataset", "toy", "--limit", "2", *CPU, "--quiet", "--allow-skipped"]
    for method in ("softmax-gradcam", "gradcam", "maskclip", "svc", "naclip"):
        line = ["cam", *words, "--method", method, "--overwrite"]
        # 3: most maps of these two scenes may be empty, above all with prompts after two steps.
        assert main([*line, "--prompts", "p.safetensors", "--out", "with.h5"]) in (0, 3)
        assert main([*line, "--out", "without.h5"]) in (0, 3)
        with clipseed.open_cams("with.h5") as ours, clipseed.open_cams("without.h5") as plain:
            assert any(np.abs(ours[key].maps - plain[key].maps).max() > 1e-3 for key in ours), method
    assert main(["refine", "js", "with.h5", "--out", "js.h5", *CPU, "--quiet"]) == 0
    (here / "p.safetensors").rename(here / "moved.safetensors")
    assert main(["refine", "js", "with.h5", "--out", "again.h5", *CPU, "--quiet"]) == 1
    assert "name them with --prompts" in capsys.readouterr().err
    line = ["refine", "js", "with.h5", "--out", "again.h5", "--prompts", "moved.safetensors", *CPU, "--quiet"]
    assert main(line) == 0
    with clipseed.open_cams("js.h5") as one, clipseed.open_cams("again.h5") as two:
        assert all(np.array_equal(one[key].maps, two[key].maps) for key in one)
    save_devkit(here / "kit", count=3)
    folder = ["--dataset", "folder", "--images", "kit/JPEGImages", "--weights", "toy", *CPU, "--quiet"]
    tagging = ["cam", *folder, "--labels", "auto", "--allow-skipped", "--prompts", "moved.safetensors"]
    assert main([*tagging, "--out", "tagged.h5", "--classes", "toy"]) in (0, 3)
    assert recorded_prompts(manifest("tagged.h5")) == file_sha256(here / "moved.safetensors")
    weclip = ["train", "weclip", "--dataset", "toy", "--split", "train", "--limit", "4", "--batch-size", "2", *CPU]
    weclip += ["--crop", "64", "--width", "16", "--heads", "2", "--blocks", "1", "--par-iterations", "1", "--quiet"]
    assert main([*weclip, "--steps", "2", "--prompts", "moved.safetensors", "--out", "w.safetensors"]) == 0
    assert main([*weclip, "--steps", "2", "--out", "w.safetensors"]) == 1  # other texts are other settings
    assert "learned" in capsys.readouterr().err
    predict = ["predict", "w.safetensors", "--dataset", "toy", "--limit", "1", *CPU, "--quiet", "--allow-skipped"]
    assert main([*predict, "--labels", "own", "--out", "refined"]) == 2
    assert "was trained with learned prompts" in capsys.readouterr().err
    assert main([*predict, "--labels", "own", "--prompts", "moved.safetensors", "--out", "refined"]) == 0
    assert main([*predict, "--prompts", "moved.safetensors", "--out", "predicted"]) == 2


def outputs(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in (folder / "p-training").iterdir() if path.name != "lock"}
    return {**found, "p": (folder / "p.safetensors").read_bytes()}


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    """kill -9 in the middle of learning from seeds with augmented crops; the same command goes on."""
    words = [*TOY, *SMALL, "--steps", "12", "--task", "segmentation", "--seeds", "toy", "--out", "p.safetensors"]
    words[words.index("--keep-every") + 1] = "3"
    line = [sys.executable, "-m", "clipseed", *words, "--jitter", "--sides", "64,96"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    subprocess.run(line, cwd=whole, env=environment(), check=True, capture_output=True, timeout=240)
    process = subprocess.Popen(line, cwd=broken, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (broken / "p-training" / "checkpoint.safetensors").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -9
    ended = subprocess.run(line, cwd=broken, env=environment(), check=True, capture_output=True, text=True, timeout=240)
    assert "going on after step" in ended.stderr
    assert outputs(broken) == outputs(whole)


def refused(words: list[str], capsys: pytest.CaptureFixture[str], code: int, *parts: str) -> None:
    capsys.readouterr()
    assert main(words) == code
    told = capsys.readouterr().err
    assert all(part in told for part in parts), told
    assert "Traceback" not in told


@pytest.mark.slow
def test_what_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seeds that are missing, of other sizes or classes; prompts of another tower; options that mean nothing."""
    save_devkit(here / "kit", count=4)
    kit = ["train", "prompts", "--dataset", "voc", "--root", "kit", "--classes", "toy", "--weights", "toy", *CPU]
    kit += [*SMALL, "--batch-size", "2", "--steps", "2", "--cache"]
    seeds = [*kit, "--task", "segmentation", "--seeds"]
    refused([*kit, "--task", "segmentation"], capsys, 2, "--seeds")
    refused([*kit, "--seeds", "kit/SegmentationClass"], capsys, 2, "--seeds")
    refused([*seeds, "nowhere"], capsys, 1, "--seeds nowhere: no such folder")
    (here / "few").mkdir()
    refused([*seeds, "few"], capsys, 1, "none of the 4 images", "a mask in few")
    first, second = sorted((here / "kit" / "SegmentationClass").iterdir())[:2]
    (here / "few" / first.name).write_bytes(first.read_bytes())
    assert main([*seeds, "few", "--out", "few.safetensors"]) == 0
    told = capsys.readouterr().err
    assert "3 of 4 images have no mask" in told
    assert "classes are in no image" in told
    write_label_mask(here / "few" / second.name, np.zeros((9, 9), np.uint8))
    refused([*seeds, "few", "--out", "size.safetensors"], capsys, 1, "9x9 pixels, its image")
    write_label_mask(here / "few" / second.name, np.full(read_label_mask(second).shape, 77, np.uint8))
    refused([*seeds, "few", "--out", "ids.safetensors"], capsys, 1, "77")
    (here / "few" / "manifest.json").write_text(json.dumps({"vocabulary": {"classes": [{"name": "unicorn"}]}}))
    refused([*seeds, "few", "--out", "words.safetensors"], capsys, 1, "label masks of other classes")
    refused([*kit, "--sides", "64,96"], capsys, 2, "--sides")
    refused([*kit, "--context-length", "200"], capsys, 2, "--context-length 200", "too long")
    refused([*kit, "--context", "nobody.yaml"], capsys, 1, "nobody.yaml")
    refused([*kit, "--mirror", "2", "--out", "x.safetensors"], capsys, 2, "--mirror")
    refused([*kit, "--out", "x.h5"], capsys, 2, ".safetensors")
    # An image that cannot be read is skipped, and another stands in for it.
    next((here / "kit" / "JPEGImages").iterdir()).write_bytes(b"no image")
    assert main([*kit, "--out", "lost.safetensors"]) == 3
    assert "1 image skipped" in capsys.readouterr().err
    cam = ["cam", "--dataset", "toy", "--limit", "1", *CPU, "--prompts", "few.safetensors"]
    refused([*cam, "--classes", "voc"], capsys, 2, "other classes than those of few.safetensors")
    refused([*cam, "--template", "a {}."], capsys, 2, "--prompts", "template")
    refused([*cam, "--raw", "--refine", "caa"], capsys, 2, "--raw")
    refused([*cam[:-1], "kit"], capsys, 1, "kit")
    assert main(["cam", "--dataset", "toy", "--limit", "1", *CPU, "--out", "plain.h5", "--allow-skipped"]) == 0
    refused(["refine", "caa", "plain.h5", "--preset", "fma-voc-fine"], capsys, 2, "clipseed cam --raw")
    refused(["refine", "js", "plain.h5", "--preset", "fma-voc-fine"], capsys, 2, "--preset")


def test_prompts_of_another_tower(here: Path, capsys: pytest.CaptureFixture[str], tiny_weights: Path) -> None:
    assert main([*TOY, *SMALL, "--steps", "1", "--cache", "--quiet", "--out", "p.safetensors"]) == 0
    line = ["cam", "--dataset", "toy", "--limit", "1", *CPU, "--weights", str(tiny_weights)]
    refused([*line, "--prompts", "p.safetensors"], capsys, 1, "p.safetensors", "--weights")
