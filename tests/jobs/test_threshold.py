"""``clipseed threshold``: exactly what ``clipseed evaluate`` scores, and an output like those of the other commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipseed.cli.main import main
from clipseed.data.vocabulary import load_vocabulary
from clipseed.jobs import threshold as job
from clipseed.jobs.evaluate import EvaluateOptions, evaluate
from clipseed.store.cam_records import Cam
from clipseed.store.cams import open_cams
from clipseed.store.label_masks import label_mask_note, read_label_mask, write_label_mask

from helpers.records import SIZE, make_cam, small_manifest, write_seeds

CAMS = [make_cam("a", (7, 2), 0), make_cam("b", (), 1), make_cam("sub/c", (0,), 2), make_cam("d", (4, 19, 2), 3)]
RELEASED = {"exif": False, "max_side": 640, "min_side": 0, "paper": True}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder: four images' CAMs, with and without ``--paper``, and random ground truth."""
    manifest = small_manifest(tmp_path)
    write_seeds(tmp_path / "cams.h5", CAMS, manifest)
    write_seeds(tmp_path / "released.h5", CAMS, {**manifest, "options": RELEASED})
    rng = np.random.default_rng(0)
    for cam in CAMS:
        path = tmp_path / "truth" / f"{cam.id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.array([0, *cam.classes + 1, 255], np.uint8)
        write_label_mask(path, rng.choice(values, SIZE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def thresholded(*words: object) -> int:
    return main(["threshold", *map(str, words)])


def bytes_of(out: str) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(Path(out).rglob("*.png"))}


@pytest.mark.parametrize("source", ["cams.h5", "released.h5"])
@pytest.mark.parametrize(("option", "value"), [("threshold", 0.3), ("threshold", 0.0), ("alpha", 1.0), ("alpha", 2.5)])
def test_scores_are_those_of_evaluate(source: str, option: str, value: float, folder: Path) -> None:
    """Both confusion matrices, not just their means, and the masks that a report shows."""
    assert thresholded(source, f"--{option}", value) == 0
    truth = str(folder / "truth")
    chosen: dict[str, Any] = {"threshold": value} if option == "threshold" else {"alphas": (value,)}
    shown: dict[str, np.ndarray] = {}
    maps = evaluate(
        EvaluateOptions(Path(source), truth, **chosen), each=lambda key, *found: shown.update({key: found[2]})
    )
    masks = evaluate(EvaluateOptions(Path("pseudo"), truth))
    np.testing.assert_array_equal(masks.counts, maps.counts)
    assert masks.scores.miou == maps.scores.miou
    assert maps.counts[:, 1:].any()
    assert maps.counts[:, 0].any()
    for cam in CAMS:
        np.testing.assert_array_equal(read_label_mask(Path(f"pseudo/{cam.id}.png")), shown[cam.id])


def test_labels(folder: Path) -> None:
    """Written down: the strongest of the maps at the image's size, where it exceeds the threshold."""
    assert thresholded("cams.h5", "--threshold", 0.5) == 0
    for cam in CAMS:
        found = read_label_mask(folder / "pseudo" / f"{cam.id}.png")
        maps = np.concatenate([np.full((1, *SIZE), 0.5, np.float32), cam.upsampled()])
        np.testing.assert_array_equal(found, np.array([0, *cam.classes + 1])[maps.argmax(axis=0)])
        assert label_mask_note(folder / "pseudo" / f"{cam.id}.png").classes == tuple(cam.classes)


def test_the_newest_stage_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "cams.h5").touch()
    assert thresholded("--threshold", "0.4") == 0
    said = capsys.readouterr()
    last = "the last output here (name another one to choose it)"
    assert said.err.startswith(f"reading cams.h5, {last}\nthreshold: 4 images to do\n")
    assert "pseudo: 4 of 4 masks, 4 made now" in said.err
    assert said.out == ""
    (folder / "cams.h5").rename(folder / "cams-caa.h5")
    assert thresholded("--threshold", "0.4", "--json") == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"reading cams-caa.h5, {last}\nthreshold: 0 images to do, 4 done already\n")
    found = json.loads(said.out)
    assert (found["computed"], found["threshold"], found["alpha"], found["source"]) == (0, 0.4, None, "cams-caa.h5")


