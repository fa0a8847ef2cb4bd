"""``clipseed predict``: masks, scores, resuming, shards, refined pseudo-labels, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clipseed
from clipseed.cli.main import main
from clipseed.data.toy.dataset import HELD_OUT_SEED, TRAIN_SEED, toy_id, toy_scene
from clipseed.refine.crf import WECLIP, clip_es_unary, dense_crf
from clipseed.store.label_masks import read_label_mask
from clipseed.store.toy_devkit import save_devkit
from clipseed.train.inference import ViewOptions

from helpers.images import photo
from helpers.weclip import TINY

PREDICT = ["predict", "w.safetensors", "--dataset", "toy", "--limit", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "w.safetensors"
    assert main([*TINY, "--out", str(path)]) == 0
    return path


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(trained, tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def masks(folder: str) -> dict[str, np.ndarray]:
    return {path.stem: read_label_mask(path) for path in sorted(Path(folder).glob("*.png"))}


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.png"))}


def image(index: int) -> Image.Image:
    return Image.fromarray(toy_scene(HELD_OUT_SEED, toy_id(index)).image())


def test_masks_are_those_of_the_segmenter(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PREDICT, "--scales", "1,0.75", "--flip", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["images"], told["computed"], told["out"]) == (5, 5, "predictions")
    segmenter = clipseed.load_segmenter("w.safetensors", device="cpu")
    for index, (key, found) in enumerate(masks("predictions").items()):
        assert key == toy_id(index)
        np.testing.assert_array_equal(found, segmenter.predict(image(index), ViewOptions((1.0, 0.75), flip=True)))
    images = [image(0), image(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT), image(1), image(0)]
    for one, found in zip(images, segmenter.predict(images), strict=True):
        np.testing.assert_array_equal(found, segmenter.predict(one))
    assert segmenter.predict([]) == []
    assert main(["evaluate", "predictions", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 5
    assert main([*PREDICT, "--scales", "1,0.75", "--flip", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["computed"] == 0
    assert main([*PREDICT, "--scales", "1"]) == 1
    assert "predictions was made with other settings" in capsys.readouterr().err


def test_output_does_not_depend_on_batches_shards_or_interruptions(here: Path) -> None:
    assert main([*PREDICT, "--soft", "soft.h5", "-q"]) == 0
    expected = masks("predictions")
    assert main([*PREDICT, "--out", "one", "--batch-size", "1", "--workers", "1", "-q"]) == 0
    for part in ("1/2", "2/2"):
        assert main([*PREDICT, "--out", "parts", "--soft", "parts.h5", "--shard", part, "-q"]) == 0
    for folder in ("one", "parts"):
        for key, found in masks(folder).items():
            assert (found == expected[key]).mean() > 0.9999
    (here / "predictions" / f"{toy_id(2)}.png").unlink()
    before = files("predictions")
    assert main([*PREDICT, "--soft", "soft.h5", "-q"]) == 0
    after = files("predictions")
    assert after.keys() == {f"{key}.png" for key in expected}
    assert {key: value for key, value in after.items() if key in before} == before
    assert (masks("predictions")[toy_id(2)] == expected[toy_id(2)]).mean() > 0.9999


def test_scores_are_cams_that_later_commands_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PREDICT, "--soft", "soft.h5", "-q"]) == 0
    segmenter = clipseed.load_segmenter("w.safetensors", device="cpu")
    with clipseed.open_cams("soft.h5") as cams:
        assert len(cams) == 5
        for index in range(5):
            cam, probabilities = cams[toy_id(index)], segmenter.scores(image(index))
            assert set(np.unique(masks("predictions")[cam.id])) - {0} <= {int(k) + 1 for k in cam.classes}
            for k, wide in zip(cam.classes, cam.upsampled(), strict=True):
                assert np.abs(wide - probabilities[k + 1]).mean() < 0.05  # of coarse maps and coarse logits
    capsys.readouterr()
    assert main(["evaluate", "soft.h5", "--json"]) == 0
    assert main(["crf", "soft.h5", "--out", "crf", "--device", "cpu", "--iterations", "1", "-q"]) == 0


def test_crf_has_the_published_constants(here: Path) -> None:
    assert main([*PREDICT, "--limit", "1", "--crf", "--paper", "-q"]) == 0
    segmenter = clipseed.load_segmenter("w.safetensors", device="cpu")
    view = ViewOptions((1.0, 0.75), flip=True, max_side=512, released=True)
    unary = torch.from_numpy(clip_es_unary(segmenter.scores(image(0), view)))
    (posterior,) = dense_crf([unary], [torch.from_numpy(np.asarray(image(0)).copy())], WECLIP)
    ours = masks("predictions")[toy_id(0)]
    assert (ours == posterior.argmax(dim=0).numpy()).mean() > 0.9999


def test_refined_pseudo_labels(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the images' own classes occur; labels from the data set or a file; corrected labels are taken up."""
    assert main([*PREDICT, "--labels", "own", "--soft", "soft.h5", "-q"]) in (0, 3)
    for index, found in enumerate(masks("predictions").values()):
        labels = toy_scene(HELD_OUT_SEED, toy_id(index)).labels
        assert set(np.unique(found)) <= {0, *(k + 1 for k in labels)}
        with clipseed.open_cams("soft.h5") as cams:
            assert tuple(cams[toy_id(index)].classes) == labels
            assert 0 <= cams[toy_id(index)].maps.min() <= cams[toy_id(index)].maps.max() <= 1
    save_devkit(here / "devkit", count=3)
    Path("labels.csv").write_text(f"id,label\n{toy_id(0)},boat\n{toy_id(1)},\n")
    words = ["predict", "w.safetensors", "--images", "devkit/JPEGImages", "--labels", "labels.csv", "--device", "cpu",
             "--out", "refined"]  # fmt: skip
    assert main(words) == 3  # one image has no labels
    assert "no labels are given for it" in capsys.readouterr().err
    assert set(np.unique(masks("refined")[toy_id(0)])) <= {0, 1}
    assert not masks("refined")[toy_id(1)].any()
    Path("labels.csv").write_text(f"id,label\n{toy_id(0)},cup\n{toy_id(1)},\n")
    assert main(words) == 3
    assert set(np.unique(masks("refined")[toy_id(0)])) <= {0, 5}


