"""What two manifests have different, told as a person would.

Compared is what decides the content: the command, its options, the model's weights, the words, and what an output was
made from. Paths are notes, and so are names of files (of weights, of a class list): what is in them is compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Manifest = Mapping[str, Any]

_PARTS = ("kind", "method", "options", "source", "model", "vocabulary", "dataset")
_PLACES = {"root", "images", "ground_truth"}
_TAGGING = {"tag_threshold", "tag_top_k"}
_OPTION_OF = {
    "smooth_xy", "smooth_weight", "colour_xy", "colour_rgb", "colour_weight", "iterations", "alpha", "confidence",
    "engine", "scales", "flip", "max_side", "min_side", "paper", "exif", "layers", "rounds", "power", "box_threshold",
    "boxes", "temperature", "dilations", "sharpness", "position_weight", "uncovered", "without_masks", "min_confidence",
    "points_per_side", "crop_layers", "empty", "threshold", "raw", "prompts", "softmax_floor", "preset",
    "stability_threshold", "tag_threshold", "tag_top_k", "split", "precision",
}  # fmt: skip
"""Entries whose option has the same name."""
_OPTIONS = {name: f"--{name.replace('_', '-')}" for name in _OPTION_OF} | {
    "pixel_alpha": "--alpha", "pred_iou_threshold": "--iou-threshold", "min_region_area": "--min-area",
    "format": "--masks-kind", "name": "--dataset",
}  # fmt: skip
_MAKERS = {"crf": "clipseed crf", "sam-masks": "clipseed sam-masks", "sam-seed": "clipseed sam-seed",
           "features": "clipseed prompts --features"}  # fmt: skip
_UNSET = object()


def differences(stored: Manifest, wanted: Manifest, *, dataset: bool = True) -> list[str]:
    """Differences that forbid adding to an output, e.g. ``--max-side 640 then, 512 now``; empty where there are none.

    Args:
        stored: Manifest of the output that is there.
        wanted: Manifest of the run.
        dataset: Compare the data sets, too.
    """
    parts = {part: (stored.get(part), wanted.get(part)) for part in _PARTS if dataset or part != "dataset"}
    kind = parts.pop("kind")
    if kind[0] != kind[1]:
        return [f"made by {_maker(stored)} then, {_maker(wanted)} now"]
    return _told(parts, str(wanted.get("kind")))


def _told(parts: Mapping[str, tuple[Any, Any]], kind: str) -> list[str]:
    telling: dict[str, Callable[[Any, Any], list[str]]] = {
        "method": lambda then, now: [] if then == now else [_method(kind, then, now)],
        "options": _options,
        "source": _source,
        "model": _model,
        "vocabulary": _vocabulary,
        "dataset": _dataset,
    }
    found: list[str] = []
    for part, (then, now) in parts.items():
        mappings = isinstance(then, dict) and isinstance(now, dict)
        if part == "method" or mappings:
            found += telling[part](then, now)
        elif not _equal(then or None, now or None):
            found.append(_entry(part, then, now))
    return found


def _maker(manifest: Manifest) -> str:
    kind, method = str(manifest.get("kind") or "somebody else"), manifest.get("method")
    if "kind" not in manifest:
        return kind
    return _MAKERS.get(kind, f"clipseed refine {method}" if kind == "refine" else f"clipseed {kind}")


def _method(kind: str, then: Any, now: Any) -> str:
    if kind in ("cam", "sam-seed"):
        return f"--method {_value(then)} then, {_value(now)} now"
    return f"{'refine' if kind == 'refine' else 'method'} {_value(then)} then, {_value(now)} now"


def _options(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    keys = sorted(then.keys() | now.keys())
    pairs = [(key, then.get(key), now.get(key)) for key in keys]
    return [_entry(key, before, after) for key, before, after in pairs if not _equal(before, after)]


def _entry(key: str, then: Any, now: Any) -> str:
    option = _OPTIONS.get(key)
    if option and isinstance(then, bool | None) and isinstance(now, bool | None):
        return f"{option} then, not now" if then else f"{option} now, not then"
    return f"{option or key} {_value(then)} then, {_value(now)} now"


def _source(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Of what an output was made from: maps, and in ``masks`` or alone masks of other makers."""
    found: list[str] = []
    for key in ("masks", *_PARTS):
        before, after = then.get(key), now.get(key)
        if key == "masks" and isinstance(before, dict) and isinstance(after, dict):
            found += [f"its segments: {line}" for line in _source(before, after)]
        elif key == "masks":
            found += _imported(then, now)
        elif key == "kind" and before != after:
            return [*found, f"made from the output of {_maker(then)} then, of {_maker(now)} now"]
        elif key != "kind":
            kind = str(now.get("kind"))
            found += [f"what it was made from: {line}" for line in _told({key: (before, after)}, kind)]
    if not _equal(then.get("format"), now.get("format")):
        found.append(_entry("format", then.get("format"), now.get("format")))
    return found


