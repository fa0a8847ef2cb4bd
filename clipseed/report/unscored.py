"""One self-contained HTML page about label masks and CAMs without a truth: ``unscored.html.j2``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL.Image import Image

from clipseed.report.overlay import label_overlay, maps_overlay, outlined
from clipseed.report.survey import Survey
from clipseed.report.text import manifest_text, percent, rendered
from clipseed.report.thumbnails import colour, greyed, mask_uri, photo_pixels, photo_uri, shrunk
from clipseed.store.cam_records import Cam
from clipseed.types import IGNORE, LabelMask


@dataclass(frozen=True)
class SurveyedInput:
    """What the page says about one input.

    Attributes:
        setting: How maps became masks, in words.
        manifest: How the input was made, when that is known.
    """

    name: str
    survey: Survey
    setting: str
    notes: list[str] = field(default_factory=list)
    manifest: dict[str, Any] | None = None


@dataclass(frozen=True)
class Shown:
    """One image of the page.

    Attributes:
        why: Why it is worth a look; empty where it is one of many.
        photo: The image, or why there is none.
        cams: By the name of the input that they come from.
        masks: Likewise.
    """

    id: str
    why: str
    photo: Image | str
    cams: list[tuple[str, Cam]]
    masks: list[tuple[str, LabelMask]]


def render_unscored(
    title: str, inputs: Sequence[SurveyedInput], worth: Sequence[Shown], others: Sequence[Shown]
) -> str:
    """The whole page as text."""
    name = inputs[0].survey.name
    counts = sorted({len(one.survey.images) for one in inputs})
    return rendered(
        "unscored.html.j2",
        title=title,
        subtitle=f"{' and '.join(f'{count:,}' for count in counts)} images; no ground truth, so no scores",
        inputs=[_input(one) for one in inputs],
        galleries=[
            ("Most worth a look", [_card(item, name) for item in worth]),
            ("Some others", [_card(item, name) for item in others]),
        ],
    )


def _input(one: SurveyedInput) -> dict[str, Any]:
    survey = one.survey
    empty = f"; {survey.empty} labels have no pixel" if survey.empty else ""
    return {
        "name": one.name,
        "summary": f"{one.setting}: {percent(survey.coverage, 1)} % of the pixels are labelled, "
        f"{percent(survey.foreground, 1)} % show a class{empty}.",
        "notes": one.notes,
        "classes": [{**vars(item), "colour": colour(item.index + 1)} for item in survey.classes],
        "manifest": manifest_text(one.manifest),
    }


def _card(item: Shown, name: Any) -> dict[str, Any]:
    """Tiles of an image: the photo, maps and masks over it; without a photo the masks alone."""
    masks = [(kind, shrunk(mask)) for kind, mask in item.masks]
    values = sorted({int(value) for _, mask in item.masks for value in set(mask.ravel().tolist())} - {0})
    key = [(colour(value), "ignored" if value == IGNORE else name(value - 1)) for value in values]
    tiles: list[tuple[str, str, str]] = []
    missing = item.photo if isinstance(item.photo, str) else ""
    if isinstance(item.photo, str):
        tiles = [(kind, f"{kind} of {item.id}", mask_uri(mask)) for kind, mask in masks]
    else:
        photo = photo_pixels(item.photo, masks[0][1])
        grey = greyed(photo)
        tiles = [("image", f"image {item.id}", photo_uri(photo))]
        for kind, cam in item.cams:
            small = replace(cam, size=(photo.shape[0], photo.shape[1]))
            overlay = maps_overlay(grey, small.upsampled(), small.classes)
            tiles.append((f"CAMs, {kind}", f"CAMs of {item.id}, {kind}", photo_uri(overlay)))
        for kind, mask in masks:
            drawn = mask if mask.shape == photo.shape[:2] else shrunk(mask)
            tiles.append((kind, f"{kind} of {item.id}", photo_uri(outlined(label_overlay(grey, drawn), drawn))))
    return {"id": item.id, "why": item.why, "missing": missing, "tiles": tiles, "key": key}
