"""Which type ``--precision auto`` stands for: a rule on device, model and processor, without timing anything.

On a CPU bfloat16 is faster only where the processor multiplies it (AVX512-BF16, AMX); elsewhere PyTorch converts back
and forth and is slower than in float32. One thread of an AMD EPYC with AVX512-BF16, a block in float32 beside bfloat16:

| width | 200 tokens | 737 tokens (500x375, patch 16) |
| --- | --- | --- |
| 192 | 1.8 x | 2.1 x |
| 384 | 2.5 x | 2.7 x |
| 768 | 3.1 x | 2.8 x |

Models narrower than :data:`LEAST_WIDTH` stay in float32: what they cost is little, and the numbers of the built-in toy
(width 192) are then the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

LEAST_WIDTH = 384
"""Token width from which a CPU with the instructions computes in bfloat16."""

_FAST_BF16 = ("avx512_bf16", "amx_tile")
"""ARM processors report bfloat16 too, but nobody has measured the maps there; ``--precision bf16`` asks for it."""


def automatic_dtype(device: torch.device, width: int | None = None, *, released_rounding: bool = False) -> torch.dtype:
    """What ``auto`` is: the same on every run of one machine.

    Args:
        device: Where the vision tower runs.
        width: Its token width; ``None`` where no model is known, which is float32 on a CPU.
        released_rounding: CLIP-ES's released numbers are wanted; on a CPU they need float32.

    Returns:
        bfloat16 on CUDA (float16 on older cards), and on a CPU under the rule above; float32 otherwise.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    wide = width is not None and width >= LEAST_WIDTH
    if device.type == "cpu" and wide and not released_rounding and cpu_multiplies_bf16():
        return torch.bfloat16
    return torch.float32


def cpu_multiplies_bf16() -> bool:
    """Whether this processor has instructions for bfloat16 and PyTorch the library that uses them."""
    library: Any = torch.backends.mkldnn
    return bool(library.is_available()) and any(_cpu_features().get(name, False) for name in _FAST_BF16)


def _cpu_features() -> Mapping[str, Any]:
    """Instruction sets by name; empty where this PyTorch does not tell, so that it stays with float32."""
    cpu: Any = torch.cpu
    if hasattr(cpu, "get_capabilities"):
        found: Mapping[str, Any] = cpu.get_capabilities()
        return found
    # Older releases have a private question for each, or none.
    return {name: getattr(cpu, f"_is_{name}_supported", lambda: False)() for name in _FAST_BF16}
