"""Ctrl-C and termination: one exception with a stable exit code and a hint how to go on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from clipseed.errors import ClipseedError


class Interrupted(ClipseedError):
    """The user or the system asked the run to stop; what is finished is on the disk."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _Terminated(BaseException):
    """SIGTERM, raised where the main thread happens to be; not an ``Exception``, so that nothing swallows it."""


@contextlib.contextmanager
def interruptible(hint: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C (exit code 130) and SIGTERM (143) into :class:`Interrupted` with ``hint()`` as message."""

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, terminate) if main else None
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(hint(), 130) from error
    except _Terminated as error:
        raise Interrupted(hint(), 143) from error
    finally:
        if main:
            signal.signal(signal.SIGTERM, previous)
