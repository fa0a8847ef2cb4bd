"""VOC, COCO, folders and the toy set as users have them on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipseed.data.dataset import DatasetOptions, image_finder, open_dataset, recorded_set
from clipseed.data.toy.dataset import HELD_OUT_COUNT, toy_mask, toy_scene
from clipseed.data.voc import object_names
from clipseed.errors import ImageError, InputError, UsageError
from clipseed.store.toy_devkit import save_devkit

from helpers.images import photo


def voc(root: Path, **options: Any) -> Any:
    return open_dataset(DatasetOptions(dataset="voc", root=root, **options))


def test_voc(devkit: Path) -> None:
    found = voc(devkit)
    assert (found.name, found.root, found.split) == ("voc", devkit.resolve(), "train")
    assert [sample.labels for sample in found.samples] == [(7,), (11, 14), (14,), (17, 7, 11), (), (19,)]
    assert found.samples[0].path == devkit / "JPEGImages" / "2007_000001.jpg"
    assert found.ground_truth == str(devkit / "SegmentationClass")
    assert found.reader(found.samples[0]).size == (64, 48)


def test_voc_is_found_from_above_and_by_environment(devkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(voc(devkit.parent).samples) == 6
    monkeypatch.setenv("CLIPSEED_VOC", str(devkit))
    assert len(voc(None).samples) == 6  # type: ignore[arg-type]
    monkeypatch.delenv("CLIPSEED_VOC")
    monkeypatch.chdir(devkit)
    assert len(voc(None).samples) == 6  # type: ignore[arg-type]
    monkeypatch.chdir(devkit / "JPEGImages")
    with pytest.raises(InputError, match="no JPEGImages folder here; go into the devkit"):
        voc(None)  # type: ignore[arg-type]


def test_voc_splits(devkit: Path, tmp_path: Path) -> None:
    assert [sample.id for sample in voc(devkit, split="val").samples] == ["2007_000001", "2007_000002"]
    lists = devkit / "ImageSets" / "Segmentation"
    shutil.copy(lists / "val.txt", lists / "train_aug.txt")
    assert len(voc(devkit, split="trainaug").samples) == 2
    own = tmp_path / "mine.txt"
    own.write_text("/JPEGImages/2007_000004.jpg /SegmentationClass/2007_000004.png\n")
    found = voc(devkit, split=str(own))
    assert (found.split, [sample.id for sample in found.samples]) == ("mine", ["2007_000004"])
    with pytest.raises(InputError, match=r"--split test: neither a list in .*train, train_aug, val"):
        voc(devkit, split="test")
    (lists / "train.txt").unlink()
    with pytest.raises(InputError, match="choose one of its lists with --split"):
        voc(devkit)
    for name in ("val", "train_aug"):
        (lists / f"{name}.txt").unlink()
    assert voc(devkit).split == "all"


def test_voc_labels_from_a_file_and_missing_annotations(devkit: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("2007_000001 bus\n2007_000002\n")
    found = voc(devkit, labels=labels)
    assert [sample.labels for sample in found.samples][:3] == [(5,), (), None]
    (devkit / "Annotations" / "2007_000003.xml").unlink()
    assert voc(devkit).samples[2].labels is None


def test_voc_unknown_class_names_the_file(devkit: Path) -> None:
    path = devkit / "Annotations" / "2007_000002.xml"
    path.write_text("<annotation><object><name>unicorn</name></object></annotation>")
    with pytest.raises(InputError, match=r"2007_000002.xml: unknown class 'unicorn'.*--classes"):
        voc(devkit)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation><object>", r"x: line 1: not valid XML"),
        ("", "not valid XML"),
        ('<!DOCTYPE a [<!ENTITY b "cat">]><annotation><object><name>&b;</name></object></annotation>', "entities"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "entities"),
    ],
)
def test_annotation_mistakes(content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        object_names(content.encode(), "x")


def test_annotation_encodings() -> None:
    text = '<?xml version="1.0" encoding="utf-16"?><annotation><object><name> cat </name></object></annotation>'
    assert object_names(text.encode("utf-16"), "x") == ["cat"]
    evil = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY b "cat">]><annotation/>'
    with pytest.raises(InputError, match="entities"):
        object_names(evil.encode("utf-16"), "x")


def coco_folder(root: Path, **changes: Any) -> Path:
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    for number in (139, 285):
        photo(number, 40, 60).save(root / "val2017" / f"{number:012d}.jpg")
    data = {
        "images": [{"id": number, "file_name": f"{number:012d}.jpg"} for number in (139, 285, 7)],
        # COCO's own ids have gaps: 1, 2, 3 … 90
        "categories": [{"id": k * 2 + 1, "name": f"c{k}"} for k in range(80)][::-1],
        "annotations": [
            {"image_id": 139, "category_id": 159},
            {"image_id": 139, "category_id": 1},
            {"image_id": 139, "category_id": 1},
            {"image_id": 285, "category_id": 3},
        ],
        **changes,
    }
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(data))
    return root


def test_coco(tmp_path: Path) -> None:
    root = coco_folder(tmp_path / "coco")
    found = open_dataset(DatasetOptions(dataset="coco", root=root))
    assert (found.name, found.split) == ("coco", "val2017")
    assert [(sample.id, sample.labels) for sample in found.samples] == [
        ("000000000139", (0, 79)), ("000000000285", (1,)), ("000000000007", ()),
    ]  # fmt: skip
    assert found.reader(found.samples[0]).size == (60, 40)


def test_coco_mistakes(tmp_path: Path) -> None:
    def refused(name: str, message: str, options: dict[str, Any] | None = None, **changes: Any) -> None:
        root = coco_folder(tmp_path / name, **changes)
        with pytest.raises(InputError, match=message):
            open_dataset(DatasetOptions(dataset="coco", root=root, **(options or {})))

    refused("a", "3 categories, but vocabulary 'coco' has 80", categories=[{"id": k, "name": "x"} for k in range(3)])
    refused("b", "unknown category_id 2", annotations=[{"image_id": 139, "category_id": 2}])
    refused("c", "'images' is not a list", images={})
    refused("d", "'id' is not an integer", categories=[{"name": "x"}])
    refused("e", "leaves the image folder", images=[{"id": 1, "file_name": "../../x.jpg"}])
    refused("f", r"no annotations/instances_train2017.json here \(there: val2017\)", {"split": "train2017"})
    (tmp_path / "g").mkdir()
    with pytest.raises(InputError, match="name the folder with --root"):
        open_dataset(DatasetOptions(dataset="coco", root=tmp_path / "g"))


def folder(tmp_path: Path, rows: str, **options: Any) -> Any:
    images = tmp_path / "photos"
    for number, name in enumerate(("a.jpg", "sub/b.png", "c.jpg")):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        photo(number, 20, 30).save(images / name)
    (tmp_path / "labels.csv").write_text(rows)
    (tmp_path / "classes.txt").write_text("rust\ncrack\n")
    given = {"images": images, "labels": tmp_path / "labels.csv", "classes": str(tmp_path / "classes.txt"), **options}
    return open_dataset(DatasetOptions(dataset="folder", **given))


def test_folder(tmp_path: Path) -> None:
    found = folder(tmp_path, "a.jpg,rust\nsub/b,crack,rust\nd,rust\n")
    assert [(sample.id, sample.labels) for sample in found.samples] == [
        ("a", (0,)), ("c", None), ("d", (0,)), ("sub/b", (1, 0)),
    ]  # fmt: skip
    with pytest.raises(ImageError, match="no such file"):
        found.reader(found.samples[2])


def test_folder_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of its 1 ids is an image.*first label id 'x', first image 'a'"):
        folder(tmp_path, "x,rust\n")
    for missing, message in (("images", "--images DIR"), ("labels", "--labels FILE"), ("classes", "--classes FILE")):
        with pytest.raises(UsageError, match=message):
            folder(tmp_path, "a,rust\n", **{missing: None})
    with pytest.raises(UsageError, match="choose one of voc, coco, folder, toy"):
        open_dataset(DatasetOptions(dataset="imagenet"))


def test_templates_and_limit(tmp_path: Path) -> None:
    found = folder(tmp_path, "a,rust\n", templates=("a photo of {}.",), limit=2)
    assert found.vocabulary.templates == ("a photo of {}.",)
    assert len(found.samples) == 2
    with pytest.raises(UsageError, match=r"exactly one \{\}"):
        folder(tmp_path, "a,rust\n", templates=("a photo",))


def test_toy_set_and_its_devkit(tmp_path: Path) -> None:
    found = open_dataset(DatasetOptions(dataset="toy"))
    assert (len(found.samples), found.split) == (HELD_OUT_COUNT, "held-out")
    save_devkit(tmp_path, count=3)
    stored = voc(tmp_path, classes="toy")
    assert stored.split == "val"
    for ours, theirs in zip(found.samples[:3], stored.samples, strict=True):
        assert ours.id == theirs.id
        assert ours.labels is not None
        assert set(ours.labels) == set(theirs.labels)
        np.testing.assert_array_equal(np.asarray(found.reader(ours)), np.asarray(stored.reader(theirs)))
        assert toy_mask(0, ours.id).shape == np.asarray(stored.reader(theirs)).shape[:2]
    with pytest.raises(InputError, match="needs the classes boat"):
        open_dataset(DatasetOptions(dataset="toy", classes="voc"))
    with pytest.raises(InputError, match="not an image of the toy set"):
        toy_scene(0, "2007_000001")


def test_image_finder(devkit: Path) -> None:
    find = image_finder({"name": "voc", "images": str(devkit / "JPEGImages")})
    assert find("2007_000001").size == (64, 48)
    with pytest.raises(ImageError, match="not there any more"):
        find("2007_999999")
    assert image_finder({"name": "toy", "toy_seed": 0})("toy_000000").mode == "RGB"


def test_images_alone(devkit: Path, tmp_path: Path) -> None:
    """Neither labels nor classes are needed, and what is wrong with them does not matter."""
    (devkit / "Annotations" / "2007_000001.xml").write_text("no XML")
    found = voc(devkit, images_only=True, limit=3)
    assert [(sample.id, sample.labels) for sample in found.samples] == [
        ("2007_000001", None), ("2007_000002", None), ("2007_000003", None),
    ]  # fmt: skip
    assert found.manifest == {
        "name": "voc", "root": str(devkit.resolve()), "split": "train", "ground_truth": None,
        "images": str(devkit.resolve() / "JPEGImages"),
    }  # fmt: skip
    few = [{"id": 1, "name": "cat"}]
    root = coco_folder(tmp_path / "coco", categories=few, annotations=[{"image_id": 139, "category_id": 1}])
    with pytest.raises(InputError, match="1 categories, but vocabulary 'coco' has 80"):
        open_dataset(DatasetOptions("coco", root=root))
    found = open_dataset(DatasetOptions("coco", root=root, images_only=True))
    assert [sample.labels for sample in found.samples] == [None] * 3
    found = folder(tmp_path, "a.jpg,rust\n", labels=None, classes=None, images_only=True, exif=True, max_pixels=900)
    assert [(sample.id, sample.labels) for sample in found.samples] == [("a", None), ("c", None), ("sub/b", None)]
    assert (found.exif, found.max_pixels, found.reader.exif) == (True, 900, True)
    found = open_dataset(DatasetOptions("toy", images_only=True, limit=2))
    assert [(sample.id, sample.labels) for sample in found.samples] == [("toy_000000", None), ("toy_000001", None)]
    assert found.manifest["ground_truth"] == "toy:0"


def test_a_manifest_gives_its_data_set_back(devkit: Path, tmp_path: Path) -> None:
    for found in (voc(devkit), folder(tmp_path, "a.jpg,rust\n"), open_dataset(DatasetOptions("toy", limit=2))):
        manifest = {
            "dataset": found.manifest, "vocabulary": found.vocabulary.as_dict(), "options": {"exif": False},
            "max_pixels": found.max_pixels,
        }  # fmt: skip
        again = recorded_set(manifest, found.samples, found.reader, "x.h5")
        assert again.manifest == found.manifest
        assert (again.name, again.root, again.split, again.vocabulary) == (
            found.name, found.root, found.split, found.vocabulary,
        )  # fmt: skip
