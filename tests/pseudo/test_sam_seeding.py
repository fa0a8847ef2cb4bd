"""CAMs from masks, mask voting, pixel CAMs and prompts: the released code's arrays, plain loops, and odd input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipseed.pseudo.background import Background
from clipseed.pseudo.cam_prompts import PADDING, box_prompts, peaks, point_prompts
from clipseed.pseudo.pixels import label_pixels, unit_range
from clipseed.pseudo.pooling import mask_sums
from clipseed.pseudo.prompted import label_from_prompted_masks
from clipseed.pseudo.seeding import PRESETS, SeedingOptions, seed_from_masks
from clipseed.pseudo.voting import VotingOptions, vote
from clipseed.refine.affinity import balance
from clipseed.refine.caa import FMA_WSSS, CaaOptions, caa, caa_of_raw
from clipseed.segments import Segments, from_masks

from helpers.golden import FMA_WSSS_DATA, names, with_meta

NORMALISE = {True: "clip", False: "signed", "double_norm": "double", "no_norm": "none"}
KEYS = {"level_bigger": "level", "level_smaller": "-level", "conf_bigger": "confidence", "area_smaller": "-area"}


def golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return with_meta(FMA_WSSS_DATA, name)


def with_levels(arrays: dict[str, np.ndarray]) -> Segments:
    proposals = from_masks(arrays["masks"])
    assert len(proposals) == len(arrays["masks"])
    return replace(proposals, level=arrays["levels"].astype(np.int8))


def background_of(method: dict[str, Any]) -> Background:
    kind = {"pow": "power", "thresh": "threshold", "no_bg": "given", "alpha_bg": "given"}[method["method"]]
    return Background(kind, method.get("pow", method.get("thresh", method.get("alpha", 1))))


def released(combo: dict[str, Any]) -> SeedingOptions:
    keys = [combo["priority"]] if isinstance(combo["priority"], str) else combo["priority"]
    return SeedingOptions(
        background=background_of(combo["bg_method"]),
        normalise=NORMALISE[combo["norm_first"]],
        pool=combo["gather_method"],
        order=tuple(KEYS[key] for key in keys),
        paper=True,
    )


@pytest.mark.parametrize("name", names(FMA_WSSS_DATA, "sams_*"))
def test_released_seeds(name: str) -> None:
    arrays, meta = golden(name)
    for index, combo in enumerate(meta["combos"]):
        ours = seed_from_masks(arrays["cam"], with_levels(arrays), arrays["fg_cls"], released(combo))
        np.testing.assert_allclose(ours.scores, arrays["out_score"][index], rtol=1e-3, atol=1e-6, err_msg=str(combo))
        np.testing.assert_allclose(ours.mask_confidence, arrays["out_conf"][index], rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(ours.mask_labels, arrays["out_label"][index])
        np.testing.assert_array_equal(ours.order, arrays["out_order"][index])
        np.testing.assert_array_equal(ours.labels, arrays["out_seed"][index])


def attention_of(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> torch.Tensor:
    """The ready average ``(n, n)``, or that of the last of several blocks, whose class token comes first."""
    attention = torch.from_numpy(arrays["att"].astype(np.float32))
    return attention[-meta["last_n_layers"] :].mean(dim=0)[1:, 1:] if attention.ndim == 3 else attention


def caa_like(config: dict[str, Any], cam: np.ndarray, attention: torch.Tensor) -> np.ndarray:
    options = CaaOptions(config["thresh"], rounds=config["n_sinkhorn"], power=config["power"], released=True)
    source = "score" if config["at"] == "score" else "raw"
    (maps,) = caa_of_raw([torch.from_numpy(cam)], attention[None], options, source)
    return maps.numpy()


@pytest.mark.parametrize("name", names(FMA_WSSS_DATA, "caa_*"))
def test_released_refinement(name: str) -> None:
    arrays, meta = golden(name)
    attention = attention_of(arrays, meta)
    if "aff_n1" in arrays:
        np.testing.assert_allclose(balance(attention, 1).numpy(), arrays["aff_n1"], rtol=1e-3, atol=1e-6)
    for key, config in meta["configs"].items():
        ours = caa_like(config, arrays["cam"], attention)
        np.testing.assert_allclose(ours, arrays[f"out_{key}"], rtol=1e-3, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("name", names(FMA_WSSS_DATA, "chain_*"))
def test_released_chain(name: str) -> None:
    """From the raw map to the seed, with the presets' constants where there is one."""
    arrays, meta = golden(name)
    refined = caa_like(meta["caa"], arrays["cam"], attention_of(arrays, meta))
    np.testing.assert_allclose(refined, arrays["cam_refined"], rtol=1e-3, atol=1e-9)
    preset = {"voc_cls": "voc-coarse", "voc_seg": "voc-fine", "coco_cls": "coco-coarse"}.get(meta["caa_name"])
    if preset:
        constants, source = FMA_WSSS[preset]
        config = {"thresh": constants.box_threshold, "n_sinkhorn": constants.rounds, "power": constants.power}
        assert {**config, "at": "cam" if source == "raw" else source} == meta["caa"]
    if preset in {"voc-coarse", "voc-fine"}:
        assert PRESETS[preset].background.value == meta["bg_pow"]
    options = SeedingOptions(background=Background("power", meta["bg_pow"]), paper=True)
    ours = seed_from_masks(refined, with_levels(arrays), arrays["fg_cls"], options)
    np.testing.assert_allclose(ours.scores, arrays["out_score"], rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(ours.mask_labels, arrays["out_label"])
    np.testing.assert_array_equal(ours.labels, arrays["out_seed"])


def test_refinement_without_released_quirks() -> None:
    """Positive maps in [0, 1]: what caa gives before it normalises; the batch may hold images without classes."""
    rng = np.random.default_rng(4)
    cam = torch.from_numpy(unit_range(rng.random((2, 5, 6))))
    attention = torch.from_numpy(rng.random((2, 30, 30)).astype(np.float32))
    raw, empty = caa_of_raw([cam * 7, torch.zeros(0, 5, 6)], attention, CaaOptions())
    assert empty.shape == (0, 5, 6)
    expected, _ = caa([cam, torch.zeros(0, 5, 6)], attention)
    np.testing.assert_allclose(unit_range(raw.numpy()), expected.numpy(), atol=1e-5)
    assert raw.max() < 1


@pytest.mark.parametrize("name", names(FMA_WSSS_DATA, "pixel_*"))
@pytest.mark.parametrize("first", [True, False])
def test_released_pixels(first: bool, name: str) -> None:
    arrays, meta = golden(name)
    size = tuple(meta["image_hw"])
    for index, method in enumerate(meta["methods"]):
        ours = label_pixels(
            arrays["cam"], arrays["fg_cls"], size, background_of(method), resize_first=first, paper=True
        )
        wrong = (ours.labels != arrays[f"seed_rf{int(first)}_{index}"]).mean()
        assert wrong <= 1e-4
        scores = arrays[f"score_rf{int(first)}"].astype(np.float32)
        sure = ours.labels > 0
        np.testing.assert_allclose(ours.confidence[sure], scores.max(axis=0)[sure], atol=1e-3)


def test_maps_of_the_size_of_the_released_constant() -> None:
    tiny = np.array([[[0, 1e-7], [-1, 5e-8]]], np.float32)
    np.testing.assert_allclose(unit_range(tiny, paper=True), [[[0, 0.5], [0, 0.25]]], rtol=1e-5)
    np.testing.assert_allclose(unit_range(tiny), [[[0, 1], [0, 0.5]]], rtol=1e-5)


VOTES = {
    "port_out_keep1": VotingOptions(),
    "port_out_keep0": VotingOptions(keep_uncovered=False),
    "sepl_max_iou": VotingOptions(paper=True, share=None, keep_uncovered=False),
    "sepl_max_iou_imp": VotingOptions(paper=True, share=None),
    "sepl_max_iou_imp2": VotingOptions(paper=True),
}


@pytest.mark.parametrize("name", names(FMA_WSSS_DATA, "vote_*"))
@pytest.mark.parametrize("rule", VOTES)
def test_released_votes(name: str, rule: str) -> None:
    arrays, _ = golden(name)
    np.testing.assert_array_equal(vote(arrays["label"], arrays["masks"], VOTES[rule]), arrays[rule])


def plain_vote(labels: np.ndarray, masks: np.ndarray, options: VotingOptions) -> np.ndarray:
    height, width = labels.shape
    out = np.zeros((height, width), np.uint8)
    if not options.paper:
        out[labels == 255] = 255
    taken: set[int] = set()
    for label in range(1, 255):
        own = sum(1 for y in range(height) for x in range(width) if labels[y, x] == label)
        if not own:
            continue
        cover = [k for k in range(len(masks)) if not options.paper or k not in taken]
        for k in range(len(masks)):
            area = int(masks[k].sum())
            inside = int((masks[k] & (labels == label)).sum())
            if not area or k in taken:
                continue
            most = inside > options.majority * area if options.paper else inside >= options.majority * area
            if most or (options.share is not None and inside >= options.share * own):
                taken.add(k)
                out[masks[k]] = label
        for y in range(height):
            for x in range(width):
                if options.keep_uncovered and labels[y, x] == label and not any(masks[k][y, x] for k in cover):
                    out[y, x] = label
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(VOTES)), st.sampled_from([0.5, 0.3]))
def test_votes_against_plain_loops(seed: int, rule: str, majority: float) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 0, 3, 4, 9, 255], (6, 7)).astype(np.uint8)
    masks = rng.random((rng.integers(0, 9), 6, 7)) < rng.choice([0.1, 0.4])
    masks[rng.random(len(masks)) < 0.2] = False
    options = replace(VOTES[rule], majority=majority)
    ours = vote(labels, masks, options)
    np.testing.assert_array_equal(ours, plain_vote(labels, masks, options))
    np.testing.assert_array_equal(ours, vote(labels, masks[rng.permutation(len(masks))], options))
    assert set(np.unique(ours)) <= set(np.unique(labels)) | {0}


