"""Train the tiny SAM that ships with clipseed: ``python -m clipseed.toy.train_sam --out runs/toy-sam``.

segment_anything's own modules with small sizes, taught on scenes that are drawn as they are needed. A picture's number
fixes the picture and its prompts, so a run that was interrupted goes on where its last checkpoint stands, and no
picture is seen twice. docs/toy.md describes the recipe.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.sam.architecture import SamConfig, build_sam, save_sam
from clipseed.sam.proposals import WHOLE
from clipseed.toy.sam_targets import Prompts, View, boxes, several_points, single_points, view
from clipseed.toy.world import lay_out

FIRST_SEED = 5000
"""Training scenes come from this seed; the scored ones from seed 0, those of the tiny CLIP from 1000 to 1005."""
CONFIG = SamConfig(
    image_size=192,
    patch_size=8,
    embed_dim=128,
    depth=6,
    heads=2,
    mlp_ratio=2.0,
    window_size=8,
    global_attn_indexes=(2, 5),
    out_chans=96,
    decoder_heads=2,
    decoder_mlp_dim=192,
    iou_head_hidden_dim=96,
)
_OUTPUT_WEIGHTS = (1.0, 0.5, 0.5, 1.0)
"""How much each output counts: the single mask, sub-part, part, whole."""


_BORDER = 4.0
"""How much more cells within two of a mask's border count in the cross-entropy: a mask is soon right elsewhere."""
_COLOURS = 48
"""Channels that start as the colours of a patch's 4 x 4 cells."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn.

    Attributes:
        steps: Optimiser steps.
        batch: Pictures per step.
        rate: Learning rate; it rises over ``warm_up`` steps, stays, and falls to 0 over the last 60 % of them.
        points, others: Prompts per picture: single points, and either several points each or boxes.
        kinship, cells: Weight of the kinship loss at the start, from where it falls to 0; cells per picture for it.
        balanced: Steps with balanced cross-entropy alone; over as many again, plain cross-entropy and dice replace it.
    """

    steps: int = 2600
    batch: int = 4
    rate: float = 1e-3
    warm_up: int = 50
    points: int = 6
    others: int = 2
    kinship: float = 1.0
    cells: int = 480
    balanced: int = 300

    def rate_at(self, step: int) -> float:
        """Learning rate of a step."""
        return self.rate * min(1.0, (step + 1) / self.warm_up, (self.steps - step) / (0.6 * self.steps))

    def balance_at(self, step: int) -> float:
        """How far the cross-entropy is balanced at a step; the weight of dice is what is missing to 1."""
        return min(1.0, max(0.0, 2 - step / self.balanced))

    def kinship_at(self, step: int) -> float:
        """Weight of the kinship loss at a step."""
        return self.kinship * (1 - step / self.steps)


def build(config: SamConfig = CONFIG) -> Any:
    """The untrained model, set up so that a short training is enough.

    A SAM from random numbers needs thousands of steps to notice where its prompt is, and as many to draw anything
    finer than patches. Here attention starts as a similarity, both of SAM's position codes start equal, and the colours
    of a patch's 4 x 4 cells have a way from the pixels to the masks.
    """
    torch.manual_seed(0)
    sam = build_sam(config)
    with torch.no_grad():
        _align_attention(sam, config)
        _lead_colours_through(sam, config)
    return sam


