"""CLIP's vision transformer as plain functions on weights: any image size, dense tokens, averaged attention.

Every tower's tokens are some *prefix tokens* (CLIP's class token; registers; none in SigLIP), then the patches row by
row.

Nothing here turns gradients off, and nothing needs them: weights are taken out of their modules, so a graph arises only
where an input or a replaced weight asks for one. Callers that want none at all, not even its bookkeeping, wrap their
calls into ``torch.inference_mode()``, which is a matter of each thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipseed.errors import WeightsError

QUICK_GELU_SLOPE = 1.702


@dataclass(frozen=True)
class Norm:
    """Layer normalisation; float32 whatever the input's type.

    ``half`` are weight and bias once more, in the half precision of a GPU's residual stream. Where they are given, one
    kernel reads the stream and writes what the next product wants (its sums are float32 inside), instead of three that
    move five times as many bytes.
    """

    weight: Tensor
    bias: Tensor
    eps: float
    half: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        if self.half is not None and x.dtype is self.half[0].dtype:
            return F.layer_norm(x, x.shape[-1:], *self.half, self.eps)
        return F.layer_norm(x.float(), x.shape[-1:], self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Linear:
    """``y = x W^T + b`` with weight ``(out, in)``, in the weight's type whatever the input's."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


@dataclass(frozen=True)
class Block:
    """One residual attention block. ``scale_1`` and ``scale_2`` are LayerScale gains where the model has them.

    ``silu`` is QuickGELU with its slope s taken into the matrices around it, ``h sigmoid(s h) = silu(s h) / s``
    (:func:`folded_slope`).
    """

    heads: int
    norm_1: Norm
    qkv: Linear
    out: Linear
    scale_1: Tensor | None
    norm_2: Norm
    up: Linear
    activation: Literal["quickgelu", "gelu", "silu"]
    down: Linear
    scale_2: Tensor | None

    def split_heads(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of normalised tokens ``(B, N, D)``, each ``(B, heads, N, D / heads)``."""
        batch, count, width = a.shape
        q, k, v = self.qkv(a).view(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return q, k, v

    def activate(self, h: Tensor) -> Tensor:
        """The MLP's non-linearity."""
        if self.activation == "silu":
            return F.silu(h)
        return h * torch.sigmoid(QUICK_GELU_SLOPE * h) if self.activation == "quickgelu" else F.gelu(h)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the attention result ``(B, heads, N, D / heads)`` and the MLP to the residual stream ``x``."""
        x = x + scaled(self.out(merge_heads(attended)), self.scale_1)
        return x + scaled(self.down(self.activate(self.up(self.norm_2(x)))), self.scale_2)

    def run(self, x: Tensor) -> Tensor:
        """The whole block on the residual stream ``(B, N, D)``, with fused attention."""
        q, k, v = self.split_heads(self.norm_1(x))
        return self.finish(x, attend(q, k, v))

    def run_with_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the attention averaged over heads ``(B, N, N)`` float32."""
        q, k, v = self.split_heads(self.norm_1(x))
        attended, mean_map = attend_with_mean_map(q, k, v)
        return self.finish(x, attended), mean_map


def folded_slope(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix and bias in front of a QuickGELU, times its slope: ``silu`` then gives the slope times too much."""
    return weight.detach() * QUICK_GELU_SLOPE, bias.detach() * QUICK_GELU_SLOPE


def merge_heads(x: Tensor) -> Tensor:
    """``(B, heads, N, d)`` to ``(B, N, heads * d)``."""
    return x.transpose(1, 2).flatten(2)


def scaled(x: Tensor, gain: Tensor | None) -> Tensor:
    """Apply a LayerScale gain where there is one."""
    return x if gain is None else x * gain


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """Softmax attention of every head: ``(B, heads, N, N)``, rows are queries and sum to 1."""
    scores: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.softmax(dim=-1)


@dataclass(frozen=True)
class DenseFeatures:
    """What one forward pass leaves behind for CAM and affinity methods, and for decoders trained on it.

    Attributes:
        tokens: ``(B, N, D)`` tokens entering the last block, prefix tokens first, patches row by row.
        grid: Patch grid ``(h, w)``; ``N = h * w + prefix tokens``.
        attention: ``(B, h*w, h*w)`` attention between patches, averaged over the heads and the requested blocks
            (without the last one), float32; ``None`` when no block was requested. Rows are queries; as prefix tokens
            are cut off they do not sum to 1.
        block_tokens: ``(B, N, D)`` residual stream behind each block that was asked for, by the block's index from 0.
        block_attention: ``(B, N, N)`` attention of each block that was asked for, averaged over its heads, float32:
            all tokens, so rows sum to 1.
    """

    tokens: Tensor
    grid: tuple[int, int]
    attention: Tensor | None
    block_tokens: Mapping[int, Tensor] = field(default_factory=dict)
    block_attention: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class VisionTower:
    """The frozen vision transformer of a CLIP model.

    Attributes:
        patch: Patch size in pixels.
        mean, std: Per-channel normalisation of pixels in [0, 1], ``(3, 1, 1)``.
        prefix: ``(p, D)`` what stands before the patches: a class token, then registers; p may be 0.
        positions: ``(p + g*g, D)`` position table of the ``g x g`` training grid, prefix tokens first (zeros where
            they have no position).
        half_positions: Round interpolated position tables to half precision, as CLIP-ES's released code does.
        mean_pool: The model's own image feature is the patch mean rather than the first prefix token (CLIPA).
        norm_after_pool: It normalizes the pooled feature instead of every token (CLIPA).
        projection: ``(D, E)`` map to the joint image-text space, float32.
        dtype: Type of the matrix products (norms are float32, and on a CPU the last block's attention).
        stream: Type of the residual stream: ``dtype`` on a GPU, which memory limits. A CPU spends its time in matrix
            products, so float32 costs nothing there and keeps what every block would round away.
    """

    patch: int
    mean: Tensor
    std: Tensor
    patch_weight: Tensor
    prefix: Tensor
    positions: Tensor
    half_positions: bool
    norm_pre: Norm | None
    blocks: tuple[Block, ...]
    norm_post: Norm
    mean_pool: bool
    norm_after_pool: bool
    projection: Tensor
    dtype: torch.dtype
    stream: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.positions.device

    @property
    def width(self) -> int:
        """Token width D."""
        return self.positions.shape[-1]

    @property
    def prefix_tokens(self) -> int:
        """How many tokens stand before the patches: 1 in CLIP, 0 in SigLIP, 1 + n with n registers."""
        return self.prefix.shape[0]

    def normalize(
        self, images: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> Tensor:
        """Pixels ``(B, 3, H, W)`` from 0 to 255, uint8 as a rule, to the tower's input, float32.

        Args:
            images: RGB.
            mean: Of the three channels in [0, 1]; default the model's own. WeCLIP, for one, takes ImageNet's.
            std: Likewise.
        """

        def channels(values: Sequence[float] | None, own: Tensor) -> Tensor:
            return own if values is None else torch.tensor(values, device=self.device).view(3, 1, 1)

        return (images.to(self.device).float() / 255 - channels(mean, self.mean)) / channels(std, self.std)

    def position_table(self, grid: tuple[int, int]) -> Tensor:
        """Positions for a patch grid ``(p + h*w, D)``: bilinear, half-pixel centres, no antialiasing (CLIP-ES)."""
        first = self.prefix_tokens
        side = round((self.positions.shape[0] - first) ** 0.5)
        table = self.positions
        if grid != (side, side):
            patches = table[first:].T.reshape(1, -1, side, side)
            patches = F.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
            table = torch.cat([table[:first], patches[0].flatten(1).T])
        return table.half().to(self.positions.dtype) if self.half_positions else table

    def embed(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Normalised pixels ``(B, 3, H, W)`` to the first block's tokens and the patch grid."""
        patches, grid = patch_products(pixels.to(self.dtype), self.patch_weight)
        patches = patches.to(self.stream)
        first = self.prefix.to(self.stream).expand(len(patches), -1, -1)
        tokens = torch.cat([first, patches], dim=1) + self.position_table(grid).to(self.stream)
        return (tokens if self.norm_pre is None else self.norm_pre(tokens).to(self.stream)), grid

    def dense(
        self,
        pixels: Tensor,
        attention_blocks: Collection[int] = (),
        *,
        block_tokens: Collection[int] = (),
        block_attention: Collection[int] = (),
    ) -> DenseFeatures:
        """Run the blocks on normalised pixels ``(B, 3, H, W)``; sides are multiples of the patch size.

        The last block runs only if something of it is asked for. Attention is averaged as it is produced, head by head,
        and only where it is asked for; the other blocks use fused attention and never hold a map.

        Args:
            pixels: See :meth:`normalize`.
            attention_blocks: Blocks before the last whose attention between patches is to be averaged.
            block_tokens: Blocks behind which to keep the tokens, the last one too.
            block_attention: Blocks whose attention to keep, each for itself, the last one too.

        Raises:
            ValueError: there is no such block.
        """
        last = len(self.blocks) - 1
        averaged, kept, shown = set(attention_blocks), set(block_tokens), set(block_attention)
        if not averaged <= set(range(last)):
            raise ValueError(f"attention blocks must be among 0…{last - 1}, not {sorted(averaged)}")
        if not kept | shown <= set(range(last + 1)):
            raise ValueError(f"blocks must be among 0…{last}, not {sorted(kept | shown)}")
        tokens, grid = self.embed(pixels)
        entering = tokens
        total: Tensor | None = None
        stream: dict[int, Tensor] = {}
        maps: dict[int, Tensor] = {}
        for position, block in enumerate(self.blocks):
            if position == last:
                entering = tokens
                if last not in kept | shown:
                    break
            if position in averaged | shown:
                tokens, mean_map = block.run_with_map(tokens)
                if position in averaged:
                    total = self._added(total, mean_map)
                if position in shown:
                    maps[position] = mean_map
            else:
                tokens = block.run(tokens)
            if position in kept:
                stream[position] = tokens
        return DenseFeatures(entering, grid, None if total is None else total / len(averaged), stream, maps)

    def _added(self, total: Tensor | None, mean_map: Tensor) -> Tensor:
        """The running sum of attention between patches, in memory of its own."""
        between = mean_map[:, self.prefix_tokens :, self.prefix_tokens :]
        return between.clone() if total is None else total.add_(between)

    def encode(self, pixels: Tensor) -> Tensor:
        """The model's own image feature ``(B, E)``, not normalised."""
        tokens, _ = self.embed(pixels)
        for block in self.blocks:
            tokens = block.run(tokens)
        return self.pool(tokens)

    def pool(self, tokens: Tensor) -> Tensor:
        """The model's own image feature ``(B, E)`` from the tokens ``(B, N, D)`` behind the last block.

        Raises:
            ValueError: the feature is a class token, which the tower does not have.
        """
        if not self.mean_pool and not self.prefix_tokens:
            raise ValueError("a tower without a class token has no image feature but the mean of its patches")
        if not self.norm_after_pool:
            tokens = self.norm_post(tokens)
        pooled = tokens[:, self.prefix_tokens :].mean(dim=1) if self.mean_pool else tokens[:, 0]
        if self.norm_after_pool:
            pooled = self.norm_post(pooled)
        return pooled @ self.projection


def patch_products(pixels: Tensor, weight: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Every patch of ``(B, 3, H, W)`` times the patch weight ``(D, 3, p, p)``: ``(B, n, D)`` row by row, and the grid.

    A convolution on a CPU. On a GPU a plain product: cuDNN's convolutions round float32 to TF32 unless told otherwise.
    """
    if pixels.device.type == "cpu":
        found = F.conv2d(pixels, weight, stride=weight.shape[-1])
        return found.flatten(2).transpose(1, 2), (found.shape[2], found.shape[3])
    return unfolded_products(pixels, weight)


def unfolded_products(pixels: Tensor, weight: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """:func:`patch_products` as one matrix product."""
    batch, channels, height, width = pixels.shape
    side = weight.shape[-1]
    grid = (height // side, width // side)
    rows = pixels.reshape(batch, channels, grid[0], side, grid[1], side).permute(0, 2, 4, 1, 3, 5)
    return F.linear(rows.reshape(batch, grid[0] * grid[1], -1), weight.flatten(1)), grid


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention result of every head ``(B, heads, N, d)``."""
    if q.device.type != "cpu" or q.dtype is torch.float32:
        return F.scaled_dot_product_attention(q, k, v)
    # PyTorch's fused attention on a CPU is no faster in half precision; plain matrix products are, by two.
    attended = torch.empty_like(v)
    for head in range(q.shape[1]):
        attended[:, head] = attention_map(q[:, head], k[:, head]) @ v[:, head]
    return attended


def attend_with_mean_map(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention result ``(B, heads, N, d)`` and its map averaged over heads ``(B, N, N)``, float32."""
    if q.device.type != "cpu":
        maps = attention_map(q, k)
        return maps @ v, maps.mean(dim=1, dtype=torch.float32)
    # Head by head the map stays in the cache: half the time of all heads at once on a CPU.
    attended = torch.empty_like(v)
    total = torch.zeros(q.shape[0], q.shape[2], k.shape[2], dtype=torch.float32)
    for head in range(q.shape[1]):
        weights = attention_map(q[:, head], k[:, head])
        attended[:, head] = weights @ v[:, head]
        total += weights
    return attended, total / q.shape[1]


def tower_from(
    visual: nn.Module,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    dtype: torch.dtype,
    *,
    half_positions: bool = False,
    lean: bool | None = None,
) -> VisionTower:
    """Take the weights out of open_clip's ``VisionTransformer``; ``half_positions`` as in :class:`VisionTower`.

    ``lean``: in all blocks but the last, norms write half precision and QuickGELU's slope is part of the matrices, so
    that each takes one pass through memory; ``None``: in half precision on a GPU, whose time memory is, except with
    the released rounding.

    Raises:
        WeightsError: the module is something else.
    """
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
        raise WeightsError(f"the vision tower {type(visual).__name__} is not supported; use a ViT such as ViT-B-16")
    source: Any = visual
    if lean is None:
        lean = device.type != "cpu" and dtype is not torch.float32 and not half_positions

    def matrix(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, dtype)

    def vector(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, torch.float32)

    def linear(weight: Tensor, bias: Tensor | None, convert: Callable[[Tensor], Tensor] = matrix) -> Linear:
        return Linear(convert(weight), None if bias is None else convert(bias))

    def norm(module: Any, *, fused: bool = False) -> Norm:
        half = (matrix(module.weight), matrix(module.bias)) if fused else None
        return Norm(vector(module.weight), vector(module.bias), module.eps, half)

    def gain(module: nn.Module) -> Tensor | None:
        gamma = getattr(module, "gamma", None)
        return None if gamma is None else matrix(gamma)

    blocks = []
    for number, module in enumerate(source.transformer.resblocks, start=1):
        if not isinstance(module, ResidualAttentionBlock):
            raise WeightsError(f"the block type {type(module).__name__} is not supported; use a plain ViT")
        # Grad-CAM's weights are small differences in the last attention: rounded there, boxes of CAA come and go.
        last = number == len(source.transformer.resblocks)
        attention = vector if last and device.type == "cpu" else matrix
        # The last block's activations make the maps, and its own code differentiates them.
        fused = lean and not last
        gelu = isinstance(module.mlp.gelu, nn.GELU)
        fold = fused and not gelu
        up, down = (module.mlp.c_fc, module.mlp.c_proj)
        blocks.append(
            Block(
                heads=module.attn.num_heads,
                norm_1=norm(module.ln_1, fused=fused),
                qkv=linear(module.attn.in_proj_weight, module.attn.in_proj_bias, attention),
                out=linear(module.attn.out_proj.weight, module.attn.out_proj.bias, attention),
                scale_1=gain(module.ls_1),
                norm_2=norm(module.ln_2, fused=fused),
                up=linear(*(folded_slope(up.weight, up.bias) if fold else (up.weight, up.bias))),
                activation="gelu" if gelu else "silu" if fold else "quickgelu",
                down=linear(down.weight.detach() / QUICK_GELU_SLOPE if fold else down.weight, down.bias),
                scale_2=gain(module.ls_2),
            )
        )
    return VisionTower(
        patch=source.patch_size[0],
        mean=torch.tensor(mean, device=device).view(3, 1, 1),
        std=torch.tensor(std, device=device).view(3, 1, 1),
        patch_weight=matrix(source.conv1.weight),
        prefix=vector(source.class_embedding)[None],
        positions=vector(source.positional_embedding),
        half_positions=half_positions,
        norm_pre=None if isinstance(source.ln_pre, nn.Identity) else norm(source.ln_pre),
        blocks=tuple(blocks),
        norm_post=norm(source.ln_post),
        mean_pool=source.pool_type == "avg",
        norm_after_pool=bool(source.final_ln_after_pool),
        projection=vector(source.proj),
        dtype=dtype,
        stream=torch.float32 if device.type == "cpu" else dtype,
    )