def test_half_a_mask_and_unknown_pixels() -> None:
    labels = np.array([[5, 5, 0, 0, 255, 5, 5, 5]], np.uint8)
    masks = np.array([[1, 1, 1, 1, 0, 0, 0, 0]], bool)[None]
    assert vote(labels, masks).tolist() == [[5, 5, 5, 5, 255, 5, 5, 5]]
    assert vote(labels, masks, VotingOptions(paper=True)).tolist() == [[0, 0, 0, 0, 0, 5, 5, 5]]
    with pytest.raises(ValueError, match="masks of size"):
        vote(labels, np.ones((1, 2, 2), bool))


def plain_scores(cam: np.ndarray, masks: np.ndarray, alpha: float) -> list[list[float]]:
    """The published scores in float64, mask by mask; ``cam`` at the image's size."""
    raw = [[float(np.maximum(c, 0)[m].astype(np.float64).mean()) for m in masks] for c in cam]
    unit = [[(value - min(row)) / (max(row) - min(row) + 1e-7) for value in row] for row in raw]
    return [[(1 - max(row[k] for row in unit)) ** alpha] + [row[k] for row in unit] for k in range(len(masks))]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_seeds_against_a_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cam = rng.normal(0.2, 1, (rng.integers(1, 4), 9, 11)).astype(np.float32)
    masks = rng.random((rng.integers(2, 9), 9, 11)) < 0.3
    level = rng.integers(0, 3, len(masks))
    values = [0, 20, 3, 1]
    proposals = replace(from_masks(masks), level=level.astype(np.int8))
    ours = seed_from_masks(cam, proposals, [19, 2, 0][: len(cam)], SeedingOptions(paper=True))
    expected = np.zeros((9, 11), np.uint8)
    scores = plain_scores(cam, masks, 0.6)
    # Peaks of several classes are all 1 but for rounding: their order is ours, checked by the released arrays.
    for k in sorted(range(len(masks)), key=lambda k: (level[k], ours.mask_confidence[k], k)):
        np.testing.assert_allclose(ours.scores[:, k], scores[k], atol=1e-4)
        first, second = sorted(scores[k])[-1:-3:-1]
        label = values[scores[k].index(first)] if first - second > 1e-4 else ours.mask_labels[k]
        expected[masks[k]] = label
    np.testing.assert_array_equal(ours.labels, expected)
    covered = ours.owner >= 0
    np.testing.assert_array_equal(ours.labels[covered], ours.mask_labels[ours.owner[covered]])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["clip", "signed", "double"]), st.sampled_from([-40, -3, 20]))
