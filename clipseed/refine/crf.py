"""Fully connected CRF with Gaussian edges (Kraehenbuehl & Koltun 2011): mean field in plain torch, batched.

The energy and the normalisations are pydensecrf's (Potts compatibility, diagonal kernels, symmetric normalisation), so
that published parameters mean what they meant: the posterior agrees with the C++ library's to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipseed.defaults import CrfPreset
from clipseed.refine.permutohedral import build_lattice


@dataclass(frozen=True)
class CrfParameters:
    """Weights and standard deviations of the two kernels.

    Attributes:
        iterations: Mean-field steps.
        smooth_xy, smooth_weight: Position kernel: standard deviation in pixels, and Potts weight.
        colour_xy, colour_rgb, colour_weight: Position-and-colour kernel: pixels, 8-bit levels, Potts weight.
    """

    iterations: int = 10
    smooth_xy: float = 1.0
    smooth_weight: float = 3.0
    colour_xy: float = 67.0
    colour_rgb: float = 3.0
    colour_weight: float = 4.0

    def check(self) -> None:
        """Raise ValueError for values that mean nothing (the C++ library crashes on them)."""
        if not isinstance(self.iterations, int) or not 0 <= self.iterations <= 1000:
            raise ValueError(f"iterations: {self.iterations}; give a number from 0 to 1000")
        for name in ("smooth_xy", "colour_xy", "colour_rgb"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 1e-2 <= value <= 1e5):
                raise ValueError(f"{name.replace('_', '-')}: {value}; give a standard deviation from 0.01 to 100000")
        for name in ("smooth_weight", "colour_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= 1e5):
                raise ValueError(f"{name.replace('_', '-')}: {value}; give a weight from 0 to 100000")


CLIP_ES = CrfParameters()
IRN = CrfParameters(10, 3.0, 3.0, 50.0, 5.0, 10.0)
WECLIP = CrfParameters(10, 3.0, 3.0, 64.0, 5.0, 4.0)
PRESETS: dict[CrfPreset, CrfParameters] = {"clip-es": CLIP_ES, "irn": IRN, "weclip": WECLIP}
"""IRN's: the parameters of Ahn et al.'s released code, which most later work copied."""


def crf_parameters(preset: CrfPreset, **changed: float | None) -> CrfParameters:
    """A preset with some values changed (``None`` keeps the preset's)."""
    return replace(PRESETS[preset], **{name: value for name, value in changed.items() if value is not None})  # type: ignore[arg-type]


def dense_crf(unaries: Sequence[Tensor], images: Sequence[Tensor], parameters: CrfParameters = CLIP_ES) -> list[Tensor]:
    """Posterior of a batch of images.

    Args:
        unaries: One ``(M, H, W)`` per image: negative log probabilities; M and the sizes may differ.
        images: One uint8 ``(H, W, 3)`` per image, in any channel order.
        parameters: Kernels and steps.

    Returns:
        One ``(M, H, W)`` float32 per image, summing to 1 over M.

    Raises:
        ValueError: parameters or shapes are impossible.
    """
    parameters.check()
    for unary, image in zip(unaries, images, strict=True):
        if image.dtype != torch.uint8 or image.shape != (*unary.shape[1:], 3):
            raise ValueError(f"an image {tuple(image.shape)} does not belong to scores {tuple(unary.shape)}")
    device = unaries[0].device
    most = max(len(unary) for unary in unaries)
    # Images stand one behind the other as points (N, M); labels an image does not have are impossible.
    energy = torch.cat(
        [
            torch.nn.functional.pad(unary.float().flatten(1).T, (0, most - len(unary)), value=float("inf"))
            for unary in unaries
        ]
    )
    owner = torch.cat([torch.full((u[0].numel(),), k, device=device) for k, u in enumerate(unaries)])
    places = torch.cat([_places(unary) for unary in unaries])
    colours = torch.cat([image.reshape(-1, 3) for image in images]).to(device).float()
    kernels = []
    if parameters.smooth_weight:
        kernels.append((parameters.smooth_weight, _Kernel(places / parameters.smooth_xy, owner)))
    if parameters.colour_weight:
        features = torch.cat([places / parameters.colour_xy, colours / parameters.colour_rgb], dim=1)
        kernels.append((parameters.colour_weight, _Kernel(features, owner)))
    posterior = (-energy).softmax(dim=1)
    for _ in range(parameters.iterations):
        message = -energy
        for weight, kernel in kernels:
            message = message + weight * kernel(posterior)
        posterior = message.softmax(dim=1)
    found, start = [], 0
    for unary in unaries:
        count = unary[0].numel()
        found.append(posterior[start : start + count, : len(unary)].T.reshape(unary.shape).contiguous())
        start += count
    return found


def _places(unary: Tensor) -> Tensor:
    height, width = unary.shape[1:]
    rows = torch.arange(height, device=unary.device, dtype=torch.float32)
    columns = torch.arange(width, device=unary.device, dtype=torch.float32)
    return torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)], dim=-1).reshape(-1, 2)


class _Kernel:
    """A Gaussian kernel between all points of an image, normalised symmetrically: ``D^-1/2 K D^-1/2``."""

    def __init__(self, features: Tensor, owner: Tensor) -> None:
        self._lattice = build_lattice(features, owner)
        total = self._lattice.filter(torch.ones(len(features), 1, device=features.device))
        self._scale = 1 / (total + 1e-20).sqrt()

    def __call__(self, values: Tensor) -> Tensor:
        return self._lattice.filter(values * self._scale) * self._scale


def clip_es_unary(probabilities: npt.NDArray[np.floating], *, released: bool = False) -> npt.NDArray[np.float32]:
    """``-log(clip(p, 1e-5, 1))`` ``(M, H, W)``; ``released``: in half precision, as the released code computes it."""
    kind = np.float16 if released else np.float32
    clipped = np.clip(probabilities.astype(kind), 1e-5, 1.0)
    unary: npt.NDArray[np.float32] = (-np.log(clipped)).astype(np.float32)
    return unary


def clip_es_colours(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The image ``(H, W, 3)`` RGB as the released code hands it to the CRF.

    BGR, minus the mean of ImageNet, cast to 8 bits: negative values wrap around modulo 256 after truncation towards
    zero, which tears apart colours on either side of the mean. Done explicitly, because the cast is undefined in C.
    """
    shifted = image[..., ::-1].astype(np.float32) - np.array([104.008, 116.669, 122.675], np.float32)
    wrapped: npt.NDArray[np.uint8] = (np.trunc(shifted).astype(np.int64) % 256).astype(np.uint8)
    return wrapped
