"""``clipseed sam-masks``: what the cache holds, bad images and models, imports, prompts, resuming, damage."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from segment_anything import SamPredictor

from clipseed.cli.main import main
from clipseed.errors import StoreError
from clipseed.formats.open import open_segments
from clipseed.formats.rle import compress, expand, runs_of
from clipseed.jobs import sam_masks
from clipseed.jobs.inspect import SegmentInspection, inspect_output, write_preview
from clipseed.pseudo.cam_prompts import box_prompts, point_prompts
from clipseed.sam.architecture import save_sam
from clipseed.sam.backend import as_pixels
from clipseed.sam.generator import generate
from clipseed.sam.options import FMA, STOCK
from clipseed.segments import COLUMNS, SegmentColumns, Segments, from_masks, joined_columns
from clipseed.store.cam_records import Cam
from clipseed.store.segment_records import SegmentRecord, pack_segments, segment_format, unpack_segments
from clipseed.store.segments import SegmentSet
from clipseed.store.units import Unit
from clipseed.store.writer import RecordWriter

from helpers.images import photo
from helpers.records import bump, small_manifest, write_seeds
from helpers.sam import SWAY, backend_of, blob_sam, tiny_sam, tiny_sam_config
from helpers.samples import samples

FACTORY = ("--sam-factory", "helpers.sam:blobs", "--device", "cpu")
FEW = ("--preset", "stock", "--points-per-side", "3")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of all kinds: colour, grey, transparent, very thin, a single pixel."""
    folder = tmp_path / "photos"
    folder.mkdir()
    photo(0, 48, 64).save(folder / "a.png")
    photo(1, 70, 50).convert("L").save(folder / "b.png")
    transparent = photo(2, 40, 40).convert("RGBA")
    transparent.putalpha(photo(3, 40, 40).convert("L"))
    transparent.save(folder / "c.png")
    photo(4, 4, 400).save(folder / "d.png")
    photo(5, 1, 1).save(folder / "e.png")
    return folder


def masks_of(*words: object) -> int:
    return main(["sam-masks", *map(str, words)])


# The cache itself -----------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 300), st.sampled_from([0.0, 0.02, 0.5, 1.0]))
def test_codes_are_those_of_pycocotools(seed: int, height: int, width: int, share: float) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    mask = np.random.default_rng(seed).random((height, width)) < share
    code = compress(mask)
    assert code == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    np.testing.assert_array_equal(expand(code, (height, width), "here"), mask)
    assert runs_of(mask).sum() == mask.size


def random_record(identifier: str, seed: int, count: int) -> SegmentRecord:
    rng = np.random.default_rng(seed)
    bare = from_masks(rng.random((count, 9, 14)) < 0.4)
    proposals = replace(
        bare,
        level=rng.integers(0, 3, count).astype(np.int8),
        iou=rng.random(count).astype(np.float32),
        point=np.where(rng.random((count, 1)) < 0.5, np.nan, rng.random((count, 2)) * 9).astype(np.float32),
    )
    return pack_segments(identifier, (90, 140), proposals, rng.integers(-1, 20, count).tolist())


def same(one: SegmentRecord, other: SegmentRecord) -> bool:
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)


MANIFEST = {"kind": "sam-masks", "options": {}, "source": {}, "model": {}, "vocabulary": {}, "dataset": {}}


@pytest.mark.parametrize("counts", [(3, 0, 5, 1, 0), (0, 0, 0)])
def test_records_come_back(counts: tuple[int, ...], tmp_path: Path) -> None:
    records = [random_record(f"p/{k}", k, count) for k, count in enumerate(counts)]
    ids = [record.id for record in records]
    with RecordWriter(tmp_path / "segments.h5", MANIFEST, segment_format(), 2) as writer:
        for unit in writer.units(samples(ids)):
            writer.write(unit, [record for record in records if record.id in unit.ids])
        writer.finish(ids)
    with SegmentSet(tmp_path / "segments.h5", verify=True) as cache:
        assert list(cache) == ids
        assert [len(cache[key]) for key in ids] == list(counts)
        assert all(same(cache[record.id], record) for record in records)
    before = unpack_segments(records[0])
    np.testing.assert_array_equal(before.masks, records[0].masks())
    np.testing.assert_array_equal(np.isnan(before.point), records[0].point < 0)