def test_default_seeds(seed: int, normalise: str, exponent: int) -> None:
    """Only the image's classes; neither the maps' scale nor, as confidences differ, the masks' order matters."""
    rng = np.random.default_rng(seed)
    cam = rng.normal(0, 1, (3, 5, 6)).astype(np.float32)
    masks = rng.random((7, 20, 24)) < 0.2
    options = SeedingOptions(normalise=normalise, uncovered="cam", min_confidence=float(rng.choice([0, 0.7])))
    first = seed_from_masks(cam, masks, [1, 7, 30], options)
    assert set(np.unique(first.labels)) <= {0, 2, 8, 31, 255}
    scaled = seed_from_masks(np.ldexp(cam, exponent), masks, [1, 7, 30], options)
    np.testing.assert_array_equal(scaled.labels, first.labels)
    order = rng.permutation(len(masks))
    shuffled = seed_from_masks(cam, masks[order], [1, 7, 30], options)
    np.testing.assert_array_equal(shuffled.mask_labels, first.mask_labels[order])
    if len(set(first.mask_confidence.tolist())) == len(masks):
        np.testing.assert_array_equal(shuffled.labels, first.labels)
    unsure = first.confidence < options.min_confidence
    assert (first.labels[unsure] == 255).all()
    assert not (first.labels[~unsure] == 255).any()


