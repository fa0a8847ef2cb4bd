"""Questions about paths that people type or files name: answered, never raised, whatever the name."""

from __future__ import annotations

import stat
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".avif", ".jp2")

CAMERA_SUFFIXES = (".heic", ".heif", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf")
"""Photographs in formats that are not read here."""


def is_file(path: Path) -> bool:
    """Whether a file is there; a name that is too long or a folder that may not be entered holds none."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether a folder is there; see :func:`is_file`."""
    try:
        return path.is_dir()
    except OSError:
        return False


def never_ends(path: Path) -> bool:
    """Whether reading a path may wait for ever or never end: pipes, sockets and devices."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
