"""``clipseed export``: every format read back by its consumer's own reader or its written rules, pixel for pixel."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageOps

from clipseed.cli.main import main
from clipseed.clip import licenses
from clipseed.data.labels import read_labels
from clipseed.data.vocabulary import load_vocabulary
from clipseed.defaults import ExportFormat
from clipseed.errors import InputError
from clipseed.formats.brush import brush_code, brush_mask
from clipseed.formats.cvat import CvatMasks
from clipseed.formats.irn import read_irn
from clipseed.formats.label_studio import LabelStudioMasks
from clipseed.formats.open import open_segments
from clipseed.formats.palette import voc_palette
from clipseed.formats.writers import WRITERS
from clipseed.jobs.export import ExportOptions, run_export
from clipseed.store.label_masks import NO_NOTE, read_label_mask, write_label_mask

from helpers.images import photo
from helpers.records import make_cam, small_manifest, write_seeds

SIZES = {"plain": (40, 56), "sub/with blank": (33, 47), "turned": (30, 50), "drawn": (24, 25)}
"""Height and width as stored; ``turned`` is shown on its side (EXIF 6), ``drawn`` is a PNG."""
NAMES = ("cat", "big dog", "tree")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of all kinds with label masks as clipseed writes them, and three that cannot be exported."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "classes.txt").write_text("\n".join(NAMES) + "\n")
    vocabulary = load_vocabulary(tmp_path / "classes.txt")
    for number, (key, (height, width)) in enumerate({**SIZES, "wrong size": (30, 30), "gone": (20, 20)}.items()):
        exif = Image.Exif()
        if key == "turned":
            exif[0x0112] = 6
        path = tmp_path / "photos" / f"{key}.{'png' if key == 'drawn' else 'jpg'}"
        if key != "gone":
            photo(number, height, width).save(path, exif=exif)
        small = rng.choice(np.array([0, 0, 1, 2, 3, 255], np.uint8), (5, 6))
        small[0, :4] = 0, 1, 2, 255
        mask = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST))
        mask = mask[:-1] if key == "wrong size" else mask
        target = tmp_path / "pseudo" / f"{key}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_label_mask(target, mask, NO_NOTE)
    manifest = {**small_manifest(tmp_path / "photos"), "kind": "crf", "vocabulary": vocabulary.as_dict()}
    (tmp_path / "pseudo" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "pseudo" / "damaged.png").write_bytes(b"no PNG")
    (tmp_path / "photos" / "damaged.jpg").write_bytes((tmp_path / "photos" / "plain.jpg").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(kind: str, *words: object) -> int:
    return main(["export", "pseudo", "--format", kind, "--out", f"as-{kind}", *map(str, words)])


def truth(key: str, *, turned: bool) -> np.ndarray:
    mask = read_label_mask(Path("pseudo") / f"{key}.png")
    return np.rot90(mask, -1) if turned and key == "turned" else mask


def indices(path: Path) -> np.ndarray:
    """As torchvision's and most other readers take a mask: Pillow's values, no conversion."""
    return np.array(Image.open(path))


Found = dict[str, np.ndarray]


def as_voc(root: Path) -> Found:
    from torchvision.datasets import VOCSegmentation

    data = VOCSegmentation(str(root), year="2012", image_set="train", download=False)
    keys = (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").read_text().splitlines()
    found = {}
    for key, (image, mask) in zip(keys, data, strict=True):
        assert image.size == mask.size
        found[key] = np.array(mask)
    assert Image.open(root / "VOCdevkit/VOC2012/JPEGImages/drawn.jpg").format == "JPEG"
    return found


def as_mmseg(root: Path) -> Found:
    """The rules of BaseSegDataset: prefix, id, suffix; images through OpenCV, masks as stored."""
    scope: dict[str, Any] = {}
    exec((root / "dataset.py").read_text(), scope)
    settings = scope["train_dataset"]
    assert settings["metainfo"]["classes"] == ("background", *NAMES)
    found = {}
    for key in (root / settings["ann_file"]).read_text().splitlines():
        prefix = settings["data_prefix"]
        image = cv2.imread(str(root / prefix["img_path"] / (key + settings["img_suffix"])))
        mask = indices(root / prefix["seg_map_path"] / (key + settings["seg_map_suffix"]))
        assert image.shape[:2] == mask.shape
        found[key] = mask
    return found


def as_ultralytics(root: Path) -> Found:
    """The documented rules: ``images`` in a path becomes ``masks_dir``; sizes are those of the turned image."""
    data = yaml.safe_load((root / "data.yaml").read_text())
    assert data["names"] == dict(enumerate(("background", *NAMES)))
    folder = root / data["train"]
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        mask = Path(f"/{data['masks_dir']}/".join(str(path).rsplit("/images/", 1))).with_suffix(".png")
        shown = ImageOps.exif_transpose(Image.open(path))
        found[path.relative_to(folder).with_suffix("").as_posix()] = indices(mask)
        assert Image.open(mask).size == shown.size
    return found


def as_hf(root: Path) -> Found:
    """By the file itself; the library's own reader is another test."""
    lines = [json.loads(line) for line in (root / "train/metadata.jsonl").read_text().splitlines()]
    assert json.loads((root / "id2label.json").read_text()) == {
        "0": "background",
        "1": "cat",
        "2": "big dog",
        "3": "tree",
    }
    assert all((root / "train" / line["file_name"]).is_file() for line in lines)
    return {line["id"]: indices(root / "train" / line["mask_file_name"]) for line in lines}


