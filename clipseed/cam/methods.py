"""From images to normalised class activation maps: the methods ``clipseed cam`` offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.cam.dense import DENSE_METHODS, DenseMethod, dense_cams
from clipseed.cam.gradcam import Target, gradcam, normalize, run_last_block
from clipseed.clip.attention import attention_blocks, patch_attention, with_last
from clipseed.clip.model import FrozenClip
from clipseed.clip.text import TextBank
from clipseed.defaults import CamMethod
from clipseed.minmax import minmax

Method = CamMethod
METHODS: tuple[Method, ...] = ("softmax-gradcam", "gradcam", *DENSE_METHODS)


@dataclass(frozen=True)
class CamBatch:
    """Maps of a batch: one ``(K, h, w)`` float32 CPU tensor per image, and how many images needed float32.

    ``attention`` ``(B, n, n)`` is the mean over heads and the last blocks, where it was asked for.
    """

    maps: list[Tensor]
    recomputed: int
    attention: Tensor | None = None


def compute_cams(
    clip: FrozenClip,
    text: TextBank,
    views: Sequence[Tensor],
    labels: Sequence[Sequence[int]],
    grid: tuple[int, int],
    method: Method = "softmax-gradcam",
    flip: bool = False,
    released: bool = False,
    attention_layers: int = 0,
    raw: bool = False,
) -> CamBatch:
    """Class activation maps of a batch of images.

    With one view and no flip this is CLIP-ES's map. With several scales or the mirrored image, each view's map is
    normalised, brought to ``grid`` (bilinear), averaged, and min-max normalised once more.

    Args:
        clip: The frozen model.
        text: Prototypes of the vocabulary.
        views: The same B images at one or more scales, each ``(B, 3, H_s, W_s)`` uint8, whole patches.
        labels: Present classes of each image.
        grid: Patch grid ``(h, w)`` of the result.
        method: ``softmax-gradcam`` (CLIP-ES), ``gradcam`` (no competition between classes), or one without gradients:
            ``maskclip``, ``svc`` or ``naclip`` (:mod:`clipseed.cam.dense`).
        flip: Also use the mirrored images.
        released: Normalise as CLIP-ES's released code does (:func:`~clipseed.cam.gradcam.normalize`); for the methods
            with gradients.
        attention_layers: Also return the attention between patches, averaged over so many blocks from the end, of the
            view that has the result's grid; it comes out of the same forward pass.
        raw: Maps at the scale they have, signed: of ``softmax-gradcam`` the gradient of the probability, as FMA-WSSS
            takes it; views are averaged as they are.

    Returns:
        Maps in [0, 1], or ``raw`` ones. An image whose maps come out NaN or infinite in half precision is computed
        again in float32.
    """

    def maps_of(model: FrozenClip, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        chosen = [view[list(rows)] for view in views]
        request = _Request(method, flip, released, attention_layers, raw)
        return _all_views(model, text, chosen, [labels[k] for k in rows], grid, request)

    maps, attention = maps_of(clip, range(len(labels)))
    counts = [len(row) for row in labels]
    # To the CPU once for the batch: a device would be waited for once per image otherwise.
    split = list(torch.split(maps.cpu(), counts))
    broken = [k for k, part in enumerate(split) if not torch.isfinite(part).all()]
    if broken and clip.exact is not clip:
        again, attention_again = maps_of(clip.exact, broken)
        for k, part in zip(broken, torch.split(again.cpu(), [counts[k] for k in broken]), strict=True):
            split[k] = part
        if attention is not None and attention_again is not None:
            attention[broken] = attention_again
    return CamBatch([part.nan_to_num(0.0) for part in split], len(broken), attention)


@dataclass(frozen=True)
class _Request:
    """What :func:`compute_cams` was asked for, besides images and labels."""

    method: Method
    flip: bool
    released: bool
    attention_layers: int
    raw: bool


def _all_views(
    clip: FrozenClip,
    text: TextBank,
    views: Sequence[Tensor],
    labels: Sequence[Sequence[int]],
    grid: tuple[int, int],
    request: _Request,
) -> tuple[Tensor, Tensor | None]:
    found = []
    attention: Tensor | None = None
    for pixels in views:
        for mirrored in (False, True) if request.flip else (False,):
            own = (pixels.shape[-2] // clip.tower.patch, pixels.shape[-1] // clip.tower.patch) == grid
            layers = request.attention_layers if own and not mirrored and attention is None else 0
            maps, seen = _one_view(clip, text, pixels.flip(-1) if mirrored else pixels, labels, request, layers)
            attention = seen if layers else attention
            found.append(maps.flip(-1) if mirrored else maps)
    if request.attention_layers and attention is None:
        raise ValueError("no view has the grid that attention is asked for on")
    if len(found) == 1 and found[0].shape[1:] == grid:
        return found[0], attention
    resized = [F.interpolate(maps[None], size=grid, mode="bilinear", align_corners=False)[0] for maps in found]
    averaged = torch.stack(resized).mean(dim=0)
    return (averaged if request.raw else minmax(averaged)), attention


def _one_view(
    clip: FrozenClip,
    text: TextBank,
    pixels: Tensor,
    labels: Sequence[Sequence[int]],
    request: _Request,
    layers: int,
) -> tuple[Tensor, Tensor | None]:
    """Maps of one view, and the mean attention of its last ``layers`` blocks (none: ``None``)."""
    tower = clip.tower
    if request.method in DENSE_METHODS:
        dense: DenseMethod = request.method
        maps = dense_cams(clip, pixels, text, labels, dense)
        if not request.raw:  # no ReLU: zero means nothing to a similarity
            maps = minmax(maps)
        return maps, patch_attention(tower, pixels, layers) if layers else None
    blocks = attention_blocks(tower, layers) if layers else ()
    features = clip.dense(pixels, blocks)
    state = run_last_block(tower, features.tokens)
    # Maps are normalised, so the logarithm changes nothing but that tiny probabilities do not underflow.
    softmax: Target = "softmax" if request.released or request.raw else "log-softmax"
    target = softmax if request.method == "softmax-gradcam" else "logit"
    raw = gradcam(tower, state, text, labels, features.grid, target)
    attention = with_last(features, state.mean_attention(), blocks) if layers else None
    return (raw if request.raw else normalize(raw, released=request.released)), attention
