"""Text files that people write."""

from __future__ import annotations

from pathlib import Path

from clipseed.data.paths import never_ends
from clipseed.errors import InputError


def read_text(path: Path, what: str, most: int | None = None) -> str:
    """Read a UTF-8 text file (a byte-order mark is dropped) of at most ``most`` bytes.

    Raises:
        InputError: missing, unreadable, too long, or not UTF-8 text.
    """
    try:
        if never_ends(path):
            raise InputError(f"{path}: {what} must be a file, not a pipe or a device")
        if most is not None and path.stat().st_size > most:
            raise InputError(f"{path}: too long for {what} ({path.stat().st_size:,} bytes, at most {most:,})")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: {what} must be UTF-8 text (byte {error.start} is not)") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{path}: {what} cannot be read ({getattr(error, 'strerror', None) or error})") from error