def as_fiftyone(root: Path) -> Found:
    """The rules of ImageSegmentationDirectory: the same path below ``data`` and ``labels``, suffix aside."""
    targets = json.loads((root / "mask_targets.json").read_text())
    assert targets == {"0": "background", "1": "cat", "2": "big dog", "3": "tree", "255": "ignore"}
    images = [path for path in (root / "data").rglob("*") if path.is_file()]
    keys = [path.relative_to(root / "data").with_suffix("").as_posix() for path in images]
    return {key: indices(root / "labels" / f"{key}.png") for key in keys}


def as_lightly(root: Path) -> Found:
    from torchvision.io import ImageReadMode, decode_image

    data = yaml.safe_load((root / "data.yaml").read_text())
    assert data["classes"] == {0: "background", 1: "cat", 2: "big dog", 3: "tree", 255: "ignore"}
    assert data["ignore_classes"] == [255]
    found = {}
    for path in sorted((root / data["train"]["masks"]).rglob("*.png")):
        pixels = decode_image(str(path), mode=ImageReadMode.UNCHANGED)
        assert pixels.shape[0] == 1
        found[path.relative_to(root / data["train"]["masks"]).with_suffix("").as_posix()] = pixels[0].numpy()
    return found


def painted(size: tuple[int, int], areas: Iterator[tuple[np.ndarray, int]], fill: int = 0) -> np.ndarray:
    mask = np.full(size, fill, np.uint8)
    for pixels, value in areas:
        mask[pixels.astype(bool)] = value
    return mask


def as_coco(root: Path) -> Found:
    from pycocotools.coco import COCO

    coco = COCO(str(root / "annotations/instances_train.json"))
    assert {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())} == {**dict(enumerate(NAMES, 1)), 255: "ignore"}
    found = {}
    for image in coco.loadImgs(coco.getImgIds()):
        items = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert all(coco.annToMask(item).sum() == item["area"] for item in items)
        for item in items:
            left, top, width, height = item["bbox"]
            rows, columns = np.nonzero(coco.annToMask(item))
            assert (left, top, width, height) == (
                columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1
            )  # fmt: skip
        areas = ((coco.annToMask(item), item["category_id"]) for item in items)
        key = image["file_name"].rsplit(".", 1)[0]
        found[key] = painted((image["height"], image["width"]), areas)
        ours = open_segments(root / "annotations/instances_train.json").read(key, found[key].shape)
        assert sorted(int(mask.sum()) for mask in ours.masks) == sorted(item["area"] for item in items)
    return found