def _align_attention(sam: Any, config: SamConfig) -> None:
    """Equal queries and keys; equal position codes; small codes of the kinds of tokens."""
    code = sam.prompt_encoder.get_dense_pe()[0].permute(1, 2, 0)
    free = config.embed_dim - _COLOURS
    repeats = -(-free // code.shape[-1])
    sam.image_encoder.pos_embed[0, :, :, _COLOURS:] = 0.5 * code.repeat(1, 1, repeats)[..., :free]
    for block in sam.image_encoder.blocks:
        weight = block.attn.qkv.weight
        weight[config.embed_dim : 2 * config.embed_dim] = weight[: config.embed_dim]
    tokens = [*sam.prompt_encoder.point_embeddings, sam.prompt_encoder.not_a_point_embed]
    for embedding in (*tokens, sam.mask_decoder.iou_token, sam.mask_decoder.mask_tokens):
        embedding.weight.mul_(0.2)
    decoder = sam.mask_decoder.transformer
    crossing = [decoder.final_attn_token_to_image]
    for layer in decoder.layers:
        crossing += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in crossing:
        torch.nn.init.orthogonal_(attention.q_proj.weight, gain=2.0)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        torch.nn.init.orthogonal_(attention.v_proj.weight)
        attention.out_proj.weight.copy_(attention.v_proj.weight.T)


def _lead_colours_through(sam: Any, config: SamConfig) -> None:
    """Let the first channels be the mean colours of a patch's cells, and the upscaling hand each cell its own."""
    encoder, cell = sam.image_encoder, config.patch_size // 4
    patch = encoder.patch_embed.proj
    patch.weight[:_COLOURS] = 0
    patch.bias[:_COLOURS] = 0
    for row, column, colour in np.ndindex(4, 4, 3):
        rows, columns = slice(cell * row, cell * (row + 1)), slice(cell * column, cell * (column + 1))
        patch.weight[_channel(row, column, colour), colour, rows, columns] = 1 / cell**2
    for block in encoder.blocks:
        block.attn.proj.weight.mul_(0.3)
        block.mlp.lin2.weight.mul_(0.3)
    narrow, spread = encoder.neck[0], encoder.neck[2]
    narrow.weight[:_COLOURS] = 0
    narrow.weight[range(_COLOURS), range(_COLOURS)] = 1
    spread.weight.mul_(0.1)
    spread.weight[range(config.out_chans), range(config.out_chans), 1, 1] += 1
    first, second = sam.mask_decoder.output_upscaling[0], sam.mask_decoder.output_upscaling[3]
    signs = ((0, 1.0), (12, -1.0)) if first.weight.shape[1] >= 24 else ((0, 1.0),)
    first.weight.mul_(0.5)
    second.weight.mul_(0.5)
    for row, column, colour in np.ndindex(4, 4, 3):
        middle = _channel(row % 2, column % 2, colour, 2)
        for offset, sign in signs:  # both signs, since the activation between them cuts one off
            first.weight[_channel(row, column, colour), middle + offset, row // 2, column // 2] += sign
    for row, column, colour in np.ndindex(2, 2, 3):
        for offset, sign in signs:
            second.weight[_channel(row, column, colour, 2) + offset, colour, row, column] += sign
            if second.weight.shape[1] > 5:
                second.weight[_channel(row, column, colour, 2) + offset, colour + 3, row, column] -= sign


def _channel(row: int, column: int, colour: int, width: int = 4) -> int:
    return (row * width + column) * 3 + colour


@dataclass(frozen=True)
class Lesson:
    """A training picture, prompts about it, and ``(C, 2)`` rows and columns of cells whose kinship is asked for."""

    view: View
    prompts: tuple[Prompts, ...]
    cells: npt.NDArray[np.intp]


def lesson(number: int, config: SamConfig, plan: Plan) -> Lesson:
    """Training picture ``number`` and what is asked about it."""
    rng = np.random.default_rng([FIRST_SEED, number, 3])
    shown = view(lay_out(FIRST_SEED, number), config.image_size, rng)
    other = several_points if rng.random() < 0.5 else boxes
    prompts = (single_points(shown, rng, plan.points), other(shown, rng, plan.others))
    return Lesson(shown, prompts, some_cells(shown, rng, plan.cells, config.patch_size))


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
    """The objective for the prompts of one picture.

    Args:
        logits: ``(P, 4, H', W')``, low resolution: single mask, sub-part, part, whole.
        iou: ``(P, 4)`` predicted.
        targets: ``(P, 3, h, w)`` in {0, 1} at the encoder's scale: sub-part, part, whole. The single mask has to be
            the whole.
        side: The encoder's picture side in pixels; what lies beyond the view is padding and costs nothing.
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


class CellHead(torch.nn.Linear):
    """Reads features of the 4 x 4 cells of a patch off its embedding. Only training has it."""

    def __init__(self, embedding: int, features: int = 16) -> None:
        super().__init__(embedding, 16 * features)
        with torch.no_grad():
            self.weight.mul_(0.3)
            for row, column, colour in np.ndindex(4, 4, 3):
                cell = (row * 4 + column) * features
                self.weight[cell + colour, _channel(row, column, colour)] += 1

    def forward(self, embedding: Tensor) -> Tensor:
        """``(E, g, g)`` to ``(4 g, 4 g, features)``."""
        grid = embedding.shape[-1]
        tiles = super().forward(embedding.permute(1, 2, 0)).view(grid, grid, 4, 4, -1)
        return tiles.permute(0, 2, 1, 3, 4).reshape(4 * grid, 4 * grid, -1)


def kinship_loss(head: CellHead, embeddings: Tensor, lessons: Sequence[Lesson], patch: int) -> Tensor:
    """Cells of one thing should have like features, those of different things unlike ones.

    Binary cross-entropy of 10 cos - 5 over all pairs of a picture's chosen cells, like and unlike pairs counting the
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


def mask_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of masks ``(..., h, w)``; 1 where both are empty."""
    union = (first | second).sum(dim=(-2, -1))
    return torch.where(union > 0, (first & second).sum(dim=(-2, -1)) / union.clamp_min(1), 1.0)


def step_losses(sam: Any, head: CellHead, lessons: Sequence[Lesson], balance: float) -> dict[str, Tensor]:
    """Mean losses of several pictures, with ``kinship``; the networks run in bfloat16 where that is faster."""
    sums: dict[str, Tensor] = {}
    encoder = sam.image_encoder
    with torch.autocast("cpu", torch.bfloat16):
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


def train(folder: Path, plan: Plan, config: SamConfig = CONFIG, keep_every: int = 100) -> Any:
    """Train, or go on with the checkpoint in ``folder``; progress goes to stderr and ``curve.jsonl``."""
    sam = build(config)
    head = CellHead(config.out_chans)
    learned = [*sam.parameters(), *head.parameters()]
    decayed = [value for value in learned if value.ndim >= 2]
    others = [value for value in learned if value.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.98))
    kept = folder / "checkpoint.pt"
    first = 0
    if kept.exists():
        saved = torch.load(kept, weights_only=True)
        sam.load_state_dict(saved["state"])
        head.load_state_dict(saved["head"])
        optimiser.load_state_dict(saved["optimiser"])
        first = saved["step"]
    recent: list[dict[str, float]] = []
    began = time.perf_counter()
    for step in range(first, plan.steps):
        for group in optimiser.param_groups:
            group["lr"] = plan.rate_at(step)
        numbers = range(step * plan.batch, (step + 1) * plan.batch)
        balance = plan.balance_at(step)
        found = step_losses(sam, head, [lesson(number, config, plan) for number in numbers], balance)
        optimiser.zero_grad(set_to_none=True)
        total = found["cross"] + (1 - balance) * found["dice"] + found["iou"] + plan.kinship_at(step) * found["kinship"]
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        recent.append({name: value.item() for name, value in found.items()})
        done = step + 1
        if done % keep_every == 0 or done == plan.steps:
            row: dict[str, Any] = {"step": done, "of": plan.steps}
            row["images_per_second"] = round(plan.batch * (done - first) / (time.perf_counter() - began), 2)
            row |= {name: round(float(np.mean([one[name] for one in recent])), 4) for name in recent[0]}
            _record(folder, row)
            recent = []
            states = {"state": sam.state_dict(), "head": head.state_dict(), "optimiser": optimiser.state_dict()}
            _keep(kept, {**states, "step": done})
    return sam


def _record(folder: Path, row: dict[str, Any]) -> None:
    with (folder / "curve.jsonl").open("a") as curve:
        curve.write(json.dumps(row) + "\n")
    sys.stderr.write(" ".join(f"{key}={value}" for key, value in row.items()) + "\n")


def _keep(path: Path, saved: dict[str, Any]) -> None:
    """Write a checkpoint so that an interruption leaves the old one or the new one."""
    fresh = path.with_suffix(".new")
    torch.save(saved, fresh)
    fresh.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and write ``sam.npz``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Plan.steps, help="optimiser steps, to try it out")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    save_sam(chosen.out / "sam.npz", train(chosen.out, Plan(steps=chosen.steps)), CONFIG)


if __name__ == "__main__":
    main()
