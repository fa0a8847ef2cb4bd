"""One self-contained HTML page about scored inputs: no script, no network, nothing beside it.

A content security policy in the page forbids everything but its own styles and data URIs, and everything that comes
from files goes through :func:`~clipseed.report.markup.text`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import numpy as np
from PIL.Image import Image

from clipseed.errors import ClipseedError
from clipseed.evaluate.confusion import Counts, Scores
from clipseed.report.charts import HUES, Curve, bar, confusion_chart, curve_chart, histogram_chart
from clipseed.report.gallery import Example, Gallery
from clipseed.report.markup import colour, mask_uri, percent, photo_uri, text
from clipseed.types import IGNORE

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


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
        find: From id to picture; raises :class:`ClipseedError` when there is none.
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
    style = resources.files("clipseed.report").joinpath("page.css").read_text(encoding="utf-8")
    numbered = list(enumerate(entries))
    body = [
        f"<header><h1>{text(title)}</h1><p>{_subtitle(entries)}</p></header>",
        _section("Scores", _summary(numbered), *_notes(entries)),
        _section("Intersection over union per class", *_class_bars(numbered)),
        _section("Settings and spread" if any(entry.curve for entry in entries) else "Spread", *_spread(numbered)),
        _section("Confusion", *_matrices(numbered)),
        *(_section(heading, *cards) for heading, cards in _examples(numbered) if cards),
        _section("How the inputs were made", *map(_manifest, numbered)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(heading: str, *parts: str) -> str:
    return f"<section><h2>{text(heading)}</h2>{''.join(parts)}</section>"


def _subtitle(entries: Sequence[Entry]) -> str:
    counts = sorted({entry.images for entry in entries})
    images = " and ".join(f"{count:,}" for count in counts)
    truths = ", ".join(dict.fromkeys(entry.ground_truth for entry in entries))
    splits = ", ".join(dict.fromkeys(entry.split for entry in entries if entry.split != "all"))
    return f"{images} pictures{text(f' of split {splits}' if splits else '')}, against {text(truths)}"


def _label(number: int, name: str) -> str:
    return f'<span class="name"><i class="dot b{number % HUES}"></i><bdi>{text(name)}</bdi></span>'


def _legend(numbered: Sequence[tuple[int, Entry]]) -> str:
    return f'<p class="legend">{" ".join(_label(number, entry.name) for number, entry in numbered)}</p>'


def _summary(numbered: Sequence[tuple[int, Entry]]) -> str:
    heads = ("mean IoU", "without background", "pixel accuracy", "mean accuracy", "median picture", "pictures")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    first = numbered[0][1].scores.miou
    rows = []
    for number, entry in numbered:
        scores = entry.scores
        change = 100 * (scores.miou - first)
        sign = "−" if change < 0 else "+"
        beside = f"<small>{sign}{abs(change):.2f}</small>" if number and not math.isnan(change) else ""
        values = (scores.miou_foreground, scores.pixel_accuracy, scores.mean_accuracy, entry.gallery.median)
        cells = "".join(f"<td>{percent(value)}</td>" for value in values)
        rows.append(
            f'<tr><th scope="row">{_label(number, entry.name)}<small>{text(entry.setting)}</small></th>'
            f'<td class="main">{percent(scores.miou)}{beside}</td>{cells}<td>{entry.images:,}</td></tr>'
        )
    return (
        f'<div class="scroll"><table class="scores"><thead><tr><th scope="col">input</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="hint">In per cent. Mean IoU comes from one confusion matrix over all pictures and is the mean over '
        "the classes that occur in the ground truth; a single picture's score is the mean over the classes in it.</p>"
    )


def _notes(entries: Sequence[Entry]) -> Iterator[str]:
    if len({entry.gallery.fingerprint for entry in entries}) > 1:
        yield '<p class="note">The inputs were scored on different pictures; do not compare their scores directly.</p>'
    for entry in entries:
        for note in entry.notes:
            where = f"<strong><bdi>{text(entry.name)}</bdi></strong>: " if len(entries) > 1 else ""
            yield f'<p class="note">{where}{text(note)}</p>'


def _class_bars(numbered: Sequence[tuple[int, Entry]]) -> Iterator[str]:
    found = [dict(zip(entry.class_names, map(float, entry.scores.class_iou), strict=True)) for _, entry in numbered]
    # Mask values of a name, for its colour; inputs with other classes add theirs at the end.
    values = {name: k for _, entry in reversed(numbered) for k, name in enumerate(entry.class_names)}
    names = list(dict.fromkeys(name for _, entry in numbered for name in entry.class_names))
    real = {entry.class_names[k] for _, entry in numbered for k in np.flatnonzero(entry.counts.sum(axis=1))}
    shown = [name for name in names if any(not math.isnan(iou.get(name, math.nan)) for iou in found)]
    if len(numbered) > 1:
        yield _legend(numbered)
    rows = []
    for name in shown:
        row = [iou.get(name, math.nan) for iou in found]
        bars = "".join(
            f'<div class="value">{bar(value, number)}<span>{percent(value, 1)}</span></div>'
            for number, value in enumerate(row)
        )
        swatch = f'<i class="swatch" style="background:{colour(values[name])}"></i>'
        faint = "" if name in real else " faint"
        rows.append(f'<div class="class"><span class="name{faint}" title="{text(name)}">{swatch}{text(name)}</span>'
                    f"<div>{bars}</div></div>")  # fmt: skip
    yield f'<div class="classes">{"".join(rows)}</div>'
    if not real.issuperset(shown):
        yield '<p class="hint">Classes in grey are only predicted; they do not count in the mean IoU.</p>'
    if len(shown) < len(names):
        yield (
            f'<p class="hint">{len(names) - len(shown)} of {len(names)} classes occur neither in the ground truth nor '
            "in a prediction and are left out.</p>"
        )


def _spread(numbered: Sequence[tuple[int, Entry]]) -> Iterator[str]:
    charts = []
    if len(numbered) > 1:
        yield _legend(numbered)
    for axis in ("threshold", "alpha"):
        curves = [(number, entry.curve) for number, entry in numbered if entry.curve and entry.axis == axis]
        if curves:
            caption = f"Mean IoU over the {axis}. The dot is the setting that all scores on this page are for."
            charts.append(f"<figure>{curve_chart(curves, axis)}<figcaption>{caption}</figcaption></figure>")
    spread = histogram_chart([(number, entry.name, entry.gallery.histogram()) for number, entry in numbered])
    caption = "How the scores of single pictures are spread."
    charts.append(f"<figure>{spread}<figcaption>{caption}</figcaption></figure>")
    yield f'<div class="charts">{"".join(charts)}</div>'


def _matrices(numbered: Sequence[tuple[int, Entry]]) -> Iterator[str]:
    yield (
        '<p class="hint">Each row is a class of the ground truth and adds up to 100 %; each column is what was '
        "predicted. Right is green, wrong is red, darker is more.</p>"
    )
    figures = []
    for number, entry in numbered:
        there = np.flatnonzero(entry.counts.sum(axis=0) + entry.counts.sum(axis=1))
        names = [entry.class_names[k] for k in there]
        chart = confusion_chart(names, entry.counts[np.ix_(there, there)])
        caption = f"<figcaption>{_label(number, entry.name)}</figcaption>" if len(numbered) > 1 else ""
        figures.append(f'<figure class="wide">{caption}<div class="scroll">{chart}</div>{_mistaken(entry)}</figure>')
    yield f'<div class="matrices">{"".join(figures)}</div>'


def _mistaken(entry: Entry, most: int = 6) -> str:
    """The largest confusions between two classes other than the background, in words."""
    totals = entry.counts.sum(axis=1, keepdims=True)
    shares = np.divide(entry.counts, totals, out=np.zeros(entry.counts.shape), where=totals > 0)
    np.fill_diagonal(shares, 0)
    shares[0], shares[:, 0] = 0, 0
    order = np.argsort(-shares, axis=None, kind="stable")[:most]
    pairs = [(*np.unravel_index(place, shares.shape), shares.flat[place]) for place in order]
    found = [
        f"{text(entry.class_names[row])} → {text(entry.class_names[column])} {percent(share, 1)}&nbsp;%"
        for row, column, share in pairs
        if share > 0
    ]
    return f'<p class="hint">Most mistaken, background aside: {"; ".join(found)}</p>' if found else ""


def _examples(numbered: Sequence[tuple[int, Entry]]) -> Iterator[tuple[str, list[str]]]:
    for heading, which in (("Worst pictures", "worst"), ("Best pictures", "best")):
        parts = []
        for number, entry in numbered:
            examples: list[Example] = getattr(entry.gallery, which)
            if not examples:
                continue
            title = f"<h3>{_label(number, entry.name)}</h3>" if len(numbered) > 1 else ""
            parts.append(f'{title}<div class="cards">{"".join(_card(entry, example) for example in examples)}</div>')
        yield heading, parts


def _card(entry: Entry, example: Example) -> str:
    try:
        photo = _tile("picture", f'<img alt="picture {text(example.id)}" src="{photo_uri(entry.find(example))}">')
    except ClipseedError as error:
        photo = _tile("picture", f'<p class="missing">No picture: {text(error)}</p>')
    masks = [
        _tile(kind, f'<img alt="{kind} of {text(example.id)}" src="{mask_uri(labels)}">')
        for kind, labels in (("truth", example.truth), ("prediction", example.prediction))
    ]
    names = [
        f'<span><i class="swatch" style="background:{colour(label)}"></i>'
        f"{'ignored' if label == IGNORE else text(entry.class_names[label])}</span>"
        for label in example.labels
    ]
    return (
        f'<article><h4><bdi class="id">{text(example.id)}</bdi><b>{percent(example.score, 1)}</b></h4>'
        f'<div class="tiles">{photo}{"".join(masks)}</div><p class="key">{"".join(names)}</p></article>'
    )


def _tile(kind: str, content: str) -> str:
    return f'<figure class="tile">{content}<figcaption>{kind}</figcaption></figure>'


def _manifest(item: tuple[int, Entry]) -> str:
    number, entry = item
    facts = f"<p>{text(entry.path)}, {entry.images:,} pictures, {entry.scores.pixels:,} pixels scored</p>"
    if entry.manifest is None:
        content = f'{facts}<p class="hint">Nothing is recorded beside these masks.</p>'
    else:
        pretty = json.dumps(entry.manifest, indent=2, sort_keys=True, ensure_ascii=False)
        content = f"{facts}<pre>{text(pretty)}</pre>"
    return f"<details><summary>{_label(number, entry.name)}</summary>{content}</details>"
