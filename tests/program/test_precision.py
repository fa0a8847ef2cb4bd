"""``--precision auto`` on CPUs: when it is bfloat16, and that the maps stay what they are in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.cam.methods import compute_cams
from clipseed.clip.model import FrozenClip
from clipseed.clip.vision import attend, attend_with_mean_map
from clipseed.data.dataset import DatasetOptions, open_dataset
from clipseed.device import LEAST_WIDTH, cpu_multiplies_bf16, pick_dtype
from clipseed.refine.caa import caa
from clipseed.runtime.images import ViewLoader

CPU = torch.device("cpu")
FAST: tuple[dict[str, bool], ...] = ({"avx512_bf16": True}, {"amx_tile": True, "avx512_bf16": False})
SLOW: tuple[dict[str, bool], ...] = ({}, {"avx2": True, "avx512_f": True}, {"avx512_bf16": False, "bf16": True})
SCENES = 12


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, bool]], None]:
    """Pretend to run on a processor with these features."""

    def pretend(features: dict[str, bool]) -> None:
        monkeypatch.setattr("clipseed.device._cpu_features", lambda: features)
        monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)

    return pretend


@pytest.mark.parametrize(
    ("features", "width", "released", "expected"),
    [
        *((features, 768, False, torch.bfloat16) for features in FAST),
        *((features, LEAST_WIDTH, False, torch.bfloat16) for features in FAST),
        *((features, LEAST_WIDTH - 1, False, torch.float32) for features in FAST),
        *((features, None, False, torch.float32) for features in FAST),
        *((features, 768, True, torch.float32) for features in FAST),
        *((features, 1024, False, torch.float32) for features in SLOW),
    ],
)
def test_what_auto_is(
    processor: Callable[[dict[str, bool]], None],
    features: dict[str, bool],
    width: int | None,
    released: bool,
    expected: torch.dtype,
) -> None:
    processor(features)
    assert pick_dtype("auto", CPU, width, released_rounding=released) is expected
    assert pick_dtype("auto", torch.device("mps"), width, released_rounding=released) is torch.float32
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):  # what was asked for is what is done
        assert pick_dtype(name, CPU, width, released_rounding=released) is dtype


def test_without_its_matrix_library_pytorch_is_slow(
    processor: Callable[[dict[str, bool]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(FAST[0])
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert pick_dtype("auto", CPU, 768) is torch.float32


@pytest.mark.parametrize("answer", [True, False, None])
def test_releases_that_list_no_features(monkeypatch: pytest.MonkeyPatch, answer: bool | None) -> None:
    """Older PyTorch answers single questions; one without those names is taken for a slow one."""
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    monkeypatch.delattr("torch.cpu._is_amx_tile_supported", raising=False)
    if answer is None:
        monkeypatch.delattr("torch.cpu._is_avx512_bf16_supported", raising=False)
    else:
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: answer, raising=False)
    assert cpu_multiplies_bf16() is bool(answer)


def test_loading_a_model_decides(processor: Callable[[dict[str, bool]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy is narrow: its numbers are the same everywhere. A model as wide as the rule asks gets bfloat16."""
    processor(FAST[0])
    assert FrozenClip.load(weights="toy", device="cpu").precision == "fp32"
    monkeypatch.setattr("clipseed.device.LEAST_WIDTH", 1)
    found = FrozenClip.load(weights="toy", device="cpu")
    assert (found.precision, found.tower.dtype, found.exact.precision) == ("bf16", torch.bfloat16, "fp32")
    assert FrozenClip.load(weights="toy", device="cpu", released_rounding=True).precision == "fp32"
    processor(SLOW[0])
    assert FrozenClip.load(weights="toy", device="cpu").precision == "fp32"


@pytest.mark.parametrize("function", [attend, lambda q, k, v: attend_with_mean_map(q, k, v)[0]])
def test_attention_in_bfloat16(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 50, 16, generator=generator).bfloat16()
    expected = torch.empty(2, 4, 50, 16, dtype=torch.float64)
    for batch in range(2):
        for head in range(4):
            one = [x[batch, head].double() for x in (q, k, v)]
            expected[batch, head] = ((one[0] @ one[1].T) / 4).softmax(dim=-1) @ one[2]
    found = function(q, k, v)
    assert found.dtype is torch.bfloat16
    assert (found - expected).abs().max() < 0.02
    assert (found - expected).abs().mean() < 0.002


