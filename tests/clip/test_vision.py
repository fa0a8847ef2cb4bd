"""The vision tower: what it gives of any block, pixel statistics, and any number of tokens before the patches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.cam.gradcam import channel_weights, gradcam, pair_index, run_last_block, score_gradient
from clipseed.clip.attention import patch_attention
from clipseed.clip.surgery import dual_path, neighbour_patches, self_correlation, value_patches, vicinity
from clipseed.clip.text import TextBank, present_mask
from clipseed.clip.vision import Block, VisionTower, attention_map, merge_heads, tower_from

from helpers.models import tiny_config, tiny_model

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
GRID = (3, 5)
PREFIXES = [0, 1, 5]
"""SigLIP's tokens, CLIP's, and those of towers with a class token and four registers."""


def make(**vision: Any) -> tuple[Any, VisionTower]:
    model = tiny_model(tiny_config(**vision))
    return model, tower_from(model.visual, MEAN, STD, CPU, torch.float32)


def with_prefix(count: int, **vision: Any) -> VisionTower:
    """A tower with so many tokens before its patches."""
    _, tower = make(**vision)
    generator = torch.Generator().manual_seed(count)
    prefix = torch.randn(count, tower.width, generator=generator)
    positions = torch.randn(count + 16, tower.width, generator=generator)
    return replace(tower, prefix=prefix, positions=positions, mean_pool=count == 0)


def noise(seed: int, count: int = 2, grid: tuple[int, int] = GRID) -> Tensor:
    return torch.randn(count, 3, grid[0] * 16, grid[1] * 16, generator=torch.Generator().manual_seed(seed))


def test_tokens_and_attention_of_every_block() -> None:
    """Against open_clip's own modules, the last block too."""
    model, tower = make()
    pixels = noise(1, grid=(4, 4))
    streams, maps = [], []
    with torch.no_grad():
        x = model.visual._embeds(pixels)
        for block in model.visual.transformer.resblocks:
            a = block.ln_1(x)
            maps.append(block.attn(a, a, a, need_weights=True, average_attn_weights=True)[1])
            x = block(x)
            streams.append(x)
    found = tower.dense(pixels, block_tokens=range(3), block_attention=range(3))
    assert list(found.block_tokens) == list(found.block_attention) == [0, 1, 2]
    for k in range(3):
        torch.testing.assert_close(found.block_tokens[k], streams[k], rtol=0, atol=1e-4)
        torch.testing.assert_close(found.block_attention[k], maps[k], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.block_attention[k].sum(dim=-1), torch.ones(2, 17), rtol=0, atol=1e-5)
    assert torch.equal(found.tokens, found.block_tokens[1])  # what enters the last block
    last = run_last_block(tower, found.tokens).mean_attention()
    torch.testing.assert_close(found.block_attention[2][:, 1:, 1:], last, rtol=0, atol=1e-6)


def test_what_is_asked_for_changes_nothing_else() -> None:
    _, tower = make()
    pixels = noise(2)
    plain, mean = tower.dense(pixels), tower.dense(pixels, (0, 1))
    assert (plain.block_tokens, plain.block_attention, plain.attention) == ({}, {}, None)
    both = tower.dense(pixels, (0, 1), block_tokens=(0,), block_attention=(0, 1))
    assert torch.equal(both.tokens, mean.tokens)
    assert mean.attention is not None
    assert both.attention is not None
    assert torch.equal(both.attention, mean.attention)
    apart = tower.dense(pixels, block_attention=(0, 1)).block_attention
    for k in (0, 1):  # the sum of maps is not made in one of them
        assert torch.equal(both.block_attention[k], apart[k])
    for wrong in ({"block_tokens": (3,)}, {"block_attention": (-1,)}):
        with pytest.raises(ValueError, match="blocks must be among 0…2"):
            tower.dense(pixels, **wrong)  # type: ignore[arg-type]


def test_the_last_block_runs_only_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tower = make()
    ran: list[int] = []
    original = Block.finish

    def finish(self: Block, x: Tensor, attended: Tensor) -> Tensor:
        ran.append(next(k for k, block in enumerate(tower.blocks) if block is self))
        return original(self, x, attended)

    monkeypatch.setattr(Block, "finish", finish)
    tower.dense(noise(3), (1,), block_tokens=(0,), block_attention=(1,))
    assert ran == [0, 1]
    tower.dense(noise(3), block_attention=(2,))
    assert ran == [0, 1, 0, 1, 2]


