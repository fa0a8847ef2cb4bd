"""From class activation maps (and segments) to label masks: pure functions, for every command and trainer."""

from clipseed.pseudo.background import Background
from clipseed.pseudo.pixels import PixelLabels, label_scores, strongest
from clipseed.pseudo.rules import RuleOptions, Rules, decide, label_mask, thresholding

__all__ = [
    "Background",
    "PixelLabels",
    "RuleOptions",
    "Rules",
    "decide",
    "label_mask",
    "label_scores",
    "strongest",
    "thresholding",
]
