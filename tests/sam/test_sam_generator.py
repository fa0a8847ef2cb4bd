"""Mask proposals: released numbers, the stock generator beside ours on tiny models, and input that breaks it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from torch import Tensor, nn

from clipseed.errors import ImageError, UsageError, WeightsError
from clipseed.sam import decoder, encoder
from clipseed.sam.backend import Decoded, Embedding, as_pixels, fitted_size
from clipseed.sam.cleanup import remove_small_regions
from clipseed.sam.decoder import PlainDecoder
from clipseed.sam.generator import Limits, generate
from clipseed.sam.grid import crops_of, point_grid
from clipseed.sam.levels import filter_levels, intersections
from clipseed.sam.model_backend import ModelBackend
from clipseed.sam.nms import mask_boxes, suppress
from clipseed.sam.options import FMA, STOCK, ProposalOptions
from clipseed.sam.plain import has_plain_decoder, has_plain_encoder
from clipseed.sam.predictor_backend import PredictorBackend
from clipseed.segments import Segments

from helpers.golden import FMA_WSSS_DATA, names, with_meta
from helpers.sam import CPU, INFO, NestedBlobs, backend_of, blob_sam, tiny_sam

EVERYTHING = ProposalOptions(points_per_side=3, pred_iou_threshold=-10, stability_threshold=-1, box_nms_threshold=1.1)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def stock(sam: Any, image: np.ndarray, options: ProposalOptions) -> list[dict[str, Any]]:
    """The package's own generator with equal settings."""
    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=options.points_per_side,
        points_per_batch=options.points_per_batch,
        pred_iou_thresh=options.pred_iou_threshold,
        stability_score_thresh=options.stability_threshold,
        stability_score_offset=options.stability_offset,
        box_nms_thresh=options.box_nms_threshold,
        crop_n_layers=options.crop_layers,
        crop_nms_thresh=options.crop_nms_threshold,
        crop_overlap_ratio=options.crop_overlap,
        crop_n_points_downscale_factor=options.crop_points_divisor,
        min_mask_region_area=options.min_region_area,
    )
    return generator.generate(image)


def assert_equal(ours: Segments, records: list[dict[str, Any]]) -> None:
    assert len(ours) == len(records)
    for index, record in enumerate(records):
        np.testing.assert_array_equal(ours.masks[index], record["segmentation"])
        np.testing.assert_allclose(ours.iou[index], record["predicted_iou"], rtol=1e-6)
        np.testing.assert_allclose(ours.stability[index], record["stability_score"], rtol=1e-6)
        np.testing.assert_array_equal(ours.box[index], record["bbox"])
        np.testing.assert_allclose(ours.point[index], record["point_coords"][0], rtol=1e-6)
        np.testing.assert_array_equal(ours.crop_box[index], record["crop_box"])
        assert ours.area[index] == record["area"]


# Released numbers -----------------------------------------------------------------------------------------------------


class StoredAnswers:
    """A backend that gives stored logits, at the crop's size, crop after crop and point after point."""

    mask_threshold, crops_at_once, working_pixels = 0.0, 2, 0

    def __init__(self, arrays: Any, expected_crops: Sequence[Sequence[int]]) -> None:
        self.arrays, self.expected = arrays, expected_crops
        self.encoded = 0
        self.asked: dict[int, int] = {}

    def encode(self, crops: Sequence[np.ndarray]) -> list[Embedding]:
        found = []
        for crop in crops:
            left, top, right, bottom = self.expected[self.encoded]
            assert crop.shape == (bottom - top, right - left, 3)
            found.append(Embedding(crop.shape[:2], self.encoded))
            self.encoded += 1
        return found

    def decode_prompts(self, embedding: Embedding, boxes: Any = None, points: Any = None, point_labels: Any = None):
        start = self.asked.get(embedding.content, 0)
        self.asked[embedding.content] = stop = start + len(points)
        logits = torch.from_numpy(self.arrays[f"logits_q_crop{embedding.content}"][start:stop]).float() / 8
        return Decoded(logits, torch.from_numpy(self.arrays[f"iou_crop{embedding.content}"][start:stop]))

    def upsample(self, embedding: Embedding, logits: Tensor) -> Tensor:
        return logits

    def manifest(self) -> dict[str, Any]:
        return {}


AMG = names(FMA_WSSS_DATA, "amg_*")


