"""Decoding ahead of the device: an ordered stream of decoded samples from threads or worker processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Generic, TypeVar

from clipseed.data.types import Sample
from clipseed.errors import ImageError

T = TypeVar("T")
Outcome = tuple[Sample, "T | ImageError"]


class DecodePool(Generic[T]):
    """Runs a loading function on samples, ahead of the consumer, in order.

    Args:
        load: Returns the decoded sample or raises :class:`~clipseed.errors.ImageError`. Each worker process gets a copy
            of it, once: it must survive pickling, and may keep files open.
        workers: Number of worker processes; 0 decodes in one background thread of this process. A worker that dies
            (decoders are native code) costs the image it died on and nothing else.
        ahead: How many samples may be decoded and not yet consumed.
    """

    def __init__(self, load: Callable[[Sample], T], workers: int, ahead: int) -> None:
        self._load, self._workers, self._ahead = load, workers, max(1, ahead)
        self._executor = self._start(workers)

    def _start(self, workers: int) -> Executor:
        if workers == 0:
            return ThreadPoolExecutor(1, thread_name_prefix="decode")
        # Not fork: the device runtime and torch's threads do not survive it.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(workers, context, initializer=_worker_setup, initargs=(os.getpid(), self._load))

    def stream(self, samples: Iterable[Sample]) -> Iterator[Outcome[T]]:
        """Yield each sample with what became of it, in the order given."""
        source = iter(samples)
        waiting: deque[tuple[Sample, Future[T]]] = deque()
        while True:
            for sample in itertools.islice(source, self._ahead - len(waiting)):
                waiting.append((sample, self._submit(sample)))
            if not waiting:
                return
            sample, future = waiting.popleft()
            try:
                outcome = _outcome(future)
            except BrokenProcessPool:
                suspects = [sample, *(item for item, _ in waiting)]
                waiting.clear()
                self._executor.shutdown(wait=False, cancel_futures=True)
                yield from self._one_by_one(suspects)
                self._executor = self._start(self._workers)
            else:
                yield sample, outcome

    def _submit(self, sample: Sample) -> Future[T]:
        try:
            return self._load_on(self._executor, sample)
        except BrokenProcessPool as error:  # a worker died since the last look; the sample waits with the suspects
            future: Future[T] = Future()
            future.set_exception(error)
            return future

    def _load_on(self, executor: Executor, sample: Sample) -> Future[T]:
        load: Callable[[Sample], T] = self._load
        if isinstance(executor, ProcessPoolExecutor):
            load = _load_in_worker
        return executor.submit(load, sample)

    def _one_by_one(self, suspects: Iterable[Sample]) -> Iterator[Outcome[T]]:
        """Decode samples alone, to learn which of them kills its worker."""
        executor = self._start(1)
        for sample in suspects:
            future = self._load_on(executor, sample)
            try:
                outcome = _outcome(future)
            except BrokenProcessPool:
                outcome = ImageError(f"{sample.path}: the decoder crashed on it")
                executor.shutdown(wait=False)
                executor = self._start(1)
            yield sample, outcome
        executor.shutdown(wait=False)

    def __enter__(self) -> DecodePool[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


def _outcome(future: Future[T]) -> T | ImageError:
    try:
        return future.result()
    except ImageError as error:
        return error


class _Worker:
    """What a worker process loads with; each serves one pool."""

    load: Callable[[Sample], Any]


def _load_in_worker(sample: Sample) -> Any:
    return _Worker.load(sample)


def _worker_setup(parent: int, load: Callable[[Sample], Any]) -> None:
    """Leave Ctrl-C to the main process, take one core, and end with the main process even if it is killed."""
    import torch

    _Worker.load = staticmethod(load)
    torch.set_num_threads(1)  # there are as many workers as cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