def _imported(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Masks that somebody else made: their content, or their path where an older version did not note that."""
    before, after = then.get("masks"), now.get("masks")
    if "content" in then and "content" in now:
        return [] if then["content"] == now["content"] else [f"other masks: {before} then, {after} now"]
    return [] if before == after else [f"masks {_value(before)} then, {_value(after)} now"]


def _model(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    named = then.get("sha256") is None and then.get("weights") != now.get("weights")  # a folder has no digest
    if then.get("sha256") != now.get("sha256") or named:
        found.append(f"other weights: {_weights(then)} then, {_weights(now)} now")
    if then.get("precision") != now.get("precision"):
        found.append(_entry("precision", then.get("precision"), now.get("precision")))
    told = {"sha256", "precision", "weights", "license"}  # what is known of a license decides nothing
    if then.get("model") != now.get("model"):
        found.append(f"--model {_value(then.get('model'))} then, {_value(now.get('model'))} now")
        told.add("model")
    if not found:  # with other weights everything else may differ
        found = _options(*({key: part[key] for key in part if key not in told} for part in (then, now)))
    return found


def _weights(model: dict[str, Any]) -> str:
    digest = model.get("sha256")
    return f"{model.get('weights')} (sha256 {str(digest)[:8]}…)" if digest else str(model.get("weights") or "none")


def _vocabulary(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = _classes(then.get("classes"), now.get("classes"))
    found += _members("background word", then.get("background"), now.get("background"))
    if not _equal(then.get("templates"), now.get("templates")):
        found.append(f"--template {_list(then.get('templates'))} then, {_list(now.get('templates'))} now")
    told = {"name", "classes", "background", "background_from", "templates"}
    return found + _options(*({key: part[key] for key in part if key not in told} for part in (then, now)))


def _classes(then: Any, now: Any) -> list[str]:
    if _equal(then, now):
        return []
    before, after = _by_name(then), _by_name(now)
    if before is None or after is None:
        return [_entry("classes", then, now)]
    found = [f"class {name!r} was added" for name in after if name not in before]
    found += [f"class {name!r} was removed" for name in before if name not in after]
    for name in after:
        words, earlier = after[name], before.get(name, _UNSET)
        if earlier is not _UNSET and earlier != words:
            found.append(f"class {name!r} is called by other words now: {', '.join(words)}; then: {', '.join(earlier)}")
    kept = [name for name in before if name in after]
    if kept != [name for name in after if name in before]:
        found.append(f"the classes have another order: {_list(list(before))} then, {_list(list(after))} now")
    return found


def _by_name(classes: Any) -> dict[str, Any] | None:
    """Class names with the words that CLIP reads for each."""
    if not isinstance(classes, list) or not all(isinstance(item, dict) and "name" in item for item in classes):
        return None
    if not all(isinstance(item.get("synonyms") or [], list) for item in classes):
        return None
    return {str(item["name"]): [str(item.get("text") or item["name"]), *map(str, item.get("synonyms") or ())]
            for item in classes}  # fmt: skip


def _members(what: str, then: Any, now: Any) -> list[str]:
    if _equal(then or [], now or []):
        return []
    if not isinstance(then, list) or not isinstance(now, list):
        return [f"{what}s {_value(then)} then, {_value(now)} now"]
    found = [f"{what} {word!r} was added" for word in now if word not in then]
    found += [f"{what} {word!r} was removed" for word in then if word not in now]
    return found or [f"the {what}s have another order"]


def _dataset(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Labels are compared image by image: a label file is a place, and so is CLIP."""
    tagged = then.get("labels") == now.get("labels") == "auto"
    notes = _PLACES | {"labels"} | (set() if tagged else _TAGGING)
    return _options(*({key: part[key] for key in part if key not in notes} for part in (then, now)))


def _equal(one: Any, two: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True)


def _list(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, Sequence) and not isinstance(values, str) else str(values)


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        text = ",".join(f"{entry:g}" if isinstance(entry, float) else str(entry) for entry in value)
    else:
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else f"{text[:57]}…"
