"""Labels that come to nothing are said, whichever way an output came about."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipseed.cli.main import main
from clipseed.jobs import crf
from clipseed.runtime import images as engine
from clipseed.store import empty
from clipseed.store.cam_records import Cam
from clipseed.store.cam_writer import CamWriter
from clipseed.store.cams import CamFile, open_cams
from clipseed.store.empty import (
    NOTHING_COMPETES,
    EmptyLabel,
    EmptyList,
    background_to_ignore,
    empty_maps,
    read_empty,
    stored_empty_maps,
    without_pixel,
)
from clipseed.store.label_masks import label_mask_note, read_label_mask
from clipseed.store.segment_records import pack_segments
from clipseed.store.units import Unit

from helpers.records import GRID, SIZE, make_cam, rectangles, small_manifest, write_cache, write_seeds

CAM = ("cam", "--dataset", "toy", "--limit", "10", "--device", "cpu", "--max-side", "96", "--background", "none")


def test_maps() -> None:
    maps = np.zeros((4, 2, 3), np.float32)
    maps[0, 1, 2], maps[2] = 1e-8, -1
    assert empty_maps((5, 0, 9, 3), maps) == (0, 9, 3)
    assert empty_maps((), np.zeros((0, 2, 3), np.float32)) == ()


def test_masks() -> None:
    labels = np.array([[0, 3, 255], [1, 3, 0]], np.uint8)
    assert without_pixel((2, 253, 7, 0), labels) == (253, 7)
    assert background_to_ignore(labels).tolist() == [[255, 3, 255], [1, 3, 255]]
    assert labels[0, 0] == 0


@pytest.mark.parametrize("block", [1, 7, 50, 1 << 22])
def test_stored_maps(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at in blocks of any size, as one by one."""
    monkeypatch.setattr(empty, "_VALUES", block)
    rng = np.random.default_rng(block)
    records = []
    for k in range(30):
        classes = rng.permutation(20)[: rng.integers(0, 4)].astype(np.int32)
        grid = tuple(rng.integers(1, 5, 2))
        maps = (rng.random((len(classes), *grid)) * (rng.random((len(classes), 1, 1)) < 0.6)).astype(np.float32)
        records.append(Cam(f"i{k}", classes, maps, (9, 9)))
    write_seeds(tmp_path / "s.h5", records, small_manifest(tmp_path))
    expected = {r.id: tuple(int(c) for c, m in zip(r.classes, r.maps, strict=True) if m.max() == 0) for r in records}
    with CamFile(tmp_path / "s.h5", verify=False) as file:
        assert stored_empty_maps(file) == {key: row for key, row in expected.items() if row}
    assert any(expected.values())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_lists(tmp_path: Path) -> None:
    manifest = {"kind": "crf", "options": {"empty": "ignore"}, "vocabulary": {"classes": [{"name": 'a,"b'}]}}
    there = EmptyList(tmp_path, manifest, earlier=lambda key, k: ("cam", "why") if key == "x" else None)
    there.add("y", (0, 1), (1,))
    there.add("x", (0,), (0,))
    there.add("z", (0,), ())
    written = there.write()
    assert (written.of, written.images, written.masks, written.most) == (4, 2, "ignore", False)
    assert read_empty(tmp_path)[0] == EmptyLabel("x", 'a,"b', "cam", "why") == written.labels[0]
    assert rows(tmp_path / "empty.csv")[1]["class"] == "mask value 2"
    there.add("x", (0,), ())
    there.forget(["y"])
    assert there.write().file is None
    assert not (tmp_path / "empty.csv").exists()
    assert read_empty(tmp_path / "none.h5") == []


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, and small units."""
    monkeypatch.setitem(engine._UNIT_SIZE, "cpu", 3)
    monkeypatch.setattr(crf, "_UNIT_SIZE", 1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[dict[str, Any], str]:
    """What a command says about empty labels in JSON, and in words."""
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == code, capsys.readouterr().err
    said = capsys.readouterr()
    return json.loads(said.out)["empty"], said.err


@pytest.mark.slow
def test_cam(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole, again, in shards, merged, after a kill and in a folder: the same list, that of the stored maps."""
    found, said = told(capsys, *CAM, "--report", "run.json")
    with open_cams("cams.h5") as seeds:
        names, labels = seeds.class_names, sum(len(seeds.classes(key)) for key in seeds)
        expected = {
            (key, names[k]): len(seed.classes)
            for key, seed in seeds.items()
            for k, cam in zip(seed.classes, seed.maps, strict=True)
            if cam.max() == 0
        }
    assert found["count"] == len(expected) >= 3
    assert (found["of"], found["images"]) == (labels, len({key for key, _ in expected}))
    assert f"{len(expected)} of {labels} labels have no positive map" in said
    assert "listed in cams.empty.csv" in said
    assert NOTHING_COMPETES in said
    listed = (here / "cams.empty.csv").read_bytes()
    table = rows(here / "cams.empty.csv")
    assert {(row["id"], row["class"]) for row in table} == set(expected)
    for row in table:
        assert row["stage"] == "cam"
        assert (row["reason"] == NOTHING_COMPETES) == (expected[row["id"], row["class"]] == 1)
    assert json.loads((here / "run.json").read_text())["empty"] == found
    assert told(capsys, *CAM)[0] == found

    for k in (2, 1):
        part, _ = told(capsys, *CAM, "--shard", f"{k}/2", "--out", "two.h5")
        assert (here / "two.empty.csv").exists() == (k == 1)
    assert part == {**found, "file": "two.empty.csv"}
    assert (here / "two.empty.csv").read_bytes() == listed

    for k in (1, 2):
        Path(f"part-{k}").mkdir()
        shard, _ = told(capsys, *CAM, "--shard", f"{k}/2", "--out", f"part-{k}/cams.h5")
        assert 0 < shard["of"] < labels
        assert shard["file"] is None
    merged, said = told(capsys, "merge", "part-1/cams.h5", "part-2/cams.h5", "--out", "merged.h5")
    assert (merged["count"], merged["of"]) == (len(expected), labels)
    assert "have no positive map" in said
    assert (here / "merged.empty.csv").read_bytes() == listed

    folder, _ = told(capsys, *CAM, "--out", "folder")
    assert (here / "folder" / "empty.csv").read_bytes() == listed
    (here / "folder" / "unit-000001.h5").unlink()
    (here / "folder" / "empty.csv").unlink()
    assert told(capsys, *CAM, "--out", "folder")[0] == folder

    shown, _ = told(capsys, "inspect", "cams.h5")
    assert {(item["id"], item["label"]) for item in shown["labels"]} == set(expected)
    main(["inspect", "cams.h5"])
    assert f"{len(expected)} empty among the first 10" in (text := capsys.readouterr().out)
    assert f"since cam: {NOTHING_COMPETES}" in text

    own, _ = told(capsys, *CAM[:-2], "--out", "own.h5")
    assert own["count"] < found["count"]
    assert NOTHING_COMPETES not in own["reasons"]
    refined, _ = told(capsys, "refine", "caa", "cams.h5")
    assert (here / "cams-caa.empty.csv").read_bytes() == listed
    one_pass, _ = told(capsys, *CAM, "--refine", "caa", "--out", "pass.h5")
    assert one_pass["labels"] == refined["labels"] == found["labels"]


