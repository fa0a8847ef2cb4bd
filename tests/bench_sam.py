"""How fast masks are proposed beside the stock ``SamAutomaticMaskGenerator``, both in turns within one process.

``python tests/bench_sam.py``. The model is a ViT-B of real size with seeded random weights, the picture 500 x 375 and
smooth. Random weights score all masks about alike, near 0, so the thresholds are quantiles measured beforehand: 15 % of
all masks pass the predicted IoU, as on photographs with trained weights, and two thirds of those the stability.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator

from clipseed.sam.architecture import SIZES, build_sam
from clipseed.sam.candidates import stability_score
from clipseed.sam.generator import generate
from clipseed.sam.grid import point_grid
from clipseed.sam.model_backend import ModelBackend, SamInfo
from clipseed.sam.options import ProposalOptions
from clipseed.sam.proposals import Proposals

PASS_IOU, PASS_STABILITY = 0.15, 0.67
OFFSET = 0.01
"""Random logits are small; with the stock offset of 1 no mask would be stable."""


def smooth_picture(height: int, width: int) -> np.ndarray:
    """Low waves of colour: masks of random weights follow them instead of being noise, which stock RLE is slow on."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in generator.uniform(0, 3, (9, 3))]
    return np.uint8(127.5 + 42 * np.stack(waves).reshape(3, 3, height, width).sum(axis=0).transpose(1, 2, 0))


def measured_options(backend: ModelBackend, picture: np.ndarray, points: int) -> ProposalOptions:
    """Options whose thresholds let the stated shares pass."""
    (embedding,) = backend.encode([picture])
    ious, stabilities = [], []
    for batch in np.array_split(point_grid(points, embedding.size), max(1, points**2 // 64)):
        decoded = backend.decode_prompts(embedding, points=batch[:, None])
        ious.append(decoded.iou.flatten())
        for logits in decoded.logits:
            stabilities.append(stability_score(backend.upsample(embedding, logits), backend.mask_threshold, OFFSET))
    iou, stability = torch.cat(ious), torch.cat(stabilities)
    # A stock threshold of 0 or less is no filter, so the scores must be positive where it cuts.
    threshold = float(iou.quantile(1 - PASS_IOU))
    if threshold <= 0:
        raise SystemExit(f"this seed scores masks at {threshold:.3f}; take another")
    good = stability[iou > threshold]
    print(f"{len(iou)} masks, {int((iou > threshold).sum())} pass the predicted IoU, {float(iou.std()):.4f} its spread")
    return ProposalOptions(
        points_per_side=points,
        pred_iou_threshold=threshold,
        stability_threshold=float(good.quantile(1 - PASS_STABILITY)),
        stability_offset=OFFSET,
        box_nms_threshold=0.95,
    )


def stock_of(sam: Any, options: ProposalOptions) -> SamAutomaticMaskGenerator:
    """The package's generator with the same settings."""
    return SamAutomaticMaskGenerator(
        sam,
        points_per_side=options.points_per_side,
        pred_iou_thresh=options.pred_iou_threshold,
        stability_score_thresh=options.stability_threshold,
        stability_score_offset=options.stability_offset,
        box_nms_thresh=options.box_nms_threshold,
    )


def compare(found: Proposals, records: list[dict[str, Any]]) -> str:
    """Whether masks are equal, and how alike they are otherwise."""
    theirs = np.array([record["segmentation"] for record in records])
    if found.masks.shape == theirs.shape and (found.masks == theirs).all():
        return f"equal, {len(found)} masks"
    flat, other = (masks.reshape(len(masks), -1).astype(np.float32) for masks in (found.masks, theirs))
    shared = flat @ other.T
    iou = shared / (flat.sum(1)[:, None] + other.sum(1)[None] - shared)
    return f"not equal: {len(found)} and {len(theirs)} masks, mean best IoU {iou.max(axis=1).mean():.4f}"


def main() -> None:
    """Print seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=16)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(arguments.seed)
        sam = build_sam(SIZES["vit_b"])
        with torch.no_grad():
            sam.mask_decoder.iou_prediction_head.layers[-1].bias.add_(1.0)
        models.append(ModelBackend(sam, torch.device("cpu"), dtype, SamInfo("vit_b", None, None)))
    exact, half = models
    picture = smooth_picture(375, 500)
    options = measured_options(exact, picture, arguments.points)
    generator = stock_of(exact.sam, options)
    runs = {
        "stock": lambda: generator.generate(picture),
        "clipseed fp32": lambda: generate(exact, picture, options),
        "clipseed bf16 encoder": lambda: generate(half, picture, options),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for _ in range(arguments.turns):
        for name, run in runs.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            results[name] = run()
            seconds[name].append((time.perf_counter() - began, time.process_time() - began_cpu))
            print(f"{name}: {seconds[name][-1][0]:.0f} s, {seconds[name][-1][1]:.0f} s CPU", flush=True)
    best = {name: min(values, key=lambda value: value[1]) for name, values in seconds.items()}
    for name, (wall, cpu) in best.items():
        ratio = best["stock"][1] / cpu
        same = "" if name == "stock" else f"; {compare(results[name], results['stock'])}"
        print(f"{name:22s} {wall:6.1f} s, {cpu:6.1f} s CPU, {ratio:.2f} x stock{same}")


if __name__ == "__main__":
    main()
