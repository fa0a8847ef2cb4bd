"""The order of images: every one once before any again, decided by seed and position alone."""

from __future__ import annotations

import numpy as np
import pytest

from clipseed.train.data import Layout
from clipseed.train.sampler import image_at, mixed, seed_at


@pytest.mark.parametrize("images", [1, 2, 23])
def test_every_image_once_before_any_again(images: int) -> None:
    row = [image_at(position, images, 5) for position in range(4 * images)]
    for epoch in range(4):
        assert sorted(row[epoch * images : (epoch + 1) * images]) == list(range(images))
    assert row == [image_at(position, images, 5) for position in range(4 * images)]
    if images > 2:
        assert row[:images] != row[images : 2 * images]
        assert row[:images] != [image_at(position, images, 6) for position in range(images)]


def test_seeds_of_samples_differ() -> None:
    seeds = {seed_at(position, seed) for position in range(2000) for seed in range(3)}
    assert len(seeds) == 6000
    assert max(seeds) < 2**63
    assert np.mean([seed % 2 for seed in seeds]) == pytest.approx(0.5, abs=0.03)
    assert mixed(1, 2) != mixed(2, 1)


@pytest.mark.parametrize(("parts", "processes"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_a_batch_is_shared_without_rest(parts: int, processes: int) -> None:
    """However it is cut, a step sees the same positions, each once."""
    for step in (0, 7):
        row = []
        for part in range(parts):
            for rank in range(processes):
                row += Layout(0, 12, parts, processes, rank).positions(step, part)
        assert row == list(range(12 * step, 12 * step + 12))
