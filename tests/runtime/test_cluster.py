"""Work on a real Ray cluster of several nodes, one of which dies."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clipseed.cli.main import main
from clipseed.clip import FrozenClip
from clipseed.data.types import Sample
from clipseed.errors import ClipseedError, ImageError, UsageError, WeightsError
from clipseed.runtime import cluster as runtime
from clipseed.runtime.cluster import ClusterOptions, RayEngine, plan_workers
from clipseed.runtime.stream import BatchSize, StreamStats
from clipseed.runtime.work import Work
from clipseed.store.toy_devkit import save_devkit
from clipseed.store.units import Unit

from helpers.weclip import TINY

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A head without CPUs and two nodes with one each."""
    from ray import cloudpickle
    from ray.cluster_utils import Cluster

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@dataclass(frozen=True)
class Item:
    sample: Sample
    key: int = 0
    cost: int = 1


class Doubling(Work[Item, str]):
    """Says every id twice, slowly; `bad` ids are skipped, `fatal` ones end the process."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause
        self.batch, self.workers, self.ahead = BatchSize(2, 100), 0, 4

    @property
    def loader(self) -> Callable[[Sample], Item]:
        return Item

    def compute(self, items: Sequence[Item]) -> Sequence[str | ImageError]:
        import os

        time.sleep(self.pause)
        self.counters["seen"] += len(items)
        if any(item.sample.id.startswith("fatal") for item in items):
            os._exit(1)
        return [ImageError("no good") if item.sample.id.startswith("bad") else item.sample.id * 2 for item in items]

    def about(self) -> dict[str, Any]:
        return {"unit": 3}


@dataclass(frozen=True)
class Recipe:
    pause: float = 0.0
    error: str = ""

    def __call__(self) -> Doubling:
        if self.error:
            raise WeightsError(self.error)
        return Doubling(self.pause)


def units(*ids: str, size: int = 3) -> list[Unit]:
    samples = [Sample(key, Path(key), None) for key in ids]
    return [Unit(k, tuple(samples[start : start + size])) for k, start in enumerate(range(0, len(ids), size))]


def run(recipe: Recipe, tasks: list[Unit], options: ClusterOptions | None = None) -> tuple[dict[int, Any], StreamStats]:
    found: dict[int, Any] = {}
    engine: RayEngine[str] = RayEngine(recipe, options or ClusterOptions())
    try:
        stats = engine.run(tasks, lambda task, results: found.update({task.index: list(results)}))
    finally:
        engine.close()
    return found, stats


@pytest.mark.slow
def test_units_come_back(nodes: Any) -> None:
    found, stats = run(Recipe(), units("a", "b", "bad", "c", "d", "e", "f"))
    assert found == {0: ["aa", "bb"], 1: ["cc", "dd", "ee"], 2: ["ff"]}
    assert stats.computed == 6
    assert stats.skipped == [("bad", "no good")]
    assert stats.counters["seen"] == 7


@pytest.mark.slow
def test_errors_of_workers_are_those_of_one_process(nodes: Any) -> None:
    with pytest.raises(WeightsError, match="^weights.pt: no such file$"):
        run(Recipe(error="weights.pt: no such file"), units("a"))


@pytest.mark.slow
def test_a_unit_that_kills_is_found_out(nodes: Any) -> None:
    """Workers that die are replaced; the unit to blame is named in the end."""
    with pytest.raises(ClipseedError, match="the unit beginning with 'fatal' ended its worker 3 times"):
        run(Recipe(), units("a", "b", "c", "fatal", "d", "e"))


@pytest.mark.slow
def test_nodes_need_the_working_folder(nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    monkeypatch.setattr(runtime.Path, "cwd", lambda: gone)
    gone.rmdir()
    with pytest.raises(UsageError, match="gone is not there on"):
        run(Recipe(), units("a"))


@pytest.mark.slow
def test_no_room(nodes: Any) -> None:
    with pytest.raises(UsageError, match="no node of the cluster has 64 CPUs"):
        run(Recipe(), units("a"), ClusterOptions(cpus=64))
    with pytest.raises(ClipseedError, match="no worker has come up within 1 s"):
        blocker = ray.remote(runtime.Worker).options(num_cpus=1)
        held = [blocker.remote(Recipe(), "/", 1, 0) for _ in range(2)]
        ray.get([actor.about.remote() for actor in held])
        try:
            run(Recipe(), units("a"), ClusterOptions(patience=1))
        finally:
            for actor in held:
                ray.kill(actor)


@pytest.mark.slow
def test_a_node_is_lost(nodes: Any) -> None:
    """Its units go to another node, and a new node is taken up."""
    tasks = units(*[f"{k:03d}" for k in range(60)])
    found: dict[int, Any] = {}
    written: list[int] = []
    extra = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    engine: RayEngine[str] = RayEngine(Recipe(pause=0.15), ClusterOptions(workers=3))

    def write(task: Unit, results: Sequence[str]) -> None:
        written.append(task.index)
        found[task.index] = list(results)
        if len(written) == 6:
            nodes.remove_node(extra, allow_graceful=False)

    try:
        stats = engine.run(tasks, write)
    finally:
        engine.close()
    assert sorted(written) == list(range(20))  # everything once
    assert found == {task.index: [sample.id * 2 for sample in task.samples] for task in tasks}
    assert stats.computed == 60


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_commands_give_the_output_of_one_process(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """cam, refine, threshold, crf and predict; a node dies in the middle of cam."""
    cam = ["cam", "--dataset", "toy", "--limit", "24", "--device", "cpu", "--max-side", "96", "--workers", "0"]
    cam += ["--background", "none"]  # so that some maps are empty
    crf = ["crf", "--confidence", "0.9", "--soft", "soft.h5", "--device", "cpu", "--iterations", "1"]
    assert main([*TINY, "--out", str(tmp_path / "w.safetensors")]) == 0
    predict = ["predict", "../w.safetensors", "--dataset", "toy", "--limit", "24", "--device", "cpu", "--workers", "0"]
    for name, more in (("here", []), ("there", ["--engine", "ray", "--ray-cpus", "1"])):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if more:
            extra = nodes.add_node(num_cpus=1)
            original = runtime.RayEngine._get

            def first_result_costs_a_node(self: Any, reference: Any, extra: Any = extra, get: Any = original) -> Any:
                found = get(self, reference)
                if isinstance(found, tuple):
                    monkeypatch.setattr(runtime.RayEngine, "_get", get)
                    nodes.remove_node(extra, allow_graceful=False)
                return found

            monkeypatch.setattr(runtime.RayEngine, "_get", first_result_costs_a_node)
        plain = ["threshold", "--alpha", "2", "--out", "plain"]
        for command in (cam, ["refine", "caa", "--device", "cpu"], plain, crf, predict):
            assert main([*command, *more]) == 0, capsys.readouterr().err
    here = outputs(tmp_path / "here")
    there = outputs(tmp_path / "there")
    assert here.keys() == there.keys()
    assert len([name for name in here if not name.endswith(".csv")]) == 3 * 24 + 3
    assert here.keys() >= {"cams.empty.csv", "cams-caa.empty.csv", "plain/empty.csv", "pseudo/empty.csv"}
    assert [name for name in here if here[name] != there[name]] == []


@pytest.mark.slow
def test_labels_in_one_pass_are_those_of_one_process(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    label = ["label", "--dataset", "toy", "--limit", "4", "--recipe", "svc", "--keep", "cams.h5", "--device", "cpu"]
    for name, more in (("here", []), ("there", ["--engine", "ray", "--ray-cpus", "1"])):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert main([*label, "--max-side", "96", "--workers", "0", *more]) == 0, capsys.readouterr().err
    here, there = outputs(tmp_path / "here"), outputs(tmp_path / "there")
    assert {"cams.h5", "pseudo/toy_000000.png"} <= here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


def outputs(folder: Path) -> dict[str, bytes]:
    """Every file but the manifests, which name their own places."""
    files = [path for path in folder.rglob("*.*") if path.name != "manifest.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tags_and_prompts_give_the_output_of_one_process(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images are tagged and encoded by the workers; this process loads a model only where it ranks."""
    save_devkit(tmp_path / "toy", 0, 70)
    cam = ["cam", "--dataset", "folder", "--images", "../toy/JPEGImages", "--classes", "toy", "--weights", "toy",
           "--labels", "auto", "--device", "cpu", "--max-side", "96", "--workers", "0"]  # fmt: skip
    prompts = ["prompts", "--dataset", "toy", "--limit", "100", "--device", "cpu", "--max-side", "96", "--workers", "0"]
    prompts += ["--features", "features.h5", "--csv", "prompts.csv"]
    load, loaded = FrozenClip.load, []

    def counted(*words: Any, **options: Any) -> FrozenClip:
        loaded.append(words)
        return load(*words, **options)

    monkeypatch.setattr(FrozenClip, "load", counted)
    for name, more, times in (("here", [], 2), ("there", ["--engine", "ray", "--ray-cpus", "1"], 1)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        loaded.clear()
        for command in (cam, prompts):
            assert main([*command, *more, "--quiet"]) == 0, capsys.readouterr().err
        assert len(loaded) == times
    here, there = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in ("here", "there")
    )
    assert here.keys() == there.keys() >= {"cams.h5", "cams.labels.csv", "cams.tags.json", "features.h5", "prompts.csv"}
    assert [name for name in here if here[name] != there[name]] == []


