"""Threads on a CPU: those that wait sleep, and work made of small operations takes one core for each image.

A team of threads that shares every small operation waits more than it works, and by default it waits by spinning:
beside any other program each operation then takes as long as the slowest thread needs to be scheduled again.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from threading import Barrier, Lock
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What decides how OpenMP's threads wait: the standard's, GNU's, and LLVM's and Intel's own."""


def let_waiting_threads_sleep() -> None:
    """Have OpenMP's threads sleep while they wait, in this process and those it starts, unless the user says otherwise.

    OpenMP reads the setting once, when it is loaded: call this before torch is imported.
    """
    if not any(name in os.environ for name in _SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


@dataclass(frozen=True)
class OneByOne:
    """How images are computed whose work is made of small operations: several at once, each on one thread.

    Attributes:
        threads: How many at once.
        largest: Images of a larger ``cost`` are computed with no other beside them, on all cores: there the operations
            are large, and so is the memory.
    """

    threads: int
    largest: int


@contextlib.contextmanager
def single_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads in each of which torch uses one thread; other threads keep what they have."""
    import torch

    before, started, lock = torch.get_num_threads(), Barrier(count + 1), Lock()

    def begin() -> None:
        with lock:
            torch.get_num_threads()  # a thread's first use of torch would set the common number again
            torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="compute")
    try:
        for _ in range(count):
            pool.submit(begin)  # each needs a thread of its own, because all of them wait for the last
        started.wait()
        # Torch keeps the number by thread, and the last one set as that of threads to come.
        torch.set_num_threads(before)
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(load: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Load in a few threads, a bounded number ahead of the consumer; results come in the order of the items."""
    threads = min(8, os.cpu_count() or 1)
    source = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[T]] = deque(pool.submit(load, item) for item in islice(source, 2 * threads))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(load, item) for item in islice(source, 1))
        finally:
            for future in waiting:
                future.cancel()
