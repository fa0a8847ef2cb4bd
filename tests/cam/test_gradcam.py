"""The closed-form gradient against autograd through open_clip's own modules, for every kind of tower we accept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.cam.gradcam import (
    activation_slope,
    channel_weights,
    gradcam,
    minmax,
    normalize,
    pair_index,
    run_last_block,
    score_gradient,
)
from clipseed.cam.methods import compute_cams
from clipseed.clip.text import TextBank
from clipseed.clip.vision import VisionTower, tower_from

from helpers.models import tiny_config, tiny_model

CPU = torch.device("cpu")
TOWERS: dict[str, tuple[dict[str, Any], bool]] = {
    "openai": ({}, True),
    "laion": ({}, False),
    "layer scale": ({"ls_init_value": 0.3}, False),
    "CLIPA": ({"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}, False),
    "patch 32, odd mlp": ({"patch_size": 32, "image_size": 128, "mlp_ratio": 2.5}, True),
    "one head": ({"head_width": 64, "layers": 1}, True),
}


def make(kind: str) -> tuple[torch.nn.Module, VisionTower]:
    vision, quick = TOWERS[kind]
    model = tiny_model(tiny_config(**vision), quick_gelu=quick)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    return model, tower_from(model.visual, mean, std, CPU, torch.float32)


def bank(classes: int = 6, background: int = 4, width: int = 32, scale: float = 15.0) -> TextBank:
    generator = torch.Generator().manual_seed(5)
    rows = F.normalize(torch.randn(classes + background, width, generator=generator), dim=-1)
    return TextBank(rows[:classes], rows[classes:], scale)


def oracle(
    model: Any, tower: VisionTower, pixels: Tensor, text: TextBank, labels: list[list[int]], target: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Channel weights and raw maps by autograd, one class at a time, through the unmodified open_clip network."""
    visual, kept = model.visual, {}

    def keep(_module: Any, _inputs: Any, output: Tensor) -> None:
        kept["a"] = output
        output.retain_grad()

    weights, maps = [], []
    for image, present in zip(pixels, labels, strict=True):
        for label in present:
            handle = visual.transformer.resblocks[-1].ln_1.register_forward_hook(keep)
            tokens = visual.transformer(visual._embeds(image[None]))
            handle.remove()
            if visual.final_ln_after_pool:
                pooled = visual.ln_post(tokens[:, 1:].mean(dim=1))
            else:
                pooled = visual.ln_post(tokens)[:, 1:].mean(dim=1)
            feature = F.normalize(pooled @ visual.proj, dim=-1)
            rows = torch.cat([text.classes[present], text.background])
            logits = text.logit_scale * (feature @ rows.T)[0]
            score = {"logit": logits, "softmax": logits.softmax(0), "log-softmax": logits.log_softmax(0)}[target]
            visual.zero_grad()
            score[present.index(label)].backward()
            gradient = kept["a"].grad[0, 1:].mean(dim=0)
            weights.append(gradient.detach())
            side = image.shape[-1] // tower.patch
            maps.append((kept["a"][0, 1:].detach() @ gradient.detach()).view(-1, side))
    return weights, maps


@pytest.mark.parametrize("target", ["softmax", "log-softmax", "logit"])
@pytest.mark.parametrize("kind", TOWERS)
def test_closed_form_equals_autograd_through_the_network(kind: str, target: str) -> None:
    model, tower = make(kind)
    side = tower.patch * 4
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    labels = [[2, 0, 5], [1], [4, 3]]
    text = bank()
    expected_weights, expected_maps = oracle(model, tower, pixels, text, labels, target)
    with torch.inference_mode():
        features = tower.dense(pixels)
        state = run_last_block(tower, features.tokens)
        image, label = pair_index(labels, CPU)
        present = torch.zeros(3, 6, dtype=torch.bool)
        present[image, label] = True
        gradient = score_gradient(state.feature, text, present, image, label, target)  # type: ignore[arg-type]
        weights = channel_weights(tower, state, [len(row) for row in labels], gradient)
        maps = gradcam(tower, state, text, labels, features.grid, target)  # type: ignore[arg-type]
    for ours, theirs in zip(weights, expected_weights, strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()
    for ours, theirs in zip(maps, expected_maps, strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_images_and_classes_do_not_influence_each_other() -> None:
    _, tower = make("openai")
    pixels = torch.randn(4, 3, 48, 80, generator=torch.Generator().manual_seed(2))
    labels = [[0], [1, 2, 3, 4], [5], [2, 0]]
    text = bank()

    def maps(part: slice) -> Tensor:
        with torch.inference_mode():
            state = run_last_block(tower, tower.dense(pixels[part]).tokens)
            return gradcam(tower, state, text, labels[part], (3, 5))

    together = maps(slice(None))
    expected = torch.cat([maps(slice(k, k + 1)) for k in range(4)])
    assert (together - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_groups_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images with equally many classes go together, side by side in the batch or not."""
    _, tower = make("openai")
    pixels = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    labels = [[0, 1, 2, 3, 4, 5], [5, 4], [], [1, 0], [2]]
    with torch.inference_mode():
        state = run_last_block(tower, tower.dense(pixels).tokens)
        whole = gradcam(tower, state, bank(), labels, (4, 4))
        monkeypatch.setattr("clipseed.cam.gradcam._GROUP_TOKENS", {"cpu": 1})  # one image at a time
        parts = gradcam(tower, state, bank(), labels, (4, 4))
    assert (whole - parts).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.12), (torch.float16, 0.02)])
def test_half_precision_stays_close(dtype: torch.dtype, tolerance: float) -> None:
    """Gradients of confident scores are far below half precision's smallest numbers; they must survive."""
    model, tower = make("openai")
    half = tower_from(model.visual, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), CPU, dtype)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    labels, text = [[0, 1], [2, 3, 4]], bank(scale=100.0)
    maps = []
    with torch.inference_mode():
        for one in (tower, half):
            features = one.dense(pixels)
            state = run_last_block(one, features.tokens)
            maps.append(normalize(gradcam(one, state, text, labels, (4, 4), "log-softmax")))
    assert torch.isfinite(maps[1]).all()
    assert (maps[0] - maps[1]).abs().mean() < tolerance
    assert maps[1].amax(dim=(1, 2)).min() > 0.99


def test_encode_is_the_models_own_image_feature() -> None:
    for kind in TOWERS:
        model, tower = make(kind)
        side = tower.patch * 4
        pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(6))
        with torch.inference_mode():
            expected = model.visual(pixels)  # type: ignore[operator]
            assert (tower.encode(pixels) - expected).abs().max() < 1e-4, kind


def test_dense_attention_is_the_mean_of_the_requested_blocks() -> None:
    model, tower = make("laion")
    visual: Any = model.visual
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))
    maps = []
    with torch.inference_mode():
        x = visual._embeds(pixels)
        for block in visual.transformer.resblocks[:-1]:
            a = block.ln_1(x)
            maps.append(block.attn(a, a, a, need_weights=True, average_attn_weights=True)[1][:, 1:, 1:])
            x = block(x)
        features = tower.dense(pixels, (0, 1))
        assert features.attention is not None
        assert (features.attention - (maps[0] + maps[1]) / 2).abs().max() < 1e-5
        assert (features.tokens - x).abs().max() < 1e-4
        only = tower.dense(pixels, (1,)).attention
        assert only is not None
        assert (only - maps[1]).abs().max() < 1e-5
        assert tower.dense(pixels).attention is None
    with pytest.raises(ValueError, match="attention blocks"):
        tower.dense(pixels, (2,))


