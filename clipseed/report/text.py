"""Words and numbers of a page: escaped, shortened, in per cent; and the templates that they are put into."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


def escaped(value: object) -> Markup:
    """Escape anything for HTML text and quoted attributes; what is markup already stays as it is.

    Characters that do not print (control, surrogates of undecodable ids, direction marks that would turn the text
    around them) become U+FFFD; line breaks stay.
    """
    if isinstance(value, Markup):
        return value
    text = str(value)
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    return escape(text)


def shortened(value: str, length: int) -> str:
    """A name cut to ``length`` characters, with an ellipsis; not escaped yet."""
    return value if len(value) <= length else f"{value[: length - 1]}…"


def percent(fraction: float, digits: int = 2) -> str:
    """``0.4567`` to ``45.67``; no value to a dash."""
    return "–" if math.isnan(fraction) else f"{100 * fraction:.{digits}f}"


def rendered(template: str, **values: Any) -> str:
    """A page from one of the templates in this room; everything put into it is escaped."""
    environment = Environment(
        loader=PackageLoader("clipseed.report", ""), autoescape=True, finalize=escaped, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["percent"] = percent
    return environment.get_template(template).render(**values)


def manifest_text(manifest: Mapping[str, Any] | None) -> str | None:
    """A manifest as people read it; nothing where there is none."""
    return json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) if manifest else None
