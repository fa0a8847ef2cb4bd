"""Who decides about gradients: callers. Library functions neither turn them off nor need that, and commands do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipseed.cam.dense import DENSE_METHODS, dense_cams
from clipseed.cam.gradcam import gradcam, normalize, run_last_block
from clipseed.cam.methods import compute_cams
from clipseed.clip import FrozenClip, TextBank
from clipseed.clip.attention import patch_attention
from clipseed.clip.text import encode_prompts
from clipseed.clip.vision import tower_from
from clipseed.data.types import Sample
from clipseed.data.vocabulary import load_vocabulary
from clipseed.refine.caa import caa
from clipseed.runtime.decode import DecodePool
from clipseed.runtime.stream import BatchSize, run_stream
from clipseed.sam.model_backend import SamInfo
from clipseed.sam.predictor_backend import PredictorBackend
from clipseed.store.units import Unit

from helpers.models import tiny_config, tiny_model

CPU = torch.device("cpu")
LABELS = [[2, 0, 5], [1], [4, 3]]
GRID = (4, 4)


class FakeClip:
    """Only what the maps need of a FrozenClip."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, trained: bool = False) -> None:
        model = tiny_model(tiny_config())
        tower = tower_from(model.visual, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), CPU, dtype)
        self.trained = [tower.prefix.clone().requires_grad_(), tower.blocks[0].qkv.weight.clone().requires_grad_()]
        if trained:
            first = tower.blocks[0]
            first = replace(first, qkv=replace(first.qkv, weight=self.trained[1]))
            tower = replace(tower, prefix=self.trained[0], blocks=(first, *tower.blocks[1:]))
        self.model, self.tower, self.exact = model, tower, self

    def dense(self, images: Tensor, attention_blocks: Any = ()) -> Any:
        return self.tower.dense(self.tower.normalize(images), attention_blocks)


def images(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=generator)


def bank(*, trained: bool = False) -> TextBank:
    rows = F.normalize(torch.randn(10, 32, generator=torch.Generator().manual_seed(5)), dim=-1)
    return TextBank(rows[:6].clone().requires_grad_(trained), rows[6:], 15.0)


def dense_features(clip: Any, text: TextBank) -> list[Tensor]:
    found = clip.tower.dense(
        clip.tower.normalize(images()), (0, 1), block_tokens=range(3), block_attention=range(3)
    )  # fmt: skip
    return [found.tokens, found.attention, *found.block_tokens.values(), *found.block_attention.values()]


def gradient_maps(clip: Any, text: TextBank) -> list[Tensor]:
    state = run_last_block(clip.tower, clip.dense(images()).tokens)
    return [gradcam(clip.tower, state, text, LABELS, GRID), normalize(gradcam(clip.tower, state, text, LABELS, GRID))]


def every_method(clip: Any, text: TextBank) -> list[Tensor]:
    return [dense_cams(clip, images(), text, LABELS, method) for method in DENSE_METHODS]


def refined(clip: Any, text: TextBank) -> list[Tensor]:
    found = compute_cams(clip, text, [images()], LABELS, GRID, attention_layers=3)
    assert found.attention is not None
    return [*caa(found.maps, found.attention), *found.maps]


