"""Train the tiny CLIP that ships with clipseed: ``python -m tools.toy.train_clip --out runs/toy-clip``.

It sees pictures, captions and labels, never masks. What makes a toy behave like a CLIP is described, with curves and
times, in docs/toy.md: a curriculum from wholly patterned single objects to the scored world, both the class token and
the patch mean aligned with text, and attention that starts, and stays, a similarity (keys equal queries).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.toy.world import WorldOptions, lay_out
from tools.toy.captions import Captioner, Description, concept_targets
from tools.toy.objective import attention_loss, look, losses

FIRST_SEED = 1000
"""Training scenes come from this seed and above; the scored ones from seed 0."""
SIDE = 176
CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIDE, "layers": 8, "width": 192, "patch_size": 16, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3},
    "quick_gelu": True,
}
_CONTEXT = 40
"""Tokens of text that are computed; no caption is longer, and the causal mask makes the padding irrelevant."""


@dataclass(frozen=True)
class Stage:
    """A leg of the curriculum: which scenes, how many, how often, the peak learning rate, and weights of losses."""

    name: str
    options: WorldOptions
    pictures: int
    epochs: float
    rate: float
    value: float = 0.0
    attention: float = 0.0


STAGES: tuple[Stage, ...] = (
    Stage("patterned", WorldOptions(part_scale=6, max_objects=1, size=(SIDE, SIDE)), 12_000, 3, 1e-3),
    Stage("half", WorldOptions(part_scale=2.5, max_objects=2, size=(SIDE, SIDE)), 24_000, 2, 8e-4),
    Stage("part", WorldOptions(max_objects=3, size=(SIDE, SIDE)), 30_000, 3, 8e-4),
    Stage("world", WorldOptions(size=(SIDE, SIDE)), 24_000, 2, 5e-4, value=0.5),
    Stage("attention", WorldOptions(size=(SIDE, SIDE)), 24_000, 2, 5e-4, value=0.5, attention=0.5),
    Stage("settle", WorldOptions(size=(SIDE, SIDE)), 24_000, 1, 3e-4, value=0.5, attention=0.5),
)


def build() -> Any:
    """The untrained model, with attention that starts as a similarity between tokens."""
    from open_clip.model import CLIP

    torch.manual_seed(0)
    model: Any = CLIP(**CONFIG)
    for transformer in (model.visual.transformer, model.transformer):
        width, depth = transformer.width, len(transformer.resblocks)
        for block in transformer.resblocks:
            torch.nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            torch.nn.init.normal_(block.attn.out_proj.weight, std=(2 * depth * width) ** -0.5)
            torch.nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            torch.nn.init.normal_(block.mlp.c_proj.weight, std=(2 * depth * width) ** -0.5)
    with torch.no_grad():
        for block in model.visual.transformer.resblocks:
            width = block.attn.embed_dim
            block.attn.in_proj_weight[width : 2 * width] = block.attn.in_proj_weight[:width]
        model.visual.ln_pre.weight.fill_(0.3)
        model.visual.positional_embedding.normal_(std=0.02)
        model.token_embedding.weight.normal_(std=0.02)
        model.positional_embedding.normal_(std=0.01)
        model.logit_scale.fill_(math.log(20))
    return model


def _draw(options: WorldOptions, seed: int, index: int) -> tuple[npt.NDArray[np.uint8], Description]:
    scene = lay_out(seed, index, options)
    return scene.image(), Description.of(scene)


def draw_pool(stage: Stage, seed: int, folder: Path) -> tuple[npt.NDArray[np.uint8], list[Description]]:
    """Pictures of a stage, drawn once into a file, and what is known of them."""
    path = folder / f"pool-{stage.name}.npy"
    assert stage.options.size is not None
    pool = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(stage.pictures, *stage.options.size, 3))
    known = []
    with ProcessPoolExecutor() as workers:
        drawn = workers.map(partial(_draw, stage.options, seed), range(stage.pictures), chunksize=64)
        for index, (image, description) in enumerate(drawn):
            pool[index] = image
            known.append(description)
    return pool, known


class Reader:
    """Tokenises with CLIP's own tokenizer and runs the text tower on the tokens that matter."""

    def __init__(self, model: Any) -> None:
        from open_clip import SimpleTokenizer

        self._model, self._tokenizer = model, SimpleTokenizer(context_length=77)
        self._seen: dict[str, tuple[int, ...]] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Unit text features ``(T, E)``."""
        tokens = torch.tensor([self._tokens(text) for text in texts])
        model = self._model
        x = model.token_embedding(tokens) + model.positional_embedding[:_CONTEXT]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:_CONTEXT, :_CONTEXT]))
        x = x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ model.text_projection
        return F.normalize(x.float(), dim=-1)

    def _tokens(self, text: str) -> tuple[int, ...]:
        # Tuples, not tensors: thousands of small tensors between the large ones would fragment the heap.
        if text not in self._seen:
            found = self._tokenizer([text])[0]
            assert int(found.argmax()) < _CONTEXT, text
            self._seen[text] = tuple(found[:_CONTEXT].tolist())
        return self._seen[text]

    @property
    def used(self) -> list[int]:
        """Token ids that occurred in training."""
        return sorted({token for tokens in self._seen.values() for token in tokens})


def _tie(model: Any) -> None:
    """Give queries and keys the same gradient, so that they stay equal and attention stays a similarity."""
    for block in model.visual.transformer.resblocks:
        for gradient in (block.attn.in_proj_weight.grad, block.attn.in_proj_bias.grad):
            width = len(gradient) // 3
            gradient[: 2 * width] = ((gradient[:width] + gradient[width : 2 * width]) / 2).repeat(
                2, *[1] * (gradient.ndim - 1)
            )


def train_stage(model: Any, reader: Reader, stage: Stage, seed: int, folder: Path, batch: int = 64) -> None:
    """Run one leg; progress goes to stderr and ``curve.jsonl``."""
    rng = np.random.default_rng([seed, 7])
    pool, known = draw_pool(stage, seed, folder)
    captioner = Captioner(rng)
    steps = int(stage.epochs * len(known)) // batch
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim >= 2 and "embedding" not in n)]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1) * 255
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1) * 255
    order = np.zeros(0, np.int64)
    sums: dict[str, float] = {}
    began = time.perf_counter()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = stage.rate * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        if len(order) < batch:
            order = rng.permutation(len(known))
        chosen, order = np.sort(order[:batch]), order[batch:]
        pixels = torch.from_numpy(pool[chosen]).permute(0, 3, 1, 2)
        mirrored = torch.from_numpy(rng.random(batch) < 0.5).view(-1, 1, 1, 1)
        pixels = torch.where(mirrored, pixels.flip(3), pixels).float()
        colours = F.avg_pool2d(pixels / 255, 16)
        scenes = [known[k] for k in chosen]
        with torch.autocast("cpu", torch.bfloat16):
            tokens, values, attention = look(model, (pixels - mean) / std)
            texts = reader([captioner.caption(scene) for scene in scenes] + captioner.prompts())
        targets = torch.from_numpy(concept_targets(scenes))
        found = losses(model, tokens[:, 1:].float(), values.float(), tokens[:, 0].float(), texts, targets)
        found["attention"] = attention_loss(attention, colours)
        weights = {"patch": 0.5, "value": stage.value, "attention": stage.attention}
        optimiser.zero_grad(set_to_none=True)
        total = torch.stack([weights.get(name, 1.0) * value for name, value in found.items() if weights.get(name, 1.0)])
        total.sum().backward()  # type: ignore[no-untyped-call]
        _tie(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value.item() / 100
        if (step + 1) % 100 == 0:
            rate = batch * (step + 1) / (time.perf_counter() - began)
            row = {"stage": stage.name, "step": step + 1, "of": steps, "images_per_second": round(rate, 1)}
            row |= {name: round(value, 4) for name, value in sums.items()}
            with (folder / "curve.jsonl").open("a") as curve:
                curve.write(json.dumps(row) + "\n")
            sys.stderr.write(" ".join(f"{key}={value}" for key, value in row.items()) + "\n")
            sums = {}


def export(model: Any, used_tokens: Sequence[int], path: Path) -> None:
    """Write the weights as OpenAI would: linear weights in half precision, the rest in single.

    Embeddings of tokens that training never saw are zero: an unknown word says nothing, and zeros compress well.
    """
    from open_clip.model import convert_weights_to_lp

    convert_weights_to_lp(model, torch.float16)
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    embedding = np.zeros_like(state["token_embedding.weight"])
    embedding[list(used_tokens)] = state["token_embedding.weight"][list(used_tokens)]
    np.savez_compressed(path, **{**state, "token_embedding.weight": embedding})


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all stages and write ``clip.npz``; each stage's end is kept, and a restarted run goes on behind it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of each stage's pictures, to try it out")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    model = build()
    reader = Reader(model)
    used: set[int] = set()
    for number, stage in enumerate(STAGES):
        kept = chosen.out / f"after-{stage.name}.pt"
        if kept.exists():
            saved = torch.load(kept, weights_only=True)
            model.load_state_dict(saved["state"])
            used |= set(saved["used"])
            continue
        pictures = max(64, int(stage.pictures * chosen.scale))
        stage = replace(stage, pictures=pictures)
        train_stage(model, reader, stage, FIRST_SEED + number, chosen.out)
        used |= set(reader.used)
        torch.save({"state": model.state_dict(), "used": sorted(used)}, kept)
        (chosen.out / f"pool-{stage.name}.npy").unlink()
    export(model, sorted(used), chosen.out / "clip.npz")


if __name__ == "__main__":
    main()
