"""Fields of foreign JSON files, checked: an error names the file and the field."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from clipseed.errors import InputError


def records(data: Any, key: str, path: Path) -> list[dict[str, Any]]:
    """A list of mappings at the top of a file.

    Raises:
        InputError: there is none.
    """
    found = data.get(key) if isinstance(data, dict) else None
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise InputError(f"{path}: {key!r} is not a list of mappings")
    return found


def integer(item: dict[str, Any], key: str, where: str) -> int:
    """An integer of a mapping.

    Raises:
        InputError: missing or something else.
    """
    value = item.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{where}: {key!r} is not an integer")
    return value


def numbers(value: Any, count: int, key: str, where: str) -> list[float]:
    """So many finite numbers, a single one also without a list.

    Raises:
        InputError: something else.
    """
    found = value if isinstance(value, list) else [value]
    try:
        good = len(found) == count and all(
            isinstance(entry, int | float) and not isinstance(entry, bool) and math.isfinite(entry) for entry in found
        )
    except OverflowError:  # an integer beyond the range of floats
        good = False
    if not good:
        raise InputError(f"{where}: {key!r} must be {'a number' if count == 1 else f'{count} numbers'}")
    return [float(entry) for entry in found]
