"""Frozen CLIP on top of open_clip: loading, dense vision features and text prototypes."""

from clipseed.clip.model import FrozenClip
from clipseed.clip.text import TextBank
from clipseed.clip.vision import DenseFeatures

__all__ = ["DenseFeatures", "FrozenClip", "TextBank"]
