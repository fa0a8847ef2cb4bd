"""Lists of prompt templates: the one in the package, or a user's YAML or text file."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from clipseed.data.text_files import read_text
from clipseed.data.vocabulary import is_template
from clipseed.errors import InputError

_YAML_SUFFIXES = {".yaml", ".yml", ".json"}
_MAX_BYTES = 1_000_000


def load_templates(path: Path | None = None) -> tuple[str, ...]:
    """Templates in the order of the file, the package's own list without one.

    ``.yaml``, ``.yml`` and ``.json`` hold a list of texts; any other file one template per line (``#`` starts a comment
    line).

    Raises:
        InputError: unreadable, empty, a template listed twice or without exactly one ``{}`` and no other brace; with
            file and line.
    """
    if path is None:
        content = (resources.files("clipseed.data") / "templates.yaml").read_text(encoding="utf-8")
        return _checked(_yaml_items(content, "templates.yaml"), "templates.yaml")
    content = read_text(path, "a list of templates", most=_MAX_BYTES)
    is_yaml = path.suffix.lower() in _YAML_SUFFIXES
    return _checked(_yaml_items(content, str(path)) if is_yaml else _lines(content), str(path))


def _checked(items: Iterator[tuple[int, str]], where: str) -> tuple[str, ...]:
    found: dict[str, int] = {}
    for line, template in items:
        if not is_template(template):
            raise InputError(
                f"{where}: line {line}: the template {template[:80]!r} must contain exactly one {{}} and no other brace"
            )
        if template in found:
            raise InputError(
                f"{where}: line {line}: the template {template[:80]!r} is already on line {found[template]}"
            )
        found[template] = line
    if not found:
        raise InputError(f"{where}: no templates here")
    return tuple(found)


def _lines(content: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


def _yaml_items(content: str, where: str) -> Iterator[tuple[int, str]]:
    """Entries of a YAML list with their lines; composed, not loaded, because loading forgets the lines."""
    import yaml

    try:
        node = yaml.compose(content, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise InputError(f"{where}:{line} not valid YAML ({getattr(error, 'problem', None) or error})") from error
    if node is None:
        return
    if not isinstance(node, yaml.SequenceNode):
        raise InputError(f"{where}: line {node.start_mark.line + 1}: templates are a list, one text per entry")
    for item in node.value:
        line = item.start_mark.line + 1
        if not isinstance(item, yaml.ScalarNode) or item.tag != "tag:yaml.org,2002:str":
            raise InputError(f"{where}: line {line}: a template must be a text; put it in quotes")
        yield line, item.value.strip()
