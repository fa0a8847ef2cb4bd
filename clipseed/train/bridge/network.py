"""Backbone, head and cached texts: what a file of ``train bridge`` holds, and what it segments with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipseed.errors import UsageError, WeightsError
from clipseed.train.bridge.backbone import COARSEST, Backbone, make_backbone
from clipseed.train.bridge.bridge_head import BridgeHead
from clipseed.train.bridge.denseclip import DenseclipHead
from clipseed.train.bridge.fpn import FpnHead
from clipseed.train.bridge.head import HeadOutput
from clipseed.train.bridge.lseg import LsegHead
from clipseed.train.bridge.options import BridgeOptions, read_options
from clipseed.weights import check_fit


class TextSegmenter(nn.Module):
    """What is trained and kept: the texts are a buffer, so that no CLIP is needed to predict.

    Args:
        backbone: Gives the maps.
        text: ``(1 + K, D)`` of length 1, background first.
        options: Which head.
    """

    text: Tensor

    def __init__(self, backbone: Backbone, text: Tensor, options: BridgeOptions) -> None:
        super().__init__()
        self.backbone = backbone
        self.head: nn.Module = make_head(backbone.channels, len(text), text.shape[1], options)
        self.register_buffer("text", text)
        self.to(memory_format=torch.channels_last)  # depthwise convolutions are faster so, on a CPU too

    def forward(self, images: Tensor, allowed: Tensor | None = None) -> HeadOutput:
        """Logits of RGB images ``(B, 3, H, W)`` from 0 to 255; see :class:`~clipseed.train.bridge.head.Head`."""
        return self.head(self._levels(images), self.text, allowed)  # type: ignore[no-any-return]

    def by_text(self, images: Tensor, text: Tensor) -> Tensor | None:
        """Logits by texts ``(K, D)`` of any classes; ``None`` where the head cannot."""
        head: Any = self.head
        return head.by_text(self._levels(images), text)  # type: ignore[no-any-return]

    def _levels(self, images: Tensor) -> list[Tensor]:
        return self.backbone(images.contiguous(memory_format=torch.channels_last))  # type: ignore[no-any-return]


def make_head(channels: list[int], classes: int, text_dim: int, options: BridgeOptions) -> nn.Module:
    """The head that options name; ``classes`` with the background."""
    width, dropout = options.fpn_width, options.dropout
    if options.head == "fpn":
        return FpnHead(channels, classes, width, dropout)
    if options.head == "lseg":
        return LsegHead(channels, text_dim, width, dropout)
    if options.head == "denseclip":
        return DenseclipHead(channels, classes, text_dim, width, dropout, options.width, options.heads)
    return BridgeHead(
        channels, classes, text_dim, width, dropout, num_blocks=options.blocks, width=options.width,
        token_width=options.token_width, heads=options.heads, token_mixing=options.token_mixing,
        direction=options.direction,
    )  # fmt: skip


def fresh_segmenter(
    backbone: str, text: Tensor, options: BridgeOptions, seed: int, weights: Path | None = None
) -> TextSegmenter:
    """A new one, whose random weights follow from the seed; torch's generator is left as it was.

    Raises:
        UsageError, WeightsError: see :func:`~clipseed.train.bridge.backbone.make_backbone`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TextSegmenter(make_backbone(backbone, weights), text, options)


class BridgeNetwork:
    """A :class:`~clipseed.train.inference.Network`.

    Args:
        module: Trained.
        device: Where it computes.
        other: Texts ``(1 + K, D)`` of other classes than the module was trained with, which it then scores by text.
        about: What describes it in manifests.
        dtype: In which convolutions and products are computed; normalisation and logits are float32.
    """

    def __init__(
        self, module: TextSegmenter, device: torch.device, about: Mapping[str, Any], other: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.module, self._device, self._about = module.to(device), device, dict(about)
        self._dtype = dtype
        self._other = None if other is None else other.to(device)

    @property
    def patch(self) -> int:
        """The coarsest stride."""
        return COARSEST

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    def describe(self) -> dict[str, Any]:
        """Backbone and head, whose weights are the segmenter's own; with other words, the CLIP that read them."""
        return dict(self._about)

    def logits(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` from 0 to 255 to ``(B, K, h, w)``, float32; batch norms as trained, without dropout."""
        training = self.module.training
        self.module.eval()
        half = self._dtype is not torch.float32
        with torch.autocast(self._device.type, self._dtype if half else torch.bfloat16, enabled=half):
            found = self.module(images).logits if self._other is None else self.module.by_text(images, self._other)
        assert isinstance(found, Tensor)
        self.module.train(training)
        return found.float()


def refuse_other_text(module: TextSegmenter, text: Tensor, path: Path) -> None:
    """Refuse texts that a segmenter cannot be asked with.

    Raises:
        UsageError: its head does not score by text, or texts are of another width.
    """
    with torch.no_grad():
        probe = torch.zeros(1, 3, 2 * COARSEST, 2 * COARSEST)
        if module.eval().by_text(probe, module.text) is None:
            raise UsageError(
                f"--classes: {path} has a plain FPN head, whose last layer has one output for each class it was "
                "trained on and never reads a text; other words need --head bridge, lseg or denseclip"
            )
    if text.shape[1] != module.text.shape[1]:
        raise UsageError(
            f"--classes: the CLIP's text features have {text.shape[1]} numbers, {path} was trained on "
            f"{module.text.shape[1]}; name the CLIP it was trained with (--model, --weights)"
        )


def restored(weights: Mapping[str, Tensor], about: Mapping[str, Any], path: Path) -> TextSegmenter:
    """A segmenter out of a file's weights and description; neither CLIP nor open_clip is needed.

    Raises:
        WeightsError: they do not fit.
    """
    try:
        backbone, options, text = about["network"]["backbone"], read_options(about["options"]), weights["text"]
        module = TextSegmenter(make_backbone(backbone), F.normalize(text.float(), dim=-1), options)
    except UsageError as error:
        raise WeightsError(f"{path}: its backbone cannot be made by this timm. {error}") from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise WeightsError(f"{path}: its description of the network cannot be read ({error})") from error
    check_fit(weights, module.state_dict(), path, "it is damaged, or was made by another version of timm")
    module.load_state_dict(dict(weights))
    return module
