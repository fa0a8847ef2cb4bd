"""What a run says while it goes on and when it is through: progress, --report, exit codes."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from clipseed.cli import _console
from clipseed.cli._console import Console
from clipseed.cli._options import OutputArguments, RunArguments
from clipseed.cli._run import prepare
from clipseed.cli.main import main
from clipseed.runtime.stream import StreamStats
from clipseed.store.files import refuse_unwritable
from clipseed.store.toy_devkit import save_devkit
from clipseed.store.units import Unit

from helpers.images import photo


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five images, one of them broken, one without labels."""
    (tmp_path / "photos").mkdir()
    for number in range(5):
        photo(number, 48, 64).save(tmp_path / "photos" / f"{number}.jpg")
    (tmp_path / "photos" / "2.jpg").write_bytes(b"\xff\xd8\xff broken")
    (tmp_path / "labels.csv").write_text("id,label\n0,car\n1,tree\n2,car\n3,cup\n")
    (tmp_path / "classes.txt").write_text("car\ntree\ncup\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


CAM = ["cam", "--dataset", "folder", "--images", "photos", "--labels", "labels.csv", "--classes", "classes.txt",
       "--weights", "toy", "--device", "cpu"]  # fmt: skip


def test_run_reports(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CAM, "--report", "cam.json", "--json"]) == 3
    printed = json.loads(capsys.readouterr().out)
    report = json.loads((photos / "cam.json").read_text())
    assert {key: report[key] for key in printed} == printed
    assert (report["command"], report["images"], report["found"], report["computed"]) == ("cam", 5, 0, 3)
    broken, unlabelled = report["skipped"]
    assert broken["id"] == "2"
    assert "2.jpg" in broken["reason"]
    assert unlabelled == {"id": "4", "reason": "no labels are given for it"}
    assert set(report["waits"]) == {"decode", "device", "write"}
    assert 0 < sum(report["waits"].values()) <= report["seconds"]
    assert report["waits"][report["bottleneck"]] == max(report["waits"].values())
    assert report["images_per_second"] == pytest.approx(3 / report["seconds"], rel=0.05)
    assert report["peak_memory_mb"] > 50
    assert report["versions"]["torch"]
    assert report["finished"].startswith("20")

    assert main(["refine", "caa", "--device", "cpu", "--report", "caa.json"]) == 0
    assert main(["crf", "--device", "cpu", "--report", "crf.json"]) == 0
    with (photos / "labels.csv").open("a") as labels:
        labels.write("0,tree\n")
    assert main(["prompts", *CAM[1:], "--report", "prompts.json"]) == 0
    reports = [json.loads((photos / f"{name}.json").read_text()) for name in ("caa", "crf", "prompts")]
    assert [found["command"] for found in reports] == ["refine caa", "crf", "prompts"]
    common = set.intersection(*map(set, reports))
    assert common >= report.keys() - {"empty", "model", "device"}
    assert common >= {"seconds", "loading_seconds", "images_per_second", "waits", "shard", "found", "finished"}


