"""What every long command costs alone, and what it costs when two of them run at once.

``python tools/bench_busy.py --count 60 --repeats 3``; part of ``make bench``. Images are the first of the built-in
toy world. Each command runs alone and beside a second one of itself, in turns. What is compared is CPU-seconds, which
change little with what else the machine does, and the time on the clock; both include the start of the program. A
command whose threads sleep while they wait costs the same beside another one, and takes up to twice as long.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

COMMANDS: dict[str, tuple[str, ...]] = {
    "cam": ("cam", "--dataset", "toy", "--limit", "{count}"),
    "refine caa": ("refine", "caa", "cams.h5"),
    "refine par": ("refine", "par", "cams.h5"),
    "crf": ("crf", "cams.h5"),
    "sam-masks": ("sam-masks", "--seeds", "cams.h5", "--points-per-side", "16", "--crop-layers", "0"),
    "sam-seed": ("sam-seed", "cams.h5", "--masks", "segments.h5"),
}
"""Arguments of each; ``--out`` is added, and those that read something read what was made before the measurement."""


@dataclass(frozen=True)
class Cost:
    """Of one process: seconds on the clock and of the CPU, with the processes that it started."""

    wall: float
    cpu: float


def run_at_once(folder: Path, words: list[list[str]]) -> list[Cost]:
    """Run commands beside each other.

    Raises:
        RuntimeError: one failed.
    """
    processes = []
    for number, arguments in enumerate(words):
        with (folder / f"log-{number}.txt").open("w") as log:
            command = [sys.executable, "-m", "clipseed", *arguments, "--overwrite", "--quiet"]
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        processes.append((process, time.perf_counter()))
    running, found = dict(enumerate(processes)), {}
    while running:
        for number, (process, began) in list(running.items()):
            # Not Popen.wait, which does not tell what the process used.
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                found[number] = Cost(time.perf_counter() - began, usage.ru_utime + usage.ru_stime)
                del running[number]
                if process.returncode:
                    log = (folder / f"log-{number}.txt").read_text()
                    raise RuntimeError(f"clipseed {' '.join(words[number])} ended with {process.returncode}: {log}")
        time.sleep(0.02)
    return [found[number] for number in sorted(found)]


def measure(folder: Path, name: str, words: list[str], repeats: int) -> tuple[list[Cost], list[Cost]]:
    """Costs of a command alone, and of two at once, in turns."""
    alone: list[Cost] = []
    pair: list[Cost] = []
    outs = [f"{name.replace(' ', '-')}-{number}" for number in range(2)]  # folders of masks, or of units
    for _ in range(repeats):
        alone += run_at_once(folder, [[*words, "--out", outs[0]]])
        pair += run_at_once(folder, [[*words, "--out", out] for out in outs])
    return alone, pair


def main() -> None:
    """Measure what is asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="images")
    parser.add_argument("--repeats", type=int, default=3, help="times that each command is measured; medians are shown")
    parser.add_argument("--only", choices=COMMANDS, action="append", help="measure this command; may be repeated")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = {key: [word.format(count=arguments.count) for word in words] for key, words in COMMANDS.items()}
        chosen = arguments.only or list(COMMANDS)
        for key, out in (("cam", "cams.h5"), ("sam-masks", "segments.h5")):
            if any(out in words[reader] for reader in chosen):
                run_at_once(folder, [[*words[key], "--out", out]])
        print(f"{arguments.count} images, {os.cpu_count()} cores; medians of {arguments.repeats}", flush=True)
        print("| command | alone: s | alone: CPU-s | two at once: s | CPU-s of each | CPU-s ratio | time ratio |")
        print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for key in chosen:
            alone, pair = measure(folder, key, words[key], arguments.repeats)
            wall, cpu = (statistics.median(getattr(cost, what) for cost in alone) for what in ("wall", "cpu"))
            wall_2, cpu_2 = (statistics.median(getattr(cost, what) for cost in pair) for what in ("wall", "cpu"))
            print(f"| `{key}` | {wall:.1f} | {cpu:.1f} | {wall_2:.1f} | {cpu_2:.1f} | {cpu_2 / cpu:.2f} | "
                  f"{wall_2 / wall:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