def test_plans() -> None:
    cpu, gpu = {"CPU": 16.0}, {"CPU": 32.0, "GPU": 4.0}
    assert plan_workers([cpu, cpu], ClusterOptions()) == runtime._Plan(4, 8, 0)
    assert plan_workers([{"CPU": 2.0}, cpu], ClusterOptions()) == runtime._Plan(9, 2, 0)
    assert plan_workers([cpu], ClusterOptions(cpus=5)) == runtime._Plan(3, 5, 0)
    assert plan_workers([cpu], ClusterOptions(workers=1)) == runtime._Plan(1, 8, 0)
    assert plan_workers([gpu, gpu, cpu], ClusterOptions()) == runtime._Plan(8, 4.0, 1)
    with pytest.raises(UsageError, match="no node of the cluster"):
        plan_workers([{"CPU": 0.0}], ClusterOptions())


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'clipseed\[ray\]'"):
        RayEngine(Recipe(), ClusterOptions())


@pytest.mark.slow
def test_without_a_cluster(clipseed: Any, tmp_path: Path) -> None:
    refused = clipseed("cam", "--dataset", "toy", "--engine", "ray", "--ray-address", "127.0.0.1:1", cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert "--engine ray: no Ray cluster found at 127.0.0.1:1" in refused.stderr
    assert "Traceback" not in refused.stderr
