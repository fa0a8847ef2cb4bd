"""Background words: what surrounds the classes and competes with them in the softmax.

Without any, nothing competes with the class of an image that shows only one, and its map is zero (see
:meth:`clipseed.clip.text.TextBank.competing`). So a class list that names none gets the general words of
``background.yaml``, less those that a class may be called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipseed.data.paths import is_file
from clipseed.errors import InputError, UsageError

if TYPE_CHECKING:
    from clipseed.data.vocabulary import Vocabulary

GENERAL = "general"
NONE = "none"
_COMPOUND = 4
"""Letters from which on a word is looked for at the end of a longer one: greenhouse is a house, husky is no sky."""


@lru_cache(maxsize=1)
def _general() -> tuple[tuple[str, ...], tuple[frozenset[str], ...]]:
    """The general words, and the groups of words that may mean one thing."""
    import yaml

    data: Any = yaml.safe_load((resources.files("clipseed.data") / "background.yaml").read_text(encoding="utf-8"))
    return tuple(data["background"]), tuple(frozenset(group) for group in data["alike"])


def without_background(vocabulary: Vocabulary) -> Vocabulary:
    """The class list with nothing that competes but its own classes."""
    return replace(vocabulary, background=(), background_from=NONE)


def with_general_background(vocabulary: Vocabulary) -> Vocabulary:
    """The class list with the general words, less those that a class may be called."""
    return replace(
        vocabulary, background=unlike_classes(_general()[0], vocabulary), background_from=GENERAL
    )  # fmt: skip


def choose_background(vocabulary: Vocabulary, source: str) -> Vocabulary:
    """The class list with other background words, as ``--background`` says.

    Args:
        vocabulary: Its own words are replaced.
        source: ``none``; ``general``; the name of a built-in class list, whose words are taken; or a file with one word
            per line, or a YAML list. Words of a file are taken as they are, the others less those that a class may be
            called.

    Raises:
        UsageError: no such name or file.
        InputError: a file that cannot be read, or holds no words.
    """
    from clipseed.data.vocabulary import builtin_vocabularies, checked, load_vocabulary

    if source == NONE:
        return without_background(vocabulary)
    if source == GENERAL:
        return with_general_background(vocabulary)
    if source in builtin_vocabularies():
        words = unlike_classes(load_vocabulary(source).background, vocabulary)
        return replace(vocabulary, background=words, background_from=source)
    path = Path(source)
    if not is_file(path):
        known = ", ".join((NONE, GENERAL, *builtin_vocabularies()))
        raise UsageError(f"--background {source}: no such file; give one (a word per line), or one of: {known}")
    return checked(replace(vocabulary, background=_read(path), background_from=path.name), f"--background {source}")


def _read(path: Path) -> tuple[str, ...]:
    from clipseed.data.listing import read_text
    from clipseed.data.vocabulary import MAX_BYTES, YAML_SUFFIXES, parse_yaml, strings, text_lines

    content = read_text(path, "a list of background words", most=MAX_BYTES)
    if path.suffix.lower() in YAML_SUFFIXES:
        words = strings(parse_yaml(content, str(path)) or [], f"--background {path}")
    else:
        words = tuple(line for _, line in text_lines(content))
    if not words:
        raise InputError(f"--background {path}: holds no words; --background none means none")
    return tuple(dict.fromkeys(words))


def unlike_classes(words: Iterable[str], vocabulary: Vocabulary) -> tuple[str, ...]:
    """Those words that no class may be called.

    A word stays out when all its words are in a name, a text or a synonym of a class (``sign``: stop sign), or all of
    theirs in it; when that is so for a word that may mean the same (``sea``: ocean); and when a class is one word that
    ends in it (``house``: greenhouse). Case, plurals, hyphens and blanks make no difference (``tv monitor``:
    TVMonitors).
    """
    named = (_words(phrase) for item in vocabulary.classes for phrase in (item.name, item.text, *item.synonyms))
    called = [phrase for phrase in named if phrase]
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
