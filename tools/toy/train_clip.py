"""Train the tiny CLIP that ships with clipseed: ``python -m tools.toy.train_clip --out runs/toy-clip``.

It sees images, captions and labels, never masks. What makes a toy behave like a CLIP is described, with curves and
times, in docs/toy.md: a curriculum from wholly patterned single objects to the scored world, both the class token and
the patch mean aligned with text, and attention that starts, and stays, a similarity (keys equal queries).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.data.toy.world import WorldOptions, lay_out
from clipseed.device import cpu_multiplies_bf16
from clipseed.store.files import replacing
from clipseed.train.loop import LoopOptions, say, train
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
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1) * 255
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1) * 255


@dataclass(frozen=True)
class Stage:
    """A leg of the curriculum: which scenes, how many, how often, the peak learning rate, and weights of losses."""

    name: str
    options: WorldOptions
    images: int
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


class Pool:
    """Images of a stage and what is known of them, drawn into a file when the first one is asked for."""

    def __init__(self, stage: Stage, seed: int, path: Path) -> None:
        self._stage, self._seed, self.path = stage, seed, path
        self._pixels: npt.NDArray[np.uint8] | None = None
        self._known: list[Description] = []

    def __len__(self) -> int:
        return self._stage.images

    def sample(self, index: int, seed: int) -> tuple[Tensor, Description]:
        """An image ``(3, H, W)``, mirrored or not, and its description."""
        if self._pixels is None:
            self._pixels, self._known = self._drawn()
        pixels = torch.from_numpy(self._pixels[index]).permute(2, 0, 1)
        return (pixels.flip(2) if np.random.default_rng(seed).random() < 0.5 else pixels), self._known[index]

    def collate(self, samples: Sequence[tuple[Tensor, Description]]) -> tuple[Tensor, list[Description]]:
        """Images ``(B, 3, H, W)`` and descriptions."""
        return torch.stack([pixels for pixels, _ in samples]), [description for _, description in samples]

    def _drawn(self) -> tuple[npt.NDArray[np.uint8], list[Description]]:
        numbers, options = range(len(self)), self._stage.options
        with ProcessPoolExecutor() as workers:
            known = list(workers.map(partial(_describe, options, self._seed), numbers, chunksize=64))
            if not self.path.exists():
                assert options.size is not None
                shape = (len(self), *options.size, 3)
                with replacing(self.path) as temporary:
                    pool = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
                    for index, image in enumerate(
                        workers.map(partial(_draw, options, self._seed), numbers, chunksize=64)
                    ):
                        pool[index] = image
                    pool.flush()
        return np.load(self.path, mmap_mode="c"), known


def _draw(options: WorldOptions, seed: int, index: int) -> npt.NDArray[np.uint8]:
    return lay_out(seed, index, options).image()


def _describe(options: WorldOptions, seed: int, index: int) -> Description:
    return Description.of(lay_out(seed, index, options))


class Learner(torch.nn.Module):
    """The model, and which tokens it has read so far."""

    used: Tensor

    def __init__(self, model: Any) -> None:
        from open_clip import SimpleTokenizer

        super().__init__()
        self.model, self._tokenizer = model, SimpleTokenizer(context_length=77)
        self.register_buffer("used", torch.zeros(len(model.token_embedding.weight), dtype=torch.bool))
        self._seen: dict[str, tuple[int, ...]] = {}
        for block in model.visual.transformer.resblocks:
            block.attn.in_proj_weight.register_hook(_tied)
            block.attn.in_proj_bias.register_hook(_tied)

    def read(self, texts: Sequence[str]) -> Tensor:
        """Unit text features ``(T, E)``, with CLIP's own tokenizer, computed on the tokens that matter."""
        tokens = torch.tensor([self._tokens(text) for text in texts])
        self.used[tokens] = True
        model = self.model
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


def _tied(gradient: Tensor) -> Tensor:
    """Give queries and keys the same gradient, so that they stay equal and attention stays a similarity."""
    query, key, value = gradient.chunk(3)
    return torch.cat([(query + key) / 2, (query + key) / 2, value])


class ClipTrainer:
    """One leg of the curriculum."""

    def __init__(self, learner: Learner, stage: Stage, seed: int, steps: int) -> None:
        self.module, self._stage, self._seed, self._steps = learner, stage, seed, steps

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW; matrices decay, embeddings do not."""
        named = list(self.module.named_parameters())
        decayed = [value for name, value in named if value.ndim >= 2 and "embedding" not in name]
        others = [value for name, value in named if not (value.ndim >= 2 and "embedding" not in name)]
        groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self._stage.rate, betas=(0.9, 0.98))

    def schedule(self, step: int) -> float:
        """200 steps of warm-up under half a cosine."""
        return min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / self._steps))

    def losses(self, batch: tuple[Tensor, list[Description]], step: int) -> dict[str, Tensor]:
        """Of :mod:`tools.toy.objective`; the networks run in bfloat16 where the CPU multiplies it."""
        pixels, scenes = batch
        pixels = pixels.float()
        captioner = Captioner(np.random.default_rng([self._seed, 7, step]))
        model = self.module.model
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_multiplies_bf16()):
            tokens, values, attention = look(model, (pixels - _MEAN) / _STD)
            texts = self.module.read([captioner.caption(scene) for scene in scenes] + captioner.prompts())
        targets = torch.from_numpy(concept_targets(scenes))
        found = losses(model, tokens[:, 1:].float(), values.float(), tokens[:, 0].float(), texts, targets)
        found["attention"] = attention_loss(attention, F.avg_pool2d(pixels / 255, 16))
        weights = {"patch": 0.5, "value": self._stage.value, "attention": self._stage.attention}
        counted = [weights.get(name, 1.0) * value for name, value in found.items() if weights.get(name, 1.0)]
        return {"loss": torch.stack(counted).sum(), **found}


def train_stage(learner: Learner, stage: Stage, seed: int, folder: Path, batch: int = 64) -> None:
    """Run one leg, or go on with it, or take up its end."""
    steps = int(stage.epochs * stage.images) // batch
    pool = Pool(stage, seed, folder / "pool.npy")
    options = LoopOptions(folder, steps, batch, clip=1.0, keep_every=100, report_every=100, seed=seed)
    train(ClipTrainer(learner, stage, seed, steps), pool, options, {"stage": asdict(stage)})
    pool.path.unlink(missing_ok=True)


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
    """Train all stages, each in a folder of its own, and write ``clip.npz``; a restarted run goes on where it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of each stage's images, to try it out")
    chosen = parser.parse_args(arguments)
    learner = Learner(build())
    for number, stage in enumerate(STAGES):
        stage = replace(stage, images=max(64, int(stage.images * chosen.scale)))
        say(f"stage {stage.name}")
        train_stage(learner, stage, FIRST_SEED + number, chosen.out / stage.name)
    export(learner.model, learner.used.nonzero()[:, 0].tolist(), chosen.out / "clip.npz")


if __name__ == "__main__":
    main()
