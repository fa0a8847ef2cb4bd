"""Grad-CAM of CLIP's last block in closed form (CLIP-ES, sections 3.1 and 3.2; Grad-CAM weights of Eq. 1 and 2).

The image feature is the *mean* of the last block's patch tokens, and only the patch mean of the gradient with respect
to that block's first normalisation is used. So the gradient needs no autograd and no parameter gradients: the
cotangent is the same vector for every token, and of the backward pass through attention only sums over patches are
computed. All classes of all images of a batch go through together as *pairs* (image, class).

Shapes: B images, P pairs, N = p + n tokens (p prefix tokens first), D width, H heads, d = D / H, F hidden width of
the MLP, E joint space, C classes, M background words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.clip.text import TextBank, present_mask
from clipseed.clip.vision import QUICK_GELU_SLOPE, Block, Norm, VisionTower, attention_map, merge_heads, scaled
from clipseed.minmax import RELEASED_FLOOR, minmax

Target = Literal["softmax", "log-softmax", "logit"]
_GROUP_TOKENS = {"cpu": 1 << 11}
_GPU_GROUP_TOKENS = 1 << 16
"""Pairs are taken in groups of about this many tokens: on a CPU few, so that temporaries stay near the caches."""


@dataclass(frozen=True)
class LastBlock:
    """Forward pass of the last block and the head, with what the backward pass needs.

    Attributes:
        attention: ``(B, H, N, N)`` softmax attention of the last block.
        feature: ``(B, E)`` mean patch feature in the joint space, not normalised.
    """

    a: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attention: Tensor
    attended: Tensor
    middle: Tensor
    hidden: Tensor
    pooled_hat: Tensor
    pooled_scale: Tensor
    feature: Tensor

    def take(self, images: Sequence[int]) -> LastBlock:
        """The same of some images; views where they stand side by side."""
        first, last = images[0], images[-1]
        if list(images) == list(range(first, last + 1)):
            return LastBlock(*(getattr(self, item.name)[first : last + 1] for item in fields(self)))
        index = index_on(images, self.feature.device)
        return LastBlock(*(getattr(self, item.name)[index] for item in fields(self)))

    def mean_attention(self) -> Tensor:
        """``(B, n, n)`` attention between patches averaged over heads, float32."""
        first = self.prefix_tokens
        return self.attention[:, :, first:, first:].mean(dim=1, dtype=torch.float32)

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches."""
        return self.a.shape[1] - self.middle.shape[1]


def run_last_block(tower: VisionTower, tokens: Tensor) -> LastBlock:
    """Run the last block on ``tokens`` ``(B, N, D)`` and pool the patches as CLIP-ES does."""
    block = tower.blocks[-1]
    a = block.norm_1(tokens)
    q, k, v = block.split_heads(a)
    attention = attention_map(q, k)
    attended = attention @ v
    middle = tokens + scaled(block.out(merge_heads(attended)), block.scale_1)
    middle = middle[:, tower.prefix_tokens :]
    hidden = block.up(block.norm_2(middle))
    last = (middle + scaled(block.down(block.activate(hidden)), block.scale_2)).float()
    if tower.norm_after_pool:
        last = last.mean(dim=1, keepdim=True)
    hat, scale = _standardise(last, tower.norm_post.eps)
    pooled = (hat * tower.norm_post.weight + tower.norm_post.bias).mean(dim=1)
    feature = pooled @ tower.projection.float()
    return LastBlock(a, q, k, v, attention, attended, middle, hidden, hat, scale, feature)


def score_gradient(
    feature: Tensor, text: TextBank, present: Tensor, image: Tensor, label: Tensor, target: Target
) -> Tensor:
    """Gradient ``(P, E)`` of each pair's score with respect to its image's feature; see :func:`score_direction`."""
    return across(feature, score_direction(feature, text, present, image, label, target), image)


