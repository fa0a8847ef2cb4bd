"""Several processes on one command: which shard is this one's, and which device.

``--shard i/n`` says it; otherwise torchrun and Slurm do, through the environment of the processes they start.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from clipseed.errors import UsageError
from clipseed.store.shards import WHOLE, Shard


@dataclass(frozen=True)
class Launch:
    """A shard and who gave it: ``--shard``, ``torchrun``, ``Slurm`` or nobody."""

    shard: Shard = WHOLE
    source: str = ""


def find_shard(text: str | None, environment: Mapping[str, str] | None = None) -> Launch:
    """The shard that ``--shard`` asks for, or that a launcher means.

    Shards of a Slurm array whose tasks start several processes each are numbered array task by array task.

    Args:
        text: ``i/n``, counted from 1; ``1/1`` is everything, whatever the launcher says.
        environment: Of the process by default.

    Raises:
        UsageError: not of that form, or the launcher's variables are none.
    """
    variables = os.environ if environment is None else environment
    if text is not None:
        found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UsageError(f"--shard {text}: give i/n with i from 1 to n, such as 1/8 for the first of eight runs")
        return _launch(int(found[1]) - 1, int(found[2]), "--shard")
    if "RANK" in variables and "WORLD_SIZE" in variables:
        return _launch(_number(variables, "RANK"), _number(variables, "WORLD_SIZE"), "torchrun")
    return _slurm(variables)


def _slurm(variables: Mapping[str, str]) -> Launch:
    index, count = 0, 1
    if "SLURM_ARRAY_TASK_ID" in variables and "SLURM_ARRAY_TASK_COUNT" in variables:
        count = _number(variables, "SLURM_ARRAY_TASK_COUNT")
        first = _number(variables, "SLURM_ARRAY_TASK_MIN", 0)
        step = max(1, _number(variables, "SLURM_ARRAY_TASK_STEP", 1))
        index = (_number(variables, "SLURM_ARRAY_TASK_ID") - first) // step
        if not 0 <= index < count:
            raise UsageError(
                "SLURM_ARRAY_TASK_ID is not one of a regular array such as 0-7 or 1-15:2; say which part this run is "
                "with --shard i/n"
            )
    if "SLURM_PROCID" in variables:
        # The step's own number where srun gives it: in a batch script the job's would promise processes never started.
        name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"
        processes = max(1, _number(variables, name, 1))
        index, count = index * processes + _number(variables, "SLURM_PROCID"), count * processes
    return _launch(index, count, "Slurm")


def _launch(index: int, count: int, source: str) -> Launch:
    if not 0 <= index < count:
        raise UsageError(f"{source}: process {index} of {count} makes no sense; say which part it is with --shard i/n")
    return Launch(Shard(index, count), source) if count > 1 else Launch()


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = variables.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.strip().isdigit():
        raise UsageError(f"{name}={text}: not a number; say which part this run is with --shard i/n")
    return int(text)
