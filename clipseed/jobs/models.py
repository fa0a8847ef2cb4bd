"""``clipseed models``: which weights can be used, and under which license."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from clipseed.clip.licenses import Pretrained, pretrained_models


@dataclass(frozen=True)
class ModelsReport:
    """Models with tags, by name."""

    found: list[Pretrained]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {"models": [asdict(item) for item in self.found]}


def list_models(name: str | None = None, *, permissive: bool = False) -> ModelsReport:
    """The pairs of model and tag that work.

    Args:
        name: Only those whose model or tag contains it, whatever the case.
        permissive: Only those that are known to be free for commercial use.
    """
    wanted = (name or "").lower()
    return ModelsReport(
        [
            item
            for item in pretrained_models()
            if wanted in f"{item.model} {item.tag}".lower() and (item.license.commercial or not permissive)
        ]
    )