@pytest.mark.parametrize("points_per_batch", [5, 64])
@pytest.mark.parametrize(
    ("file", "name"), [(file, name) for file in AMG for name in with_meta(FMA_WSSS_DATA, file)[1]["settings"]]
)
def test_released_masks(file: str, name: str, points_per_batch: int) -> None:
    golden, meta = with_meta(FMA_WSSS_DATA, file)
    stated = meta["settings"][name]
    options = ProposalOptions(
        points_per_side=meta["points_per_side"],
        points_per_batch=points_per_batch,
        crop_points_divisor=meta["crop_n_points_downscale_factor"],
        box_nms_threshold=meta["box_nms_thresh"],
        crop_nms_threshold=meta["crop_nms_thresh"],
        crop_overlap=meta["crop_overlap_ratio"],
        pred_iou_threshold=stated["pred_iou_thresh"],
        stability_threshold=stated["stability_score_thresh"],
        crop_layers=stated["crop_n_layers"],
        min_region_area=stated["min_mask_region_area"],
        level_bonus=tuple(stated["score_thresh_offset"]),
        nms_level_bonus=tuple(stated["score_nms_offset"]),
        level_filter=stated["rock_sand_water_thresh"],
    )
    backend = StoredAnswers(golden, meta["crop_boxes_xyxy"])
    found = generate(backend, photo(*meta["image_hw"]), options)
    np.testing.assert_array_equal(found.masks, golden[f"{name}_masks"])
    np.testing.assert_array_equal(found.level, golden[f"{name}_level"])
    np.testing.assert_array_equal(found.iou, golden[f"{name}_iou"])
    np.testing.assert_allclose(found.stability, golden[f"{name}_stability"], rtol=1e-6)
    np.testing.assert_array_equal(found.box, golden[f"{name}_bbox_xywh"])
    np.testing.assert_array_equal(found.crop_box, golden[f"{name}_crop_box_xywh"])
    np.testing.assert_allclose(found.point, golden[f"{name}_points"], rtol=1e-6)
    np.testing.assert_array_equal(found.area, golden[f"{name}_area"])


@pytest.mark.parametrize("file", AMG)
def test_fma_preset_is_what_was_released(file: str) -> None:
    stated = with_meta(FMA_WSSS_DATA, file)[1]["settings"]["fma"]
    assert (FMA.pred_iou_threshold, FMA.stability_threshold, FMA.crop_layers, FMA.min_region_area) == (
        stated["pred_iou_thresh"],
        stated["stability_score_thresh"],
        stated["crop_n_layers"],
        stated["min_mask_region_area"],
    )
    assert FMA.level_bonus == tuple(stated["score_thresh_offset"])
    assert FMA.nms_level_bonus == tuple(stated["score_nms_offset"])
    assert FMA.level_filter == stated["rock_sand_water_thresh"]
    assert [FMA.points_of_layer(layer) for layer in (0, 1)] == [32, 16]


@pytest.mark.parametrize("name", names(FMA_WSSS_DATA, "rsw_*"))
def test_released_level_filter(name: str) -> None:
    arrays, meta = with_meta(FMA_WSSS_DATA, name)
    kept = filter_levels(arrays["masks"], arrays["levels"], meta["thresh"])
    np.testing.assert_array_equal(kept, arrays["out_kept"])


@pytest.mark.parametrize(("iou", "stability", "count"), [(0.49, 0.5, 1), (0.5, 0.5, 0), (0.49, 0.51, 0)])
def test_thresholds_at_their_very_value(iou: float, stability: float, count: int) -> None:
    """Half of the mask is stable and its predicted IoU is 0.5: that is stable enough, but not more than 0.5."""
    logits = np.full((1, 3, 40, 50), -40, np.int8)
    logits[0, 2, 10:20, 10:20], logits[0, 2, 20:30, 10:20] = 40, 4
    arrays = {"logits_q_crop0": logits, "iou_crop0": np.array([[0.1, 0.1, 0.5]], np.float32)}
    options = ProposalOptions(points_per_side=1, pred_iou_threshold=iou, stability_threshold=stability)
    found = generate(StoredAnswers(arrays, [(0, 0, 50, 40)]), photo(40, 50), options)
    assert found.area.tolist() == [200] * count
    assert found.stability.tolist() == [0.5] * count


# The level filter -----------------------------------------------------------------------------------------------------


def slow_filter(masks: np.ndarray, level: np.ndarray, threshold: float) -> list[int]:
    kept: list[int] = []
    for current in (2, 1, 0):
        above = list(kept)
        for index in np.flatnonzero(level == current):
            shares = [(masks[index] & masks[other]).sum() / masks[index].sum() for other in above]
            if not shares or max(shares) < threshold:
                kept.append(int(index))
    return kept