def test_pixel_statistics() -> None:
    _, tower = make()
    images = torch.randint(0, 256, (2, 3, 16, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    given: list[tuple[Any, Any, Any, Any]] = [(None, None, MEAN, STD), (mean, std, mean, std), (mean, None, mean, STD)]
    for own_mean, own_std, m, s in given:
        found = tower.normalize(images, own_mean, own_std)
        for channel in range(3):
            expected = (images[:, channel].double() / 255 - m[channel]) / s[channel]
            torch.testing.assert_close(found[:, channel].double(), expected, rtol=0, atol=1e-5)


# Any number of prefix tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", PREFIXES)
def test_position_table(count: int) -> None:
    tower = with_prefix(count)
    assert tower.prefix_tokens == count
    assert torch.equal(tower.position_table((4, 4)), tower.positions)
    table = tower.position_table(GRID)
    assert table.shape == (count + 15, 64)
    assert torch.equal(table[:count], tower.positions[:count])
    square = tower.positions[count:].view(4, 4, 64).permute(2, 0, 1)[None]
    expected = F.interpolate(square, GRID, mode="bilinear")[0].permute(1, 2, 0).reshape(15, 64)
    torch.testing.assert_close(table[count:], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", PREFIXES)
def test_prefix_tokens_come_first(count: int) -> None:
    tower = replace(with_prefix(count), norm_pre=None)
    pixels = noise(5)
    tokens, grid = tower.embed(pixels)
    assert grid == GRID
    assert tokens.shape == (2, count + 15, 64)
    table = tower.position_table(GRID)
    for image in range(2):
        assert torch.equal(tokens[image, :count], tower.prefix + table[:count])
    patches = F.conv2d(pixels, tower.patch_weight, stride=16).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens[:, count:], patches + table[count:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", PREFIXES)
def test_attention_between_patches(count: int) -> None:
    tower = with_prefix(count)
    pixels = noise(6)
    features = tower.dense(pixels, (0, 1), block_attention=(0, 1, 2))
    assert features.block_attention[0].shape == (2, count + 15, count + 15)
    between = [features.block_attention[k][:, count:, count:] for k in range(3)]
    assert features.attention is not None
    assert features.attention.shape == (2, 15, 15)
    torch.testing.assert_close(features.attention, (between[0] + between[1]) / 2, rtol=0, atol=1e-6)
    torch.testing.assert_close(run_last_block(tower, features.tokens).mean_attention(), between[2], rtol=0, atol=1e-6)
    images = torch.randint(0, 256, (2, 3, 48, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    every = tower.dense(tower.normalize(images), block_attention=(0, 1, 2)).block_attention
    expected = torch.stack([every[k][:, count:, count:] for k in range(3)]).mean(dim=0)
    torch.testing.assert_close(patch_attention(tower, images, 8), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", PREFIXES)
def test_patch_features(count: int) -> None:
    """Attention surgery on the patches, whatever stands before them; prefix tokens take part as keys."""
    tower = with_prefix(count)
    pixels = noise(7)
    tokens = tower.dense(pixels).tokens
    block = tower.blocks[-1]
    _, k, v = block.split_heads(block.norm_1(tokens))
    values = value_patches(tower, tokens)
    torch.testing.assert_close(values, block.out(merge_heads(v))[:, count:], rtol=0, atol=1e-5)
    bonus = torch.zeros(count + 15, count + 15)
    bonus[count:, count:] = vicinity(GRID, 2.0, CPU)
    weights = (k @ k.transpose(2, 3) / k.shape[-1] ** 0.5 + bonus).softmax(dim=-1)
    expected = block.out(merge_heads(weights @ v))[:, count:]
    torch.testing.assert_close(neighbour_patches(tower, tokens, GRID, 2.0), expected, rtol=0, atol=1e-4)
    found = dual_path(tower, pixels, 1)
    q, k, v = block.split_heads(block.norm_1(tokens))
    fresh = tokens + block.out(self_correlation(q, k, v) @ merge_heads(v))
    torch.testing.assert_close(found.patches, fresh[:, count:], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.image, tower.encode(pixels), rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", PREFIXES)
def test_image_feature(count: int) -> None:
    tower = with_prefix(count)
    pixels = noise(8)
    after = tower.norm_post(tower.dense(pixels, block_tokens=(2,)).block_tokens[2])
    pooled = after[:, count:].mean(dim=1) if count == 0 else after[:, 0]
    torch.testing.assert_close(tower.encode(pixels), pooled @ tower.projection, rtol=0, atol=1e-4)
    averaged = replace(tower, mean_pool=True).encode(pixels)
    torch.testing.assert_close(averaged, after[:, count:].mean(dim=1) @ tower.projection, rtol=0, atol=1e-4)
    if count == 0:
        with pytest.raises(ValueError, match="without a class token"):
            replace(tower, mean_pool=False).encode(pixels)


@pytest.mark.parametrize("competition", ["softmax", "sigmoid"])
@pytest.mark.parametrize("vision", [{}, {"ls_init_value": 0.3}, {"final_ln_after_pool": True, "pool_type": "avg"}])
@pytest.mark.parametrize("count", PREFIXES)
def test_closed_form_gradcam_equals_autograd(count: int, vision: dict[str, Any], competition: Any) -> None:
    """The last block in plain operations, differentiated by autograd."""
    tower = with_prefix(count, **vision)
    block, labels = tower.blocks[-1], [[2, 0], [1]]
    rows = F.normalize(torch.randn(7, 32, generator=torch.Generator().manual_seed(9)), dim=-1)
    text = TextBank(rows[:4], rows[4:], 15.0, competition, -3.0)
    present = present_mask(labels, 4)
    features = tower.dense(noise(9))
    tokens = features.tokens
    weights, maps = [], []
    for image, row in enumerate(labels):
        for label in row:
            a = block.norm_1(tokens[image : image + 1]).requires_grad_()
            q, k, v = block.split_heads(a)
            x = block.finish(tokens[image : image + 1], attention_map(q, k) @ v)[:, count:]
            pooled = tower.norm_post(x.mean(dim=1)) if tower.norm_after_pool else tower.norm_post(x).mean(dim=1)
            score = text.probabilities(pooled @ tower.projection, present[image : image + 1])[0, label]
            (gradient,) = torch.autograd.grad(score, a)
            weights.append(gradient[0, count:].mean(dim=0))
            maps.append((a[0, count:].detach() @ weights[-1]).view(GRID))
    state = run_last_block(tower, tokens)
    assert state.prefix_tokens == count
    image, label = pair_index(labels, CPU)
    gradient = score_gradient(state.feature, text, present, image, label, "softmax")
    found = channel_weights(tower, state, [2, 1], gradient)
    for ours, theirs in zip(found, weights, strict=True):
        assert (ours - theirs).abs().max() <= 3e-5 * theirs.abs().max()
    for ours, theirs in zip(gradcam(tower, state, text, labels, GRID), maps, strict=True):
        assert (ours - theirs).abs().max() <= 3e-5 * theirs.abs().max()
