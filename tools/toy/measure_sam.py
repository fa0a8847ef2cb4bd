"""Does the tiny SAM behave like a SAM? The claims of docs/toy.md, measured on the held-out scenes.

Run ``python -m tools.toy.measure_sam``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

import clipseed
from clipseed.data.toy.dataset import HELD_OUT_COUNT, HELD_OUT_SEED
from clipseed.data.toy.world import Scene, lay_out
from clipseed.sam.backend import Embedding, SamBackend
from clipseed.sam.candidates import stability_score
from clipseed.sam.generator import generate
from clipseed.sam.load import load_sam
from clipseed.sam.options import STOCK, ProposalOptions
from clipseed.segments import WHOLE

TOY_SAM = Path(clipseed.__file__).parent / "data" / "toy" / "weights" / "sam.npz"
"""The shipped weights."""
GRID = replace(STOCK, points_per_side=16)
"""The stock mask generator with a coarser grid: the smallest object still gets a dozen points."""
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SamMeasures:
    """What a toy SAM can do. IoUs are with the object as far as it is visible, at the image's size.

    Attributes:
        point_iou: Mean IoU of the whole (level 2) for one random point on each object.
        point_iou_best: The same for the best of the three masks.
        point_above: Share of those points whose whole has an IoU above 0.75, and above 0.9.
        box_iou: Mean IoU of the whole for the exact box of each object.
        calibration: Mean distance between predicted and real IoU of the wholes for points.
        predicted, stability: Mean predicted IoU and mean stability score (offset 1) of those wholes.
        proposals: Masks per image of the generator, by level: sub-part, part, whole.
        recall: Share of objects that a proposal covers with an IoU above 0.75, and above 0.9.
        covered: Share of pixels under any proposal.
    """

    scenes: int
    objects: int
    point_iou: float
    point_iou_best: float
    point_above: tuple[float, float]
    box_iou: float
    calibration: float
    predicted: float
    stability: float
    proposals: tuple[float, float, float]
    recall: tuple[float, float]
    covered: float


def measure(
    backend: SamBackend, count: int = HELD_OUT_COUNT, seed: int = HELD_OUT_SEED, options: ProposalOptions = GRID
) -> SamMeasures:
    """Measure a SAM on scenes of the scored world."""
    rows: list[tuple[float, ...]] = []
    levels = np.zeros((count, 3))
    covered = np.zeros(count)
    for index in range(count):
        scene = lay_out(seed, index)
        image = scene.image()
        embedding = backend.encode([image])[0]
        proposals = generate(backend, image, options)
        levels[index] = np.bincount(proposals.level, minlength=3)
        covered[index] = proposals.masks.any(axis=0).mean()
        prompted = prompt_objects(backend, embedding, scene, np.random.default_rng([seed, index, 4]))
        for item, row in zip(scene.objects, prompted, strict=True):
            best = max((iou(mask, item.visible) for mask in proposals.masks), default=0.0)
            rows.append((*row, best))
    whole, best_of_three, box, predicted, stability, proposed = np.array(rows).T
    return SamMeasures(
        scenes=count,
        objects=len(rows),
        point_iou=float(whole.mean()),
        point_iou_best=float(best_of_three.mean()),
        point_above=(float((whole > 0.75).mean()), float((whole > 0.9).mean())),
        box_iou=float(box.mean()),
        calibration=float(np.abs(predicted - whole).mean()),
        predicted=float(predicted.mean()),
        stability=float(stability.mean()),
        proposals=(float(levels[:, 0].mean()), float(levels[:, 1].mean()), float(levels[:, 2].mean())),
        recall=(float((proposed > 0.75).mean()), float((proposed > 0.9).mean())),
        covered=float(covered.mean()),
    )


def prompt_objects(
    backend: SamBackend, embedding: Embedding, scene: Scene, rng: np.random.Generator
) -> list[tuple[float, float, float, float, float]]:
    """Ask about each object of a scene, once with a random point on it and once with its box.

    Returns:
        For each object: IoU of the point's whole, of the best of its three masks, and of the box's whole; predicted
        IoU and stability of the point's whole.
    """
    points, boxes = [], []
    for item in scene.objects:
        rows, columns = np.nonzero(item.visible)
        chosen = int(rng.random() * len(rows))
        points.append([[columns[chosen], rows[chosen]]])
        boxes.append([columns.min(), rows.min(), columns.max(), rows.max()])
    by_point = backend.decode_prompts(embedding, points=np.array(points, np.float64))
    by_box = backend.decode_prompts(embedding, boxes=np.array(boxes, np.float64))
    found = []
    for number, item in enumerate(scene.objects):
        logits = backend.upsample(embedding, by_point.logits[number])
        masks = (logits > backend.mask_threshold).numpy()
        boxed = (backend.upsample(embedding, by_box.logits[number]) > backend.mask_threshold).numpy()
        real = [iou(mask, item.visible) for mask in masks]
        stable = stability_score(logits, backend.mask_threshold, 1.0)
        predicted = float(by_point.iou[number, WHOLE])
        found.append((real[WHOLE], max(real), iou(boxed[WHOLE], item.visible), predicted, float(stable[WHOLE])))
    return found


def iou(first: Mask, second: Mask) -> float:
    """Intersection over union; 1 for two empty masks."""
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 1.0


def describe(found: SamMeasures) -> str:
    """The measures as text."""
    above, recall, proposals = found.point_above, found.recall, found.proposals
    lines = [
        f"scenes, objects                     {found.scenes}, {found.objects}",
        f"one point: IoU of the whole         {found.point_iou:.3f}"
        f" (above 0.75: {100 * above[0]:.1f} %, above 0.9: {100 * above[1]:.1f} %)",
        f"one point: IoU of the best mask     {found.point_iou_best:.3f}",
        f"box: IoU of the whole               {found.box_iou:.3f}",
        f"predicted IoU, distance from real   {found.predicted:.3f}, {found.calibration:.3f}",
        f"stability score of the wholes       {found.stability:.3f}",
        f"proposals: sub-parts, parts, wholes {proposals[0]:.1f}, {proposals[1]:.1f}, {proposals[2]:.1f} per scene",
        f"objects proposed with IoU > 0.75    {100 * recall[0]:.1f} % (> 0.9: {100 * recall[1]:.1f} %)",
        f"pixels under a proposal             {100 * found.covered:.1f} %",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the measures of the shipped weights, or of a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default=TOY_SAM, type=Path)
    parser.add_argument("--count", type=int, default=HELD_OUT_COUNT)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--json", type=Path, help="also write the measures there")
    chosen = parser.parse_args(arguments)
    found = measure(load_sam(chosen.weights, "cpu"), chosen.count, chosen.seed)
    sys.stdout.write(describe(found) + "\n")
    if chosen.json:
        chosen.json.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
