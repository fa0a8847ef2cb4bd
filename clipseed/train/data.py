"""From a data set to the batches of each step, read here or by worker processes, the same either way.

torch's ``DataLoader`` does it, not the decode pool of the other commands: augmentation has to run beside the training
step, in processes of its own, and a sample that is decided by its position alone makes the number of them irrelevant.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from clipseed.errors import ClipseedError, InputError
from clipseed.train.sampler import image_at, seed_at


class TrainingData(Protocol):
    """A data set to learn from. With worker processes it has to be picklable."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def sample(self, index: int, seed: int) -> Any:
        """One image and what is known of it; everything random about it comes from ``seed`` (below 2^63).

        Raises:
            ClipseedError: it cannot be read. Training stops with this message.
        """
        ...

    def collate(self, samples: Sequence[Any]) -> Any:
        """A batch of samples: tensors, tuples, lists and dictionaries of tensors, or a class with ``to(device)``.

        Anything else stays as it is.
        """
        ...


class Stacked:
    """Base of data sets whose samples are tensors of equal shape (or tuples and dictionaries of such)."""

    def collate(self, samples: Sequence[Any]) -> Any:
        """Stack the tensors of all samples."""
        return default_collate(list(samples))


@dataclass(frozen=True)
class Layout:
    """Who reads what: a batch of ``batch`` images is cut into ``parts``, and each part shared by ``processes``.

    Attributes:
        seed: Of the order and of all samples.
        batch: Images per step, over all parts and processes; a multiple of ``parts * processes``.
        rank: Number of this process.
    """

    seed: int
    batch: int
    parts: int = 1
    processes: int = 1
    rank: int = 0

    def positions(self, step: int, part: int) -> range:
        """What this process reads for one part of a step."""
        share = self.batch // (self.parts * self.processes)
        first = step * self.batch + (part * self.processes + self.rank) * share
        return range(first, first + share)


def batches(
    data: TrainingData, layout: Layout, first: int, steps: int, workers: int = 0, pinned: bool = False
) -> Iterator[Any]:
    """Batches of this process, ``layout.parts`` for each step from ``first`` to ``steps - 1``.

    Args:
        data: What to read.
        layout: Who reads what.
        first: Step to begin with.
        steps: Step to end before.
        workers: Processes that read ahead; 0 reads here, when a batch is asked for.
        pinned: Put batches into memory that a GPU copies from by itself.

    Raises:
        ClipseedError: a sample cannot be read, or a worker died.
    """
    loader = DataLoader(
        _Samples(data),
        batch_sampler=_Places(len(data), layout, first, steps),
        num_workers=workers,
        collate_fn=_Collate(data),
        pin_memory=pinned,
        worker_init_fn=_worker_setup if workers else None,
        # Not fork: the device runtime and torch's threads do not survive it.
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator(),  # else the loader would draw from the generator that training uses
    )
    reading = iter(loader)
    while True:
        try:
            batch = next(reading)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise InputError(
                "a process that reads images died (out of memory, or killed); the same command goes on, with fewer "
                f"--workers if it happens again ({str(error).splitlines()[0]})"
            ) from error
        if isinstance(batch, _Unreadable):
            raise batch.error
        yield batch


@dataclass(frozen=True)
class _Unreadable:
    """Stands for a sample, because an exception would come out of a worker with its whole traceback as message."""

    error: ClipseedError


class _Samples(Dataset[Any]):
    def __init__(self, data: TrainingData) -> None:
        self._data = data

    def __getitem__(self, place: tuple[int, int]) -> Any:
        try:
            return self._data.sample(*place)
        except ClipseedError as error:
            return _Unreadable(error)


class _Collate:
    def __init__(self, data: TrainingData) -> None:
        self._data = data

    def __call__(self, samples: Sequence[Any]) -> Any:
        unreadable = [sample for sample in samples if isinstance(sample, _Unreadable)]
        return unreadable[0] if unreadable else self._data.collate(samples)


class _Places(Sampler[list[tuple[int, int]]]):
    """Index and seed of each sample of each batch."""

    def __init__(self, images: int, layout: Layout, first: int, steps: int) -> None:
        self._images, self._layout, self._steps = images, layout, range(first, steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        seed = self._layout.seed
        for step in self._steps:
            for part in range(self._layout.parts):
                positions = self._layout.positions(step, part)
                yield [(image_at(position, self._images, seed), seed_at(position, seed)) for position in positions]


def _worker_setup(_: int) -> None:
    """Leave Ctrl-C to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
