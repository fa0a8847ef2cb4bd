"""How much ``cam`` costs beside the bare image encoder: same weights, same pixels, same threads, one run.

``make bench``, or ``python tests/bench.py --images FOLDER --count N``. Weights are a seeded random ViT-B/16: speed does
not depend on what a network has learnt. The bare encoder is open_clip's own transformer on the same batches; it is
measured in turns with ``cam``, because timings on shared machines drift, and ratios are taken turn by turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipseed.cam.methods import compute_cams
from clipseed.clip.model import FrozenClip
from clipseed.data.dataset import DatasetOptions
from clipseed.data.images import FileReader
from clipseed.data.listing import list_images
from clipseed.data.types import Sample
from clipseed.jobs.cam import CamOptions, run_cam
from clipseed.jobs.engine import LoadedViews, ViewLoader, token_budget

SIZES = ((375, 500), (500, 375), (333, 500), (375, 500), (500, 333), (400, 500))
"""Picture sizes like VOC's, height first."""


def make_weights(folder: Path, model: str) -> Path:
    """A seeded random checkpoint in open_clip's format."""
    import open_clip
    from safetensors.torch import save_file

    path = folder / f"{model}.safetensors"
    torch.manual_seed(0)
    state = open_clip.create_model(model).state_dict()
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    return path


def make_pictures(folder: Path, count: int) -> Path:
    """JPEG pictures of VOC-like sizes with photograph-like smoothness and grain."""
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
    """The batches that ``cam`` makes of the first pictures; one to three labels each, as on VOC."""
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


@torch.inference_mode()
def bare_encoder(clip: FrozenClip, batch: list[LoadedViews]) -> None:
    """open_clip's transformer, pooling and projection on tokens with interpolated positions."""
    visual: Any = clip._model.visual  # type: ignore[attr-defined]
    tokens, _ = clip.tower.embed(clip.tower.normalise(pixels_of(batch)))
    pooled, _ = visual._pool(visual.transformer(tokens))
    pooled @ visual.proj


def own_encoder(clip: FrozenClip, batch: list[LoadedViews]) -> None:
    clip.encode_image(pixels_of(batch))


def time_in_turns(functions: dict[str, Any], turns: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - started)
    return times


def run_stages(arguments: argparse.Namespace, folder: Path) -> None:
    from clipseed.data.vocabulary import load_vocabulary

    clip = FrozenClip.load(arguments.model, arguments.weights, arguments.device, arguments.precision)
    text = clip.encode_text(load_vocabulary("voc"))
    batches = load_batches(arguments.images, arguments.count, clip.tower.patch)
    pictures = sum(map(len, batches))
    labels = folder / "labels.json"
    labels.write_text(json.dumps({item.sample.id: list(item.sample.labels or ()) for b in batches for item in b}))
    split = folder / "split.txt"
    options = CamOptions(
        DatasetOptions("folder", images=arguments.images, labels=labels, classes="voc", split=str(split)),
        folder / "cams.h5", arguments.model, arguments.weights, arguments.device, arguments.precision, overwrite=True,
    )  # fmt: skip
    split.write_text("\n".join(item.sample.id for b in batches for item in b))

    def cams() -> None:
        for batch in batches:
            rows = [item.sample.labels or () for item in batch]
            compute_cams(clip, text, [pixels_of(batch)], rows, batch[0].grid)

    whole: list[float] = []
    refined: list[float] = []
    functions = {
        "bare encoder (open_clip)": lambda: [bare_encoder(clip, batch) for batch in batches],
        "bare encoder (clipseed)": lambda: [own_encoder(clip, batch) for batch in batches],
        "maps (model only)": cams,
        "clipseed cam (decode to file)": lambda: whole.append(run_cam(options).seconds),
        "clipseed cam --refine caa": lambda: refined.append(run_cam(replace(options, refine="caa")).seconds),
    }
    times = time_in_turns(functions, arguments.turns)
    times["clipseed cam (decode to file)"] = whole[1:]  # without loading the model
    times["clipseed cam --refine caa"] = refined[1:]
    base = times["bare encoder (open_clip)"]
    tokens = sum(item.cost for b in batches for item in b) / pictures
    pairs = sum(len(item.sample.labels or ()) for b in batches for item in b) / pictures
    print(f"{pictures} pictures of {arguments.images}, {tokens:.0f} tokens and {pairs:.2f} classes each on average;")
    print(f"{arguments.model} {clip.precision} on {clip.tower.device}, {torch.get_num_threads()} threads, "
          f"{arguments.turns} turns; medians, ratios turn by turn")  # fmt: skip
    for name, values in times.items():
        ratio = statistics.median(value / other for value, other in zip(values, base, strict=True))
        print(f"{name:32} {pictures / statistics.median(values):7.2f} images/s  {ratio:5.2f} x")


def peak_memory(arguments: argparse.Namespace, stage: str) -> float:
    """Peak resident memory in MB of a process of its own that runs one stage."""
    words = [sys.executable, __file__, "--images", str(arguments.images), "--count", str(arguments.count), "--model",
             arguments.model, "--weights", str(arguments.weights), "--device", arguments.device, "--precision",
             arguments.precision, "--memory-of", stage]  # fmt: skip
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


def memory_stage(arguments: argparse.Namespace, folder: Path) -> None:
    clip = FrozenClip.load(arguments.model, arguments.weights, arguments.device, arguments.precision)
    batches = load_batches(arguments.images, arguments.count, clip.tower.patch)
    if arguments.memory_of == "bare":
        for batch in batches:
            bare_encoder(clip, batch)
    else:
        from clipseed.data.vocabulary import load_vocabulary

        text = clip.encode_text(load_vocabulary("voc"))
        for batch in batches:
            rows = [item.sample.labels or () for item in batch]
            compute_cams(clip, text, [pixels_of(batch)], rows, batch[0].grid)
    # Not getrusage: its peak is inherited from the process that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="picture folder; default: generated ones")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--weights", type=Path, help="default: seeded random ones")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--memory-of", choices=["bare", "cam"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments.weights = arguments.weights or make_weights(folder, arguments.model)
        arguments.images = arguments.images or make_pictures(folder / "pictures", arguments.count)
        if arguments.memory_of:
            memory_stage(arguments, folder)
            return
        run_stages(arguments, folder)
        for stage in ("bare", "cam"):
            print(f"peak memory, {stage:4} {peak_memory(arguments, stage):22.0f} MB")


if __name__ == "__main__":
    main()
