"""Devices and types, and that what all models share stands below them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import clipseed
from clipseed.device import dtype_name, is_out_of_memory

PACKAGE = Path(clipseed.__file__).parent


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("memory"), False),
    ],
)
def test_out_of_memory(error: BaseException, full: bool) -> None:
    assert is_out_of_memory(error) is full


def test_names_of_types() -> None:
    assert [dtype_name(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == ["fp32", "bf16", "fp16"]


def imports(path: Path) -> set[str]:
    """Rooms and modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("clipseed.")}
    return found


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("device.py", {"defaults", "errors"}),
        ("minmax.py", set()),
        ("weights.py", {"digest", "errors"}),
        ("clip", {"clip", "data", "defaults", "device", "digest", "errors", "network", "weights"}),
        ("sam", {"sam", "data", "defaults", "device", "digest", "errors", "segments", "weights"}),
    ],
)
def test_models_import_nothing_from_above_or_beside(room: str, allowed: set[str]) -> None:
    place = PACKAGE / room
    for path in place.glob("*.py") if place.is_dir() else [place]:
        assert imports(path) <= allowed, path
