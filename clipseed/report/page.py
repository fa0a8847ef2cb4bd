"""One self-contained HTML page about scored inputs: ``page.html.j2``, and the plain values that it shows.

A content security policy in the page forbids everything but its own styles and data URIs, and everything that comes
from files goes through :func:`~clipseed.report.text.escaped`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from markupsafe import Markup
from PIL.Image import Image

from clipseed.errors import ClipseedError
from clipseed.evaluate.confusion import Counts, Scores
from clipseed.report.charts import HUES, Curve, bar, confusion_chart, curve_chart, histogram_chart, row_shares
from clipseed.report.gallery import Example, Gallery
from clipseed.report.overlay import label_overlay, outlined
from clipseed.report.text import manifest_text, rendered
from clipseed.report.thumbnails import colour, greyed, mask_uri, photo_pixels, photo_uri
from clipseed.types import IGNORE


@dataclass(frozen=True)
class Entry:
    """Everything the page says about one input.

    Attributes:
        name: What to call it; different for every input.
        counts: Confusion matrix, rows truth, columns prediction.
        setting: How maps became masks, in words.
        curve: Mean IoU over the settings, when there were several.
        axis: What the settings of the curve are.
        notes: What was not scored, and the like.
        find: From id to image; raises :class:`ClipseedError` when there is none.
        manifest: How the input was made, when that is known.
    """

    name: str
    path: str
    ground_truth: str
    split: str
    images: int
    class_names: tuple[str, ...]
    scores: Scores
    counts: Counts
    setting: str
    curve: Curve | None
    axis: Literal["threshold", "alpha"]
    gallery: Gallery
    find: Callable[[Example], Image]
    notes: list[str] = field(default_factory=list)
    manifest: dict[str, Any] | None = None


def render_page(title: str, entries: Sequence[Entry]) -> str:
    """The whole page as text."""
    return rendered(
        "page.html.j2",
        title=title,
        subtitle=_subtitle(entries),
        entries=entries,
        comparing=len(entries) > 1,
        different=len({entry.gallery.fingerprint for entry in entries}) > 1,
        changes=[_change(entry.scores.miou - entries[0].scores.miou) if k else "" for k, entry in enumerate(entries)],
        classes=_classes(entries),
        class_count=len({name for entry in entries for name in entry.class_names}),
        charts=list(_charts(entries)),
        matrices=[(_matrix(entry), _mistaken(entry)) for entry in entries],
        examples=[
            ("Worst images", [[_card(entry, item) for item in entry.gallery.worst] for entry in entries]),
            ("Best images", [[_card(entry, item) for item in entry.gallery.best] for entry in entries]),
        ],
        manifests=[manifest_text(entry.manifest) for entry in entries],
        bar=bar,
        hues=HUES,
    )


def _subtitle(entries: Sequence[Entry]) -> str:
    counts = sorted({entry.images for entry in entries})
    images = " and ".join(f"{count:,}" for count in counts)
    truths = ", ".join(dict.fromkeys(entry.ground_truth for entry in entries))
    splits = ", ".join(dict.fromkeys(entry.split for entry in entries if entry.split != "all"))
    return f"{images} images{f' of split {splits}' if splits else ''}, against {truths}"


def _change(difference: float) -> str:
    """By how much an input is better than the first, in points of per cent; nothing when one of them has no score."""
    return "" if math.isnan(difference) else f"{100 * difference:+.2f}".replace("-", "−")


def _classes(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """IoU per class, one value per input (NaN where it does not know the class); classes without any are left out.

    Inputs with other classes add theirs at the end. A class is ``real`` when a ground truth has it.
    """
    found = [dict(zip(entry.class_names, map(float, entry.scores.class_iou), strict=True)) for entry in entries]
    labels = {name: k for entry in reversed(entries) for k, name in enumerate(entry.class_names)}
    real = {entry.class_names[k] for entry in entries for k in np.flatnonzero(entry.counts.sum(axis=1))}
    rows = []
    for name in dict.fromkeys(name for entry in entries for name in entry.class_names):
        ious = [iou.get(name, math.nan) for iou in found]
        if not all(map(math.isnan, ious)):
            rows.append({"name": name, "colour": colour(labels[name]), "real": name in real, "ious": ious})
    return rows


def _charts(entries: Sequence[Entry]) -> Iterator[tuple[Markup, str]]:
    for axis in ("threshold", "alpha"):
        curves = [(k, entry.curve) for k, entry in enumerate(entries) if entry.curve and entry.axis == axis]
        if curves:
            caption = f"Mean IoU over the {axis}. The dot is the setting that all scores on this page are for."
            yield curve_chart(curves, axis), caption
    spread = [(k, entry.name, entry.gallery.histogram()) for k, entry in enumerate(entries)]
    yield histogram_chart(spread), "How the scores of single images are spread."


def _matrix(entry: Entry) -> Markup:
    there = np.flatnonzero(entry.counts.sum(axis=0) + entry.counts.sum(axis=1))
    return confusion_chart([entry.class_names[k] for k in there], entry.counts[np.ix_(there, there)])


def _mistaken(entry: Entry, most: int = 6) -> list[tuple[str, str, float]]:
    """The largest confusions between two classes other than the background: truth, prediction, share of the truth."""
    shares = row_shares(entry.counts)
    np.fill_diagonal(shares, 0)
    shares[0], shares[:, 0] = 0, 0
    order = np.argsort(-shares, axis=None, kind="stable")[:most]
    pairs = [(*np.unravel_index(place, shares.shape), float(shares.flat[place])) for place in order]
    return [(entry.class_names[row], entry.class_names[column], share) for row, column, share in pairs if share > 0]


def _card(entry: Entry, example: Example) -> dict[str, Any]:
    """An example's tiles: the photo, and truth and prediction drawn over it; without a photo, both masks alone."""
    masks = [(kind, f"{kind} of {example.id}", getattr(example, kind)) for kind in ("truth", "prediction")]
    missing, drawn = "", example.labels
    try:
        photo = photo_pixels(entry.find(example), example.truth)
        grey = greyed(photo)  # so that a label's colour is not taken for the object's own; one label's colour is grey
        tiles = [("image", f"image {example.id}", photo_uri(photo))]
        tiles += [(kind, alt, photo_uri(outlined(label_overlay(grey, labels), labels))) for kind, alt, labels in masks]
        drawn = tuple(label for label in drawn if label)
    except ClipseedError as error:
        missing = str(error)
        tiles = [(kind, alt, mask_uri(labels)) for kind, alt, labels in masks]
    key = [(colour(k), "ignored" if k == IGNORE else entry.class_names[k]) for k in drawn]
    return {"id": example.id, "score": example.score, "missing": missing, "tiles": tiles, "key": key}
