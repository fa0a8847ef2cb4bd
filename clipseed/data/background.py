"""Background words: what surrounds the classes and competes with them in the softmax.

Without any, nothing competes with the class of an image that shows only one, and its map is zero (see
:meth:`clipseed.clip.text.TextBank.competing`). So a class list that names none gets the general words of
``background.yaml``, less those that a class may be called.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from clipseed.data.background_words import unlike_classes
from clipseed.data.paths import is_file
from clipseed.data.text_files import read_text
from clipseed.data.vocabulary import (
    GENERAL,
    MAX_BYTES,
    YAML_SUFFIXES,
    Vocabulary,
    builtin_vocabularies,
    checked,
    load_vocabulary,
    parse_yaml,
    strings,
    text_lines,
    with_general_background,
)
from clipseed.errors import InputError, UsageError

NONE = "none"


def without_background(vocabulary: Vocabulary) -> Vocabulary:
    """The class list with nothing that competes but its own classes."""
    return replace(vocabulary, background=(), background_from=NONE)


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
    if source == NONE:
        return without_background(vocabulary)
    if source == GENERAL:
        return with_general_background(vocabulary)
    if source in builtin_vocabularies():
        words = unlike_classes(load_vocabulary(source).background, vocabulary.phrases)
        return replace(vocabulary, background=words, background_from=source)
    path = Path(source)
    if not is_file(path):
        known = ", ".join((NONE, GENERAL, *builtin_vocabularies()))
        raise UsageError(f"--background {source}: no such file; give one (a word per line), or one of: {known}")
    return checked(replace(vocabulary, background=_read(path), background_from=path.name), f"--background {source}")


def _read(path: Path) -> tuple[str, ...]:
    content = read_text(path, "a list of background words", most=MAX_BYTES)
    if path.suffix.lower() in YAML_SUFFIXES:
        words = strings(parse_yaml(content, str(path)) or [], f"--background {path}")
    else:
        words = tuple(line for _, line in text_lines(content))
    if not words:
        raise InputError(f"--background {path}: holds no words; --background none means none")
    return tuple(dict.fromkeys(words))
