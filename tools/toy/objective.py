"""What the tiny CLIP is trained for: losses from images, captions and labels, never from masks (docs/toy.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.data.toy.shapes import CLASS_NAMES

_TOP_PATCHES = 3


def look(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Normalised tokens ``(B, 1 + n, D)`` behind the last block, values of its patches, head-mean attention per block.

    The values ``(B, n, D)`` are what attention would move if every patch looked at itself only (MaskCLIP's map). In a
    large CLIP they name what is in the patch; GradCAM reads a class off exactly this path.
    """
    visual = model.visual
    x = visual._embeds(pixels)
    attention = []
    for block in visual.transformer.resblocks:
        heads = block.attn.num_heads
        packed = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        query, key, value = packed.view(*packed.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        chance = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
        attention.append(chance.mean(dim=1).float())
        x = x + block.attn.out_proj((chance.to(value.dtype) @ value).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    alone = block.attn.out_proj(value.transpose(1, 2).flatten(2)[:, 1:])
    return visual.ln_post(x), visual.ln_post(alone), attention


def kinship(colours: Tensor) -> Tensor:
    """Which patches look alike: ``(B, n, n)``, rows sum to 1, from the mean colours ``(B, 3, h, w)`` in [0, 1].

    Patches of one hue (grey counts as one) that are not far apart. It is what the attention of a CLIP trained on
    millions of photographs comes to by itself, and what a few thousand toy scenes do not teach.
    """
    red, green, blue = colours.flatten(2).unbind(1)
    chroma = torch.stack([0.866 * (red - green), (red + green) / 2 - blue], dim=-1)
    hue = chroma / (chroma.norm(dim=-1, keepdim=True) + 0.05)
    rows, columns = colours.shape[-2:]
    place = torch.cartesian_prod(torch.arange(rows, dtype=torch.float32), torch.arange(columns, dtype=torch.float32))
    unlike = torch.cdist(hue, hue).square() / (2 * 0.2**2)
    apart = torch.cdist(place, place).square() / (2 * 5.0**2)
    return (-unlike - apart).softmax(dim=-1)


def attention_loss(attention: Sequence[Tensor], colours: Tensor) -> Tensor:
    """Cross-entropy of every block's patch-to-patch attention against :func:`kinship`, less its least value."""
    wanted = kinship(colours)
    least = -(wanted * wanted.clamp_min(1e-9).log()).sum(dim=-1).mean()
    total = torch.zeros(())
    for chance in attention:
        among = chance[:, 1:, 1:]
        among = among / among.sum(dim=-1, keepdim=True).clamp_min(1e-6)
        total = total - (wanted * among.clamp_min(1e-6).log()).sum(dim=-1).mean() - least
    return total / len(attention)


def losses(
    model: Any, patches: Tensor, values: Tensor, token: Tensor, texts: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """The training objective.

    Args:
        model: For the logit scale and projection.
        patches: ``(B, n, D)`` normalised patch tokens.
        values: ``(B, n, D)`` normalised values of the last block.
        token: ``(B, D)`` normalised class token.
        texts: ``(B + C, E)`` unit features of the captions, then of one prompt per concept.
        targets: ``(B, C)``, 1 where an image shows a concept.

    Returns:
        ``caption``: CLIP's contrastive loss; ``label``: cross-entropy of the softmax over all concepts against a
        uniform share for those shown; both for the class token and for the patch mean. ``patch``: every class shown
        must be found by some patches, none that is not (multiple-instance binary cross-entropy on the best few);
        ``value``: the same for the values.
    """
    batch = len(patches)
    scale = model.logit_scale.exp().clamp(max=100)
    captions, concepts = texts[:batch], texts[batch:]
    share = targets / targets.sum(dim=1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-9).log()).sum(dim=1).mean()
    found: dict[str, Tensor] = {}
    for name, pooled in (("token", token), ("mean", patches.mean(dim=1))):
        feature = F.normalize(pooled @ model.visual.proj, dim=-1)
        logits = scale * feature @ captions.T
        matching = torch.arange(batch)
        found[f"caption {name}"] = (F.cross_entropy(logits, matching) + F.cross_entropy(logits.T, matching)) / 2
        guessed = (scale * feature @ concepts.T).log_softmax(dim=1)
        found[f"label {name}"] = -(share * guessed).sum(dim=1).mean() - entropy
    wanted = targets[:, : len(CLASS_NAMES)]
    for name, tokens in (("patch", patches), ("value", values)):
        local = F.normalize(tokens @ model.visual.proj, dim=-1)
        chance = (scale * local @ concepts.T).softmax(dim=-1)[..., : len(CLASS_NAMES)]
        best = chance.topk(_TOP_PATCHES, dim=1).values.mean(dim=1).clamp(1e-5, 1 - 1e-5)
        found[name] = F.binary_cross_entropy(best, wanted, reduction="none").sum(dim=1).mean()
    return found
