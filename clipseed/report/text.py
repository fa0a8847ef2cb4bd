"""Words and numbers of a page: escaped, shortened, in per cent."""

from __future__ import annotations

import math

from markupsafe import Markup, escape


def escaped(value: object) -> Markup:
    """Escape anything for HTML text and quoted attributes; what is markup already stays as it is.

    Characters that do not print (control, surrogates of undecodable ids, direction marks that would turn the text
    around them) become U+FFFD; line breaks stay.
    """
    if isinstance(value, Markup):
        return value
    return escape("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in str(value)))


def shortened(value: str, length: int) -> str:
    """A name cut to ``length`` characters, with an ellipsis; not escaped yet."""
    return value if len(value) <= length else f"{value[: length - 1]}…"


def percent(fraction: float, digits: int = 2) -> str:
    """``0.4567`` to ``45.67``; no value to a dash."""
    return "–" if math.isnan(fraction) else f"{100 * fraction:.{digits}f}"
