"""Settings of the mask generator, and the two published sets of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from clipseed.errors import UsageError

LEVELS = 3
"""Masks that SAM gives for one prompt: sub-part, part, whole."""


@dataclass(frozen=True)
class ProposalOptions:
    """How masks are proposed. The defaults are those of the stock ``SamAutomaticMaskGenerator``.

    Attributes:
        points_per_side: Points along one side of the grid over the whole image.
        points_per_batch: Prompts decoded at once; decides memory and speed only.
        pred_iou_threshold: Masks need a larger predicted IoU (plus ``level_bonus``); 0 or less: no filter.
        stability_threshold: Masks need at least this stability; 0 or less: no filter.
        stability_offset: Stability is the area above the mask threshold plus this, over the area above it minus this.
        box_nms_threshold: Of two masks of one crop whose boxes overlap by a larger IoU, the better stays.
        crop_layers: Layer i adds ``4^i`` crops of the image; 0 is the whole image only.
        crop_nms_threshold: As ``box_nms_threshold``, between crops: the mask of the smaller crop stays.
        crop_overlap: Overlap of the first layer's crops, as a share of the image's shorter side.
        crop_points_divisor: Layer i has ``points_per_side / divisor^i`` points along a side.
        min_region_area: Holes and islands of fewer pixels are removed; 0: none.
        level_bonus: Added by level (sub-part, part, whole) to the predicted IoU, for its threshold only.
        nms_level_bonus: Added by level to the predicted IoU, for the order of NMS within a crop only.
        level_filter: A finer mask stays only if each kept mask of the coarser levels covers less than this share of
            it; ``None``: no filter.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    pred_iou_threshold: float = 0.88
    stability_threshold: float = 0.95
    stability_offset: float = 1.0
    box_nms_threshold: float = 0.7
    crop_layers: int = 0
    crop_nms_threshold: float = 0.7
    crop_overlap: float = 512 / 1500
    crop_points_divisor: int = 1
    min_region_area: int = 0
    level_bonus: tuple[float, float, float] = (0.0, 0.0, 0.0)
    nms_level_bonus: tuple[float, float, float] = (0.0, 0.0, 0.0)
    level_filter: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("points_per_side", 1), ("points_per_batch", 1), ("crop_layers", 0),
                            ("crop_points_divisor", 1), ("min_region_area", 0), ("stability_offset", 0)):  # fmt: skip
            if not getattr(self, name) >= least:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 <= self.crop_overlap < 1:
            raise UsageError(f"crop_overlap is {self.crop_overlap}; it must be at least 0 and less than 1")
        for name in ("level_bonus", "nms_level_bonus"):
            if len(getattr(self, name)) != LEVELS:
                raise UsageError(f"{name} needs {LEVELS} numbers: for sub-parts, parts and wholes")
        last = self.points_of_layer(self.crop_layers)
        if last < 1:
            raise UsageError(
                f"crop layer {self.crop_layers} would have no points: {self.points_per_side} points per side divided "
                f"by {self.crop_points_divisor}^{self.crop_layers}; lower crop_points_divisor or crop_layers"
            )

    def points_of_layer(self, layer: int) -> int:
        """Points along one side of a crop of this layer."""
        return int(self.points_per_side / self.crop_points_divisor**layer)

    def manifest(self) -> dict[str, Any]:
        """Plain description for output files: everything that decides the masks."""
        return {name: value for name, value in asdict(self).items() if name != "points_per_batch"}


STOCK = ProposalOptions()
"""The stock generator's defaults."""

FMA = ProposalOptions(
    pred_iou_threshold=0.86,
    stability_threshold=0.92,
    crop_layers=1,
    crop_points_divisor=2,
    min_region_area=100,
    level_bonus=(0.0, 0.0, 0.1),
    nms_level_bonus=(0.0, 0.0, 1.0),
    level_filter=0.3,
)
"""FMA-WSSS (arXiv 2312.03585): more wholes, wholes first, and parts only where no whole is."""
