"""The two losses of FMA-WSSS's prompts: on image labels, and on coarse pseudo-labels.

Shapes: N images, F classes, P pairs (image, class of it).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.defaults import ActivationReduction, ContrastReduction
from clipseed.train.distributed import ALONE, Team
from clipseed.types import IGNORE


def contrastive_loss(
    logits: Tensor, positive: Tensor, reduction: ContrastReduction = "pairs", scale: float = 1.0, team: Team = ALONE
) -> Tensor:
    """Multi-label contrastive loss: each class of an image against those that it does not show (L_MCL).

    ``softplus(logsumexp over absent classes of z - z of the class)``, averaged. An image that shows none of the
    classes, or all, takes no part; where no image does, the loss is 0 with a gradient of 0.

    Args:
        logits: ``(N, F)`` of the classes, without background words.
        positive: ``(N, F)`` booleans.
        reduction: ``pairs``: the mean over all pairs of the batch; ``images``: over each image first.
        scale: Factor on the logits.
        team: The processes that share a batch.
    """
    usable = positive.any(dim=1) & ~positive.all(dim=1)
    rows, shown = scale * logits[usable], positive[usable]
    absent = rows.masked_fill(shown, float("-inf")).logsumexp(dim=1, keepdim=True)
    each = F.softplus(absent - rows) * shown
    if reduction == "images":
        total, count = (each.sum(dim=1) / shown.sum(dim=1)).sum(), usable.sum()
    else:
        total, count = each.sum(), shown.sum()
    return team.mean(total, count) + 0 * logits.sum()


def activation_loss(
    cams: Tensor, image: Tensor, label: Tensor, masks: Tensor, reduction: ActivationReduction = "pixels",
    *, squared: bool = False, through_peak: bool = False, floor: float = 0.0, team: Team = ALONE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """CAM activation loss: pixels of a class up to its map's peak among them, all others down to 0 (L_CAL).

    Maps are raw: the loss has their scale.

    Args:
        cams: ``(P, h, w)``, brought to the masks' size (bilinear, half-pixel centres).
        image: ``(P,)`` image of each pair.
        label: ``(P,)`` class of each pair.
        masks: ``(N, H, W)``: 0 background, class index + 1, 255 not counted. Other classes count as background.
        reduction: ``pixels``: both sums over the number of all pixels of all pairs, as published; ``sides``: half the
            mean over foreground plus half the mean over background; ``pairs``: the same in each pair, then the mean.
        squared: Half the square in place of the distance.
        through_peak: Let gradients pass through the peak.
        floor: Background below it costs nothing.
        team: The processes that share a batch.

    Returns:
        The parts of foreground and background, whose sum is the loss; 0 with a gradient of 0 without pairs.
    """
    wide = F.interpolate(cams[:, None], size=masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    truth = masks[image]
    inside = truth == (label + 1).view(-1, 1, 1).to(truth.dtype)
    outside = ~inside & (truth != IGNORE)
    peak = wide.masked_fill(~inside, 0).amax(dim=(1, 2), keepdim=True).clamp(min=0)
    short = (peak if through_peak else peak.detach()) - wide
    over = (wide - floor).clamp(min=0)
    lacks, exceeds = (0.5 * short.square(), 0.5 * over.square()) if squared else (short.abs(), over)
    sums = (lacks * inside).sum(dim=(1, 2)), (exceeds * outside).sum(dim=(1, 2))
    counts = inside.sum(dim=(1, 2)), outside.sum(dim=(1, 2))
    if reduction == "pairs":
        pairs = torch.tensor(len(label), device=cams.device)
        each = [0.5 * (part / count.clamp(min=1)).sum() for part, count in zip(sums, counts, strict=True)]
        return team.mean(each[0], pairs), team.mean(each[1], pairs)
    totals = [team.total(count.sum()) for count in counts]
    if reduction == "pixels":
        common = (totals[0] + totals[1]).clamp(min=1)
        return sums[0].sum() * team.count / common, sums[1].sum() * team.count / common
    inner, outer = (
        0.5 * part.sum() * team.count / total.clamp(min=1) for part, total in zip(sums, totals, strict=True)
    )
    return inner, outer
