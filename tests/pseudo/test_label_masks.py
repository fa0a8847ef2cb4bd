"""From CAMs to label masks pixel by pixel: the background rule, the arg-max and the min-max beside plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import clipseed
from clipseed.minmax import minmax
from clipseed.pseudo import Background, RuleOptions, decide, label_mask, label_scores, strongest, thresholding
from clipseed.pseudo.pixels import unit_range
from clipseed.pseudo.seeding import PRESETS, seed_from_masks
from clipseed.segments import enlarged

from helpers.records import GRID, SIZE, make_cam, rectangles

scores_of = hnp.arrays(
    np.float32, st.tuples(st.integers(0, 3), st.just(3), st.just(4)), elements=st.floats(0, 1, width=16)
)
CLASSES = (7, 0, 19)


def plain_labels(scores: np.ndarray, background: Any) -> list[list[int]]:
    """A pixel at a time: the first of the largest classes, where it is larger than what the background scores there."""
    found = np.zeros(scores.shape[1:], int)
    for row in range(scores.shape[1]):
        for column in range(scores.shape[2]):
            best, label = -1.0, 0
            for k, score in enumerate(scores[:, row, column].tolist()):
                if score > best:
                    best, label = score, CLASSES[k] + 1
            if best > background(max(best, 0.0)):
                found[row, column] = label
    return found.tolist()


@settings(max_examples=100, deadline=None)
@given(scores=scores_of, threshold=st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.9]))
def test_a_threshold_is_compared_as_it_was_given(scores: np.ndarray, threshold: float) -> None:
    found = label_scores(scores, CLASSES[: len(scores)], Background("threshold", threshold), exact=True)
    assert found.labels.tolist() == plain_labels(scores, lambda best: threshold)
    assert found.labels.dtype == np.uint8


def test_a_threshold_is_not_rounded_to_the_scores() -> None:
    """0.3 is smaller than the float32 next to it; a score that equals the latter is larger than 0.3."""
    cam = make_cam("a", (4,), 0, (1, 1))
    (just,) = (clipseed.Cam(cam.id, cam.classes, np.full((1, 1, 1), 0.3, np.float32), (1, 1)),)
    assert float(just.maps[0, 0, 0]) > 0.3
    assert just.label_mask(threshold=0.3).tolist() == [[5]]
    assert just.label_mask(threshold=0.3, released=True).tolist() == [[0]]  # both are 0.3 in half precision


@settings(max_examples=100, deadline=None)
@given(scores=scores_of, alpha=st.sampled_from([0.5, 1.0, 2.0, 3.0]))
def test_powers(scores: np.ndarray, alpha: float) -> None:
    """In double precision, where no rounding can decide ties otherwise than the loop."""
    wide = scores.astype(np.float64)
    background = Background("power", alpha)
    found = label_scores(wide, CLASSES[: len(scores)], background)
    assert found.labels.tolist() == plain_labels(wide, lambda best: (1 - best) ** alpha)
    stacked = background.add_to(wide)
    np.testing.assert_array_equal(found.confidence, stacked.max(axis=0))
    np.testing.assert_array_equal(found.labels > 0, stacked.argmax(axis=0) > 0)


@settings(max_examples=50, deadline=None)
@given(scores=scores_of.filter(len))
def test_a_background_that_is_given_is_the_first_row(scores: np.ndarray) -> None:
    found = label_scores(scores, CLASSES[: len(scores) - 1], Background("given"))
    values = np.array([0, *(k + 1 for k in CLASSES)])
    np.testing.assert_array_equal(found.labels, values[scores.argmax(axis=0)])
    np.testing.assert_array_equal(found.confidence, scores.max(axis=0))
    np.testing.assert_array_equal(found.sure(0.5) == 255, scores.max(axis=0) < 0.5)
    assert found.sure(None) is found.labels


@pytest.mark.parametrize("kind", ["power", "threshold"])
@pytest.mark.parametrize("half", [False, True])
def test_half_precision_stays_half(kind: Any, half: bool) -> None:
    scores = np.random.default_rng(0).random((2, 3, 4)).astype(np.float16 if half else np.float32)
    background = Background(kind, 0.3)
    assert background.add_to(scores).dtype == scores.dtype
    assert background.score(scores[0]).dtype == scores.dtype


def test_exponents_are_those_of_half_precision() -> None:
    """Each operation of CLIP-ES's rule rounded to half precision, as NumPy does it for the released code."""
    cam = make_cam("a", (3, 8), 5)
    maps = cam.upsampled().astype(np.float16)
    for alpha in (1, 2):
        ground = np.power(np.float16(1) - maps.max(axis=0, keepdims=True), alpha)
        best = np.concatenate([ground, maps]).argmax(axis=0)
        np.testing.assert_array_equal(cam.label_mask(alpha=alpha), np.array([0, 4, 9])[best])


