"""Mistakes of a first user: refused in words that name the option and the way out, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clipseed.cli.main import main
from clipseed.report.overlay import _plain, map_caption
from clipseed.store.label_masks import LabelMaskNote, write_label_mask

from helpers.images import photo
from helpers.records import make_cam, small_manifest, write_seeds


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CAMs, a folder of photos and a folder of label masks."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    photo(0, 48, 64).save("photos/a.jpg")
    write_seeds(tmp_path / "cams.h5", [make_cam("a", (7, 2), 0)], small_manifest(tmp_path / "photos"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("inspect cams.h5 --preview z.jpg", 2, "--preview z.jpg: it becomes a PNG; give NAME.png"),
        ("try photos/a.jpg cat --out x.txt", 2, "--out x.txt: it becomes a PNG"),
        ("cam --dataset toy --limit 1 --out cams.npz", 2, "--out cams.npz: give NAME.h5"),
        ("cam --dataset toy --limit 1 --out -", 2, "--out -: give NAME.h5"),
        ("cam --dataset toy --limit 1 --min-side 900", 2, "--min-side 900: is above --max-side 640"),
        ("cam --dataset toy --limit 1 --scales 1,,2", 2, "--scales 1,,2: give numbers"),
        ("cam --dataset toy --limit 1 --template foo", 2, "--template"),
        (
            "cam --dataset toy --limit 1 --model ViT-B-99 --weights openai",
            2,
            "--model ViT-B-99: unknown to open_clip; did",
        ),
        ("cam --images photos --labels x.csv --classes voc --split nosuch", 1, "x.csv: a label file cannot be read"),
        ("cam --images cams.h5 --labels x.csv --classes voc", 1, "cams.h5: is a file; name the folder"),
        ("sam-masks --dataset toy --max-side 1", 2, "--max-side: give a number of pixels from 16"),
        ("crf cams.h5 --out photos", 2, "--out photos: holds images; choose another folder"),
        ("threshold cams.h5 --threshold 0.4 --out photos", 2, "--out photos: holds images"),
    ],
)
def test_refused(words: str, code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == code
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["cams.h5", "photos"]
    assert [path.name for path in Path("photos").iterdir()] == ["a.jpg"]


def test_label_masks_are_not_inspected(capsys: pytest.CaptureFixture[str]) -> None:
    Path("pseudo").mkdir()
    write_label_mask(Path("pseudo/a.png"), np.ones((48, 64), np.uint8), LabelMaskNote((1,)))
    assert main(["inspect", "pseudo"]) == 2
    assert "pseudo: holds label masks; clipseed report pseudo shows them" in capsys.readouterr().err


def test_help_has_two_parts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("cam", "label", "sam-masks", "crf", "predict"):
        assert main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        first, more = shown.split("─ More ─")
        assert 5 <= first.count("│ --") <= 11, command
        assert more.count("│ --") > 10
        assert not any(f"<{kind}>" in shown for kind in ("str", "bool", "path", "int", "float"))


def test_captions() -> None:
    assert _plain("fötö, Ångström, 猫") == "foto, Angstrom, ?"
    assert map_caption("cat", np.zeros((2, 2), np.float32)) == "cat (empty)"
    assert map_caption("cat", np.eye(2, dtype=np.float32)) == "cat"
