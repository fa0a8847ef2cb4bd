"""The engine that runs work on a Ray cluster: one worker per GPU, or several CPU workers per node.

The process that was started keeps the output: it hands out units, takes their results and writes them, so locks,
resuming and manifests are the same as without a cluster. Workers read images, weights and CAMs themselves, by the
same paths. A worker that is lost (its node died, the system killed it) costs the units in its hands; another does them.

Actors are as fast as Ray Data here (measured, docs/scale.md) and let lost units be counted and nodes be compared.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from clipseed import __version__
from clipseed.errors import ClipseedError, UsageError
from clipseed.runtime.stream import Advance, StreamStats
from clipseed.runtime.work import Recipe, Work
from clipseed.store.units import Unit

R = TypeVar("R")
_IN_HAND = 2
"""Units given to a worker at a time: the next one is there when it is through with one."""
_MOST_LOSSES = 3
"""A unit that takes its worker with it so often is to blame itself."""
_MOST_CORES = 8
"""A CPU worker uses no more; encoders do not get faster with more."""


@dataclass(frozen=True)
class ClusterOptions:
    """Where the cluster is and what to use of it.

    Attributes:
        address: ``host:port``; ``None``: ``$RAY_ADDRESS``, or the one running on this machine.
        workers: Number of workers; ``None``: as many as there are GPUs, or as fit the CPUs.
        cpus: Cores of each CPU worker; ``None``: up to eight of a node's.
        patience: Seconds to wait for a worker when there is none.
    """

    address: str | None = None
    workers: int | None = None
    cpus: int | None = None
    patience: float = 300.0


@dataclass(frozen=True)
class _Plan:
    workers: int
    cpus: float
    gpus: int


def plan_workers(nodes: Sequence[dict[str, float]], options: ClusterOptions) -> _Plan:
    """How many workers of which size a cluster's nodes (their resources) get.

    Raises:
        UsageError: there is no room for one.
    """
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if gpus:
        # Half of a GPU's part of the cores stays free for what else runs on the node.
        share = min(node.get("CPU", 0) / node["GPU"] for node in nodes if node.get("GPU", 0) >= 1)
        return _Plan(options.workers or gpus, max(1.0, share // 2), 1)
    cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    cpus = options.cpus or min([_MOST_CORES, *cores])
    fit = sum(count // cpus for count in cores)
    if not fit:
        raise UsageError(f"--engine ray: no node of the cluster has {cpus} CPUs or a GPU")
    return _Plan(options.workers or fit, cpus, 0)


class Worker:
    """What runs in a Ray worker process."""

    def __init__(self, recipe: Recipe[Any], folder: str, cpus: float, gpus: int) -> None:
        self._recipe, self._folder, self._cpus, self._gpus = recipe, folder, cpus, gpus
        self._work: Work[Any, Any] | None = None

    def about(self) -> dict[str, Any]:
        """Load the work and say what it is."""
        import torch

        try:
            os.chdir(self._folder)  # relative paths mean what they mean to whoever gave the command
        except OSError as error:
            raise UsageError(
                f"--engine ray: {self._folder} is not there on {platform.node()}; all nodes need the same folders"
            ) from error
        if not self._gpus:
            torch.set_num_threads(max(1, int(self._cpus)))
        self._work = self._recipe()
        return {"clipseed": __version__, "work": self._work.about()}

    def run(self, unit: Unit) -> tuple[list[Any], StreamStats]:
        """Results and statistics of one unit."""
        assert self._work is not None
        results: list[Any] = []
        stats = self._work.run([unit], lambda _, found: results.extend(found))
        return results, stats


class RayEngine(Generic[R]):
    """Runs work on a Ray cluster.

    Raises:
        UsageError: Ray is not installed, or there is no cluster.
        ClipseedError: what loading the work raised in a worker.
    """

    def __init__(self, recipe: Recipe[R], options: ClusterOptions) -> None:
        self._options = options
        self._ray = _import_ray()
        self._ours = not self._ray.is_initialized()
        if self._ours:
            self._join()
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        plan = self._plan = plan_workers(alive, options)
        self._actor = self._ray.remote(Worker).options(num_cpus=plan.cpus, num_gpus=plan.gpus, max_restarts=0)
        self._recipe = self._ray.put(recipe)
        self._coming: dict[Any, Any] = {}
        self._free: dict[Any, int] = {}
        self._about: dict[str, Any] | None = None
        try:
            for _ in range(plan.workers):
                self._hire()
            self._wait_for_one()
        except BaseException:
            self.close()
            raise

    def _join(self) -> None:
        address = self._options.address or os.environ.get("RAY_ADDRESS") or "auto"
        where = "on this machine (ray start --head starts one, RAY_ADDRESS says where one is)"
        try:
            if address not in ("auto", "local") and "://" not in address:
                where = f"at {address}"
                _knock(address)  # Ray itself tries for minutes
            self._ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(f"--engine ray: no Ray cluster found {where}: {str(error)[:200]}") from error

    @property
    def about(self) -> dict[str, Any]:
        """What all workers have in common."""
        assert self._about is not None
        return self._about

    @property
    def hands(self) -> int:
        """Units that workers hold at once."""
        return self._plan.workers * _IN_HAND

    def _hire(self) -> None:
        actor = self._actor.remote(self._recipe, str(Path.cwd()), self._plan.cpus, self._plan.gpus)
        self._coming[actor.about.remote()] = actor

    def _wait_for_one(self) -> None:
        deadline = time.monotonic() + self._options.patience
        while not self._free:
            ready, _ = self._ray.wait(list(self._coming), num_returns=1, timeout=5)
            for reference in ready:
                self._welcome(reference)
            if time.monotonic() > deadline:
                raise ClipseedError(
                    f"--engine ray: no worker has come up within {self._options.patience:.0f} s ({self._plan.cpus:g} "
                    f"CPUs, {self._plan.gpus} GPUs each); is the cluster busy? (ray status)"
                )

    def _welcome(self, reference: Any) -> None:
        """A worker is ready, or was lost on the way."""
        actor = self._coming.pop(reference)
        try:
            said = self._get(reference)
        except _Lost:
            self._hire()
            return
        if said["clipseed"] != __version__:
            raise ClipseedError(
                f"--engine ray: a node has clipseed {said['clipseed']}, this one {__version__}; install the same"
            )
        about = said["work"]
        if self._about is None:
            self._about = about
        elif about != self._about:
            different = [key for key in about if about[key] != self._about.get(key)]
            raise ClipseedError(
                f"--engine ray: the nodes are not alike: {about[different[0]]} on one, {self._about[different[0]]} on "
                "another; say --device and --precision"
            )
        self._free[actor] = _IN_HAND

    def _get(self, reference: Any) -> Any:
        """A result, or the error of a worker as it was raised there."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, ClipseedError):
                raise cause from None
            if isinstance(error, errors.WorkerCrashedError | errors.OutOfMemoryError):
                raise _Lost from error
            raise
        except (errors.RayActorError, errors.ObjectLostError, errors.RaySystemError) as error:
            raise _Lost from error

    def run(
        self, units: Sequence[Unit], write: Callable[[Unit, Sequence[R]], None], advance: Advance | None = None
    ) -> StreamStats:
        """Run all units; results are written as they come."""
        stats = StreamStats()
        waiting, losses = deque(units), Counter[int]()
        running: dict[Any, tuple[Unit, Any]] = {}
        with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
            pending: Future[None] | None = None
            while waiting or running:
                self._hand_out(waiting, running)
                began = time.perf_counter()
                ready, _ = self._ray.wait([*running, *self._coming], num_returns=1, timeout=5)
                stats.waits["device"] += time.perf_counter() - began
                if not running and not self._free:
                    self._wait_for_one()
                    continue
                for reference in ready:
                    if reference in self._coming:
                        self._welcome(reference)
                        continue
                    unit, actor = running.pop(reference)
                    try:
                        results, part = self._get(reference)
                    except _Lost:
                        self._lose(actor, [unit], waiting, running, losses)
                        continue
                    if actor in self._free:
                        self._free[actor] += 1
                    if pending is not None:
                        pending.result()
                    pending = writer.submit(write, unit, results)
                    stats.add(part)
                    if advance:
                        advance(len(unit.samples), stats)
            if pending is not None:
                pending.result()
        return stats

    def _hand_out(self, waiting: deque[Unit], running: dict[Any, tuple[Unit, Any]]) -> None:
        for depth in range(_IN_HAND, 0, -1):  # everybody gets a first unit before anybody gets a second
            for actor, room in self._free.items():
                if waiting and room == depth:
                    unit = waiting.popleft()
                    running[actor.run.remote(unit)] = (unit, actor)
                    self._free[actor] -= 1

    def _lose(
        self, actor: Any, lost: list[Unit], waiting: deque[Unit], running: dict[Any, tuple[Unit, Any]],
        losses: Counter[int],
    ) -> None:  # fmt: skip
        """Take a lost worker's units back and look for another worker."""
        first = lost[0]
        lost += [running.pop(reference)[0] for reference, (_, owner) in list(running.items()) if owner is actor]
        losses[first.index] += 1
        if losses[first.index] >= _MOST_LOSSES:
            raise ClipseedError(
                f"--engine ray: the unit beginning with {first.samples[0].id!r} ended its worker {_MOST_LOSSES} times "
                "(out of memory? see ray logs); a smaller --batch-size may help"
            )
        waiting.extendleft(reversed(lost))
        if self._free.pop(actor, None) is not None:
            self._hire()

    def close(self) -> None:
        """Let the workers go, and leave the cluster."""
        if not self._ray.is_initialized():
            return
        for actor in (*self._free, *self._coming.values()):
            self._ray.kill(actor)
        self._free, self._coming = {}, {}
        if self._ours:
            self._ray.shutdown()


class _Lost(Exception):
    """A worker is gone, and its result with it."""


def _knock(address: str) -> None:
    """Raise :class:`OSError` where nobody listens, :class:`ValueError` where it is no ``host:port``."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("give host:port")
    socket.create_connection((host, int(port)), timeout=10).close()


def _import_ray() -> Any:
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--engine ray: Ray is not installed; pip install 'clipseed[ray]'")
    import ray

    return ray