def reader(path: Path) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Level and mask of everything in a cache, with h5py and pycocotools alone."""
    from pycocotools import mask as coco

    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    with h5py.File(path) as f:
        for i, id in enumerate(f["id"][:]):
            (h, w), (first, last), start = f["grid"][i], f["mask_offset"][i : i + 2], f["rle_offset"][i]
            found[id.decode()] = []
            for s in range(first, last):
                code = f["rle"][start : start + f["rle_length"][s]].tobytes()
                mask = coco.decode({"size": [int(h), int(w)], "counts": code}).astype(bool)
                found[id.decode()].append((int(f["level"][s]), mask))
                start += f["rle_length"][s]
    return found


# Masks of a model -----------------------------------------------------------------------------------------------------


def test_masks_are_the_generators(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every number of every mask, for grey, transparent and thin images too; without labels or classes."""
    out = tmp_path / "segments.h5"
    assert masks_of("--dataset", "folder", "--images", photos, "--out", out, *FACTORY, *FEW) == 0
    said = capsys.readouterr().err
    bare, cache = reader(out), SegmentSet(out, verify=True)
    assert list(cache) == ["a", "b", "c", "d", "e"]
    options = replace(STOCK, points_per_side=3)
    total = 0
    for key, record in cache.items():
        pixels = as_pixels(np.asarray(Image.open(photos / f"{key}.png")))
        wanted = generate(backend_of(blob_sam(sway=SWAY)), pixels, options)
        found = unpack_segments(record)
        assert record.size == record.grid == pixels.shape[:2]
        for name in vars(wanted):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=f"{key} {name}")
        assert [level for level, _ in bare[key]] == wanted.level.tolist()
        assert all(np.array_equal(mask, want) for (_, mask), want in zip(bare[key], wanted.masks, strict=True))
        assert (record.class_id == -1).all()
        total += len(wanted)
    assert total > 20
    assert f"{total} masks, {total / 5:.1f} per image" in said
    assert re.search(r"mostly (reading images|computing|writing) \(cpu\)", said)
    manifest = cache.manifest
    assert manifest["method"] == "grid"
    assert manifest["options"]["points_per_side"] == 3
    assert manifest["dataset"]["images"] == str(photos)


def test_long_images_are_shrunk(photos: Path, tmp_path: Path) -> None:
    words = ("--dataset", "folder", "--images", photos, *FACTORY, *FEW)
    assert masks_of(*words, "--out", tmp_path / "small.h5", "--max-side", 32) == 0
    cache = SegmentSet(tmp_path / "small.h5")
    sizes = {key: (record.size, record.grid) for key, record in cache.items()}
    assert sizes["a"] == ((48, 64), (24, 32))
    assert sizes["b"] == ((70, 50), (32, 23))
    assert sizes["d"] == ((4, 400), (1, 32))
    assert sizes["e"] == ((1, 1), (1, 1))
    assert masks_of(*words, "--out", tmp_path / "native.h5", "--max-side", 0) == 0
    assert all(record.size == record.grid for record in SegmentSet(tmp_path / "native.h5").values())


def test_checkpoints_and_presets(photos: Path, tmp_path: Path) -> None:
    """A small SAM as arrays: its digest is recorded, its settings are the preset's."""
    save_sam(tmp_path / "tiny.npz", tiny_sam(), tiny_sam_config())
    words = ["--dataset", "folder", "--images", photos, "--checkpoint", tmp_path / "tiny.npz", "--device", "cpu"]
    words += ["--points-per-side", 2, "--iou-threshold", -10, "--stability-threshold", -1, "--points-per-batch", 3]
    assert masks_of(*words, "--out", tmp_path / "segments.h5") == 0
    manifest = SegmentSet(tmp_path / "segments.h5").manifest
    import hashlib

    assert manifest["model"]["sha256"] == hashlib.sha256((tmp_path / "tiny.npz").read_bytes()).hexdigest()
    expected = replace(FMA, points_per_side=2, pred_iou_threshold=-10, stability_threshold=-1).manifest()
    assert {**manifest["options"], "exif": None} == {**json.loads(json.dumps(expected)), "max_side": 1024, "exif": None}


