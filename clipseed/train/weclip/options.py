"""Every constant of WeCLIP, and which of them a data set or the released code has otherwise."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from clipseed.defaults import (
    BOX_THRESHOLD,
    CAA_LAYERS,
    COCO_BOX_THRESHOLD,
    CONFIDENCE,
    PAR_ITERATIONS,
    SINKHORN_ROUNDS,
    SPREAD_POWER,
    WECLIP_AFFINITY_WEIGHT,
    WECLIP_BLOCKS,
    WECLIP_COCO_RFM_LAYERS,
    WECLIP_COCO_STEPS,
    WECLIP_CROP,
    WECLIP_DROPOUT,
    WECLIP_HEADS,
    WECLIP_LR,
    WECLIP_RADIUS,
    WECLIP_RFM_LAYERS,
    WECLIP_STEPS,
    WECLIP_TOY_STEPS,
    WECLIP_WARM_UP,
    WECLIP_WEIGHT_DECAY,
    WECLIP_WIDTH,
    PixelStatistics,
    RfmFilter,
)
from clipseed.errors import UsageError
from clipseed.refine.caa import CaaOptions

RELEASED_RFM_FROM = {"voc": 9_144, "coco": 40_000}
"""Steps before the released code switches: a counter of forward passes above 15 000, which on VOC counts validation,
too, and above 40 000."""


TOY: dict[str, Any] = {"crop": 192, "scales": (0.75, 1.25), "width": 128, "warm_up": 20}
"""For the toy world: its images are small, and a CPU is to learn them within minutes."""


@dataclass(frozen=True)
class WeclipOptions:
    """What decides the decoder, besides data, tower and number of steps. Defaults are VOC's.

    Attributes:
        width, blocks, heads, dropout: Of the decoder; ``dropout`` hides whole channels of the fused tokens.
        static_layers: Blocks from the end whose mean attention CAMs spread along at first; as many as there are, if
            there are fewer.
        rfm_layers: Blocks from the end among which the refinement module chooses.
        rfm_filter: How it chooses (:func:`clipseed.train.weclip.refining.agreeing`).
        rfm_from: Steps before it takes over from the mean attention; ``None``: half of all steps.
        box_threshold, rounds, power: Of CAA (:class:`clipseed.refine.caa.CaaOptions`).
        par_iterations: Of the refinement along colours; 0 for none.
        radius, affinity_weight: Of the affinity loss.
        lr, weight_decay, warm_up: Of AdamW and its schedule.
        crop, scales, mirror: Augmentation; see :class:`clipseed.train.augment.Augmentation`.
        statistics: What images are normalised with.
        supervise_padding: Pixels outside of the image get labels and a loss like any other.
        confidence: Least confidence of a given mask's pixel that counts, where scores come with the masks.
        released: Boxes end before the grid's last row and column, probabilities instead of their logarithms are
            differentiated, and maps are normalised twice with 1e-7, as the authors' code does.
    """

    width: int = WECLIP_WIDTH
    blocks: int = WECLIP_BLOCKS
    heads: int = WECLIP_HEADS
    dropout: float = WECLIP_DROPOUT
    static_layers: int = CAA_LAYERS
    rfm_layers: int = WECLIP_RFM_LAYERS
    rfm_filter: RfmFilter = "signed"
    rfm_from: int | None = None
    box_threshold: float = BOX_THRESHOLD
    rounds: int = SINKHORN_ROUNDS
    power: int = SPREAD_POWER
    par_iterations: int = PAR_ITERATIONS
    radius: int = WECLIP_RADIUS
    affinity_weight: float = WECLIP_AFFINITY_WEIGHT
    lr: float = WECLIP_LR
    weight_decay: float = WECLIP_WEIGHT_DECAY
    warm_up: int = WECLIP_WARM_UP
    crop: int = WECLIP_CROP
    scales: tuple[float, float] = (0.5, 2.0)
    mirror: float = 0.5
    statistics: PixelStatistics = "clip"
    supervise_padding: bool = False
    confidence: float = CONFIDENCE
    released: bool = False

    @property
    def caa(self) -> CaaOptions:
        """Constants of spreading."""
        return CaaOptions(self.box_threshold, rounds=self.rounds, power=self.power, released=self.released)

    def confirmed(self, step: int, steps: int) -> bool:
        """Whether the refinement module is on in a step counted from 0."""
        return step >= (steps // 2 if self.rfm_from is None else self.rfm_from)

    def manifest(self) -> dict[str, Any]:
        """Plain data for files."""
        return {**asdict(self), "scales": list(self.scales)}

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            UsageError: naming the option.
        """
        at_least_one = ("width", "blocks", "heads", "static_layers", "rfm_layers", "crop")
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        for name in ("rfm_from", "rounds", "power", "par_iterations", "radius", "warm_up"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 0")
        if self.width % self.heads:
            raise UsageError(f"--width {self.width}: give a multiple of --heads {self.heads}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout {self.dropout}: from 0 to below 1")
        if not 0 < self.lr < 1e3 or not 0 <= self.weight_decay < 1e3 or not 0 <= self.affinity_weight < 1e3:
            raise UsageError("--lr, --weight-decay, --affinity-weight: give ordinary positive numbers")
        if len(self.scales) != 2 or not 0 < self.scales[0] <= self.scales[1] <= 16:
            raise UsageError("--scales: give two factors above 0, the smaller first, such as 0.5,2")
        for name in ("mirror", "box_threshold", "confidence"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: from 0 to 1")


def preset(vocabulary: str, *, released: bool = False) -> dict[str, Any]:
    """Options that the published settings of a vocabulary have otherwise; with ``released`` the authors' code, too."""
    coco = vocabulary.startswith("coco")
    found: dict[str, Any] = {}
    if coco:
        found |= {"rfm_layers": WECLIP_COCO_RFM_LAYERS, "box_threshold": COCO_BOX_THRESHOLD}
    if vocabulary == "toy":
        found |= TOY
    if released:
        found |= {
            "statistics": "imagenet", "supervise_padding": True, "released": True,
            "rfm_from": RELEASED_RFM_FROM["coco" if coco else "voc"],
        }  # fmt: skip
    return found


def default_steps(vocabulary: str) -> int:
    """Steps of the published settings; for the toy world fewer."""
    if vocabulary == "toy":
        return WECLIP_TOY_STEPS
    return WECLIP_COCO_STEPS if vocabulary.startswith("coco") else WECLIP_STEPS
