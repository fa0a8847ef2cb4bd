"""What all work has in common that takes images through CLIP: the model, loaded, and how images reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from clipseed.clip.model import FrozenClip, same_model, weights_location
from clipseed.device import pick_device
from clipseed.runtime.images import (
    LoadedViews,
    batches_in_flight,
    decode_ahead,
    default_workers,
    token_budget,
    unit_size_for,
)
from clipseed.runtime.run import RunOptions
from clipseed.runtime.stream import BatchSize, Loaded
from clipseed.runtime.work import Work
from clipseed.store.manifest import Manifest

T = TypeVar("T", bound=Loaded)
R = TypeVar("R")


@dataclass(frozen=True)
class ClipChoice:
    """Which CLIP a run uses, and how it runs; arguments of :meth:`~clipseed.clip.model.FrozenClip.load`."""

    model: str | None
    weights: str
    run: RunOptions
    released_rounding: bool = False

    def load(self) -> FrozenClip:
        """Load it."""
        return FrozenClip.load(
            self.model, self.weights, self.run.device, self.run.precision, released_rounding=self.released_rounding
        )

    def known(self, there: Manifest | None) -> dict[str, Any] | None:
        """What :meth:`ClipWork.about` would say, if the output with this manifest was made with the same model."""
        if self.run.overwrite or there is None or not isinstance(there.get("model"), dict):
            return None
        model, device = there["model"], pick_device(self.run.device)
        if not same_model(
            model, self.model, self.weights, device, self.run.precision, released_rounding=self.released_rounding
        ):
            return None
        return {
            "model": model,
            "weights": weights_location(self.weights),
            "device": str(device),
            "unit": unit_size_for(device),
        }


def about_clip(clip: FrozenClip) -> dict[str, Any]:
    """What work says of its CLIP: model, where its weights are, device, and images per unit."""
    device = clip.tower.device
    return {
        "model": clip.manifest(),
        "weights": clip.location,
        "device": str(device),
        "unit": unit_size_for(device),
    }


class TokenWork(Work[T, R]):
    """Work of a network whose cost is counted in tokens: how many images are decoded ahead and computed together."""

    def __init__(self, device: torch.device, run: RunOptions) -> None:
        super().__init__()
        self.workers = run.workers if run.workers is not None else default_workers(device)
        self.batch = BatchSize(run.batch_size, token_budget(device))
        self.ahead = decode_ahead(device, self.workers) + 2 * (run.batch_size or 0)
        self.queue = batches_in_flight(device)


class ClipWork(TokenWork[LoadedViews, R]):
    """Images, as views of whole patches, to anything that CLIP says of them."""

    lanes = 2

    def __init__(self, choice: ClipChoice, clip: FrozenClip | None = None) -> None:
        self.clip = clip or choice.load()
        super().__init__(self.clip.tower.device, choice.run)

    def about(self) -> dict[str, Any]:
        """As :func:`about_clip`."""
        return about_clip(self.clip)
