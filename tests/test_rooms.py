"""The import order of docs/architecture.md holds for every import, those inside functions and for types included."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOORS = ("__init__", "__main__")
"""Files of the package itself: they may import anything, and nothing imports them."""


def modules_of(package: Path) -> dict[str, Path]:
    """All modules of a package by their dotted name."""
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(package.rglob("*.py"))
    }


def imports_of(package: Path) -> Iterator[tuple[str, str]]:
    """Every import of one module of a package by another."""
    modules = modules_of(package)
    for module, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import"
                whole = f"{node.module}"
                names = [f"{whole}.{alias.name}" if f"{whole}.{alias.name}" in modules else whole
                         for alias in node.names]  # fmt: skip
            else:
                continue
            yield from ((module, name) for name in dict.fromkeys(names) if name in modules)


def room_of(module: str) -> str:
    """The folder or file directly below the package; the package's own name for its doors."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] not in DOORS else parts[0]


def stated_order(page: str) -> list[str]:
    """The rooms as the first picture of a page lists them: names at the beginning of each line, then what they are."""
    picture = page.split("```")[1].strip()
    return [name for line in picture.splitlines() for name in re.split(r"\s{2,}", line)[0].split()]


def upward(package: Path, order: list[str]) -> list[str]:
    """Imports of a room by another that does not stand behind it."""
    place = {room: number for number, room in enumerate(order)} | {package.name: len(order)}
    return [
        f"{module} imports {imported}"
        for module, imported in imports_of(package)
        if room_of(module) != room_of(imported) and place[room_of(imported)] > place[room_of(module)]
    ]


def circles(package: Path) -> list[str]:
    """Modules from which a chain of imports leads back to them."""
    following: dict[str, set[str]] = {module: set() for module in modules_of(package)}
    for module, imported in imports_of(package):
        following[module].add(imported)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(following[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += following[module]
        return seen

    return [module for module in following if module in reached(module)]


def test_rooms_import_from_those_before_them() -> None:
    order = stated_order((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    assert upward(ROOT / "clipseed", order) == []


def test_every_room_is_in_the_picture() -> None:
    order = stated_order((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    rooms = {room_of(module) for module in modules_of(ROOT / "clipseed")} - {"clipseed"}
    assert sorted(order) == sorted(rooms)


def test_no_import_leads_back() -> None:
    assert circles(ROOT / "clipseed") == []


def test_no_command_imports_another() -> None:
    commands = [
        f"{module} imports {imported}"
        for module, imported in imports_of(ROOT / "clipseed")
        if room_of(module) == room_of(imported) == "cli" and module != "clipseed.cli.main"
        and not imported.rsplit(".", 1)[-1].startswith("_")
    ]  # fmt: skip
    assert commands == []


@pytest.mark.parametrize(
    ("low", "wrong"),
    [
        ("from pack.high.b import x\n", ["pack.low.a imports pack.high.b"]),
        ("def f():\n    from pack.high import b\n", ["pack.low.a imports pack.high.b"]),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pack.high.b\n",
            ["pack.low.a imports pack.high.b"],
        ),
        ("from pack import version\n", ["pack.low.a imports pack"]),
        ("import json\n", []),
    ],
)
def test_the_checks_see_every_kind_of_import(tmp_path: Path, low: str, wrong: list[str]) -> None:
    files = {"__init__.py": "version = 1\n", "low/__init__.py": "", "low/a.py": low, "high/__init__.py": "",
             "high/b.py": "from pack.low.a import y\n"}  # fmt: skip
    for name, text in files.items():
        path = tmp_path / "pack" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    order = stated_order("# Page\n\n```\nlow       below\nhigh      above\n```\n\n```\nother\n```\n")
    assert upward(tmp_path / "pack", order) == wrong
    assert circles(tmp_path / "pack") == (["pack.high.b", "pack.low.a"] if "pack.high" in str(wrong) else [])
