"""The program as people and shells meet it: help, exit codes, streams, resuming, rubbish."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

import clipseed as package
from clipseed.cli.main import main
from clipseed.defaults import CamMethod, CrfSolver, SeedPreset, SegmentFormat
from clipseed.store.cams import open_cams

from helpers.images import photo
from helpers.program import Runner

COMMANDS = (
    "cam",
    "refine",
    "threshold",
    "crf",
    "sam-masks",
    "sam-seed",
    "merge",
    "evaluate",
    "report",
    "inspect",
    "prompts",
    "demo",
    "doctor",
)


@pytest.fixture
def voc_words(devkit: Path, tiny_weights: Path) -> list[str]:
    return ["cam", "--dataset", "voc", "--root", str(devkit), "--weights", str(tiny_weights), "--device", "cpu"]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert "Exit codes" in text
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        assert "Usage: " in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"clipseed {package.__version__}\n"


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from clipseed.cli.main import main; main(['--help']); main(['cam', '--help'])\n"
        "heavy = {'torch', 'open_clip', 'cv2', 'h5py', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_choices_are_listed_whole_and_completed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command, choices in (("sam-masks", SegmentFormat), ("sam-seed", SeedPreset), ("cam", CamMethod)):
        assert main([command, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert all(choice in text for choice in get_args(choices)), command
    env = {**os.environ, "_CLIPSEED_COMPLETE": "complete_bash", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", "from clipseed.cli.main import app; app(prog_name='clipseed')"],
        env={**env, "COMP_WORDS": "clipseed crf --solver "}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == list(get_args(CrfSolver)), done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["cam"], "name the images: --images DIR"),
        (["cam", "--dataset", "imagenet"], "'imagenet' is not one of 'voc', 'coco', 'folder', 'toy'"),
        (["cam", "--dataset", "toy", "--limit", "0"], "--limit"),
        (["cam", "--dataset", "toy", "--batch-size", "many"], "--batch-size many: give auto or a number"),
        (["cam", "--dataset", "toy", "--batch-size", "0"], "--batch-size: give auto or a number from 1"),
        (["cam", "--dataset", "toy", "--scales", "big"], "--scales big: give numbers"),
        (["cam", "--dataset", "toy", "--scales", "99"], "--scales: give factors between"),
        (["cam", "--dataset", "toy", "--method", "magic"], "'magic' is not one of 'softmax-gradcam', 'gradcam'"),
        (["cam", "--dataset", "toy", "--device", "gpu"], "--device gpu: choose auto, cpu, cuda"),
        (["cam", "--dataset", "toy", "--precision", "int8"], "'int8' is not one of 'auto', 'fp32', 'bf16', 'fp16'"),
        (["evaluate", "--no-such-option"], "No such option"),
    ],
)
def test_wrong_usage_is_code_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.replace("│", " ").split())
    assert captured.out == ""


def test_voc_end_to_end(
    voc_words: list[str], devkit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*voc_words, "--out", "cams.h5"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "voc train: 6 images, 6 to do" in captured.err
    assert "cams.h5: 6 of 6 images, 6 computed now" in captured.err

    seeds = package.open_cams("cams.h5")
    assert list(seeds) == [f"2007_00000{k}" for k in range(1, 7)]
    assert seeds["2007_000004"].classes.tolist() == [17, 7, 11]
    assert seeds["2007_000004"].size == (33, 90)
    assert seeds["2007_000004"].maps.shape == (3, 3, 6)
    assert seeds["2007_000005"].maps.shape == (0, 3, 4)  # shows no class
    model = seeds.manifest["model"]
    assert len(model["sha256"]) == 64
    assert seeds.manifest["versions"]["clipseed"] == package.__version__

    assert main([*voc_words, "--out", "cams.h5"]) == 0
    assert "0 to do, 6 done already" in capsys.readouterr().err
    assert main([*voc_words, "--out", "cams.h5", "--flip"]) == 1
    assert "--flip now, not then" in capsys.readouterr().err
    assert main([*voc_words, "--out", "cams.h5", "--flip", "--overwrite", "--scales", "0.5,1"]) == 0
    capsys.readouterr()

    monkeypatch.chdir(devkit)
    assert main(["evaluate", str(tmp_path / "cams.h5"), "--gt", "SegmentationClass", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["images"], data["split"]) == (6, "train")
    assert 0 <= data["miou"] <= 1


def test_folder_of_shards_and_json(voc_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards"
    assert main([*voc_words, "--out", str(out), "--json", "--quiet", "--batch-size", "2", "--limit", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    data = json.loads(captured.out)
    assert (data["images"], data["computed"], data["skipped"]) == (4, 4, [])
    assert {path.name for path in out.iterdir()} >= {"unit-000000.h5", "manifest.json"}
    assert len(open_cams(out)) == 4


@pytest.mark.slow
def test_results_do_not_depend_on_batching_or_workers(voc_words: list[str], tmp_path: Path) -> None:
    variants = {"a": ["--batch-size", "1"], "b": ["--batch-size", "5"], "c": ["--workers", "2"], "d": ["--limit", "3"]}
    for name, words in variants.items():
        assert main([*voc_words, "--out", str(tmp_path / f"{name}.h5"), "--quiet", *words]) == 0
    first = open_cams(tmp_path / "a.h5")
    for name in "bcd":
        other = open_cams(tmp_path / f"{name}.h5")
        for key in other:
            np.testing.assert_allclose(other[key].maps, first[key].maps, atol=1e-3)  # one unit of stored half precision


def test_skipped_images_are_code_3_and_listed(
    voc_words: list[str], devkit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = devkit / "JPEGImages"
    good = (images / "2007_000001.jpg").read_bytes()
    (images / "2007_000001.jpg").write_bytes(good[:600])
    (images / "2007_000003.jpg").unlink()
    (devkit / "Annotations" / "2007_000006.xml").unlink()
    out = tmp_path / "cams.h5"
    assert main([*voc_words, "--out", str(out)]) == 3
    captured = capsys.readouterr()
    assert "3 images skipped: 2007_000001" in captured.err
    assert "cams.h5: 3 of 6 images" in captured.err
    rows = (tmp_path / "cams.skipped.csv").read_text().splitlines()
    assert rows[0] == "id,reason"
    assert sorted(row.split(",")[0] for row in rows[1:]) == ["2007_000001", "2007_000003", "2007_000006"]
    assert any("truncated" in row for row in rows)
    assert any("no such file" in row for row in rows)
    assert any("no labels are given for it" in row for row in rows)

    (images / "2007_000001.jpg").write_bytes(good)  # the mended image is picked up by the same command
    assert main([*voc_words, "--out", str(out)]) == 3
    assert "1 computed now" in capsys.readouterr().err
    assert list(open_cams(out)) == ["2007_000001", "2007_000002", "2007_000004", "2007_000005"]


def test_when_nothing_can_be_read_it_is_a_failure(
    voc_words: list[str], devkit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(devkit / "JPEGImages")
    (devkit / "JPEGImages").mkdir()
    assert main([*voc_words, "--out", str(tmp_path / "cams.h5")]) == 1
    assert "none of the 6 images could be used; the first, 2007_000001:" in capsys.readouterr().err


def test_extreme_images(tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1x1, 1x4000, 8000x6000, every mode, ids with blanks and 200 letters: all analysed, none ends the run."""
    images = tmp_path / "photos"
    images.mkdir()
    cases = {
        "dot": Image.new("RGB", (1, 1), "red"),
        "line": photo(0, 1, 4000),
        "large": Image.new("RGB", (8000, 6000), "green"),
        "grey": photo(1, 40, 30).convert("L"),
        "alpha": photo(2, 40, 30).convert("RGBA"),
        "bits": photo(3, 40, 30).convert("1"),
        "a b, c's": photo(4, 40, 30),
        "n" * 200: photo(5, 40, 30),
        "é日本": photo(6, 40, 30),
    }
    for name, image in cases.items():
        image.save(images / f"{name}.png")
    (tmp_path / "labels.json").write_text(json.dumps({name: ["rust", "crack"] for name in cases}))
    (tmp_path / "classes.txt").write_text("rust\ncrack\n")
    out = tmp_path / "cams.h5"
    words = ["cam", "--dataset", "folder", "--images", images, "--labels", tmp_path / "labels.json", "--classes",
             tmp_path / "classes.txt", "--weights", tiny_weights, "--device", "cpu", "--out", out]  # fmt: skip
    assert main(list(map(str, words))) == 0, capsys.readouterr().err
    seeds = open_cams(out)
    assert set(seeds) == set(cases)
    for name, image in cases.items():
        assert seeds[name].size == (image.height, image.width)
        assert np.isfinite(seeds[name].maps).all()
    assert seeds["large"].maps.shape == (2, 30, 40)
    assert seeds["line"].maps.shape == (2, 1, 40)
    assert main(["inspect", str(out), "--preview", str(tmp_path / "preview.png"), "--count", "9"]) == 0
    with Image.open(tmp_path / "preview.png") as sheet:
        assert sheet.height > 9 * 200


