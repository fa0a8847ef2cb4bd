"""Reading records back from many files, in any order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from clipseed.store.layout import R, RecordFormat
from clipseed.store.record_file import RecordFile

_MOST_OPEN = 8


def gathered(order: Sequence[str], places: Mapping[str, Path], form: RecordFormat[R]) -> Iterator[R]:
    """Records by id, one by one, keeping the few files open that the order makes use of.

    Raises:
        StoreError: one cannot be read back.
    """
    opened: dict[Path, tuple[RecordFile[R], dict[str, int]]] = {}
    try:
        for identifier in order:
            path = places[identifier]
            if path not in opened:
                while len(opened) >= _MOST_OPEN:
                    opened.pop(next(iter(opened)))[0].close()
                file = RecordFile(path, form, verify=False)
                opened[path] = (file, {key: row for row, key in enumerate(file.ids)})
            file, rows = opened[path]
            yield file.read(rows[identifier])
    finally:
        for file, _ in opened.values():
            file.close()
