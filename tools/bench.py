"""How much ``cam`` costs beside the bare image encoder: same weights, same pixels, same threads, one run.

``make bench``, or ``python tools/bench.py --images FOLDER --count N``. Weights are a seeded random ViT-B/16: speed does
not depend on what a network has learnt. The bare encoder is open_clip's own transformer on the same batches and in the
same precision; it is measured in turns with ``cam``, because timings on shared machines drift, and ratios are taken
turn by turn. The last lines say how full batches of equal grids are on images of VOC's and COCO's sizes.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from bench_gpu import COCO_MIX, VOC_MIX, mixed_sizes
from PIL import Image

from clipseed.cam.methods import compute_cams
from clipseed.clip.model import FrozenClip
from clipseed.data.dataset import DatasetOptions
from clipseed.data.images import FileReader, patch_grid
from clipseed.data.listing import list_images
from clipseed.data.types import Sample
from clipseed.data.vocabulary import load_vocabulary
from clipseed.defaults import CAM_MAX_SIDE
from clipseed.jobs.cam import CamOptions, CamReport, run_cam
from clipseed.runtime.images import LoadedViews, ViewLoader, token_budget, unit_size_for
from clipseed.runtime.run import RunOptions
from clipseed.runtime.stream import BatchSize

SIZES = ((375, 500), (500, 375), (333, 500), (375, 500), (500, 333), (400, 500))
"""Image sizes like VOC's, height first."""
BARE = "bare encoder (open_clip)"


def make_weights(folder: Path, model: str) -> Path:
    """A seeded random checkpoint in open_clip's format."""
    import open_clip
    from safetensors.torch import save_file

    path = folder / f"{model}.safetensors"
    torch.manual_seed(0)
    state = open_clip.create_model(model).state_dict()
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    return path


