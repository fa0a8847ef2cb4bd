"""Every constant of the bridge and of the heads beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from clipseed.defaults import (
    BRIDGE_BLOCKS,
    BRIDGE_CROP,
    BRIDGE_HEADS,
    BRIDGE_LEAST_LR,
    BRIDGE_LR,
    BRIDGE_SCORE_WEIGHT,
    BRIDGE_WARM_UP,
    BRIDGE_WEIGHT_DECAY,
    BRIDGE_WIDTH,
    CONFIDENCE,
    FPN_DROPOUT,
    FPN_WIDTH,
    AbsentPolicy,
    BridgeDirection,
    BridgeLoss,
    HeadName,
    TokenMixing,
)
from clipseed.errors import UsageError
from clipseed.train.bridge.backbone import COARSEST

LEAST_CROP = 2 * COARSEST
TOY: dict[str, Any] = {"crop": 128, "scales": (0.75, 1.25), "fpn_width": 64, "lr": 1e-3}
"""For the toy world: its images are small, and a CPU is to learn them from nothing within minutes."""


@dataclass(frozen=True)
class BridgeOptions:
    """What decides a segmenter, besides backbone, texts and steps; DenseCLIP's settings where it has them.

    Attributes:
        head: ``bridge``, ``fpn``, ``lseg`` or ``denseclip``.
        blocks, width, token_width, heads, token_mixing, direction: Of the bridge, see
            :class:`~clipseed.train.bridge.text_bridge.TextBridge`; width and heads of DenseCLIP's decoder, too.
        fpn_width, dropout: Of the FPN; a width of 0 makes the bridge's scores the prediction.
        loss: ``ce``; for soft labels also ``collision`` or ``soft-ce``.
        score_weight: Of the loss of scores by text beside the prediction.
        absent: What becomes of classes that an image's labels do not name: see
            :func:`~clipseed.train.bridge.losses.without_absent`; ``mask`` hides their logits, too.
        mask_text: In training, pixels attend to the texts of an image's own classes only.
        confidence: Least confidence of a pixel that counts, where scores come with the masks.
        lr, weight_decay, warm_up: Of AdamW and its schedule; ``warm_up`` of ``None`` is 1500 steps, at most a tenth of
            all.
        backbone_lr: Factor on the backbone's learning rate.
        crop, scales, mirror: Augmentation; see :class:`clipseed.train.augment.Augmentation`.
        photometric: Vary brightness, contrast and saturation.
    """

    head: HeadName = "bridge"
    blocks: int = BRIDGE_BLOCKS
    width: int = BRIDGE_WIDTH
    token_width: int = BRIDGE_WIDTH
    heads: int = BRIDGE_HEADS
    token_mixing: TokenMixing = "attn"  # noqa: S105
    direction: BridgeDirection = "both"
    fpn_width: int = FPN_WIDTH
    dropout: float = FPN_DROPOUT
    loss: BridgeLoss = "ce"
    score_weight: float = BRIDGE_SCORE_WEIGHT
    absent: AbsentPolicy = "ignore"
    mask_text: bool = False
    confidence: float = CONFIDENCE
    lr: float = BRIDGE_LR
    backbone_lr: float = 1.0
    weight_decay: float = BRIDGE_WEIGHT_DECAY
    warm_up: int | None = None
    crop: int = BRIDGE_CROP
    scales: tuple[float, float] = (0.5, 2.0)
    mirror: float = 0.5
    photometric: bool = True

    def warm_up_of(self, steps: int) -> int:
        """Steps of the warm-up."""
        return min(BRIDGE_WARM_UP, steps // 10) if self.warm_up is None else self.warm_up

    @property
    def least(self) -> float:
        """Where the learning rate ends, as a share of the full one."""
        return min(1.0, BRIDGE_LEAST_LR / self.lr)

    def manifest(self) -> dict[str, Any]:
        """Plain data for files; :func:`read_options` reads it back."""
        return {**asdict(self), "scales": list(self.scales)}

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            UsageError: naming the option.
        """
        for name in ("blocks", "width", "token_width", "heads"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        for name in ("width", "token_width"):
            if getattr(self, name) % self.heads:
                raise UsageError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: give a multiple of --heads {self.heads}"
                )
        if self.crop % COARSEST or self.crop < LEAST_CROP:
            raise UsageError(
                f"--crop {self.crop}: give a multiple of {COARSEST} pixels, the backbone's coarsest stride, from "
                f"{LEAST_CROP}"
            )
        if self.fpn_width < (0 if self.head == "bridge" else 1):
            raise UsageError(f"--fpn-width {self.fpn_width}: only --head bridge goes without an FPN")
        if not 0 < self.lr < 1e3 or not 0 <= self.weight_decay < 1e3 or not 0 <= self.score_weight < 1e3:
            raise UsageError("--lr, --weight-decay, --score-weight: give ordinary positive numbers")
        if not 0 <= self.backbone_lr < 1e3 or (self.warm_up or 0) < 0:
            raise UsageError("--backbone-lr, --warm-up: at least 0")
        if len(self.scales) != 2 or not 0 < self.scales[0] <= self.scales[1] <= 16:
            raise UsageError("--scales: give two factors above 0, the smaller first, such as 0.5,2")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout {self.dropout}: from 0 to below 1")
        for name in ("mirror", "confidence"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"--{name} {getattr(self, name)}: from 0 to 1")


def read_options(data: Mapping[str, Any]) -> BridgeOptions:
    """Options out of :meth:`BridgeOptions.manifest`.

    Raises:
        TypeError, KeyError: they are none.
    """
    unknown = sorted(data.keys() - {item.name for item in fields(BridgeOptions)})
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}")
    return BridgeOptions(**{**data, "scales": tuple(data["scales"])})


def preset(vocabulary: str) -> dict[str, Any]:
    """Options that a vocabulary has otherwise."""
    return TOY if vocabulary == "toy" else {}
