"""General background words, and which of them a class of a list may be called by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

_COMPOUND = 4
"""Letters from which on a word is looked for at the end of a longer one: greenhouse is a house, husky is no sky."""


@lru_cache(maxsize=1)
def _general() -> tuple[tuple[str, ...], tuple[frozenset[str], ...]]:
    """The general words, and the groups of words that may mean one thing."""
    import yaml

    data: Any = yaml.safe_load((resources.files("clipseed.data") / "background.yaml").read_text(encoding="utf-8"))
    return tuple(data["background"]), tuple(frozenset(group) for group in data["alike"])


def general_words() -> tuple[str, ...]:
    """The words of ``background.yaml``."""
    return _general()[0]


def unlike_classes(words: Iterable[str], phrases: Iterable[str]) -> tuple[str, ...]:
    """Those words that no class may be called.

    A word stays out when all its words are in a name, a text or a synonym of a class (``sign``: stop sign), or all of
    theirs in it; when that is so for a word that may mean the same (``sea``: ocean); and when a class is one word that
    ends in it (``house``: greenhouse). Case, plurals, hyphens and blanks make no difference (``tv monitor``:
    TVMonitors).

    Args:
        words: Candidates.
        phrases: Names, texts and synonyms of the classes (:attr:`~clipseed.data.vocabulary.Vocabulary.phrases`).
    """
    called = [phrase for phrase in map(_words, phrases) if phrase]
    groups = _general()[1]

    def is_called(word: str) -> bool:
        alike = {word}.union(*(group for group in groups if word in group))
        return any(_same(_words(other), phrase) for other in alike for phrase in called) or any(
            len(word) >= _COMPOUND and part.endswith(word) for phrase in called for part in phrase
        )

    return tuple(word for word in words if not is_called(word))


def _same(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two phrases say the same, or one says it with more words."""
    return set(one) <= set(other) or set(other) <= set(one) or "".join(one) == "".join(other)


def _words(phrase: str) -> tuple[str, ...]:
    """Words of a phrase in lower case and singular."""
    return tuple(map(_singular, "".join(c if c.isalnum() else " " for c in phrase.lower()).split()))


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    if word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3 else word
