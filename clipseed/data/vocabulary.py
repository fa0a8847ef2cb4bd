"""Class names and the words that describe them: CLIP-ES's vocabulary as data that users copy and edit."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from clipseed.data.background_words import general_words, unlike_classes
from clipseed.data.paths import is_file
from clipseed.data.text_files import read_text
from clipseed.errors import InputError

DEFAULT_TEMPLATE = "a clean origami {}."
OWN_BACKGROUND = "class list"
GENERAL = "general"
MAX_BYTES = 1_000_000
"""No list of 254 classes is longer; YAML takes seconds for each megabyte."""
YAML_SUFFIXES = {".yaml", ".yml", ".json"}
_KNOWN_KEYS = {"name", "description", "templates", "classes", "background"}
_NOTED_KEYS = {"background_from"}
"""What manifests say about a class list besides."""
_KNOWN_CLASS_KEYS = {"name", "text", "synonyms"}


@dataclass(frozen=True)
class ClassText:
    """One class: the name that labels use, and the words that CLIP reads.

    CLIP-ES fuses synonyms on the sentence level (paper, section 3.2): :attr:`prompt` puts them all into one phrase.
    """

    name: str
    text: str = ""
    synonyms: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """The phrase that goes into the template, e.g. ``person with clothes,people,human``."""
        return ",".join((self.text or self.name, *self.synonyms))


@dataclass(frozen=True)
class Vocabulary:
    """The classes of a data set, the background words that compete with them, and the prompt templates.

    Attributes:
        name: Short name for manifests and tables.
        classes: Mask value = index + 1, since 0 is the background.
        background: Things that may surround the classes; they take part in the softmax only.
        background_from: Where these words come from, for people: ``class list``, or what ``--background`` can be told
            (:mod:`clipseed.data.background`).
        templates: Each contains one ``{}``; several are averaged in feature space.
    """

    name: str
    classes: tuple[ClassText, ...]
    background: tuple[str, ...] = ()
    templates: tuple[str, ...] = field(default=(DEFAULT_TEMPLATE,))
    background_from: str = field(default=OWN_BACKGROUND, compare=False)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in class order."""
        return tuple(item.name for item in self.classes)

    @property
    def phrases(self) -> tuple[str, ...]:
        """All that the classes are called: names, texts and synonyms."""
        return tuple(phrase for item in self.classes for phrase in (item.name, item.text, *item.synonyms))

    @cached_property
    def _index(self) -> dict[str, int]:
        return {_fold(item.name): position for position, item in enumerate(self.classes)}

    def index(self, label: str | int, where: str) -> int:
        """Class index of a label: a class name (case, ``_`` and ``-`` do not matter) or an index.

        Raises:
            InputError: unknown label; ``where`` and the closest names are in the message.
        """
        if isinstance(label, int) or label.strip().isdecimal():
            shown = str(label).strip()
            position = int(shown) if len(shown) < 10 else -1  # Python refuses numbers of thousands of digits
            if not 0 <= position < len(self.classes):
                raise InputError(
                    f"{where}: there is no class {shown[:20]}; those of vocabulary {self.name!r} are numbered from 0 "
                    f"to {len(self.classes) - 1}"
                )
            return position
        found = self._index.get(_fold(label))
        if found is None:
            near = difflib.get_close_matches(_fold(label), self._index, n=3, cutoff=0.5)
            names = [self.classes[self._index[name]].name for name in near]
            many = "one class" if len(self.classes) == 1 else f"{len(self.classes)} classes"
            hint = f"; did you mean {' or '.join(map(repr, names))}?" if names else "."
            raise InputError(
                f"{where}: unknown class {label[:80]!r} (vocabulary {self.name!r} has {many}){hint} "
                "Give the data's own class list with --classes FILE."
            )
        return found

    def knows(self, name: str) -> bool:
        """Whether a text is the name of a class."""
        return _fold(name) in self._index

    def indices(self, labels: Iterable[str | int], where: str) -> tuple[int, ...]:
        """Indices of several labels in their own order, repeats dropped."""
        return tuple(dict.fromkeys(self.index(label, where) for label in labels))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for manifests; :func:`parse_vocabulary` reads it back."""
        classes = [{"name": c.name, "text": c.text, "synonyms": list(c.synonyms)} for c in self.classes]
        return {
            "name": self.name,
            "templates": list(self.templates),
            "classes": classes,
            "background": list(self.background),
            "background_from": self.background_from,
        }


def _fold(name: str) -> str:
    return " ".join(name.strip().lower().replace("_", " ").replace("-", " ").split())


def builtin_vocabularies() -> tuple[str, ...]:
    """Names that :func:`load_vocabulary` knows without a file."""
    folder = resources.files("clipseed.data") / "vocabularies"
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


def load_vocabulary(source: str | Path) -> Vocabulary:
    """Load a vocabulary by built-in name (``voc``, ``coco``, …) or from a file.

    A file is YAML as in ``clipseed/data/vocabularies``, or plain text with one class per line
    (``name`` or ``name: words,more words``). A list that says nothing about the background gets the general words
    (:mod:`clipseed.data.background`); ``background: []`` in YAML means none.

    Raises:
        InputError: no such name or file, or malformed content (with file and line).
    """
    if str(source) in builtin_vocabularies():
        content = (resources.files("clipseed.data") / "vocabularies" / f"{source}.yaml").read_text(encoding="utf-8")
        return parse_vocabulary(parse_yaml(content, str(source)), str(source), str(source))
    path = Path(source)
    if not is_file(path):
        known = ", ".join(builtin_vocabularies())
        raise InputError(f"{source}: no such class list; give a file, or one of: {known}")
    content = read_text(path, "a class list", most=MAX_BYTES)
    if path.suffix.lower() not in YAML_SUFFIXES:
        return with_general_background(_parse_lines(content, path))
    data = parse_yaml(content, str(path))
    vocabulary = parse_vocabulary(data, str(path), path.stem)
    return vocabulary if data.get("background") is not None else with_general_background(vocabulary)


def named_vocabulary(names: Iterable[str], name: str, where: str) -> Vocabulary:
    """A class list of bare names, with the general background words.

    Raises:
        InputError: there are none, or one is listed twice or impossible.
    """
    return with_general_background(checked(Vocabulary(name, tuple(map(ClassText, names))), where))


def with_general_background(vocabulary: Vocabulary) -> Vocabulary:
    """The class list with the general words, less those that a class may be called."""
    words = unlike_classes(general_words(), vocabulary.phrases)
    return replace(vocabulary, background=words, background_from=GENERAL)


def parse_yaml(content: str, where: str) -> Any:
    """Plain data of a YAML or JSON text.

    Raises:
        InputError: not valid, or with aliases.
    """
    import yaml

    try:
        if "*" in content:  # Aliases of aliases make a page of text grow without bounds.
            for event in yaml.parse(content, Loader=yaml.SafeLoader):
                if isinstance(event, yaml.AliasEvent):
                    line = event.start_mark.line + 1 if event.start_mark else "?"
                    raise InputError(
                        f"{where}: line {line}: aliases (*{event.anchor}) are not read here; write it out, or put the "
                        "text in quotes"
                    )
        return yaml.safe_load(content)
    except InputError:
        raise
    except Exception as error:  # Values that do not fit their tag make PyYAML raise nearly anything.
        mark = getattr(error, "problem_mark", None)
        at = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or f"{type(error).__name__}: {error}"
        raise InputError(f"{where}:{at} not valid YAML ({problem})") from error


def text_lines(content: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, without comments and empty ones."""
    for number, raw in enumerate(content.splitlines(), 1):
        line = re.split(r"(?:^|\s)#", raw, maxsplit=1)[0].strip()  # a class may be called C#
        if line:
            yield number, line


