"""What a training step of WeCLIP costs at the paper's size, part by part, beside the bare encoder.

``python tools/bench_weclip.py``: ViT-B/16 with seeded weights, crops of 320 pixels, four images with seven class maps
in all, CPU-seconds on one thread. On a GPU (``--device cuda``): seconds, images/s and peak memory, in bf16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clipseed.clip.text import TextBank
from clipseed.clip.vision import VisionTower, tower_from
from clipseed.train.crops import Crops
from clipseed.train.weclip import frozen as frozen_module
from clipseed.train.weclip import pseudo_scores as scores_module
from clipseed.train.weclip.decoder import Decoder
from clipseed.train.weclip.options import WeclipOptions
from clipseed.train.weclip.trainer import Weclip

LABELS = [(3,), (1, 7), (14,), (0, 5, 11)]
RELEASED = 9.0
"""CPU-seconds of the authors' code for the same step, on the machine where it was profiled."""
RELEASED_ENCODER = 2.6
"""Of which its encoder took so many."""


def tower(device: torch.device, dtype: torch.dtype) -> VisionTower:
    """A ViT-B/16 whose weights follow from a seed."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    torch.manual_seed(0)
    visual = VisionTransformer(224, 16, 768, 12, 12, 4, output_dim=512, act_layer=QuickGELU)
    return tower_from(visual, (0.48,) * 3, (0.27,) * 3, device, dtype)


def batch(side: int) -> Crops:
    """Images with smooth colours and noise, as photographs have."""
    dice = torch.Generator().manual_seed(1)
    smooth = torch.nn.functional.interpolate(torch.rand(4, 3, 12, 12, generator=dice), (side, side), mode="bicubic")
    pixels = (255 * smooth + 8 * torch.randn(4, 3, side, side, generator=dice)).clamp(0, 255).byte()
    return Crops(pixels, torch.zeros(4, side, side, dtype=torch.uint8), LABELS, seeds=range(4))


class Clock:
    """Time of named parts: CPU-seconds, or seconds of a GPU that is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.parts: dict[str, list[float]] = {}

    def now(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = self.now()
        yield
        self.parts.setdefault(name, []).append(self.now() - began)

    def watch(self, module: Any, function: str, name: str) -> None:
        plain: Callable[..., Any] = getattr(module, function)

        def timed(*given: Any, **named: Any) -> Any:
            with self.part(name):
                return plain(*given, **named)

        setattr(module, function, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--crop", type=int, default=320)
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    frozen = tower(device, dtype)
    unit = torch.nn.functional.normalize(torch.randn(45, 512, generator=torch.Generator().manual_seed(2)), dim=1)
    text = TextBank(unit[:20].to(device), unit[20:].to(device), 100.0)
    crops = batch(chosen.crop).to(device)
    clock = Clock(device)
    bare = frozen.normalize(crops.pixels)
    clock.watch(frozen_module, "look", "encoder, with attention")
    clock.watch(frozen_module, "initial_cams", "CAMs")
    clock.watch(scores_module, "spread_cams", "spreading")
    clock.watch(scores_module, "refined_scores", "PAR")
    for phase, rfm_from in (("static map", 10**9), ("RFM", 0)):
        options = WeclipOptions(rfm_from=rfm_from, crop=chosen.crop)
        torch.manual_seed(0)
        trainer = Weclip(frozen, text, Decoder(11, 768, 21).to(device), options, 100)
        optimizer = trainer.optimizer()
        clock.parts.clear()
        if clock.gpu:
            torch.cuda.reset_peak_memory_stats()
        for turn in range(chosen.turns + 1):
            if turn == 1:
                clock.parts.clear()
            with clock.part("bare encoder"), torch.inference_mode():
                blocks(frozen, bare)
            with clock.part("step"):
                with torch.autocast(device.type, torch.bfloat16, enabled=clock.gpu):
                    losses = trainer.losses(crops, turn)
                with clock.part("backward"):
                    optimizer.zero_grad()
                    losses["loss"].backward()
                optimizer.step()
        show(phase, clock, device)


def blocks(frozen: VisionTower, pixels: Tensor) -> None:
    """The blocks before the last, with fused attention and nothing kept."""
    frozen.dense(pixels)


def show(phase: str, clock: Clock, device: torch.device) -> None:
    """One line for each part."""
    median = {name: statistics.median(times) for name, times in clock.parts.items()}
    step, bare = median.pop("step"), median.pop("bare encoder")
    unit = "s" if clock.gpu else "CPU-s"
    print(f"{phase}: {step:.2f} {unit} a step, {step / bare:.2f} x the bare encoder's {bare:.2f}")
    for name, seconds in median.items():
        print(f"  {name:24} {seconds:.3f}")
    print(f"  {'decoder, losses, rest':24} {step - sum(median.values()):.3f}")
    if clock.gpu:
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"  {4 / step:.1f} images/s, bare encoder {4 / bare:.1f}; peak memory {peak:.2f} GiB ({device})")
    else:
        released = RELEASED / RELEASED_ENCODER
        print(f"  released: {released:.2f} x its encoder; this is {step / bare / released:.2f} of that")


if __name__ == "__main__":
    main()