def test_residual_stream_and_last_attention_of_a_cpu_are_not_rounded() -> None:
    clip, pixels = toy("bf16"), torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    tokens = clip.dense(pixels.to(torch.uint8)).tokens
    assert tokens.dtype is torch.float32
    assert (tokens != tokens.bfloat16().float()).float().mean() > 0.9
    *before, last = clip.tower.blocks
    assert (last.qkv.weight.dtype, last.out.weight.dtype) == (torch.float32, torch.float32)
    assert {block.qkv.weight.dtype for block in before} == {last.up.weight.dtype} == {torch.bfloat16}


@cache
def toy(precision: Any) -> FrozenClip:
    return FrozenClip.load(weights="toy", device="cpu", precision=precision)


@cache
def scenes() -> list[tuple[Any, Tensor, tuple[int, int], tuple[int, int]]]:
    """Labels, pixels, patch grid and size of some scenes."""
    images = open_dataset(DatasetOptions("toy", limit=SCENES))
    loader = ViewLoader(images.reader, toy("fp32").tower.patch, (1.0,), 640, 0)
    loaded = map(loader, images.samples)
    return [
        (item.sample.labels, torch.from_numpy(item.views[0].copy()).permute(2, 0, 1)[None], item.grid, item.size)
        for item in loaded
    ]


@cache
def maps_of(precision: str) -> tuple[list[Tensor], list[Tensor]]:
    """Plain and refined maps of the scenes."""
    clip = toy(precision)
    text = clip.encode_text(open_dataset(DatasetOptions("toy", limit=1)).vocabulary)
    plain, refined = [], []
    for labels, pixels, grid, _ in scenes():
        found = compute_cams(clip, text, [pixels], [labels], grid, attention_layers=8)
        assert found.attention is not None
        plain += found.maps
        refined += caa(found.maps, found.attention)
    return plain, refined


def label_map(maps: Tensor, size: tuple[int, int], threshold: float) -> np.ndarray[Any, Any]:
    """Number of the strongest map at every pixel, from 1; 0 where none exceeds the threshold."""
    large = F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
    return np.where(large.amax(dim=0) > threshold, large.argmax(dim=0) + 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("refined", "threshold"), [(False, 0.35), (True, 0.40)])
def test_labels_change_on_fewer_than_one_pixel_in_two_hundred(refined: bool, threshold: float) -> None:
    """At the thresholds that are best on the toy; refined maps decide by boxes and so are the harder ones."""
    differing = total = 0
    for ours, theirs, (_, _, _, size) in zip(maps_of("fp32")[refined], maps_of("bf16")[refined], scenes(), strict=True):
        differs = label_map(ours, size, threshold) != label_map(theirs, size, threshold)
        differing, total = differing + int(differs.sum()), total + differs.size
    assert 0 < differing < 0.005 * total  # not 0: these are two computations, not one


@pytest.mark.slow
@pytest.mark.parametrize("refined", [False, True])
def test_maps_stay_close(refined: bool) -> None:
    gaps = [(a - b).abs().flatten() for a, b in zip(maps_of("fp32")[refined], maps_of("bf16")[refined], strict=True)]
    assert torch.cat(gaps).mean() < 0.001
    assert all(gap.mean() < 0.02 for gap in gaps)


def test_images_that_overflow_are_computed_again_in_float32() -> None:
    clip = toy("bf16")
    text = clip.encode_text(open_dataset(DatasetOptions("toy", limit=1)).vocabulary)
    first = clip.tower.blocks[0]
    broken = replace(first, out=replace(first.out, weight=torch.full_like(first.out.weight, float("inf"))))
    tower = replace(clip.tower, blocks=(broken, *clip.tower.blocks[1:]))
    damaged = FrozenClip(clip._model, clip._tokenizer, tower, clip.info, "bf16", clip.location)
    labels, pixels, grid, _ = scenes()[0]
    found = compute_cams(damaged, text, [pixels], [labels], grid, attention_layers=8)
    exact = compute_cams(toy("fp32"), text, [pixels], [labels], grid, attention_layers=8)
    assert found.recomputed == 1
    torch.testing.assert_close(found.maps[0], exact.maps[0], rtol=0, atol=1e-6)
    assert found.attention is not None
    assert exact.attention is not None
    torch.testing.assert_close(found.attention, exact.attention, rtol=0, atol=1e-6)
