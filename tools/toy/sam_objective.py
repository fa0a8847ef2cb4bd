"""What the tiny SAM is trained for: masks and their IoU, and embeddings that say which cell is part of what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.device import cpu_multiplies_bf16
from clipseed.segments import WHOLE
from tools.toy.sam_start import CellHead
from tools.toy.sam_targets import Prompts, View

_OUTPUT_WEIGHTS = (1.0, 0.5, 0.5, 1.0)
"""How much each output counts: the single mask, sub-part, part, whole."""


_BORDER = 4.0
"""How much more cells within two of a mask's border count in the cross-entropy: a mask is soon right elsewhere."""


@dataclass(frozen=True)
class Lesson:
    """A training image, prompts about it, and ``(C, 2)`` rows and columns of cells whose kinship is asked for."""

    view: View
    prompts: tuple[Prompts, ...]
    cells: npt.NDArray[np.intp]


def encode(sam: Any, views: Sequence[View]) -> Tensor:
    """Image embeddings ``(B, E, g, g)`` of views."""
    pixels = [torch.from_numpy(shown.pixels).permute(2, 0, 1).float() for shown in views]
    embeddings: Tensor = sam.image_encoder(torch.stack([sam.preprocess(image) for image in pixels]))
    return embeddings


def decode(sam: Any, embedding: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Low-resolution logits ``(P, 4, H', W')`` and predicted IoUs ``(P, 4)``: the single mask, then the levels."""
    points = None if prompts.boxes is not None else (torch.from_numpy(prompts.points), torch.from_numpy(prompts.marks))
    corners = None if prompts.boxes is None else torch.from_numpy(prompts.boxes)
    sparse, dense = sam.prompt_encoder(points=points, boxes=corners, masks=None)
    logits, iou = sam.mask_decoder.predict_masks(
        image_embeddings=embedding[None],
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
    )
    return logits.float(), iou.float()


def losses(logits: Tensor, iou: Tensor, targets: Tensor, side: int, balance: float) -> dict[str, Tensor]:
    """The objective for the prompts of one image.

    Args:
        logits: ``(P, 4, H', W')``, low resolution: single mask, sub-part, part, whole.
        iou: ``(P, 4)`` predicted.
        targets: ``(P, 3, h, w)`` in {0, 1} at the encoder's scale: sub-part, part, whole. The single mask has to be
            the whole.
        side: The encoder's image side in pixels; what lies beyond the view is padding and costs nothing.
        balance: 1 if the pixels inside and outside of a mask shall count the same in all, 0 if each pixel shall.

    Returns:
        ``cross`` (binary cross-entropy, near borders more than elsewhere) and ``dice`` of the masks against the share
        of each cell that the target covers, and ``iou``: the squared error of the predicted IoU against that of the
        mask thresholded at 0. Each is a mean over prompts, weighted by output.
    """
    cell = side // logits.shape[-1]
    height, width = (-(-length // cell) for length in targets.shape[-2:])
    padded = F.pad(targets, (0, width * cell - targets.shape[-1], 0, height * cell - targets.shape[-2]))
    shares = F.avg_pool2d(padded, cell)
    wanted = torch.cat([shares[:, 2:], shares], dim=1)
    logits = logits[..., :height, :width]
    weights = torch.tensor(_OUTPUT_WEIGHTS)
    weights = weights / weights.sum()
    with torch.no_grad():
        share = wanted.mean(dim=(2, 3), keepdim=True).clamp(1e-3, 1 - 1e-3)
        pixel = balance * (wanted / share + (1 - wanted) / (1 - share)) / 2 + 1 - balance
        border = F.max_pool2d(wanted, 5, 1, 2) + F.max_pool2d(-wanted, 5, 1, 2) > 0
        pixel = pixel * (1 + _BORDER * border)
    cross = (F.binary_cross_entropy_with_logits(logits, wanted, reduction="none") * pixel).mean(dim=(2, 3))
    chance = logits.sigmoid()
    dice = 1 - (2 * (chance * wanted).sum(dim=(2, 3)) + 1) / (chance.sum(dim=(2, 3)) + wanted.sum(dim=(2, 3)) + 1)
    real = mask_iou(logits > 0, wanted > 0.5)
    found = {"cross": cross, "dice": dice, "iou": (iou - real).square()}
    return {name: (value * weights).sum(dim=1).mean() for name, value in found.items()}


def mask_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of masks ``(..., h, w)``; 1 where both are empty."""
    union = (first | second).sum(dim=(-2, -1))
    return torch.where(union > 0, (first & second).sum(dim=(-2, -1)) / union.clamp_min(1), 1.0)


def kinship_loss(head: CellHead, embeddings: Tensor, lessons: Sequence[Lesson], patch: int) -> Tensor:
    """Cells of one thing should have like features, those of different things unlike ones.

    Binary cross-entropy of 10 cos - 5 over all pairs of an image's chosen cells, like and unlike pairs counting the
    same. The decoder compares embeddings with that under the prompt; before they say which cell is part of what, it
    learns nothing, or masks made of whole patches.
    """
    total = torch.zeros(())
    for embedding, taught in zip(embeddings, lessons, strict=True):
        rows, columns = taught.cells.T
        things = torch.from_numpy(cell_things(taught.view, patch)[rows, columns].astype(np.int64))
        feature = F.normalize(head(embedding)[rows, columns].float(), dim=-1)
        same = (things[:, None] == things[None, :]).float()
        cost = F.binary_cross_entropy_with_logits(10 * feature @ feature.T - 5, same, reduction="none")
        unlike = 1 - same
        total = total + (cost * same).sum() / same.sum() / 2 + (cost * unlike).sum() / unlike.sum().clamp_min(1) / 2
    return total / len(lessons)


def some_cells(shown: View, rng: np.random.Generator, count: int, patch: int) -> npt.NDArray[np.intp]:
    """Rows and columns of cells, a quarter of a patch a side: half anywhere, half in patches that a border crosses."""
    things = cell_things(shown, patch)
    height, width = (length // 4 * 4 for length in things.shape)
    tiles = things[:height, :width].reshape(height // 4, 4, width // 4, 4)
    crossed = tiles.min(axis=(1, 3)) != tiles.max(axis=(1, 3))
    near = np.flatnonzero(
        np.pad(crossed.repeat(4, 0).repeat(4, 1), ((0, things.shape[0] - height), (0, things.shape[1] - width)))
    )
    chosen = (rng.random(count) * things.size).astype(np.intp)
    if len(near):
        chosen[: count // 2] = near[(rng.random(count // 2) * len(near)).astype(int)]
    return np.stack(np.divmod(chosen, things.shape[1]), axis=1)


def cell_things(shown: View, patch: int) -> npt.NDArray[np.uint8]:
    """The thing at the middle of each cell, the pixels of the decoder's low-resolution masks."""
    cell = patch // 4
    things: npt.NDArray[np.uint8] = shown.labels[WHOLE][cell // 2 :: cell, cell // 2 :: cell]
    return things


def step_losses(sam: Any, head: CellHead, lessons: Sequence[Lesson], balance: float) -> dict[str, Tensor]:
    """Mean losses of several images, with ``kinship``; the networks run in bfloat16 where that is faster."""
    sums: dict[str, Tensor] = {}
    encoder = sam.image_encoder
    with torch.autocast("cpu", torch.bfloat16, enabled=cpu_multiplies_bf16()):
        embeddings = encode(sam, [taught.view for taught in lessons])
        kinship = kinship_loss(head, embeddings, lessons, encoder.patch_embed.proj.kernel_size[0])
        answers = [
            (*decode(sam, embedding, prompts), prompts.targets)
            for embedding, taught in zip(embeddings, lessons, strict=True)
            for prompts in taught.prompts
        ]
    total = sum(len(targets) for *_, targets in answers)
    for logits, iou, targets in answers:
        for name, value in losses(logits, iou, torch.from_numpy(targets).float(), encoder.img_size, balance).items():
            sums[name] = sums.get(name, torch.zeros(())) + value * len(targets) / total
    return sums | {"kinship": kinship}
