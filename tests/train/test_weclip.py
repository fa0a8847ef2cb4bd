"""What must hold of WeCLIP's parts whatever the numbers: against plain loops, and as properties."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.cam.gradcam import run_last_block
from clipseed.clip.model import FrozenClip
from clipseed.clip.text import TextBank
from clipseed.data.dataset import DatasetOptions, open_dataset
from clipseed.data.types import Sample
from clipseed.errors import ImageError, InputError, UsageError
from clipseed.refine.affinity import balance
from clipseed.refine.boxes import box_masks
from clipseed.refine.par import refine_par
from clipseed.train.augment import Augmentation
from clipseed.train.crops import Crops, LabelledCrops
from clipseed.train.distributed import Team
from clipseed.train.inference import ViewOptions, averaged_logits, shown
from clipseed.train.weclip.affinity import pair_labels, token_affinity
from clipseed.train.weclip.decoder import Decoder, kept_channels
from clipseed.train.weclip.frozen import initial_cams, look
from clipseed.train.weclip.labels import refined_scores, score_maps, strongest
from clipseed.train.weclip.losses import affinity_loss, balanced_loss
from clipseed.train.weclip.network import fresh_decoder
from clipseed.train.weclip.options import WeclipOptions, default_steps, preset
from clipseed.train.weclip.refining import agreeing, confirmed_map
from clipseed.train.weclip.trainer import Weclip
from clipseed.types import IGNORE


@pytest.fixture(scope="module")
def clip() -> FrozenClip:
    return FrozenClip.load(weights="toy", device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def text(clip: FrozenClip) -> TextBank:
    return clip.encode_text(open_dataset(DatasetOptions("toy")).vocabulary)


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attention(blocks: int = 6, images: int = 3, patches: int = 12) -> Tensor:
    """Attention between patches: rows sum to less than 1, differently in each block."""
    whole = torch.randn(blocks, images, patches + 1, patches + 1, generator=dice()).softmax(dim=-1)
    return whole[..., 1:, 1:]


def test_the_signed_choice_does_not_depend_on_the_decoder() -> None:
    maps = attention()
    choices = [agreeing(torch.rand(3, 12, 12, generator=dice(seed)), maps) for seed in range(4)]
    assert all(torch.equal(choices[0], other) for other in choices)
    assert choices[0].any(dim=0).all()
    assert not choices[0].all(dim=0).any()


@pytest.mark.parametrize("choice", ["signed", "abs", "none"])
def test_the_confirmed_map_against_a_plain_loop(choice: str) -> None:
    maps, affinity = attention().double(), torch.rand(3, 12, 12, generator=dice(9)).double()
    ours = confirmed_map(affinity, list(maps), choice)  # type: ignore[arg-type]
    for image in range(3):
        scores = []
        for block in maps:
            difference = affinity[image] - block[image]
            scores.append(float((difference.abs() if choice == "abs" else difference).sum()))
        middle = sum(scores) / len(scores)
        kept = [k for k, value in enumerate(scores) if choice == "none" or value <= middle]
        expected = affinity[image] * sum(maps[k, image] for k in kept) / (len(kept) + 1e-5)
        torch.testing.assert_close(ours[image], expected)


def test_without_prefix_tokens_no_block_is_better_than_another() -> None:
    whole = torch.randn(6, 3, 12, 12, generator=dice()).softmax(dim=-1)
    assert agreeing(torch.rand(3, 12, 12), whole).all()


def test_balanced_maps_are_nearly_doubly_stochastic() -> None:
    balanced = balance(confirmed_map(torch.rand(3, 12, 12, generator=dice()), list(attention())))
    for axis in (1, 2):
        torch.testing.assert_close(balanced.sum(dim=axis), torch.ones(3, 12), atol=0.02, rtol=0)


def test_par_of_a_constant_map() -> None:
    image = torch.rand(1, 3, 20, 24, generator=dice())
    refined = refine_par(torch.full((1, 1, 20, 24), 0.5), image, 20)
    torch.testing.assert_close(refined, torch.full_like(refined, 0.5 * 1.01**20), rtol=1e-4, atol=0)


def test_only_the_released_boxes_avoid_the_last_row_and_column() -> None:
    cams = torch.rand(20, 7, 9, generator=dice()).numpy()
    released = box_masks(cams, 0.4, released=True)
    assert not released[:, -1].any()
    assert not released[:, :, -1].any()
    assert box_masks(cams, 0.4)[:, -1].any()


def test_pair_labels_against_plain_loops() -> None:
    labels = torch.randint(0, 3, (2, 12, 16), generator=dice(), dtype=torch.uint8)
    labels[0, :5] = IGNORE
    pairs = pair_labels(labels, 4, radius=1)
    cells = labels[:, ::4, ::4]
    for image in range(2):
        for i in range(12):
            for j in range(12):
                (a, b), (c, d) = divmod(i, 4), divmod(j, 4)
                one, other = int(cells[image, a, b]), int(cells[image, c, d])
                far = abs(a - c) > 1 or abs(b - d) > 1
                expected = IGNORE if far or IGNORE in (one, other) else int(one == other)
                assert int(pairs[image, i, j]) == expected
    assert torch.equal(pairs, pairs.transpose(1, 2))


def test_losses_of_an_empty_side_are_finite_and_have_its_gradient() -> None:
    logits = torch.randn(2, 3, 4, 4, generator=dice(), requires_grad=True)
    for labels in (torch.zeros(2, 8, 8), torch.full((2, 8, 8), 2.0), torch.full((2, 8, 8), float(IGNORE))):
        loss = balanced_loss(logits, labels.to(torch.uint8))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
        assert (float(loss.detach()) == 0) == bool((labels == IGNORE).all())
    affinity = torch.rand(2, 4, 4, generator=dice(), requires_grad=True)
    nothing = affinity_loss(affinity, torch.full((2, 4, 4), IGNORE, dtype=torch.uint8))
    assert float(nothing.detach()) == 0


class OfTwo(Team):
    """One of two processes; ``counts`` are those of the other, in the order in which they are asked for."""

    def __init__(self, counts: list[int]) -> None:
        super().__init__(0, 2)
        object.__setattr__(self, "_counts", counts)

    def total(self, count: Tensor) -> Tensor:
        return count + self._counts.pop(0)  # type: ignore[attr-defined]


def test_losses_shared_by_two_processes_are_those_of_one() -> None:
    logits = torch.randn(4, 3, 4, 4, generator=dice())
    labels = torch.randint(0, 3, (4, 8, 8), generator=dice(), dtype=torch.uint8)
    labels[:2, 2:] = 0  # very different numbers of foreground pixels in the two halves
    affinity, pairs = torch.rand(4, 4, 4, generator=dice()), pair_labels(labels, 4)
    halves = (slice(0, 2), slice(2, 4))

    def shared(counted: list[list[int]], loss) -> float:  # type: ignore[no-untyped-def]
        return float(np.mean([loss(half, OfTwo(other)) for half, other in zip(halves, counted[::-1], strict=True)]))

    counted = [[int((labels[half] == 0).sum()), int((labels[half] != 0).sum())] for half in halves]
    ours = shared(counted, lambda half, team: float(balanced_loss(logits[half], labels[half], team)))
    assert ours == pytest.approx(float(balanced_loss(logits, labels)), rel=1e-5)
    counted = [[int((pairs[half] == 1).sum()), int((pairs[half] == 0).sum())] for half in halves]
    ours = shared(counted, lambda half, team: float(affinity_loss(affinity[half], pairs[half], team)))
    assert ours == pytest.approx(float(affinity_loss(affinity, pairs)), rel=1e-5)


def test_dropout_hides_whole_channels_by_the_seed_of_the_image() -> None:
    kept = kept_channels([5, 6], 4000, 0.1)
    assert kept.shape == (2, 1, 4000)
    torch.testing.assert_close(kept.unique(), torch.tensor([0, 1 / 0.9]))
    assert float((kept == 0).float().mean()) == pytest.approx(0.1, abs=0.02)
    assert torch.equal(kept[1:], kept_channels([6], 4000, 0.1))


def test_the_decoder_has_the_published_number_of_parameters() -> None:
    counts = [sum(p.numel() for p in Decoder(11, 768, classes).parameters()) for classes in (21, 81)]
    assert counts == [5_985_045, 6_000_465]
    fresh = Decoder(2, 8, 3, 8, 2, 2)
    assert all(not block.qkv.bias.any() and not block.out.bias.any() for block in fresh.blocks)


def test_maps_of_a_batch_equal_autograd(clip: FrozenClip, text: TextBank) -> None:
    """Images with two, no and one class in one pass, against a backward pass for each class by itself."""
    tower = clip.tower
    pixels = torch.randn(3, 3, 48, 64, generator=dice())
    labels = [(1, 4), (), (7,)]
    sight = look(tower, pixels, 2)
    assert len(sight.attention) == 2
    cams, probability = initial_cams(tower, text, sight, labels, released=True)
    assert [len(cam) for cam in cams] == [2, 0, 1]
    tokens, place, block = tower.dense(pixels).tokens, 0, tower.blocks[-1]
    for image, row in enumerate(labels):
        for position, label in enumerate(row):
            a = block.norm_1(tokens[image : image + 1]).requires_grad_()
            q, k, v = block.split_heads(a)
            attended = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
            last = block.finish(tokens[image : image + 1], attended)
            feature = tower.norm_post(last)[:, 1:].mean(dim=1) @ tower.projection
            present = torch.zeros(1, len(text.classes), dtype=torch.bool)
            present[0, list(row)] = True
            p = text.probabilities(feature, present)[0, label]
            (gradient,) = torch.autograd.grad(p, a)
            raw = (gradient[:, 1:].mean(dim=1) @ a[0, 1:].T).relu().view(sight.grid)
            raw = (raw - raw.min()) / (raw - raw.min()).max()
            torch.testing.assert_close(cams[image][position], raw.detach(), atol=2e-4, rtol=0)
            torch.testing.assert_close(probability[place], p.detach(), atol=1e-5, rtol=0)
            place += 1
    torch.testing.assert_close(run_last_block(tower, tokens).mean_attention(), sight.attention[-1])


def test_images_are_refined_as_if_alone() -> None:
    """Images with different numbers of classes in one batch; one without any is background."""
    images = torch.rand(4, 3, 24, 32, generator=dice())
    scores = [score_maps(torch.rand(k, 3, 4, generator=dice(k)), (24, 32)) for k in (2, 0, 1, 2)]
    refined = refined_scores(scores, images, 3)
    for k, rows in enumerate(refined):
        alone = refine_par(scores[k][None], images[k : k + 1], 3)[0] if len(rows) > 1 else scores[k]
        torch.testing.assert_close(rows, alone)
    labels = strongest(refined, [(3, 5), (), (0,), (1, 2)])
    assert set(labels[0].unique().tolist()) <= {0, 4, 6}
    assert not labels[1].any()
    assert all(torch.equal(a, b) for a, b in zip(refined_scores(scores, images, 0), scores, strict=True))


def trained(clip: FrozenClip, text: TextBank | None, options: WeclipOptions, batch: Crops, steps: int = 3) -> Weclip:
    trainer = Weclip(clip.tower, text, fresh_decoder(clip, 11, options, 0), options, steps)
    optimizer = trainer.optimizer()
    for step in range(steps):
        optimizer.zero_grad()
        trainer.losses(batch, step)["loss"].backward()
        optimizer.step()
    return trainer


def batch_of(count: int, crop: int = 64) -> Crops:
    toy = open_dataset(DatasetOptions("toy", split="train"))
    data = LabelledCrops(toy.samples, toy.reader, Augmentation(crop, (0.5, 1.0)), None)
    return data.collate([data.sample(k, 100 + k) for k in range(count)])


SMALL = WeclipOptions(width=16, heads=2, blocks=1, warm_up=0, crop=64, par_iterations=2, rfm_from=1)


def test_the_tower_is_frozen(clip: FrozenClip, text: TextBank) -> None:
    before = [block.qkv.weight.clone() for block in clip.tower.blocks]
    model = {name: value.clone() for name, value in clip._model.state_dict().items()}
    trainer = trained(clip, text, SMALL, batch_of(2))
    assert all(torch.equal(a, block.qkv.weight) for a, block in zip(before, clip.tower.blocks, strict=True))
    assert all(torch.equal(value, model[name]) for name, value in clip._model.state_dict().items())
    changed = fresh_decoder(clip, 11, SMALL, 0).state_dict()
    moved = {name for name, value in trainer.module.state_dict().items() if not torch.equal(value, changed[name])}
    assert len(moved) >= len(changed) - 1
    assert not any(value.requires_grad for value in clip.tower.dense(torch.zeros(1, 3, 32, 32)).tokens)


def test_padding_is_ignored_unless_it_is_to_be_learned(
    clip: FrozenClip, text: TextBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipseed.train.weclip import trainer as module

    seen: list[Tensor] = []
    monkeypatch.setattr(module, "balanced_loss", lambda logits, labels, team: seen.append(labels) or logits.sum())
    batch = batch_of(3, crop=160)
    outside = batch.known == IGNORE
    assert outside.any()
    trained(clip, text, SMALL, batch, 1)
    assert torch.equal(seen[-1] == IGNORE, outside)
    trained(clip, text, WeclipOptions(**{**vars(SMALL), "supervise_padding": True}), batch, 1)
    assert not (seen[-1] == IGNORE).any()


def test_masks_need_no_text_and_no_labels(clip: FrozenClip) -> None:
    """Loss of given masks: mean cross-entropy over known pixels, those with too little confidence left out."""
    known = torch.randint(0, 11, (2, 64, 64), generator=dice(), dtype=torch.uint8)
    known[:, :20] = IGNORE
    confidence = torch.rand(2, 64, 64, generator=dice(1))
    options = WeclipOptions(**{**vars(SMALL), "dropout": 0.0, "confidence": 0.4})
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=dice(2), dtype=torch.uint8)
    trainer = Weclip(clip.tower, None, fresh_decoder(clip, 11, options, 0), options, 5)
    losses = trainer.losses(Crops(pixels, known, [(), ()], confidence=confidence), 0)
    sight = look(clip.tower, clip.tower.normalize(pixels))
    logits = trainer.module(sight.levels, sight.grid)
    wide = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
    target = known.long().masked_fill(confidence < 0.4, IGNORE)
    expected = F.cross_entropy(wide, target, ignore_index=IGNORE)
    torch.testing.assert_close(losses["segmentation"], expected)
    assert "probability" not in losses
    assert float(losses["saturated"]) == float(
        (token_affinity(trainer.module.fuse(sight.levels)) > 0.99).float().mean()
    )


class Reader:
    """Some images are broken."""

    def __init__(self, broken: set[str]) -> None:
        self.broken = broken
        self.toy = open_dataset(DatasetOptions("toy"))

    def __call__(self, sample: Sample):  # type: ignore[no-untyped-def]
        if sample.id in self.broken:
            raise ImageError(f"{sample.id}.jpg: damaged")
        return self.toy.reader(sample)

    def file(self, sample: Sample) -> Path | None:
        return None


def test_the_next_image_stands_in_for_a_broken_one() -> None:
    samples = open_dataset(DatasetOptions("toy")).samples[:3]
    augmentation = Augmentation(64)
    data = LabelledCrops(samples, Reader({samples[2].id}), augmentation, None)
    batch = data.collate([data.sample(2, 7), data.sample(1, 8)])
    whole = LabelledCrops(samples, Reader(set()), augmentation, None)
    assert torch.equal(batch.pixels[0], whole.sample(0, 7).parts[0])
    assert batch.labels[0] == tuple(sorted(samples[0].labels or ()))
    assert batch.skipped == {samples[2].id: f"{samples[2].id}.jpg: damaged"}
    nothing = LabelledCrops(samples, Reader({sample.id for sample in samples}), augmentation, None)
    with pytest.raises(InputError, match="none of the 3 images to train on can be read"):
        nothing.sample(0, 0)


def test_presets() -> None:
    assert WeclipOptions(**preset("voc")) == WeclipOptions()
    coco = WeclipOptions(**preset("coco"))
    assert (coco.rfm_layers, coco.box_threshold, default_steps("coco")) == (10, 0.7, 80_000)
    released = WeclipOptions(**preset("voc", released=True))
    assert (released.statistics, released.supervise_padding, released.rfm_from) == ("imagenet", True, 9_144)
    assert [WeclipOptions().confirmed(step, 30_000) for step in (14_999, 15_000)] == [False, True]
    for wrong in ({"heads": 7}, {"dropout": 1.0}, {"lr": math.nan}, {"scales": (2.0, 0.5)}, {"crop": 0}, {"mirror": 2}):
        with pytest.raises(UsageError, match="--"):
            WeclipOptions(**wrong).check()


class Flat:
    """Logits that tell what was seen: the mean color of every patch."""

    patch, device = 16, torch.device("cpu")

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def logits(self, images: Tensor) -> Tensor:
        self.sizes.append((images.shape[2], images.shape[3]))
        return F.avg_pool2d(images.float(), 16)


def test_scales_and_mirror_images_are_averaged() -> None:
    images = torch.randint(0, 256, (2, 3, 64, 112), generator=dice(), dtype=torch.uint8)
    network = Flat()
    found = averaged_logits(network, images, ViewOptions((1.0, 0.75), flip=True))
    assert network.sizes == [(64, 112), (64, 112), (48, 80), (48, 80)]  # whole patches
    assert found.shape == (2, 3, 4, 7)
    torch.testing.assert_close(averaged_logits(Flat(), images, ViewOptions(flip=True)), Flat().logits(images))
    one = averaged_logits(Flat(), images, ViewOptions((1.0,)))
    other = averaged_logits(Flat(), images, ViewOptions((1.0, 0.75)))
    assert 0 < float((one - other).abs().mean()) < 30


def test_images_are_shown_in_whole_patches_or_cut_off() -> None:
    from PIL import Image

    image = Image.fromarray(np.zeros((50, 101, 3), np.uint8))
    assert shown(image, 16, ViewOptions()).shape == (3, 64, 112)
    assert shown(image, 16, ViewOptions(max_side=64)).shape == (3, 32, 64)
    assert shown(image, 16, ViewOptions(max_side=202, released=True)).shape == (3, 100, 202)
    assert shown(Image.fromarray(np.zeros((1, 3, 3), np.uint8)), 16, ViewOptions()).shape == (3, 16, 16)


def test_a_cache_changes_nothing_but_the_cost(
    clip: FrozenClip, text: TextBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses as without, the tower run once for each image, in both phases."""
    from clipseed.train.weclip import trainer as module

    toy = open_dataset(DatasetOptions("toy", split="train"))
    data = LabelledCrops(toy.samples[:3], toy.reader, Augmentation(64, (1, 1), 0), None, fixed=True)
    looked: list[int] = []
    see = module.see
    monkeypatch.setattr(module, "see", lambda *given, **named: looked.append(len(given[2])) or see(*given, **named))
    losses = []
    for cached in (True, False):
        trainer = Weclip(clip.tower, text, fresh_decoder(clip, 11, SMALL, 0), SMALL, 4, cached=cached)
        batches = [
            data.collate([data.sample(k, 10 * step + k) for k in ((0, 1), (1, 2), (0, 2))[step]]) for step in range(3)
        ]
        losses.append([{name: float(value.detach()) for name, value in trainer.losses(batch, step).items()}
                       for step, batch in enumerate(batches)])  # fmt: skip
        if cached:
            assert looked == [1, 1, 1]
    for ours, plain in zip(*losses, strict=True):
        assert ours == pytest.approx(plain, rel=1e-4)
