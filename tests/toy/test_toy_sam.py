"""The tiny SAM of the toy world answers prompts about held-out scenes, and its training does what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipseed.data.toy.dataset import HELD_OUT_SEED
from clipseed.data.toy.world import Scene, lay_out
from clipseed.runtime.interrupt import Interrupted
from clipseed.sam.architecture import SamConfig
from clipseed.sam.generator import generate
from clipseed.sam.load import load_sam
from clipseed.train.loop import METRICS
from clipseed.train.metrics import read_metrics
from tools.toy import sam_objective, sam_start, sam_targets, train_clip, train_sam
from tools.toy.measure_sam import GRID, TOY_SAM, iou, measure

SMALL = SamConfig(
    image_size=64,
    embed_dim=64,
    depth=2,
    heads=2,
    mlp_ratio=2.0,
    window_size=0,
    global_attn_indexes=(),
    out_chans=64,
    decoder_heads=2,
    decoder_mlp_dim=32,
    iou_head_hidden_dim=32,
)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _two_materials() -> Scene:
    return next(scene for scene in (lay_out(3, k) for k in range(50)) if len(scene.materials) == 2)


def test_shipped_weights_are_small_and_load() -> None:
    assert TOY_SAM.stat().st_size < 12_000_000
    backend = load_sam(TOY_SAM, "cpu")
    assert backend.side == sam_start.CONFIG.image_size


def test_points_and_boxes_find_whole_objects() -> None:
    found = measure(load_sam(TOY_SAM, "cpu"), 8, options=replace(GRID, points_per_side=1))
    assert found.objects > 12
    assert found.point_iou > 0.8
    assert found.box_iou > 0.35  # weak: see docs/toy.md
    assert found.stability > 0.9
    assert found.calibration < 0.15


def test_the_stock_generator_proposes_objects() -> None:
    backend = load_sam(TOY_SAM, "cpu")
    hits = []
    for index in range(3):
        scene = lay_out(HELD_OUT_SEED, index)
        proposals = generate(backend, scene.image(), GRID)
        assert 2 <= len(proposals) < 60
        hits += [max(iou(mask, item.visible) for mask in proposals.masks) > 0.75 for item in scene.objects]
    assert np.mean(hits) > 0.7


def test_training_never_sees_scored_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def recorded(seed: int, index: int) -> Scene:
        drawn.append(seed)
        return lay_out(seed, index)

    monkeypatch.setattr(train_sam, "lay_out", recorded)
    train_sam.lesson(0, SMALL, train_sam.Plan())
    train_sam.lesson(123456, SMALL, train_sam.Plan())
    assert set(drawn) == {train_sam.FIRST_SEED}
    of_clip = range(train_clip.FIRST_SEED, train_clip.FIRST_SEED + len(train_clip.STAGES))
    assert train_sam.FIRST_SEED != HELD_OUT_SEED
    assert train_sam.FIRST_SEED not in of_clip


def test_the_ground_map_says_which_material_was_painted() -> None:
    scene = _two_materials()
    image, ground = scene.paint()
    np.testing.assert_array_equal(image, scene.image())
    assert set(np.unique(ground)) == {0, 1}
    # Nowhere is the free background of two materials as different as across the border between them.
    free = scene.mask() == 0
    inner = [cv2.erode((free & (ground == k)).astype(np.uint8), np.ones((7, 7))) > 0 for k in (0, 1)]
    means = [image[region].mean(axis=0) for region in inner]
    assert np.abs(means[0] - means[1]).max() > 10
    single = next(scene for scene in (lay_out(3, k) for k in range(50)) if len(scene.materials) == 1)
    assert not single.paint()[1].any()


def test_the_three_answers_are_piece_surface_and_thing() -> None:
    scene = _two_materials()
    _, ground = scene.paint()
    shown = sam_targets.view(scene, max(scene.size))  # at its own scale: nothing is resized
    assert shown.pixels.shape[:2] == scene.size
    assert len(shown.objects) == len(scene.objects)
    for item in scene.objects:
        for surface in (item.visible_part, item.visible & ~item.visible_part):
            rows, columns = np.nonzero(surface)
            pieces, answers = cv2.connectedComponents(surface.astype(np.uint8))[1], None
            for k in (0, len(rows) // 2, len(rows) - 1):
                answers = shown.answer(columns[k : k + 1], rows[k : k + 1])
                np.testing.assert_array_equal(answers[2], item.visible)
                np.testing.assert_array_equal(answers[1], surface)
                np.testing.assert_array_equal(answers[0], pieces == pieces[rows[k], columns[k]])
    free = scene.mask() == 0
    rows, columns = np.nonzero(free & (ground == 1))
    answers = shown.answer(columns[:1], rows[:1])
    np.testing.assert_array_equal(answers[2], free & (ground == 1))
    np.testing.assert_array_equal(answers[1], answers[2])


def test_prompts_lie_on_what_they_ask_for() -> None:
    rng = np.random.default_rng(0)
    for index in range(6):
        shown = sam_targets.view(lay_out(3, index), 96, rng)
        height, width = shown.labels.shape[1:]
        assert max(height, width) == 96
        for prompts in (sam_targets.single_points(shown, rng, 5), sam_targets.several_points(shown, rng, 4)):
            for point, mark, target in zip(prompts.points, prompts.marks, prompts.targets, strict=True):
                columns, rows = point.T.astype(int)
                np.testing.assert_array_equal(target[2][rows, columns], mark > 0)
                assert target[0][rows[mark > 0], columns[mark > 0]].all()
            assert (prompts.targets[:, 0] <= prompts.targets[:, 1]).all()
            assert (prompts.targets[:, 1] <= prompts.targets[:, 2]).all()
        asked = sam_targets.boxes(shown, rng, 4)
        for box, target in zip(asked.boxes, asked.targets, strict=True):
            rows, columns = np.nonzero(target[2])
            exact = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
            slack = 0.1 * np.tile(exact[2:] - exact[:2], 2) + 1
            assert (np.abs(box - exact) <= slack).all()
            np.testing.assert_array_equal(target[0], target[2])


def test_losses_equal_a_plain_computation() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 8, 8, generator=generator)
    predicted = torch.rand(2, 4, generator=generator)
    targets = (torch.rand(2, 3, 12, 15, generator=generator) > 0.6).float()
    weights = np.array([1, 0.5, 0.5, 1]) / 3
    for balance in (0.0, 1.0):
        found = sam_objective.losses(logits, predicted, targets, 16, balance)
        expected = {"cross": 0.0, "dice": 0.0, "iou": 0.0}
        for prompt in range(2):
            for output, level in enumerate((2, 0, 1, 2)):
                padded = np.zeros((12, 16))
                padded[:, :15] = targets[prompt, level]
                share = padded.reshape(6, 2, 8, 2).mean(axis=(1, 3))
                logit = logits[prompt, output, :6].double().numpy()
                chance = 1 / (1 + np.exp(-logit))
                each = -(share * np.log(chance) + (1 - share) * np.log(1 - chance))
                pixel = np.ones_like(share)
                if balance:
                    pixel = share / share.mean() / 2 + (1 - share) / (1 - share.mean()) / 2
                spread = np.pad(share, 2, mode="edge")
                around = np.lib.stride_tricks.sliding_window_view(spread, (5, 5))
                pixel = pixel * (1 + 4 * (around.max(axis=(2, 3)) > around.min(axis=(2, 3))))
                dice = 1 - (2 * (chance * share).sum() + 1) / (chance.sum() + share.sum() + 1)
                inside, wanted = logit > 0, share > 0.5
                real = (inside & wanted).sum() / (inside | wanted).sum()
                factor = weights[output] / 2
                expected["cross"] += factor * (each * pixel).mean()
                expected["dice"] += factor * dice
                expected["iou"] += factor * (predicted[prompt, output].item() - real) ** 2
        for name, value in expected.items():
            assert found[name].item() == pytest.approx(value, rel=1e-4), (name, balance)


def test_a_model_starts_with_the_colours_of_cells() -> None:
    """Before training: the colours of a patch's cells are in its embedding, and each cell's features are its own."""
    config = replace(sam_start.CONFIG, image_size=64)
    sam = sam_start.build(config)
    image = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    image = image.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)  # a colour for each patch
    image[:, 16:24, 20:24] = 255 - image[:, 16:24, 20:24]  # but two for that in row 2, column 2
    with torch.no_grad():
        channels = sam.image_encoder.patch_embed(sam.preprocess(image)[None])[0, 2, 2, :48].view(4, 4, 3)
        expected = F.avg_pool2d(sam.preprocess(image)[:, 16:24, 16:24], 2).permute(1, 2, 0)
    torch.testing.assert_close(channels, expected, atol=1e-4, rtol=1e-4)
    assert (channels[:, 1] - channels[:, 2]).abs().max() > 0.1


def test_cells_are_the_pixels_of_the_low_resolution_masks() -> None:
    shown = sam_targets.view(_two_materials(), 96)
    things = sam_objective.cell_things(shown, 8)
    np.testing.assert_array_equal(things, shown.labels[2][1::2, 1::2])
    cells = sam_objective.some_cells(shown, np.random.default_rng(0), 400, 8)
    assert (cells >= 0).all()
    assert (cells < things.shape).all()
    near = []
    for row, column in cells:
        tile = things[row // 4 * 4 : row // 4 * 4 + 4, column // 4 * 4 : column // 4 * 4 + 4]
        near.append(len(np.unique(tile)) > 1)
    assert np.mean(near[:200]) == 1
    assert np.mean(near[200:]) < 0.7
    head = sam_start.CellHead(50, 3)
    embedding = torch.randn(50, 5, 5)
    spread = head(embedding)
    assert spread.shape == (20, 20, 3)
    single = F.linear(embedding[:, 2, 3], head.weight, head.bias).view(4, 4, 3)
    torch.testing.assert_close(spread[8:12, 12:16], single)


def test_kinship_is_least_when_features_follow_things() -> None:
    taught = train_sam.lesson(1, SMALL, train_sam.Plan())
    things = torch.from_numpy(sam_objective.cell_things(taught.view, 16).astype(np.int64))
    assert len(torch.unique(things)) > 1
    apart = F.pad(F.one_hot(things, 8).permute(2, 0, 1).float(), (0, 16 - things.shape[1], 0, 16 - things.shape[0]))
    same = torch.ones(8, 16, 16)

    def as_head(embedding: torch.Tensor) -> torch.Tensor:
        return embedding.permute(1, 2, 0)

    assert sam_objective.kinship_loss(as_head, apart[None], [taught], 16) < 0.02
    assert sam_objective.kinship_loss(as_head, same[None], [taught], 16) > 2


def test_sharper_masks_are_the_same_masks() -> None:
    sam = sam_start.build(SMALL)
    taught = train_sam.lesson(0, SMALL, train_sam.Plan())
    with torch.no_grad():
        embedding = sam_objective.encode(sam, [taught.view])[0]
        before, predicted = sam_objective.decode(sam, embedding, taught.prompts[0])
        sam_start.sharpen(sam, 2.0)
        after, again = sam_objective.decode(sam, embedding, taught.prompts[0])
    torch.testing.assert_close(after, 2 * before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, predicted)


def test_steps_reduce_the_loss() -> None:
    sam = sam_start.build(SMALL)
    head = sam_start.CellHead(SMALL.out_chans)
    lessons = [train_sam.lesson(number, SMALL, train_sam.Plan()) for number in range(2)]
    optimiser = torch.optim.AdamW([*sam.parameters(), *head.parameters()], lr=3e-3)
    totals = []
    for _ in range(25):
        found = train_sam.step_losses(sam, head, lessons, 1.0)
        total = found["cross"] + found["kinship"]
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0]


def test_the_loop_teaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = train_sam.lesson
    monkeypatch.setattr(train_sam, "lesson", lambda number, *rest: inner(number % 2, *rest))  # few, so that it shows
    plan = train_sam.Plan(steps=24, batch=2, rate=3e-3, warm_up=1, points=2, others=2)
    sam = train_sam.train(tmp_path, plan, SMALL)
    rows = read_metrics(tmp_path / METRICS)
    assert [row["step"] for row in rows] == list(range(1, 25))
    for name in ("cross", "kinship"):
        assert np.mean([row[name] for row in rows[-4:]]) < 0.9 * np.mean([row[name] for row in rows[:4]]), name
    fresh = sam_start.build(SMALL).state_dict()
    assert any(not torch.equal(fresh[name], value) for name, value in sam.state_dict().items())


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = train_sam.Plan(steps=4, batch=1, points=2, others=1, balanced=2)
    expected = train_sam.train(tmp_path / "whole", plan, SMALL, keep_every=2)
    inner, calls = train_sam.step_losses, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return inner(*arguments)

    monkeypatch.setattr(train_sam, "step_losses", interrupted)
    with pytest.raises(Interrupted, match="holds step 2: the same command goes on there"):
        train_sam.train(tmp_path / "parts", plan, SMALL, keep_every=2)
    monkeypatch.setattr(train_sam, "step_losses", inner)
    resumed = train_sam.train(tmp_path / "parts", plan, SMALL, keep_every=2)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)