@pytest.mark.parametrize("activation", ["quickgelu", "gelu"])
def test_activation_slope(activation: str) -> None:
    h = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    value = h * torch.sigmoid(1.702 * h) if activation == "quickgelu" else F.gelu(h)
    (expected,) = torch.autograd.grad(value.sum(), h)
    assert (activation_slope(h.detach().float(), activation) - expected).abs().max() < 1e-6


def test_normalize() -> None:
    tiny = [[-1.0, 0.0], [2e-30, 4e-30]]
    raw = torch.tensor([tiny, [[-3.0, -2.0], [-1.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    maps = normalize(raw)
    assert maps[0].tolist() == [[0.0, 0.0], [0.5, 1.0]]
    assert (maps[1] == 0).all()
    assert (maps[2] == 0).all()  # a constant map has no shape


def test_released_normalisation() -> None:
    """Twice, so that a raw peak near the 1e-7 of the denominator still ends near 1."""
    raw = torch.tensor([[[-1.0, 0.0], [2e-6, 4e-6]], [[0.0, 0.0], [2e-30, 4e-30]]])
    maps = normalize(raw, released=True)
    assert maps[0].max() == pytest.approx(1, abs=1e-6)
    assert maps[0].max() < 1
    assert maps[0, 1, 0] == pytest.approx(0.5, abs=1e-3)
    assert maps[1].max() < 1e-15


class FakeClip:
    """A model whose maps are known: half precision breaks on images that begin with a white pixel."""

    def __init__(self, tower: VisionTower) -> None:
        self.tower = tower

    def dense(self, images: Tensor, attention_blocks: tuple[int, ...] = ()) -> Any:
        return self.tower.dense(self.tower.normalize(images), attention_blocks)

    @property
    def exact(self) -> FakeClip:
        return self


def test_scales_and_flip_average_on_the_base_grid() -> None:
    _, tower = make("openai")
    clip: Any = FakeClip(tower)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(8))
    large = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    labels, text = [[0], [1, 2]], bank()

    def single(pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            features = clip.dense(pixels)
            raw = gradcam(tower, run_last_block(tower, features.tokens), text, labels, features.grid, "log-softmax")
            return normalize(raw)

    plain = compute_cams(clip, text, [images], labels, (4, 4))
    assert [len(maps) for maps in plain.maps] == [1, 2]
    assert torch.equal(torch.cat(plain.maps), single(images))

    combined = torch.cat(compute_cams(clip, text, [images, large], labels, (4, 4), flip=True).maps)
    views = [single(images), single(images.flip(-1)).flip(-1), single(large), single(large.flip(-1)).flip(-1)]
    resized = [F.interpolate(view[None], size=(4, 4), mode="bilinear")[0] for view in views]
    expected = minmax(torch.stack(resized).mean(dim=0))
    assert (combined - expected).abs().max() < 1e-6


def test_nan_is_computed_again_in_float32() -> None:
    _, tower = make("openai")
    exact: Any = FakeClip(tower)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(10))

    class Broken(FakeClip):
        @property
        def exact(self) -> FakeClip:
            return exact

        def dense(self, images: Tensor, attention_blocks: tuple[int, ...] = ()) -> Any:
            features = super().dense(images, attention_blocks)
            features.tokens[1] = float("nan")  # the second image overflows
            return features

    broken: Any = Broken(tower)
    labels, text = [[0], [1, 2], [3]], bank()
    found = compute_cams(broken, text, [images], labels, (4, 4))
    expected = compute_cams(exact, text, [images], labels, (4, 4))
    assert found.recomputed == 1
    for ours, theirs in zip(found.maps, expected.maps, strict=True):
        assert (ours - theirs).abs().max() < 1e-5
