"""What clipseed does on a GPU: the same as on the CPU? how fast? what limits it? Under eight minutes, no network.

``make bench-gpu``, or with any Python that has clipseed's dependencies ``python tools/bench_gpu.py --out gpu.json``;
then ``python tools/bench_gpu.py --render gpu.json`` writes the numbers into docs/performance.md. Where nothing can be
installed, carry the wheels that are missing (usually open_clip_torch, ftfy, wcwidth, segment-anything) and put them
on ``PYTHONPATH``. ``--device cpu --tiny`` runs every line with small sizes.

Parts, each with its own time; what is over is left out and said, and the output file is written after every part:

- ``check``: cam, refine, crf, sam-masks and sam-seed on the built-in world, the device beside the CPU.
- ``model``: ViT-B/16 at 769 tokens: bare encoder, CAM, CAM + CAA, memory.
- ``files``: JPEG files to HDF5: decoding alone by workers, all of it, and which stage limits.
- ``crf``: dense CRF at VOC's size, by pixels at once.
- ``batches``: images/s by batch size; what mixes of sizes make of it, by size of the unit.
- ``refine``: class-distribution affinity and pixel-adaptive refinement.
- ``sam``: ViT-B and ViT-H, seconds per image.

Weights are seeded random ones (speed does not depend on what a network has learnt), images are generated.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # a checkout is measured without being installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from clipseed.cam.methods import compute_cams  # noqa: E402
from clipseed.data.dataset import DatasetOptions  # noqa: E402
from clipseed.data.images import FileReader, patch_grid  # noqa: E402
from clipseed.data.types import Sample  # noqa: E402
from clipseed.data.vocabulary import load_vocabulary  # noqa: E402
from clipseed.defaults import CAM_MAX_SIDE, PATCH_TEMPERATURE  # noqa: E402
from clipseed.jobs.cam import CamOptions, CamRecipe, CamWork, run_cam  # noqa: E402
from clipseed.jobs.crf import CrfOptions, run_crf  # noqa: E402
from clipseed.jobs.demo import GRID  # noqa: E402
from clipseed.jobs.refine import RefineOptions, run_refine  # noqa: E402
from clipseed.jobs.sam_masks import SamMasksOptions, run_sam_masks  # noqa: E402
from clipseed.jobs.sam_seed import SamSeedOptions, run_sam_seed  # noqa: E402
from clipseed.pseudo.background import Background  # noqa: E402
from clipseed.pseudo.pixels import label_scores  # noqa: E402
from clipseed.refine.caa import CaaOptions, caa  # noqa: E402
from clipseed.refine.crf import dense_crf  # noqa: E402
from clipseed.refine.par import refine_par  # noqa: E402
from clipseed.runtime.decode import DecodePool  # noqa: E402
from clipseed.runtime.images import LoadedViews, ViewLoader, default_workers, token_budget, unit_size_for  # noqa: E402
from clipseed.runtime.run import RunOptions  # noqa: E402
from clipseed.store.cams import CamSet  # noqa: E402
from clipseed.store.label_masks import read_label_mask  # noqa: E402
from clipseed.store.segments import SegmentSet  # noqa: E402

MODEL = "ViT-B-16-quickgelu"
"""OpenAI's, which are the default, have QuickGELU."""
SIZE = (375, 500)
VOC_MIX = {(375, 500): 55, (500, 375): 17, (333, 500): 15, (500, 333): 7, (500, 500): 3, (400, 500): 3}
COCO_MIX = {(480, 640): 35, (640, 480): 15, (427, 640): 25, (640, 427): 10, (375, 500): 5, (500, 375): 5, (612, 612): 5}
MIXES = {"VOC": (VOC_MIX, 10_582), "COCO": (COCO_MIX, 82_081)}
"""Shares of sizes, height first, and the images of a training set."""
GOALS = {"cam": (2300, 1550), "caa": (2300, 1550), "crf": (100, None)}
"""Images per second on an H200: goal and floor."""
TOLERANCES = {
    "cam fp32": ("largest", 2e-3),
    "cam bf16": ("changed", 0.01),
    "caa fp32": ("changed", 0.002),
    "caa bf16": ("changed", 0.02),
    "js fp32": ("changed", 0.002),
    "par": ("largest", 4e-3),
    "crf": ("unequal", 0.001),
    "sam-masks fp32": ("lost", 0.01),
    "sam-masks auto": ("lost", 0.05),
    "sam-seed": ("unequal", 0.01),
}
"""What may differ between the device and the CPU. Maps are stored in half precision, whose steps are 0.0005. CAA's
boxes jump where a map crosses a threshold, so what counts there is how many patches get another label.

- ``largest``: largest difference of a map's value; ``changed``: share of patches whose strongest label changes;
- ``unequal``: share of pixels with another label; ``lost``: 1 - mean IoU of each segment with its best match.
"""
BACKGROUND = 0.4
BEGIN, END = "<!-- bench-gpu: begin -->", "<!-- bench-gpu: end -->"
SECONDS = {"check": 110, "model": 60, "files": 90, "crf": 40, "batches": 45, "refine": 25, "sam": 50}
GRACE = 25
"""Seconds after which a part that does not end takes the whole run with it, with what there is."""


