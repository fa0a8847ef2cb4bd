"""How learned prompts are laid out: which names, which of them share a context, and where it stands.

Shapes: G names, the classes first, then the background; U contexts of M vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipseed.clip.text import SLOT
from clipseed.data.text_files import read_text
from clipseed.data.vocabulary import MAX_BYTES, Vocabulary, parse_yaml
from clipseed.defaults import NamePosition
from clipseed.errors import InputError, UsageError

BACKGROUND_GROUP = "background"


@dataclass(frozen=True)
class PromptLayout:
    """Prompts before anything is learned.

    Attributes:
        names: G texts, those of the classes first; an empty one is a nameless prompt, context and full stop.
        classes: How many of them are classes.
        groups: Number of each name's context, from 0.
        position: Where the name stands: at the ``end``, in ``front`` of the context, or in its ``middle``.
        length: Vectors of a context, M.
        shared: One context of two axes; otherwise there are three, even with a single context.
    """

    names: tuple[str, ...]
    classes: int
    groups: tuple[int, ...]
    position: NamePosition
    length: int
    shared: bool

    @property
    def contexts(self) -> int:
        """How many contexts there are, U."""
        return max(self.groups) + 1

    def shape(self, width: int) -> tuple[int, ...]:
        """Of the learned tensor, for token embeddings of a width: ``(M, D)`` or ``(U, M, D)``."""
        return (self.length, width) if self.shared else (self.contexts, self.length, width)

    @property
    def prompts(self) -> list[str]:
        """The G prompts, with :data:`~clipseed.clip.text.SLOT` for each learned vector."""
        return [self._prompt(name) for name in self.names]

    def _prompt(self, name: str) -> str:
        before = {"end": self.length, "front": 0, "middle": self.length // 2}[self.position]
        words = [SLOT] * before + ([name] if name else []) + [SLOT] * (self.length - before)
        return " ".join(words) + "."

    def as_dict(self) -> dict[str, Any]:
        """Plain data for files; :func:`layout_of` reads it back."""
        return {
            "names": list(self.names), "classes": self.classes, "groups": list(self.groups), "position": self.position,
            "length": self.length, "shared": self.shared,
        }  # fmt: skip


def layout_of(data: Mapping[str, Any]) -> PromptLayout:
    """A layout out of a file's description.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    names, groups = tuple(map(str, data["names"])), tuple(map(int, data["groups"]))
    if len(names) != len(groups) or set(groups) != set(range(max(groups) + 1)) or data["position"] not in POSITIONS:
        raise ValueError("names, groups and position do not fit each other")
    if not 0 < int(data["classes"]) <= len(names):
        raise ValueError("classes and names do not fit each other")
    return PromptLayout(
        names, int(data["classes"]), groups, data["position"], int(data["length"]), bool(data["shared"])
    )


POSITIONS: tuple[NamePosition, ...] = ("end", "front", "middle")


def make_layout(
    vocabulary: Vocabulary, sharing: str, position: NamePosition, length: int, nameless: int | None
) -> PromptLayout:
    """The prompts of a class list.

    Args:
        vocabulary: Of which all words of a class make one name, as in CLIP-ES; templates are not used.
        sharing: ``shared``, ``class`` (each name has a context of its own), or a file: see :func:`read_groups`.
        position: Where names stand.
        length: Vectors of a context.
        nameless: So many nameless background prompts; ``None``: the vocabulary's background words.

    Raises:
        UsageError: the file names classes that there are not.
        InputError: it cannot be read.
    """
    background = vocabulary.background if nameless is None else ("",) * nameless
    names = (*(item.prompt for item in vocabulary.classes), *background)
    groups: Sequence[int]
    if sharing == "shared":
        groups = (0,) * len(names)
    elif sharing == "class":
        groups = range(len(names))
    else:
        groups = read_groups(Path(sharing), vocabulary, len(background))
    return PromptLayout(names, len(vocabulary.classes), tuple(groups), position, length, sharing == "shared")


def read_groups(path: Path, vocabulary: Vocabulary, background: int) -> list[int]:
    """Which names share a context: YAML, ``class: group`` for each class and ``background: group`` for the background.

    Classes that are not named share one context, and so does a background that is not named.

    Raises:
        InputError: no such file, or no such mapping.
        UsageError: it names no class of the vocabulary.
    """
    data = parse_yaml(read_text(path, "a file of groups", most=MAX_BYTES), str(path))
    if not isinstance(data, dict) or not all(isinstance(value, str | int) for value in data.values()):
        raise InputError(f"{path}: groups of names are a mapping 'class: group' (YAML)")
    given = {str(name): str(group) for name, group in data.items()}
    if unknown := sorted(given.keys() - set(vocabulary.class_names) - {BACKGROUND_GROUP}):
        raise UsageError(f"{path}: {unknown[0]!r} is no class of {vocabulary.name}")
    labels = [given.get(name, "") for name in vocabulary.class_names]
    labels += [given.get(BACKGROUND_GROUP, f"\0{BACKGROUND_GROUP}")] * background
    number = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    return [number[label] for label in labels]