def test_inspect(voc_words: list[str], devkit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cams.h5"
    assert main([*voc_words, "--out", str(out), "--quiet"]) == 0
    preview = tmp_path / "preview.png"
    assert main(["inspect", str(out), "--preview", str(preview), "--count", "2", "--verify"]) == 0
    text = capsys.readouterr().out
    for expected in ("softmax-gradcam", "voc train", "6 (1 without a class)", "8, ", "3x4 to 5x4", "float16", "person"):
        assert expected in text
    with Image.open(preview) as sheet:
        assert sheet.size[0] > 400
        assert sheet.size[1] > 400
    assert main(["inspect", str(out), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["images"], data["maps"], data["without_class"]) == (6, 8, 1)
    assert data["per_class"]["person"] == 2
    assert main(["inspect", str(out), "--preview", str(preview), "--id", "nothing"]) == 1
    assert "holds no image 'nothing'" in capsys.readouterr().err
    shutil.rmtree(devkit / "JPEGImages")
    assert main(["inspect", str(out), "--preview", str(preview)]) == 1
    assert "the image is not there any more" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "no.h5")]) == 1
    assert "no.h5: no such file" in capsys.readouterr().err


def test_preview_shows_the_map_in_place(tmp_path: Path) -> None:
    """A map that is hot in one corner colours that corner of the overlay, in the photo's own orientation."""
    from clipseed.report.overlay import heat_overlay
    from clipseed.store.cam_records import Cam

    cam = np.zeros((1, 3, 6), np.float32)
    cam[0, 0, 5] = 1
    seed = Cam("x", np.array([0], np.int32), cam, (48, 96))
    image_pixels = np.full((48, 96, 3), 128, np.uint8)
    overlay = heat_overlay(image_pixels, seed.upsampled()[0])
    redness = overlay[..., 0].astype(int) - overlay[..., 2]
    assert redness[4, 92] > 40
    assert redness[44, 4] < 0
    assert redness[4, 4] < 0