@dataclass
class Bench:
    """What all parts share.

    Attributes:
        device: What is measured.
        tiny: Sizes that a CPU is through with in seconds.
        folder: For files.
        deadline: When the running part should be over, by ``time.perf_counter``.
        over: When the whole run should be.
    """

    device: torch.device
    tiny: bool
    folder: Path
    over: float
    deadline: float = 0.0
    left_out: list[str] = field(default_factory=list)

    @property
    def precision(self) -> str:
        return "fp32" if self.tiny else "bf16"

    def affords(self, what: str, seconds: float = 0.0) -> bool:
        """Whether time is left for something that takes about so many seconds; noted if not."""
        left = self.tiny or time.perf_counter() + seconds < min(self.deadline, self.over)
        if not left:
            self.left_out.append(what)
        return left

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, what: str, run: Callable[[], Any], images: int, repeats: int = 7) -> dict[str, Any]:
        """Images/s of a function: median, lowest and highest of several runs behind one that warms up, and memory."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.wait()
        rates = []
        for _ in range(1 if self.tiny else repeats):
            if rates and not self.affords(f"{what}: repeats"):
                break
            began = time.perf_counter()
            run()
            self.wait()
            rates.append(images / (time.perf_counter() - began))
        found: dict[str, Any] = {"images_per_second": statistics.median(rates), "lowest": min(rates),
                                 "highest": max(rates), "runs": len(rates)}  # fmt: skip
        if cuda:
            found["gpu_mb"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        return found


# The device beside the CPU ------------------------------------------------------------------------------------------


def check(bench: Bench) -> dict[str, Any]:
    """Every command on the built-in world, with its trained models; each step from the CPU's input."""
    there, cpu = bench.folder / "device", bench.folder / "cpu"
    there.mkdir()
    cpu.mkdir()
    device = str(bench.device)
    data = DatasetOptions("toy", limit=2 if bench.tiny else 16)
    found: dict[str, Any] = {}

    def note(name: str, measured: dict[str, float]) -> None:
        kind, most = TOLERANCES[name]
        found[name] = {**measured, "counts": kind, "tolerance": most, "ok": measured[kind] <= most}

    def maps(folder: Path, where: str, precision: Any) -> Path:
        out = folder / f"cam-{precision}.h5"
        run_cam(CamOptions(data, out, run=RunOptions(device=where, precision=precision, workers=0)))
        return out

    def refine(method: Any, folder: Path, where: str, precision: Any) -> Path:
        out = folder / f"{method}-{precision}.h5"
        source = cpu / "cam-fp32.h5"
        run_refine(RefineOptions(method, source, out, run=RunOptions(device=where, precision=precision, workers=0)))
        return out

    def segments(folder: Path, where: str, precision: str) -> Path:
        out = folder / f"masks-{precision}.h5"
        run_sam_masks(SamMasksOptions(out, cams=cpu / "cam-fp32.h5", proposals=GRID,
                                      run=RunOptions(device=where, precision=precision, workers=0)))  # fmt: skip
        return out

    def labels(folder: Path, name: str, make: Callable[[Path], object]) -> Path:
        make(folder / name)
        return folder / name

    def steps() -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
        fp32 = maps(cpu, "cpu", "fp32")
        yield "cam fp32", lambda: map_differences(fp32, maps(there, device, "fp32"))
        yield "cam bf16", lambda: map_differences(fp32, maps(there, device, "bf16"))
        spread = refine("caa", cpu, "cpu", "fp32")
        yield "caa fp32", lambda: map_differences(spread, refine("caa", there, device, "fp32"))
        yield "caa bf16", lambda: map_differences(spread, refine("caa", there, device, "bf16"))
        for method, name in (("js", "js fp32"), ("par", "par")):
            reference = refine(method, cpu, "cpu", "fp32")
            yield name, lambda m=method, r=reference: map_differences(r, refine(m, there, device, "fp32"))  # type: ignore[misc]

        def crf(where: str) -> Callable[[Path], object]:
            return lambda out: run_crf(CrfOptions(spread, out, run=RunOptions(device=where, workers=0)))

        crf_cpu = labels(cpu, "crf", crf("cpu"))
        yield "crf", lambda: label_differences(crf_cpu, labels(there, "crf", crf(device)))
        reference = segments(cpu, "cpu", "fp32")
        yield "sam-masks fp32", lambda: segment_differences(reference, segments(there, device, "fp32"))
        if bench.device.type != "cpu":  # half precision, which a CPU takes minutes for
            yield "sam-masks auto", lambda: segment_differences(reference, segments(there, device, "auto"))

        def seeds(source: Path, masks: Path) -> Callable[[Path], object]:
            return lambda out: run_sam_seed(SamSeedOptions(source, masks, out, run=RunOptions(workers=0)))

        seeded = labels(cpu, "pseudo-sam", seeds(spread, reference))
        ours = seeds(there / "caa-fp32.h5", there / "masks-fp32.h5")
        yield "sam-seed", lambda: label_differences(seeded, labels(there, "pseudo-sam", ours))

    for name, step in steps():
        note(name, step())
        if not bench.affords("check: what follows " + name):
            break
    return {"images": data.limit, "results": found, "ok": all(result["ok"] for result in found.values())}


