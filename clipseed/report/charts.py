"""Charts as inline SVG. Colours come from the page's style sheet, so that they follow its light or dark scheme.

All markup is made by :func:`_element`, which escapes what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from clipseed.evaluate.confusion import Counts
from clipseed.report.text import escaped, percent, shortened

HUES = 6
"""How many colours for inputs the style sheet has; further inputs begin again, dashed."""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 480, 270, 44, 40, 14, 14
_NUMBERED = 26  # up to so many classes, cells have room for their number

Curve = tuple[str, Sequence[tuple[float, float]], float]
"""Name, points of (setting, mIoU), and the setting that was chosen."""


def bar(fraction: float, number: int) -> Markup:
    """A horizontal bar for a fraction of the width, in the colour of an input; nothing when there is no value."""
    width = 0.0 if math.isnan(fraction) else 100 * fraction
    track = _element("rect", class_="track", width=100, height=8)
    value = _element("rect", class_=f"h{number % HUES}", width=width, height=8)
    return _element(
        "svg", track, value, class_="bar", viewBox="0 0 100 8", preserveAspectRatio="none", aria_hidden="true"
    )


def curve_chart(curves: Sequence[tuple[int, Curve]], axis: str) -> Markup:
    """Mean IoU over the setting, one line per input; the chosen setting is a dot.

    Args:
        curves: Number of the input (it decides the colour) and its curve.
        axis: What the settings are.
    """
    settings = [setting for _, (_, points, _) in curves for setting, _ in points]
    scores = [score for _, (_, points, _) in curves for _, score in points if not math.isnan(score)]
    low, high = (0.0, 1.0) if axis == "threshold" else (min(settings), max(settings))
    top = _ceiling(max(scores, default=0.0))
    parts = _frame(_ticks(low, high), [f"{100 * top * k / 4:g}" for k in range(5)], axis, "mIoU %")
    for number, (name, points, chosen) in curves:
        known = [(_x((s - low) / ((high - low) or 1)), _y(v / top), s, v) for s, v in points if not math.isnan(v)]
        path = _path([(x, y) for x, y, _, _ in known])
        parts.append(_element("polyline", class_=f"line s{number % HUES}", points=path, **_dashes(number)))
        for x, y, setting, value in known:
            if setting == chosen:
                tip = _element("title", f"{name}: {percent(value)} at {setting:g}")
                parts.append(_element("circle", tip, class_=f"h{number % HUES}", cx=x, cy=y, r=5))
    return _figure(parts, f"Mean IoU over the {axis}")


def histogram_chart(inputs: Sequence[tuple[int, str, Sequence[int]]]) -> Markup:
    """How many images have which mean IoU, in per cent of the images; one step line per input.

    Args:
        inputs: Number, name and counts per equal part of [0, 1].
    """
    shares = [(number, name, [count / max(1, sum(counts)) for count in counts]) for number, name, counts in inputs]
    top = _ceiling(max((max(share) for _, _, share in shares), default=0.0))
    ticks = [(k / 5, f"{20 * k}") for k in range(6)]
    parts = _frame(ticks, [f"{100 * top * k / 4:g}" for k in range(5)], "mIoU % of an image", "% of images")
    for number, name, share in shares:
        step = 1 / len(share)
        corners = [(_x(k * step + side), _y(v / top)) for k, v in enumerate(share) for side in (0, step)]
        path = _path([(_x(0), _y(0)), *corners, (_x(1), _y(0))])
        kind = "area h{0} s{0}".format(number % HUES)
        parts.append(_element("polygon", _element("title", name), class_=kind, points=path, **_dashes(number)))
    return _figure(parts, "Distribution of the mean IoU of single images")


def line_chart(points: Sequence[tuple[float, float]], name: str) -> Markup:
    """A quantity over the steps of training, on an axis from its least to its largest value.

    Args:
        points: ``(step, value)``, finite, in order.
        name: Of the quantity.
    """
    if not points:
        return _figure([], name)
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min(0.0, *values), max(values)
    span = (high - low) or 1.0
    across = _ticks(steps[0], steps[-1])
    parts = _frame(across, [f"{low + span * k / 4:.3g}" for k in range(5)], "step", name)
    length = (steps[-1] - steps[0]) or 1.0
    places = [(_x((step - steps[0]) / length), _y((value - low) / span)) for step, value in points]
    parts.append(_element("polyline", class_="line s0", points=_path(places)))
    return _figure(parts, f"{name} over the steps")


def row_shares(counts: Counts) -> npt.NDArray[np.float64]:
    """A confusion matrix as shares of its rows' sums; empty rows stay zero."""
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.zeros(counts.shape)
    np.divide(counts, totals, out=shares, where=totals > 0)
    return shares


