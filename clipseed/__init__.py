"""clipseed: segmentation pseudo-labels from image-level labels, with frozen CLIP and optionally SAM.

The names below are the public API; they are imported when first used, so that ``import clipseed`` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipseed.version import __version__

__all__ = [
    "Cam",
    "CamSet",
    "ClipseedError",
    "FrozenClip",
    "ImageCam",
    "PseudoLabel",
    "Segmenter",
    "Vocabulary",
    "__version__",
    "label",
    "load_segmenter",
    "load_vocabulary",
    "open_cams",
]

if TYPE_CHECKING:
    from clipseed.api.label import label
    from clipseed.api.model import FrozenClip
    from clipseed.api.results import ImageCam, PseudoLabel
    from clipseed.data import Vocabulary, load_vocabulary
    from clipseed.errors import ClipseedError
    from clipseed.store import Cam, CamSet, open_cams
    from clipseed.train.segmenter import Segmenter, load_segmenter

_HOMES = {
    "ClipseedError": "clipseed.errors",
    "FrozenClip": "clipseed.api.model",
    "ImageCam": "clipseed.api.results",
    "PseudoLabel": "clipseed.api.results",
    "Cam": "clipseed.store",
    "CamSet": "clipseed.store",
    "Segmenter": "clipseed.train.segmenter",
    "Vocabulary": "clipseed.data",
    "label": "clipseed.api.label",
    "load_segmenter": "clipseed.train.segmenter",
    "load_vocabulary": "clipseed.data",
    "open_cams": "clipseed.store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipseed' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
