"""Class activation maps without gradients: what each patch resembles, among the texts that may be in the image.

Patches come from attention surgery (:mod:`clipseed.clip.surgery`), similarities are cosines with the text prototypes.
A cosine alone is no map: texts are much alike, so every class's cosine is highest on the same patches. As in
softmax-GradCAM the present classes and the background words compete: the raw map is the class's softmax probability at
the model's logit scale, patch by patch, which is then min-max normalised. mIoU on the toy's 300 held-out scenes at the
best threshold (softmax-GradCAM 61.4, random maps 12.0):

| method | probability | what feature subtraction leaves | cosine |
| --- | --- | --- | --- |
| maskclip | 59.6 | | 29.1 |
| svc | 70.4 | 52.7 | 24.8 |
| naclip | 22.7 | | 18.9 |

NACLIP's low score is the toy's: its last attention, through queries or keys alike, spreads over what its values need
apart (22.6 with q q^T, k k^T or q k^T, 61.1 with v v^T); a large CLIP behaves otherwise.

Shapes: B images, P pairs (image, class), n patches, E joint space, C classes, M background words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.cam.gradcam import pair_index
from clipseed.clip.model import FrozenClip
from clipseed.clip.surgery import (
    NACLIP_SIGMA,
    SVC_BLOCKS,
    Heads,
    dual_path,
    neighbour_patches,
    project,
    value_patches,
)
from clipseed.clip.text import TextBank, present_mask

DenseMethod = Literal["maskclip", "svc", "naclip"]
DENSE_METHODS: tuple[DenseMethod, ...] = ("maskclip", "svc", "naclip")
Score = Literal["probability", "similarity"]
REDUNDANCY_SHARPNESS = 2.0


@dataclass(frozen=True)
class PatchFeatures:
    """Unit patch features of a batch in the joint space, float32.

    Attributes:
        patches: ``(B, n, E)``.
        image: ``(B, E)`` unit image features; only where the method needs them (``svc``).
        grid: Patch grid ``(h, w)``.
    """

    patches: Tensor
    image: Tensor | None
    grid: tuple[int, int]


def dense_features(
    clip: FrozenClip,
    images: Tensor,
    method: DenseMethod,
    *,
    blocks: int = SVC_BLOCKS,
    heads: Heads = "sum",
    sigma: float = NACLIP_SIGMA,
) -> PatchFeatures:
    """Patch features of images of one size.

    Args:
        clip: The frozen model.
        images: ``(B, 3, H, W)`` uint8, whole patches.
        method: ``maskclip``, ``svc`` or ``naclip``; see :mod:`clipseed.clip.surgery`.
        blocks: Blocks of the new path (``svc``).
        heads: How the heads' attention is shared (``svc``).
        sigma: Width of the Gaussian in patches (``naclip``).
    """
    tower = clip.tower
    if method == "svc":
        found = dual_path(tower, tower.normalize(images), blocks, heads)
        return PatchFeatures(project(tower, found.patches), F.normalize(found.image.float(), dim=-1), found.grid)
    features = clip.dense(images)
    if method == "maskclip":
        patches = value_patches(tower, features.tokens)
    else:
        patches = neighbour_patches(tower, features.tokens, features.grid, sigma)
    return PatchFeatures(project(tower, patches), None, features.grid)


def similarities(features: PatchFeatures, text: TextBank) -> Tensor:
    """Cosines of all patches with all texts ``(B, n, C + M)``, classes first."""
    return features.patches @ text.all.T


def competitors(text: TextBank, labels: Sequence[Sequence[int]]) -> Tensor:
    """Which texts compete in each image ``(B, C + M)``, see :meth:`~clipseed.clip.text.TextBank.competing`."""
    return text.competing(present_mask(labels, len(text.classes), text.classes.device))


def subtract_redundant(
    cosines: Tensor, overall: Tensor, among: Tensor, sharpness: float = REDUNDANCY_SHARPNESS
) -> Tensor:
    """CLIP Surgery's feature subtraction, without its features ``(n, C, E)``.

    With ``F_icd = n_id t_cd w_c``, patch features n and prototypes t, the share that all texts have in common is the
    mean over c, and the new similarity is the sum over d of what remains. Sum and mean commute, so that is
    ``w_c cos_ic - mean_c' (w_c' cos_ic')``. The weights are ``w_c = s_c / mean s``, s the softmax of ``sharpness``
    times the image's similarity to the texts.

    A softmax over the texts cancels the mean again and keeps the weights alone; the mean matters where similarities
    are used as they are.

    Args:
        cosines: ``(B, n, T)`` patches with texts.
        overall: ``(B, T)`` cosines of the images with the texts.
        among: ``(B, T)`` booleans, the texts that take part; with fewer than two nothing would remain, and the cosines
            come back as they are.
        sharpness: 2 in CLIP Surgery.

    Returns:
        ``(B, n, T)``; meaningful for the texts that take part only.
    """
    count = among.sum(dim=-1, keepdim=True)
    share = (sharpness * overall).masked_fill(~among, float("-inf")).softmax(dim=-1)
    weighted = cosines * (share * count).unsqueeze(1)
    common = weighted.sum(dim=-1, keepdim=True) / count.unsqueeze(1)
    return torch.where((count > 1).unsqueeze(1), weighted - common, cosines)


def pair_scores(
    scores: Tensor,
    text: TextBank,
    labels: Sequence[Sequence[int]],
    score: Score = "probability",
    scale: float | None = None,
) -> Tensor:
    """Raw map of every pair ``(P, n)`` from the similarities of all texts ``(B, n, C + M)``.

    Args:
        scores: Cosines, or what feature subtraction made of them.
        text: Prototypes of the vocabulary.
        labels: Present classes of each image.
        score: ``probability``: among the :func:`competitors`. A class without any (no background words, no
            other class) would be certain everywhere, so it keeps its similarity. ``similarity``: as it is.
        scale: Default the model's logit scale.
    """
    image, label = pair_index(labels, scores.device)
    own = scores[image, :, label]
    if score == "similarity":
        return own
    present = present_mask(labels, len(text.classes), scores.device)
    chance = text.probabilities_of(text.logits_of(scores, present, scale))
    return torch.where(text.contested(present)[image].unsqueeze(1), chance[image, :, label], own)


def dense_cams(
    clip: FrozenClip,
    images: Tensor,
    text: TextBank,
    labels: Sequence[Sequence[int]],
    method: DenseMethod,
    score: Score = "probability",
) -> Tensor:
    """Raw class activation maps ``(P, h, w)`` float32 of a batch, in the order of ``labels``; not yet normalised.

    Args:
        clip: The frozen model.
        images: ``(B, 3, H, W)`` uint8, whole patches.
        text: Prototypes of the vocabulary.
        labels: Present classes of each image.
        method: See :func:`dense_features`; ``svc`` includes feature subtraction.
        score: See :func:`pair_scores`.
    """
    features = dense_features(clip, images, method)
    scores = similarities(features, text)
    if features.image is not None:
        scores = subtract_redundant(scores, features.image @ text.all.T, competitors(text, labels))
    return pair_scores(scores, text, labels, score).view(-1, *features.grid)
