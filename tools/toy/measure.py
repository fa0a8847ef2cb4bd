"""Does the tiny CLIP behave like a CLIP? The claims of docs/toy.md, measured on the held-out scenes.

Run ``python -m tools.toy.measure`` (or ``make toy-report``). Masks are used here, to score; training never sees one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.cam.gradcam import run_last_block
from clipseed.cam.methods import compute_cams
from clipseed.clip.model import TOY_WEIGHTS, FrozenClip
from clipseed.clip.text import TextBank
from clipseed.data.images import patch_grid, resize_to_grid, to_rgb
from clipseed.data.toy.dataset import HELD_OUT_COUNT, HELD_OUT_SEED
from clipseed.data.toy.shapes import CLASS_NAMES
from clipseed.data.toy.world import Scene, WorldOptions, lay_out
from clipseed.data.vocabulary import load_vocabulary
from clipseed.evaluate.confusion import score
from clipseed.evaluate.sweep import ThresholdSweep
from clipseed.store.cam_records import Cam

CAA_BLOCKS = 8
"""Blocks from the end whose attention CAA averages."""


@dataclass(frozen=True)
class ToyMeasures:
    """What a toy CLIP can do.

    Attributes:
        top1: Zero-shot accuracy of the class token on single-object scenes.
        top1_patch_mean: The same with the mean patch feature that CLIP-ES scores.
        peak_on_object: Share of (scene, present class) whose map peaks on an object of the class.
        miou: Mean IoU of softmax-GradCAM at its best threshold, background included.
        class_iou, class_peaks: The same per class.
        empty_maps: Maps that are zero everywhere, per class.
        contrast: Mean of the map on the class's objects minus elsewhere, per class; negative is inverted.
        attention_within, attention_across: Attention between different patches of one object, and between patches of
            two objects, per block, relative to uniform attention.
    """

    scenes: int
    top1: float
    top1_patch_mean: float
    peak_on_object: float
    miou: float
    threshold: float
    class_iou: dict[str, float]
    class_peaks: dict[str, float]
    empty_maps: dict[str, int]
    contrast: dict[str, float]
    attention_within: list[float]
    attention_across: list[float]


def measure(clip: FrozenClip, count: int = HELD_OUT_COUNT, seed: int = HELD_OUT_SEED) -> ToyMeasures:
    """Measure a toy CLIP on scenes of the scored world, and as many single-object scenes."""
    text = clip.encode_text(load_vocabulary("toy"))
    classes = len(CLASS_NAMES)
    sweep = ThresholdSweep(classes + 1)
    peaks: list[list[bool]] = [[] for _ in range(classes)]
    contrast: list[list[float]] = [[] for _ in range(classes)]
    empty = [0] * classes
    attention = _AttentionTally(len(clip.tower.blocks))
    for index in range(count):
        scene = lay_out(seed, index)
        pixels, grid = _pixels(clip, scene)
        maps = compute_cams(clip, text, [pixels], [scene.labels], grid).maps[0]
        found = Cam(str(index), np.array(scene.labels, np.int32), maps.numpy(), scene.size)
        truth = scene.mask()
        sweep.update(found, truth)
        for label, heat in zip(scene.labels, found.upsampled(), strict=True):
            inside = truth == label + 1
            empty[label] += int(heat.max() <= 0)
            peaks[label].append(bool(heat.max() > 0 and inside.flat[int(heat.argmax())]))
            contrast[label].append(float(heat[inside].mean() - heat[~inside].mean()))
        attention.add(clip, pixels, grid, scene)
    matrices = sweep.matrices()
    means = [score(matrix).miou for matrix in matrices]
    best = int(np.argmax(means))
    single = _zero_shot(clip, text, count, seed)
    within, across = attention.densities()
    named = dict(zip(CLASS_NAMES, range(classes), strict=True))
    iou = score(matrices[best]).class_iou
    return ToyMeasures(
        scenes=count,
        top1=single[0],
        top1_patch_mean=single[1],
        peak_on_object=float(np.mean([hit for row in peaks for hit in row])),
        miou=means[best],
        threshold=sweep.settings[best],
        class_iou={"background": float(iou[0]), **{name: float(iou[k + 1]) for name, k in named.items()}},
        class_peaks={name: float(np.mean(peaks[k])) for name, k in named.items()},
        empty_maps={name: empty[k] for name, k in named.items()},
        contrast={name: float(np.mean(contrast[k])) for name, k in named.items()},
        attention_within=within,
        attention_across=across,
    )


def _pixels(clip: FrozenClip, scene: Scene) -> tuple[Tensor, tuple[int, int]]:
    from PIL import Image

    image = to_rgb(Image.fromarray(scene.image()))
    grid = patch_grid(image.height, image.width, clip.tower.patch)
    array = resize_to_grid(image, grid, clip.tower.patch)
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None], grid


def _zero_shot(clip: FrozenClip, text: TextBank, count: int, seed: int) -> tuple[float, float]:
    """Top-1 accuracy of the class token and of the patch mean on scenes with one object."""
    options = WorldOptions(max_objects=1)
    right = np.zeros(2)
    with torch.inference_mode():
        for index in range(count):
            scene = lay_out(seed, index, options)
            pixels, _ = _pixels(clip, scene)
            token = clip.encode_image(pixels)
            mean = run_last_block(clip.tower, clip.dense(pixels).tokens).feature
            for position, feature in enumerate((token, mean)):
                best = int((F.normalize(feature.float(), dim=-1) @ text.classes.T).argmax())
                right[position] += best == scene.labels[0]
    return float(right[0] / count), float(right[1] / count)


class _AttentionTally:
    """Sums attention between patches of one object and of two, block by block."""

    def __init__(self, blocks: int) -> None:
        self._sums = np.zeros((blocks, 2))
        self._pairs = np.zeros(2)

    def add(self, clip: FrozenClip, pixels: Tensor, grid: tuple[int, int], scene: Scene) -> None:
        owner = patch_owners(scene, grid)
        on_object = owner >= 0
        both = on_object[:, None] & on_object[None, :]
        same = (owner[:, None] == owner[None, :]) & both & ~np.eye(len(owner), dtype=bool)
        other = (owner[:, None] != owner[None, :]) & both
        if not other.any():
            return
        self._pairs += same.sum(), other.sum()
        with torch.inference_mode():
            for block in range(len(self._sums)):
                if block < len(self._sums) - 1:
                    found = clip.dense(pixels, (block,)).attention
                    assert found is not None
                else:
                    found = run_last_block(clip.tower, clip.dense(pixels).tokens).mean_attention()
                density = found[0].numpy() * len(owner)
                self._sums[block] += density[same].sum(), density[other].sum()

    def densities(self) -> tuple[list[float], list[float]]:
        """Mean attention within and across objects per block, relative to uniform."""
        mean = self._sums / np.maximum(self._pairs, 1)
        return mean[:, 0].tolist(), mean[:, 1].tolist()


def patch_owners(scene: Scene, grid: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Index of the object under each patch's centre ``(h * w,)``, -1 for the background."""
    owner: npt.NDArray[np.int64] = np.full(scene.size, -1, np.int64)
    for number, item in enumerate(scene.objects):
        owner[item.visible] = number
    rows = ((np.arange(grid[0]) + 0.5) * scene.size[0] / grid[0]).astype(int)
    columns = ((np.arange(grid[1]) + 0.5) * scene.size[1] / grid[1]).astype(int)
    sampled: npt.NDArray[np.int64] = owner[rows][:, columns]
    return sampled.ravel()


