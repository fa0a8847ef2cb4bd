"""What a network costs: parameters, and multiply-adds of one image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(value.numel() for value in module.parameters())


def multiply_adds(call: Callable[[], Any]) -> int:
    """Multiply-adds of convolutions and matrix products in a call, attention and backward passes included."""
    # The fused attention of a CPU would count as nothing.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return int(counter.get_total_flops()) // 2