def test_no_class() -> None:
    cam = make_cam("a", (), 0)
    for given_ in ({"threshold": 0.0}, {"alpha": 1.0}):
        mask = cam.label_mask(**given_)
        assert (mask.shape, mask.dtype, mask.any()) == (SIZE, np.uint8, False)


def test_the_strongest() -> None:
    row, score = strongest(np.array([[0.5, 0.1], [0.5, 0.3]], np.float16))
    assert row.tolist() == [0, 1]
    assert (score.dtype, score.tolist()) == (np.float16, [0.5, pytest.approx(0.3, abs=1e-3)])


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({}, "give one of them"),
        ({"threshold": 0.1, "alpha": 1.0}, "give one of them"),
        ({"threshold": 1.0}, "threshold 1.0: give a background score from 0 to below 1"),
        ({"threshold": -0.1}, "from 0 to below 1"),
        ({"threshold": float("nan")}, "from 0 to below 1"),
        ({"alpha": 0.0}, "alpha 0.0: give a positive exponent"),
        ({"alpha": float("inf")}, "positive exponent"),
    ],
)
def test_impossible_backgrounds(given_: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cam("a", (1,), 0).label_mask(**given_)


def test_with_segments() -> None:
    """The same function: one rule for segments, none for images without any."""
    cam, segments = make_cam("a", (7, 2), 0), rectangles(GRID, 1)
    rules = decide(RuleOptions(), "voc", label_map=False, asked=False)
    wanted = seed_from_masks(cam.maps, segments, cam.classes, PRESETS["voc-coarse"]).labels
    np.testing.assert_array_equal(label_mask(cam, rules, segments), enlarged(wanted, SIZE))
    assert not label_mask(cam, rules).any()
    prompted = decide(RuleOptions("prompted"), "voc", label_map=False, asked=True)
    assert not label_mask(cam, prompted, segments).any()  # none was prompted for a class
    pixels = thresholding(threshold=0.4)
    np.testing.assert_array_equal(label_mask(cam, pixels, segments), cam.label_mask(threshold=0.4))


@settings(max_examples=60, deadline=None)
@given(
    maps=hnp.arrays(np.float32, (2, 3, 4), elements=st.floats(-1, 1, width=32)),
    scale=st.sampled_from([1.0, 1e-7, 1e-30]),
)
def test_min_max(maps: np.ndarray, scale: float) -> None:
    """One formula for NumPy and torch, written down map by map."""
    maps = maps * np.float32(scale)
    for released in (False, True):
        for ours, map_ in zip(unit_range(maps, paper=released), maps, strict=True):
            kept = np.where(map_ > 0, map_, np.float32(0))
            span = kept.max() - kept.min()
            divisor = span + np.float32(1e-7) if released else span
            np.testing.assert_array_equal(ours, (kept - kept.min()) / divisor if divisor else np.zeros_like(kept))
    tensor = torch.from_numpy(maps).clamp_min(0)
    np.testing.assert_array_equal(minmax(tensor).numpy(), unit_range(maps))
