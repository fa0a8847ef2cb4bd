"""Gaussian filtering in many dimensions on the permutohedral lattice (Adams, Baek & Davis 2010), in plain torch.

Points are splatted onto the corners of their simplex, the lattice is blurred along its ``d + 1`` directions, and values
are read back at the points: all gathers and scatters over flat arrays, on any device, several images at once. The
weights are those of Kraehenbuehl's C++ code (pydensecrf), so that results agree to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lattice:
    """A lattice built for fixed points; N points, V lattice sites (site 0 is empty ground), d dimensions.

    Attributes:
        sites: ``(N * (d + 1),)`` the site of each corner of each point's simplex.
        weights: ``(N, d + 1)`` barycentric weights of the corners.
        neighbours: ``(d + 1, 2, V)`` the two neighbours of each site along each direction, 0 where there is none.
    """

    sites: Tensor
    weights: Tensor
    neighbours: Tensor

    @property
    def size(self) -> int:
        """Number of sites, ground included."""
        return self.neighbours.shape[-1]

    def filter(self, values: Tensor) -> Tensor:
        """Gaussian-weighted sums ``(N, M)`` of values ``(N, M)`` at all points (not normalised)."""
        points, corners = self.weights.shape
        spread = (values.unsqueeze(1) * self.weights.unsqueeze(-1)).view(points * corners, -1)
        lattice = values.new_zeros(self.size, values.shape[1]).index_add_(0, self.sites, spread)
        lattice[0] = 0
        for before, after in self.neighbours:
            around = lattice.index_select(0, before).add_(lattice.index_select(0, after))
            lattice = lattice.add_(around, alpha=0.5)
            lattice[0] = 0
        gathered = lattice.index_select(0, self.sites).view(points, corners, -1)
        # The blur's total weight, which the C++ code takes out here.
        total = 1 / (1 + 2.0 ** -(corners - 1))
        return torch.einsum("nc,ncm->nm", self.weights, gathered) * total


def build_lattice(features: Tensor, image: Tensor | None = None) -> Lattice:
    """Build the lattice for points ``features`` ``(N, d)`` float32, whose Gaussian has unit standard deviation.

    Args:
        features: Coordinates divided by their standard deviations.
        image: ``(N,)`` index of the image of each point; points of different images never meet.

    Raises:
        ValueError: coordinates are NaN or infinite, or span more sites than 63 bits can number.
    """
    if not torch.isfinite(features).all():
        raise ValueError("coordinates must be finite")
    d = features.shape[1]
    elevated = _elevate(features)
    # The nearest point of the lattice whose coordinates have equal remainders, and the order of the residuals.
    nearest = torch.round(elevated / (d + 1))
    residual = elevated - nearest * (d + 1)
    # The rank of a residual is how many are larger (of equal ones the later counts as smaller). There are few, and
    # comparing all pairs is faster than sorting.
    larger = residual.unsqueeze(1) > residual.unsqueeze(2)
    equal_before = (residual.unsqueeze(1) == residual.unsqueeze(2)).tril(-1)
    rank = (larger | equal_before).sum(dim=2) + nearest.sum(dim=1, keepdim=True).long()
    low, high = rank < 0, rank > d
    base = (nearest.long() + low.long() - high.long()) * (d + 1)
    rank = rank + (d + 1) * (low.long() - high.long())
    weights = _barycentric(elevated, base, rank)
    # Corner k of the simplex: base + k, minus d + 1 on the coordinates whose rank exceeds d - k.
    corner = torch.arange(d + 1, device=rank.device)
    keys = base[:, None, :d] + corner[None, :, None] - (d + 1) * (rank[:, None, :d] > d - corner[None, :, None]).long()
    owner = None if image is None else image.repeat_interleave(d + 1)
    return _number(keys.reshape(-1, d), weights, owner)


def _elevate(features: Tensor) -> Tensor:
    """Coordinates in the hyperplane of zero sum ``(N, d + 1)``, scaled so that the blur has unit deviation."""
    d = features.shape[1]
    index = torch.arange(d, device=features.device, dtype=torch.float32)
    scale = (2 / 3) ** 0.5 * (d + 1) / ((index + 1) * (index + 2)).sqrt()
    scaled = features.float() * scale
    # tail[k] = sum of scaled[k:]
    tail = scaled.flip(1).cumsum(1).flip(1)
    zero = torch.zeros_like(scaled[:, :1])
    after = torch.cat([tail, zero], dim=1)
    before = torch.cat([zero, (index + 1) * scaled], dim=1)
    return after - before


def _barycentric(elevated: Tensor, base: Tensor, rank: Tensor) -> Tensor:
    count = elevated.shape[1]
    share = (elevated - base) / count
    weights = elevated.new_zeros(len(elevated), count + 1)
    weights.scatter_add_(1, count - 1 - rank, share)
    weights.scatter_add_(1, count - rank, -share)
    weights[:, 0] += 1 + weights[:, count]
    return weights[:, :count].contiguous()


def _number(keys: Tensor, weights: Tensor, owner: Tensor | None) -> Lattice:
    """Give every site that occurs a number from 1, and find its neighbours."""
    d = keys.shape[1]
    margin = d + 1
    low = keys.amin(dim=0) - margin
    spans = (keys.amax(dim=0) - low + 1 + margin).tolist()
    images = 1 if owner is None else int(owner.max()) + 1
    room = float(images)
    for span in spans:
        room *= span
    if room >= 2**63:
        raise ValueError("the standard deviations are too small for the image's size")
    strides = [1] * d
    for axis in range(d - 2, -1, -1):
        strides[axis] = strides[axis + 1] * spans[axis + 1]
    stride = torch.tensor(strides, device=keys.device)
    packed = ((keys - low) * stride).sum(dim=1)
    if owner is not None:
        packed += owner * (strides[0] * spans[0])
    unique, sites = torch.unique(packed, return_inverse=True)
    count = len(unique)
    steps = int(stride.sum())
    neighbours = torch.zeros(d + 1, 2, count + 1, dtype=torch.long, device=keys.device)
    for axis in range(d + 1):
        # One step along an axis: -1 on every coordinate, + d on the axis' own; the last axis has no own coordinate.
        step = -steps + (0 if axis == d else (d + 1) * strides[axis])
        for side, offset in enumerate((step, -step)):
            wanted = unique + offset
            found = torch.searchsorted(unique, wanted).clamp_max_(count - 1)
            neighbours[axis, side, 1:] = torch.where(unique[found] == wanted, found + 1, 0)
    return Lattice(sites + 1, weights, neighbours)