def test_unexpected_errors_ask_for_a_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("clipseed.jobs.doctor.examine", explode)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().err
    assert "ZeroDivisionError: division by zero. This is a fault in clipseed" in text
    assert "Traceback" not in text
    assert main(["doctor", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_expected_errors_are_one_line(clipseed: Runner, tmp_path: Path) -> None:
    done = clipseed("cam", "--dataset", "voc", "--root", tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "JPEGImages" in done.stderr
    assert "Traceback" in clipseed("cam", "--dataset", "voc", "--root", tmp_path, "--debug").stderr


@pytest.mark.slow
def test_pipes_and_poor_terminals(clipseed: Runner, voc_words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "cams.h5"
    poor = {"TERM": "dumb", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "40"}
    done = clipseed(*voc_words, "--out", out, env=poor)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr
    head = f"{sys.executable} -m clipseed inspect {out} | head -n 1; exit ${{PIPESTATUS[0]}}"
    piped = subprocess.run(["bash", "-c", head], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert piped.returncode == 0
    assert piped.stderr == ""
    assert piped.stdout.count("\n") == 1


def test_non_ascii_messages_on_an_ascii_terminal(clipseed: Runner) -> None:
    done = clipseed("evaluate", "é.h5", env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"})
    assert done.returncode == 1
    assert "no such CAM file" in done.stderr


def test_public_api_is_lazy_and_complete() -> None:
    code = "import clipseed, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        package.nonsense  # noqa: B018
