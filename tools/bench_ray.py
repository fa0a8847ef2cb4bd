"""Actors beside Ray Data, for the same units of the same work on the same cluster (docs/scale.md).

``python tools/bench_ray.py --count 4000``; needs ``pip install 'ray[data]'``. Both load the model once per worker and
run :meth:`clipseed.runtime.work.Work.run` on whole units; results come back to this process. They take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from bench_scale import make_images
from ray.cluster_utils import Cluster

from clipseed.data.dataset import DatasetOptions, open_dataset
from clipseed.jobs.cam import CamOptions, CamRecipe
from clipseed.runtime.cluster import ClusterOptions, RayEngine
from clipseed.runtime.run import RunOptions
from clipseed.store.units import Unit


class OfUnits:
    """A worker of Ray Data: one row is one unit."""

    def __init__(self, recipe: CamRecipe) -> None:
        import torch

        torch.set_num_threads(1)
        self.work = recipe()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        results: list[Any] = []
        self.work.run([row["task"]], lambda _, found: results.extend(found))
        return {"results": results}


def with_actors(recipe: CamRecipe, tasks: list[Unit]) -> tuple[float, float, int]:
    began = time.perf_counter()
    engine: RayEngine[Any] = RayEngine(recipe, ClusterOptions(cpus=1))
    ready = time.perf_counter()
    found: list[Any] = []
    engine.run(tasks, lambda _, results: found.extend(results))
    through = time.perf_counter()
    engine.close()
    return ready - began, through - ready, len(found)


def with_ray_data(recipe: CamRecipe, tasks: list[Unit]) -> tuple[float, float, int]:
    began = time.perf_counter()
    data = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks)).map(
        OfUnits, fn_constructor_args=(recipe,), compute=ray.data.ActorPoolStrategy(size=2), num_cpus=1
    )
    found: list[Any] = []
    first = 0.0
    for row in data.iter_rows():
        first = first or time.perf_counter()
        found.extend(row["results"])
    # What it costs before the first result is loading, as with the actors.
    return first - began, time.perf_counter() - first, len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder, arguments.count)
        data = DatasetOptions(
            "folder", images=folder / "photos", labels=folder / "labels.csv", classes=str(folder / "classes.txt")
        )
        image_set = open_dataset(data)
        options = CamOptions(data, folder / "cams.h5", weights="toy", run=RunOptions(device="cpu", workers=0))
        recipe = CamRecipe(options, image_set.vocabulary, image_set.reader)
        samples = list(image_set.samples)
        tasks = [Unit(k, tuple(samples[s : s + 64])) for k, s in enumerate(range(0, len(samples), 64))]
        times: dict[str, list[tuple[float, float]]] = {"actors": [], "Ray Data": []}
        for _ in range(arguments.turns):
            for kind, function in (("actors", with_actors), ("Ray Data", with_ray_data)):
                start, through, count = function(recipe, tasks)
                assert count == len(samples), f"{kind}: {count} results for {len(samples)} images"
                times[kind].append((start, start + through))
    for kind, values in times.items():
        print(f"{kind:9} until the first worker or result {statistics.median(v[0] for v in values):5.1f} s, "
              f"in all {statistics.median(v[1] for v in values):5.1f} s")  # fmt: skip
    ratio = statistics.median(b[1] / a[1] for a, b in zip(times["actors"], times["Ray Data"], strict=True))
    print(f"Ray Data takes {ratio:.2f} times as long as actors ({len(samples)} images, {len(tasks)} units)")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
