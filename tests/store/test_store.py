"""CAMs on disk: round trips, identity, resuming, damage, locks, forks, full and read-only disks."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clipseed
from clipseed.errors import StoreError, UsageError
from clipseed.formats.palette import voc_palette
from clipseed.store.cam_records import Cam, cam_format
from clipseed.store.cam_writer import CamWriter
from clipseed.store.cams import CamFile, CamSet, open_cams
from clipseed.store.files import replacing, storage_errors
from clipseed.store.label_masks import read_label_mask, write_label_mask
from clipseed.store.manifest import differences
from clipseed.store.record_file import write_unit
from clipseed.store.units import Unit

from helpers.samples import samples

MANIFEST: dict[str, Any] = {
    "kind": "cam", "method": "m", "options": {"scales": [1.0]}, "model": {"sha256": "ab"},
    "vocabulary": {"classes": [{"name": f"c{k}"} for k in range(9)]}, "dataset": {"name": "x"}, "versions": {},
}  # fmt: skip


def seed(identifier: str, classes: int = 2, height: int = 3, width: int = 4, start: int = 0) -> Cam:
    rng = np.random.default_rng([start, len(identifier), *identifier.encode()])
    cam = rng.random((classes, height, width)).astype(np.float16).astype(np.float32)
    ids = rng.permutation(9)[:classes].astype(np.int32)
    return Cam(identifier, ids, cam, (height * 16 - 5, width * 16))


def same(a: Cam, b: Cam) -> bool:
    return (
        (a.id, a.size) == (b.id, b.size)
        and a.classes.tolist() == b.classes.tolist()
        and a.maps.shape == b.maps.shape
        and bool((a.maps == b.maps).all())
    )


def store(path: Path, records: list[Cam], **options: Any) -> None:
    ids = [record.id for record in records]
    with CamWriter(
        path, options.pop("manifest", MANIFEST), "float16", options.pop("unit_size", 3), **options
    ) as writer:
        for unit in writer.units(samples(ids)):
            writer.write(unit, [record for record in records if record.id in unit.ids])
        writer.finish(ids)


RECORDS = [seed("a"), seed("b/c", 0), seed("d", 3, 1, 1), seed("é日", 1, 5, 2), seed("x" * 300, 1), seed("f", 9, 2, 2)]


@pytest.mark.parametrize("out", ["cams.h5", "cams.hdf5", "shards"])
def test_round_trip(out: str, tmp_path: Path) -> None:
    store(tmp_path / out, RECORDS)
    with clipseed.open_cams(tmp_path / out) as seeds:
        assert list(seeds) == [record.id for record in RECORDS]
        assert all(same(seeds[record.id], record) for record in RECORDS)
        assert seeds.manifest == MANIFEST
        assert seeds.class_names[2] == "c2"
        assert "nothing" not in seeds
        with pytest.raises(KeyError):
            seeds["nothing"]
    assert not (tmp_path / f"{out}.parts").exists()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(1, 5), st.text("abc/é", min_size=1, max_size=9)),
        max_size=12, unique_by=lambda row: row[3],
    ),
    unit_size=st.integers(1, 5),
    dtype=st.sampled_from(["float16", "float32"]),
)  # fmt: skip
def test_any_ragged_content(
    rows: list[tuple[int, int, int, str]], unit_size: int, dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    records = [seed(key, classes, height, width) for classes, height, width, key in rows]
    path = tmp_path_factory.mktemp("store") / "cams.h5"
    ids = [record.id for record in records]
    with CamWriter(path, MANIFEST, dtype, unit_size) as writer:
        for unit in writer.units(samples(ids)):
            writer.write(unit, [record for record in records if record.id in unit.ids])
        writer.finish(ids)
    with open_cams(path) as seeds:
        assert list(seeds) == ids
        assert all(same(seeds[record.id], record) for record in records)


def test_large_output_is_merged_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipseed.store.record_file._BLOCK", 7)
    records = [seed(f"{k:03d}", k % 4) for k in range(50)]
    store(tmp_path / "cams.h5", records)
    with open_cams(tmp_path / "cams.h5") as seeds:
        assert all(same(seeds[record.id], record) for record in records)


def test_upsampled_is_bilinear_with_half_pixel_centres() -> None:
    import torch

    record = seed("a", 2, 3, 4)
    expected = torch.nn.functional.interpolate(torch.from_numpy(record.maps)[None], record.size, mode="bilinear")[0]
    assert record.upsampled().shape == (2, *record.size)
    np.testing.assert_allclose(record.upsampled(), expected.numpy(), atol=1e-6)
    assert seed("a", 0).upsampled().shape == (0, 43, 64)


def test_identical_whatever_the_units_and_interruptions(tmp_path: Path) -> None:
    """The portable file's bytes depend on content and order alone."""
    store(tmp_path / "a.h5", RECORDS, unit_size=2)
    store(tmp_path / "b.h5", RECORDS, unit_size=5)
    ids = [record.id for record in RECORDS]
    with CamWriter(tmp_path / "c.h5", MANIFEST, "float16", 2) as writer:
        writer.write(Unit(0), RECORDS[:2])  # and then the process dies
    with CamWriter(tmp_path / "c.h5", MANIFEST, "float16", 99) as writer:
        assert writer.done == frozenset(ids[:2])
        assert [unit.index for unit in writer.units(samples(ids))] == [1, 2]  # the unit size of the first run is kept
        writer.write(Unit(1), RECORDS[2:4])
        writer.write(Unit(2), RECORDS[4:])
        writer.finish(ids)
    contents = {name: (tmp_path / name).read_bytes() for name in ("a.h5", "b.h5", "c.h5")}
    assert contents["a.h5"] == contents["b.h5"] == contents["c.h5"]