def blocks(*parts: tuple[slice, slice], size: tuple[int, int] = (12, 12)) -> np.ndarray:
    masks = np.zeros((len(parts), *size), bool)
    for mask, part in zip(masks, parts, strict=True):
        mask[part] = True
    return masks


LEFT, RIGHT = (slice(None), slice(0, 6)), (slice(None), slice(6, 12))


def test_one_mask_is_judged_against_the_rest_of_the_image() -> None:
    cam = np.zeros((1, 12, 12), np.float32)
    cam[0, :, :6] = 0.01
    on, off = blocks(LEFT), blocks(RIGHT)
    assert (seed_from_masks(cam, on, [4]).labels == np.where(on[0], 5, 0)).all()
    assert (seed_from_masks(cam, off, [4]).labels == 0).all()
    assert (seed_from_masks(cam, on, [4], SeedingOptions(paper=True)).labels == 0).all()


def test_masks_on_objects_only() -> None:
    """The weaker of two objects is an object, because the rest of the image is weaker still."""
    cam = np.zeros((1, 12, 12), np.float32)
    cam[0, :4, :4], cam[0, 8:, 8:] = 0.9, 0.7
    masks = blocks((slice(0, 4), slice(0, 4)), (slice(8, 12), slice(8, 12)))
    assert seed_from_masks(cam, masks, [0]).mask_labels.tolist() == [1, 1]
    assert seed_from_masks(cam, masks, [0], SeedingOptions(paper=True)).mask_labels.tolist() == [1, 0]
    cam[0] = 0.9 - cam[0]  # masks on background only: what is stronger is covered by none
    assert seed_from_masks(cam, masks, [0]).mask_labels.tolist() == [0, 0]


def test_the_whole_image_as_one_mask() -> None:
    """No rest to compare with: the mean of the map between its own extremes decides."""
    cam = np.ones((1, 12, 12), np.float32)
    whole = np.ones((1, 12, 12), bool)
    assert seed_from_masks(cam, whole, [0]).labels.max() == 0
    cam[0, 0, 0] = 0
    assert seed_from_masks(cam, whole, [0]).labels.min() == 1
    assert seed_from_masks(1 - cam, whole, [0]).labels.max() == 0


def test_two_classes_with_one_best_mask() -> None:
    """The class that has more of its own peak there, whatever the scale; the released code looks at the scale."""
    cam = np.zeros((2, 12, 12), np.float32)
    cam[:, :, :6] = 1
    cam[1, 0, 0] = 3
    masks = blocks(LEFT, RIGHT)
    for scale in (0.01, 1, 100):
        scaled = cam * np.array([1, scale], np.float32)[:, None, None]
        assert seed_from_masks(scaled, masks, [0, 1]).mask_labels.tolist() == [1, 0]
    small = seed_from_masks(cam * np.array([1, 0.01])[:, None, None], masks, [0, 1], SeedingOptions(paper=True))
    large = seed_from_masks(cam * np.array([0.01, 1])[:, None, None], masks, [0, 1], SeedingOptions(paper=True))
    assert (small.mask_labels[0], large.mask_labels[0]) == (1, 2)


def test_masks_without_pixels() -> None:
    cam = np.zeros((1, 12, 12), np.float32)
    cam[0, :, :6] = 1
    masks = np.concatenate([blocks(LEFT, RIGHT), np.zeros((1, 12, 12), bool)])
    ours = seed_from_masks(cam, masks, [0])
    np.testing.assert_array_equal(ours.labels, masks[0])
    assert sorted(ours.order.tolist()) == [0, 1]
    assert seed_from_masks(cam, masks, [0], SeedingOptions(paper=True)).labels.max() == 0


