"""How fast refinement is: PAR beside its convolution form, and both CRF engines over pixels and classes.

``make bench``, or ``python tools/bench_refine.py``. Everything compared runs in turns within one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.defaults import PAR_DILATIONS
from clipseed.refine.crf import CLIP_ES, clip_es_unary, dense_crf
from clipseed.refine.par import refine_par

_STEPS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def neighbours_by_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """All 48 neighbours at once ``(B, C, 48, H, W)``: dilated 3 x 3 convolutions with one-hot kernels."""
    batch, channels, height, width = x.shape
    parts = []
    for step in PAR_DILATIONS:
        padded = F.pad(x, (step,) * 4, mode="replicate").reshape(batch * channels, 1, height + 2 * step, -1)
        parts.append(F.conv2d(padded, kernel, dilation=step).view(batch, channels, 8, height, width))
    return torch.cat(parts, dim=2)


def par_by_convolution(scores: Tensor, image: Tensor, iterations: int) -> Tensor:
    """The form the method was released in, written down once more from its equations."""
    kernel = torch.zeros(8, 1, 3, 3)
    for k, (row, column) in enumerate(_STEPS):
        kernel[k, 0, 1 + row, 1 + column] = 1
    around = neighbours_by_convolution(image, kernel)
    spread = around.std(dim=2, keepdim=True)
    likeness = -(((around - image.unsqueeze(2)).abs() / (spread + 1e-8) / 0.3) ** 2).mean(dim=1, keepdim=True)
    away = torch.tensor([d * (2**0.5 if r and c else 1.0) for d in PAR_DILATIONS for r, c in _STEPS])
    near = (-((away / (away.std() + 1e-8) / 0.3) ** 2)).softmax(dim=0).view(1, 1, -1, 1, 1)
    weights = likeness.softmax(dim=2) + 0.01 * near
    for _ in range(iterations):
        scores = (neighbours_by_convolution(scores, kernel) * weights).sum(dim=2)
    return scores


def in_turns(functions: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def scene(labels: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth probabilities and an image with smooth colours and noise, as a photograph has."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, labels + 3, 8, 10, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1)
    noise = 8 * torch.randn(3, height, width, generator=generator)
    image = (255 * smooth[labels:] + noise).clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    return clip_es_unary((4 * smooth[:labels]).softmax(dim=0).numpy()), image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    turns = parser.parse_args().turns
    unary, image = scene(3, 320, 320)
    scores = torch.from_numpy(unary)[None].exp()
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    found = in_turns(
        {"shifted sums": lambda: refine_par(scores, pixels), "conv": lambda: par_by_convolution(scores, pixels, 20)},
        turns,
    )
    gap = (refine_par(scores, pixels) - par_by_convolution(scores, pixels, 20)).abs().max()
    print(f"PAR, 3 maps of 320 x 320, 20 iterations, {torch.get_num_threads()} threads: {found['shifted sums']:.2f} s; "
          f"convolution form {found['conv']:.2f} s ({found['conv'] / found['shifted sums']:.1f} x), "
          f"largest difference {gap:.1e}")  # fmt: skip
    from clipseed.refine.crf_native import native_crf

    print("dense CRF, seconds per image (torch solver with all threads, pydensecrf with one)")
    print(f"{'pixels':>10} {'labels':>7} {'torch':>7} {'pydensecrf':>11} {'ratio':>6}")
    for labels, height, width in (
        (3, 188, 250),
        (3, 375, 500),
        (3, 480, 640),
        (2, 375, 500),
        (5, 375, 500),
        (9, 375, 500),
    ):
        unary, image = scene(labels, height, width)
        tensors = [torch.from_numpy(unary)], [torch.from_numpy(image)]
        jobs: dict[str, Callable[[], object]] = {"torch": lambda t=tensors: dense_crf(*t, CLIP_ES)}
        try:
            native_crf(unary, image, CLIP_ES)
            jobs["native"] = lambda u=unary, i=image: native_crf(u, i, CLIP_ES)
        except ImportError:
            pass
        seconds = in_turns(jobs, turns)
        native = seconds.get("native")
        shown = f"{native:11.2f} {seconds['torch'] / native:6.2f}" if native else "          -      -"
        print(f"{height}x{width:<6} {labels:7d} {seconds['torch']:7.2f} {shown}")


if __name__ == "__main__":
    main()