def _parse_lines(content: str, path: Path) -> Vocabulary:
    """One class per line; after a colon the words CLIP reads, the first being the text and the rest synonyms."""
    classes = []
    for number, line in text_lines(content):
        name, _, words = line.partition(":")
        parts = [part.strip() for part in words.split(",") if part.strip()]
        if not name.strip():
            raise InputError(f"{path}: line {number}: a class needs a name before the colon")
        classes.append(ClassText(name.strip(), *((parts[0], tuple(parts[1:])) if parts else ())))
    return checked(Vocabulary(path.stem, tuple(classes)), str(path))


def parse_vocabulary(data: Any, where: str, default_name: str) -> Vocabulary:
    """Build a vocabulary from plain data (YAML, JSON, or a manifest's ``vocabulary`` entry).

    Raises:
        InputError: wrong types, unknown keys, duplicate names, or a template without ``{}``.
    """
    if not isinstance(data, dict) or not isinstance(data.get("classes"), list):
        raise InputError(f"{where}: a vocabulary is a mapping with a list 'classes' (see clipseed/data/vocabularies)")
    unknown = sorted(set(map(str, data)) - _KNOWN_KEYS - _NOTED_KEYS)
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0][:80]!r}; known keys are {', '.join(sorted(_KNOWN_KEYS))}")
    classes = tuple(_parse_class(item, f"{where}: class {number}") for number, item in enumerate(data["classes"]))
    background = strings(data.get("background") or [], f"{where}: background")
    templates = strings(data.get("templates") or [DEFAULT_TEMPLATE], f"{where}: templates")
    name = data.get("name") or default_name
    if not isinstance(name, str | int):
        raise InputError(f"{where}: 'name' must be a string")
    origin = str(data.get("background_from") or OWN_BACKGROUND)
    return checked(Vocabulary(str(name), classes, background, templates, origin), where)