def test_most_maps_empty(devkit: Path, tiny_weights: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both images show one class."""
    (here / "some.txt").write_text("2007_000001\n2007_000003\n")
    words = ("cam", "--dataset", "voc", "--root", devkit, "--split", "some.txt", "--weights", tiny_weights, "--model")
    words = (*words[:-1], "--out", "c.h5")
    _, said = told(capsys, *words, "--background", "none", code=3)
    assert "most maps are empty" in said
    found, _ = told(capsys, *words, "--overwrite")
    assert found["count"] < 2


@pytest.mark.slow
def test_crf(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scene 0 shows one class, so its map is empty; scene 1's is not."""
    told(capsys, *CAM, "--limit", "2")
    with open_cams("cams.h5") as seeds:
        (gone,), shown = seeds.classes("toy_000000"), seeds.classes("toy_000001")
        name = seeds.class_names[gone]
    run = ("crf", "cams.h5", "--iterations", "1", "--device", "cpu")
    found, said = told(capsys, *run)
    assert (found["count"], found["of"], found["masks"]) == (1, 1 + len(shown), "background")
    assert "--empty ignore makes it 255" in said
    assert rows(here / "pseudo" / "empty.csv") == [
        {"id": "toy_000000", "class": name, "stage": "cam", "reason": NOTHING_COMPETES}
    ]
    note = label_mask_note(here / "pseudo" / "toy_000000.png")
    assert (note.classes, note.empty) == ((gone,), (gone,))
    assert not read_label_mask(here / "pseudo" / "toy_000000.png").any()
    again, said = told(capsys, *run)
    assert again == found
    assert "0 images to do" in said

    found, _ = told(capsys, *run, "--out", "ignored", "--empty", "ignore")
    assert (read_label_mask(here / "ignored" / "toy_000000.png") == 255).all()
    assert label_mask_note(here / "ignored" / "toy_000000.png").classes == (gone,)
    other = "toy_000001.png"
    assert (here / "ignored" / other).read_bytes() == (here / "pseudo" / other).read_bytes()
    assert json.loads((here / "ignored" / "manifest.json").read_text())["options"]["empty"] == "ignore"
    assert main(["crf", "cams.h5", "--iterations", "1", "--out", "ignored"]) == 1
    assert "--empty ignore then, background now" in capsys.readouterr().err

    skip = (*run, "--empty", "skip")
    for _ in range(2):  # resuming finds out again
        skipped, said = told(capsys, *skip, "--out", "skipped", code=3)
        assert (skipped["count"], skipped["of"]) == (1, 1 + len(shown))
        assert not (here / "skipped" / "toy_000000.png").exists()
        assert rows(here / "skipped" / "skipped.csv") == [
            {"id": "toy_000000", "reason": f"no pixel of {name} (--empty skip)"}
        ]
    listed = (here / "skipped" / "empty.csv").read_bytes()
    for k, code in ((1, 3), (2, 0)):
        told(capsys, *skip, "--out", "two", "--shard", f"{k}/2", code=code)
        told(capsys, *skip, "--out", f"part-{k}", "--shard", f"{k}/2", code=code)
    assert (here / "two" / "empty.csv").read_bytes() == listed
    merged, _ = told(capsys, "merge", "part-1", "part-2", "--out", "merged")
    assert (merged["count"], merged["of"]) == (1, 1 + len(shown))
    assert not (here / "merged" / "toy_000000.png").exists()
    assert main([*run, "--empty", "black"]) == 2
    assert "'black' is not one of 'background', 'ignore', 'skip'" in capsys.readouterr().err


def test_sam_seed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One class has no map, another loses every pixel to a stronger one; both are named with their stages."""
    strong, zero = make_cam("a", (7,), 0), np.zeros((1, 6, 8), np.float32)
    cam = np.concatenate([strong.maps, strong.maps / 2, zero])
    seeds = [Cam("a", np.array([7, 2, 4], np.int32), cam, SIZE), make_cam("b", (0,), 1)]
    write_seeds(here / "cams.h5", seeds, small_manifest(here))
    write_cache(here / "segments.h5", [pack_segments(s.id, SIZE, rectangles(GRID, k)) for k, s in enumerate(seeds)])
    for method in ("fma", "pixel", "vote"):
        found, said = told(capsys, "sam-seed", "--method", method, "--out", method, "--empty", "ignore")
        stages = {(item["id"], item["label"]): item["stage"] for item in found["labels"] if item["id"] == "a"}
        assert stages["a", "bottle"] == "cam"
        assert stages["a", "bird"] == "sam-seed", said
        assert not (read_label_mask(here / method / "a.png") == 0).any()

    # A vote on label masks knows from their list since when a label is gone.
    voted, _ = told(capsys, "sam-seed", "pixel", "--out", "voted")
    stages = {(item["id"], item["label"]): item["stage"] for item in voted["labels"]}
    assert stages["a", "bottle"] == "cam"
    assert stages["a", "bird"] == "sam-seed"


def test_shards_made_before(tmp_path: Path) -> None:
    """A writer that finds a shard and a newer one of the same image lists what it keeps."""
    manifest = small_manifest(tmp_path)
    full, nothing = make_cam("a", (3,), 0), Cam("a", np.array([3], np.int32), np.zeros((1, 6, 8), np.float32), SIZE)
    with CamWriter(tmp_path / "out", manifest, "float16", 4) as writer:
        writer.write(Unit(0), [full])
        assert writer.finish(["a"]).empty.labels == ()
    with CamWriter(tmp_path / "out", manifest, "float16", 4) as writer:
        writer.forget_unlike({"a": (5,)})
        writer.write(Unit(0), [nothing])
        assert [item.label for item in writer.finish(["a"]).empty.labels] == ["boat"]
