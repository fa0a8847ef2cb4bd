"""Where models run and in which type: ``--device``, ``--precision``, and telling that the memory is full.

What ``--precision auto`` stands for is a rule on device, model and processor, without timing anything. On a CPU
bfloat16 is faster only where the processor multiplies it (AVX512-BF16, AMX); elsewhere PyTorch converts back and forth
and is slower than in float32. One thread of an AMD EPYC with AVX512-BF16, a block in float32 beside bfloat16:

| width | 200 tokens | 737 tokens (500x375, patch 16) |
| --- | --- | --- |
| 192 | 1.8 x | 2.1 x |
| 384 | 2.5 x | 2.7 x |
| 768 | 3.1 x | 2.8 x |

Models narrower than :data:`LEAST_WIDTH` stay in float32: what they cost is little, and the numbers of the built-in toy
(width 192) are then the same on every machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from clipseed.errors import UsageError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LEAST_WIDTH = 384
"""Token width from which a CPU with the instructions computes in bfloat16."""

_FAST_BF16 = ("avx512_bf16", "amx_tile")
"""ARM processors report bfloat16 too, but nobody has measured the maps there; ``--precision bf16`` asks for it."""


def pick_device(device: str | torch.device) -> torch.device:
    """Resolve ``auto`` and check that the device exists.

    Raises:
        UsageError: it does not.
    """
    if str(device) == "auto":
        mps = torch.backends.mps.is_available()
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            return torch.device("cuda", local_device(count)) if count > 1 else torch.device("cuda")
        return torch.device("mps" if mps else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"--device {device}: choose auto, cpu, cuda, cuda:N or mps") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: torch {torch.__version__} finds no CUDA GPU here (see clipseed doctor)")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: there are only {torch.cuda.device_count()} GPUs")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: torch finds no Apple GPU here")
    if chosen.type not in {"cpu", "cuda", "mps"}:
        raise UsageError(f"--device {device}: choose auto, cpu, cuda, cuda:N or mps")
    return chosen


def local_device(count: int, environment: Mapping[str, str] | None = None) -> int:
    """Which of a machine's ``count`` visible GPUs is this process's: by its number on the machine."""
    variables = os.environ if environment is None else environment
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if variables.get(name, "").isdigit():
            return int(variables[name]) % max(1, count)
    return 0


def pick_dtype(
    precision: str, device: torch.device, width: int | None = None, *, released_rounding: bool = False
) -> torch.dtype:
    """Resolve ``auto`` (:func:`automatic_dtype`) and the names of types.

    Raises:
        UsageError: unknown name.
    """
    if precision == "auto":
        return automatic_dtype(device, width, released_rounding=released_rounding)
    if precision not in _DTYPES:
        raise UsageError(f"--precision {precision}: choose auto, fp32, bf16 or fp16")
    return _DTYPES[precision]


def dtype_name(dtype: torch.dtype) -> str:
    """``fp32``, ``bf16`` or ``fp16``: what output files record."""
    return next(name for name, value in _DTYPES.items() if value is dtype)


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's or the machine's memory is full; PyTorch has several ways to say it."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
