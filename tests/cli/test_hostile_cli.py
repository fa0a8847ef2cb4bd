"""The program used with ill will: every answer is one sentence that names what is wrong, with the right exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clipseed.cli.main import main

from helpers.images import photo
from helpers.seeds_files import MANIFEST, arrays, seeds_file

LONG = "x" * 300


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photos with labels, a CAM file, an empty folder and a pipe, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "empty"):
        (tmp_path / name).mkdir()
    photo(0, 20, 20).save("photos/a.png")
    Path("classes.txt").write_text("rust\n")
    Path("labels.txt").write_text("a rust\n")
    seeds_file(tmp_path / "cams.h5", arrays())
    os.mkfifo("pipe")
    return tmp_path


CAM = ["cam", "--dataset", "folder", "--images", "photos", "--classes", "classes.txt", "--labels", "labels.txt"]
TOY = ["cam", "--dataset", "toy", "--limit", "1"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([*CAM, "--labels", "photos"], 1, "photos: a label file cannot be read (Is a directory)"),
        ([*CAM, "--labels", "pipe"], 1, "pipe: a label file must be a file, not a pipe or a device"),
        ([*CAM, "--labels", "/dev/null"], 1, "/dev/null: a label file must be a file"),
        ([*CAM, "--images", "empty"], 1, "empty: no images here"),
        ([*CAM, "--images", "labels.txt"], 1, "labels.txt: is a file; name the folder with the images"),
        ([*CAM, "--images", LONG], 1, "no such image folder"),
        ([*CAM, "--classes", "photos"], 1, "photos: no such class list; give a file, or one of"),
        ([*CAM, "--classes", LONG], 1, "no such class list"),
        ([*CAM, "--split", LONG], 1, "no such file; of a folder it is a file with one id per line"),
        ([*CAM, "--root", "."], 2, "--root does not belong to --dataset folder (but to voc, coco)"),
        ([*TOY, "--labels", "labels.txt"], 2, "--labels does not belong to --dataset toy"),
        ([*TOY, "--split", "val"], 2, "--split val: the toy set has held-out and train"),
        ([*TOY, "--template", "a {x} {}"], 2, "--template: template 'a {x} {}' must contain exactly one {}"),
        ([*TOY, "--template", "a\n{}"], 2, "--template: 'a\\n{}' holds a line break, a control character"),
        ([*TOY, "--batch-size", "9" * 5000], 2, "give auto or a number"),
        ([*TOY, "--scales", ","], 2, "--scales: give at least one number"),
        (["evaluate", LONG], 1, "no such CAM file or mask folder"),
        (["evaluate", "pipe"], 1, "pipe: a pipe or a device, not a CAM file"),
        (["evaluate", "cams.h5", "--gt", LONG], 1, "no such folder"),
        (["evaluate", "cams.h5", "--gt", "toy:²"], 1, "--gt toy:²: the part behind 'toy:' must be a number"),
        (["evaluate", "cams.h5", "--gt", "toy:" + "9" * 5000], 1, "must be a number of at most 20 digits"),
        (["evaluate", "cams.h5", "--gt", "empty", "--split", LONG], 1, "neither a file nor a list of the devkit"),
        (["evaluate", "cams.h5", "--alpha", ""], 2, "--alpha: give at least one number"),
        (["inspect", LONG], 1, "no such file"),
        (["inspect", "cams.h5", "--id", "a"], 2, "--id belongs to --preview"),
        (["report", "cams.h5", "--alpha", ","], 2, "--alpha: give at least one number"),
        (["refine", "par", "cams.h5", "--dilations", "1.5"], 2, "--dilations 1.5: give whole numbers"),
        (["refine", "par", "cams.h5", "--dilations", "nan"], 2, "--dilations nan: give whole numbers"),
        (["refine", "par", "cams.h5", "--dilations", "1e999"], 2, "give whole numbers"),
        (["prompts", "--dataset", "toy", "--templates", "pipe"], 1, "pipe: a list of templates must be a file"),
    ],
)
def test_answers(words: list[str], code: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in folder.rglob("*"))
    assert main(words) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "fault in clipseed" not in captured.err
    assert captured.out == ""
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_devices_and_pipes_are_never_replaced(folder: Path) -> None:
    """Files are written beside their name and renamed, which would turn /dev/null into a file."""
    from clipseed.errors import StoreError
    from clipseed.store.files import write_text

    for name in ("pipe", "empty"):
        with pytest.raises(StoreError, match=f"{name}: is a folder, a device or a pipe"):
            write_text(folder / name, "x")
    assert (folder / "pipe").is_fifo()
    write_text(folder / ("n" * 250), "x")  # the temporary name must fit too
    assert (folder / ("n" * 250)).read_text() == "x"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_class_names_on_any_terminal(encoding: str, tmp_path: Path) -> None:
    names: list[Any] = [{"name": name} for name in ("日本", "😀,<b>", "é")]
    path = seeds_file(tmp_path / "é.h5", arrays(), {**MANIFEST, "vocabulary": {"name": "x", "classes": names}})
    done = subprocess.run(
        [sys.executable, "-m", "clipseed", "inspect", path], capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0", "TERM": "dumb"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding).count("\n") > 12
    assert ("日本" if encoding == "utf-8" else "\\u65e5\\u672c") in done.stdout.decode(encoding)


def test_closed_and_full_outputs(tmp_path: Path) -> None:
    path = seeds_file(tmp_path / "cams.h5", arrays())

    def shell(ending: str, name: Path = path) -> tuple[int, str]:
        command = f"{sys.executable} -m clipseed inspect {name} {ending}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    assert shell(">&-") == (0, "")
    assert shell("2>&-", tmp_path / "nothing.h5") == (1, "")
    assert shell("> /dev/full") == (1, "error: the disk that the output goes to is full; free some space\n")


def test_json_of_a_hostile_manifest_is_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds_file(folder / "odd.h5", arrays(), {**MANIFEST, "method": "\x1b[31m</script>\ud800"})
    assert main(["inspect", "odd.h5", "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text)["manifest"]["method"].startswith("\x1b[31m")
    assert "\x1b" not in text
