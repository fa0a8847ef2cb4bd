"""Stamps of image files: noticing that a file was replaced, without reading the files that were not.

A stamp holds a file's length, its modification time and half of its SHA-256. Length and time cost one look at the file
system: another length is another file, the same length and time the same one. Only where the length agrees and the time
does not, as after a copy without times (``cp``, ``git checkout``, a container's image), the file is read and its digest
decides. So moving, ``rsync -a`` and mounting elsewhere cost nothing, and a copy costs reading, never computing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from clipseed.data.paths import never_ends
from clipseed.digest import file_sha256

DIGEST_BYTES = 16
_LOOKERS = 16
"""Threads that ask the file system: over a network each answer takes about a millisecond."""
_AT_ONCE = 4096
_PACKED = struct.Struct(f"<qq{DIGEST_BYTES}s")


@dataclass(frozen=True)
class FileStamp:
    """What tells one file from another.

    Attributes:
        length: In bytes.
        time: When it was modified, in nanoseconds since 1970.
        sha256: The first 16 bytes of the SHA-256 of its content; all zero where it is not known, as for images that
            are drawn and in outputs of older versions.
    """

    length: int = 0
    time: int = 0
    sha256: bytes = bytes(DIGEST_BYTES)

    def packed(self) -> bytes:
        """In 32 bytes, for holding many."""
        return _PACKED.pack(self.length, self.time, self.sha256)

    @classmethod
    def unpacked(cls, packed: bytes) -> FileStamp:
        """What :meth:`packed` gave."""
        return cls(*_PACKED.unpack(packed))

    @property
    def known(self) -> bool:
        """Whether it says anything."""
        return any(self.sha256)

    def differs(self, other: FileStamp) -> bool:
        """Whether both are known and of different content."""
        return self.known and other.known and self.sha256 != other.sha256


UNKNOWN = FileStamp()


def file_stamp(path: Path | None) -> FileStamp:
    """The stamp of a file; :data:`UNKNOWN` where there is none that can be read, which its decoder will say."""
    if path is None or never_ends(path):
        return UNKNOWN
    try:
        # Looked at before it is read: a file that is replaced meanwhile is noticed by the next run.
        status = path.stat()
        digest = bytes.fromhex(file_sha256(path))
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return UNKNOWN
    return FileStamp(status.st_size, status.st_mtime_ns, digest[:DIGEST_BYTES])


def is_replaced(stamp: FileStamp, path: Path | None) -> bool:
    """Whether another content is under this path now; a file that is gone was not replaced."""
    if path is None or not stamp.known:
        return False
    try:
        status = path.stat()
    except (OSError, ValueError):
        return False
    if status.st_size != stamp.length:
        return True
    return status.st_mtime_ns != stamp.time and stamp.differs(file_stamp(path))


def replaced(files: Iterable[tuple[str, FileStamp, Path | None]]) -> set[str]:
    """Ids, of ``(id, stamp, path)``, whose file was replaced."""
    found: set[str] = set()
    waiting: list[tuple[str, FileStamp, Path | None]] = []
    with ThreadPoolExecutor(_LOOKERS, thread_name_prefix="look") as pool:

        def look() -> None:
            answers = pool.map(lambda item: is_replaced(item[1], item[2]), waiting)
            found.update(item[0] for item, answer in zip(waiting, answers, strict=True) if answer)
            waiting.clear()

        for item in files:
            if item[1].known and item[2] is not None:
                waiting.append(item)
            if len(waiting) >= _AT_ONCE:
                look()
        look()
    return found