def rectangles(count: int, height: int, width: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    masks = np.zeros((count, height, width), bool)
    for mask in masks:
        top, left = generator.integers(0, height - 4), generator.integers(0, width - 4)
        mask[top : top + generator.integers(2, height // 2), left : left + generator.integers(2, width // 2)] = True
    return masks


@pytest.mark.parametrize("levels", [(0, 1, 2), (0, 1), (0, 2), (1,), (0,), (2,)])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.1])
def test_level_filter_equals_a_plain_loop(
    levels: tuple[int, ...], threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipseed.sam.levels._CHUNK_FLOATS", 3_000)
    masks = rectangles(30, 31, 43, seed=7)
    level = np.random.default_rng(1).choice(levels, 30).astype(np.int8)
    assert filter_levels(masks, level, threshold).tolist() == slow_filter(masks, level, threshold)


def test_level_filter_takes_the_largest_cover_not_the_sum() -> None:
    masks = np.zeros((3, 1, 20), bool)
    masks[0, 0, :2], masks[1, 0, 2:4], masks[2, 0, :10] = True, True, True
    assert filter_levels(masks, np.array([2, 2, 0]), 0.3).tolist() == [0, 1, 2]
    assert filter_levels(masks, np.array([2, 2, 0]), 0.2).tolist() == [0, 1]


def test_level_filter_of_nothing_and_of_empty_masks() -> None:
    assert filter_levels(np.zeros((0, 5, 5), bool), np.zeros(0, np.int8), 0.3).tolist() == []
    masks = np.zeros((2, 5, 5), bool)
    masks[0, 0, 0] = True
    assert filter_levels(masks, np.array([2, 0]), 0.3).tolist() == [0]


def test_shared_pixels_are_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = rectangles(9, 40, 50, seed=3)
    flat = masks.reshape(9, -1)
    first, second = np.arange(0, 4), np.arange(2, 9)
    expected = [[int((masks[a] & masks[b]).sum()) for b in second] for a in first]
    for floats in (11, 1_000, 1 << 24):
        monkeypatch.setattr("clipseed.sam.levels._CHUNK_FLOATS", floats)
        assert intersections(flat, first, second).tolist() == expected


# Beside the stock generator -------------------------------------------------------------------------------------------

SETTINGS = {
    "defaults": replace(STOCK, points_per_side=5),
    "small batches": replace(STOCK, points_per_side=5, points_per_batch=7),
    "crops": replace(STOCK, points_per_side=4, crop_layers=1, crop_points_divisor=2),
    "two layers": replace(STOCK, points_per_side=4, crop_layers=2, crop_points_divisor=2, crop_overlap=0.2),
    "clean-up": replace(STOCK, points_per_side=4, min_region_area=300),
    "crops and clean-up": replace(
        STOCK, points_per_side=4, crop_layers=1, min_region_area=500, box_nms_threshold=0.6, crop_nms_threshold=0.8
    ),
    "strict": replace(STOCK, points_per_side=6, pred_iou_threshold=0.92, stability_threshold=0.97),
    "loose": replace(STOCK, points_per_side=4, pred_iou_threshold=0.0, stability_threshold=0.0, box_nms_threshold=0.9),
    "other stability": replace(STOCK, points_per_side=5, stability_offset=8.0, stability_threshold=0.8),
}


@pytest.mark.parametrize("size", [(64, 64), (90, 140), (141, 75), (33, 200)])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_stock_generator(name: str, size: tuple[int, int]) -> None:
    image = photo(*size, seed=size[0])
    expected = stock(blob_sam(sway=0.15), image, SETTINGS[name])
    found = generate(backend_of(blob_sam(sway=0.15)), image, SETTINGS[name])
    assert_equal(found, [record for record in expected if record["area"]])
    assert len(found) > 3


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_stock_generator_on_a_real_decoder(seed: int) -> None:
    image = photo(70, 101, seed)
    expected = stock(tiny_sam(seed=seed), image, EVERYTHING)
    found = generate(backend_of(tiny_sam(seed=seed)), image, EVERYTHING)
    assert len(expected) == 27
    assert_equal(found, [record for record in expected if record["area"]])
    assert len(found) > 10


def test_larger_models_and_images() -> None:
    options = replace(STOCK, points_per_side=6, crop_layers=1, crop_points_divisor=2, min_region_area=100)
    image = photo(250, 333)
    expected = stock(blob_sam(128, seed=4, sway=0.1), image, options)
    found = generate(backend_of(blob_sam(128, seed=4, sway=0.1)), image, options)
    assert_equal(found, expected)
    assert len({tuple(box) for box in found.crop_box}) > 1


def test_a_predictor_gives_the_same_masks() -> None:
    image = photo(90, 140)
    options = SETTINGS["crops and clean-up"]
    through = generate(PredictorBackend(SamPredictor(blob_sam(sway=0.15)), CPU, INFO), image, options)
    assert_equal(through, stock(blob_sam(sway=0.15), image, options))


def test_the_same_call_gives_the_same_masks() -> None:
    backend = backend_of(blob_sam(sway=0.15))
    options = replace(FMA, points_per_side=6)
    first, second = (generate(backend, photo(90, 140), options) for _ in range(2))
    np.testing.assert_array_equal(first.masks, second.masks)
    np.testing.assert_array_equal(first.iou, second.iou)
    assert sorted(first.level, reverse=True) == first.level.tolist()


def test_whole_bonus_and_wholes_first() -> None:
    """Without the bonus only sub-parts pass here, with it wholes do; and in NMS they win although they score less."""

    class Backwards(NestedBlobs):
        def forward(self, **arguments: Any) -> tuple[Tensor, Tensor]:
            logits, iou = super().forward(**arguments)
            return logits[:, [2, 2, 2]], torch.tensor([0.95, 0.90, 0.80]).repeat(len(iou), 1)

    sam = blob_sam()
    sam.mask_decoder = Backwards()
    backend = backend_of(sam)
    plain = replace(STOCK, points_per_side=2, pred_iou_threshold=0.86)
    assert set(generate(backend, photo(64, 64), plain).level) == {0}
    bonus = replace(plain, level_bonus=(0.0, 0.0, 0.1))
    assert set(generate(backend, photo(64, 64), bonus).level) == {0}
    first = replace(bonus, nms_level_bonus=(0.0, 0.0, 1.0))
    found = generate(backend, photo(64, 64), first)
    assert set(found.level) == {2}
    np.testing.assert_allclose(found.iou, 0.80, rtol=1e-6)


def test_one_mask_for_each_prompt_is_a_whole() -> None:
    class Single(NestedBlobs):
        def forward(self, **arguments: Any) -> tuple[Tensor, Tensor]:
            logits, iou = super().forward(**arguments)
            return logits[:, 1:2], iou[:, 1:2]

    sam = blob_sam()
    sam.mask_decoder = Single()
    found = generate(backend_of(sam), photo(64, 64), replace(STOCK, points_per_side=3))
    assert len(found) > 1
    assert set(found.level) == {2}


def test_another_number_of_masks_is_refused() -> None:
    class Double(NestedBlobs):
        def forward(self, **arguments: Any) -> tuple[Tensor, Tensor]:
            logits, iou = super().forward(**arguments)
            return logits[:, :2], iou[:, :2]

    sam = blob_sam()
    sam.mask_decoder = Double()
    with pytest.raises(WeightsError, match="three masks"):
        generate(backend_of(sam), photo(64, 64), STOCK)


# Nothing, much, and memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_no_mask_at_all(layers: int) -> None:
    options = replace(FMA, points_per_side=4, pred_iou_threshold=2.0, crop_layers=layers)
    found = generate(backend_of(blob_sam()), photo(50, 70), options)
    assert len(found) == 0
    assert found.size == (50, 70)
    assert found.box.shape == (0, 4)
    assert found.crop_box.dtype == np.int32


def test_masks_without_a_pixel_are_left_out() -> None:
    class Void(NestedBlobs):
        def forward(self, **arguments: Any) -> tuple[Tensor, Tensor]:
            logits, iou = super().forward(**arguments)
            logits[::2] = -100.0
            return logits, iou

    sam = blob_sam()
    sam.mask_decoder = Void()
    found = generate(backend_of(sam), photo(64, 64), EVERYTHING)
    assert len(found) == 3 * 4
    assert found.area.min() > 0


def test_hundreds_of_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipseed.sam.candidates._WORKING_FLOATS", 100_000)
    options = replace(STOCK, points_per_side=14, box_nms_threshold=1.1, stability_threshold=0.1)
    image = photo(64, 80)
    found = generate(backend_of(blob_sam()), image, options)
    assert_equal(found, stock(blob_sam(), image, options))
    assert len(found) > 300


class Cramped(ModelBackend):
    """A device with room for few prompts and crops."""

    room_points, room_crops = 5, 2

    def __init__(self, sam: Any) -> None:
        super().__init__(sam, CPU, torch.float32, INFO)
        self.crops_at_once = 8
        self.refused = 0

    def encode(self, crops: Any) -> list[Embedding]:
        if len(crops) > self.room_crops:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().encode(crops)

    def decode_prompts(self, embedding: Embedding, *args: Any, **prompts: Any) -> Decoded:
        if len(prompts["points"]) > self.room_points:
            self.refused += 1
            raise RuntimeError("CUDA error: out of memory")
        return super().decode_prompts(embedding, *args, **prompts)


def test_out_of_memory_halves_the_batch_and_goes_on() -> None:
    options = replace(STOCK, points_per_side=5, crop_layers=1)
    image = photo(90, 140)
    backend, limits = Cramped(blob_sam()), Limits()
    found = generate(backend, image, options, limits)
    assert_equal(found, stock(blob_sam(), image, options))
    assert (limits.points, limits.crops) == (3, 2)
    before = backend.refused
    generate(backend, image, options, limits)
    assert backend.refused == before


@pytest.mark.parametrize("rooms", [(0, 2), (5, 0)])
def test_no_room_for_even_one(rooms: tuple[int, int]) -> None:
    backend = Cramped(blob_sam())
    backend.room_points, backend.room_crops = rooms
    with pytest.raises(ImageError, match="does not fit into the device's memory"):
        generate(backend, photo(64, 64), replace(STOCK, points_per_side=5, crop_layers=1))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    class Broken(ModelBackend):
        def decode_prompts(self, *_: Any, **__: Any) -> Decoded:
            raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        generate(Broken(blob_sam(), CPU, torch.float32, INFO), photo(64, 64), STOCK)


# Images -------------------------------------------------------------------------------------------------------------


def test_grey_and_transparent_images_become_rgb() -> None:
    grey = photo(40, 50)[:, :, 0]
    np.testing.assert_array_equal(as_pixels(grey), np.stack([grey] * 3, axis=2))
    np.testing.assert_array_equal(as_pixels(grey[:, :, None]), as_pixels(grey))
    clear = np.dstack([photo(40, 50), np.full((40, 50), 255, np.uint8)])
    np.testing.assert_array_equal(as_pixels(clear), photo(40, 50))
    clear[:, :, 3] = 0
    assert (as_pixels(clear) == 255).all()
    options = replace(STOCK, points_per_side=3)
    backend = backend_of(blob_sam(sway=0.15))
    np.testing.assert_array_equal(
        generate(backend, grey, options).masks, generate(backend, np.stack([grey] * 3, axis=2), options).masks
    )


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((20, 20, 3), np.float32), "float32"),
        (np.zeros((20, 20, 3), bool), "bool"),
        (np.zeros((20, 20, 3), np.int64), "int64"),
        (np.zeros((20, 20, 2), np.uint8), "needed is"),
        (np.zeros((3, 20, 20), np.uint8), "needed is"),
        (np.zeros((1, 20, 20, 3), np.uint8), "needed is"),
        (np.zeros(20, np.uint8), "needed is"),
        (np.zeros((0, 20, 3), np.uint8), "no pixel"),
    ],
)
def test_unusable_images(image: np.ndarray, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        generate(backend_of(blob_sam()), image, STOCK)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2), (1, 1000), (2000, 1), (3, 400)])
def test_tiny_and_thin_images(size: tuple[int, int]) -> None:
    options = replace(EVERYTHING, crop_layers=2, crop_nms_threshold=1.1)
    found = generate(backend_of(blob_sam()), photo(*size), options)
    assert found.size == size
    assert len(found) > 0


