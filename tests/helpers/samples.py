"""Samples for tests that look at ids only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipseed.data.types import Sample


def samples(ids: Sequence[str]) -> list[Sample]:
    """Samples without labels, of files that are not there."""
    return [Sample(key, Path(key), None) for key in ids]
