"""Training in several processes under torchrun: who this one is, and what they tell each other.

Gradients are averaged after the backward pass, all in one message. That needs no wrapper around anybody's model, so a
trainer is written as if it were alone; what is learned here is small beside the frozen towers.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Team:
    """The processes that train one model together; alone by default."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the mean of all gradients. What got none anywhere keeps none."""
        if self.count == 1:
            return
        device = parameters[0].device
        used = torch.tensor([float(value.grad is not None) for value in parameters], device=device)
        flat = [(value.grad if value.grad is not None else torch.zeros_like(value)).flatten() for value in parameters]
        message = torch.cat([*(gradient.float() for gradient in flat), used])
        dist.all_reduce(message)
        parts = torch.split(message, [*(len(gradient) for gradient in flat), len(parameters)])
        for value, total, users in zip(parameters, parts, parts[-1].tolist(), strict=False):
            if users:
                mean = (total / self.count).view(value.shape).to(value.dtype)
                value.grad = mean if value.grad is None else value.grad.copy_(mean)

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.count > 1:
            dist.barrier()

    def average(self, values: Tensor) -> Tensor:
        """Mean of a tensor over all processes."""
        if self.count > 1:
            dist.all_reduce(values)
        return values / self.count

    def copy_from_first(self, module: nn.Module) -> None:
        """Make parameters and buffers those of the first process, to the bit."""
        if self.count > 1:
            for value in module.state_dict().values():
                dist.broadcast(value, 0)

    def total(self, count: Tensor) -> Tensor:
        """A count over all processes, without gradient."""
        count = count.detach().clone()
        if self.count > 1:
            dist.all_reduce(count)
        return count

    def mean(self, part: Tensor, count: Tensor) -> Tensor:
        """For means over pixels, or over classes, rather than images: of which processes have different numbers.

        Args:
            part: This process's sum.
            count: Of how many values.

        Returns:
            What averages over the processes to the mean that one process has of all images; 0 of no values.
        """
        return part * self.count / self.total(count).clamp(min=1)


ALONE = Team()


def current_team() -> Team:
    """The processes that this one trains with, once they have met (:func:`joined`); alone before."""
    return Team(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else Team()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Team]:
    """Meet the other processes of the same torchrun; alone where nothing says otherwise."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Team()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index)
    # Validation runs in one process; the others must not give up waiting.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    try:
        yield (team := current_team())
        # Who leaves while others still talk ends, now and then, in an abort of gloo's threads (torch 2.14).
        team.wait()
        time.sleep(0.5)
    finally:
        dist.destroy_process_group()
