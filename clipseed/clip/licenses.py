"""Which weights there are, and what their publishers allow (``licenses.yaml``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from clipseed.clip.architecture import named_config, supported_models
from clipseed.defaults import MODEL
from clipseed.errors import UsageError

_QUICK = "-quickgelu"
_DENSE = ("timm/vit_base_patch16_clip_224.metaclip_*", "timm/vit_large_patch14_clip_224.metaclip_*")
"""MetaCLIP B and L: what training-free dense methods get their best numbers with (CorrCLIP)."""


@dataclass(frozen=True)
class License:
    """What is known of some weights.

    Attributes:
        name: SPDX identifier, or the publisher's own name; ``unknown``.
        commercial: Whether it allows commercial use; ``None``: unknown.
        source: Where it is stated.
    """

    name: str = "unknown"
    commercial: bool | None = None
    source: str = ""


UNKNOWN = License()
_OWN = License("Apache-2.0", True, "clipseed's own")


@dataclass(frozen=True)
class Pretrained:
    """A model and a tag that work together.

    Attributes:
        patch, image_size: In pixels; ``image_size`` is what it was trained on.
        blocks, width: Of its vision tower.
        dense: Known for good dense features.
    """

    model: str
    tag: str
    patch: int
    image_size: int
    blocks: int
    width: int
    license: License
    dense: bool


def license_of(model: str | None, weights: str | Path) -> License:
    """The license of weights, by open_clip's name and tag; of a file it is unknown, as nothing in it tells.

    Args:
        model: open_clip model name; the default model for ``None``.
        weights: Pretrained tag, ``toy``, or a file.
    """
    from open_clip import pretrained

    if str(weights) == "toy":
        return _OWN
    if Path(weights).exists():
        return UNKNOWN
    return _by_hub(_hub(pretrained.get_pretrained_cfg((model or MODEL).replace("/", "-"), str(weights)) or {}))


def refuse_restricted(model: str | None, weights: str | Path) -> None:
    """Refuse weights that are not known to be free for commercial use.

    Raises:
        UsageError: naming the license, and where it is stated.
    """
    found = license_of(model, weights)
    if found.commercial:
        return
    named = f"{model or MODEL} ({weights})"
    why = "the license of these weights is not known" if found is UNKNOWN else (
        f"their license, {found.name}, does not allow commercial use ({found.source})"
    )  # fmt: skip
    raise UsageError(f"--permissive: {named}: {why}; clipseed models --permissive lists weights that are free")


def pretrained_models() -> Iterator[Pretrained]:
    """All pairs of open_clip that clipseed can load, by model; names that only repeat another are left out."""
    from open_clip import pretrained

    for model in sorted(supported_models()):
        tags = pretrained.list_pretrained_tags_by_model(model)
        if model.endswith(_QUICK):  # the plain name takes the activation of its weights
            plain = pretrained.list_pretrained_tags_by_model(model.removesuffix(_QUICK))
            tags = [tag for tag in tags if tag not in plain]
        for tag in tags:
            vision, hub = named_config(model)["vision_cfg"], _hub(pretrained.get_pretrained_cfg(model, tag) or {})
            yield Pretrained(
                model, tag, int(vision["patch_size"]), int(vision["image_size"]), int(vision["layers"]),
                int(vision["width"]), _by_hub(hub), any(fnmatchcase(hub, pattern) for pattern in _DENSE),
            )  # fmt: skip


def _hub(entry: dict[str, Any]) -> str:
    return str(entry.get("hf_hub") or "").rstrip("/")


def _by_hub(hub: str) -> License:
    for rule in _rules():
        if fnmatchcase(hub, rule["hub"]):
            return License(rule["license"], rule["commercial"], rule["source"].format(hub=hub))
    return UNKNOWN


@lru_cache(maxsize=1)
def _rules() -> list[dict[str, Any]]:
    import yaml

    text = (resources.files("clipseed.clip") / "licenses.yaml").read_text(encoding="utf-8")
    rules: list[dict[str, Any]] = yaml.safe_load(text)
    return rules