def describe(found: ToyMeasures) -> str:
    """The measures as text."""
    lines = [
        f"scenes                          {found.scenes}",
        f"zero-shot top-1 (class token)   {100 * found.top1:.1f} %",
        f"zero-shot top-1 (patch mean)    {100 * found.top1_patch_mean:.1f} %",
        f"CAM peak on the object          {100 * found.peak_on_object:.1f} %",
        f"softmax-GradCAM mIoU            {100 * found.miou:.1f} (threshold {found.threshold:g})",
        "",
        "class         IoU  peak  empty  contrast",
    ]
    for name in CLASS_NAMES:
        lines.append(
            f"{name:<10} {100 * found.class_iou[name]:6.1f} {100 * found.class_peaks[name]:5.0f} "
            f"{found.empty_maps[name]:6d} {found.contrast[name]:9.2f}"
        )
    lines += ["", "block  attention within  across one object (1 = uniform)"]
    for block, pair in enumerate(zip(found.attention_within, found.attention_across, strict=True)):
        lines.append(f"{block:5d} {pair[0]:17.2f} {pair[1]:7.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the measures of the shipped weights, or of a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default=TOY_WEIGHTS)
    parser.add_argument("--count", type=int, default=HELD_OUT_COUNT)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--json", type=Path, help="also write the measures there")
    chosen = parser.parse_args(arguments)
    found = measure(FrozenClip.load(weights=chosen.weights, device="cpu"), chosen.count, chosen.seed)
    sys.stdout.write(describe(found) + "\n")
    if chosen.json:
        chosen.json.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
