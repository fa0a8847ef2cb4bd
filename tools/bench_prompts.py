"""What a step of learning prompts costs at the paper's size, beside the bare encoder and beside the released way.

``python tools/bench_prompts.py``: ViT-B/16 with seeded weights, VOC's and COCO's class lists, 16 crops of 224 pixels
with 28 class maps in all, CPU-seconds on one thread (a GPU's seconds with ``--device cuda``), and the share of
multiply-adds, which is the same on every machine. The released way is written here with autograd: maps with a graph,
differentiated a second time, prompts of 77 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipseed.cam.gradcam import pair_index
from clipseed.clip.model import FrozenClip, ModelInfo
from clipseed.clip.vision import tower_from
from clipseed.data.vocabulary import load_vocabulary
from clipseed.train.bridge.cost import multiply_adds
from clipseed.train.crops import Crops
from clipseed.train.prompts.contexts import LearnedContext, PromptTexts, fresh_context
from clipseed.train.prompts.layout import make_layout
from clipseed.train.prompts.losses import activation_loss
from clipseed.train.prompts.options import PromptOptions, preset
from clipseed.train.prompts.trainers import ClassificationPrompts, SegmentationPrompts, basis_of, feature_of

LABELS = [(3,), (1, 7), (14,), (0, 5, 11)]


def seeded_clip(device: torch.device) -> FrozenClip:
    """A ViT-B/16 with its text tower, whose weights follow from a seed."""
    torch.manual_seed(0)
    model: Any = open_clip.create_model("ViT-B-16-quickgelu").requires_grad_(False).eval().to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tower = tower_from(model.visual, (0.48,) * 3, (0.27,) * 3, device, dtype)
    info = ModelInfo("ViT-B-16-quickgelu", "seeded", "", "quickgelu", 16, 12, 768, 12, 512, 14)
    return FrozenClip(model, open_clip.get_tokenizer("ViT-B-16"), tower, info, "fp32", "seeded")


def crops(count: int, side: int, device: torch.device) -> Crops:
    """Images with smooth colours, and masks with a rectangle for each class."""
    dice = torch.Generator().manual_seed(1)
    smooth = F.interpolate(torch.rand(count, 3, 12, 12, generator=dice), (side, side), mode="bicubic")
    known = torch.zeros(count, side, side, dtype=torch.uint8)
    labels = [LABELS[k % len(LABELS)] for k in range(count)]
    for row, present in enumerate(labels):
        for place, label in enumerate(present):
            known[row, 60 * place : 60 * place + 50, 30:200] = label + 1
    pixels = (255 * smooth).clamp(0, 255).byte()
    batch = Crops(pixels, known, labels, indices=list(range(count))).to(device)
    batch.images = list(batch.pixels)
    return batch


def released_step(clip: FrozenClip, texts: PromptTexts, learned: LearnedContext, batch: Crops) -> Tensor:
    """The segmentation task with autograd twice: every map a gradient with a graph."""
    model: Any = clip._model
    visual, context = model.visual, learned.context
    vectors = context if context.ndim == 2 else context[texts._groups]
    filled = texts.embedded.filled(vectors)
    x = model.transformer(filled.embeddings + model.positional_embedding, attn_mask=model.attn_mask)
    x = model.ln_final(x)[torch.arange(len(x)), filled.ends] @ model.text_projection
    words = F.normalize(x, dim=-1)
    with torch.no_grad():
        tokens = visual._embeds(clip.tower.normalize(batch.pixels))
        *before, last = visual.transformer.resblocks
        for block in before:
            tokens = block(tokens)
    a = last.ln_1(tokens).detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
        x = tokens + last.attention(a)
        x = x + last.mlp(last.ln_2(x))
        feature = F.normalize(visual.ln_post(x)[:, 1:].mean(dim=1) @ visual.proj, dim=-1)
        logits = model.logit_scale.exp() * feature @ words.T
        image, label = pair_index(batch.labels, logits.device)
        absent = torch.ones_like(logits, dtype=torch.bool)
        absent[image, label] = False
        absent[:, texts.layout.classes :] = False
        probability = logits.masked_fill(absent, float("-inf")).softmax(dim=-1)
        maps = []
        for row, column in zip(image.tolist(), label.tolist(), strict=True):
            (gradient,) = torch.autograd.grad(probability[row, column], a, create_graph=True)
            maps.append(a[row, 1:].detach() @ gradient[row, 1:].mean(dim=0))
        grid = batch.pixels.shape[-1] // 16
        loss = torch.stack(activation_loss(torch.stack(maps).view(-1, grid, grid), image, label, batch.known)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    clip, batch = seeded_clip(device), crops(chosen.batch, 224, device)
    pixels = clip.tower.normalize(batch.pixels)

    def bare() -> None:
        with torch.inference_mode():
            clip.tower.encode(pixels)

    works: dict[str, Callable[[], Any]] = {"bare encoder": bare}
    for name in ("voc", "coco"):
        vocabulary = load_vocabulary(name)
        for task in ("classification", "segmentation"):
            options = PromptOptions(**preset(task, name, len(vocabulary.background)))  # type: ignore[arg-type]
            layout = make_layout(vocabulary, options.sharing, options.position, options.length, options.nameless)
            texts = PromptTexts(clip, layout)
            learned = LearnedContext(fresh_context(layout, texts.width, options.deviation, 0).to(device))
            kind = ClassificationPrompts if task == "classification" else SegmentationPrompts
            works[f"{name} {task}"] = stepping(kind(clip.tower, texts, learned, options, 100), batch)
            cached = kind(clip.tower, texts, learned, options, 100, cached=True)
            if isinstance(cached, SegmentationPrompts):
                began = time.process_time()
                basis = basis_of(clip.tower, batch.pixels[:1])
                if name == "voc":
                    print(f"basis of one image: {time.process_time() - began:.2f} CPU-s, once")
                cached._bases = dict.fromkeys(range(chosen.batch), basis)
                works[f"{name} segmentation, released way"] = partial(released_step, clip, texts, learned, batch)
            else:
                cached._features = dict.fromkeys(range(chosen.batch), feature_of(clip.tower, batch.pixels[:1]))
            works[f"{name} {task}, cached"] = stepping(cached, batch)
    products = {name: multiply_adds(work) for name, work in works.items() if "released" not in name}
    times = measured(works, chosen.turns, device)
    bare_time, bare_products = times["bare encoder"], products["bare encoder"]
    print(f"{'':36}{'seconds':>9}{'x bare':>9}{'multiply-adds':>15}{'released':>13}")
    for name, seconds in times.items():
        against = times.get(f"{name.split()[0]} segmentation, released way")
        share = f"{against / seconds:12.1f}x" if against and "segmentation" in name else ""
        many = f"{products[name] / bare_products:.3f}" if name in products else ""
        print(f"{name:36}{seconds:9.3f}{seconds / bare_time:9.3f}{many:>15}{share}")


def stepping(trainer: ClassificationPrompts | SegmentationPrompts, batch: Crops) -> Callable[[], None]:
    """A whole step: losses, gradients, the optimiser."""
    optimizer = trainer.optimizer()

    def step() -> None:
        optimizer.zero_grad()
        trainer.losses(batch, 0)["loss"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def measured(works: dict[str, Callable[[], Any]], turns: int, device: torch.device) -> dict[str, float]:
    """Median time of each, in turns, so that a busy machine slows all alike; the first turn does not count.

    The released way, which takes ten times as long, has one turn.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    gpu = device.type == "cuda"
    for turn in range(turns + 1):
        for name, work in works.items():
            once = "released" in name
            if once and found[name]:
                continue
            if gpu:
                torch.cuda.synchronize()
            began = time.perf_counter() if gpu else time.process_time()
            work()
            if gpu:
                torch.cuda.synchronize()
            if turn or once:
                found[name].append((time.perf_counter() if gpu else time.process_time()) - began)
    return {name: statistics.median(values) for name, values in found.items()}


if __name__ == "__main__":
    main()