def score_direction(
    feature: Tensor, text: TextBank, present: Tensor, image: Tensor, label: Tensor, target: Target
) -> Tensor:
    """Gradient ``(P, E)`` of each pair's score with respect to its image's *unit* feature.

    The score of pair p is the probability of class ``label[p]`` in image ``image[p]``
    (``target="softmax"``, CLIP-ES Eq. 3; where texts do not compete, a sigmoid), that probability's logarithm
    (``"log-softmax"``: the same direction, but it does not vanish for classes the softmax is sure are absent), or the
    logit (``"logit"``, plain Grad-CAM).
    """
    if target == "logit":
        outer = F.one_hot(label, len(text.classes) + len(text.background)).float()
    else:
        probability = text.probabilities(feature, present)[image]
        strongest = text.logits(feature).argmax(dim=-1)[image] if text.floored else None
        outer = text.log_slope(probability, label, strongest)
        if target == "softmax":
            outer = probability.gather(1, label[:, None]) * outer
    return text.logit_scale * outer @ text.all


def across(feature: Tensor, direction: Tensor, image: Tensor) -> Tensor:
    """From gradients ``(P, E)`` at unit features to those at features ``(B, E)``, given the image of each."""
    norm = feature.norm(dim=-1, keepdim=True)[image]
    unit = feature[image] / norm
    sideways: Tensor = direction - unit * (unit * direction).sum(dim=-1, keepdim=True)
    return sideways.div(norm)


def channel_weights(tower: VisionTower, state: LastBlock, counts: Sequence[int], gradient: Tensor) -> Tensor:
    """Grad-CAM channel weights ``(P, D)``: the patch mean of the score's gradient with respect to ``state.a``.

    ``gradient`` ``(P, E)`` is that of :func:`score_gradient`, pairs ordered by image, ``counts[b]`` of them for
    image b. Each pair's is scaled to unit size on the way, so that half precision neither loses the tiny gradients
    of confident scores nor overflows.
    """
    start = (gradient @ tower.projection.float().T) * tower.norm_post.weight
    size = start.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    start = start / size
    start = start - start.mean(dim=-1, keepdim=True)
    offsets = [0, *accumulate(counts)]
    weights = torch.empty_like(start)
    budget = _GROUP_TOKENS.get(start.device.type, _GPU_GROUP_TOKENS) // state.middle.shape[1]
    for count, images in _equal_counts(counts, budget):
        pairs = index_on([[offsets[b] + k for k in range(count)] for b in images], start.device)
        weights[pairs] = _group_weights(tower, state.take(images), start[pairs])
    # Once for the mean over patches that made the feature, once for the mean of the gradient.
    return weights * (size / state.middle.shape[1] ** 2)


def _group_weights(tower: VisionTower, state: LastBlock, start: Tensor) -> Tensor:
    """Gradient summed over patches ``(G, K, D)`` for G images with K classes each; ``start`` ``(G, K, D)``."""
    block = tower.blocks[-1]
    hat, scale = state.pooled_hat, state.pooled_scale
    # The cotangent behind the final norm is, up to each token's scale, `start - hat * share`: one vector per class and
    # one per token. So the MLP's output matrix meets every token once, not once per class.
    share = (start @ hat.transpose(1, 2) / start.shape[-1]).unsqueeze(-1)
    slope = activation_slope(state.hidden, block.activation) * scale.to(tower.dtype)
    token_part = slope * (scaled(hat.to(tower.dtype), block.scale_2) @ block.down.weight)
    pair_part = scaled(start.to(tower.dtype), block.scale_2) @ block.down.weight
    hidden = slope.unsqueeze(1) * pair_part.unsqueeze(2)
    hidden.addcmul_(token_part.unsqueeze(1), share.to(tower.dtype), value=-1)
    into_mlp = torch.addcmul(start.unsqueeze(2), hat.unsqueeze(1), share, value=-1) * scale.unsqueeze(1)
    through = norm_backward(hidden @ block.up.weight, state.middle.unsqueeze(1), block.norm_2)
    out = scaled((into_mlp + through).to(block.out.weight.dtype), block.scale_1) @ block.out.weight
    return _attention_sums(state, block, out)