def confusion_chart(names: Sequence[str], counts: Counts) -> Markup:
    """Row-normalised heat map of a confusion matrix; cells below 0.05 % stay empty."""
    size = len(names)
    small = size <= _NUMBERED
    cell = 30 if small else max(12, 420 // size)
    font = 12 if small else min(12, cell - 2)
    labels = [shortened(name, 18) for name in names]
    margin = 16 + 0.6 * font * max(map(len, labels), default=0)
    side = size * cell
    # Slanted names of the columns lean to the right, over the edge; narrow columns have room for upright ones only.
    turn, above, beyond = (-45, 0.74 * margin, 0.72 * margin) if small else (-90, margin, 8)
    width, height = round(margin + side + beyond), round(above + side + 26)
    shares = row_shares(counts)
    parts = [_element("rect", class_="grid", width=side, height=side)]
    for row, column in zip(*np.nonzero(shares >= 0.0005), strict=True):
        share, hit = float(shares[row, column]), row == column
        tip = f"{names[row]}: {percent(share)} % right" if hit else (
            f"{names[row]} taken for {names[column]}: {percent(share)} %")  # fmt: skip
        # The square root keeps confusions of a few per cent visible beside the diagonal.
        parts.append(
            _element("rect", _element("title", tip), class_="hit" if hit else "miss", x=column * cell, y=row * cell,
                     width=cell, height=cell, fill_opacity=math.sqrt(share))
        )  # fmt: skip
        if small and share >= 0.005:
            x, y = (column + 0.5) * cell, (row + 0.5) * cell + 4
            kind = "cell strong" if share > 0.5 else "cell"
            parts.append(_element("text", f"{100 * share:.0f}", class_=kind, x=x, y=y))
    for k, label in enumerate(labels):
        middle = round((k + 0.5) * cell + 0.35 * font, 1)
        faint = "" if counts[k].any() else " faint"
        full = _element("title", names[k])
        turned = f"translate({middle:g} -6) rotate({turn})"
        parts.append(_element("text", label, full, class_=f"row{faint}", x=-6, y=middle))
        parts.append(_element("text", label, full, class_="column", transform=turned))
    parts.append(_element("text", "predicted", class_="axis", x=side / 2, y=side + 20))
    placed = _element("g", *parts, transform=f"translate({margin:.0f} {above:.0f})")
    return _element(
        "svg", placed, class_="matrix", role="img", aria_label="Confusion matrix, rows are the truth",
        style=f"--natural:{width}px", viewBox=f"0 0 {width} {height}", font_size=font,
    )  # fmt: skip


def _element(name: str, *content: object, **attributes: object) -> Markup:
    """One element with its content, all escaped; ``class_`` stands for ``class``, ``font_size`` for ``font-size``."""
    pairs = []
    for key, value in attributes.items():
        shown = f"{round(value, 2):g}" if isinstance(value, float) else value
        pairs.append(f' {key.rstrip("_").replace("_", "-")}="{escaped(shown)}"')
    source = f"<{name}{''.join(pairs)}>{''.join(map(escaped, content))}</{name}>"
    return Markup(source)  # noqa: S704 (attributes and content are escaped)


def _x(fraction: float) -> float:
    return _LEFT + fraction * (_WIDTH - _LEFT - _RIGHT)


def _y(fraction: float) -> float:
    return _HEIGHT - _BOTTOM - fraction * (_HEIGHT - _BOTTOM - _TOP)


def _ceiling(value: float) -> float:
    """The end of an axis: the next of 0.2, 0.4 … 1."""
    return min(1.0, max(0.2, math.ceil(value * 5 - 1e-9) / 5))


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Six places along an axis and what is written there."""
    return [(k / 5, f"{low + (high - low) * k / 5:.3g}") for k in range(6)]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _dashes(number: int) -> dict[str, str]:
    return {"stroke_dasharray": "6 4"} if number >= HUES else {}


def _frame(across: Sequence[tuple[float, str]], up: Sequence[str], below: str, beside: str) -> list[Markup]:
    """Grid lines with their numbers and the names of the axes."""
    parts = []
    for k, label in enumerate(up):
        y = _y(k / (len(up) - 1))
        parts.append(_element("line", class_="rule", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y))
        parts.append(_element("text", label, class_="up", x=_LEFT - 8, y=y + 4))
    for fraction, label in across:
        parts.append(_element("text", label, class_="across", x=_x(fraction), y=_HEIGHT - _BOTTOM + 17))
    parts.append(_element("text", below, class_="across", x=(_WIDTH + _LEFT) / 2, y=_HEIGHT - 5))
    turned = f"translate(11 {(_HEIGHT - _BOTTOM + _TOP) / 2}) rotate(-90)"
    parts.append(_element("text", beside, class_="across", transform=turned))
    return parts


def _figure(parts: Sequence[Markup], label: str) -> Markup:
    size = f"0 0 {_WIDTH} {_HEIGHT}"
    return _element("svg", *parts, class_="chart", role="img", aria_label=label, viewBox=size)
