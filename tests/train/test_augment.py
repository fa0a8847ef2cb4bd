"""Augmentation: an image and what lies on it stay together; Pillow is the oracle of resizing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch import Tensor
from torchvision.tv_tensors import Image, Mask

from clipseed.train.augment import Augmentation, Scores


def halves(height: int, width: int) -> tuple[Image, Mask, Scores]:
    """Left half red, of class 1 and sure; right half blue and background."""
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    pixels[0, :, : width // 2], pixels[2, :, width // 2 :] = 255, 255
    left = torch.arange(width).expand(height, width) < width // 2
    return Image(pixels), Mask(left.to(torch.uint8)), Scores(torch.stack([left.float(), 1 - left.float()]))


def test_all_parts_stay_together() -> None:
    fill = (124, 116, 104)
    augmentation = Augmentation(64, (0.5, 1.5), fill=fill)
    kinds = set()
    corners = set()
    for seed in range(120):
        image, labels, scores = augmentation(seed, *halves(40, 60))
        assert [tuple(part.shape) for part in (image, labels, scores)] == [(3, 64, 64), (64, 64), (2, 64, 64)]
        assert (image.dtype, labels.dtype, scores.dtype) == (torch.uint8, torch.uint8, torch.float32)
        assert not any(isinstance(part, (Image, Mask, Scores)) for part in (image, labels, scores))
        inside = labels != 255
        assert (image[:, ~inside] == torch.tensor(fill, dtype=torch.uint8)[:, None]).all()
        assert (scores[:, ~inside] == 0).all()
        torch.testing.assert_close(scores.sum(dim=0)[inside], torch.ones(int(inside.sum())))
        red = image[0].float() / 255
        assert (((red > 0.5) == (labels == 1)) | ((red - 0.5).abs() < 0.3))[inside].all()
        assert ((scores[0] - red).abs() < 0.02)[inside].all()
        rows, columns = torch.nonzero(inside).T
        assert int(inside.sum()) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)  # a rectangle
        kinds.add((int(labels[rows[0], columns.min()]), int(inside.sum() > 2400)))
        corners.add((int(rows.min()), int(columns.min())))
    assert len(kinds) == 4  # mirrored and not, larger and smaller
    assert len(corners) > 40


def test_seed_alone_decides() -> None:
    augmentation = Augmentation(48)
    before = torch.random.get_rng_state()
    torch.manual_seed(1)
    first = augmentation(7, *halves(40, 60))
    torch.manual_seed(2)
    again = augmentation(7, *halves(40, 60))
    other = augmentation(8, *halves(40, 60))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    alone = augmentation(7, halves(40, 60)[0])
    assert torch.equal(alone[0], first[0])  # what else lies on an image does not move it
    torch.random.set_rng_state(before)
    augmentation(9, *halves(40, 60))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("scale", [0.37, 0.5, 1.0, 1.4])
def test_resizing_is_that_of_pillow(scale: float) -> None:
    """Nearest neighbours exactly; bilinear, with its antialiasing, within a grey level of rounding."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (53, 71, 3), dtype=np.uint8)
    labels = rng.integers(0, 200, (53, 71), dtype=np.uint8)
    size = (int(53 * scale), int(71 * scale))  # odd sides: no new pixel's centre lies on a border
    augmentation = Augmentation(100, (scale, scale), mirror=0.0)
    image, mask = augmentation(0, Image(torch.from_numpy(pixels).permute(2, 0, 1)), Mask(torch.from_numpy(labels)))
    inside = mask != 255
    assert int(inside.sum()) == size[0] * size[1]
    cut = image[:, inside].view(3, *size).permute(1, 2, 0).numpy()
    expected = np.asarray(Pillow.fromarray(pixels).resize(size[::-1], Pillow.Resampling.BILINEAR))
    assert np.abs(cut.astype(int) - expected).max() <= 1
    nearest = np.asarray(Pillow.fromarray(labels).resize(size[::-1], Pillow.Resampling.NEAREST))
    np.testing.assert_array_equal(mask[inside].view(size).numpy(), nearest)


def test_places_are_uniform() -> None:
    """Where a small image lies in the crop, and where a crop lies in a large image: every offset equally often."""

    def offsets(side: int, crop: int) -> np.ndarray:
        augmentation = Augmentation(crop, (1.0, 1.0), mirror=0.0)
        numbers = Mask(torch.arange(side, dtype=torch.uint8).expand(side, side))
        rows = [augmentation(seed, numbers)[0].amin(dim=0) for seed in range(1500)]
        return np.bincount([int(row[0]) if side >= crop else int(row.argmin()) for row in rows])

    for counts in (offsets(12, 8), offsets(8, 12)):
        assert len(counts) == 5
        assert counts.min() > 0.75 * 300


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 400), (3, 2)])
def test_the_smallest_images(height: int, width: int) -> None:
    image, mask = Augmentation(32, (0.1, 0.2))(
        3,
        Image(torch.zeros(3, height, width, dtype=torch.uint8)),
        Mask(torch.zeros(height, width, dtype=torch.uint8)),
    )
    assert isinstance(image, Tensor)
    assert 1 <= int((mask == 0).sum()) <= 32
