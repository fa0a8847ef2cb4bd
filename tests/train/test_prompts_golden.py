"""Learned prompts against the arrays of FMA-WSSS's released code: tokens, features, maps, losses, gradients, rates."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.cam.gradcam import cam_basis, gradcam, pair_index, run_last_block, score_direction
from clipseed.clip.attention import patch_attention
from clipseed.clip.model import FrozenClip, ModelInfo
from clipseed.clip.text import TextBank, masked_softmax
from clipseed.clip.vision import tower_from
from clipseed.train.prompts.contexts import PromptTexts
from clipseed.train.prompts.layout import PromptLayout
from clipseed.train.prompts.losses import activation_loss, contrastive_loss
from clipseed.train.prompts.options import preset, published
from clipseed.train.prompts.schedule import learning_rate_factor

from helpers.golden import FMA_WSSS_DATA, names, with_meta

CLIPS = [name for name in names(FMA_WSSS_DATA, "clip_*") if name != "clip_weights"]


def close(ours: Tensor, theirs: np.ndarray, share: float) -> None:
    """Within a share of the largest entry."""
    largest = np.abs(theirs).max()
    assert np.abs(ours.detach().numpy() - theirs).max() <= share * max(largest, 1e-30)


@lru_cache
def golden_clip(name: str) -> FrozenClip:
    """A fixture's tiny CLIP, with pixels as they are: images come normalised."""
    stored, meta = with_meta(FMA_WSSS_DATA, name)
    config = open_clip.model.CLIPVisionCfg(
        layers=meta["vision_layers"], width=meta["vision_width"],
        head_width=meta["vision_width"] // meta["vision_heads"], patch_size=meta["patch"],
        image_size=meta["image_resolution"],
    )  # fmt: skip
    text = open_clip.model.CLIPTextCfg(
        context_length=meta["context_length"], vocab_size=meta["vocab_size"], width=meta["text_width"],
        heads=meta["text_heads"], layers=meta["text_layers"],
    )  # fmt: skip
    model: Any = open_clip.model.CLIP(meta["embed_dim"], config, text, quick_gelu=True)
    state = {key: torch.from_numpy(value) for key, value in stored.items() if key in model.state_dict()}
    rows = torch.zeros_like(model.token_embedding.weight)
    rows[torch.from_numpy(stored["token_ids"]).long()] = torch.from_numpy(stored["token_rows"])
    model.load_state_dict({**model.state_dict(), **state, "token_embedding.weight": rows})
    assert model.state_dict().keys() - state.keys() == {"token_embedding.weight"}, "tensors that the fixture lacks"
    model = model.requires_grad_(False).eval()
    tower = tower_from(model.visual, (0.0,) * 3, (1.0,) * 3, torch.device("cpu"), torch.float32)
    tokenizer = open_clip.SimpleTokenizer(context_length=meta["context_length"])
    info = ModelInfo(name, name, "", "quickgelu", meta["patch"], 1, 1, 1, meta["embed_dim"], 4)
    return FrozenClip(model, tokenizer, tower, info, "fp32", name)


class Case:
    """One fixture of a CLIP with learned prompts, and what we make of its inputs."""

    def __init__(self, name: str) -> None:
        self.stored, self.meta = with_meta(FMA_WSSS_DATA, name)
        self.clip = golden_clip(self.meta["weights"].removesuffix(".npz"))
        foreground, background = self.meta["fg_names"], self.meta["bg_names"]
        all_names, sharing = (*foreground, *background), self.meta["csc"]
        groups = tuple(range(len(all_names))) if sharing is True else tuple(sharing or [0] * len(all_names))
        layout = PromptLayout(
            all_names, len(foreground), groups, self.meta["class_token_position"], self.meta["n_ctx"], sharing is False
        )
        self.texts = PromptTexts(self.clip, layout)
        self.context = torch.from_numpy(self.stored["ctx"]).requires_grad_()
        self.labels = [tuple(np.flatnonzero(row).tolist()) for row in self.stored["labels"]]
        tower = self.clip.tower
        self.pixels = torch.from_numpy(self.stored["image"])
        dense = tower.dense(self.pixels)
        self.state, self.grid = run_last_block(tower, dense.tokens), dense.grid
        count = len(self.labels)
        self.present = torch.zeros(count, len(foreground), dtype=torch.bool)
        for row, labels in enumerate(self.labels):
            self.present[row, list(labels)] = True
        everywhere = self.meta["softmax_over"] == "all classes"
        self.competing = torch.ones_like(self.present) if everywhere else self.present

    def bank(self, floor: float = 1e-5) -> TextBank:
        return replace(self.texts.bank(self.context), floor=floor)

    def maps(self, text: TextBank) -> Tensor:
        """Through the basis, with any set of competing classes."""
        image, label = pair_index(self.labels, torch.device("cpu"))
        direction = score_direction(self.state.feature, text, self.competing, image, label, "softmax")
        basis = cam_basis(self.clip.tower, self.state)
        return torch.einsum("pe,pne->pn", direction, basis[image]).view(-1, *self.grid)