def _attention_sums(state: LastBlock, block: Block, out: Tensor) -> Tensor:
    """Sum over patches of the gradient at the block's normalised tokens ``(G, K, D)``, given the one behind attention.

    ``out`` ``(G, K, n, D)`` is the cotangent of the heads' concatenated output at the patches; prefix tokens' is 0, as
    the feature is the mean of the patches. With S the scaled scores and A their softmax,
    dS = A * (dO v^T - rowsum(dO * O)), and with c over the prefix tokens, of which there may be none:

    - values: the sum over patches i of dv_i is the sum over j of (1 - sum_c A_jc) dO_j;
    - keys: rows of dS sum to zero, so the sum over patches of dk_i is - sum_j (sum_c dS_jc) q_j;
    - queries: sum_j dq_j = sum_i c_i k_i with c_i = (A^T dO)_i . v_i - (A^T rowsum(dO * O))_i, i over all tokens.
    """
    group, classes, patches, width = out.shape
    first = state.prefix_tokens
    heads, d = block.heads, width // block.heads
    cotangent = out.view(group, classes, patches, heads, d).permute(0, 3, 2, 1, 4)  # G, H, n, K, d
    along = (cotangent * state.attended[:, :, first:].unsqueeze(3)).sum(dim=-1)  # G, H, n, K
    to_prefix = state.attention[:, :, first:, :first]  # G, H, n, p
    flat = cotangent.reshape(group, heads, patches, classes * d)

    to_patches = 1 - to_prefix.sum(dim=-1, keepdim=True)
    d_value = (to_patches.transpose(2, 3) @ flat).view(group, heads, classes, d)

    towards_prefix = cotangent @ state.v[:, :, :first].transpose(2, 3).unsqueeze(2)  # G, H, n, K, p
    into_prefix = (to_prefix.unsqueeze(3) * (towards_prefix - along.unsqueeze(-1))).sum(dim=-1)
    d_key = -into_prefix.transpose(2, 3) @ state.q[:, :, first:]

    spread = state.attention[:, :, first:].transpose(2, 3) @ torch.cat([flat, along], dim=-1)  # G, H, N, K * d + K
    forward = spread[..., : classes * d].view(group, heads, first + patches, classes, d)
    agreement = (forward * state.v.unsqueeze(3)).sum(dim=-1) - spread[..., classes * d :]
    d_query = agreement.transpose(2, 3) @ state.k

    parts = [d_query * d**-0.5, d_key * d**-0.5, d_value]  # each G, H, K, d
    summed = torch.cat([part.transpose(1, 2).flatten(2) for part in parts], dim=-1)
    return (summed @ block.qkv.weight).float()


