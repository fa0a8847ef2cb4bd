"""How fast masks are proposed beside the stock ``SamAutomaticMaskGenerator``, both in turns within one process.

``python tools/bench_sam.py``. The model is a ViT-B of real size with seeded random weights, the image 500 x 375 and
smooth. Random weights score all masks about alike and draw them nearly over the whole image, so keys of the decoder's
attention are tied to its queries (tokens then look at places like themselves), a logit counts as inside above the 97th
percentile, and the other thresholds are quantiles, too: 15 % of all masks pass the predicted IoU, as on photographs
with trained weights, and two thirds of those the stability.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

from clipseed.sam.architecture import SIZES, build_sam
from clipseed.sam.candidates import passing, stability_score
from clipseed.sam.generator import generate
from clipseed.sam.grid import crops_of, point_grid
from clipseed.sam.model_backend import ModelBackend, SamInfo
from clipseed.sam.options import ProposalOptions
from clipseed.segments import Segments

PASS_IOU, PASS_STABILITY, INSIDE = 0.15, 0.67, 0.97
NO_SUPPRESSION = 1.1
"""So that all masks that pass are compared, in their order; one in the end would say little."""
GAIN = 4.0
"""Of the tied projections: with 1, attention is nearly even."""
OFFSET = 0.01
"""Random logits are small; with the stock offset of 1 no mask would be stable."""


def smooth_image(height: int, width: int) -> np.ndarray:
    """Low waves of colour: masks of random weights follow them instead of being noise, which stock RLE is slow on."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in generator.uniform(0, 3, (9, 3))]
    return np.uint8(127.5 + 42 * np.stack(waves).reshape(3, 3, height, width).sum(axis=0).transpose(1, 2, 0))


def measured_options(backend: ModelBackend, image: np.ndarray, points: int) -> ProposalOptions:
    """Options whose thresholds let the stated shares pass."""
    (embedding,) = backend.encode([image])
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
        box_nms_threshold=NO_SUPPRESSION,
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


def compare(found: Segments, records: list[dict[str, Any]]) -> str:
    """Whether masks are equal, and how alike they are otherwise."""
    theirs = np.array([record["segmentation"] for record in records])
    if found.masks.shape == theirs.shape and (found.masks == theirs).all():
        return f"equal, {len(found)} masks"
    flat, other = (masks.reshape(len(masks), -1).astype(np.float32) for masks in (found.masks, theirs))
    shared = flat @ other.T
    iou = shared / (flat.sum(1)[:, None] + other.sum(1)[None] - shared)
    return f"not equal: {len(found)} and {len(theirs)} masks, mean best IoU {iou.max(axis=1).mean():.4f}"


def build(seed: int) -> Any:
    """A ViT-B whose masks depend on the prompt."""
    torch.manual_seed(seed)
    sam = build_sam(SIZES["vit_b"])
    transformer = sam.mask_decoder.transformer
    looks = [layer.cross_attn_token_to_image for layer in transformer.layers]
    looks += [layer.cross_attn_image_to_token for layer in transformer.layers]
    with torch.no_grad():
        for attention in [*looks, transformer.final_attn_token_to_image]:
            attention.q_proj.weight.mul_(GAIN)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
        for block in sam.image_encoder.blocks:
            block.attn.rel_pos_h.normal_(std=0.02)
            block.attn.rel_pos_w.normal_(std=0.02)
        sam.mask_decoder.iou_prediction_head.layers[-1].bias.add_(1.0)
    return sam


def inside_threshold(backend: ModelBackend, image: np.ndarray) -> float:
    """Logit above which a few per cent of all pixels are."""
    (embedding,) = backend.encode([image])
    logits = backend.decode_prompts(embedding, points=point_grid(4, embedding.size)[:, None]).logits
    return float(logits.flatten()[::37].quantile(INSIDE))


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, seconds of CPU, and what came out."""
    began, began_cpu = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - began, time.process_time() - began_cpu, result


def main() -> None:
    """Print seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=16)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cpu, info = torch.device("cpu"), SamInfo("vit_b", None, None)
    stock = build(arguments.seed).eval()
    exact, half = (ModelBackend(build(arguments.seed), cpu, dtype, info) for dtype in (torch.float32, torch.bfloat16))
    image = smooth_image(375, 500)
    stock.mask_threshold = exact.mask_threshold = half.mask_threshold = inside_threshold(exact, image)
    options = measured_options(exact, image, arguments.points)
    generator, predictor = stock_of(stock, options), SamPredictor(stock)
    predictor.set_image(image)
    points = point_grid(8, image.shape[:2])[:, None]
    fitted = torch.from_numpy(predictor.transform.apply_coords(points, image.shape[:2]))
    labels = torch.ones(fitted.shape[:2], dtype=torch.int)
    embeddings = {backend: backend.encode([image])[0] for backend in (exact, half)}

    def batch(backend: ModelBackend) -> Any:
        """64 prompts up to the masks that pass."""
        embedding = embeddings[backend]
        decoded, whole = backend.decode_prompts(embedding, points=points), crops_of(*embedding.size, 0, 0.0)[0]
        return passing(backend, embedding, decoded, points[:, 0], whole, embedding.size, options)

    comparisons: dict[str, dict[str, Callable[[], Any]]] = {
        "one batch of 64 prompts": {
            "stock": lambda: predictor.predict_torch(fitted, labels, return_logits=True),
            "clipseed fp32": lambda: batch(exact),
            "clipseed bf16": lambda: batch(half),
        },
        "one image": {
            "stock": lambda: generator.generate(image),
            "clipseed fp32": lambda: generate(exact, image, options),
            "clipseed bf16": lambda: generate(half, image, options),
        },
    }
    for title, runs in comparisons.items():
        turns = [{name: timed(run) for name, run in runs.items()} for _ in range(arguments.turns)]
        print(title)
        for name in runs:
            wall, seconds = (min(turn[name][i] for turn in turns) for i in (0, 1))
            ratios = [turn["stock"][1] / turn[name][1] for turn in turns]
            result, stocks = turns[-1][name][2], turns[-1]["stock"][2]
            same = f"; {compare(result, stocks)}" if isinstance(result, Segments) else ""
            times = f"{wall:6.1f} s, {seconds:6.1f} s CPU"
            print(f"  {name:14s} {times}, {min(ratios):.2f} to {max(ratios):.2f} x stock{same}")


if __name__ == "__main__":
    main()