def test_a_finished_file_can_grow(tmp_path: Path) -> None:
    store(tmp_path / "cams.h5", RECORDS[:4])
    store(tmp_path / "cams.h5", RECORDS)
    store(tmp_path / "all.h5", RECORDS)
    assert (tmp_path / "cams.h5").read_bytes() == (tmp_path / "all.h5").read_bytes()
    store(tmp_path / "cams.h5", RECORDS[:2])  # a shorter list asks for nothing new and takes nothing away
    assert len(open_cams(tmp_path / "cams.h5")) == len(RECORDS)


def test_skipped_images_are_filled_in_later(tmp_path: Path) -> None:
    ids = [record.id for record in RECORDS]
    with CamWriter(tmp_path / "out", MANIFEST, "float16", 3) as writer:
        writer.write(Unit(0), [RECORDS[0], RECORDS[2]])
        writer.write(Unit(1), RECORDS[3:])
    with CamWriter(tmp_path / "out", MANIFEST, "float16", 3) as writer:
        (unit,) = writer.units(samples(ids))
        assert (unit.index, unit.ids) == (0, ("b/c",))
        writer.write(Unit(0), [RECORDS[1]])
    assert sorted(path.name for path in (tmp_path / "out").glob("*.h5")) == [
        "unit-000000-1.h5", "unit-000000.h5", "unit-000001.h5",
    ]  # fmt: skip
    assert len(open_cams(tmp_path / "out")) == len(RECORDS)


def test_a_refused_run_changes_nothing(tmp_path: Path) -> None:
    """A finished file and a command with other settings: the first command must still be able to go on."""
    store(tmp_path / "cams.h5", RECORDS[:2])
    other = {**MANIFEST, "options": {"scales": [1.0, 2.0]}}
    with pytest.raises(StoreError, match="made with other settings"):
        CamWriter(tmp_path / "cams.h5", other, "float16", 3).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["cams.h5"]
    store(tmp_path / "cams.h5", RECORDS)
    assert len(open_cams(tmp_path / "cams.h5")) == len(RECORDS)


