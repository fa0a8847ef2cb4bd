"""A folder in a foreign format as an output: written file by file, the same however often the command is run.

Beside the format's own files it has a hidden folder ``.clipseed`` that says how it was made and which files it
consists of. So what is somebody else's is never touched, files that did not change are not written again, and files of
images that are gone are removed.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from clipseed.data.types import check_id
from clipseed.defaults import ImagePlacement
from clipseed.errors import InputError, StoreError, UsageError
from clipseed.formats.writing import TextFile
from clipseed.store.files import remove_leftovers, replacing, storage_errors, write_skipped, write_text

_OWN = ".clipseed"
_SETTINGS, _FILES, SKIPPED = "export.json", "files.txt", "skipped.csv"
_IN_MEMORY = 1 << 22
"""Characters of a list that are kept in memory before they go to a temporary file."""


class ExportFolder:
    """Writes an export; use as a context manager, and end with :meth:`finish`.

    Args:
        out: Made when missing.
        settings: What decides the content, as a command's options.
        texts: The texts of the whole data set, whose lists :meth:`add` fills.
        overwrite: Delete what an earlier export left there first.

    Raises:
        UsageError: ``out`` is a file, or holds other things.
        StoreError: exported with other settings, or not writable.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], texts: Sequence[TextFile], *, overwrite: bool) -> None:
        self.out, self._settings, self._texts, self._overwrite = out, dict(settings), texts, overwrite
        self._before: set[str] = set()
        self._now: set[str] = set()
        self._lists: dict[str, list[_List]] = {}
        self._notes: IO[str] | None = None
        self.written = 0

    def __enter__(self) -> ExportFolder:
        own = self.out / _OWN
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"--out {self.out}: is a file; an export is a folder")
        if self.out.is_dir() and not (own / _SETTINGS).is_file() and any(self.out.iterdir()):
            raise UsageError(f"--out {self.out}: holds things that are no export of clipseed; choose another folder")
        with storage_errors(self.out):
            if not self.out.parent.is_dir():
                raise StoreError(f"{self.out}: the folder {self.out.parent} does not exist")
            own.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.out)
            self._before = self._noted()
            if (own / _SETTINGS).is_file():
                self._compare(own / _SETTINGS)
            write_text(own / _SETTINGS, json.dumps(self._settings, indent=1, sort_keys=True) + "\n")
            self._notes = (own / _FILES).open("a", encoding="utf-8", errors="surrogateescape")
        self._lists = {text.path: [_List(text.between) for _ in text.parts[1:]] for text in self._texts}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._notes is not None:
            self._notes.close()
        for lists in self._lists.values():
            for one in lists:
                one.close()

    def _compare(self, path: Path) -> None:
        if self._overwrite:
            for name in self._before:
                self._remove(name)
            self._before = set()
            (self.out / _OWN / _FILES).unlink(missing_ok=True)
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            then = dict(stored)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise StoreError(f"{path}: damaged; start again with --overwrite") from error
        changed = [
            f"--{key.replace('_', '-')} {then.get(key)} then, {self._settings.get(key)} now"
            for key in sorted(then.keys() | self._settings.keys())
            if then.get(key) != self._settings.get(key)
        ]
        if changed:
            told = "\n  ".join(changed)
            raise StoreError(
                f"{self.out} was exported with other settings; choose another --out, or start again with --overwrite:"
                f"\n  {told}"
            )

    def _noted(self) -> set[str]:
        try:
            text = (self.out / _OWN / _FILES).read_text(encoding="utf-8", errors="surrogateescape")
        except FileNotFoundError:
            return set()
        found = set()
        for line in text.split("\n"):
            with contextlib.suppress(InputError):  # nothing outside of the folder is ours, whatever the list says
                found.add(check_id(line, _FILES))
        return found

    def _note(self, name: str) -> Path:
        """Where a file of the export goes; noted before it is there, so that it can be found and removed."""
        if name not in self._before and name not in self._now:
            assert self._notes is not None
            self._notes.write(f"{name}\n")
            self._notes.flush()
        self._now.add(name)
        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def put(self, name: str, content: bytes) -> None:
        """Write a file, unless it is there with this content.

        Raises:
            StoreError: it cannot be written.
        """
        with storage_errors(self.out / name):
            path = self._note(name)
            if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
                return
            with replacing(path) as temporary:
                temporary.write_bytes(content)
            self.written += 1

    def place(self, name: str, source: Path, how: ImagePlacement) -> None:
        """Copy an image, or link it (hard where the file system can, else symbolic), unless it is there.

        Raises:
            StoreError: it cannot be written.
        """
        with storage_errors(self.out / name):
            path = self._note(name)
            if how == "link":
                if path.exists() and path.samefile(source):
                    return
                path.unlink(missing_ok=True)
                try:
                    os.link(source.resolve(), path)
                except OSError:
                    path.symlink_to(source.resolve())
            else:
                if path.is_file() and not path.is_symlink() and not path.samefile(source) and filecmp.cmp(source, path):
                    return
                path.unlink(missing_ok=True)  # a link of an earlier export is not to be written through
                with replacing(path) as temporary:
                    shutil.copy2(source, temporary)
            self.written += 1

    def reserve(self, name: str) -> Path:
        """Where a file goes that is made out of the finished export; it is the export's, too."""
        return self._note(name)

    def add(self, lines: Mapping[str, Sequence[str]]) -> None:
        """Add an image's lines to the lists."""
        for name, found in lines.items():
            for one, line in zip(self._lists[name], found, strict=True):
                one.add(line)

    def finish(self, skipped: Sequence[tuple[str, str]]) -> Path | None:
        """Write the texts, remove files of images that are gone, and list what was skipped.

        Returns:
            Where that is listed; ``None``: nothing was skipped.

        Raises:
            StoreError: something cannot be written.
        """
        for text in self._texts:
            path = self._note(text.path)
            with replacing(path) as temporary:
                with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
                    stream.write(text.parts[0])
                    for one, part in zip(self._lists[text.path], text.parts[1:], strict=True):
                        one.copy_to(stream)
                        stream.write(part)
                self.written += not (path.is_file() and filecmp.cmp(temporary, path, shallow=False))
        with storage_errors(self.out):
            for name in sorted(self._before - self._now):
                self._remove(name)
        return write_skipped(self.out / _OWN / SKIPPED, skipped)

    def _remove(self, name: str) -> None:
        path = self.out / name
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
            path.unlink()
        for folder in path.relative_to(self.out).parents:
            with contextlib.suppress(OSError):  # not empty
                if folder != Path():
                    (self.out / folder).rmdir()


class _List:
    """Lines that wait for the texts around them, on the disk when they are many."""

    def __init__(self, between: str) -> None:
        self._between, self._empty = between, True
        self._file = tempfile.SpooledTemporaryFile(  # noqa: SIM115
            _IN_MEMORY, "w+", encoding="utf-8", errors="surrogateescape", newline="\n"
        )

    def add(self, line: str) -> None:
        """Add one; an empty one is none."""
        if line:
            self._file.write(line if self._empty else self._between + line)
            self._empty = False

    def copy_to(self, stream: IO[str]) -> None:
        """Write all of them."""
        self._file.seek(0)
        shutil.copyfileobj(self._file, stream)

    def close(self) -> None:
        """Let go of them."""
        self._file.close()
