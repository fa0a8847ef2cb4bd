"""Charts as inline SVG. Colours come from the page's style sheet, so that they follow its light or dark scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from clipseed.evaluate.confusion import Counts
from clipseed.report.markup import percent, shortened, text

HUES = 6
"""How many colours for inputs the style sheet has; further inputs begin again, dashed."""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 480, 270, 44, 40, 14, 14
_NUMBERED = 26  # up to so many classes, cells have room for their number

Curve = tuple[str, Sequence[tuple[float, float]], float]
"""Name, points of (setting, mIoU), and the setting that was chosen."""


def bar(fraction: float, hue: int) -> str:
    """A horizontal bar for a fraction of the width; nothing when there is no value."""
    width = 0.0 if math.isnan(fraction) else 100 * fraction
    return (
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="8"/>'
        f'<rect class="h{hue % HUES}" width="{width:.2f}" height="8"/></svg>'
    )


def curve_chart(curves: Sequence[tuple[int, Curve]], axis: str) -> str:
    """Mean IoU over the setting, one line per input; the chosen setting is a dot.

    Args:
        curves: Number of the input (it decides the colour) and its curve.
        axis: What the settings are.
    """
    settings = [setting for _, (_, points, _) in curves for setting, _ in points]
    scores = [score for _, (_, points, _) in curves for _, score in points if not math.isnan(score)]
    low, high = (0.0, 1.0) if axis == "threshold" else (min(settings), max(settings))
    top = _ceiling(max(scores, default=0.0))
    parts = [_frame(_ticks(low, high), [f"{100 * top * k / 4:g}" for k in range(5)], axis, "mIoU %")]
    for number, (name, points, chosen) in curves:
        known = [(_x((s - low) / ((high - low) or 1)), _y(v / top), s, v) for s, v in points if not math.isnan(v)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in known)
        dash = ' stroke-dasharray="6 4"' if number >= HUES else ""
        parts.append(f'<polyline class="line s{number % HUES}" points="{path}"{dash}/>')
        for x, y, setting, value in known:
            if setting == chosen:
                tip = text(f"{name}: {percent(value)} at {setting:g}")
                parts.append(
                    f'<circle class="h{number % HUES}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{tip}</title></circle>'
                )
    return _figure(parts, f"Mean IoU over the {axis}")


def histogram_chart(inputs: Sequence[tuple[int, str, Sequence[int]]]) -> str:
    """How many pictures have which mean IoU, in per cent of the pictures; one step line per input.

    Args:
        inputs: Number, name and counts per equal part of [0, 1].
    """
    shares = [(number, name, [count / max(1, sum(counts)) for count in counts]) for number, name, counts in inputs]
    top = _ceiling(max((max(share) for _, _, share in shares), default=0.0))
    ticks = [(k / 5, f"{20 * k}") for k in range(6)]
    parts = [_frame(ticks, [f"{100 * top * k / 4:g}" for k in range(5)], "mIoU % of a picture", "% of pictures")]
    for number, name, share in shares:
        step = 1 / len(share)
        corners = [(_x(k * step + side), _y(v / top)) for k, v in enumerate(share) for side in (0, step)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(_x(0), _y(0)), *corners, (_x(1), _y(0))])
        dash = ' stroke-dasharray="6 4"' if number >= HUES else ""
        hue = number % HUES
        parts.append(f'<polygon class="area h{hue} s{hue}" points="{path}"{dash}><title>{text(name)}</title></polygon>')
    return _figure(parts, "Distribution of the mean IoU of single pictures")


def confusion_chart(names: Sequence[str], counts: Counts) -> str:
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
    width, height = margin + side + beyond, above + side + 26
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    parts = [f'<rect class="grid" width="{side}" height="{side}"/>']
    for row, column in zip(*np.nonzero(shares >= 0.0005), strict=True):
        share = float(shares[row, column])
        tip = text(f"{names[row]} taken for {names[column]}: {percent(share)} %" if row != column
                   else f"{names[row]}: {percent(share)} % right")  # fmt: skip
        kind = "hit" if row == column else "miss"
        place = f'x="{column * cell}" y="{row * cell}"'
        # The square root keeps confusions of a few per cent visible beside the diagonal.
        parts.append(
            f'<rect class="{kind}" {place} width="{cell}" height="{cell}" fill-opacity="{math.sqrt(share):.2f}">'
            f"<title>{tip}</title></rect>"
        )
        if small and share >= 0.005:
            strong = " strong" if share > 0.5 else ""
            parts.append(
                f'<text class="cell{strong}" x="{(column + 0.5) * cell}" y="{(row + 0.5) * cell + 4}">'
                f"{100 * share:.0f}</text>"
            )
    for k, label in enumerate(labels):
        middle = (k + 0.5) * cell + 0.35 * font
        faint = "" if totals[k, 0] else " faint"
        full = f"<title>{text(names[k])}</title>"
        parts.append(f'<text class="row{faint}" x="-6" y="{middle:.1f}">{text(label)}{full}</text>')
        parts.append(
            f'<text class="column" transform="translate({middle:.1f} -6) rotate({turn})">{text(label)}{full}</text>'
        )
    parts.append(f'<text class="axis" x="{side / 2}" y="{side + 20}">predicted</text>')
    origin = f"translate({margin:.0f} {above:.0f})"
    return (
        '<svg class="matrix" role="img" aria-label="Confusion matrix, rows are the truth" '
        f'style="--natural:{width:.0f}px" viewBox="0 0 {width:.0f} {height:.0f}" font-size="{font}">'
        f'<g transform="{origin}">{"".join(parts)}</g></svg>'
    )


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


def _frame(across: Sequence[tuple[float, str]], up: Sequence[str], below: str, beside: str) -> str:
    """Grid lines with their numbers and the names of the axes."""
    parts = []
    for k, label in enumerate(up):
        y = _y(k / (len(up) - 1))
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="up" x="{_LEFT - 8}" y="{y + 4:.1f}">{label}</text>')
    for fraction, label in across:
        parts.append(f'<text class="across" x="{_x(fraction):.1f}" y="{_HEIGHT - _BOTTOM + 17}">{label}</text>')
    parts.append(f'<text class="across" x="{(_WIDTH + _LEFT) / 2}" y="{_HEIGHT - 5}">{text(below)}</text>')
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(f'<text class="across" transform="translate(11 {middle}) rotate(-90)">{text(beside)}</text>')
    return "".join(parts)


def _figure(parts: Sequence[str], label: str) -> str:
    head = f'<svg class="chart" role="img" aria-label="{text(label)}" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
    return f"{head}{''.join(parts)}</svg>"
