"""What the labels of an annotation tool mean in a mask."""

from __future__ import annotations

from clipseed.data.vocabulary import Vocabulary
from clipseed.formats.writing import IGNORE_NAME
from clipseed.types import IGNORE

_FIXED = {"background": 0, IGNORE_NAME: IGNORE}


def value_of(name: str, vocabulary: Vocabulary, where: str) -> int:
    """Mask value of a label: a class, else ``background`` or ``ignore``.

    Raises:
        InputError: none of them.
    """
    fixed = _FIXED.get(name.strip().lower())
    if fixed is not None and name.strip().lower() not in {item.lower() for item in vocabulary.class_names}:
        return fixed
    return vocabulary.index(name, where) + 1