def test_folders_of_other_things_are_no_output(tmp_path: Path) -> None:
    photos, masks = tmp_path / "photos", tmp_path / "pseudo"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"")
    masks.mkdir()
    (masks / "manifest.json").write_text(json.dumps(MANIFEST))
    for folder in (photos, masks):
        with pytest.raises(UsageError, match="a folder that holds other things"):
            CamWriter(folder, MANIFEST, "float16", 3)
        assert len(list(folder.iterdir())) == 1
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "lock").touch()  # a run that was killed at once
    store(tmp_path / "locked", RECORDS)


@pytest.mark.parametrize("out", ["cams.h5", "shards"])
def test_other_settings_are_refused_with_their_differences(out: str, tmp_path: Path) -> None:
    store(tmp_path / out, RECORDS)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.h5")}
    other = {**MANIFEST, "options": {"scales": [1.0, 2.0]}, "model": {"sha256": "cd"}}
    with pytest.raises(StoreError, match=r"(?s)other settings.*--scales 1 then, 1,2 now.*sha256"):
        store(tmp_path / out, RECORDS, manifest=other)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.h5")}
    store(tmp_path / out, RECORDS[:1], manifest=other, overwrite=True)
    assert len(open_cams(tmp_path / out)) == 1
    assert open_cams(tmp_path / out).manifest == other


def test_versions_may_differ() -> None:
    assert differences(MANIFEST, {**MANIFEST, "versions": {"torch": "9"}}) == []
    assert differences(MANIFEST, {**MANIFEST, "method": "n"}) == ["--method m then, n now"]


def test_every_flipped_byte_is_found_or_harmless(tmp_path: Path) -> None:
    """Flip bytes all over a file: opening it either fails with our error or gives the same content."""
    path = tmp_path / "cams.h5"
    store(path, RECORDS)
    original = path.read_bytes()
    detected = 0
    rng = np.random.default_rng(0)
    for position in sorted(rng.choice(len(original), 400, replace=False)):
        content = bytearray(original)
        content[position] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(bytes(content))
        try:
            with open_cams(path) as seeds:
                assert list(seeds) == [record.id for record in RECORDS], position
                assert all(same(seeds[record.id], record) for record in RECORDS), position
        except StoreError as error:
            detected += 1
            assert str(path) in str(error)
    assert detected > 40


def test_flipped_data_is_found_even_without_the_whole_file_check(tmp_path: Path) -> None:
    path = tmp_path / "cams.h5"
    record = seed("a", 3, 40, 40)
    store(path, [record])
    content = bytearray(path.read_bytes())
    start = bytes(content).find(record.maps.astype(np.float16).tobytes()[:64])
    content[start + 20] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(StoreError, match="damaged"):
        open_cams(path, verify=True)
    with (
        open_cams(path, verify=False) as seeds,
        pytest.raises(StoreError, match="of 'a' cannot be read back"),
    ):
        seeds["a"]


def test_a_damaged_shard_is_computed_again(tmp_path: Path) -> None:
    ids = [record.id for record in RECORDS]
    with CamWriter(tmp_path / "cams.h5", MANIFEST, "float16", 3) as writer:
        writer.write(Unit(0), RECORDS[:3])
        writer.write(Unit(1), RECORDS[3:])
    shard = tmp_path / "cams.h5.parts" / "unit-000001.h5"
    shard.write_bytes(shard.read_bytes()[:900])
    with CamWriter(tmp_path / "cams.h5", MANIFEST, "float16", 3) as writer:
        assert "computed again" in writer.notes[0]
        assert [unit.index for unit in writer.units(samples(ids))] == [1]


def test_not_a_seeds_file(tmp_path: Path) -> None:
    cases = {"text.h5": b"hello", "empty.h5": b""}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StoreError, match=f"{name}: not a readable HDF5 file"):
            open_cams(tmp_path / name)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(StoreError, match="not a clipseed CAM file"):
        open_cams(tmp_path / "other.h5")
    with pytest.raises(StoreError, match="no such file"):
        open_cams(tmp_path / "missing.h5")
    with pytest.raises(StoreError, match=r"no CAMs in this folder"):
        open_cams(tmp_path)
    store(tmp_path / "cams.h5", RECORDS)
    with h5py.File(tmp_path / "cams.h5", "r+") as file:
        file.attrs["version"] = 99
    with pytest.raises(StoreError, match="version 99"):
        open_cams(tmp_path / "cams.h5")