def as_panoptic(root: Path) -> Found:
    """The written rules: id = R + 256 G + 65536 B, 0 is void; through our own reader as well."""
    data = json.loads((root / "annotations/panoptic_train.json").read_text())
    images = {image["id"]: image["file_name"] for image in data["images"]}
    values = {category["id"]: number for number, category in enumerate(data["categories"])}
    assert [category["name"] for category in data["categories"]] == ["background", *NAMES]
    found = {}
    for item in data["annotations"]:
        wide = np.array(Image.open(root / "annotations/panoptic_train" / item["file_name"])).astype(int)
        ids = wide @ [1, 256, 65536]
        assert {segment["id"]: segment["area"] for segment in item["segments_info"]} == {
            int(k): int((ids == k).sum()) for k in np.unique(ids) if k
        }
        areas = ((ids == s["id"], values[s["category_id"]]) for s in item["segments_info"])
        found[images[item["image_id"]].rsplit(".", 1)[0]] = painted(ids.shape, areas, 255)
    assert len(open_segments(root / "annotations/panoptic_train.json").read("plain", SIZES["plain"]))
    return found


def as_label_studio(root: Path) -> Found:
    """The tasks as a project imports and, once they are accepted, exports them."""
    config = ElementTree.parse(root / "config.xml").getroot()
    names = {part.get("name"): part for part in config}
    labels = [part.get("value") for part in names["label"]]
    assert labels == [*NAMES, "ignore"]
    tasks = json.loads((root / "tasks.json").read_text())
    for task in tasks:
        address = task["data"]["image"]
        assert Path("/" + unquote(address.removeprefix("/data/local-files/?d="))).is_file()
        for result in task["predictions"][0]["result"]:
            assert result["from_name"] in names
            assert names[result["from_name"]].get("toName") == result["to_name"] == "image"
    source = LabelStudioMasks(root / "tasks.json", load_vocabulary("classes.txt"), predicted=True)
    return {key: source.read(key) for key in source.ids()}


def as_cvat(root: Path) -> Found:
    source = CvatMasks(root, load_vocabulary("classes.txt"))
    listed = (root / "ImageSets/Segmentation/default.txt").read_text().splitlines()
    assert set(listed) == source.ids()
    assert {label["name"] for label in json.loads((root / "labels.json").read_text())} == {*NAMES, "ignore"}
    plain = Image.open(root / "SegmentationClass/plain.png")
    assert plain.mode == "RGB"
    np.testing.assert_array_equal(np.array(plain), voc_palette()[truth("plain", turned=False)])
    return {key: source.read(key) for key in source.ids()}


READERS: dict[str, Callable[[Path], Found]] = {
    "voc": as_voc, "mmseg": as_mmseg, "ultralytics": as_ultralytics, "hf": as_hf, "fiftyone": as_fiftyone,
    "lightly": as_lightly, "coco": as_coco, "coco-panoptic": as_panoptic, "labelstudio": as_label_studio,
    "cvat": as_cvat,
}  # fmt: skip