def attention(clip: Any, text: TextBank) -> list[Tensor]:
    return [patch_attention(clip.tower, images(), 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("work", [dense_features, gradient_maps, every_method, refined, attention])
def test_gradients_flow_and_the_numbers_are_those_of_inference_mode(
    work: Callable[[Any, TextBank], list[Tensor]], dtype: torch.dtype
) -> None:
    with torch.inference_mode():
        expected = work(FakeClip(dtype), bank())
    plain = work(FakeClip(dtype), bank())
    clip, text = FakeClip(dtype, trained=True), bank(trained=True)
    found = work(clip, text)
    for k, ours in enumerate(found):
        assert torch.equal(ours, expected[k]), k
        assert torch.equal(plain[k], expected[k]), k
        assert (expected[k].is_inference(), plain[k].is_inference()) == (True, False)
        assert not plain[k].requires_grad  # frozen weights leave no graph behind, inference mode or not
    total = sum((value.float() * torch.linspace(0, 1, value.numel()).view_as(value)).sum() for value in found)
    assert isinstance(total, Tensor)
    total.backward()  # type: ignore[no-untyped-call]
    for weight in clip.trained:
        assert weight.grad is not None
        assert torch.isfinite(weight.grad).all()
        assert weight.grad.abs().max() > 0
    if work in (gradient_maps, every_method, refined):
        assert text.classes.grad is not None
        assert torch.isfinite(text.classes.grad).all()
        assert (text.classes.grad.abs().amax(dim=1) > 0).all()


def test_maps_learn_through_the_closed_form() -> None:
    """Gradients of maps with respect to prototypes, against autograd twice through open_clip's own network."""
    clip, text = FakeClip(), bank(trained=True)
    visual: Any = clip.model.visual
    weight = torch.randn(6, *GRID, generator=torch.Generator().manual_seed(6))
    raw = gradcam(clip.tower, run_last_block(clip.tower, clip.dense(images()).tokens), text, LABELS, GRID)
    (found,) = torch.autograd.grad((raw * weight).sum(), text.classes)

    theirs, number = [], 0
    for image, present in zip(clip.tower.normalize(images()), LABELS, strict=True):
        tokens = visual._embeds(image[None])
        *before, last = visual.transformer.resblocks
        for block in before:
            tokens = block(tokens)
        for label in present:
            a = last.ln_1(tokens).detach().requires_grad_()
            with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
                x = tokens + last.attention(a)
            x = x + last.mlp(last.ln_2(x))
            feature = F.normalize(visual.ln_post(x)[:, 1:].mean(dim=1) @ visual.proj, dim=-1)
            rows = torch.cat([text.classes[present], text.background])
            score = (text.logit_scale * feature @ rows.T).softmax(dim=-1)[0, present.index(label)]
            (gradient,) = torch.autograd.grad(score, a, create_graph=True)
            cam = (a[0, 1:].detach() @ gradient[0, 1:].mean(dim=0)).view(GRID)
            theirs.append((cam * weight[number]).sum())
            number += 1
    (expected,) = torch.autograd.grad(torch.stack(theirs).sum(), text.classes)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_text_encoding_learns() -> None:
    import open_clip

    model = tiny_model()
    tokenizer = open_clip.SimpleTokenizer()
    found = encode_prompts(model, tokenizer, ["a cat", "two dogs"])
    with torch.inference_mode():
        assert torch.equal(encode_prompts(model, tokenizer, ["a cat", "two dogs"]), found)
    found.square().sum().backward()  # type: ignore[no-untyped-call]
    named: Any = model
    for weight in (named.token_embedding.weight, named.text_projection, named.positional_embedding):
        assert weight.grad.abs().max() > 0


def test_what_a_frozen_model_gives_can_be_trained_on() -> None:
    """Text prototypes, features, and what was made while a command ran, go into a loss of somebody else's weights."""
    clip = FrozenClip.load(weights="toy", device="cpu", precision="bf16")
    with torch.inference_mode():
        tower = clip.exact.tower  # made where a command needed it, kept for later
    assert not tower.blocks[0].up.weight.is_inference()
    text = clip.encode_text(load_vocabulary("toy"))
    tokens = clip.exact.dense(images()).tokens
    head = torch.nn.Linear(tokens.shape[-1], text.classes.shape[-1])
    (head(tokens) @ text.classes.T).square().mean().backward()  # type: ignore[no-untyped-call]
    assert head.weight.grad is not None
    assert head.weight.grad.abs().max() > 0


class Number:
    key, cost = 0, 1


def test_the_engine_computes_in_inference_mode() -> None:
    seen: dict[str, list[bool]] = {"load": [], "compute": [], "write": []}

    def load(sample: Sample) -> Number:
        seen["load"].append(torch.is_inference_mode_enabled())
        return Number()

    def compute(items: Any) -> list[int]:
        seen["compute"].append(torch.is_inference_mode_enabled())
        return [0] * len(items)

    def write(task: Unit, results: Any) -> None:
        seen["write"].append(torch.is_inference_mode_enabled())

    samples = tuple(Sample(str(k), "", ()) for k in range(3))  # type: ignore[arg-type]
    with DecodePool(load, 0, 2) as pool:
        stats = run_stream([Unit(0, samples)], pool, compute, write, BatchSize(2, 1))
    assert stats.computed == 3
    assert seen == {"load": [False] * 3, "compute": [True, True], "write": [False]}
    assert not torch.is_inference_mode_enabled()


class ForeignPredictor:
    """Code that is not ours: its tensors must be ordinary ones, as if nobody had turned anything off."""

    class transform:
        target_length = 64

    def set_image(self, image: Any) -> None:
        self.offset = torch.zeros(1)

    def predict_torch(self, points: Tensor, labels: Tensor, **_: Any) -> Any:
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        assert not points.is_inference()
        self.offset += 1
        return torch.zeros(len(points), 3, 8, 8), torch.zeros(len(points), 3), None


def test_foreign_predictors_run_outside_of_inference_mode() -> None:
    predictor = ForeignPredictor()
    backend = PredictorBackend(predictor, CPU, SamInfo("x", None, None))
    (embedding,) = backend.encode([np.zeros((8, 8, 3), np.uint8)])
    with torch.inference_mode():
        backend.decode_prompts(embedding, points=np.zeros((2, 1, 2)))
    backend.decode_prompts(embedding, points=np.zeros((2, 1, 2)))
    assert predictor.offset == 2
