"""The training loop: one for everything that clipseed trains.

Counted in steps. A step takes its images, their augmentation and every other random number from the seed and its own
number, so that a run which was killed goes on from its newest checkpoint and ends, on a CPU, in the same weights to the
bit. A trainer says what is learned and what a batch costs; this file does everything else.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clipseed.errors import ClipseedError, UsageError
from clipseed.runtime.interrupt import interruptible
from clipseed.store.files import remove_leftovers, storage_errors
from clipseed.store.shards import WHOLE, lock_output
from clipseed.train.checkpoint import (
    Settings,
    read_checkpoint,
    refuse_other_settings,
    restore,
    save_checkpoint,
    save_weights,
    start_from,
)
from clipseed.train.data import Layout, TrainingData, batches
from clipseed.train.distributed import Team, joined
from clipseed.train.metrics import METRICS, append_metrics, cut_metrics
from clipseed.train.sampler import mixed

CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"


class Trainer(Protocol):
    """What is learned, and from what error."""

    @property
    def module(self) -> nn.Module:
        """What is trained and kept. A frozen tower does not belong in here: it would be in every checkpoint."""
        ...

    def optimizer(self) -> torch.optim.Optimizer:
        """A new optimiser; each group of parameters has its own learning rate at a schedule of 1."""
        ...

    def schedule(self, step: int) -> float:
        """Factor on all learning rates in a step, counted from 0."""
        ...

    def losses(self, batch: Any, step: int) -> Mapping[str, Tensor]:
        """Scalars of a batch: ``loss``, which is minimised, and whatever else should be recorded.

        ``loss`` is float32: networks may run in bfloat16 here, losses are computed from ``.float()`` of what they give.
        All randomness comes from torch's global generators, which were seeded for this step.
        """
        ...


class TrainingError(ClipseedError):
    """Training cannot go on by itself."""


@dataclass(frozen=True)
class LoopOptions:
    """How long, how much at once, and what is kept.

    Attributes:
        folder: Holds ``checkpoint.safetensors``, ``metrics.jsonl`` and ``best.safetensors``; made when missing.
        steps: Optimiser steps.
        batch: Images per step, over all processes.
        accumulate: Parts that each process takes its batch in, one after the other; losses are averaged over them.
        seed: Of the order of images, of augmentation, and of what else is random in a step.
        device: What computes.
        bfloat16: Let networks run under autocast; losses stay in float32.
        workers: Processes that read images; 0 reads them between the steps. The outcome is the same.
        clip: Longest gradient, over all parameters; longer ones are scaled down to it.
        keep_every: Steps between checkpoints.
        validate_every: Steps between validations; 0 for never.
        report_every: Steps between two lines of progress.
        init: A file of weights, or a checkpoint, to start from. Not used when going on.
        overwrite: Begin anew whatever the folder holds.
    """

    folder: Path
    steps: int
    batch: int
    accumulate: int = 1
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bfloat16: bool = False
    workers: int = 0
    clip: float | None = None
    keep_every: int = 500
    validate_every: int = 0
    report_every: int = 20
    init: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Status:
    """How far training is.

    Attributes:
        step, steps: Steps done, and in all.
        losses: Mean of each over the steps since the last report.
        images_per_second: Since this run began or went on.
        seconds_left: At this speed.
        score: Of the validation behind this step, if there was one.
    """

    step: int
    steps: int
    losses: Mapping[str, float]
    images_per_second: float
    seconds_left: float
    score: float | None = None

    def __str__(self) -> str:
        losses = "".join(f", {name} {value:.4f}" for name, value in self.losses.items())
        score = "" if self.score is None else f", score {self.score:.4f}"
        left = f", {timedelta(seconds=round(self.seconds_left))} left" if self.step < self.steps else ""
        return f"step {self.step}/{self.steps}{losses}{score}, {self.images_per_second:.1f} images/s{left}"


def say(status: object) -> None:
    """Progress as lines on stderr."""
    print(status, file=sys.stderr, flush=True)


def train(
    trainer: Trainer,
    data: TrainingData,
    options: LoopOptions,
    settings: Settings,
    validate: Callable[[int], Mapping[str, float]] | None = None,
    report: Callable[[Status], None] = say,
    note: Callable[[str], None] = say,
) -> Mapping[str, Any] | None:
    """Train, or go on with what the folder holds; ``trainer.module`` is trained afterwards.

    Under torchrun each process calls it with the same arguments; the first of them writes and reports.

    Args:
        trainer: What is learned.
        data: From what.
        options: How long, and where to.
        settings: Everything else that decides the weights, as JSON can hold it: the trainer's options, the data set.
            A run is only gone on with under equal settings.
        validate: Called every ``validate_every`` steps with their number, in the first process only; returns
            ``score`` (higher is better; the weights of the best are kept) and whatever else should be recorded.
        report: Called with the state of things.
        note: Called with a line for people, where a run goes on.

    Returns:
        ``{"step": …, "score": …}`` of the best validation, or ``None``.

    Raises:
        UsageError: options that are impossible, or do not fit the number of processes.
        StoreError: the folder cannot be written, is in use, or holds a run with other settings.
        WeightsError: ``init`` does not fit.
        TrainingError: a loss is not finite.
        Interrupted: Ctrl-C or SIGTERM; the newest checkpoint stays.
    """
    with contextlib.ExitStack() as stack:
        team = stack.enter_context(joined(options.device))
        _check(options, team)
        if team.first:
            stack.enter_context(_locked(options))
        team.wait()
        run = _Run(trainer, len(data), options, settings, team)
        stack.enter_context(interruptible(run.hint))
        layout = Layout(options.seed, options.batch, options.accumulate, team.count, team.rank)
        on_gpu = options.device.type == "cuda"
        reading = batches(data, layout, run.done, options.steps, options.workers, pinned=on_gpu)
        began, first = time.monotonic(), run.done
        if team.first and first:
            note(f"{options.folder / CHECKPOINT}: going on after step {first} of {options.steps}")
        for step in range(run.done, options.steps):
            run.step(reading, step)
            done = step + 1
            kept = done % options.keep_every == 0 or done == options.steps
            validated = validate is not None and options.validate_every > 0 and done % options.validate_every == 0
            if not (kept or validated or len(run.waiting) == options.report_every):
                continue
            rows = run.rows()
            scores = validate(done) if validate is not None and validated and team.first else None
            run.keep(done, rows, scores, checkpoint=kept or validated)
            if team.first:
                speed = options.batch * (done - first) / (time.monotonic() - began)
                left = options.batch * (options.steps - done) / speed
                score = None if scores is None else scores["score"]
                report(Status(done, options.steps, _means(rows), speed, left, score))
        return run.best


class _Run:
    """What changes while training: weights, optimiser, the best score, and losses that nobody has looked at yet."""

    def __init__(self, trainer: Trainer, images: int, options: LoopOptions, settings: Settings, team: Team) -> None:
        self._trainer, self._options, self._team = trainer, options, team
        self._path = options.folder / CHECKPOINT
        self._module = trainer.module.to(options.device)
        init = start_from(self._module, options.init) if options.init else None
        self._optimizer = trainer.optimizer()
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._learned = [value for group in self._optimizer.param_groups for value in group["params"]]
        self._settings = {
            **settings, "images": images, "steps": options.steps, "batch": options.batch, "seed": options.seed,
            "accumulate": options.accumulate, "clip": options.clip, "bfloat16": options.bfloat16, "init": init,
        }  # fmt: skip
        self.done, self.best = self._begin()
        team.copy_from_first(self._module)
        self.waiting: list[tuple[int, Tensor]] = []
        self._names: list[str] = []

    def _begin(self) -> tuple[int, Mapping[str, Any] | None]:
        """Take up a checkpoint if there is one; how many steps it holds, and the best score."""
        checkpoint = read_checkpoint(self._path) if self._path.exists() else None
        if checkpoint is not None:
            refuse_other_settings(checkpoint, self._settings, self._path)
            restore(checkpoint, self._module, self._optimizer, self._path)
        done = checkpoint.step if checkpoint else 0
        if self._team.first:
            cut_metrics(self._options.folder / METRICS, done)
        return done, checkpoint.best if checkpoint else None

    def step(self, reading: Iterator[Any], step: int) -> None:
        """One optimiser step. Nothing in it waits for the device: losses are looked at later, many at a time."""
        options, team, parts = self._options, self._team, self._options.accumulate
        factor = self._trainer.schedule(step)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._module.train()
        self._optimizer.zero_grad(set_to_none=True)
        sums: Tensor | None = None
        for part in range(parts):
            batch = _moved(next(reading), options.device)
            torch.manual_seed(mixed(options.seed, step, part * team.count + team.rank))
            with torch.autocast(options.device.type, torch.bfloat16, enabled=options.bfloat16):
                losses = self._trainer.losses(batch, step)
            if losses["loss"].dtype != torch.float32:
                raise TypeError(f"a loss in {losses['loss'].dtype}: compute it from .float() of what the network gives")
            (losses["loss"] / parts).backward()  # type: ignore[no-untyped-call]
            values = torch.stack([value.detach().float() / parts for value in losses.values()])
            sums = values if sums is None else sums + values
            self._names = list(losses)
        team.average_gradients(self._learned)
        length = nn.utils.clip_grad_norm_(self._learned, options.clip or math.inf)
        self._optimizer.step()
        assert sums is not None
        self.waiting.append((step, torch.cat([sums, length.detach().to(sums.device).view(1)])))

    def rows(self) -> list[dict[str, Any]]:
        """Numbers of the steps since the last look, one row each; steps are counted from 1 here.

        Raises:
            TrainingError: one is not finite. The weights may be spoilt by then; no checkpoint holds them.
        """
        steps, values = zip(*self.waiting, strict=True)
        self.waiting = []
        rows = []
        for step, numbers in zip(steps, self._team.average(torch.stack(values)).tolist(), strict=True):
            row = dict(zip([*self._names, "gradient"], numbers, strict=True))
            if wrong := [f"{name} is {value}" for name, value in row.items() if not math.isfinite(value)]:
                raise TrainingError(
                    f"step {step + 1}: {', '.join(wrong)}; nothing more can be learned from that. {self._kept()}, but "
                    "the same command ends here again: try a lower --lr, or float32 in place of bfloat16, with another "
                    "--out"
                )
            row["lr"] = self._rates[0] * self._trainer.schedule(step)
            rows.append({"step": step + 1, **{name: float(f"{value:.6g}") for name, value in row.items()}})
        return rows

    def keep(self, done: int, rows: list[dict[str, Any]], scores: Mapping[str, float] | None, checkpoint: bool) -> None:
        """Write what is known, in an order that a kill between any two files does no harm to."""
        options = self._options
        if checkpoint:
            self._team.copy_from_first(self._module)  # statistics of batch normalisation differ between processes
        if self._team.first:
            if scores is not None:
                rows[-1]["validation"] = dict(scores)
                if self.best is None or scores["score"] > self.best["score"]:
                    self.best = {"step": done, "score": scores["score"]}
                    about = {"settings": self._settings, **self.best}
                    save_weights(options.folder / BEST, self._module.state_dict(), about)
            append_metrics(options.folder / METRICS, rows)
            if checkpoint:
                save_checkpoint(self._path, done, self._settings, self.best, self._module, self._optimizer)
        if checkpoint:
            self.done = done

    def hint(self) -> str:
        """What to do after an interruption."""
        return f"interrupted; {self._kept()}: the same command {'goes on there' if self.done else 'begins anew'}"

    def _kept(self) -> str:
        return f"{self._path} holds step {self.done}" if self.done else "no checkpoint was written yet"


def _check(options: LoopOptions, team: Team) -> None:
    counts = {"--steps": options.steps, "--batch-size": options.batch, "--accumulate": options.accumulate}
    for name, value in counts.items():
        if value < 1:
            raise UsageError(f"{name} {value}: at least 1")
    if options.batch % (team.count * options.accumulate):
        parts = f"{team.count} processes" if options.accumulate == 1 else f"{team.count} x {options.accumulate} parts"
        raise UsageError(f"--batch-size {options.batch}: cannot be shared by {parts} evenly")


@contextlib.contextmanager
def _locked(options: LoopOptions) -> Iterator[None]:
    """Make the folder, keep other runs out of it, and tidy it up."""
    folder = options.folder
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = lock_output(folder, folder, WHOLE)
    try:
        remove_leftovers(folder, lambda path: path.parent == folder)
        if options.overwrite:
            for name in (CHECKPOINT, BEST, METRICS):
                (folder / name).unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def _moved(batch: Any, device: torch.device) -> Any:
    """A batch with all its tensors on the device."""
    if hasattr(batch, "to"):  # a tensor, or a batch with a class of its own
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [_moved(value, device) for value in batch]
        return moved if isinstance(batch, list) else tuple(moved)
    return batch


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    names = [name for name in rows[0] if name not in {"step", "gradient", "lr", "validation"}]
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}