def make_images(folder: Path, count: int) -> Path:
    """JPEG images of VOC-like sizes with photograph-like smoothness and grain."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        knots = Image.fromarray(rng.integers(0, 256, (height // 25, width // 25, 3), dtype=np.uint8))
        smooth = np.asarray(knots.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        grainy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(grainy).save(folder / f"{number:05d}.jpg", quality=90)
    return folder


def load_batches(images: Path, count: int, patch: int) -> list[list[LoadedViews]]:
    """The batches that ``cam`` makes of the first images; one to three labels each, as on VOC."""
    loader = ViewLoader(FileReader(), patch, (1.0,), 640, 0)
    samples = [Sample(key, path, (k % 20, (k + 7) % 20, (k + 3) % 20)[: 1 + (k % 2) + (k % 5 == 0)])
               for k, (key, path) in enumerate(list(list_images(images).items())[:count])]  # fmt: skip
    buckets: dict[Any, list[LoadedViews]] = {}
    batches = []
    for item in map(loader, samples):
        bucket = buckets.setdefault(item.key[::2], [])
        bucket.append(item)
        if len(bucket) * item.cost >= token_budget(torch.device("cpu")) - item.cost:
            batches.append(buckets.pop(item.key[::2]))
    return batches + list(buckets.values())


def pixels_of(batch: list[LoadedViews]) -> torch.Tensor:
    return torch.from_numpy(np.stack([item.views[0] for item in batch])).permute(0, 3, 1, 2)


class BareEncoder:
    """open_clip's transformer, pooling and projection on tokens with interpolated positions, in the tower's type."""

    def __init__(self, clip: FrozenClip) -> None:
        visual: Any = clip._model.visual
        self._clip, self._visual = clip, visual
        self._transformer = visual.transformer
        if clip.tower.dtype is not torch.float32:
            self._transformer = copy.deepcopy(visual.transformer).to(clip.tower.dtype)

    @torch.inference_mode()
    def __call__(self, batch: list[LoadedViews]) -> None:
        tokens, _ = self._clip.tower.embed(self._clip.tower.normalize(pixels_of(batch)))
        pooled, _ = self._visual._pool(self._transformer(tokens.to(self._clip.tower.dtype)).float())
        pooled @ self._visual.proj


def time_in_turns(functions: dict[str, Any], turns: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - started)
    return times


def stages_of(
    clip: FrozenClip, batches: list[list[LoadedViews]], options: CamOptions, reports: dict[str, list[CamReport]]
) -> dict[str, Any]:
    """What is timed in one precision; the whole commands leave their reports, which do not count loading the model."""
    text = clip.encode_text(load_vocabulary("voc"))
    bare = BareEncoder(clip)
    options = replace(options, run=replace(options.run, precision=clip.precision))

    def cams() -> None:
        for batch in batches:
            rows = [item.sample.labels or () for item in batch]
            compute_cams(clip, text, [pixels_of(batch)], rows, batch[0].grid)

    def command(name: str, options: CamOptions) -> Any:
        return lambda: reports.setdefault(name, []).append(run_cam(options))

    stages = {
        BARE: lambda: [bare(batch) for batch in batches],
        "bare encoder (clipseed)": lambda: [clip.encode_image(pixels_of(batch)) for batch in batches],
        "maps (model only)": cams,
    }
    named = {f"{clip.precision} {name}": stage for name, stage in stages.items()}
    for name, refine in (("clipseed cam", None), ("clipseed cam --refine caa", "caa")):
        key = f"{clip.precision} {name}"
        named[key] = command(key, replace(options, refine=cast("Any", refine)))
    return named


def run_stages(arguments: argparse.Namespace, folder: Path) -> None:
    clips = [FrozenClip.load(arguments.model, arguments.weights, arguments.device, precision)
             for precision in arguments.precision.split(",")]  # fmt: skip
    batches = load_batches(arguments.images, arguments.count, clips[0].tower.patch)
    images = sum(map(len, batches))
    labels = folder / "labels.json"
    labels.write_text(json.dumps({item.sample.id: list(item.sample.labels or ()) for b in batches for item in b}))
    split = folder / "split.txt"
    split.write_text("\n".join(item.sample.id for b in batches for item in b))
    options = CamOptions(
        DatasetOptions("folder", images=arguments.images, labels=labels, classes="voc", split=str(split)),
        folder / "cams.h5", arguments.model, str(arguments.weights),
        run=RunOptions(device=arguments.device, overwrite=True),
    )  # fmt: skip
    reports: dict[str, list[CamReport]] = {}
    functions = {name: stage for clip in clips for name, stage in stages_of(clip, batches, options, reports).items()}
    times = time_in_turns(functions, arguments.turns)
    for name, found in reports.items():
        times[name] = [report.seconds for report in found[1:]]
    tokens = sum(item.cost for b in batches for item in b) / images
    pairs = sum(len(item.sample.labels or ()) for b in batches for item in b) / images
    print(f"{images} images of {arguments.images}, {tokens:.0f} tokens and {pairs:.2f} classes each on average;")
    print(f"{arguments.model} on {clips[0].tower.device}, {torch.get_num_threads()} threads, {arguments.turns} turns; "
          "medians, ratios turn by turn")  # fmt: skip
    first = f"{clips[0].precision} {BARE}"
    print(f"{'':32} images/s   x {clips[0].precision} bare   x own bare   bottleneck")
    for name, values in times.items():
        over_first, over_own = (
            statistics.median(value / other for value, other in zip(values, times[base], strict=True))
            for base in (first, f"{name.split()[0]} {BARE}")
        )
        slowest = reports[name][-1].stats.bottleneck if name in reports else "-"
        print(f"{name:32} {images / statistics.median(values):8.2f} {over_first:13.2f} {over_own:12.2f}   {slowest}")


def batch_fill(sizes: list[tuple[int, int]], patch: int, device: torch.device) -> dict[str, float]:
    """How well batches of equal grids fill a device's token budget, unit by unit as ``cam`` forms them.

    ``fill`` is the mean share of the images that a batch could hold, ``padded`` the share of tokens that would be
    padding if images were batched as they come instead, each filled up to its batch's largest grid. Batches of equal
    grids hold no padding at all.
    """
    limit = BatchSize(None, token_budget(device)).limit
    fills: list[float] = []
    real = filled = 0
    unit = unit_size_for(device)
    for start in range(0, len(sizes), unit):
        grids = [patch_grid(height, width, patch, CAM_MAX_SIDE, 0) for height, width in sizes[start : start + unit]]
        for grid, count in Counter(grids).items():
            most = limit(grid[0] * grid[1] + 1)
            fills += [1.0] * (count // most) + ([count % most / most] if count % most else [])
        step = limit(max(rows * columns + 1 for rows, columns in grids))
        for begin in range(0, len(grids), step):
            batch = grids[begin : begin + step]
            filled += len(batch) * (max(rows for rows, _ in batch) * max(columns for _, columns in batch) + 1)
            real += sum(rows * columns + 1 for rows, columns in batch)
    return {"batches": len(fills), "fill": statistics.mean(fills), "padded": 1 - real / filled}


def show_batch_fill(patch: int = 16, count: int = 5_000) -> None:
    for kind in ("cpu", "cuda"):
        for name, mix in (("VOC", VOC_MIX), ("COCO", COCO_MIX)):
            found = batch_fill(mixed_sizes(mix, count), patch, torch.device(kind))
            print(
                f"batches of {count} images like {name}'s on {kind:4}: {count / found['batches']:5.1f} each, "
                f"{found['fill']:4.0%} full, no padding (as they come: {found['padded']:3.0%} of tokens padding)"
            )


def peak_memory(arguments: argparse.Namespace, stage: str) -> float:
    """Peak resident memory in MB of a process of its own that runs one stage."""
    words = [sys.executable, __file__, "--images", str(arguments.images), "--count", str(arguments.count), "--model",
             arguments.model, "--weights", str(arguments.weights), "--device", arguments.device, "--precision",
             arguments.precision.split(",")[0], "--memory-of", stage]  # fmt: skip
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


def memory_stage(arguments: argparse.Namespace, folder: Path) -> None:
    clip = FrozenClip.load(arguments.model, arguments.weights, arguments.device, arguments.precision)
    batches = load_batches(arguments.images, arguments.count, clip.tower.patch)
    if arguments.memory_of == "bare":
        encoder = BareEncoder(clip)
        for batch in batches:
            encoder(batch)
    else:
        text = clip.encode_text(load_vocabulary("voc"))
        for batch in batches:
            rows = [item.sample.labels or () for item in batch]
            compute_cams(clip, text, [pixels_of(batch)], rows, batch[0].grid)
    # Not getrusage: its peak is inherited from the process that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="image folder; default: generated ones")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--weights", type=Path, help="default: seeded random ones")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32,bf16", help="one or several, the first is what others are beside")
    parser.add_argument("--memory-of", choices=["bare", "cam"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments.weights = arguments.weights or make_weights(folder, arguments.model)
        arguments.images = arguments.images or make_images(folder / "images", arguments.count)
        if arguments.memory_of:
            memory_stage(arguments, folder)
            return
        run_stages(arguments, folder)
        show_batch_fill()
        for stage in ("bare", "cam"):
            print(f"peak memory, {stage:4} {peak_memory(arguments, stage):22.0f} MB")


if __name__ == "__main__":
    main()
