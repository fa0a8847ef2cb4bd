"""One self-contained HTML page about the training of a segmenter: its curves, and a few images at several steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from clipseed.report.charts import line_chart
from clipseed.report.overlay import label_overlay, outlined
from clipseed.report.text import rendered
from clipseed.report.thumbnails import greyed, photo_pixels, photo_uri, shrunk
from clipseed.types import LabelMask

POINTS = 200
"""Most points of a curve: losses are averaged over neighbouring steps."""
_CAPTIONS = {
    "loss": "Loss", "segmentation": "Segmentation loss", "affinity": "Affinity loss",
    "scores": "Loss of the scores by text",
    "saturated": "Share of affinities above 0.99, where the sigmoid is flat",
    "probability": "Mean probability that CLIP gives to the images' classes; where it is tiny, words and images do not "
    "belong together",
    "gradient": "Length of the gradient", "lr": "Learning rate",
}  # fmt: skip


def render_training(
    title: str, subtitle: str, metrics: Sequence[Mapping[str, Any]], previews: Sequence[Any], about: Mapping[str, Any]
) -> str:
    """The whole page as text.

    Args:
        title: Heading.
        subtitle: A line below it.
        metrics: Rows of ``metrics.jsonl``.
        previews: :class:`clipseed.train.previews.Preview`, as many as there are.
        about: What the segmenter's file says of itself.
    """
    return rendered(
        "training.html.j2", title=title, subtitle=subtitle, charts=_charts(metrics),
        rows=[_tiles(preview) for preview in previews], about=json.dumps(about, indent=1, ensure_ascii=False),
    )  # fmt: skip


def _charts(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[Markup, str]]:
    charts = []
    scores = [(float(row["step"]), float(row["validation"]["score"])) for row in metrics if "validation" in row]
    if scores:
        charts.append((line_chart(scores, "mIoU"), "Mean IoU on the images that are scored while it learns"))
    names = [name for name in (metrics[0] if metrics else {}) if name not in {"step", "validation"}]
    for name in names:
        points = _averaged([(float(row["step"]), float(row[name])) for row in metrics if name in row])
        charts.append((line_chart(points, name), _CAPTIONS.get(name, name)))
    return charts


def _averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``POINTS`` points, means of neighbours."""
    if not points:
        return []
    groups = np.array_split(np.array(points), min(POINTS, len(points)))
    return [(float(group[:, 0].mean()), float(group[:, 1].mean())) for group in groups]


def _tiles(preview: Any) -> list[tuple[str, str]]:
    """Caption and tile: image, truth, then prediction and pseudo-label of each step."""
    truth = shrunk(preview.truth)
    with Image.open(preview.image) as opened:
        photo = photo_pixels(opened, truth)
    grey = greyed(photo)

    def drawn(mask: LabelMask) -> str:
        small = shrunk(mask)
        return photo_uri(outlined(label_overlay(grey, small), small))

    tiles = [("image", photo_uri(photo)), ("truth", drawn(preview.truth))]
    names = {"pseudo": "pseudo-label", "prediction": "prediction"}
    for step, masks in preview.steps.items():
        tiles += [(f"{names[name]}, step {step}", drawn(masks[name])) for name in names if name in masks]
    return tiles