def weighted_sums(state: LastBlock, counts: Sequence[int], weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """Raw class activation maps ``(P, h, w)``: patch activations weighted by channel, before the ReLU."""
    activations = state.a[:, state.prefix_tokens :].float()
    maps = [rows @ activations[b].T for b, rows in enumerate(torch.split(weights, list(counts)))]
    return torch.cat(maps).view(-1, *grid)


def gradcam(
    tower: VisionTower,
    state: LastBlock,
    text: TextBank,
    labels: Sequence[Sequence[int]],
    grid: tuple[int, int],
    target: Target = "softmax",
) -> Tensor:
    """Raw class activation maps of a batch.

    Args:
        tower: The frozen vision transformer.
        state: Its last block's forward pass on B images.
        text: Prototypes of the vocabulary.
        labels: Present classes of each image.
        grid: Patch grid ``(h, w)``.
        target: What to differentiate, see :func:`score_gradient`.

    Returns:
        ``(P, h, w)`` float32, one map per (image, class) in the order of ``labels``; may be negative.
    """
    image, label = pair_index(labels, state.feature.device)
    if not len(image):
        return torch.zeros(0, *grid, device=state.feature.device)
    present = present_mask(labels, len(text.classes), state.feature.device)
    gradient = score_gradient(state.feature, text, present, image, label, target)
    counts = [len(row) for row in labels]
    return weighted_sums(state, counts, channel_weights(tower, state, counts, gradient), grid)


_BASIS_COLUMNS = 32
"""Directions that are taken together: each needs the MLP's hidden layer once."""


def cam_basis(tower: VisionTower, state: LastBlock) -> Tensor:
    """What maps of an image are linear in: ``(B, n, E)``, whatever the texts.

    A raw map is ``basis[b] @ direction``, with :func:`score_direction` for any class, text or target: maps of an image
    whose texts change need the tower no more (FMA-WSSS, see docs/fma-wsss.md).
    """
    batch, embed = state.feature.shape
    images = torch.arange(batch, device=state.feature.device)
    activations = state.a[:, state.prefix_tokens :].float()
    columns = []
    for part in torch.split(torch.eye(embed, device=state.feature.device), _BASIS_COLUMNS):
        gradient = across(state.feature, part.repeat(batch, 1), images.repeat_interleave(len(part)))
        weights = channel_weights(tower, state, [len(part)] * batch, gradient).view(batch, len(part), -1)
        columns.append(activations @ weights.transpose(1, 2))
    return torch.cat(columns, dim=2)


def normalize(raw: Tensor, *, released: bool = False) -> Tensor:
    """ReLU and min-max to [0, 1], each map ``(P, h, w)`` by itself; a map without a positive value is zero everywhere.

    Args:
        raw: Maps of any scale, however tiny their gradients were.
        released: As CLIP-ES's released code: ``(x - min) / (1e-7 + max(x - min))`` twice. The peak then ends at
            0.9999999, and maps whose raw peak is below about 1e-13 (classes the softmax is sure are absent) fade away.
    """
    maps = raw.relu()
    return minmax(minmax(maps, RELEASED_FLOOR), RELEASED_FLOOR) if released else minmax(maps)


def pair_index(labels: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Image and class of every pair, each ``(P,)``, images in order."""
    pairs = [(image, label) for image, row in enumerate(labels) for label in row]
    index = index_on(pairs, device).view(-1, 2)
    return index[:, 0], index[:, 1]


def index_on(values: Sequence[Any], device: torch.device) -> Tensor:
    """Numbers as an int64 tensor on a device, without waiting for what the device has to do before."""
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)


def activation_slope(h: Tensor, activation: str) -> Tensor:
    """Derivative of the MLP's non-linearity at ``h``."""
    if activation == "quickgelu":
        gate = torch.sigmoid(QUICK_GELU_SLOPE * h)
        return torch.mul(gate, 1 + QUICK_GELU_SLOPE * h * (1 - gate))
    wide = h.float()
    cdf = 0.5 * (1 + torch.erf(wide * 2**-0.5))
    density = torch.exp(-0.5 * wide * wide) * (2 * torch.pi) ** -0.5
    return torch.add(cdf, wide * density).to(h.dtype)


def norm_backward(gradient: Tensor, x: Tensor, norm: Norm) -> Tensor:
    """Gradient with respect to ``x`` of a layer norm, given the one with respect to its output; float32."""
    hat, scale = _standardise(x.float(), norm.eps)
    g = gradient.float() * norm.weight
    across: Tensor = g - g.mean(dim=-1, keepdim=True) - hat * (g * hat).mean(dim=-1, keepdim=True)
    return across.mul(scale)


def _standardise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(x - mean) / std`` over the last axis, and ``1 / std`` ``(…, 1)``."""
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    scale = torch.rsqrt(variance + eps)
    return (x - mean) * scale, scale


def _equal_counts(counts: Sequence[int], pairs: int) -> Iterator[tuple[int, list[int]]]:
    """Groups of about ``pairs`` pairs from images with equally many classes: that number, and the images."""
    for count in sorted(set(counts) - {0}):
        images = [b for b, other in enumerate(counts) if other == count]
        step = max(1, pairs // count)
        for first in range(0, len(images), step):
            yield count, images[first : first + step]
