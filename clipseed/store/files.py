"""Writing files so that a crash leaves either the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from clipseed.errors import StoreError, UsageError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; on leaving without error it is synced and renamed to ``path``.

    Raises:
        StoreError: the folder is read-only, the disk full, ``path`` no file, or the like.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{_short(path.name)}")
    try:
        with storage_errors(path):
            if path.exists() and not path.is_file():  # renaming onto a device or a pipe would do away with it
                raise StoreError(f"{path}: is a folder, a device or a pipe; give the name of a file")
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _short(name: str) -> str:
    """Names may have 255 bytes: one that leaves no room for a prefix is replaced by its digest."""
    if len(os.fsencode(name)) < 200:
        return name
    return hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def storage_errors(path: Path, option: str = "--out") -> Iterator[None]:
    """Turn operating-system errors into a :class:`StoreError` that names ``path`` and the way out, ``option``."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # HDF5 raises either, and reports the system's error number only inside its message.
        number, text = getattr(error, "errno", None), str(error)
        if isinstance(error, RuntimeError) and "errno = " not in text:
            raise
        if number == errno.ENOSPC or "errno = 28" in text:
            raise StoreError(f"{path}: the disk is full; free some space and run the same command again") from error
        if number in {errno.EACCES, errno.EROFS, errno.EPERM} or "errno = 13" in text or "errno = 30" in text:
            raise StoreError(f"{path}: may not be written here (read-only?); choose another {option}") from error
        if number == errno.ENOENT and not path.parent.is_dir():
            raise StoreError(f"{path}: the folder {path.parent} does not exist") from error
        if number == errno.ENAMETOOLONG:
            raise StoreError(f"{path}: the file name is too long for this file system") from error
        raise StoreError(f"{path}: cannot be written ({error})") from error


def refuse_unwritable(path: Path | None, option: str) -> None:
    """Find out before the work whether the file of an option can be written; ``None`` was not given.

    Raises:
        UsageError: it cannot, naming the option.
    """
    if path is None:
        return
    if path.exists() and not path.is_file():
        raise UsageError(f"{option} {path}: is a folder, a device or a pipe; give the name of a file")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: the folder {path.parent} does not exist")
    # Whether a folder can be written to is known for sure only by writing: to root, read-only mounts look writable.
    probe = path.with_name(f".tmp-{os.getpid()}-probe-{_short(path.name)}")
    try:
        probe.touch()
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written ({error.strerror}); choose another {option}") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def freshen(path: Path, source: Path) -> None:
    """Let a finished output be newer than what it was made from.

    A run that found nothing to do leaves its content alone; by its time ``make`` sees that it was looked at.
    """
    with contextlib.suppress(OSError):  # a file system that keeps its times does no harm
        made = source.stat().st_mtime_ns
        if path.exists() and path.stat().st_mtime_ns <= made:  # clocks of file systems tick slowly
            now = max(time.time_ns(), made + 1)
            os.utime(path, ns=(now, now))


def write_text(path: Path, content: str) -> None:
    """Write a small text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def write_text_once(path: Path, content: str) -> None:
    """Write a small text file atomically unless it is there: of several runs, the first one's stays."""
    temporary = path.with_name(f".tmp-{os.getpid()}-once-{_short(path.name)}")
    with storage_errors(path):
        try:
            temporary.write_text(content, encoding="utf-8")
            _sync(temporary)
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError as error:
            if error.errno not in {errno.EPERM, errno.ENOTSUP, errno.EINVAL, errno.EMLINK}:
                raise
            temporary.replace(path)  # a file system without links
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def csv_text(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as text: lines end in a line feed, ids that are no Unicode (file names of other times) are escaped."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(head)
    table.writerows(rows)
    return buffer.getvalue().encode("utf-8", "backslashreplace").decode()


def write_skipped(path: Path, skipped: Sequence[tuple[str, str]]) -> Path | None:
    """List skipped images, or remove an older list when there are none."""
    if not skipped:
        path.unlink(missing_ok=True)
        return None
    write_text(path, csv_text(("id", "reason"), skipped))
    return path


def remove_leftovers(folder: Path, ours: Callable[[Path], bool] = lambda path: True) -> None:
    """Delete temporary files that a killed run left in a folder and below, where they are ``ours``."""
    for leftover in folder.rglob(".tmp-*"):
        if ours(leftover):
            with contextlib.suppress(OSError):
                leftover.unlink()


def remove_leftovers_of(path: Path) -> None:
    """Delete temporary files that a killed run left beside the file that it was to write."""
    name = _short(path.name)
    for leftover in path.parent.glob(".tmp-*"):
        number, _, rest = leftover.name.removeprefix(".tmp-").partition("-")
        if number.isdigit() and rest == name:
            with contextlib.suppress(OSError):
                leftover.unlink()
