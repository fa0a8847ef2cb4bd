"""``--allow-skipped``: images that cannot be used cost no pipeline its exit code, up to as many as the user says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clipseed.cli._options import with_values
from clipseed.cli.main import main
from clipseed.store.toy_devkit import save_devkit

ROOT = Path(__file__).parents[2]


def damage(path: Path) -> None:
    """What an interrupted download leaves."""
    path.write_bytes(path.read_bytes()[:2000])


@pytest.fixture
def scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five scenes as a devkit in the working folder, the second of them damaged."""
    save_devkit(tmp_path, 0, 5)
    damage(tmp_path / "JPEGImages" / "toy_000001.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "filled"),
    [
        (["cam", "--allow-skipped"], ["cam", "--allow-skipped=any"]),
        (["cam", "--allow-skipped", "5"], ["cam", "--allow-skipped", "5"]),
        (["cam", "--allow-skipped=5", "-q"], ["cam", "--allow-skipped=5", "-q"]),
        (["cam", "--allow-skipped", "any"], ["cam", "--allow-skipped", "any"]),
        (["crf", "--allow-skipped", "cams.h5"], ["crf", "--allow-skipped=any", "cams.h5"]),
        (["crf", "--allow-skipped", "--json"], ["crf", "--allow-skipped=any", "--json"]),
        (["crf", "--", "--allow-skipped"], ["crf", "--", "--allow-skipped"]),
    ],
)
def test_its_number_may_be_left_out(words: list[str], filled: list[str]) -> None:
    assert with_values(words) == filled


CAM = ["cam", "--dataset", "voc", "--split", "val", "--classes", "toy", "--weights", "toy", "--device", "cpu"]


