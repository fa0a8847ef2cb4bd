"""One run per output."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from clipseed.errors import StoreError


def acquire(path: Path, out: Path) -> FileLock:
    """Take an output's lock; the system releases it when the process ends, however it ends.

    Raises:
        StoreError: another process holds it.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StoreError(f"{out}: another run is writing it ({path} is locked); wait for it or stop it") from error
    return lock
