"""From the CAMs of an image, and its segments, to its label mask: which rule, with which constants, and the rules."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from clipseed.defaults import PIXEL_ALPHA, SeedMethod, SeedPreset, UncoveredPolicy
from clipseed.errors import UsageError
from clipseed.pseudo.background import Background
from clipseed.pseudo.pixels import label_pixels, label_scores
from clipseed.pseudo.prompted import label_from_prompted_masks
from clipseed.pseudo.seeding import PRESETS, SeedingOptions, seed_from_masks
from clipseed.pseudo.voting import VotingOptions, vote
from clipseed.segments import Segments, enlarged, room_for
from clipseed.types import IGNORE, NO_CLASS, LabelMask

if TYPE_CHECKING:
    from clipseed.store.cam_records import Cam

Masks = npt.NDArray[np.bool_]
Classes = npt.NDArray[np.int32]


@dataclass(frozen=True)
class RuleOptions:
    """The rule as asked for; ``None`` leaves it to the method, the vocabulary and the masks.

    Attributes:
        method: ``fma``: every mask gets one label from the maps (FMA-WSSS); ``prompted``: every mask has the class
            that it was asked for, and the class that is stronger in its own mask wins (S2C); ``vote``: a label map
            snapped to masks (SEPL); ``pixel``: without masks. Default: ``vote`` for a label map, ``prompted`` for masks
            that were asked for, else ``fma``.
        preset: Of ``fma``; default by the vocabulary.
        alpha: Exponent of the background: of regions with ``fma``, else of pixels.
        uncovered: What pixels under no mask become.
        without_masks: What images without any mask become.
        min_confidence: Less certain labels become 255.
        paper: The released programs with their quirks.
    """

    method: SeedMethod | None = None
    preset: SeedPreset | None = None
    alpha: float | None = None
    uncovered: UncoveredPolicy | None = None
    without_masks: UncoveredPolicy | None = None
    min_confidence: float = 0.0
    paper: bool = False


@dataclass(frozen=True)
class Rules:
    """The rule with all its constants.

    Attributes:
        method: As of :class:`RuleOptions`; ``threshold``: see :func:`thresholding`.
        seeding: Constants of ``fma``, and of pixels that decide for themselves.
        voting: Constants of ``vote``.
    """

    method: SeedMethod | Literal["threshold"]
    seeding: SeedingOptions
    voting: VotingOptions

    def manifest(self) -> dict[str, Any]:
        """What decides the labels."""
        seeding = self.seeding
        common = {
            "without_masks": seeding.without_masks,
            "pixel_alpha": seeding.pixel_background.value,
            "min_confidence": seeding.min_confidence,
            "paper": seeding.paper,
        }
        if self.method == "pixel":
            del common["without_masks"]
            return common
        if self.method == "vote":
            return {**common, **asdict(self.voting)}
        if self.method == "prompted":
            return {**common, "uncovered": seeding.uncovered}
        return {
            **common, "uncovered": seeding.uncovered, "alpha": seeding.background.value,
            "normalise": seeding.normalise, "pool": seeding.pool, "order": list(seeding.order),
        }  # fmt: skip


def thresholding(*, threshold: float | None = None, alpha: float | None = None, released: bool = False) -> Rules:
    """Each pixel by itself, from the maps as they are: its strongest class where that exceeds the background.

    This is what ``clipseed evaluate`` scores and ``clipseed threshold`` writes.

    Args:
        threshold: The background scores this everywhere, 0 to below 1.
        alpha: It scores ``(1 - strongest) ** alpha``, as in CLIP-ES (section 8); always in half precision, as there.
        released: Half precision with a threshold, too, as in CLIP-ES's released code.

    Raises:
        ValueError: none or both of the two, or outside its range.
    """
    if (threshold is None) == (alpha is None):
        raise ValueError("threshold and alpha are two kinds of background score; give one of them")
    if threshold is not None and not 0 <= threshold < 1:
        raise ValueError(f"threshold {threshold}: give a background score from 0 to below 1")
    if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha {alpha}: give a positive exponent")
    background = Background("power", alpha) if alpha is not None else Background("threshold", threshold or 0.0)
    half = released or alpha is not None
    return Rules("threshold", SeedingOptions(pixel_background=background, paper=half), VotingOptions())


def decide(options: RuleOptions, vocabulary: str, *, label_map: bool, asked: bool) -> Rules:
    """Fill in what was left open.

    Args:
        options: As asked for.
        vocabulary: Name of the CAMs' vocabulary; COCO's has its own presets.
        label_map: The source is a folder of label masks, not CAMs.
        asked: The masks were made for classes.

    Raises:
        UsageError: a value is impossible, or does not belong to the method.
    """
    method = options.method or ("vote" if label_map else "prompted" if asked else "fma")
    _check(options, method, label_map=label_map, asked=asked)
    preset = options.preset or ("coco-coarse" if vocabulary.startswith("coco") else "voc-coarse")
    base = PRESETS[preset]
    pixel_alpha = PIXEL_ALPHA
    if options.alpha is not None:
        if method == "fma":
            base = replace(base, background=Background("power", options.alpha))
        else:
            pixel_alpha = options.alpha
    standing: UncoveredPolicy = "cam" if method == "vote" else "background"  # a vote keeps what nothing speaks against
    seeding = replace(
        base,
        uncovered=options.uncovered or standing,
        without_masks=options.without_masks or standing,
        pixel_background=Background("power", pixel_alpha),
        min_confidence=options.min_confidence,
        paper=options.paper,
    )
    return Rules(method, seeding, VotingOptions(keep_uncovered=seeding.uncovered == "cam", paper=options.paper))


def _check(options: RuleOptions, method: SeedMethod, *, label_map: bool, asked: bool) -> None:
    if options.preset is not None and method != "fma":
        raise UsageError(f"--preset belongs to --method fma, not to {method}")
    if label_map and method != "vote":
        raise UsageError(f"--method {method} needs maps, and the source holds finished masks; only vote takes those")
    if method == "prompted" and not asked:
        raise UsageError("--method prompted needs masks that were made for classes: clipseed sam-masks --prompt points")
    if method == "vote" and options.uncovered == "ignore":
        raise UsageError("--uncovered ignore: a vote keeps uncovered labels (cam) or drops them (background)")
    if method == "pixel" and (options.uncovered or options.without_masks):
        raise UsageError("--uncovered and --without-masks: --method pixel looks at no masks")
    if options.alpha is not None and (label_map or not 0.01 <= options.alpha <= 100):
        why = "a label map has no scores" if label_map else "give an exponent from 0.01 to 100"
        raise UsageError(f"--alpha {options.alpha}: {why}")
    if not (math.isfinite(options.min_confidence) and 0 <= options.min_confidence <= 1):
        raise UsageError(f"--min-confidence {options.min_confidence}: give a score from 0 to 1")
    if options.min_confidence and method in ("vote", "prompted"):
        raise UsageError(f"--min-confidence: --method {method} gives no confidence")


def label_mask(
    cam: Cam, rules: Rules, segments: Segments | None = None, prompted_classes: Classes | None = None
) -> LabelMask:
    """The label mask ``(H, W)`` of an image, from its CAMs and, where the rule asks for them, its segments.

    With segments everything happens at their size, and the labels are enlarged to the image's size at the end.

    Args:
        cam: The image's CAMs.
        rules: What to do: :func:`thresholding`, or what :func:`decide` gives.
        segments: The image's segments ``(S, h, w)``; S may be 0, which ``None`` means as well.
        prompted_classes: ``(S,)`` class that each was prompted for, -1 for none; ``None``: none was.

    Raises:
        ImageError: the segments need too much memory.
    """
    options = rules.seeding
    if rules.method == "threshold":
        maps = cam.upsampled()
        scores = maps.astype(np.float16) if options.paper else maps
        # A threshold is a number and not a score: only where all is half precision it is rounded as scores are.
        return label_scores(scores, cam.classes, options.pixel_background, exact=not options.paper).labels
    if rules.method == "pixel":
        return _by_pixels(rules, cam, cam.size)
    if segments is None or not len(segments):
        if options.without_masks == "cam":
            return _by_pixels(rules, cam, cam.size)
        return np.full(cam.size, IGNORE if options.without_masks == "ignore" else 0, np.uint8)
    if rules.method == "vote":
        labels = vote(_by_pixels(rules, cam, segments.size), segments.masks, rules.voting)
    elif rules.method == "prompted":
        if prompted_classes is None:
            prompted_classes = np.full(len(segments), NO_CLASS, np.int32)
        labels = _by_prompts(rules, cam, segments.masks, prompted_classes)
    else:
        labels = seed_from_masks(cam.maps, segments, cam.classes, options).labels
    return enlarged(labels, cam.size)


def voted_labels(rules: Rules, labels: LabelMask, masks: Masks) -> LabelMask:
    """A label map ``(H, W)`` snapped to masks ``(S, h, w)``, which are enlarged to its size.

    Raises:
        ImageError: the enlarged masks need too much memory.
    """
    if len(masks):
        size = (labels.shape[0], labels.shape[1])
        room_for(len(masks), size, "masks")
        return vote(labels, enlarged(masks, size), rules.voting)
    policy = rules.seeding.without_masks
    return labels if policy == "cam" else np.full_like(labels, IGNORE if policy == "ignore" else 0)


def _by_pixels(rules: Rules, cam: Cam, size: tuple[int, int]) -> LabelMask:
    options = rules.seeding
    found = label_pixels(cam.maps, cam.classes, size, options.pixel_background, paper=options.paper)
    return found.sure(options.min_confidence)


def _by_prompts(rules: Rules, cam: Cam, masks: Masks, asked: Classes) -> LabelMask:
    """The class whose map is stronger inside its own mask wins; masks of classes without CAMs are left out."""
    rows = {int(class_id): row for row, class_id in enumerate(cam.classes)}
    kept = [k for k, class_id in enumerate(asked) if class_id != NO_CLASS and int(class_id) in rows]
    row = np.array([rows[int(asked[k])] for k in kept], np.int64)
    # The cache holds masks, not logits: 1 inside and -1 outside makes S2C's score the map's mean inside.
    answers = np.where(masks[kept], np.float16(1), np.float16(-1))
    labels = label_from_prompted_masks(answers, row, cam.maps, cam.classes, paper=rules.seeding.paper)
    free = ~masks[kept].any(axis=0)
    if rules.seeding.uncovered == "ignore":
        labels[free] = IGNORE
    elif rules.seeding.uncovered == "cam":
        labels[free] = _by_pixels(rules, cam, (labels.shape[0], labels.shape[1]))[free]
    return labels