@pytest.mark.parametrize("kind", READERS)
def test_masks_come_back_equal_to_the_pixel(
    kind: ExportFormat, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ignored pixels included; what cannot be exported is said and listed, and the rest is there."""
    assert export(kind, "--json") == 3
    said = capsys.readouterr()
    report = json.loads(said.out)
    reasons = {item["id"]: item["reason"] for item in report["skipped"]}
    assert reasons.keys() == {"wrong size", "gone", "damaged"}
    assert "its mask has 30x29 pixels, the image 30x30" in reasons["wrong size"]
    assert "no image there" in reasons["gone"]
    with (project / f"as-{kind}/.clipseed/skipped.csv").open() as file:
        assert {row["id"] for row in csv.DictReader(file)} == reasons.keys()
    turned = WRITERS[kind].turned
    assert ("masks are turned" if turned else "turned by EXIF, masks lie on the pixels as stored; --orient") in said.err
    found = READERS[kind](project / f"as-{kind}")
    assert found.keys() == SIZES.keys()
    for key, mask in found.items():
        np.testing.assert_array_equal(mask, truth(key, turned=turned))
        assert (mask == 255).any()
    with (project / f"as-{kind}/classes.csv").open() as file:
        rows = {row["value"]: (row["name"], row["color"]) for row in csv.DictReader(file)}
    assert rows["2"] == ("big dog", "#008000")
    assert rows["255"][0] == "ignore"


def test_polygons(project: Path) -> None:
    """Outlines of regions without holes come back exactly as Ultralytics fills them; its background is what is left."""
    mask = np.zeros((40, 56), np.uint8)
    mask[3:20, 4:30], mask[25:30, 10:12], mask[35, 50] = 1, 2, 3
    mask[20:24, 4:9] = 255
    cv2.circle(mask, (44, 15), 8, 2, -1)
    write_label_mask(project / "pseudo/plain.png", mask)
    assert export("yolo-polygons", "--ignore", "keep") == 2
    assert export("yolo-polygons", "--allow-skipped") == 0
    root = project / "as-yolo-polygons"
    data = yaml.safe_load((root / "data.yaml").read_text())
    assert data["names"] == dict(enumerate(NAMES))
    assert "masks_dir" not in data
    canvas = np.zeros_like(mask)
    for line in (root / "labels/train/plain.txt").read_text().splitlines():
        number, *corners = line.split()
        points = (np.array(corners, float).reshape(-1, 2) * [56, 40]).astype(np.int32)
        assert len(points) >= 3
        cv2.fillPoly(canvas, [points], int(number) + 1)
    np.testing.assert_array_equal(canvas, np.where(mask == 255, 0, mask))


def test_hugging_face_datasets_reads_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert export("hf", "--parquet", "--allow-skipped") == 0
    cache = str(project / "cache")
    folder = datasets.load_dataset("imagefolder", data_dir="as-hf", cache_dir=cache, split="train")
    parquet = datasets.load_dataset("parquet", data_files="as-hf/parquet/data.parquet", cache_dir=cache, split="train")
    for data in (folder, parquet):
        assert {row["id"] for row in data} == SIZES.keys()
        for row in data:
            assert row["image"].size == row["mask"].size
            np.testing.assert_array_equal(np.array(row["mask"]), truth(row["id"], turned=True))


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_running_it_again_gives_the_same_folder(
    kind: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After it was stopped, after nothing, and after images came, went and changed; never what is somebody else's."""
    words = ("--images", "copy", "--allow-skipped")
    assert export(kind, *words) == 0
    whole = bytes_below(project / f"as-{kind}")
    assert not any("gone" in name for name in whole if not name.endswith("skipped.csv"))
    (project / f"as-{kind}").rename(project / "whole")

    from clipseed.store.export_folder import ExportFolder

    put, calls = ExportFolder.place, []

    def stopped(self: ExportFolder, *given: Any) -> None:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        put(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(ExportFolder, "place", stopped)
        assert export(kind, *words) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert bytes_below(project / f"as-{kind}") != whole
    assert export(kind, *words) == 0
    resumed = bytes_below(project / f"as-{kind}")
    assert {name: text for name, text in resumed.items() if name != ".clipseed/files.txt"} == {
        name: text for name, text in whole.items() if name != ".clipseed/files.txt"
    }
    times = {path: path.stat().st_mtime_ns for path in (project / f"as-{kind}").rglob("*.jpg")}
    assert export(kind, *words) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times

    (project / f"as-{kind}/mine.txt").write_text("mine")
    (project / "pseudo/plain.png").unlink()
    assert export(kind, *words) == 0
    left = bytes_below(project / f"as-{kind}")
    assert left["mine.txt"] == b"mine"
    assert not any("plain" in name for name in left)
    capsys.readouterr()
    assert export(kind, *words, "--ignore", "background") == 1
    assert "--ignore keep then, background now" in capsys.readouterr().err
    assert export(kind, *words, "--ignore", "background", "--overwrite") == 0
    assert bytes_below(project / f"as-{kind}")["mine.txt"] == b"mine"


def test_foreign_folders_are_left_alone(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = bytes_below(project)
    for out in ("photos", "pseudo", "classes.txt"):
        assert main(["export", "pseudo", "--format", "voc", "--out", out]) == 2
        assert out in capsys.readouterr().err
    assert bytes_below(project) == before


def test_links_references_and_what_formats_refuse(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("fiftyone", "--images", "link", "--allow-skipped") == 0
    assert (project / "as-fiftyone/data/plain.jpg").samefile(project / "photos/plain.jpg")
    assert export("fiftyone", "--images", "link", "--allow-skipped") == 0
    assert export("lightly", "--images", "reference", "--allow-skipped") == 0
    data = yaml.safe_load((project / "as-lightly/data.yaml").read_text())
    assert data["train"]["images"] == str(project / "photos")
    assert not list((project / "as-lightly").rglob("*.jpg"))
    capsys.readouterr()
    for kind, words, told in (
        ("ultralytics", ("--images", "link"), "--images copy"),
        ("ultralytics", ("--orient", "stored"), "--orient exif"),
        ("voc", ("--ignore", "drop"), "keep or background"),
        ("voc", ("--parquet",), "--format hf"),
        ("mmseg", ("--images", "reference"), "one; --images copy"),
        ("irn", (), "holds masks"),
        ("coco", ("--threshold", "0.3"), "apply to CAMs"),
        ("coco", ("--background-class", "tree"), "give another name"),
        ("coco", ("--image-folder", "nowhere"), "--image-folder nowhere: no such folder"),
    ):
        assert main(["export", "pseudo", "--format", kind, "--out", "refused", *words]) == 2
        assert told in capsys.readouterr().err
    (project / "pseudo/manifest.json").unlink()
    assert main(["export", "pseudo", "--format", "coco", "--out", "refused"]) == 2
    assert "--classes" in capsys.readouterr().err
    assert main(["export", "pseudo", "--format", "coco", "--classes", "classes.txt", "--out", "refused"]) == 2
    assert "--image-folder" in capsys.readouterr().err
    assert not Path("refused").exists()
    (project / "few.txt").write_text("cat\nbig dog\n")
    words = ("--classes", "few.txt", "--image-folder", "photos", "--out", "refused")
    assert main(["export", "pseudo", "--format", "coco", *words]) == 1
    assert "holds the value 3" in capsys.readouterr().err


def test_foreign_masks_turned_masks_and_the_background(project: Path) -> None:
    """A mask that fits the turned image only lies on it; regions of the background and dropped ones."""
    (project / "pseudo/manifest.json").unlink()
    (project / "pseudo/damaged.png").unlink()
    turned = np.rot90(truth("turned", turned=False), -1)
    write_label_mask(project / "pseudo/turned.png", np.ascontiguousarray(turned))
    words = ("--classes", "classes.txt", "--image-folder", "photos", "--allow-skipped")
    assert export("voc", *words) == 0
    np.testing.assert_array_equal(as_voc(project / "as-voc")["turned"], np.rot90(turned))
    assert export("coco", *words, "--background-class", "nothing", "--ignore", "drop", "--orient", "exif") == 0
    data = json.loads((project / "as-coco/annotations/instances_train.json").read_text())
    assert [(item["id"], item["name"]) for item in data["categories"]] == [(4, "nothing"), *enumerate(NAMES, 1)]
    sizes = {item["file_name"]: (item["height"], item["width"]) for item in data["images"]}
    assert sizes["turned.jpg"] == (50, 30)
    number = next(item["id"] for item in data["images"] if item["file_name"] == "turned.jpg")
    areas = {item["category_id"]: item["area"] for item in data["annotations"] if item["image_id"] == number}
    assert areas == {value or 4: int((turned == value).sum()) for value in np.unique(turned) if value != 255}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_turn_as_pillow_turns_images(orientation: int) -> None:
    from clipseed.data.orientation import turned, turned_back

    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image, exif = Image.fromarray(values), Image.Exif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    image.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(turned(values, orientation), np.array(ImageOps.exif_transpose(image)))
    np.testing.assert_array_equal(turned_back(turned(values, orientation), orientation), values)
    np.testing.assert_array_equal(turned(np.stack([values] * 2), orientation)[1], turned(values, orientation))


def test_cams(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As masks at a threshold, and as the dictionaries of IRNet and CLIP-ES, which those read as they do their own."""
    cams = [make_cam("plain", (2, 0), 0, SIZES["plain"]), make_cam("sub/with blank", (), 1, SIZES["sub/with blank"])]
    write_seeds(project / "cams.h5", cams, {**small_manifest(project / "photos"),
                                           "vocabulary": load_vocabulary("classes.txt").as_dict()})  # fmt: skip
    assert main(["export", "cams.h5", "--format", "coco", "--out", "x"]) == 2
    assert "--threshold or --alpha" in capsys.readouterr().err
    assert main(["export", "cams.h5", "--format", "voc", "--threshold", "0.5", "--out", "x"]) == 0
    np.testing.assert_array_equal(as_voc_mask("x", "plain"), cams[0].label_mask(threshold=0.5))
    assert main(["export", "--format", "irn"]) == 0
    for cam in cams:
        path = project / "export" / f"{cam.id}.npy"
        keys, maps = read_irn(path)
        np.testing.assert_array_equal(keys, cam.classes)
        np.testing.assert_allclose(maps, cam.upsampled(), atol=1e-3)
        theirs = np.load(path, allow_pickle=True).item()
        height, width = cam.size
        assert tuple(theirs["cam"].shape) == (len(keys), -(-height // 4), -(-width // 4))
        assert isinstance(theirs["cam"], torch.Tensor)
        padded = np.pad(theirs["high_res"], ((1, 0), (0, 0), (0, 0)), constant_values=0.5)
        labels = np.pad(theirs["keys"] + 1, (1, 0))[np.argmax(padded, axis=0)]
        assert (labels == cam.label_mask(threshold=0.5)).mean() > 0.99
    np.save(project / "theirs.npy", {"keys": torch.tensor([4]), "cam": torch.ones(1, 2, 3)}, allow_pickle=True)
    assert read_irn(project / "theirs.npy")[1].shape == (1, 2, 3)


def as_voc_mask(root: str, key: str) -> np.ndarray:
    return indices(Path(root) / f"VOCdevkit/VOC2012/SegmentationClass/{key}.png")


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    "content", [{"keys": Malicious()}, Malicious(), [1], {"keys": np.zeros(2), "cam": np.zeros(1)}]
)
def test_dictionaries_that_would_run_code_are_refused(content: Any, project: Path) -> None:
    held = np.empty((), object)
    held[()] = content
    np.save(project / "bad.npy", held, allow_pickle=True)
    with pytest.raises(InputError, match=r"refused|no dictionary|do not fit"):
        read_irn(project / "bad.npy")
    assert not Path("harmed").exists()


def test_brush_code() -> None:
    """Both ways, for noise, long runs, and blocks that hold values one by one; broken codes are refused."""
    rng = np.random.default_rng(1)
    for mask in (
        rng.random((37, 53)) > 0.5, np.zeros((300, 301), bool), np.ones((1, 1), bool), rng.random((5, 7)) > 0.9,
        np.pad(np.ones((200, 150), bool), 60),
    ):  # fmt: skip
        code = list(brush_code(mask))
        np.testing.assert_array_equal(brush_mask(code, mask.shape, "x"), mask)
        for broken in (code[:-3], [*code[:9], *code[9:][::-1]][: len(code) - 4], [300, *code], code[:3]):
            with pytest.raises(InputError):
                brush_mask(broken, mask.shape, "x")
        with pytest.raises(InputError, match="for an image of"):
            brush_mask(code, (mask.shape[0] + 1, mask.shape[1]), "x")
    # Eight values one by one: 0 0 0 255, 0 0 0 255, as Label Studio stores what does not repeat.
    bits = f"{8:032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}" + "000" + f"{7:03b}" + ("0" * 24 + "1" * 8) * 2
    packed = np.packbits([int(bit) for bit in bits])
    np.testing.assert_array_equal(brush_mask(packed.tolist(), (1, 2), "x"), [[True, True]])


def test_corrected_masks_and_tags_come_back(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What annotators exported is ground truth, something to learn from, and image-level labels."""
    (project / "pseudo/damaged.png").unlink()
    assert export("labelstudio", "--allow-skipped") == 0
    assert export("cvat", "--allow-skipped") == 0
    tasks = json.loads((project / "as-labelstudio/tasks.json").read_text())
    corrected = []
    for number, task in enumerate(tasks):
        if task["data"]["id"] == "drawn":
            corrected.append({**task, "id": number, "annotations": []})
            continue
        result = task["predictions"][0]["result"]
        if task["data"]["id"] == "plain":  # corrected: a rectangle of tree over it, and a triangle of what is ignored
            common = {key: result[0][key] for key in ("original_width", "original_height", "to_name")}
            box = {"x": 25.0, "y": 50.0, "width": 50.0, "height": 25.0, "rectanglelabels": ["tree"]}
            corner = {"points": [[0, 0], [25, 0], [0, 25]], "polygonlabels": ["ignore"]}
            result = [*result, {"type": "rectanglelabels", "value": box, **common},
                      {"type": "polygonlabels", "value": corner, **common}]  # fmt: skip
        old = {"result": [], "updated_at": "2026-01-01T00:00:00Z"}
        new = {"result": result, "updated_at": "2026-02-01T00:00:00Z"}
        draft = {"result": [], "was_cancelled": True, "updated_at": "2026-03-01T00:00:00Z"}
        corrected.append({**task, "id": number, "annotations": [new, old, draft]})
    (project / "project.json").write_text(json.dumps(corrected))
    vocabulary = load_vocabulary("classes.txt")
    source = LabelStudioMasks(project / "project.json", vocabulary)
    assert source.ids() == SIZES.keys() - {"drawn"}
    expected = truth("plain", turned=False).copy()
    expected[20:30, 14:42] = 3
    found = source.read("plain")
    triangle = np.add.outer((np.arange(10) + 0.5) / 10, (np.arange(14) + 0.5) / 14)
    assert (found[:10, :14][triangle < 0.9] == 255).all()
    np.testing.assert_array_equal(found[:10, :14][triangle > 1.1], expected[:10, :14][triangle > 1.1])
    np.testing.assert_array_equal(found[10:], expected[10:])

    for key in ("wrong size", "gone", "drawn"):
        (project / "pseudo" / f"{key}.png").unlink()
    words = ("--pred-ignore", "exclude", "--json")
    capsys.readouterr()
    assert main(["evaluate", "pseudo", "--gt", "project.json", *words]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == 3
    assert 0.5 < scores["miou"] < 1
    assert main(["evaluate", "pseudo", "--gt", "as-cvat", *words]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["miou"], scores["images"]) == (1.0, 3)

    words = ("--classes", "classes.txt", "--labels", "project.json", "--masks", "project.json", "--weights", "toy")
    small = ("--steps", "1", "--batch-size", "2", "--crop", "32", "--width", "8", "--blocks", "1", "--heads", "1")
    folder = ("--dataset", "folder", "--images", "photos", "--json", "--rfm-layers", "2")
    assert main(["train", "weclip", *folder, *words, *small]) in (0, 3)
    learned = json.loads(capsys.readouterr().out)
    assert learned["images"] == 3
    assert set(learned["left_out"]) == {"drawn", "damaged", "wrong size"}

    predicting = ["predict", "weclip.safetensors", "--images", "photos", "--permissive"]
    assert main(predicting) == 0
    with monkeypatch.context() as patched:
        patched.setattr(licenses, "_OWN", licenses.UNKNOWN)
        assert main(predicting) == 2
    assert "is not known" in capsys.readouterr().err

    onward = ("--classes", "classes.txt", "--image-folder", "photos", "--format", "voc")
    assert main(["export", "project.json", *onward, "--out", "onward"]) == 0
    np.testing.assert_array_equal(as_voc_mask("onward", "turned"), truth("turned", turned=False))
    np.testing.assert_array_equal(as_voc_mask("onward", "plain"), found)
    assert main(["export", "project.json", *onward[2:], "--out", "other"]) == 2

    labels = read_labels(project / "project.json", vocabulary)
    assert {key: {k + 1 for k in row} for key, row in labels.items()} == {
        key: set(np.unique(source.read(key)).tolist()) - {0, 255} for key in source.ids()
    }
    (project / "cvat.xml").write_text(
        '<?xml version="1.0"?><annotations><meta><task><labels><label><name>cat</name></label></labels></task></meta>'
        '<image id="0" name="plain.jpg" width="1" height="1"><tag label="big dog" source="manual"/>'
        '<polygon label="cat" points="1,1;2,2"/><mask label="background" rle="1"/></image>'
        '<image id="1" name="sub/with blank.jpg"/></annotations>'
    )
    assert read_labels(project / "cvat.xml", vocabulary) == {"plain": (1, 0), "sub/with blank": ()}
    (project / "bomb.xml").write_text('<!DOCTYPE a [<!ENTITY b "c">]><annotations/>')
    with pytest.raises(InputError, match="document type"):
        read_labels(project / "bomb.xml", vocabulary)


def test_what_annotation_tools_may_get_wrong(project: Path) -> None:
    vocabulary = load_vocabulary("classes.txt")
    (project / "pseudo/damaged.png").unlink()
    assert export("cvat", "--allow-skipped") == 0
    label_map = project / "as-cvat/labelmap.txt"
    text = label_map.read_text()
    for broken, told in (
        (text.replace("cat:", "cow:"), "unknown class 'cow'"), (text.replace("cat:128,0,0::\n", ""), "does not name"),
        (text.replace("0,128,0", "128,0,0"), "has the color of"), (text.replace("128,0,0", "128,0"), "red,green,blue"),
    ):  # fmt: skip
        label_map.write_text(broken)
        with pytest.raises(InputError, match=told):
            CvatMasks(project / "as-cvat", vocabulary).read("plain")
    size = {"original_width": 4, "original_height": 2}
    brush = {"type": "brushlabels", **size, "value": {"format": "rle", "rle": [1, 2], "brushlabels": ["cat"]}}
    for results, told in (
        ([brush], "cut off"),
        ([{**brush, "type": "keypointlabels"}], "regions are"),
        ([{**brush, "value": {"brushlabels": []}}], "it needs one"),
        ([{**brush, "value": {"brushlabels": ["cat"]}}], "a brush without"),
        ([{**brush, "original_width": 10**9}], "pixels"),
        ([{"type": "polygonlabels", **size, "value": {"points": [[1, 1]], "polygonlabels": ["cat"]}}], "three points"),
    ):
        data = [{"data": {"image": "/data/upload/3/0a1b2c3d-my%20cat.jpg"}, "annotations": [{"result": results}]}]
        (project / "project.json").write_text(json.dumps(data))
        source = LabelStudioMasks(project / "project.json", vocabulary)
        assert source.ids() == {"my cat"}
        with pytest.raises(InputError, match=told):
            source.read("my cat")
    (project / "project.json").write_text(json.dumps([{"image": "x", "id": 1}]))
    with pytest.raises(InputError, match="JSON-MIN"):
        LabelStudioMasks(project / "project.json", vocabulary)


def test_drawn_images(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The built-in world has no files: its scenes become some, without loss where the format allows it."""
    from clipseed.data.toy.dataset import toy_mask, toy_set

    scenes = toy_set(load_vocabulary("toy"), 5, 2)
    for sample in scenes.samples:
        (project / "toy").mkdir(exist_ok=True)
        write_label_mask(project / "toy" / f"{sample.id}.png", toy_mask(5, sample.id))
    manifest = {"kind": "crf", "options": {}, "vocabulary": scenes.vocabulary.as_dict(), "dataset": scenes.manifest}
    (project / "toy/manifest.json").write_text(json.dumps(manifest))
    for kind in ("mmseg", "coco"):
        assert main(["export", "toy", "--format", kind, "--out", f"toy-{kind}"]) == 0
    assert main(["export", "toy", "--format", "coco", "--images", "link", "--out", "x"]) == 2
    first = scenes.samples[0]
    for path in ("toy-mmseg/img_dir/train", "toy-coco/images/train"):
        stored = np.asarray(Image.open(project / path / f"{first.id}.png"))
        np.testing.assert_array_equal(stored, np.asarray(scenes.reader(first)))


def test_every_format_is_tested(project: Path) -> None:
    assert {*READERS, "yolo-polygons", "irn"} == set(WRITERS)
    with pytest.raises(InputError, match="neither CAMs nor"):
        (project / "empty").mkdir()
        run_export(ExportOptions(Path("empty"), Path("x"), "voc"))
