"""What the commands share that stream a whole data set: which part of it, where, progress, reports, exit code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipseed.cli._console import Console, print_json, speed
from clipseed.cli._options import (
    OutputArguments,
    RunArguments,
    TowerArguments,
    allowed_skips,
    auto_or_number,
    workers_of,
)
from clipseed.errors import UsageError
from clipseed.wording import counted, some

if TYPE_CHECKING:
    from clipseed.data.types import ImageSet
    from clipseed.runtime.cluster import ClusterOptions
    from clipseed.runtime.launch import Launch
    from clipseed.runtime.run import RunOptions, RunReport
    from clipseed.runtime.stream import Advance, StreamStats
    from clipseed.store.empty import EmptyLabels


@dataclass
class Running:
    """One run of a command, from its options to its exit code."""

    command: str
    arguments: RunArguments
    output: OutputArguments
    launch: Launch
    cluster: ClusterOptions | None
    console: Console
    allowed: float = 0
    """How many images may be left out of a run that ends with 0."""

    def options(self, **compute: Any) -> RunOptions:
        """As jobs have them, with what the command knows of device, precision and batch size.

        Raises:
            UsageError: ``--workers`` is no number of processes.
        """
        from clipseed.runtime.run import RunOptions

        return RunOptions(
            workers=workers_of(self.arguments.workers), overwrite=self.arguments.overwrite, shard=self.launch.shard,
            cluster=self.cluster, **compute,
        )  # fmt: skip

    def source(self, source: Path | None, stage: str, note: str = "reading") -> Path:
        """What to read: as given, or what the stage before left in the working folder."""
        return last_output(self.console, stage, note) if source is None else source

    def start(self, todo: int, done: int, title: str = "", of: int | None = None, what: str = "") -> Advance:
        """Say what there is to do, and give the progress callback; ``what`` is not the command but a part of it."""
        shard = f"shard {self.launch.shard} ({self.launch.source}): " if not self.launch.shard.whole else ""
        many = f"{counted(of, 'image')}, {todo}" if of is not None else counted(todo, "image")
        self.console.note(
            f"{title or what or self.command}: {shard}{many} to do" + (f", {done} done already" if done else "")
        )
        current: list[StreamStats] = []
        track = self.console.track(what or self.command, todo, lambda: _detail(current[0]) if current else "")

        def advance(count: int, stats: StreamStats) -> None:
            current[:] = [stats]
            track(count)

        return advance

    def loading(self, model: str) -> None:
        """Say that a model is loaded now, which takes seconds in which nothing else is said."""
        self.console.note(f"loading {model}")

    def finish(self, report: RunReport, summary: str, facts: dict[str, Any], empty: EmptyLabels | None = None) -> int:
        """Tell how it went, write what was asked for, and give the exit code.

        Args:
            report: Of the job.
            summary: The last line; `images/s` are filled in.
            facts: What ``--json`` and ``--report`` say besides what every command reports.
            empty: Labels that came to nothing.
        """
        stats, console = report.stats, self.console
        for note in report.notes:
            console.warn(note)
        if stats.out_of_memory:
            before, after = stats.out_of_memory
            console.warn(f"out of memory with {before} images at once; went on with {after} (--batch-size {after})")
        if stats.counters["recomputed"]:
            console.warn(
                f"{stats.counters['recomputed']} images gave NaN or infinity in half precision and were computed in "
                "fp32"
            )
        tell_skipped(console, stats.skipped, report.skipped_file)
        if empty is not None and empty.labels:
            tell_empty(console, empty)
        console.note(summary)
        if report.open_shards:
            console.note(
                f"shard {self.launch.shard} is done; {report.open_shards} of {self.launch.shard.count} are not yet, "
                "and the last of them finishes the output (if they ran on other disks: clipseed merge)"
            )
        data = {**_common(report, self), **facts, **({} if empty is None else {"empty": empty.as_dict()})}
        if self.arguments.report:
            from clipseed.runtime.run_report import write_run_report

            write_run_report(self.arguments.report, data)
        if self.output.json:
            print_json(data)
        # torchrun would stop the other processes for it.
        return exit_code(console, len(stats.skipped), self.allowed) if self.launch.source != "torchrun" else 0


def last_output(console: Console, command: str, note: str = "reading") -> Path:
    """The output in the working folder that a command means when it is not told, said."""
    from clipseed.store.stages import newest_output

    source = newest_output(Path(), command)
    console.note(f"{note} {source}, the last output here (name another one to choose it)")
    return source


def tell_skipped(console: Console, skipped: Sequence[tuple[str, str]], file: Path | None) -> None:
    """Say how many images were left out, a few of them with the reason, and where all of them are listed."""
    if skipped:
        reasons = some([f"{key} ({why})" for key, why in skipped], 3)
        listed = "" if file is None else f"; listed in {file}"
        console.warn(f"{counted(len(skipped), 'image')} skipped: {reasons}{listed}")


def tell_empty(console: Console, empty: EmptyLabels) -> None:
    """Say how many labels came to nothing, of which classes, why, and in which images."""
    count, classes = len(empty.labels), [f"{name} {number}" for name, number in empty.counts("label")]
    came = "have no pixel" if empty.masks else "have no positive map"
    listed = "" if empty.file is None else f" (listed in {empty.file})"
    console.warn(
        f"{count} of {counted(empty.of, 'label')} {came}, in {counted(empty.images, 'image')}{listed}: {some(classes)}"
    )
    for why, number in empty_reasons(empty):
        console.warn(f"{number} {why}")
    if empty.masks == "background":
        console.warn("their masks say background there; --empty ignore makes it 255, --empty skip leaves them out")


def empty_reasons(empty: EmptyLabels) -> list[tuple[str, str]]:
    """Why labels came to nothing, since which stage and in which images, and how many, the commonest first."""
    images: dict[tuple[str, str], list[str]] = {}
    for item in empty.labels:
        images.setdefault((item.stage, item.reason), []).append(item.id)
    return [
        (f"since {stage}: {reason} ({some(list(dict.fromkeys(ids)), 3)})", str(len(ids)))
        for (stage, reason), ids in sorted(images.items(), key=lambda pair: -len(pair[1]))
    ]


def prepare(command: str, arguments: RunArguments, output: OutputArguments) -> Running:
    """Read the shared options.

    Raises:
        UsageError: an option means nothing.
    """
    from clipseed.runtime.launch import Launch, find_shard
    from clipseed.store.files import refuse_unwritable

    console = Console(output.quiet)
    cluster = _cluster(arguments)
    # A driver of Ray inside a Slurm allocation is one process, whatever the allocation's variables say.
    launch = find_shard(arguments.shard) if cluster is None or arguments.shard else Launch()
    refuse_unwritable(arguments.report, "--report")
    return Running(command, arguments, output, launch, cluster, console, allowed_skips(arguments.allow_skipped))


def _cluster(arguments: RunArguments) -> ClusterOptions | None:
    workers = auto_or_number(arguments.ray_workers, "--ray-workers")
    cpus = auto_or_number(arguments.ray_cpus, "--ray-cpus")
    if arguments.engine == "ray":
        from clipseed.runtime.cluster import ClusterOptions

        if workers == 0 or cpus == 0:
            raise UsageError("--ray-workers, --ray-cpus: give auto or a number from 1")
        return ClusterOptions(arguments.ray_address, workers, cpus)
    if arguments.ray_address or workers or cpus:
        raise UsageError("--ray-address, --ray-workers and --ray-cpus belong to --engine ray")
    return None


def exit_code(console: Console, left_out: int, allowed: float) -> int:
    """0, or 3 where more images than ``--allow-skipped`` allows were skipped or not scored."""
    if left_out <= allowed:
        return 0
    if allowed:
        were = "was" if left_out == 1 else "were"
        console.warn(
            f"--allow-skipped {allowed:g}: {counted(left_out, 'image')} {were} left out, so the exit code is 3"
        )
    return 3


def warn_of_toy_weights(console: Console, weights: str | None, image_set: ImageSet) -> None:
    """Say that the built-in weights are of no use for other images than those of the built-in world."""
    from clipseed.clip.model import TOY_WEIGHTS
    from clipseed.data.toy.dataset import is_toy_id

    # Scenes that were saved as a devkit keep their ids; the words that they are searched for may be anybody's.
    if weights == TOY_WEIGHTS and image_set.samples and not is_toy_id(image_set.samples[0].id):
        say_toy_is_no_photo(console)


def say_toy_is_no_photo(console: Console) -> None:
    """Say that the built-in weights were trained on drawings."""
    console.warn("the toy weights know only the built-in world; maps of photographs mean nothing")


def refuse_restricted(tower: TowerArguments, dataset: str | None) -> None:
    """``--permissive``: refuse weights that are not known to be free for commercial use.

    Raises:
        UsageError: they are not.
    """
    from clipseed.clip.licenses import refuse_restricted as refuse
    from clipseed.clip.model import chosen_weights

    refuse(tower.model, chosen_weights(tower.weights, dataset or "folder"))


def refuse_restricted_segmenter(segmenter: Path, classes: str | None) -> None:
    """The same for the CLIP that a segmenter was trained on; of an authors' checkpoint nothing is known.

    Raises:
        UsageError: its weights are not known to be free for commercial use.
    """
    from clipseed.clip.licenses import refuse_restricted as refuse
    from clipseed.train.segmenter import read_segmenter

    tower = read_segmenter(segmenter, classes).about.get("tower") or {}
    model = tower.get("model")
    refuse(None if model == "inferred" else model, str(tower.get("weights") or segmenter))


def rate(report: RunReport) -> str:
    """`` in 12.3 s, 4.5 images/s``, or the seconds each one takes; nothing where nothing was computed."""
    computed = report.stats.computed
    if not computed:
        return ""
    return f" in {report.seconds:.1f} s, {speed(computed / max(1e-9, report.seconds))}"


def made(report: RunReport, what: str, verb: str = "made") -> str:
    """The last line of a command: how many of its ``what`` are there now, and what this run did."""
    there, computed = report.done_before + report.stats.computed, report.stats.computed
    ignored = f", {100 * report.ignored_share:.1f} % of the pixels are 255" if report.ignored_share else ""
    return f"{report.out}: {there} of {report.total} {what}, {computed} {verb} now{rate(report)}{ignored}"


def timings(report: RunReport) -> dict[str, Any]:
    """Seconds of computing, and images/s in them."""
    speed = round(report.stats.computed / report.seconds, 3) if report.seconds else None
    return {"seconds": round(report.seconds, 3), "images_per_second": speed}


def _detail(stats: StreamStats) -> str:
    skipped = f", {len(stats.skipped)} skipped" if stats.skipped else ""
    return f"(mostly {SPENT_ON[stats.bottleneck]}{skipped})"


SPENT_ON = {"decode": "reading images", "device": "computing", "write": "writing"}
"""What a run's time went into, in plain words, by its bottleneck."""


def spoken_model(model: Mapping[str, Any]) -> str:
    """A model as manifests have it, for people: ``ViT-B-16 openai``, or its file where that alone names it."""
    name = "" if model.get("model") == "inferred" else f"{model.get('model')} "
    return f"{name}{model.get('weights')}"


def _common(report: RunReport, run: Running) -> dict[str, Any]:
    stats = report.stats
    return {
        "command": run.command,
        "out": None if report.out is None else str(report.out),
        "shard": None if run.launch.shard.whole else str(run.launch.shard),
        "open_shards": report.open_shards,
        "images": report.total,
        "found": report.done_before,
        "computed": stats.computed,
        "skipped": [{"id": key, "reason": why} for key, why in stats.skipped],
        "recomputed_in_fp32": stats.counters["recomputed"],
        "out_of_memory": list(stats.out_of_memory) if stats.out_of_memory else None,
        **timings(report),
        **({} if report.ignored_share is None else {"ignored_share": report.ignored_share}),
        "loading_seconds": round(report.loading, 3),
        "waits": {stage: round(seconds, 3) for stage, seconds in stats.waits.items()},
        "bottleneck": stats.bottleneck if stats.computed else None,
    }