def test_resuming(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert thresholded("cams.h5", "--threshold", "0.4") == 0
    whole = bytes_of("pseudo")
    (folder / "pseudo" / "sub" / "c.png").unlink()
    assert thresholded("cams.h5", "--threshold", "0.4", "--report", "report.json") == 0
    report = json.loads(Path("report.json").read_text())
    assert (report["command"], report["computed"], report["found"]) == ("threshold", 1, 3)
    assert bytes_of("pseudo") == whole
    capsys.readouterr()
    assert thresholded("cams.h5", "--alpha", "2") == 1
    said = capsys.readouterr().err
    assert "--alpha none then, 2.0 now" in said
    assert "--threshold 0.4 then, none now" in said
    assert bytes_of("pseudo") == whole
    assert thresholded("cams.h5", "--alpha", "2", "--overwrite") == 0
    assert bytes_of("pseudo") != whole
    assert main(["crf", "cams.h5"]) == 2
    assert "holds another command's output" in capsys.readouterr().err


def test_any_cut_gives_the_bytes_of_one_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_UNIT_SIZE", 1)
    assert thresholded("cams.h5", "--threshold", "0.4", "--workers", "0", "--out", "whole") == 0
    for shard in ("2/3", "1/3", "3/3"):
        assert thresholded("cams.h5", "--threshold", "0.4", "--workers", "3", "--shard", shard, "--out", "cut") == 0
    assert bytes_of("cut") == bytes_of("whole")
    assert len(bytes_of("whole")) == 4
    for shard in ("1/2", "2/2"):
        assert thresholded("cams.h5", "--threshold", "0.4", "--shard", shard, "--out", f"part-{shard[0]}") == 0
    assert main(["merge", "part-1", "part-2", "--out", "merged"]) == 0
    assert bytes_of("merged") == bytes_of("whole")


def test_labels_without_a_pixel(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faint = Cam("faint", np.array([5], np.int32), np.full((1, 6, 8), 0.25, np.float32), SIZE)
    write_seeds(folder / "faint.h5", [faint, CAMS[2]], small_manifest(folder))
    words = ("faint.h5", "--threshold", "0.3", "--json")
    assert thresholded(*words) == 0
    said = capsys.readouterr()
    name = load_vocabulary("voc").class_names[5]
    (empty,) = json.loads(said.out)["empty"]["labels"]
    assert (empty["id"], empty["label"], empty["stage"]) == ("faint", name, "threshold")
    assert empty["reason"] == "no pixel of it exceeds the background and all other classes"
    assert not read_label_mask(Path("pseudo/faint.png")).any()
    assert thresholded(*words, "--empty", "ignore", "--out", "ignored") == 0
    assert (read_label_mask(Path("ignored/faint.png")) == 255).all()
    assert thresholded(*words, "--empty", "skip", "--out", "skipped") == 3
    assert sorted(bytes_of("skipped")) == ["sub/c.png"]


def test_maps_that_are_no_numbers_are_skipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = Cam("bad", np.array([5], np.int32), np.full((1, 6, 8), np.nan, np.float32), SIZE)
    write_seeds(folder / "bad.h5", [bad, CAMS[0]], small_manifest(folder))
    assert thresholded("bad.h5", "--threshold", "0.3") == 3
    assert "1 image skipped: bad (its CAMs hold NaN or infinity)" in capsys.readouterr().err
    assert sorted(bytes_of("pseudo")) == ["a.png"]


def test_a_moved_data_set(folder: Path) -> None:
    """No image is looked at; the masks say where they are."""
    (folder / "elsewhere").mkdir()
    assert thresholded("cams.h5", "--threshold", "0.4", "--images", "elsewhere") == 0
    manifest = json.loads((folder / "pseudo" / "manifest.json").read_text())
    assert (folder / "pseudo" / manifest["dataset"]["images"]).resolve() == folder / "elsewhere"
    before = bytes_of("pseudo")
    assert thresholded("cams.h5", "--threshold", "0.4") == 0
    assert bytes_of("pseudo") == before


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "--threshold or --alpha: say what the background scores"),
        (("--threshold", "0.3", "--alpha", "1"), 2, "--threshold and --alpha are two kinds of background score"),
        (("--threshold", "1"), 2, "--threshold 1.0: give a background score from 0 to below 1"),
        (("--alpha", "-1"), 2, "--alpha -1.0: give a positive exponent"),
        (("--threshold", "0.3", "--out", "cams.h5"), 2, "--out cams.h5: are the CAMs as well"),
        (("--threshold", "0.3", "--out", "released.h5"), 2, "is a file; masks go to a folder"),
        (("--threshold", "0.3", "--out", "truth"), 2, "holds masks that clipseed did not make"),
        (("--threshold", "0.3", "--workers", "-1"), 2, "--workers"),
    ],
)
def test_complaints(
    words: tuple[str, ...], code: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert thresholded("cams.h5", *words) == code
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_nothing_to_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert thresholded("--threshold", "0.3") == 2
    assert "nothing to label in" in capsys.readouterr().err
    assert thresholded("none.h5", "--threshold", "0.3") == 1
    assert "none.h5" in capsys.readouterr().err


def test_from_python(folder: Path) -> None:
    assert thresholded("cams.h5", "--threshold", "0.4") == 0
    with open_cams("cams.h5") as cams:
        for key, cam in cams.items():
            np.testing.assert_array_equal(cam.label_mask(threshold=0.4), read_label_mask(Path(f"pseudo/{key}.png")))


def test_a_legend_lies_beside_the_masks(folder: Path) -> None:
    """It follows the classes; a file of its name that is somebody's own stays."""
    assert thresholded("cams.h5", "--threshold", "0.4") == 0
    legend = folder / "pseudo" / "classes.csv"
    rows = [line.split(",") for line in legend.read_text().splitlines()]
    names = load_vocabulary("voc").class_names
    assert rows[0] == ["value", "name", "color"]
    assert [(int(value), name) for value, name, _ in rows[1:]] == [
        (0, "background"), *enumerate(names, 1), (255, "ignore"),
    ]  # fmt: skip
    assert [color for _, _, color in rows[1:4]] == ["#000000", "#800000", "#008000"]
    legend.write_text("value,name,color\n0,old,#000000\n")
    assert thresholded("cams.h5", "--threshold", "0.4") == 0
    assert legend.read_text().splitlines()[1] == "0,background,#000000"
    Path("mine").mkdir()
    Path("mine/classes.csv").write_text("cat\ndog\n")
    assert thresholded("cams.h5", "--threshold", "0.4", "--out", "mine") == 0
    assert Path("mine/classes.csv").read_text() == "cat\ndog\n"
