"""What a path holds, and readers that go to other processes."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from clipseed.data.paths import is_file
from clipseed.errors import InputError, StoreError, UsageError
from clipseed.formats.open import ForeignSegments
from clipseed.store.cams import CamSet, open_cams
from clipseed.store.label_mask_folder import LabelMaskFolder
from clipseed.store.label_masks import write_label_mask
from clipseed.store.open import (
    content_of,
    format_of,
    open_prediction,
    open_records,
    open_segments_of_any_kind,
    record_files,
)
from clipseed.store.segment_records import pack_segments
from clipseed.store.segments import SegmentSet

from helpers.records import GRID, SIZE, make_cam, rectangles, small_manifest, write_cache, write_seeds

CAMS = [make_cam("a", (7, 2), 0), make_cam("sub/b", (0,), 1)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CAMs and segments as a file and as a folder of units, label masks, and folders of masks of another program."""
    write_seeds(tmp_path / "cams.h5", CAMS, small_manifest(tmp_path))
    write_seeds(tmp_path / "cams", CAMS, small_manifest(tmp_path))
    records = [pack_segments(cam.id, SIZE, rectangles(GRID, k)) for k, cam in enumerate(CAMS)]
    write_cache(tmp_path / "segments.h5", records)
    write_cache(tmp_path / "segments", records)
    (tmp_path / "masks").mkdir()
    (tmp_path / "foreign" / "a").mkdir(parents=True)
    write_label_mask(tmp_path / "masks" / "a.png", np.zeros(SIZE, np.uint8))
    write_label_mask(tmp_path / "foreign" / "a" / "0.png", np.ones(SIZE, np.uint8))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.h5").write_text("no HDF5")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_a_path_holds(folder: Path) -> None:
    os.rename("segments.h5", "cams-of-nobody.h5")  # names say nothing
    contents = {
        "cams.h5": "CAMs", "cams": "CAMs", "cams-of-nobody.h5": "segments", "segments": "segments",
        "masks": "label masks", "empty": "label masks", "text.h5": "CAMs", "nothing": "CAMs", "/dev/null": "CAMs",
    }  # fmt: skip
    assert {name: content_of(Path(name)) for name in contents} == contents


@pytest.mark.parametrize(("name", "kind"), [("cams.h5", CamSet), ("cams", CamSet), ("masks", LabelMaskFolder)])
def test_predictions(folder: Path, name: str, kind: type) -> None:
    assert isinstance(open_prediction(Path(name)), kind)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nothing.h5", InputError, r"nothing\.h5: no such CAM file or mask folder"),
        ("segments.h5", StoreError, r"segments\.h5: a clipseed-segments file, but not a clipseed CAM file"),
        ("begun.h5", StoreError, r"begun\.h5: not finished yet; unless it is being written"),
        ("text.h5", StoreError, r"text\.h5: not a readable HDF5 file"),
        ("/dev/null", StoreError, r"/dev/null: a pipe or a device"),
    ],
)
def test_what_is_no_prediction(folder: Path, name: str, error: type[Exception], message: str) -> None:
    Path("begun.h5.parts").mkdir()
    with pytest.raises(error, match=message):
        open_prediction(Path(name))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("cams.h5", CamSet), ("cams", CamSet), ("segments.h5", SegmentSet), ("segments", SegmentSet)],
)
def test_records(folder: Path, name: str, kind: type) -> None:
    with open_records(Path(name)) as records:
        assert isinstance(records, kind)
        assert list(records) == ["a", "sub/b"]


def test_segments_of_any_kind(folder: Path) -> None:
    os.link("segments.h5", "without-suffix")
    for name in ("segments.h5", "segments", "without-suffix"):
        assert isinstance(open_segments_of_any_kind(Path(name)), SegmentSet)
    foreign = open_segments_of_any_kind(Path("foreign"))
    assert isinstance(foreign, ForeignSegments)
    assert foreign.ids() == {"a"}
    with pytest.raises(UsageError, match=r"--masks-kind sa-1b: segments\.h5 is a segments file"):
        open_segments_of_any_kind(Path("segments.h5"), "sa-1b")
    with pytest.raises(StoreError, match=r"later\.h5: no such segments file; clipseed sam-masks makes one"):
        open_segments_of_any_kind(Path("later.h5"))


def test_files_of_what_is_not_finished(folder: Path) -> None:
    unit = next(Path("cams").glob("unit-*.h5"))
    Path("cams.h5.parts").mkdir()
    os.link(unit, Path("cams.h5.parts") / unit.name)
    assert record_files(Path("cams.h5")) == [Path("cams.h5.parts") / unit.name, Path("cams.h5")]
    assert record_files(Path("cams")) == [unit]
    assert record_files(Path("nothing")) == []
    assert all(map(is_file, record_files(Path("cams.h5"))))


def test_formats_keep_the_type_of_their_maps(folder: Path) -> None:
    assert format_of(Path("segments.h5")).name == "clipseed-segments"
    assert format_of(Path("cams.h5")).pack(CAMS)["cam"].dtype == np.float16
    with h5py.File("other.h5", "w"):
        pass
    with pytest.raises(StoreError, match=r"other\.h5: an HDF5 file, but not one of clipseed's"):
        format_of(Path("other.h5"))


@pytest.mark.parametrize("name", ["cams.h5", "cams"])
def test_a_copy_opens_the_files_for_itself(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_cams(name) as cams:
        copied = pickle.dumps(cams)
    assert len(copied) < 1000  # a path, not an index
    monkeypatch.chdir(folder / "empty")  # a worker may stand elsewhere
    copy = pickle.loads(copied)
    assert list(copy) == ["a", "sub/b"]
    assert (copy["a"].maps == CAMS[0].maps).all()
    assert copy.manifest["vocabulary"] == small_manifest(folder)["vocabulary"]
    copy.close()
    pickle.loads(copied).close()  # never opened


def test_copies_of_foreign_segments_and_of_mask_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = open_segments_of_any_kind(Path("foreign"))
    assert "a" in foreign  # its ids are known now, and stay behind
    copied = pickle.dumps((foreign, LabelMaskFolder(folder / "masks")))
    (folder / "foreign" / "b").mkdir()
    write_label_mask(folder / "foreign" / "b" / "0.png", np.ones(SIZE, np.uint8))
    monkeypatch.chdir(folder / "empty")
    segments, masks = pickle.loads(copied)
    assert segments.ids() == {"a", "b"}
    assert segments.read("b", SIZE).masks.all()
    assert masks.ids() == {"a"}
    assert masks.read("a").shape == SIZE