def test_cam_and_evaluate(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in (([], 3), (["--allow-skipped"], 0), (["--allow-skipped", "1"], 0), (["--allow-skipped=0"], 3)):
        assert main([*CAM, *words]) == code
        told = capsys.readouterr().err
        assert "1 image skipped: toy_000001" in told  # allowed, not hushed up
        assert (scenes / "cams.skipped.csv").read_text().startswith("id,reason\ntoy_000001,")
        score = ["evaluate", "cams.h5", "--gt", "SegmentationClass", "--split", "val", "--json"]
        assert main([*score, *words]) == code
        shown = capsys.readouterr()
        assert "1 image of split val without a prediction" in shown.err
        assert json.loads(shown.out)["missing_predictions"] == ["toy_000001"]
        assert main(["report", "cams.h5", "--gt", "SegmentationClass", "--split", "val", *words]) == code
        capsys.readouterr()
    damage(scenes / "JPEGImages" / "toy_000003.png")
    assert main([*CAM, "--overwrite", "--allow-skipped", "1"]) == 3
    assert "--allow-skipped 1: 2 images were left out, so the exit code is 3" in capsys.readouterr().err
    assert main([*CAM, "--overwrite", "--allow-skipped", "2"]) == 0
    for image in (scenes / "JPEGImages").iterdir():
        damage(image)
    assert main([*CAM, "--out", "none.h5", "--allow-skipped"]) == 1  # nothing is not a result


@pytest.mark.parametrize("value", ["auto", "-1", "1.5", "x"])
def test_what_is_no_number(value: str, scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (CAM, ["evaluate", "cams.h5"], ["report", "cams.h5"], ["prompts", "--dataset", "toy"]):
        assert main([*command, f"--allow-skipped={value}"]) == 2
        assert f"--allow-skipped {value}: give " in capsys.readouterr().err
    assert not (scenes / "cams.h5").exists()


@pytest.mark.slow
def test_every_command_that_streams(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image that was damaged after its maps were made."""
    main(CAM)
    damage(scenes / "JPEGImages" / "toy_000002.png")
    sam = ["sam-masks", "--dataset", "voc", "--split", "val", "--checkpoint", "toy", "--points-per-side", "2"]
    for command in (
        ["refine", "caa", "cams.h5"],
        ["refine", "js", "cams.h5"],
        ["refine", "par", "cams.h5", "--iterations", "1"],
        ["crf", "cams.h5", "--iterations", "1"],
        [*sam, "--crop-layers", "0"],
        ["prompts", *CAM[1:]],
    ):
        assert main([*command, "--device", "cpu"]) == 3, command
        assert main([*command, "--device", "cpu", "--allow-skipped", "2"]) == 0, command
        assert " skipped: toy_00000" in capsys.readouterr().err

    assert main(["sam-seed", "cams.h5", "--method", "pixel", "--allow-skipped", "1"]) == 0


def make(example: str, *words: object) -> Any:
    environment = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    line = ["make", "--no-print-directory", "-f", str(ROOT / "examples" / example / "Makefile"), *map(str, words)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
def test_a_damaged_image_does_not_jam_the_voc_pipeline(scenes: Path) -> None:
    words = ("SPLIT=val", "OUT=run", "CAM_OPTIONS=--weights toy --classes toy", "CRF_OPTIONS=--iterations 2")
    done = make("voc", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2] == "left out (run/cams.skipped.csv):"
    assert done.stdout.splitlines()[-1].startswith("toy_000001,")
    for name in ("cams", "cams-caa", "pseudo"):
        score = json.loads((scenes / "run" / f"{name}.json").read_text())
        assert (score["split"], score["images"], score["missing_predictions"]) == ("val", 4, ["toy_000001"])
    assert len(list((scenes / "run" / "pseudo").glob("*.png"))) == 4
    assert "Nothing to be done" in make("voc", *words).stdout
    # Mended, and taken up.
    whole = scenes / "again"
    save_devkit(whole, 0, 2)
    (whole / "JPEGImages" / "toy_000001.png").replace(scenes / "JPEGImages" / "toy_000001.png")
    again = make("voc", "-B", "run/cams.json", *words)
    assert again.returncode == 0, again.stderr
    assert json.loads((scenes / "run" / "cams.json").read_text())["images"] == 5
    assert not (scenes / "run" / "cams.skipped.csv").exists()
    # Whoever wants to stop at the first can.
    damage(scenes / "JPEGImages" / "toy_000001.png")
    assert make("voc", *words[:1], "OUT=strict", *words[2:], "SKIP=").returncode != 0


@pytest.mark.slow
def test_a_damaged_image_does_not_jam_the_toy_pipeline(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = (
        f"OUT={out}",
        "TRAIN=4",
        "VAL=3",
        "CRF_OPTIONS=--iterations 2",
        "TRAIN_OPTIONS=--epochs 1 --crop 64 --batch-size 2",
    )
    assert make("toy", "data", *words).returncode == 0
    damage(out / "train" / "JPEGImages" / "toy_000001.png")
    done = make("toy", "scores", "segmenter", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mean IoU without background") >= 3
    assert done.stdout.splitlines()[-1].startswith("toy_000001,")
    assert len(list((out / "pseudo").glob("*.png"))) == 3
    again = make("toy", "segmenter", *words)
    assert again.returncode == 0, again.stderr
    assert "clipseed cam" not in again.stdout
    assert again.stdout.splitlines()[-1].startswith("toy_000001,")


def test_pipelines_without_clipseed_on_the_path_say_what_to_do(tmp_path: Path) -> None:
    """They take the one of ``make install`` beside them; without it, the first step that needs it tells."""
    copy = tmp_path / "copy"
    (copy / "examples" / "toy").mkdir(parents=True)
    for name in ("clipseed.mk", "toy/Makefile"):
        (copy / "examples" / name).write_text((ROOT / "examples" / name).read_text())
    line = ["make", "-f", str(copy / "examples" / "toy" / "Makefile"), "-n", f"OUT={tmp_path}/run", "data"]
    bare = {"PATH": "/usr/bin:/bin"}
    refused = subprocess.run(line, env=bare, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "clipseed is neither on the PATH nor in .venv: run `make install` in its folder" in refused.stderr
    program = copy / ".venv" / "bin" / "clipseed"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    found = subprocess.run(line, env=bare, capture_output=True, text=True, check=True)
    assert f"{program} demo --save-dataset" in found.stdout
