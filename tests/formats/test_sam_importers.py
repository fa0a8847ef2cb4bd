"""Masks that exist already: every format against what was drawn, pycocotools as the oracle, and damaged files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipseed import segments
from clipseed.errors import ClipseedError, ImageError, InputError, UsageError
from clipseed.formats.coco import CocoInstances
from clipseed.formats.instance_maps import InstanceMaps
from clipseed.formats.open import KINDS, open_segments
from clipseed.formats.panoptic import CocoPanoptic
from clipseed.formats.rle import decode_counts, unpack_counts
from clipseed.formats.sa1b import Sa1b
from clipseed.formats.segment_folders import SegmentFolders

SIZE = (13, 17)


def drawn(seed: int, count: int = 4) -> np.ndarray:
    """Masks of several shapes, one of them empty."""
    rng = np.random.default_rng(seed)
    masks = rng.random((count, *SIZE)) < np.linspace(0.1, 0.9, count)[:, None, None]
    masks[1] = False
    masks[1, 3:9, 4:11] = True
    masks[-1] = False
    return masks


def runs(mask: np.ndarray) -> list[int]:
    """Uncompressed run lengths, by hand."""
    counts, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def compressed(mask: np.ndarray) -> dict[str, Any]:
    coco = pytest.importorskip("pycocotools.mask")
    found = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(found["size"]), "counts": found["counts"].decode()}


def write_json(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def instances(path: Path, segmentations: list[Any]) -> Path:
    images = [{"id": 7, "file_name": "a/one.jpg", "height": 13, "width": 17}, {"id": 8, "file_name": "two.jpg"}]
    annotations = [
        {"id": k, "image_id": 7, "category_id": 1, "iscrowd": k % 2, "segmentation": found}
        for k, found in enumerate(segmentations)
    ]
    return write_json(path, {"images": images, "annotations": annotations, "categories": []})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 300), st.sampled_from([0.0, 0.02, 0.5, 1.0]))
def test_run_lengths_against_pycocotools(seed: int, height: int, width: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    counts = unpack_counts(compressed(mask)["counts"], "here")
    assert counts == runs(mask)
    np.testing.assert_array_equal(decode_counts(counts, (height, width), "here"), mask)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=30))
def test_any_text_as_run_lengths(text: str) -> None:
    """Never anything but a mask of the right size or one clear error."""
    try:
        assert decode_counts(unpack_counts(text, "here"), (5, 4), "here").shape == (5, 4)
    except InputError as error:
        assert str(error).startswith("here: 'counts'")


def test_coco_instances(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    masks = drawn(0)
    polygons = [[1.5, 1.0, 9.0, 2.5, 6.0, 11.0], [10, 3, 16, 3, 16, 9, 10, 9]]
    segmentations: list[Any] = [{"size": list(SIZE), "counts": runs(mask)} for mask in masks]
    segmentations += [compressed(masks[0]), polygons, []]
    found = open_segments(instances(tmp_path / "instances_val.json", segmentations))
    assert isinstance(found.source, CocoInstances)
    assert found.ids() == {"a/one", "two"}
    filled = coco.decode(coco.merge(coco.frPyObjects(polygons, *SIZE))).astype(bool)
    proposals = found.read("a/one", SIZE)
    np.testing.assert_array_equal(proposals.masks, [*masks[:3], masks[0], filled])
    assert proposals.level.tolist() == [2] * 5
    assert len(found.read("two", (4, 5))) == 0
    assert found.read("two", (4, 5)).size == (4, 5)
    with pytest.raises(ImageError, match=r"annotations\[0\]: a mask of 17x13 pixels for an image of 18x13"):
        found.read("a/one", (13, 18))
    with pytest.raises(ImageError, match="lists no image 'one'"):
        found.read("one", SIZE)


@pytest.mark.parametrize(
    ("segmentation", "error", "message"),
    [
        (None, InputError, "neither polygons nor"),
        ({"size": [13], "counts": []}, InputError, r"'size' is not \[height, width\]"),
        ({"size": [13, True], "counts": []}, InputError, r"'size' is not"),
        ({"size": [13, 17]}, InputError, "neither a list nor a text"),
        ({"size": [13, 17], "counts": [220]}, InputError, "'counts' make 220 pixels, 'size' 13 x 17"),
        ({"size": [13, 17], "counts": [-1, 222]}, InputError, "run lengths from 0"),
        ({"size": [13, 17], "counts": [1.5, 2]}, InputError, "run lengths from 0"),
        ({"size": [13, 17], "counts": [10**30]}, InputError, "'counts' make 1000"),
        ({"size": [13, 17], "counts": "o" * 50}, InputError, "not a compressed"),
        ({"size": [13, 17], "counts": "P"}, InputError, "cut off"),
        ({"size": [13, 17], "counts": "é"}, InputError, "not a compressed"),
        ({"size": [10**9, 10**9], "counts": [10**18]}, ImageError, "for an image of 17x13"),
        ([[1, 2, 3, 4]], InputError, "three or more corners"),
        ([[1, 2, 3, 4, 5, None]], InputError, "'segmentation' must be 6 numbers"),
        ([[1, 2, 3, 4, 5, float("nan")]], InputError, "'segmentation' must be 6 numbers"),
        ([[1, 2, 3, 4, 5, 10**400]], InputError, "'segmentation' must be 6 numbers"),
        ([[1, 2, 3, 4, 1e300, 5]], ImageError, "far outside"),
        (["12"], InputError, "three or more corners"),
    ],
)
def test_malformed_segmentations(segmentation: Any, error: type[ClipseedError], message: str, tmp_path: Path) -> None:
    found = open_segments(instances(tmp_path / "instances.json", [segmentation]))
    with pytest.raises(error, match=rf"instances\.json: annotations\[0\].*{message}"):
        found.read("a/one", SIZE)


def test_polygons_without_pycocotools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    found = open_segments(instances(tmp_path / "i.json", [[[1, 1, 9, 1, 9, 9]]]))
    with pytest.raises(UsageError, match=r"pip install 'clipseed\[sam\]'"):
        found.read("a/one", SIZE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "not a COCO|no COCO"),
        ({"images": [], "annotations": {}}, "no COCO file"),
        ({"images": [3], "annotations": []}, "'images' is not a list of mappings"),
        ({"images": [{"id": 1}], "annotations": []}, r"images\[0\]: 'file_name' is not a text"),
        ({"images": [{"id": "x", "file_name": "a.jpg"}], "annotations": []}, r"images\[0\]: 'id' is not an integer"),
        ({"images": [{"id": 1, "file_name": "../a.jpg"}], "annotations": []}, "leaves the image folder"),
        ({"images": [], "annotations": [{"image_id": None}]}, r"annotations\[0\]: 'image_id' is not an integer"),
        ({"images": [], "annotations": [{"segments_info": []}]}, "which is no folder"),
    ],
)
def test_malformed_coco_files(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"i\.json.*({message})"):
        open_segments(write_json(tmp_path / "i.json", data))
    (tmp_path / "i.json").write_text('{"images": [')
    with pytest.raises(InputError, match=r"i\.json: line 1: not valid JSON"):
        open_segments(tmp_path / "i.json")


def panoptic_png(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)).save(path)


def test_coco_panoptic(tmp_path: Path) -> None:
    """By its JSON file, whose image names may differ from those of the PNGs, and by the bare folder."""
    ids = np.random.default_rng(1).choice([0, 5, 256, 70_000, 16_777_215], SIZE)
    panoptic_png(tmp_path / "panoptic_val" / "000007.png", ids)
    data = {
        "images": [{"id": 7, "file_name": "seven.jpg"}],
        "annotations": [{"image_id": 7, "file_name": "000007.png", "segments_info": [{"id": 5}]}],
    }
    expected = [ids == value for value in (5, 256, 70_000, 16_777_215)]
    for source, identifier in (
        (write_json(tmp_path / "panoptic_val.json", data), "seven"),
        (tmp_path / "panoptic_val", "000007"),
    ):
        found = open_segments(source)
        assert isinstance(found.source, CocoPanoptic)
        assert found.ids() == {identifier}
        np.testing.assert_array_equal(found.read(identifier, SIZE).masks, expected)
        with pytest.raises(ImageError, match="masks of 17x13 pixels for an image of 13x17"):
            found.read(identifier, SIZE[::-1])
        with pytest.raises(ImageError, match="no panoptic PNG"):
            found.read("eight", SIZE)
    Image.fromarray(ids.astype(np.uint8)).save(tmp_path / "panoptic_val" / "000007.png")
    with pytest.raises(InputError, match="panoptic maps are RGB"):
        found.read("000007", SIZE)


@pytest.mark.parametrize(
    ("mode", "values"), [("L", [0, 3, 254, 255]), ("P", [0, 1, 2, 255]), ("I;16", [0, 255, 60_000])]
)
def test_instance_maps(mode: str, values: list[int], tmp_path: Path) -> None:
    """255 is VOC's boundary in 8 bits, a region like others in 16."""
    pixels = np.random.default_rng(2).choice(values, SIZE).astype(np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(pixels)
    if mode == "P":
        image = Image.fromarray(pixels, mode="P")
        image.putpalette(list(range(256)) * 3)
    (tmp_path / "sub").mkdir()
    image.save(tmp_path / "sub" / "x.png")
    found = open_segments(tmp_path)
    assert isinstance(found.source, InstanceMaps)
    assert found.ids() == {"sub/x"}
    kept = values if mode == "I;16" else values[:-1]
    np.testing.assert_array_equal(found.read("sub/x", SIZE).masks, [pixels == value for value in kept])
    with pytest.raises(ImageError, match="no such mask file"):
        found.read("y", SIZE)
    with pytest.raises(InputError, match="leaves the image folder"):
        found.read("../x", SIZE)


def test_folders_of_masks(tmp_path: Path) -> None:
    masks = drawn(3)
    for number, mask in zip((0, 2, 10, 3), masks, strict=True):
        folder = tmp_path / "images" / "2007_1"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{number}.png")
    Image.fromarray(np.repeat(masks[0][..., None], 3, axis=2).astype(np.uint8)).save(folder / "11.png")
    found = open_segments(tmp_path)
    assert isinstance(found.source, SegmentFolders)
    assert found.ids() == {"images/2007_1"}
    ours = found.read("images/2007_1", SIZE)
    np.testing.assert_array_equal(ours.masks, [masks[0], masks[1], masks[2], masks[0]])  # the empty one is left out
    with pytest.raises(ImageError, match="no such mask folder"):
        found.read("images/2007_2", SIZE)
    (folder / "5.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"5\.png: not a PNG"):
        found.read("images/2007_1", SIZE)
    (folder / "5.png").write_bytes((folder / "2.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"5\.png: damaged"):
        found.read("images/2007_1", SIZE)


def test_sa_1b(tmp_path: Path) -> None:
    masks = drawn(4)
    scored = {
        "predicted_iou": 0.9, "stability_score": 0.97, "point_coords": [[3.5, 2.0]], "crop_box": [0.0, 1.0, 9.0, 8.0],
    }  # fmt: skip
    annotations = [{"segmentation": compressed(mask)} for mask in masks]
    annotations[2].update(scored)
    write_json(tmp_path / "sa" / "sa_1.json", {"image": {"file_name": "sa_1.jpg"}, "annotations": annotations[::-1]})
    found = open_segments(tmp_path / "sa")
    assert isinstance(found.source, Sa1b)
    assert found.ids() == {"sa_1"}
    ours = found.read("sa_1", SIZE)
    np.testing.assert_array_equal(ours.masks, masks[[2, 1, 0]])
    np.testing.assert_allclose(ours.iou, [0.9, 1, 1])
    np.testing.assert_allclose(ours.stability, [0.97, 1, 1])
    assert ours.point[0].tolist() == [3.5, 2]
    assert np.isnan(ours.point[1:]).all()
    assert ours.crop_box.tolist() == [[0, 1, 9, 8], [0, 0, 17, 13], [0, 0, 17, 13]]
    assert ours.box[1].tolist() == [4, 3, 6, 5]
    for key, value in (("predicted_iou", "x"), ("point_coords", [3]), ("crop_box", [1, 2, 3, True])):
        write_json(tmp_path / "sa" / "bad.json", {"annotations": [{**annotations[0], key: value}]})
        with pytest.raises(InputError, match=rf"bad\.json: annotations\[0\]: '{key}' must be"):
            found.read("bad", SIZE)
    with pytest.raises(ImageError, match="no such mask file"):
        found.read("sa_2", SIZE)


def test_more_masks_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MAX_MASK_BYTES", 10 * 13 * 17)
    segmentation = {"size": list(SIZE), "counts": [13 * 17]}
    few = open_segments(instances(tmp_path / "few.json", [segmentation] * 10))
    assert len(few.read("a/one", SIZE)) == 0  # all are empty
    many = open_segments(instances(tmp_path / "many.json", [segmentation] * 11))
    with pytest.raises(ImageError, match="11 masks of 17x13 pixels need more than"):
        many.read("a/one", SIZE)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        open_segments(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no PNG and no JSON files here"):
        open_segments(tmp_path)
    with pytest.raises(UsageError, match="choose one of auto, coco-panoptic"):
        open_segments(tmp_path, "voc")  # type: ignore[arg-type]
    file = instances(tmp_path / "annotations" / "instances_val.json", [])
    with pytest.raises(InputError, match="name one of them"):
        open_segments(tmp_path / "annotations")
    for kind in set(KINDS) - {"auto", "coco-instances", "coco-panoptic"}:
        with pytest.raises(UsageError, match=f"{kind} is a folder"):
            open_segments(file, kind)
    with pytest.raises(UsageError, match="is one JSON file"):
        open_segments(tmp_path, "coco-instances")