def test_any_folder_of_images(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No labels, no classes; one broken image is skipped; tiny and odd sizes work."""
    Path("photos").mkdir()
    for number, size in enumerate([(48, 64), (1, 1), (5, 300), (33, 47)]):
        photo(number, *size).save(f"photos/{number}.png")
    Path("photos/broken.jpg").write_bytes(b"\xff\xd8\xff")
    words = ["predict", "w.safetensors", "--images", "photos", "--device", "cpu", "--soft", "soft.h5"]
    assert main(words) == 3
    assert "1 image skipped: broken" in capsys.readouterr().err
    assert {key: found.shape for key, found in masks("predictions").items()} == {
        "0": (48, 64), "1": (1, 1), "2": (5, 300), "3": (33, 47),
    }  # fmt: skip
    photo(9, 48, 64).save("photos/0.png")  # replaced: made again
    before = files("predictions")
    assert main(words) == 3
    assert {key for key, value in files("predictions").items() if value != before[key]} <= {"0.png"}
    assert "1 image was replaced (0)" in capsys.readouterr().err


def test_a_devkit_of_other_classes_needs_no_labels(here: Path) -> None:
    save_devkit(here / "devkit", seed=TRAIN_SEED, count=2)
    words = ["predict", "w.safetensors", "--dataset", "voc", "--root", "devkit", "--split", "train", "--device", "cpu"]
    assert main([*words, "-q"]) == 0
    assert len(masks("predictions")) == 2


def test_bad_input(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("labels.csv").write_text("id,label\n0,zebra\n")
    Path("photos").mkdir()
    photo(0, 48, 64).save("photos/0.png")
    cases: list[tuple[list[str], int, str]] = [
        (["predict", "w.safetensors"], 2, "name the images: --dataset, or --images DIR"),
        (["predict", "gone.safetensors", "--images", "photos"], 1, "gone.safetensors"),
        ([*PREDICT, "--classes", "voc"], 2, "--classes voc: 20 classes, w.safetensors was trained on 10"),
        ([*PREDICT, "--scales", "99"], 2, "--scales: give factors between 0.1 and 8"),
        ([*PREDICT, "--labels", "own", "--flip"], 2, "refined pseudo-labels come from one view"),
        ([*PREDICT, "--soft", "predictions"], 2, "--out and --soft are both predictions"),
        (["predict", "w.safetensors", "--images", "photos", "--labels", "own"], 2, "a folder has no labels"),
        (["predict", "w.safetensors", "--images", "photos", "--labels", "labels.csv"], 1, "unknown class 'zebra'"),
        ([*PREDICT, "--weights", "gone.pt"], 1, "--weights gone.pt: no such file"),
    ]
    for words, code, message in cases:
        assert main(words) == code, words
        assert message in capsys.readouterr().err, words