@pytest.mark.parametrize("name", CLIPS)
def test_prompts(name: str) -> None:
    """Token ids exactly, embeddings, text features; of a shared context with and without sharing the work."""
    case = Case(name)
    embedded = case.texts.embedded
    # The released ids are those of the text with its stand-ins first, whatever becomes of it.
    first = PromptTexts(case.clip, replace(case.texts.layout, position="end")).embedded
    np.testing.assert_array_equal(first.tokens.numpy(), case.stored["tokens"])
    np.testing.assert_array_equal(embedded.tokens.sort(dim=1)[0], first.tokens.sort(dim=1)[0])
    vectors = case.context if case.context.ndim == 2 else case.context[list(case.texts.layout.groups)]
    filled = embedded.filled(vectors)
    np.testing.assert_allclose(filled.embeddings.detach().numpy(), case.stored["prompt_embeddings"], atol=1e-6)
    plain = case.clip.encode_embeddings(filled.embeddings, filled.ends)
    theirs = case.stored["text_features"]
    unit = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
    np.testing.assert_allclose(F.normalize(plain, dim=-1).detach().numpy(), unit, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(case.texts.features(case.context).detach().numpy(), unit, rtol=1e-3, atol=1e-5)
    some = [len(theirs) - 1, 0, 2]
    np.testing.assert_allclose(case.texts.features(case.context, some).detach().numpy(), unit[some], atol=1e-5)


@pytest.mark.parametrize("name", CLIPS)
def test_maps(name: str) -> None:
    """Features, attention, logits, probabilities and raw maps: through the basis, and one class after the other."""
    case = Case(name)
    stored, state, text = case.stored, case.state, case.bank()
    theirs = torch.from_numpy(stored["image_embedding"])
    np.testing.assert_allclose(F.normalize(state.feature, dim=1), F.normalize(theirs, dim=1), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(state.a.transpose(0, 1), stored["last_ln1"], rtol=1e-3, atol=1e-4)
    attention = patch_attention(case.clip.tower, 255 * case.pixels, len(case.clip.tower.blocks))
    np.testing.assert_allclose(attention, stored["attention"][:, :, 1:, 1:].mean(axis=1), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(text.logits(state.feature).detach(), stored["logits"], rtol=1e-3, atol=1e-4)
    probability = text.probabilities(state.feature, case.competing).detach()
    np.testing.assert_allclose(probability, stored["probs"], rtol=1e-3, atol=1e-6)
    close(case.maps(text), stored["pos_cam"], 1e-3)
    if case.competing is case.present:
        close(gradcam(case.clip.tower, state, text, case.labels, case.grid), stored["pos_cam"], 1e-3)


@pytest.mark.parametrize("name", CLIPS)
def test_losses_of_prompts(name: str) -> None:
    """Both losses from images and context, and their gradients with respect to the context."""
    case = Case(name)
    stored, text = case.stored, case.bank()
    logits = text.logits(case.state.feature)[:, : case.texts.layout.classes]
    loss = contrastive_loss(logits, case.present)
    np.testing.assert_allclose(loss.detach(), stored["loss_mcl"], rtol=1e-4)
    (gradient,) = torch.autograd.grad(loss, case.context, retain_graph=True)
    close(gradient, stored["grad_ctx_mcl"], 1e-3)
    image, label = pair_index(case.labels, torch.device("cpu"))
    inside, outside = activation_loss(case.maps(text), image, label, torch.from_numpy(stored["seed"]))
    np.testing.assert_allclose(inside.detach(), stored["loss_cal_fg"], rtol=1e-3)
    np.testing.assert_allclose(outside.detach(), stored["loss_cal_bg"], rtol=1e-3)
    (gradient,) = torch.autograd.grad(inside + outside, case.context)
    close(gradient, stored["grad_ctx_cal"], 1e-2)


@pytest.mark.parametrize("name", names(FMA_WSSS_DATA, "mcl_*"))
def test_contrastive_loss(name: str) -> None:
    stored, _ = with_meta(FMA_WSSS_DATA, name)
    known = {"pos_mean": "pairs", "sample_mean": "images"}
    for key in stored:
        if not key.startswith("loss_"):
            continue
        reduction, scale = key.removeprefix("loss_").rsplit("_g", 1)
        logits = torch.from_numpy(stored["S"]).requires_grad_()
        positive = torch.from_numpy(stored["labels"]).bool()
        loss = contrastive_loss(logits, positive, known[reduction], 1.0 if scale == "None" else float(scale))
        np.testing.assert_allclose(loss.detach(), stored[key], rtol=1e-4)
        (gradient,) = torch.autograd.grad(loss, logits)
        close(gradient, stored[key.replace("loss_", "grad_")], 1e-3)


@pytest.mark.parametrize("name", names(FMA_WSSS_DATA, "cal_*"))
def test_activation_loss(name: str) -> None:
    stored, meta = with_meta(FMA_WSSS_DATA, name)
    image, label = torch.from_numpy(stored["fg_labels"]).nonzero(as_tuple=True)
    reductions = {"all": "pixels", "fg-bg": "sides", "fg-bg-per-pos": "pairs"}
    for number, variant in enumerate(meta["variants"]):
        cams = torch.from_numpy(stored["pos_cam"]).requires_grad_()
        inside, outside = activation_loss(
            cams, image, label, torch.from_numpy(stored["seed"]), reductions[variant["reduce"]],
            squared=variant["loss_type"] == "l2", through_peak=not variant["detach_max"], floor=variant["bg_thresh"],
        )  # fmt: skip
        np.testing.assert_allclose(inside.detach(), stored[f"fg_{number}"], rtol=1e-4)
        np.testing.assert_allclose(outside.detach(), stored[f"bg_{number}"], rtol=1e-4)
        (gradient,) = torch.autograd.grad(inside + outside, cams)
        close(gradient, stored[f"grad_{number}"], 1e-3)


@pytest.mark.parametrize("name", names(FMA_WSSS_DATA, "masked_softmax_*"))
def test_masked_softmax(name: str) -> None:
    stored, _ = with_meta(FMA_WSSS_DATA, name)
    logits, kept = torch.from_numpy(stored["x"]).requires_grad_(), torch.from_numpy(stored["mask"])
    found = masked_softmax(logits, kept, 1e-5)
    np.testing.assert_allclose(found.detach(), stored["out"], rtol=1e-4, atol=1e-7)
    (gradient,) = torch.autograd.grad(found[:, 0].sum(), logits)
    close(gradient, stored["grad_of_sum_of_column0"], 1e-3)
    exact = masked_softmax(logits, kept).detach()
    np.testing.assert_allclose(exact.sum(dim=1), kept.any(dim=1), atol=1e-6)
    # The closed form's slope is that of the released softmax, also where what is missing to 1 matters.
    bank = TextBank(torch.eye(logits.shape[1]), torch.zeros(0, logits.shape[1]), 1.0, floor=1e-5)
    label = torch.zeros(len(logits), dtype=torch.long)
    slope = found[:, :1] * bank.log_slope(found, label, logits.argmax(dim=1))
    close(slope, stored["grad_of_sum_of_column0"], 1e-3)


@pytest.mark.parametrize("name", names(FMA_WSSS_DATA, "lr_schedule*"))
def test_schedule(name: str) -> None:
    stored, meta = with_meta(FMA_WSSS_DATA, name)
    for key in [key.removesuffix("_iter") for key in stored if key.endswith("_iter")]:
        run, factor = meta[key], meta["warm_lr"] / meta["base_lr"]
        ours = [
            meta["base_lr"] * learning_rate_factor(int(step), run["total"], run["warm"], factor)
            for step in stored[f"{key}_iter"]
        ]
        np.testing.assert_allclose(ours, stored[f"{key}_lr"], rtol=1e-6, atol=1e-12)
        # The presets have the same lengths.
        vocabulary, task = key.split("_")
        options = preset("segmentation" if task == "seg" else "classification", vocabulary, 25)
        steps = published(options["task"], vocabulary).steps
        assert (options.get("warm_up", 500), options.get("schedule") or steps) == (run["warm"], run["total"])
