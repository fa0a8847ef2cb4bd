"""``--report FILE``: what a run did, as JSON, for whoever watches many of them."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from clipseed.store.files import write_text
from clipseed.store.manifest import package_versions


def write_run_report(path: Path, data: dict[str, Any]) -> None:
    """Write counts, timings per stage and skipped inputs with reasons, and what they were measured on.

    Raises:
        StoreError: it cannot be written.
    """
    surroundings = {
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": sys.argv[1:],
        "machine": {"host": platform.node(), "system": platform.platform(), "cores": os.cpu_count()},
        "peak_memory_mb": _peak_memory(),
        "versions": package_versions(),
    }
    write_text(path, json.dumps({**data, **surroundings}, indent=1, allow_nan=False) + "\n")


def _peak_memory() -> int | None:
    """Largest resident memory of this process so far, in MB."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
