"""``TextBridge``: a stream of convolutions and a stream of class tokens, tied by a bridge in both directions.

After the description in Jin & Yang 2023; the blocks follow Mobile-Former (Chen et al., CVPR 2022), whose tokens are
learned vectors, where these are the texts of the classes. Hyperparameters are ours.

Shapes: B images, K texts, D width of the text features, C width of the map, d width of the tokens, N = h * w.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipseed.defaults import BridgeDirection, TokenMixing

STEP = 0.1
"""How far each residual of the tokens goes at first: training begins near CLIP's text space."""
TEXT_STEP = 1e-4
"""The same for what comes back to the text features (DenseCLIP's gamma)."""


def cosines(pixels: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine ``(B, K, h, w)`` of pixel embeddings ``(B, D, h, w)`` and texts ``(B, K, D)`` or ``(K, D)``, in float32.

    Returns:
        Cosines, and both embeddings with length 1.
    """
    with torch.autocast(pixels.device.type, enabled=False):  # lengths need float32
        unit_pixels = F.normalize(pixels.float(), dim=1)
        unit_text = F.normalize(text.float(), dim=-1)
        equation = "kd,bdhw->bkhw" if unit_text.ndim == 2 else "bkd,bdhw->bkhw"
        return torch.einsum(equation, unit_text, unit_pixels), unit_pixels, unit_text


class _Residual(nn.Module):
    """``z + s LN(x)`` with a learned scalar: the tokens keep their geometry, which a norm behind the sum would not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.step = nn.Parameter(torch.tensor(STEP))

    def forward(self, tokens: Tensor, change: Tensor) -> Tensor:
        return tokens + self.step * self.norm(change)  # type: ignore[no-any-return]


class VisionToText(nn.Module):
    """Tokens ask, pixels answer: queries from tokens, keys and values are the map itself, split by channels."""

    def __init__(self, width: int, token_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(token_width, width)
        self.out = nn.Linear(width, token_width)
        self.residual = _Residual(token_width)

    def forward(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """Tokens ``(B, K, d)`` after a look at pixels ``(B, N, C)``."""
        values = _split(pixels, self.heads)
        seen = F.scaled_dot_product_attention(_split(self.query(tokens), self.heads), values, values)
        return self.residual(tokens, self.out(_merged(seen)))  # type: ignore[no-any-return]


class TokenMixer(nn.Module):
    """Self-attention among class tokens (queries projected, keys and values not), then a small MLP."""

    def __init__(self, width: int, heads: int, ffn: int, mixing: TokenMixing) -> None:
        super().__init__()
        self.heads, self.mixing = heads, mixing
        if mixing == "attn":
            self.query = nn.Linear(width, width)
            self.out = nn.Linear(width, width)
            self.mixed = _Residual(width)
        self.up = nn.Linear(width, ffn * width)
        self.down = nn.Linear(ffn * width, width)
        self.residual = _Residual(width)

    def forward(self, tokens: Tensor, allowed: Tensor | None) -> Tensor:
        """Tokens ``(B, K, d)``; nobody attends to those that are not ``allowed`` ``(B, K)``."""
        if self.mixing == "attn":
            keys = _split(tokens, self.heads)
            mask = None if allowed is None else allowed[:, None, None, :]
            seen = F.scaled_dot_product_attention(_split(self.query(tokens), self.heads), keys, keys, attn_mask=mask)
            tokens = self.mixed(tokens, self.out(_merged(seen)))
        return self.residual(tokens, self.down(F.gelu(self.up(tokens))))  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """1x1 to a wider map, 3x3 for each channel, 1x1 back, batch norms, hard-swish; stride 1."""

    def __init__(self, width: int, expand: int, dilation: int) -> None:
        super().__init__()
        inner = expand * width
        self.layers = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.Hardswish(),
            nn.Conv2d(inner, inner, 3, padding=dilation, dilation=dilation, groups=inner, bias=False),
            nn.BatchNorm2d(inner), nn.Hardswish(),
            nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, h, w)`` to the same."""
        return x + self.layers(x)  # type: ignore[no-any-return]


class TextToVision(nn.Module):
    """Pixels ask, tokens answer: queries are the map itself, keys and values are projected from tokens."""

    def __init__(self, width: int, token_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.key = nn.Linear(token_width, width)
        self.value = nn.Linear(token_width, width)

    def forward(self, pixels: Tensor, tokens: Tensor, allowed: Tensor | None) -> Tensor:
        """Pixels ``(B, N, C)`` after a look at tokens ``(B, K, d)`` that are ``allowed`` ``(B, K)``."""
        keys, values = _split(self.key(tokens), self.heads), _split(self.value(tokens), self.heads)
        mask = None if allowed is None else allowed[:, None, None, :]
        seen = F.scaled_dot_product_attention(_split(pixels, self.heads), keys, values, attn_mask=mask)
        return pixels + _merged(seen)


class BridgeBlock(nn.Module):
    """Vision to text, tokens among themselves, convolutions, text to vision."""

    def __init__(
        self, width: int, token_width: int, heads: int, ffn: int, expand: int, mixing: TokenMixing,
        direction: BridgeDirection, dilation: int,
    ) -> None:  # fmt: skip
        super().__init__()
        seeing, telling = direction in ("both", "v2t"), direction in ("both", "t2v")
        self.vision_to_text = VisionToText(width, token_width, heads) if seeing else None
        self.mixer = TokenMixer(token_width, heads, ffn, mixing)
        self.convolutions = InvertedResidual(width, expand, dilation)
        self.text_to_vision = TextToVision(width, token_width, heads) if telling else None

    def forward(self, x: Tensor, tokens: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map ``(B, C, h, w)`` and tokens ``(B, K, d)``, both updated."""
        if self.vision_to_text is not None:
            tokens = self.vision_to_text(tokens, x.flatten(2).transpose(1, 2))
        tokens = self.mixer(tokens, allowed)
        x = self.convolutions(x)
        if self.text_to_vision is not None:
            told = self.text_to_vision(x.flatten(2).transpose(1, 2), tokens, allowed)
            x = told.transpose(1, 2).reshape(x.shape)
        return x, tokens


class TextBridge(nn.Module):
    """Pixel embeddings and texts that have seen each other, and how much they have in common.

    No positions are added to the tokens, so permuting the texts permutes the scores.

    Args:
        in_channels: Of the map.
        text_dim: Width D of the text features.
        num_blocks: Blocks; every second one has a dilation of 2.
        width: Width C of the map inside, a multiple of ``heads``.
        token_width: Width d of the tokens, a multiple of ``heads``.
        heads: Of all attention.
        ffn, expand: Widening of the tokens' MLP and of the convolutions.
        token_mixing: ``attn`` lets classes compete; ``none`` makes a class's score independent of the other texts'
            presence among the tokens.
        tau: Temperature: logits are ``score / tau``.
        direction: Which way the bridge is open: ``both``, ``v2t``, ``t2v`` or ``none``.
    """

    def __init__(
        self, in_channels: int, text_dim: int, num_blocks: int = 3, width: int = 256, token_width: int = 256,
        heads: int = 4, ffn: int = 2, expand: int = 2, token_mixing: TokenMixing = "attn", tau: float = 0.07,  # noqa: S107
        direction: BridgeDirection = "both",
    ) -> None:  # fmt: skip
        super().__init__()
        self.tau = tau
        self.enter = nn.Sequential(nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.enter_text = nn.Sequential(nn.Linear(text_dim, token_width), nn.LayerNorm(token_width))
        self.blocks = nn.ModuleList(
            BridgeBlock(width, token_width, heads, ffn, expand, token_mixing, direction, 1 + k % 2)
            for k in range(num_blocks)
        )
        self.leave = nn.Conv2d(width, text_dim, 1)
        self.leave_text = nn.Linear(token_width, text_dim)
        self.gamma = nn.Parameter(torch.full((text_dim,), TEXT_STEP))

    def forward(self, feat: Tensor, text: Tensor, class_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Fuse.

        Args:
            feat: ``(B, in_channels, h, w)``.
            text: ``(K, D)``; no gradient goes there.
            class_mask: ``(B, K)`` booleans, at least one in each row: texts that pixels may attend to.

        Returns:
            ``score`` ``(B, K, h, w)`` cosines; ``pix`` ``(B, D, h, w)`` and ``text`` ``(B, K, D)``, whose cosines they
            are, of length 1, all float32; and ``feat`` ``(B, width, h, w)``.
        """
        text = text.detach()
        x = self.enter(feat)
        tokens = self.enter_text(text).expand(len(feat), -1, -1)
        for block in self.blocks:
            x, tokens = block(x, tokens, class_mask)
        updated = F.normalize(text.float(), dim=-1) + self.gamma * self.leave_text(tokens).float()
        score, pix, unit = cosines(self.leave(x), updated)
        return {"score": score, "feat": x, "text": unit, "pix": pix}


def _split(x: Tensor, heads: int) -> Tensor:
    """``(B, n, C)`` to ``(B, heads, n, C / heads)``."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    """``(B, heads, n, c)`` to ``(B, n, heads c)``."""
    return x.transpose(1, 2).flatten(2)