@pytest.mark.parametrize("paper", [False, True])
def test_maps_without_evidence(paper: bool) -> None:
    masks = blocks(LEFT, RIGHT)
    options = SeedingOptions(paper=paper, uncovered="cam", without_masks="cam")
    broken = np.full((1, 12, 12), np.nan, np.float32)
    for cam in (np.zeros((2, 3, 3)), -np.ones((2, 3, 3)), np.full((2, 3, 3), 0.3), broken, np.zeros((0, 3, 3))):
        classes = [3, 4][: len(cam)]
        assert seed_from_masks(cam, masks, classes, options).labels.max() == 0
        assert seed_from_masks(cam, masks[:0], classes, options).labels.max() == 0


def test_pixels_that_no_mask_covers() -> None:
    cam = np.zeros((1, 12, 12), np.float32)
    cam[0, :, :6] = 1
    corner = blocks((slice(0, 6), slice(0, 6)))
    expected = {"background": 0, "ignore": 255, "cam": 1}
    for policy, label in expected.items():
        partly = seed_from_masks(cam, corner, [0], SeedingOptions(uncovered=policy, min_confidence=0.1))
        assert partly.labels[0, 0] == 1
        assert partly.labels[11, 0] == label
        none = seed_from_masks(cam, corner[:0], [0], SeedingOptions(without_masks=policy))
        assert none.labels[0, 0] == label
        assert none.labels[0, 11] == (255 if policy == "ignore" else 0)
        assert none.scores.shape == (2, 0)


def test_wrong_use() -> None:
    masks = blocks(LEFT)
    with pytest.raises(ValueError, match=r"expected \(1, h, w\)"):
        seed_from_masks(np.zeros((2, 3, 3)), masks, [0])
    with pytest.raises(ValueError, match="booleans"):
        seed_from_masks(np.zeros((1, 3, 3)), masks.astype(np.uint8), [0])
    with pytest.raises(ValueError, match="positive"):
        seed_from_masks(np.zeros((1, 3, 3)), masks, [0], SeedingOptions(background=Background("power", 0)))
    with pytest.raises(ValueError, match="normalise='none'"):
        seed_from_masks(np.zeros((2, 3, 3)), masks, [0], SeedingOptions(background=Background("given")))
    with pytest.raises(ValueError, match="0 to 253"):
        seed_from_masks(np.zeros((1, 3, 3)), masks, [254])


def test_sums_are_exact() -> None:
    """Equal masks have equal sums to the last bit, wherever they stand; and they are the sums."""
    rng = np.random.default_rng(5)
    maps = (rng.normal(0, 1e-4, (5, 60, 70)) * 10.0 ** rng.uniform(-14, 0, (5, 60, 70))).astype(np.float32)
    masks = rng.random((33, 60, 70)) < 0.4
    masks[17] = masks[32] = masks[0]
    sums = mask_sums(maps, masks)
    assert (sums[:, 17] == sums[:, 0]).all()
    assert (sums[:, 32] == sums[:, 0]).all()
    expected = np.array([[m.astype(np.float64)[k].sum() for k in masks] for m in maps])
    np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-4 * 2.0**-28 * 4200 * 5)
    mixed = rng.permutation(4200)
    again = mask_sums(
        maps.reshape(5, -1)[:, mixed].reshape(5, 60, 70), masks.reshape(33, -1)[:, mixed].reshape(33, 60, 70)
    )
    np.testing.assert_array_equal(again, sums)
    assert mask_sums(maps * 0, masks).tolist() == np.zeros((5, 33)).tolist()
    assert mask_sums(maps, masks[:0]).shape == (5, 0)


def plain_peaks(cam: np.ndarray, share: float, distance: int) -> list[tuple[int, int]]:
    height, width = cam.shape
    found = []
    for y in range(height):
        for x in range(width):
            around = cam[max(0, y - distance + 1) : y + distance, max(0, x - distance + 1) : x + distance]
            if cam[y, x] == around.max() and cam[y, x] > share * cam.max():
                found.append((y, x))
    return sorted(found, key=lambda place: -cam[place])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