def _parse_class(item: Any, where: str) -> ClassText:
    if isinstance(item, str):
        item = {"name": item}
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise InputError(f"{where}: must be a name, or a mapping with 'name' and optionally 'text' and 'synonyms'")
    unknown = sorted(set(map(str, item)) - _KNOWN_CLASS_KEYS)
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0][:80]!r}; known are {', '.join(sorted(_KNOWN_CLASS_KEYS))}")
    text = item.get("text") or ""
    if not isinstance(text, str):
        raise InputError(f"{where}: 'text' must be a string")
    return ClassText(item["name"].strip(), text, strings(item.get("synonyms") or [], f"{where}: synonyms"))


def strings(value: Any, where: str) -> tuple[str, ...]:
    """A list of texts from plain data.

    Raises:
        InputError: it is none.
    """
    if not isinstance(value, list) or not all(isinstance(entry, str) and entry.strip() for entry in value):
        raise InputError(f"{where}: must be a list of non-empty strings")
    return tuple(value)


def checked(vocabulary: Vocabulary, where: str) -> Vocabulary:
    """Return a vocabulary that can be used, or raise :class:`InputError` with ``where`` and the reason."""
    if not vocabulary.classes:
        raise InputError(f"{where}: the vocabulary has no classes")
    if len(vocabulary.classes) > 254:
        raise InputError(f"{where}: {len(vocabulary.classes)} classes; 8-bit masks hold at most 254")
    seen: dict[str, str] = {}
    for item in vocabulary.classes:
        if not item.name.strip() or item.name.strip().isdigit():
            raise InputError(f"{where}: class name {item.name[:80]!r} must not be empty or a bare number")
        if _fold(item.name) in seen:
            raise InputError(f"{where}: class {item.name[:80]!r} is listed twice")
        seen[_fold(item.name)] = item.name
    for word in (*vocabulary.phrases, *vocabulary.background, *vocabulary.templates):
        if any(character in "\0\n\r\x1b" or "\ud800" <= character <= "\udfff" for character in word):
            raise InputError(f"{where}: {word[:80]!r} holds a line break, a control character or half a character")
    for template in vocabulary.templates:
        if not is_template(template):
            raise InputError(f"{where}: template {template[:80]!r} must contain exactly one {{}} and no other brace")
    return vocabulary


def is_template(text: str) -> bool:
    """Whether ``text`` holds one ``{}`` and no other brace, which ``str.format`` would take for a field of its own."""
    return text.count("{}") == 1 and not set("{}") & set(text.replace("{}", ""))
