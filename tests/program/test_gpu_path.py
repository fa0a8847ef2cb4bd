"""What only a GPU runs, as far as it can be known without one: the same numbers, and types that fit together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from clipseed.cam.gradcam import gradcam, normalize, run_last_block
from clipseed.clip.text import TextBank
from clipseed.clip.vision import tower_from, unfolded_products
from clipseed.refine.affinity import balance, spread
from clipseed.refine.crf import dense_crf
from clipseed.refine.par import refine_par
from clipseed.runtime.images import batches_in_flight, dealt_unit, stacked, unit_size_for

from helpers.models import tiny_config, tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
PIXELS = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_fewer_passes_through_memory_give_the_same_features(quick_gelu: bool) -> None:
    model = tiny_model(tiny_config(ls_init_value=0.3), quick_gelu=quick_gelu)
    plain, lean = (tower_from(model.visual, *PIXELS, CPU, torch.float32, lean=lean) for lean in (False, True))
    activation = "silu" if quick_gelu else "gelu"
    assert [block.activation for block in lean.blocks] == [activation, activation, plain.blocks[-1].activation]
    assert [block.norm_2.half is not None for block in lean.blocks] == [True, True, False]
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    tokens = [tower.dense(pixels).tokens for tower in (plain, lean)]
    assert (tokens[0] - tokens[1]).abs().max() < 1e-5 * tokens[0].abs().max()


def test_a_residual_stream_in_half_precision_stays_close() -> None:
    """As on a GPU: norms read and write bfloat16, which a float32 stream on a CPU never lets them."""
    model = tiny_model()
    exact = tower_from(model.visual, *PIXELS, CPU, torch.float32)
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = exact.dense(pixels).tokens
    errors = []
    for lean in (False, True):
        half = replace(tower_from(model.visual, *PIXELS, CPU, torch.bfloat16, lean=lean), stream=torch.bfloat16)
        found = half.dense(pixels).tokens
        assert found.dtype is torch.bfloat16
        errors.append(float((found.float() - expected).norm() / expected.norm()))
    assert errors[1] < 0.03
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("side", [14, 16])
def test_patches_as_one_product_are_the_convolution(side: int) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(24, 3, side, side, generator=generator)
    pixels = torch.randn(2, 3, 3 * side, 5 * side, generator=generator)
    found, grid = unfolded_products(pixels, weight)
    expected = F.conv2d(pixels, weight, stride=side)
    assert grid == (3, 5)
    assert (found - expected.flatten(2).transpose(1, 2)).abs().max() < 1e-4
    channels_last = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as images come from their arrays
    assert torch.equal(unfolded_products(channels_last, weight)[0], found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types_fit_together_on_a_gpu(dtype: torch.dtype) -> None:
    """Shapes, types and devices of a whole pass, computed by PyTorch without touching a GPU."""
    model: Any = tiny_model()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        tower = tower_from(model.visual, *PIXELS, CUDA, dtype)
        images = torch.empty(4, 3, 64, 96, dtype=torch.uint8, device=CUDA)
        features = tower.dense(tower.normalize(images), (0, 1))
        assert features.tokens.dtype is dtype
        assert features.attention is not None
        assert (features.attention.dtype, features.attention.shape) == (torch.float32, (4, 24, 24))
        text = TextBank(torch.empty(5, 32, device=CUDA), torch.empty(3, 32, device=CUDA), 20.0)
        state = run_last_block(tower, features.tokens)
        maps = normalize(gradcam(tower, state, text, [[0, 1], [2], [1, 2, 3], [4]], features.grid, "log-softmax"))
        assert (maps.dtype, maps.device, maps.shape) == (torch.float32, CUDA, (7, 4, 6))
        reached = spread(balance(features.attention), torch.empty(4, 3, 4, 6, device=CUDA))
        assert (reached.device, reached.shape) == (CUDA, (4, 3, 4, 6))
        assert tower.encode(tower.normalize(images)).shape == (4, 32)
        assert refine_par(torch.empty(2, 3, 40, 50, device=CUDA), images[:2, :, :40, :50]).device == CUDA


def test_only_a_gpu_has_batches_in_flight_and_large_units() -> None:
    assert (batches_in_flight(CPU), unit_size_for(CPU)) == (0, 64)
    assert batches_in_flight(CUDA) == 2
    assert unit_size_for(CUDA) == 8192


@pytest.mark.parametrize(
    ("most", "total", "hands", "expected"),
    [(8192, 82_081, 1, 8192), (8192, 10_582, 8, 1323), (8192, 100, 8, 64), (64, 10_582, 8, 64), (8192, 0, 1, 64)],
)
def test_units_are_so_small_that_everybody_gets_one(most: int, total: int, hands: int, expected: int) -> None:
    assert dealt_unit(most, total, hands) == expected


def test_stacked_images_are_their_arrays() -> None:
    views = [np.random.default_rng(k).integers(0, 256, (4, 6, 3), dtype=np.uint8) for k in range(3)]
    found = stacked(views, CPU)
    assert (found.dtype, found.shape) == (torch.uint8, (3, 3, 4, 6))
    assert np.array_equal(found[1].permute(1, 2, 0).numpy(), views[1])


def test_the_crf_needs_no_gpu_to_be_the_same_in_any_company() -> None:
    """Batches are larger on a GPU; an image's posterior does not depend on who shares its batch."""
    generator = torch.Generator().manual_seed(3)
    unaries = [torch.rand(classes, 12, 15, generator=generator) for classes in (2, 4, 3)]
    images = [torch.randint(0, 256, (12, 15, 3), generator=generator, dtype=torch.uint8) for _ in unaries]
    together = dense_crf(unaries, images)
    for unary, image, found in zip(unaries, images, together, strict=True):
        assert (dense_crf([unary], [image])[0] - found).abs().max() < 1e-5
