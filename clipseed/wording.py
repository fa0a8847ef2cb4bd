"""Numbers and lists in messages for people."""

from __future__ import annotations

from collections.abc import Collection


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number and what it counts: ``1 image``, ``3 images``; ``many`` where more than an ``s`` differs."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def some(items: Collection[str], count: int = 5) -> str:
    """The first few of a list, and how many there are beside them; a set is put in order."""
    listed = list(items) if not isinstance(items, (set, frozenset)) else sorted(items)
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more