def test_torchrun_is_not_told_of_skipped_images(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would stop the other processes; the list of skipped images is there all the same."""
    for rank in (1, 0):
        with monkeypatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", "2")
            assert main(CAM) == 0
    assert "2 images skipped" in capsys.readouterr().err
    assert (photos / "cams.skipped.csv").read_text().startswith("id,reason\n2,")


def test_a_shard_may_have_nothing_but_broken_images(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole may not."""
    (photos / "split.txt").write_text("2\n")
    assert main([*CAM, "--split", "split.txt", "--shard", "1/2"]) == 3
    assert main([*CAM, "--split", "split.txt", "--out", "other.h5"]) == 1
    assert "none of the 1 images could be used" in capsys.readouterr().err


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_progress_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a terminal: a line every ten seconds, with rate, time left, what limits, and how many were skipped."""
    clock = Clock()
    monkeypatch.setattr(_console, "time", clock)
    run = prepare("cam", RunArguments(shard="2/3"), OutputArguments())
    advance = run.start(4000, 100, "voc train", 4100)
    stats = StreamStats()
    stats.waits.update(decode=5.0, device=1.0)
    for _ in range(4):
        clock.now += 4
        advance(8, stats)
    stats.skipped.append(("a", "broken"))
    stats.waits["device"] = 9.0
    clock.now += 10
    advance(8, stats)
    assert capsys.readouterr().err.splitlines() == [
        "voc train: shard 2/3 (--shard): 4100 images, 4000 to do, 100 done already",
        "cam 24/4000, 2.0 images/s, 33 min 8 s left (mostly reading images)",
        "cam 40/4000, 1.5 images/s, 42 min 54 s left (mostly computing, 1 skipped)",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (61, "1 min 1 s"), (3599, "59 min 59 s"), (3700, "1 h 1 min"),
     (90_000, "25 h 0 min"), (1e6, "277 h 46 min")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert _console.duration(seconds) == text


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.note("a")
    console.warn("b")
    console.track("c", 10)(5)
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["cam", "sam-masks", "sam-seed", "threshold", "crf", "refine"])
def test_a_shard_of_nothing_but_broken_images_files_its_report(
    command: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So the other shards can finish the output."""
    small = ["--points-per-side", "2", "--crop-layers", "0", "--checkpoint", "toy"]
    from_maps = command in ("sam-seed", "threshold", "crf", "refine")
    if from_maps:
        assert main([*CAM, "--allow-skipped"]) == 0
    words = {
        "cam": [*CAM, "--out", "out.h5"],
        "sam-masks": ["sam-masks", "--dataset", "folder", "--images", "photos", *small, "--out", "out.h5"],
        "sam-seed": ["sam-seed", "cams.h5", "--method", "pixel", "--out", "out"],
        "threshold": ["threshold", "cams.h5", "--threshold", "0.4", "--out", "out"],
        "crf": ["crf", "cams.h5", "--device", "cpu", "--out", "out"],
        "refine": ["refine", "par", "cams.h5", "--device", "cpu", "--out", "out.h5"],
    }[command]
    if from_maps:
        spoil_maps(photos / "cams.h5")
    else:
        (photos / "split.txt").write_text("2\n")
        words += ["--split", "split.txt"]
    assert main([*words, "--shard", "1/2", "--report", "first.json"]) == 3
    first = json.loads((photos / "first.json").read_text())
    assert (first["computed"], first["open_shards"]) == (0, 1)
    assert first["skipped"]
    assert main([*words, "--shard", "1/2", "--allow-skipped"]) == 0
    assert main([*words, "--shard", "2/2", "--report", "second.json"]) == 0
    assert json.loads((photos / "second.json").read_text())["open_shards"] == 0
    capsys.readouterr()
    assert main([*words]) == 1  # the whole may not be skipped
    assert "could be used" in capsys.readouterr().err


def spoil_maps(path: Path) -> None:
    """CAMs whose every map is not a number, with valid checksums."""
    from clipseed.store.cam_records import Cam
    from clipseed.store.cam_writer import CamWriter
    from clipseed.store.cams import CamSet

    with CamSet(path) as seeds:
        manifest, records = seeds.manifest, [seeds[key] for key in seeds]
    path.unlink()
    with CamWriter(path, manifest, "float16", 64) as writer:
        writer.write(Unit(0), [Cam(r.id, r.classes, np.full_like(r.maps, np.nan), r.size) for r in records])
        writer.finish([r.id for r in records])


def test_toy_weights_on_photographs(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warning = "warning: the toy weights know only the built-in world; maps of photographs mean nothing"
    main(CAM)
    told = capsys.readouterr().err
    assert told.count(warning) == 1
    assert told.index(warning) < told.index(" to do")  # before the work
    with (photos / "labels.csv").open("a") as labels:
        labels.write("0,tree\n")
    assert main(["prompts", *CAM[1:]]) == 0
    assert warning in capsys.readouterr().err
    assert main(["cam", "--dataset", "toy", "--limit", "1", "--weights", "toy", "--out", "toy.h5"]) == 0
    save_devkit(photos / "devkit", 0, 1)
    saved = ["cam", "--dataset", "voc", "--root", "devkit", "--split", "val", "--classes", "toy", "--out", "saved.h5"]
    assert main([*saved, "--weights", "toy"]) == 0
    assert warning not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ([*CAM, "--report"], "--report"),
        (["crf", "cams.h5", "--report"], "--report"),
        (["evaluate", "cams.h5", "--csv"], "--csv"),
        (["prompts", *CAM[1:], "--csv"], "--csv"),
        (["inspect", "cams.h5", "--preview"], "--preview"),
        (["report", "cams.h5", "--out"], "--out"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_the_work(
    words: list[str], option: str, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the permissions say to root: here every file in the folder is refused by the system."""
    (photos / "ro").mkdir()
    real = Path.touch

    def touch(path: Path, *rest: object) -> None:
        if path.parent.name == "ro":
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        real(path)

    monkeypatch.setattr(Path, "touch", touch)
    for place, reason in (
        ("ro/r.json", f"cannot be written (Read-only file system); choose another {option}"),
        ("nowhere/r.json", "the folder nowhere does not exist"),
        ("photos", "is a folder, a device or a pipe; give the name of a file"),
    ):
        assert main([*words, place]) == 2
        assert capsys.readouterr().err == f"error: {option} {place}: {reason}\n"
    assert not (photos / "cams.h5").exists()


def test_looking_whether_a_file_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    refuse_unwritable(tmp_path / "new.json", "--report")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.json").write_text("old")
    refuse_unwritable(tmp_path / "old.json", "--report")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    refuse_unwritable(None, "--report")
