"""Images and label masks as training data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import clipseed
from clipseed.cli.main import main
from clipseed.data.toy.world import lay_out
from clipseed.errors import InputError
from clipseed.store.label_masks import write_label_mask
from clipseed.store.toy_devkit import save_devkit
from clipseed.train.augment import Augmentation
from clipseed.train.pseudo_labels import PseudoLabels

SEED = 9000
CROP = Augmentation(96, (0.5, 1.5))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    save_devkit(folder, SEED, 6)
    return folder


def test_samples_depend_on_index_and_seed_alone(scenes: Path) -> None:
    data = PseudoLabels(scenes / "JPEGImages", scenes / "SegmentationClass", CROP)
    first, again = data.sample(3, 5), data.sample(3, 5)
    assert [tuple(part.shape) for part in first] == [(3, 96, 96), (96, 96)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(data.sample(3, 6)[0], first[0])
    assert not torch.equal(data.sample(2, 5)[0], first[0])
    pixels, labels = data.collate([first, again])
    assert (tuple(pixels.shape), tuple(labels.shape)) == ((2, 3, 96, 96), (2, 96, 96))
    whole = PseudoLabels(scenes / "JPEGImages", scenes / "SegmentationClass", Augmentation(288, (1.0, 1.0), mirror=0.0))
    scene = lay_out(SEED, 3)
    pixels, labels = whole.sample(3, 0)
    inside = labels != 255
    np.testing.assert_array_equal(labels[inside].view(scene.size).numpy(), scene.mask())
    np.testing.assert_array_equal(pixels[:, inside].view(3, *scene.size).permute(1, 2, 0).numpy(), scene.image())


def test_confidence_of_scores(scenes: Path, tmp_path: Path) -> None:
    """The strongest of the classes, or of the background ``1 - strongest``; 0 where there is no image."""
    words = ["cam", "--dataset", "voc", "--root", str(scenes), "--classes", "toy", "--weights", "toy"]
    assert main([*words, "--limit", "2", "--device", "cpu", "--quiet", "--out", str(tmp_path / "cams.h5")]) == 0
    (tmp_path / "masks").mkdir()
    for index in range(2):
        write_label_mask(tmp_path / "masks" / f"toy_{index:06d}.png", lay_out(SEED, index).mask())
    data = PseudoLabels(scenes / "JPEGImages", tmp_path / "masks", CROP, tmp_path / "cams.h5")
    with clipseed.open_cams(tmp_path / "cams.h5") as seeds:
        strongest = seeds["toy_000001"].upsampled().max(axis=0)
    np.testing.assert_array_equal(data.confidence("toy_000001"), np.maximum(strongest, 1 - strongest))
    for seed in range(5):
        _, labels, confidence = data.sample(1, seed)
        assert float(confidence[labels != 255].min()) > 0.499
        assert float(confidence.max()) <= 1
        assert (confidence[labels == 255] == 0).all()
    with pytest.raises(InputError, match="4 of 6 masks have no image or scores: toy_000002"):
        PseudoLabels(scenes / "JPEGImages", scenes / "SegmentationClass", CROP, tmp_path / "cams.h5")


def test_what_does_not_fit_is_named(scenes: Path, tmp_path: Path) -> None:
    write_label_mask(tmp_path / "toy_000000.png", np.zeros((8, 8), np.uint8))
    data = PseudoLabels(scenes / "JPEGImages", tmp_path, CROP)
    with pytest.raises(InputError, match=r"toy_000000.png: size \(8, 8\), but its image has"):
        data.sample(0, 0)
    write_label_mask(tmp_path / "nowhere.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(InputError, match="1 of 2 masks have no image: nowhere"):
        PseudoLabels(scenes / "JPEGImages", tmp_path, CROP)


def test_a_changed_mask_is_noticed(tmp_path: Path) -> None:
    save_devkit(tmp_path, SEED, 2)
    folders = (tmp_path / "JPEGImages", tmp_path / "SegmentationClass")
    before = PseudoLabels(*folders, CROP).digest()
    assert PseudoLabels(*folders, CROP).digest() == before
    moved = [folder.rename(folder.with_name(f"moved-{folder.name}")) for folder in folders]
    assert PseudoLabels(*moved, CROP).digest() == before
    mask = lay_out(SEED, 1).mask()
    mask[0, 0] ^= 1
    write_label_mask(moved[1] / "toy_000001.png", mask)
    assert PseudoLabels(*moved, CROP).digest() != before