def test_peaks_against_a_plain_loop(seed: int, distance: int) -> None:
    cam = np.random.default_rng(seed).permutation(35 * 41).reshape(35, 41).astype(np.float32)
    ours = peaks(cam, 0.5, distance, 10_000)
    assert ours == plain_peaks(cam, 0.5, distance)
    if len(ours) > 1:
        assert min(max(abs(a - c), abs(b - d)) for a, b in ours for c, d in ours if (a, b) != (c, d)) >= distance
    assert peaks(cam, 0.5, distance, 2) == ours[:2]
    assert peaks(cam, 1.0, distance) == ours[:1]


def test_points() -> None:
    cams = np.zeros((6, 60, 80), np.float32)
    cams[0, 10, 15], cams[0, 40, 70], cams[0, 12, 30] = 1, 0.8, 0.5  # 0.5 does not exceed half the peak
    cams[1] = -1
    cams[2, 59, 79] = 1e-9
    cams[3, 20:31, 20:41] = 2  # a plateau is one point, in its middle
    cams[4] = np.nan
    cams[5] = 0.7  # so is a flat map
    found = point_prompts(cams, (60, 80))
    assert found.row.tolist() == [0, 2, 3, 5]
    assert found.points[0].tolist() == [[15, 10], [70, 40]]
    assert found.labels.tolist() == [[1, 1], [1, PADDING], [1, PADDING], [1, PADDING]]
    assert found.points[1:3, 0].tolist() == [[79, 59], [30, 25]]
    assert abs(found.points[3, 0] - [39.5, 29.5]).max() <= 0.5
    empty = point_prompts(cams[1:2], (60, 80))
    assert (empty.row.shape, empty.points.shape, empty.labels.shape) == ((0,), (0, 0, 2), (0, 0))
    assert point_prompts(np.ones((1, 1, 1)), (60, 80)).points.shape == (1, 1, 2)
    assert point_prompts(cams[:0], (60, 80)).row.shape == (0,)


def test_boxes() -> None:
    cams = np.zeros((4, 60, 80), np.float32)
    cams[0, 5:10, 3:20], cams[0, 30:60, 40:80] = 0.5, 1e-3 * np.arange(1, 41) + 0.9
    cams[2, 59, 79] = 1e-6
    cams[3] = np.inf
    found = box_prompts(cams, (60, 80))
    assert found.row.tolist() == [0, 0, 2]
    assert found.boxes.tolist() == [[40, 30, 80, 60], [3, 5, 20, 10], [79, 59, 80, 60]]
    assert box_prompts(cams, (60, 80), smallest=0.1).row.tolist() == [0, 2]
    assert box_prompts(cams[1:2], (60, 80)).boxes.shape == (0, 4)
    assert box_prompts(np.ones((1, 2, 2)), (6, 8)).boxes.tolist() == [[0, 0, 8, 6]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_labels_of_answers_against_a_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cams = rng.normal(0.3, 0.5, (3, 8, 9)).astype(np.float32)
    row = rng.integers(0, 3, rng.integers(0, 5))
    logits = rng.normal(0, 3, (len(row), 8, 9)).astype(np.float32)
    expected = np.zeros((8, 9), np.uint8)
    for y in range(8):
        for x in range(9):
            best = 0.0
            for query in np.argsort(row, kind="stable"):
                inside = np.maximum(cams[row[query]], 0)[logits[query] > 0]
                score = float(logits[query, y, x]) * float(inside.mean(dtype=np.float64)) if inside.size else 0.0
                if score > best:
                    best, expected[y, x] = score, [7, 3, 0][row[query]] + 1
    ours = label_from_prompted_masks(logits, row, cams, [7, 3, 0])
    assert (ours != expected).mean() <= 1 / 72  # float32 scores may tie otherwise


def test_an_answer_without_pixels() -> None:
    cams = np.ones((2, 4, 4), np.float32)
    logits = np.full((2, 4, 4), -1, np.float32)
    logits[0, 0] = 2
    ours = label_from_prompted_masks(logits, np.array([0, 1]), cams, [0, 1])
    theirs = label_from_prompted_masks(logits, np.array([0, 1]), cams, [0, 1], paper=True)
    assert ours.tolist() == [[1] * 4] + [[0] * 4] * 3
    assert theirs.tolist() == [[1] * 4] + [[2] * 4] * 3
    with pytest.raises(ValueError, match="rows must be"):
        label_from_prompted_masks(logits, np.array([0, 2]), cams, [0, 1])
    with pytest.raises(ValueError, match="2 answers with 1 rows"):
        label_from_prompted_masks(logits, np.array([0]), cams, [0, 1])