def test_inconsistent_offsets_are_refused(tmp_path: Path) -> None:
    for name, change in (("cam_offset", 10**9), ("class_offset", -1), ("grid", 0)):
        path = tmp_path / f"{name}.h5"
        store(path, RECORDS)
        with h5py.File(path, "r+") as file:
            file[name][1] = change
        with pytest.raises(StoreError, match="offsets do not fit"):
            open_cams(path, verify=False)


def test_unfinished_output_says_so(tmp_path: Path) -> None:
    with CamWriter(tmp_path / "cams.h5", MANIFEST, "float16", 3) as writer:
        writer.write(Unit(0), RECORDS[:3])
    with pytest.raises(StoreError, match="not finished yet"):
        open_cams(tmp_path / "cams.h5")
    assert len(open_cams(tmp_path / "cams.h5.parts")) == 3


def test_two_runs_on_one_output(tmp_path: Path) -> None:
    with (
        CamWriter(tmp_path / "cams.h5", MANIFEST, "float16", 3),
        pytest.raises(StoreError, match="another run is writing it"),
    ):
        CamWriter(tmp_path / "cams.h5", MANIFEST, "float16", 3).__enter__()
    CamWriter(tmp_path / "cams.h5", MANIFEST, "float16", 3).__enter__().__exit__(None, None, None)


def test_leftovers_of_a_killed_run_disappear(tmp_path: Path) -> None:
    parts = tmp_path / "cams.h5.parts"
    parts.mkdir()
    (parts / ".tmp-123-unit-000000.h5").write_bytes(b"half a unit")
    beside = [tmp_path / f".tmp-123-cams.{what}" for what in ("h5", "skipped.csv", "empty.csv")]
    others = tmp_path / ".tmp-123-other.empty.csv"
    for path in (*beside, others):
        path.write_text("half")
    with CamWriter(tmp_path / "cams.h5", MANIFEST, "float16", 3) as writer:
        assert writer.done == frozenset()
    assert not list(parts.glob(".tmp-*"))
    assert [path for path in tmp_path.glob(".tmp-*") if path.is_file()] == [others]


def test_impossible_outputs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file; give NAME.h5"):
        CamWriter(tmp_path / "file", MANIFEST, "float16", 3)
    (tmp_path / "folder.h5").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        CamWriter(tmp_path / "folder.h5", MANIFEST, "float16", 3)
    with pytest.raises(StoreError, match=f"the folder {tmp_path}/nowhere does not exist"):
        CamWriter(tmp_path / "nowhere" / "cams.h5", MANIFEST, "float16", 3).__enter__()
    with pytest.raises(StoreError, match=r"may not be written here|cannot be written"):
        CamWriter(Path("/sys/cams.h5"), MANIFEST, "float16", 3).__enter__()


def test_failed_writes_leave_nothing(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "the disk is full; free some space and run the same command again"),
        (OSError("Unable to write (errno = 28, error message = 'No space left')"), "the disk is full"),
        (OSError(30, "Read-only file system"), "may not be written here"),
        (OSError(36, "File name too long"), "file name is too long"),
        (OSError(5, "Input/output error"), "cannot be written"),
    ],
)
def test_system_errors_in_plain_words(error: OSError, message: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=message), storage_errors(tmp_path / "x"):
        raise error