def test_fitted_size_is_that_of_the_package_where_that_works() -> None:
    from segment_anything.utils.transforms import ResizeLongestSide

    for size in [(375, 500), (500, 333), (7, 1000), (64, 64), (1, 1)]:
        assert fitted_size(size, 1024) == ResizeLongestSide.get_preprocess_shape(*size, 1024)
    assert fitted_size((1, 5000), 1024) == (1, 1024)


def test_a_predictor_refuses_images_that_it_would_shrink_to_nothing() -> None:
    backend = PredictorBackend(SamPredictor(blob_sam()), CPU, INFO)
    assert len(generate(backend, photo(1, 128), EVERYTHING)) > 0
    with pytest.raises(ImageError, match="too thin"):
        generate(backend, photo(1, 129), EVERYTHING)


# Options and prompts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"points_per_side": 0}, "points_per_side"),
        ({"points_per_batch": 0}, "points_per_batch"),
        ({"crop_layers": -1}, "crop_layers"),
        ({"crop_points_divisor": 0}, "crop_points_divisor"),
        ({"points_per_side": 3, "crop_layers": 1, "crop_points_divisor": 4}, "no points"),
        ({"points_per_side": 8, "crop_layers": 2, "crop_points_divisor": 3}, "no points"),
        ({"crop_overlap": 1.0}, "crop_overlap"),
        ({"stability_offset": float("nan")}, "stability_offset"),
        ({"level_bonus": (0.1,)}, "level_bonus"),
    ],
)
def test_impossible_options(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ProposalOptions(**wrong)


def test_manifest_has_what_decides_the_masks() -> None:
    assert replace(FMA, points_per_batch=3).manifest() == FMA.manifest()
    assert replace(FMA, level_filter=None).manifest() != FMA.manifest()
    assert json.loads(json.dumps(FMA.manifest()))["min_region_area"] == 100


def prompt_cases() -> dict[str, Callable[[], dict[str, Any]]]:
    generator = np.random.default_rng(0)
    box = np.array([[10.0, 12.0, 60.0, 50.0], [0.0, 0.0, 99.0, 69.0]])
    joint = generator.uniform(0, 70, (2, 3, 2))
    return {
        "boxes": lambda: {"boxes": box},
        "joint points": lambda: {"points": joint},
        "labels": lambda: {"points": joint, "point_labels": np.array([[1, 0, 1], [1, 1, 0]])},
        "both": lambda: {"boxes": box, "points": joint},
    }


@pytest.mark.parametrize("name", ["boxes", "joint points", "labels", "both"])
@pytest.mark.parametrize("kind", ["model", "predictor"])
def test_prompts_equal_the_packages_predictor(name: str, kind: str) -> None:
    prompts, image = prompt_cases()[name](), photo(70, 100)
    predictor = SamPredictor(tiny_sam())
    predictor.set_image(image)
    backend = backend_of(tiny_sam()) if kind == "model" else PredictorBackend(SamPredictor(tiny_sam()), CPU, INFO)
    (embedding,) = backend.encode([image])
    decoded = backend.decode_prompts(embedding, **prompts)
    for index in range(2):
        points, labels = prompts.get("points"), prompts.get("point_labels")
        if points is not None:
            labels = np.ones(3) if labels is None else labels[index]
        full, iou, _ = predictor.predict(
            point_coords=None if points is None else points[index],
            point_labels=labels,
            box=prompts["boxes"][index] if "boxes" in prompts else None,
            return_logits=True,
        )
        np.testing.assert_allclose(backend.upsample(embedding, decoded.logits[index]).numpy(), full, atol=1e-5)
        np.testing.assert_allclose(decoded.iou[index].numpy(), iou, atol=1e-5)


def test_filler_points_change_nothing() -> None:
    """A prompt of two points may stand beside one of three."""
    backend = backend_of(tiny_sam())
    (embedding,) = backend.encode([photo(70, 100)])
    points = np.array([[[5.0, 6.0], [40.0, 30.0]]])
    filled = np.concatenate([points, np.full((1, 1, 2), 17.0)], axis=1)
    other = backend.decode_prompts(embedding, points=filled, point_labels=np.array([[1, 1, -1]]))
    moved = backend.decode_prompts(
        embedding, points=filled + np.array([0, 0, 1])[None, :, None], point_labels=np.array([[1, 1, -1]])
    )
    torch.testing.assert_close(other.logits, moved.logits)


def test_no_prompt_and_prompts_that_do_not_belong_together() -> None:
    for backend in (backend_of(tiny_sam()), PredictorBackend(SamPredictor(tiny_sam()), CPU, INFO)):
        (embedding,) = backend.encode([photo(70, 100)])
        none = backend.decode_prompts(embedding, points=np.zeros((0, 1, 2)))
        assert none.logits.shape[:2] == none.iou.shape == (0, 3)
        with pytest.raises(ValueError, match="points, a box, or both"):
            backend.decode_prompts(embedding)
        with pytest.raises(ValueError, match="boxes have shape"):
            backend.decode_prompts(embedding, boxes=np.zeros((1, 4)), points=np.zeros((2, 1, 2)))
        with pytest.raises(ValueError, match="points have shape"):
            backend.decode_prompts(embedding, points=np.zeros((2, 2)))
        with pytest.raises(ValueError, match="point labels have shape"):
            backend.decode_prompts(embedding, points=np.zeros((2, 1, 2)), point_labels=np.zeros((2, 2), np.int64))


def test_crops_encoded_together_and_alone() -> None:
    backend = backend_of(tiny_sam())
    crops = [photo(70, 100, 1), photo(64, 64, 2), photo(30, 90, 3)]
    for together, crop in zip(backend.encode(crops), crops, strict=True):
        (alone,) = backend.encode([crop])
        torch.testing.assert_close(together.content, alone.content, atol=1e-5, rtol=1e-5)
        assert together.size == crop.shape[:2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_the_encoder_only(dtype: torch.dtype) -> None:
    exact, half = backend_of(tiny_sam()), ModelBackend(tiny_sam(), CPU, dtype, INFO)
    image, points = photo(70, 100), np.array([[[30.0, 40.0]]])
    first, second = (backend.encode([image])[0] for backend in (exact, half))
    assert second.content.dtype == torch.float32
    difference = (first.content - second.content).abs().mean() / first.content.abs().mean()
    assert 0 < difference < 0.05
    assert half.decode_prompts(second, points=points).logits.dtype == torch.float32
    assert half.manifest()["precision"] == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def test_features_beyond_half_precision() -> None:
    sam = tiny_sam()
    sam.image_encoder.patch_embed.proj.weight.data *= 1e7
    with pytest.raises(ImageError, match="--precision fp32"):
        ModelBackend(sam, CPU, torch.float16, INFO).encode([photo(70, 100)])


# The faster programs for the package's own modules --------------------------------------------------------------------


def lively_sam(image_size: int = 64) -> Any:
    """No parameter is 0, as fresh biases and relative positions are."""
    sam = tiny_sam(image_size)
    with torch.no_grad():
        for parameter in sam.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return sam


@pytest.mark.parametrize("size", [(64, 64), (30, 200), (200, 30), (90, 128)])
@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_plain_decoder_equals_the_packages(
    size: tuple[int, int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the padding of thin crops is not drawn."""
    monkeypatch.setitem(decoder._PROMPTS_AT_ONCE, "cpu", at_once)
    image, points = photo(*size), np.random.default_rng(1).uniform(0, 30, (7, 2, 2))
    predictor, backend = SamPredictor(lively_sam(128)), backend_of(lively_sam(128))
    predictor.set_image(image)
    fitted = torch.from_numpy(predictor.transform.apply_coords(points, size))
    full, iou, _ = predictor.predict_torch(fitted, torch.ones(7, 2, dtype=torch.int), return_logits=True)
    (embedding,) = backend.encode([image])
    decoded = backend.decode_prompts(embedding, points=points)
    torch.testing.assert_close(decoded.iou, iou, atol=2e-5, rtol=2e-5)
    chosen = torch.tensor([20, 3, 4, 5, 11, 3])
    found = backend.upsample(embedding, decoded.drawn(chosen))
    torch.testing.assert_close(found, full.flatten(0, 1)[chosen], atol=2e-4, rtol=2e-4)
    assert full.std() > 0.1
    assert (decoded.logits.shape[2] < 32 or decoded.logits.shape[3] < 32) == (size[0] != size[1])


def test_bfloat16_of_the_decoder_is_close() -> None:
    exact, half = backend_of(lively_sam()), backend_of(lively_sam())
    half._plain = PlainDecoder(half.sam.mask_decoder, half._dense_code, torch.bfloat16)
    image, points = photo(70, 100), np.random.default_rng(1).uniform(0, 70, (9, 1, 2))
    first, second = (model.decode_prompts(model.encode([image])[0], points=points) for model in (exact, half))
    assert second.logits.dtype == second.iou.dtype == torch.float32
    assert 0 < (first.logits - second.logits).abs().mean() < 0.02 * first.logits.std()
    torch.testing.assert_close(first.iou, second.iou, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("limit", [1, 40, 200, 1_000, 1 << 20])
def test_plain_encoder_equals_the_packages(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads and rows in pieces, the last ones smaller; windows with and without padding."""
    monkeypatch.setitem(encoder._SCORES_AT_ONCE, "cpu", limit)
    module = lively_sam(80).image_encoder.eval()
    images = torch.randn(2, 3, 80, 80)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.PlainEncoder(module)(images), module(images), atol=1e-4, rtol=1e-4)


def test_only_wanted_prompts_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    whole = PlainDecoder._enlarged
    monkeypatch.setattr(PlainDecoder, "_enlarged", lambda self, one: drawn.append(len(one)) or whole(self, one))
    backend = backend_of(lively_sam())
    image = photo(64, 64)
    (embedding,) = backend.encode([image])
    decoded = backend.decode_prompts(embedding, points=point_grid(3, (64, 64))[:, None])
    threshold = float(decoded.iou.flatten().sort().values[-5:-3].mean())
    assert drawn == []
    shifted = replace(EVERYTHING, pred_iou_threshold=10.0, level_bonus=(10.0 - threshold,) * 3)
    found = generate(backend, image, shifted)
    assert sum(drawn) == len(set((decoded.iou > threshold).nonzero()[:, 0].tolist())) < 9
    assert len(found) <= 4


def test_other_models_run_their_own_code() -> None:
    class Other(type(tiny_sam().mask_decoder)):  # type: ignore[misc]
        pass

    plain, subclass, hooked, exchanged = (tiny_sam() for _ in range(4))
    subclass.mask_decoder.__class__ = Other
    hooked.mask_decoder.transformer.layers[0].mlp.register_forward_hook(lambda *_: None)
    hooked.image_encoder.blocks[0].attn.forward = lambda values: values
    exchanged.image_encoder.blocks[1].norm1 = nn.Identity()
    assert has_plain_decoder(plain)
    assert has_plain_encoder(plain)
    assert not any(has_plain_decoder(sam) for sam in (subclass, hooked, blob_sam()))
    assert not any(has_plain_encoder(sam) for sam in (hooked, exchanged))


# Pieces ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(375, 500), (64, 64), (333, 91), (10, 11)])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_crops_and_points_are_those_of_the_package(size: tuple[int, int], layers: int) -> None:
    from segment_anything.utils.amg import build_point_grid, generate_crop_boxes

    boxes, owners = generate_crop_boxes(size, layers, 512 / 1500)
    crops = crops_of(*size, layers, 512 / 1500)
    expected = [(*box, owner) for box, owner in zip(boxes, owners, strict=True) if box[0] < box[2] and box[1] < box[3]]
    assert [(c.left, c.top, c.right, c.bottom, c.layer) for c in crops] == expected
    np.testing.assert_array_equal(point_grid(7, size), build_point_grid(7) * np.array([size[1], size[0]]))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("least", [1, 5, 40, 10_000])
def test_clean_up_is_that_of_the_package(seed: int, least: int) -> None:
    from segment_anything.utils import amg

    generator = np.random.default_rng(seed)
    mask = cv2.GaussianBlur(generator.random((60, 80)), (0, 0), 1.5) > (0.5 if seed < 4 else 2.0 * (seed == 4))
    filled, first = amg.remove_small_regions(mask, least, "holes")
    kept, second = amg.remove_small_regions(filled, least, "islands")
    found, changed = remove_small_regions(mask, least)
    np.testing.assert_array_equal(found, kept)
    assert changed == (first or second)


def test_boxes_of_masks() -> None:
    masks = np.concatenate([rectangles(20, 30, 40, seed=5), np.zeros((1, 30, 40), bool)])
    masks[3] = False
    masks[3, 0, 0] = True
    boxes = mask_boxes(torch.from_numpy(masks)).tolist()
    for mask, box in zip(masks[:-1], boxes, strict=False):
        rows, columns = np.nonzero(mask)
        assert box == [columns.min(), rows.min(), columns.max(), rows.max()]
    assert boxes[-1] == [0, 0, 0, 0]
    assert mask_boxes(torch.zeros(0, 5, 5, dtype=torch.bool)).shape == (0, 4)


def slow_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable"):
        overlaps = []
        for other in kept:
            low, high = np.maximum(boxes[index, :2], boxes[other, :2]), np.minimum(boxes[index, 2:], boxes[other, 2:])
            shared = np.prod(np.maximum(high - low, 0))
            area = [np.prod(boxes[k, 2:] - boxes[k, :2]) for k in (index, other)]
            overlaps.append(shared / max(sum(area) - shared, 1e-9))
        if not overlaps or max(overlaps) <= threshold:
            kept.append(int(index))
    return kept


@pytest.mark.parametrize("count", [0, 1, 60, 250])
def test_suppression_is_stable_among_equals(count: int) -> None:
    generator = np.random.default_rng(count)
    corner = generator.integers(0, 60, (count, 2))
    boxes = np.concatenate([corner, corner + generator.integers(0, 50, (count, 2))], axis=1)
    scores = generator.choice([0.0, 0.5, 1.0], count).astype(np.float32)
    assert suppress(boxes, scores, 0.7).tolist() == slow_nms(boxes, scores, 0.7)


def test_boxes_that_overlap_exactly_as_much_as_allowed_stay() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5]])
    assert suppress(boxes, np.array([1.0, 0.5], np.float32), 0.5).tolist() == [0, 1]
    assert suppress(boxes, np.array([1.0, 0.5], np.float32), 0.49).tolist() == [0]