def map_differences(one: Path, other: Path) -> dict[str, float]:
    """Largest difference of a value, and share of patches (or pixels) whose strongest label is another."""
    largest, changed, places = 0.0, 0, 0
    with CamSet(one) as first, CamSet(other) as second:
        for key in first:
            a, b = (np.asarray(seeds[key].maps, np.float32) for seeds in (first, second))
            if not len(a):
                continue
            largest = max(largest, float(np.abs(a - b).max()))
            ours, theirs = (label_scores(m, range(len(m)), Background("threshold", BACKGROUND)).labels for m in (a, b))
            changed += int((ours != theirs).sum())
            places += ours.size
    return {"largest": largest, "changed": changed / max(1, places)}


def label_differences(one: Path, other: Path) -> dict[str, float]:
    """Share of pixels with another label."""
    unequal = pixels = 0
    for path in sorted(one.rglob("*.png")):
        a, b = read_label_mask(path), read_label_mask(other / path.relative_to(one))
        unequal += int((a != b).sum())
        pixels += a.size
    return {"unequal": unequal / max(1, pixels)}


def segment_differences(one: Path, other: Path) -> dict[str, float]:
    """How much of the segments is lost, either way: 1 - mean IoU with the best match."""
    scores: list[float] = []
    counts = [0, 0]
    with SegmentSet(one) as first, SegmentSet(other) as second:
        for key in first:
            a, b = (cache[key].masks().reshape(len(cache[key]), -1).astype(np.float32) for cache in (first, second))
            counts = [counts[0] + len(a), counts[1] + len(b)]
            if not len(a) or not len(b):
                scores += [0.0] * (len(a) + len(b))
                continue
            shared = a @ b.T
            iou = shared / np.maximum(1, a.sum(1)[:, None] + b.sum(1)[None] - shared)
            scores += [*iou.max(axis=1).tolist(), *iou.max(axis=0).tolist()]
    return {"lost": 1 - statistics.mean(scores) if scores else 0.0, "segments_cpu": counts[0], "segments": counts[1]}


# The model alone ----------------------------------------------------------------------------------------------------


def weights_of(bench: Bench) -> tuple[str | None, str]:
    """Model and weights: a seeded random ViT-B/16 in open_clip's format; tiny: the built-in one."""
    if bench.tiny:
        return None, "toy"
    import open_clip
    from safetensors.torch import save_file

    path = bench.folder / f"{MODEL}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        state = open_clip.create_model(MODEL).state_dict()
        save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    return MODEL, str(path)


def cam_work(bench: Bench, refine: Any = None, device: str | None = None, precision: Any = None) -> CamWork:
    """What ``clipseed cam`` computes with."""
    model, weights = weights_of(bench)
    options = CamOptions(
        DatasetOptions("folder", images=bench.folder), bench.folder / "none.h5", model, weights, refine=refine,
        run=RunOptions(device=device or str(bench.device), precision=precision or bench.precision),
    )  # fmt: skip
    return CamRecipe(options, load_vocabulary("toy" if bench.tiny else "voc"), FileReader())()


def labels_of(number: int) -> tuple[int, ...]:
    """One to three classes, 1.7 on average, as in VOC."""
    return (number % 3, 3 + number % 4, 7 + number % 3)[: 1 + number % 2 + (number % 5 == 0)]


def items_of(count: int, grid: tuple[int, int], patch: int) -> list[LoadedViews]:
    """Decoded images of one grid."""
    rng = np.random.default_rng(0)
    views = rng.integers(0, 256, (count, grid[0] * patch, grid[1] * patch, 3), dtype=np.uint8)
    size = (grid[0] * patch, grid[1] * patch)
    return [LoadedViews(Sample(str(k), Path(str(k)), labels_of(k)), size, (view,), grid)
            for k, view in enumerate(views)]  # fmt: skip


def grid_of(bench: Bench, patch: int) -> tuple[int, int]:
    return (6, 8) if bench.tiny else patch_grid(*SIZE, patch, CAM_MAX_SIDE, 0)


class BareEncoder:
    """open_clip's transformer, pooling and projection in the tower's type, on images that the device holds."""

    def __init__(self, work: CamWork) -> None:
        visual: Any = work.clip._model.visual
        self._tower, self._visual = work.clip.tower, visual
        self._transformer = copy.deepcopy(visual.transformer).to(work.clip.tower.device, work.clip.tower.dtype)

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> None:
        tower = self._tower
        tokens, _ = tower.embed(tower.normalize(pixels))
        pooled, _ = self._visual._pool(self._transformer(tokens.to(tower.dtype)).float())
        (pooled @ self._visual.proj).cpu()