def test_full_disk(tmp_path: Path) -> None:
    """A real file system of 200 kB fills up: our error, nothing half-written, and it goes on after."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", mount], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {done.stderr.decode().strip()}")
    try:
        records = [seed(f"{k}", 4, 60, 60) for k in range(12)]
        ids = [record.id for record in records]
        with (
            CamWriter(mount / "cams.h5", MANIFEST, "float16", 2) as writer,
            pytest.raises(StoreError, match="the disk is full"),
        ):
            for unit in writer.units(samples(ids)):
                writer.write(unit, [record for record in records if record.id in unit.ids])
        stored = len(writer.done)
        assert 0 < stored < 12
        with (
            CamWriter(mount / "cams.h5", MANIFEST, "float16", 2) as writer,
            pytest.raises(StoreError, match="is full"),
        ):
            writer.finish(ids)  # the shards fit, the portable file does not fit beside them
        assert not list(mount.rglob(".tmp-*"))
        with CamWriter(mount / "cams.h5", MANIFEST, "float16", 2) as writer:
            assert len(writer.done) == stored
    finally:
        subprocess.run(["umount", mount], check=True)


def _read_everything(path: Path, seeds: CamSet | None) -> int:
    source = seeds if seeds is not None else open_cams(path)
    return sum(int((source[key].maps > 0.5).sum()) for key in source)


def test_forked_readers(tmp_path: Path) -> None:
    """Eight processes forked from one that has the file open read it all at once."""
    path = tmp_path / "cams.h5"
    store(path, [seed(f"{k}", 3, 20, 20) for k in range(60)])
    with open_cams(path) as seeds:
        expected = _read_everything(path, seeds)
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()

        def child() -> None:
            results.put(_read_everything(path, seeds))

        children = [context.Process(target=child) for _ in range(8)]
        for process in children:
            process.start()
        assert [results.get() for _ in children] == [expected] * 8
        for process in children:
            process.join()
            assert process.exitcode == 0


def test_the_file_can_be_read_without_clipseed(tmp_path: Path) -> None:
    """The ten lines in docs/formats.md."""
    store(tmp_path / "cams.h5", RECORDS)
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert 5 <= len(code.strip().splitlines()) <= 10
    script = tmp_path / "read.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(RECORDS)
    for line, record in zip(lines, RECORDS, strict=True):
        identifier, size, names, shape = line.split("\t")
        assert identifier == record.id
        assert size == f"{record.size[0]}x{record.size[1]}"
        assert names.split() == [f"c{k}" for k in record.classes]
        assert shape == str(record.maps.shape)


def test_same_records_same_bytes(tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5"):
        write_unit(tmp_path / name, json.dumps(MANIFEST), RECORDS, cam_format("float32"))
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    with CamFile(tmp_path / "a.h5", verify=True) as file:
        assert file.cam_dtype == "float32"
        assert len(list(file)) == len(RECORDS)


# Masks ----------------------------------------------------------------------------------------------------------------


def test_masks(tmp_path: Path) -> None:
    from PIL import Image

    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write_label_mask(tmp_path / "a.png", labels)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
        colours = image.convert("RGB")
    np.testing.assert_array_equal(read_label_mask(tmp_path / "a.png"), labels)
    assert voc_palette()[[0, 1, 2, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip
    colours.save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(read_label_mask(tmp_path / "rgb.png"), labels)
    Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "wide.png")
    np.testing.assert_array_equal(read_label_mask(tmp_path / "wide.png"), labels)
    Image.fromarray(labels > 100).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_label_mask(tmp_path / "bits.png"), (labels > 100).astype(np.uint8))


def test_masks_that_are_none(tmp_path: Path) -> None:
    from PIL import Image

    from clipseed.errors import InputError

    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "photo.png")
    with pytest.raises(InputError, match=r"photo.png: colour \(1, 2, 3\) at row 0, column 0 is not in the VOC colour"):
        read_label_mask(tmp_path / "photo.png")
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / "wide.png")
    with pytest.raises(InputError, match="label 300 does not fit"):
        read_label_mask(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("x")
    for name, message in (("text.png", "not an image"), ("missing.png", "no such mask")):
        with pytest.raises(InputError, match=message):
            read_label_mask(tmp_path / name)
    write_label_mask(tmp_path / "cut.png", np.zeros((99, 99), np.uint8))
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) - 40])
    with pytest.raises(InputError, match="damaged mask"):
        read_label_mask(tmp_path / "cut.png")


def test_process_id_is_in_temporary_names(tmp_path: Path) -> None:
    with replacing(tmp_path / "x") as temporary:
        assert str(os.getpid()) in temporary.name
        temporary.write_text("x")