def test_what_cannot_be_segmented_is_skipped(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    Image.new("RGB", (30, 30)).save(photos / "night.png")
    out, report = tmp_path / "segments.h5", tmp_path / "run.json"
    words = ("--dataset", "folder", "--images", photos, "--out", out, "--device", "cpu", *FEW, "--report", report)
    assert masks_of(*words, "--sam-factory", "helpers.sam:moody") == 3
    assert "2 images skipped" in capsys.readouterr().err
    listed = (tmp_path / "segments.skipped.csv").read_text()
    assert "night,SAM failed on it (ValueError: too dark to see)" in listed
    assert "broken," in listed
    assert set(SegmentSet(out)) == {"a", "b", "c", "d", "e"}
    told = json.loads(report.read_text())
    assert (told["computed"], len(told["skipped"]), told["masks"] > 0) == (5, 2, True)


def test_no_mask_at_all(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image without masks is done, and is not asked about again."""
    words = ("--dataset", "folder", "--images", photos, "--out", tmp_path / "segments.h5", *FACTORY, *FEW)
    assert masks_of(*words, "--iou-threshold", 2) == 0
    assert "0 masks, 0.0 per image, 0 bytes each, 5 images without any" in capsys.readouterr().err
    with SegmentSet(tmp_path / "segments.h5", verify=True) as cache:
        assert [(len(record), record.grid) for record in cache.values()][:2] == [(0, (48, 64)), (0, (70, 50))]
    content = (tmp_path / "segments.h5").read_bytes()
    assert masks_of(*words, "--iou-threshold", 2) == 0
    assert "sam-masks: 0 images to do, 5 done already" in capsys.readouterr().err
    assert (tmp_path / "segments.h5").read_bytes() == content


def test_out_of_memory_halves_the_points(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--dataset", "folder", "--images", photos, "--device", "cpu", *FEW)
    assert masks_of(*words, "--out", tmp_path / "a.h5", "--sam-factory", "helpers.sam:cramped") == 0
    assert "went on with fewer points at once (--points-per-batch)" in capsys.readouterr().err
    assert masks_of(*words, "--out", tmp_path / "b.h5", *FACTORY) == 0
    one, other = SegmentSet(tmp_path / "a.h5"), SegmentSet(tmp_path / "b.h5")
    assert all(np.array_equal(one[key].rle, other[key].rle) for key in other)


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["--dataset", "folder", "--images", "photos"], 2,
         "--checkpoint FILE: name SAM's weights. Meta's are sam_vit_b_01ec64.pth"),
        (["--dataset", "folder", "--images", "photos", "--checkpoint", "sam_vit_h_4b8939.pth"], 1,
         "--checkpoint sam_vit_h_4b8939.pth: no such file. Meta's are sam_vit_b_01ec64.pth"),
        (["--dataset", "folder", "--images", "photos", "--checkpoint", "tiny.npz", "--model", "vit_h"], 1,
         "a custom checkpoint, but vit_h is asked for"),
        (["--dataset", "folder", "--images", "photos", "--checkpoint", "clip.npz"], 1, "a CLIP checkpoint, not a SAM"),
        (["--dataset", "folder", "--images", "photos", "--checkpoint", "photos/a.png"], 1, "photos/a.png"),
        (["--dataset", "folder", "--images", "photos", "--model", "vit_g"], 2, "Invalid value for '--model'"),
        (["--dataset", "folder", "--images", "photos", "--prompt", "points"], 2, "--prompt points needs --seeds"),
        (["--dataset", "folder", "--images", "photos", "--seeds", "cams.h5"], 2, "from --dataset or from --seeds"),
        (["--dataset", "folder"], 2, "needs --images DIR"),
        (["--dataset", "voc", "--images", "photos"], 2, "--images does not belong to --dataset voc"),
        (["--dataset", "imagenet"], 2, "Invalid value for '--dataset'"),
        (["--dataset", "folder", "--images", "nowhere"], 1, "no such image folder"),
        ([], 2, "nothing to segment"),
        (["--seeds", "cams.h5"], 1, "cams.h5: no such file"),
        (["--seeds", "cams.h5", "--split", "val"], 2, "--split belongs to --dataset"),
        (["--dataset", "toy", "--preset", "heavy"], 2, "Invalid value for '--preset'"),
        (["--dataset", "toy", "--iou-threshold", "nan"], 2, "--iou-threshold nan: give a number"),
        (["--dataset", "toy", "--prompt", "lines"], 2, "Invalid value for '--prompt'"),
        (["--dataset", "toy", "--batch-size", "4"], 2, "see --points-per-batch"),
        (["--dataset", "toy", "--points-per-side", "0"], 2, "--points-per-side"),
        (["--dataset", "toy", "--crop-layers", "9"], 2, "crop layer 9 would have no points"),
        (["--dataset", "toy", "--import", "photos", "--checkpoint", "tiny.npz"], 2, "--import takes masks as they are"),
        (["--dataset", "toy", "--import", "nowhere"], 1, "nowhere: no such file or folder of masks"),
        (["--dataset", "toy", "--import", "photos", "--import-kind", "gif"], 2, "Invalid value for '--import-kind'"),
        (["--dataset", "toy", "--sam-factory", "nothing:there"], 2, "--sam-factory nothing:there"),
        (["--dataset", "toy", "--engine", "dask"], 2, "Invalid value for '--engine'"),
    ],
)  # fmt: skip
def test_complaints(
    words: list[str], code: int, complaint: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    save_sam(tmp_path / "tiny.npz", tiny_sam(), tiny_sam_config())
    np.savez(tmp_path / "clip.npz", **{"visual.proj": np.zeros((2, 2)), "logit_scale": np.zeros(1)})
    assert masks_of(*words, "--device", "cpu") == code
    # Typer draws its own complaints into a box, words broken to its width.
    assert complaint in " ".join(capsys.readouterr().err.replace("│", "").split())
    assert not (tmp_path / "segments.h5").exists()


def test_other_settings_are_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--dataset", "folder", "--images", photos, "--out", tmp_path / "segments.h5", *FACTORY)
    assert masks_of(*words, *FEW, "--points-per-batch", 2) == 0
    assert masks_of(*words, *FEW, "--points-per-batch", 5) == 0  # speed only
    assert masks_of(*words, "--preset", "stock", "--points-per-side", 4) == 1
    assert "--points-per-side 3 then, 4 now" in capsys.readouterr().err
    assert masks_of(*words, "--preset", "stock", "--points-per-side", 4, "--overwrite") == 0


def test_shares_and_merging(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any cut gives the bytes of one run; caches of several machines are put together."""
    monkeypatch.setitem(sam_masks._UNIT_SIZE, "cpu", 2)
    words = ("--dataset", "folder", "--images", photos, *FACTORY, *FEW)
    assert masks_of(*words, "--out", tmp_path / "whole.h5") == 0
    for k in (2, 1):
        assert masks_of(*words, "--out", tmp_path / "cut.h5", "--shard", f"{k}/2") == 0
        assert masks_of(*words, "--out", tmp_path / f"part-{k}.h5", "--shard", f"{k}/2") == 0
        assert main(["merge", str(tmp_path / f"part-{k}.h5")]) == 0
    assert (tmp_path / "cut.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    parts = [str(tmp_path / name) for name in ("part-1.h5", "part-2.h5", "whole.h5")]
    assert main(["merge", *parts, "--out", str(tmp_path / "merged.h5")]) == 0
    whole, merged = SegmentSet(tmp_path / "whole.h5"), SegmentSet(tmp_path / "merged.h5", verify=True)
    assert set(whole) == set(merged)
    assert all(same(whole[key], merged[key]) for key in whole)


def test_merging_imported_masks_twice(photos: Path, tmp_path: Path) -> None:
    """They have no prompts, and what stands for that must equal itself."""
    folder = instance_maps(tmp_path, photos)
    assert masks_of("--dataset", "folder", "--images", photos, "--import", folder, "--out", tmp_path / "a.h5") == 0
    words = [str(tmp_path / "a.h5"), str(tmp_path / "a.h5"), "--out", str(tmp_path / "b.h5")]
    (tmp_path / "copy.h5").write_bytes((tmp_path / "a.h5").read_bytes())
    assert main(["merge", words[0], str(tmp_path / "copy.h5"), *words[2:]]) == 0
    assert len(SegmentSet(tmp_path / "b.h5")) == 5


# Masks that exist already ---------------------------------------------------------------------------------------------


def instance_maps(folder: Path, photos: Path, regions: int = 6) -> Path:
    out = folder / "maps"
    out.mkdir()
    for number, path in enumerate(sorted(photos.glob("*.png"))):
        width, height = Image.open(path).size
        values = np.random.default_rng(number).integers(0, regions, (height, width)).astype(np.uint16)
        Image.fromarray(values).save(out / path.name)
    return out


def test_import(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hundreds of masks, wrong sizes, missing and damaged files."""
    folder = instance_maps(tmp_path, photos, regions=400)
    Image.fromarray(np.zeros((5, 5), np.uint16)).save(folder / "b.png")
    (folder / "c.png").write_bytes(b"junk")
    (folder / "d.png").unlink()
    words = ("--dataset", "folder", "--images", photos, "--import", folder, "--out", tmp_path / "segments.h5")
    assert masks_of(*words, "--import-kind", "instance-maps") == 3
    listed = (tmp_path / "segments.skipped.csv").read_text()
    assert "masks of 5x5 pixels for an image of 50x70" in listed
    assert "c.png: not a PNG" in listed
    assert "d.png: no such mask file" in listed
    cache = SegmentSet(tmp_path / "segments.h5")
    assert set(cache) == {"a", "e"}
    wanted = open_segments(folder, "instance-maps").read("a", (48, 64))
    assert len(wanted) > 390
    np.testing.assert_array_equal(cache["a"].masks(), wanted.masks)
    assert (cache["a"].point == -1).all()
    source = cache.manifest["source"]
    assert (source["masks"], source["format"], len(source["content"])) == (str(folder), "instance-maps", 64)
    assert cache.manifest["model"] == {}
    assert "(no model)" in capsys.readouterr().err


# Prompts --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompted(photos: Path, tmp_path: Path) -> Path:
    """Maps of three images: two classes, none, and one class whose map is empty beside one that is not."""
    seeds = [
        Cam("a", np.array([7, 2], np.int32), np.stack([bump((6, 8), 1, 1), bump((6, 8), 4, 6)]), (48, 64)),
        Cam("b", np.array([], np.int32), np.zeros((0, 5, 4), np.float32), (70, 50)),
        Cam("c", np.array([0, 19], np.int32), np.stack([np.zeros((5, 5), np.float32), bump((5, 5), 2, 2)]),
                (40, 40)),
    ]  # fmt: skip
    return write_seeds(tmp_path / "cams.h5", seeds, small_manifest(photos))


@pytest.mark.parametrize("kind", ["points", "boxes"])
def test_prompts_equal_the_packages_predictor(kind: str, prompted: Path, photos: Path, tmp_path: Path) -> None:
    save_sam(tmp_path / "tiny.npz", tiny_sam(seed=3), tiny_sam_config())
    from clipseed.sam.architecture import load_sam

    out = tmp_path / "segments.h5"
    words = ("--seeds", prompted, "--prompt", kind, "--checkpoint", tmp_path / "tiny.npz", "--device", "cpu")
    assert masks_of(*words, "--min-area", 0, "--out", out) == 0
    cache = SegmentSet(out, verify=True)
    assert [len(cache[key]) > 0 for key in ("a", "b", "c")] == [True, False, True]
    assert set(cache["c"].class_id.tolist()) == {19}
    predictor = SamPredictor(load_sam(tmp_path / "tiny.npz"))
    pixels = np.asarray(Image.open(photos / "a.png").convert("RGB"))
    predictor.set_image(pixels)
    cams = np.stack([bump((6, 8), 1, 1), bump((6, 8), 4, 6)]).astype(np.float16).astype(np.float32)
    wanted, classes = [], []
    asked_points, asked_boxes = point_prompts(cams, (48, 64)), box_prompts(cams, (48, 64))
    for k, row in enumerate(asked_points.row if kind == "points" else asked_boxes.row):
        if kind == "points":
            use = asked_points.labels[k] == 1
            masks, iou, _ = predictor.predict(asked_points.points[k][use], asked_points.labels[k][use])
            best = 2
        else:
            masks, iou, _ = predictor.predict(box=asked_boxes.boxes[k])
            best = int(iou.argmax())
        if masks[best].any():
            wanted.append((masks[best], best, float(iou[best])))
            classes.append([7, 2][row])
    record = cache["a"]
    assert record.class_id.tolist() == classes
    assert record.level.tolist() == [level for _, level, _ in wanted]
    np.testing.assert_allclose(record.iou, [iou for _, _, iou in wanted], atol=1e-5)
    for mask, (theirs, _, _) in zip(record.masks(), wanted, strict=True):
        assert (mask == theirs).mean() > 0.999
    assert cache.manifest["source"]["method"] == "softmax-gradcam"
    assert len(cache.manifest["vocabulary"]["classes"]) == 20


def test_prompts_in_batches(prompted: Path, tmp_path: Path) -> None:
    words = ("--seeds", prompted, "--prompt", "points", *FACTORY)
    for size in (1, 3):
        assert masks_of(*words, "--out", tmp_path / f"{size}.h5", "--batch-size", size) == 0
    one, three = SegmentSet(tmp_path / "1.h5"), SegmentSet(tmp_path / "3.h5")
    assert all(np.array_equal(one[key].rle, three[key].rle) for key in one)


def test_images_that_have_changed(prompted: Path, photos: Path, tmp_path: Path) -> None:
    photo(9, 10, 10).save(photos / "a.png")
    (photos / "c.png").unlink()
    assert masks_of("--seeds", prompted, "--prompt", "boxes", *FACTORY, "--out", tmp_path / "segments.h5") == 3
    listed = (tmp_path / "segments.skipped.csv").read_text()
    assert "the image is 10x10 pixels now, 64x48 when its CAMs were made" in listed
    assert "the image is not there any more" in listed


def test_images_of_seeds(prompted: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --dataset the images are those of cams.h5, wherever they are now."""
    moved = photos.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert masks_of(*FACTORY, *FEW, "--images", moved) == 0
    assert list(SegmentSet(tmp_path / "segments.h5")) == ["a", "b", "c"]


# Damage and interruption ----------------------------------------------------------------------------------------------


@pytest.fixture
def cache_file(tmp_path: Path) -> Path:
    path = tmp_path / "segments.h5"
    records = [random_record(str(k), k, 4) for k in range(3)]
    with RecordWriter(path, MANIFEST, segment_format(), 64) as writer:
        writer.write(Unit(0), records)
        writer.finish([record.id for record in records])
    return path


def test_a_flipped_byte_is_found(cache_file: Path) -> None:
    content = cache_file.read_bytes()
    rng = np.random.default_rng(0)
    unnoticed = []
    with SegmentSet(cache_file) as cache:
        code = cache["1"].rle.tobytes()
    places = [content.index(code) + 3, *rng.integers(0, len(content), 60).tolist()]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        cache_file.write_bytes(damaged)
        try:
            with SegmentSet(cache_file, verify=True) as cache:
                unnoticed += [place] if any(len(record) != 4 for record in cache.values()) else []
        except StoreError as error:
            assert str(cache_file) in str(error)
        else:
            assert place != places[0]
    assert not unnoticed


def forged(path: Path, change: Callable[[h5py.File], None]) -> None:
    from clipseed.store.layout import Checksum

    with h5py.File(path, "r+") as file:
        change(file)
        checksum = Checksum(segment_format().datasets)
        for name in segment_format().datasets:
            checksum.add(name, file[name][:])
        file.attrs["checksum"] = checksum.hexdigest(str(file.attrs["manifest"]))


@pytest.mark.parametrize(
    ("name", "value"),
    [("level", 3), ("level", -1), ("class_id", 254), ("class_id", -2), ("rle_length", 0), ("rle_length", 1 << 20)],
)
def test_impossible_values(name: str, value: int, cache_file: Path) -> None:
    def change(file: h5py.File) -> None:
        file[name][1] = value

    forged(cache_file, change)
    with pytest.raises(StoreError, match="damaged"), SegmentSet(cache_file, verify=True) as cache:
        [record.masks() for record in cache.values()]


def test_codes_that_do_not_fill_the_image(cache_file: Path) -> None:
    def change(file: h5py.File) -> None:
        file["grid"][0] = (9, 15)

    forged(cache_file, change)
    with SegmentSet(cache_file) as cache, pytest.raises(StoreError, match="mask 0 of '0': 'counts' make 126 pixels"):
        cache["0"].masks()


def test_what_is_no_cache(cache_file: Path, prompted: Path, tmp_path: Path) -> None:
    (tmp_path / "half.h5").write_bytes(cache_file.read_bytes()[:900])
    (tmp_path / "later.h5.parts").mkdir()
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("half.h5", "not a readable HDF5 file"), ("cams.h5", "a clipseed-cams file, but not"),
        ("later.h5", "not finished yet"), ("nowhere.h5", "clipseed sam-masks makes one"), ("empty", "no masks in this"),
    ):  # fmt: skip
        with pytest.raises(StoreError, match=message):
            SegmentSet(tmp_path / name)


# Looking at a cache ---------------------------------------------------------------------------------------------------


def test_inspection(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "segments.h5"
    masks_of("--dataset", "folder", "--images", photos, "--out", out, *FACTORY, *FEW, "--max-side", 60)
    found, records = inspect_output(out, verify=True), list(SegmentSet(out).values())
    assert isinstance(found, SegmentInspection)
    counts = [len(record) for record in records]
    assert (found.images, found.masks, found.shrunk) == (5, sum(counts), 3)
    assert found.per_image == (min(counts), float(np.median(counts)), max(counts))
    assert list(found.levels.values()) == [sum(int((r.level == k).sum()) for r in records) for k in range(3)]
    assert found.bytes_per_mask == pytest.approx(sum(len(record.rle) for record in records) / sum(counts))
    capsys.readouterr()
    assert (
        main(["inspect", str(out), "--preview", str(tmp_path / "p.png"), "--count", "2", "--id", "a", "--quiet"]) == 0
    )
    assert f"{sum(counts)}; per image" in capsys.readouterr().out
    with Image.open(tmp_path / "p.png") as sheet:
        assert len(sheet.getcolors(1 << 20) or ()) > 100
    assert write_preview(out, tmp_path / "q.png", count=2) == ["a", "c"]
    assert main(["inspect", str(out), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["masks"] == sum(counts)


def test_the_cache_can_be_read_without_clipseed(photos: Path, tmp_path: Path) -> None:
    """The ten lines in docs/formats.md."""
    out = tmp_path / "segments.h5"
    assert masks_of("--dataset", "folder", "--images", photos, "--out", out, *FACTORY, *FEW) == 0
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    code = text.split("```python\n")[2].split("```")[0]
    (tmp_path / "read.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "read.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    expected = [
        f"{key}\t{level}\t{mask.sum()}"
        for key, masks in reader(tmp_path / "segments.h5").items()
        for level, mask in masks
    ]
    assert done == expected
    assert len(done) > 5


def test_what_need_not_be_imported(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "segments.h5"
    assert masks_of("--dataset", "folder", "--images", photos, "--out", out, *FACTORY, *FEW) == 0
    again = ("--dataset", "folder", "--images", photos, "--out", tmp_path / "again.h5", "--import", out)
    assert masks_of(*again) == 2
    assert f"--import {out}: is a segments file already; use it as it is" in capsys.readouterr().err


def test_the_columns_of_segments_are_those_of_records_and_candidates() -> None:
    names = {item.name for item in fields(SegmentColumns)}
    assert names == set(COLUMNS)
    segments = Segments(masks=np.ones((2, 3, 4), bool), **joined_columns([from_masks(np.ones((2, 3, 4), bool))]))
    assert {name: (values.dtype.str[1:], values.shape[1:]) for name, values in segments.columns().items()} == COLUMNS
    assert {name: values.dtype.str[1:] for name, values in joined_columns([]).items()} == {
        name: kind for name, (kind, _) in COLUMNS.items()
    }


def test_proposals_keep_their_types() -> None:
    record = pack_segments("x", (9, 14), from_masks(np.ones((1, 9, 14), bool)))
    found = unpack_segments(record)
    assert isinstance(found, Segments)
    kinds = {name: str(value.dtype) for name, value in vars(found).items()}
    assert kinds == {
        "masks": "bool", "level": "int8", "iou": "float32", "stability": "float32", "box": "float32",
        "point": "float32", "crop_box": "int32",
    }  # fmt: skip
    assert torch.from_numpy(found.point).isnan().all()