def model(bench: Bench) -> dict[str, Any]:
    """Images/s of a full batch of one grid that the device holds, and ``with transfers`` of arrays that it does not."""
    work = cam_work(bench)
    grid = grid_of(bench, work.clip.tower.patch)
    tokens = grid[0] * grid[1] + 1
    count = 4 if bench.tiny else max(1, token_budget(bench.device) // tokens)
    items = items_of(count, grid, work.clip.tower.patch)
    bare, pixels = BareEncoder(work), upload(items, bench.device)
    labels = [item.sample.labels or () for item in items]
    found: dict[str, Any] = {"tokens": tokens, "batch": count, "precision": bench.precision}
    refined = cam_work(bench, "caa")

    def caa_of(pixels: torch.Tensor) -> None:
        made = compute_cams(work.clip, work.text, [pixels], labels, grid, attention_layers=CaaOptions().layers)
        assert made.attention is not None
        caa(made.maps, made.attention)

    if not bench.tiny:
        found["products"] = products(bench)
    stages: dict[str, Callable[[], Any]] = {
        "bare encoder (open_clip)": lambda: bare(pixels),
        "bare encoder (clipseed)": lambda: work.clip.encode_image(pixels).cpu(),
        "cam": lambda: compute_cams(work.clip, work.text, [pixels], labels, grid),
        "caa": lambda: caa_of(pixels),
        "cam, with transfers": lambda: work.compute(items),
        "caa, with transfers": lambda: refined.compute(items),
    }
    for name, run in stages.items():
        if bench.affords(f"model: {name}"):
            found[name] = bench.timed(name, run, count)
            base = found["bare encoder (open_clip)"]["images_per_second"]
            found[name]["share_of_bare"] = found[name]["images_per_second"] / base
    found["recomputed"] = work.counters["recomputed"]
    if bench.affords("model: fp32 beside the CPU"):
        few = items[:2]
        on_cpu, here = (cam_work(bench, None, where, "fp32").compute(few) for where in ("cpu", str(bench.device)))
        found["fp32 beside the CPU"] = max(
            float(np.abs(a.maps - b.maps).max()) for a, b in zip(on_cpu, here, strict=True)
        )
    return found


def upload(items: Sequence[LoadedViews], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.stack([item.views[0] for item in items])).to(device).permute(0, 3, 1, 2)


def products(bench: Bench) -> dict[str, float]:
    """The card's own ceilings: TFLOP/s of a large bf16 product of random numbers, TB/s of a copy, read and written."""
    side = 8192
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    bulk = torch.empty(2**30, dtype=torch.uint8, device=bench.device)
    other = torch.empty_like(bulk)
    flops = bench.timed("product", lambda: a @ b, 1)["images_per_second"] * 2 * side**3
    copied = bench.timed("copy", lambda: other.copy_(bulk), 1)["images_per_second"] * 2 * bulk.numel()
    return {"tflops_bf16": flops / 1e12, "copy_tb_per_second": copied / 1e12}


# Batches and units --------------------------------------------------------------------------------------------------


def mixed_sizes(mix: dict[tuple[int, int], int], count: int) -> list[tuple[int, int]]:
    """Seeded image sizes, height first, drawn with the weights of ``mix``; every fifth side is off by some pixels."""
    rng = np.random.default_rng(0)
    shares = np.array(list(mix.values()), np.float64)
    drawn = rng.choice(len(mix), count, p=shares / shares.sum())
    shrink = rng.integers(0, 80, (count, 2)) * (rng.random((count, 2)) < 0.2)
    sides = np.array(list(mix))[drawn] - shrink * (np.array(list(mix))[drawn] < 640)
    return [(int(height), int(width)) for height, width in sides]


def batches_of(sizes: Sequence[tuple[int, int]], unit: int, budget: int, patch: int = 16) -> list[tuple[int, int]]:
    """Images and most images of every batch that ``cam`` makes, unit by unit."""
    found = []
    for start in range(0, len(sizes), unit):
        grids = Counter(patch_grid(*size, patch, CAM_MAX_SIDE, 0) for size in sizes[start : start + unit])
        for grid, count in grids.items():
            most = max(1, budget // (grid[0] * grid[1] + 1))
            full, rest = divmod(count, most)
            found += [(most, most)] * full + ([(rest, most)] if rest else [])
    return found


def fill_of(sizes: Sequence[tuple[int, int]], unit: int, budget: int) -> dict[str, float]:
    """How full batches are.

    ``fill`` is the mean over batches of the share that is used; ``fill_by_image`` the same over images, each asking how
    full its own batch is: many batches are nearly empty, but few images are in them. ``alone``: share of images in
    batches of fewer than eight, whose time is that of starting kernels.
    """
    batches = batches_of(sizes, unit, budget)
    return {
        "images_per_batch": len(sizes) / len(batches),
        "fill": statistics.mean(used / most for used, most in batches),
        "fill_by_image": sum(used * used / most for used, most in batches) / len(sizes),
        "alone": sum(used for used, _ in batches if used < 8) / len(sizes),
    }


def fills(bench: Bench) -> dict[str, Any]:
    """Simulated, without a model: units as they are, were (2,048 images on a GPU), and larger."""
    budget = token_budget(torch.device("cuda"))
    found: dict[str, Any] = {"budget": budget, "unit": unit_size_for(torch.device("cuda"))}
    for name, (mix, count) in MIXES.items():
        sizes = mixed_sizes(mix, 500 if bench.tiny else count)
        found[name] = {str(unit): fill_of(sizes, unit, budget) for unit in (2048, 4096, 8192, 16384)}
    return found


def batches(bench: Bench) -> dict[str, Any]:
    """Images/s of ``cam`` by batch size, and what that makes of mixes of sizes, by size of the unit and of batches."""
    work = cam_work(bench)
    grid = grid_of(bench, work.clip.tower.patch)
    items = items_of(6 if bench.tiny else 256, grid, work.clip.tower.patch)
    seconds: dict[int, float] = {}
    rates: dict[str, Any] = {}
    for count in (1, 2, 6) if bench.tiny else (1, 2, 4, 8, 16, 32, 64, 128, 256):
        if not bench.affords(f"batches of {count}"):
            break
        rates[str(count)] = bench.timed(f"batches of {count}", lambda n=count: work.compute(items[:n]), count, 5)  # type: ignore[misc]
        seconds[count] = count / rates[str(count)]["images_per_second"]
    tokens = grid[0] * grid[1] + 1
    expected: dict[str, Any] = {}
    for (name, (mix, count)), unit in itertools.product(MIXES.items(), (2048, 8192, 16384)):
        sizes = mixed_sizes(mix, 300 if bench.tiny else count)
        for budget in (12_500, 25_000, 50_000, 100_000):
            found = batches_of(sizes, unit, budget)
            # A batch of images of other sizes is taken to cost what as many tokens of the measured size cost.
            scale = [used * (budget / most) / tokens for used, most in found]
            largest = max(seconds)
            spent = sum(
                float(np.interp(size, list(seconds), list(seconds.values()))) * max(1.0, size / largest)
                for size in scale
            )
            expected[f"{name}, units of {unit}, {budget} tokens"] = len(sizes) / spent
    return {"tokens": tokens, "by_batch": rates, "expected": expected, "fills": fills(bench)}


# Refinements, CRF ---------------------------------------------------------------------------------------------------


def refine(bench: Bench) -> dict[str, Any]:
    """Images/s of the class-distribution affinity (ViT-B/16, half precision) and of pixel-adaptive refinement."""
    from clipseed.cam.dense import dense_features, similarities
    from clipseed.clip.attention import patch_attention
    from clipseed.refine.affinity import balance
    from clipseed.refine.caa import spread_within_boxes
    from clipseed.refine.distribution import distribution_affinity

    work = cam_work(bench)
    grid = grid_of(bench, work.clip.tower.patch)
    count = 3 if bench.tiny else max(1, token_budget(bench.device) // (grid[0] * grid[1] + 1))
    items = items_of(count, grid, work.clip.tower.patch)
    cams = [torch.from_numpy(np.asarray(record.maps, np.float32)) for record in work.compute(items)]
    pixels = upload(items, bench.device)
    options = CaaOptions()

    @torch.inference_mode()
    def js() -> None:
        attention = patch_attention(work.clip.tower, pixels, options.layers)
        scores = similarities(dense_features(work.clip, pixels, "svc"), work.text)
        affinity = balance(distribution_affinity(scores, attention, PATCH_TEMPERATURE), options.rounds)
        spread_within_boxes(cams, affinity, options)

    found: dict[str, Any] = {"batch": count, "js": bench.timed("js", js, count, 3)}
    if not bench.affords("refine: par"):
        return found
    height, width = (48, 64) if bench.tiny else SIZE
    many = 2 if bench.tiny else max(1, token_budget(bench.device) // (height * width // 64 + 1))
    scores = torch.rand(many, 3, height, width, device=bench.device)
    image = torch.randint(0, 256, (many, 3, height, width), device=bench.device, dtype=torch.uint8)
    with torch.inference_mode():
        found["par"] = {"batch": many, **bench.timed("par", lambda: refine_par(scores, image), many, 3)}
    return found


def crf(bench: Bench) -> dict[str, Any]:
    """Images/s of the dense CRF with three labels, by pixels at once."""
    height, width = (40, 56) if bench.tiny else SIZE
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(photo_like(rng, height, width)).to(bench.device) for _ in range(4)]
    coarse = torch.from_numpy(rng.random((4, 3, 6, 8), np.float32) * 3)
    unaries = list(torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear").to(bench.device))
    found: dict[str, Any] = {"size": [height, width], "labels": 3, "by_pixels": {}}
    for pixels in (1, 2) if bench.tiny else (750_000, 1_500_000, 3_000_000, 6_000_000, 12_000_000):
        if not bench.affords(f"crf: {pixels} pixels"):
            break
        many = max(1, pixels if bench.tiny else pixels // (height * width))
        some = [index % 4 for index in range(many)]
        run = dense_crf_of([unaries[k] for k in some], [images[k] for k in some])
        found["by_pixels"][str(pixels)] = {"batch": many, **bench.timed(f"crf {pixels}", run, many, 3)}
    found["best"] = max(result["images_per_second"] for result in found["by_pixels"].values())
    posterior, again = (dense_crf([unaries[0].to(w)], [images[0].to(w)])[0].cpu() for w in ("cpu", bench.device))
    found["unequal"] = float((posterior.argmax(0) != again.argmax(0)).float().mean())
    twice = dense_crf([unaries[0]], [images[0]])[0].cpu()
    found["differs_between_runs"] = float((again - twice).abs().max())
    return found


def dense_crf_of(unaries: list[torch.Tensor], images: list[torch.Tensor]) -> Callable[[], Any]:
    return lambda: [posterior.cpu() for posterior in dense_crf(unaries, images)]


# From files ---------------------------------------------------------------------------------------------------------


def photo_like(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth colours with grain, so that JPEG files are as large as photographs' are."""
    knots = Image.fromarray(rng.integers(0, 256, (max(2, height // 25), max(2, width // 25), 3), dtype=np.uint8))
    smooth = np.asarray(knots.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return np.asarray(np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8))


def make_files(bench: Bench, count: int) -> Path:
    """JPEG files of VOC-like sizes: some hundred different ones, under as many names as wanted, and their labels."""
    folder = bench.folder / "images"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    distinct = min(count, 6 if bench.tiny else 300)
    sizes = [(48, 64)] * distinct if bench.tiny else mixed_sizes(VOC_MIX, distinct)
    made: list[Path] = []
    for number, (height, width) in enumerate(sizes):
        path = folder / f"{number:06d}.jpg"
        Image.fromarray(photo_like(rng, height, width)).save(path, quality=90)
        made.append(path)
    for number in range(distinct, count):
        os.link(made[number % distinct], folder / f"{number:06d}.jpg")
    (bench.folder / "labels.json").write_text(json.dumps({f"{k:06d}": list(labels_of(k)) for k in range(count)}))
    return folder


def files(bench: Bench) -> dict[str, Any]:
    """Decoding alone, then ``clipseed cam`` and ``clipseed cam --refine caa`` from JPEG files to HDF5."""
    count = 8 if bench.tiny else 16_384
    folder = make_files(bench, count)
    loader = ViewLoader(FileReader(), 16, (1.0,), CAM_MAX_SIDE, 0)
    samples = [Sample(path.stem, path, (0,)) for path in sorted(folder.iterdir())]
    most = default_workers(bench.device)
    decoding: dict[str, Any] = {}
    began = time.process_time()
    for sample in samples[:50]:
        loader(sample)
    one = min(50, len(samples)) / (time.process_time() - began)
    for workers in (0,) if bench.tiny else sorted({1, max(1, most // 4), max(1, most // 2), most}):
        if not bench.affords(f"files: decoding with {workers} workers"):
            break
        some = samples[: int(min(count, max(200, 3 * one * max(1, workers))))]
        with DecodePool(loader, workers, 96 + 2 * workers) as pool:
            decoding[str(workers)] = steady(arrivals(outcome[0].id for outcome in pool.stream(some)))
    found: dict[str, Any] = {"images": count, "one_core_images_per_second": one, "decoding": decoding}
    model, weights = weights_of(bench)
    data = DatasetOptions(
        "folder", images=folder, labels=bench.folder / "labels.json", classes="toy" if bench.tiny else "voc"
    )
    for name, refinement in (("cam", None), ("caa", "caa")):
        if not bench.affords(f"files: {name}", 0 if bench.tiny else 20):
            break
        seen: list[tuple[float, int]] = []

        def start(todo: int, done: int, seen: list[tuple[float, int]] = seen) -> Any:
            seen.append((time.perf_counter(), 0))
            return lambda number, stats: seen.append((time.perf_counter(), number))

        options = CamOptions(
            data, bench.folder / f"{name}.h5", model, weights, refine=refinement,  # type: ignore[arg-type]
            run=RunOptions(device=str(bench.device), precision=bench.precision, overwrite=True),
        )  # fmt: skip
        report = run_cam(options, lambda image_set, start=start: start)
        found[name] = {
            **steady(seen),
            "with_start": report.stats.computed / report.seconds,
            "bottleneck": report.stats.bottleneck,
            "waits": {stage: round(seconds, 2) for stage, seconds in report.stats.waits.items()},
            "process_mb": peak_process_mb(),
        }
    return found


def arrivals(things: Iterator[Any]) -> list[tuple[float, int]]:
    return [(time.perf_counter(), 0)] + [(time.perf_counter(), 1) for _ in things]


def steady(seen: list[tuple[float, int]]) -> dict[str, float]:
    """Images/s once workers run: of all but the first quarter."""
    total = sum(number for _, number in seen)
    done, index = 0, 0
    while index < len(seen) - 2 and done < total / 4:
        done += seen[index][1]
        index += 1
    begin = seen[max(0, index - 1)][0]
    spent = max(1e-9, seen[-1][0] - begin)
    return {"images_per_second": (total - done) / spent, "seconds": seen[-1][0] - seen[0][0]}


def peak_process_mb() -> float:
    """Peak resident memory of this process so far; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    words = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(words["VmHWM"].split()[0]) / 1024


# SAM ----------------------------------------------------------------------------------------------------------------


def sam(bench: Bench) -> dict[str, Any]:
    """Seconds per image for the stock grid of 32 x 32 points, with 15 % of the masks passing; random weights."""
    from dataclasses import replace

    from clipseed.sam.architecture import SIZES, SamConfig, build_sam
    from clipseed.sam.generator import generate
    from clipseed.sam.grid import point_grid
    from clipseed.sam.model_backend import ModelBackend, SamInfo
    from clipseed.sam.options import STOCK

    tiny = SamConfig(
        image_size=64, embed_dim=32, depth=2, heads=2, window_size=2, global_attn_indexes=(1,), out_chans=32
    )
    sizes = {"tiny": tiny} if bench.tiny else {name: SIZES[name] for name in ("vit_b", "vit_h")}
    side = 4 if bench.tiny else 32
    image = photo_like(np.random.default_rng(0), *((48, 64) if bench.tiny else SIZE))
    dtype = torch.float32 if bench.tiny else torch.bfloat16
    found: dict[str, Any] = {"points": side**2}
    for name, config in sizes.items():
        if not bench.affords(f"sam: {name}"):
            break
        torch.manual_seed(0)
        backend = ModelBackend(build_sam(config), bench.device, dtype, SamInfo(name, None, None))
        (embedding,) = backend.encode([image])
        iou = backend.decode_prompts(embedding, points=point_grid(4, embedding.size)[:, None]).iou.flatten().float()
        # A threshold of 0 or less would be no filter.
        threshold = max(1e-6, float(iou.cpu().quantile(0.85)))
        options = replace(STOCK, points_per_side=side, pred_iou_threshold=threshold, stability_threshold=0.0)
        encoding = bench.timed(f"{name} encoder", lambda b=backend: b.encode([image]), 1, 3)  # type: ignore[misc]
        whole = bench.timed(name, lambda b=backend, o=options: generate(b, image, o), 1, 3)  # type: ignore[misc]
        found[name] = {
            "seconds_encoder": 1 / encoding["images_per_second"],
            "seconds": 1 / whole["images_per_second"],
            "slowest": 1 / whole["lowest"],
            "gpu_mb": whole.get("gpu_mb"),
            "segments": len(generate(backend, image, options)),
        }
        del backend, embedding
    return found


# All of it ----------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "check": check, "model": model, "files": files, "crf": crf, "batches": batches, "refine": refine, "sam": sam,
}  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were made on."""
    commit = answer_of("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    found: dict[str, Any] = {
        "device": str(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpu_memory_mb"] = torch.cuda.get_device_properties(device).total_memory // 2**20
        found["cuda"] = torch.version.cuda
        found["driver"] = answer_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def answer_of(*words: str) -> str | None:
    """First word that a program prints; nothing where it is missing or fails."""
    if shutil.which(words[0]) is None:
        return None
    said = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()
    return said[0] if said else None


def verdicts(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Goals beside what was measured."""
    rates: dict[str, Any] = {}
    for name in ("cam", "caa"):
        rates[name] = parts.get("model", {}).get(name, {}).get("images_per_second")
    rates["crf"] = parts.get("crf", {}).get("best")
    found = [
        {"what": name, "measured": rates[name], "goal": goal, "floor": floor, "met": rates[name] >= goal}
        for name, (goal, floor) in GOALS.items()
        if rates.get(name)
    ]
    end = parts.get("files", {})
    decoding = [result["images_per_second"] for result in end.get("decoding", {}).values()]
    for name in ("cam", "caa"):
        if decoding and rates.get(name) and name in end:
            goal = 0.8 * min(max(decoding), rates[name])
            reached = end[name]["images_per_second"]
            found.append({"what": f"{name} from files", "measured": reached, "goal": goal, "floor": None,
                          "met": reached >= goal})  # fmt: skip
    return found


def run_parts(bench: Bench, names: Sequence[str], save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run parts one after the other; one that fails says so and the next goes on."""
    result: dict[str, Any] = {"machine": machine(bench.device), "tiny": bench.tiny, "parts": {}, "left_out": []}
    began = time.perf_counter()

    def cut_off(part: str) -> None:
        result["parts"].setdefault(part, {})["error"] = "took too long; the run was ended"
        save(result)
        os._exit(1)

    for name in names:
        start = time.perf_counter()
        if start >= bench.over:
            result["left_out"].append(name)
            continue
        bench.deadline = start + SECONDS[name]
        guard = threading.Timer(min(SECONDS[name], max(1.0, bench.over - start)) + GRACE, cut_off, [name])
        guard.daemon = True
        if not bench.tiny:
            guard.start()
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            result["parts"][name] = PARTS[name](bench)
        except Exception as error:
            traceback.print_exc()
            result["parts"][name] = {"error": f"{type(error).__name__}: {str(error)[:300]}",
                                     "trace": traceback.format_exc()[-1500:]}  # fmt: skip
        guard.cancel()
        result["parts"][name]["seconds"] = round(time.perf_counter() - start, 1)
        result["parts"][name]["process_mb"] = peak_process_mb()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        result["seconds"] = round(time.perf_counter() - began, 1)
        result["goals"] = verdicts(result["parts"])
        result["left_out"] = [*bench.left_out]
        save(result)
    return result


def table(result: dict[str, Any]) -> str:
    """Numbers as Markdown."""
    about, parts = result["machine"], result["parts"]
    lines = [
        f"{about.get('gpu') or about['device']}, driver {about.get('driver')}, torch {about['torch']}, "
        f"{about['cores']} cores, commit {about['commit']}, {about['date']}; "
        "`make bench-gpu`: medians, and in brackets the lowest and highest run.",
        "",
    ]
    if results := parts.get("check", {}).get("results"):
        lines += [f"The device beside the CPU on {parts['check']['images']} built-in scenes:", "",
                  "| command | what differs | measured | allowed |", "| --- | --- | --- | --- |"]  # fmt: skip
        lines += [f"| {name} | {KINDS[row['counts']]} | {row[row['counts']]:.5f} | {row['tolerance']} |"
                  + ("" if row["ok"] else " **not met**") for name, row in results.items()]  # fmt: skip
        lines.append("")
    lines += ["| stage | images/s | of the bare encoder | GPU memory |", "| --- | --- | --- | --- |"]
    rows = {**{name: row for name, row in parts.get("model", {}).items() if isinstance(row, dict)},
            **{name: parts.get("refine", {}).get(name) for name in ("js", "par")}}  # fmt: skip
    rows |= {f"crf, {row['batch']} images at once": row for row in parts.get("crf", {}).get("by_pixels", {}).values()}
    for name, row in rows.items():
        if row and "images_per_second" in row:
            share = f"{row['share_of_bare']:.0%}" if "share_of_bare" in row else ""
            memory = f"{row['gpu_mb']:,.0f} MB" if row.get("gpu_mb") else ""
            lines.append(f"| {name} | {row['images_per_second']:,.1f} ({row['lowest']:,.1f} to {row['highest']:,.1f}) "
                         f"| {share} | {memory} |")  # fmt: skip
    end = parts.get("files", {})
    for workers, row in end.get("decoding", {}).items():
        lines.append(f"| decoding alone, {workers} workers | {row['images_per_second']:,.1f} | | |")
    for name in ("cam", "caa"):
        if name in end:
            lines.append(f"| {name}, JPEG to HDF5 | {end[name]['images_per_second']:,.1f}, "
                         f"limited by {end[name]['bottleneck']} | | |")  # fmt: skip
    for name, row in parts.get("sam", {}).items():
        if isinstance(row, dict):
            lines.append(f"| sam-masks, {name}, {parts['sam']['points']} points | {1 / row['seconds']:.2f} | | |")
    if by_batch := parts.get("batches", {}).get("by_batch"):
        lines += ["", "`cam` by batch size: " + ", ".join(f"{count}: {row['images_per_second']:,.0f}/s"
                                                          for count, row in by_batch.items()) + "."]  # fmt: skip
    if result.get("goals"):
        said = [f"{one['what']} {one['measured']:,.0f} of {one['goal']:,.0f}/s" + ("" if one["met"] else " (missed)")
                for one in result["goals"]]  # fmt: skip
        lines += ["", f"Goals: {'; '.join(said)}."]
    missing = [*result.get("left_out", []), *(name for name, part in parts.items() if "error" in part)]
    if missing:
        lines += ["", f"Not measured in this run: {', '.join(missing)}."]
    return "\n".join(lines)


KINDS = {
    "largest": "largest difference of a value",
    "changed": "patches whose strongest label changes",
    "unequal": "pixels with another label",
    "lost": "1 - mean IoU of matched segments",
}


def render(result: dict[str, Any], path: Path) -> None:
    """Put the table between the markers of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{path}: needs {BEGIN} and {END} once each")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Measure and print, or render what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes and one run each, to try the script")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--seconds", type=float, default=440, help="for all parts together")
    parser.add_argument("--out", type=Path, help="JSON file, written after every part; default: stdout at the end")
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="write its numbers into --into, and measure nothing"
    )
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "performance.md")
    arguments = parser.parse_args()
    if arguments.render:
        render(json.loads(arguments.render.read_text(encoding="utf-8")), arguments.into)
        return
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only {','.join(unknown)}: choose of {', '.join(PARTS)}")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA GPU here; --device cpu --tiny tries the script")
    os.environ["HF_HUB_OFFLINE"] = "1"

    def save(result: dict[str, Any]) -> None:
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as name:
        bench = Bench(device, arguments.tiny, Path(name), time.perf_counter() + arguments.seconds)
        result = run_parts(bench, names, save)
    if not arguments.out:
        print(json.dumps(result, indent=1))
    failed = [part for part, found in result["parts"].items() if "error" in found or found.get("ok") is False]
    if failed:
        print(f"failed or beyond tolerance: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
