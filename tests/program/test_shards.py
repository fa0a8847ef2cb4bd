"""Several runs on one output: --shard, torchrun, Slurm, and putting their work together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import Runner

from clipseed.cli.main import main
from clipseed.device import local_device
from clipseed.errors import StoreError, UsageError
from clipseed.jobs import crf
from clipseed.runtime import images as engine
from clipseed.runtime.launch import Launch, find_shard
from clipseed.store.cam_writer import CamWriter
from clipseed.store.cams import open_cams
from clipseed.store.shards import Shard, ShardReports, lock_output

from helpers.samples import samples

TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1",
         "SLURM_ARRAY_TASK_STEP": "2"}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        (None, {}, Launch()),
        ("1/1", TORCHRUN, Launch()),
        ("3/8", TORCHRUN, Launch(Shard(2, 8), "--shard")),
        (" 8 / 8 ", {}, Launch(Shard(7, 8), "--shard")),
        (None, TORCHRUN, Launch(Shard(2, 4), "torchrun")),
        (None, {**SLURM, **TORCHRUN}, Launch(Shard(2, 4), "torchrun")),
        (None, SLURM, Launch(Shard(3, 8), "Slurm")),
        (None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, Launch()),
        (None, {"RANK": "0", "WORLD_SIZE": "1"}, Launch()),
        (None, {"RANK": "0"}, Launch()),
        (None, ARRAY, Launch(Shard(2, 3), "Slurm")),
        (None, {**ARRAY, "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Launch(Shard(5, 6), "Slurm")),
    ],
)
def test_which_shard(text: str | None, environment: dict[str, str], expected: Launch) -> None:
    assert find_shard(text, environment) == expected


@pytest.mark.parametrize("text", ["0/8", "9/8", "1", "1/0", "a/b", "-1/4", "1/2/3", ""])
def test_shards_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"--shard .*give i/n"):
        find_shard(text, {})


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "x", "WORLD_SIZE": "4"},
        {"RANK": "4", "WORLD_SIZE": "4"},
        {"SLURM_PROCID": "9", "SLURM_NTASKS": "8"},
        {**ARRAY, "SLURM_ARRAY_TASK_ID": "17"},
    ],
)
def test_launchers_that_make_no_sense(environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="--shard i/n"):
        find_shard(None, environment)


def test_devices_by_local_rank() -> None:
    assert local_device(8, {"LOCAL_RANK": "5"}) == 5
    assert local_device(2, {"SLURM_LOCALID": "5"}) == 1
    assert local_device(1, {"LOCAL_RANK": "5"}) == 0
    assert local_device(4, {}) == 0


def test_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of one cut go together; the whole, and other cuts, do not go with them."""
    monkeypatch.setattr("clipseed.store.shards._PATIENCE", 0.2)
    first = lock_output(tmp_path, tmp_path, Shard(0, 2))
    second = lock_output(tmp_path, tmp_path, Shard(1, 2))
    for other in (Shard(0, 2), Shard(0, 3), Shard()):
        with pytest.raises(StoreError, match="another run is writing it"):
            lock_output(tmp_path, tmp_path, other)
    first.release()
    with pytest.raises(StoreError, match="lock-2-of-2 is locked"):
        lock_output(tmp_path, tmp_path, Shard())
    second.release()
    whole = lock_output(tmp_path, tmp_path, Shard())
    with pytest.raises(StoreError, match="another run is writing it"):
        lock_output(tmp_path, tmp_path, Shard(0, 2))
    whole.release()


def test_roll_call(tmp_path: Path) -> None:
    calls = [ShardReports(tmp_path, Shard(k, 3)) for k in range(3)]
    calls[2].report([("b", 'broken, "quoted"')])
    calls[0].report([])
    assert calls[1].reported() == 2
    calls[0].take_back()
    assert calls[1].reported() == 1
    calls[0].report([("a", "é")])
    calls[1].report([])
    assert calls[0].skipped() == [("a", "é"), ("b", 'broken, "quoted"')]
    calls[0].remove()
    assert list(tmp_path.iterdir()) == []


def test_shards_cover_everything_once(tmp_path: Path) -> None:
    ids = [f"{k:03d}" for k in range(53)]
    manifest = {"kind": "cam", "vocabulary": {}}
    seen: list[str] = []
    for k in range(4):
        with CamWriter(tmp_path / "out", manifest, "float16", 5, shard=Shard(k, 4)) as writer:
            mine = [key for unit in writer.units(samples(ids)) for key in unit.ids]
            assert mine == writer.own(ids)
            seen += mine
    assert sorted(seen) == ids


@pytest.mark.parametrize("index", range(3))
def test_the_temporary_files_of_other_shards_stay(index: int, tmp_path: Path) -> None:
    """They may be in work; those of the shard's own units are left over."""
    manifest = {"kind": "cam", "vocabulary": {}}
    with CamWriter(tmp_path / "out", manifest, "float16", 5, shard=Shard((index + 1) % 3, 3)):
        pass
    names = [".tmp-9-once-manifest.json", ".tmp-9-shard-1-of-3.json", *(f".tmp-9-unit-{k:06d}.h5" for k in range(6))]
    for name in names:
        (tmp_path / "out" / name).touch()
    with CamWriter(tmp_path / "out", manifest, "float16", 5, shard=Shard(index, 3)):
        left = {path.name for path in (tmp_path / "out").glob(".tmp-*")}
    assert left == {name for k, name in enumerate(names) if k < 2 or (k - 2) % 3 != index}


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The program, with small units, in this process."""
    monkeypatch.setitem(engine._UNIT_SIZE, "cpu", 3)
    monkeypatch.setattr(crf, "_UNIT_SIZE", 3)

    def call(*words: object, cwd: Path, **environment: str) -> Done:
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            for name, value in environment.items():
                patch.setenv(name, value)
            capsys.readouterr()
            code = main([str(word) for word in words])
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return call


CAM = ("cam", "--dataset", "toy", "--limit", "20", "--device", "cpu", "--max-side", "96")


@pytest.mark.slow
def test_any_cut_gives_the_bytes_of_one_run(run: Run, tmp_path: Path) -> None:
    """cam, refine and crf in shards, in any order; the last one finishes."""
    for name, count in (("one", 1), ("two", 2), ("three", 3)):
        folder = tmp_path / name
        folder.mkdir()
        for command in (
            CAM,
            ("refine", "caa"),
            ("crf", "--confidence", "0.9", "--soft", "soft.h5", "--iterations", "1"),
        ):
            for k in reversed(range(1, count + 1)):
                done = run(*command, "--shard", f"{k}/{count}", cwd=folder)
                assert done.returncode == 0, done.stderr
                left = f"{k - 1} of {count} are not yet" in done.stderr
                assert left == (k > 1), done.stderr
    one = {path.relative_to(tmp_path / "one"): path.read_bytes() for path in (tmp_path / "one").rglob("*.*")}
    assert len(one) >= 3 + 20
    for name in ("two", "three"):
        other = {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        assert other == one


@pytest.mark.slow
def test_torchrun(run: Run, tmp_path: Path) -> None:
    """Real processes of a real launcher, all at once; a skipped image must not make it stop the others."""
    (tmp_path / "whole").mkdir()
    assert run(*CAM, cwd=tmp_path / "whole").returncode == 0
    (tmp_path / "program.py").write_text(
        "import sys, clipseed.runtime.images as engine\n"
        "from clipseed.cli.main import main\n"
        "engine._UNIT_SIZE['cpu'] = 3\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "program.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *CAM], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "shard 2/3 (torchrun)" in done.stderr
    assert (tmp_path / "cams.h5").read_bytes() == (tmp_path / "whole" / "cams.h5").read_bytes()
    assert not (tmp_path / "cams.h5.parts").exists()


@pytest.mark.slow
def test_slurm_and_resuming(run: Run, tmp_path: Path) -> None:
    """A shard that runs again, alone or after the end, loses and repeats nothing."""
    first = run(*CAM, cwd=tmp_path, SLURM_PROCID="0", SLURM_NTASKS="2")
    assert "shard 1/2 (Slurm): 20 images, 11 to do" in first.stderr
    again = run(*CAM, cwd=tmp_path, SLURM_PROCID="0", SLURM_NTASKS="2")
    assert "0 to do, 11 done already" in again.stderr
    assert "1 of 2 are not yet" in again.stderr
    refused = run(*CAM, "--overwrite", cwd=tmp_path, SLURM_PROCID="1", SLURM_NTASKS="2")
    assert refused.returncode == 2
    assert "--overwrite cannot be used by one of several runs" in refused.stderr
    last = run(*CAM, "--report", "run.json", cwd=tmp_path, SLURM_PROCID="1", SLURM_NTASKS="2")
    assert last.returncode == 0, last.stderr
    assert len(open_cams(tmp_path / "cams.h5")) == 20
    report = json.loads((tmp_path / "run.json").read_text())
    assert (report["shard"], report["images"], report["computed"], report["open_shards"]) == ("2/2", 9, 9, 0)
    content = (tmp_path / "cams.h5").read_bytes()
    for rank in "01":
        after = run(*CAM, cwd=tmp_path, SLURM_PROCID=rank, SLURM_NTASKS="2")
        assert after.returncode == 0, after.stderr
    assert (tmp_path / "cams.h5").read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cams.empty.csv", "cams.h5", "run.json"]


@pytest.mark.slow
def test_merge(run: Run, tmp_path: Path) -> None:
    """A run whose last shard never came, and outputs of machines that share no disk."""
    for name in ("whole", "a", "b"):
        (tmp_path / name).mkdir()
    run(*CAM, cwd=tmp_path / "whole")
    run(*CAM, "--shard", "1/2", cwd=tmp_path / "a")
    run(*CAM, "--shard", "2/2", cwd=tmp_path / "b")
    merged = run("merge", "a/cams.h5", "b/cams.h5", "--out", "cams.h5", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    assert "cams.h5: 20 images" in merged.stderr
    with open_cams(tmp_path / "cams.h5", verify=True) as mine, open_cams(tmp_path / "whole" / "cams.h5") as theirs:
        assert mine.manifest == theirs.manifest
        assert set(mine) == set(theirs)
        assert all(np.array_equal(mine[key].maps, theirs[key].maps) for key in mine)
    finished = run("merge", "a/cams.h5", "--json", cwd=tmp_path)
    assert json.loads(finished.stdout)["images"] == 11
    assert not (tmp_path / "a" / "cams.h5.parts").exists()
    twice = run("merge", "a/cams.h5", "whole/cams.h5", "--out", "again.h5", cwd=tmp_path)
    assert "11 of them more than once" in twice.stderr

    run(*CAM, "--flip", "--out", "other.h5", cwd=tmp_path)
    (tmp_path / "junk.h5").write_text("junk")
    for sources, complaint in (
        (["cams.h5", "other.h5", "--out", "x.h5"], "made with other settings"),
        (["nowhere.h5", "--out", "x.h5"], "no such output"),
        (["cams.h5"], "nothing to finish"),
        (["cams.h5", "other.h5"], "--out NAME.h5: say where"),
        (["cams.h5", "--out", "other.h5"], "is there already"),
        (["junk.h5", "--out", "x.h5"], "not a readable HDF5 file"),
    ):
        refused = run("merge", *sources, cwd=tmp_path)
        assert refused.returncode in (1, 2)
        assert complaint in refused.stderr
        assert not (tmp_path / "x.h5").exists()


@pytest.mark.slow
def test_merging_masks(run: Run, tmp_path: Path) -> None:
    run(*CAM, cwd=tmp_path)
    run("crf", "--out", "whole", cwd=tmp_path)
    for k in (1, 2):
        run("crf", "--out", f"part-{k}", "--shard", f"{k}/2", cwd=tmp_path)
    merged = run("merge", "part-1", "part-2", "--out", "pseudo", cwd=tmp_path)
    assert "pseudo: 20 images" in merged.stderr, merged.stderr
    for path in (tmp_path / "whole").glob("*.png"):
        assert (tmp_path / "pseudo" / path.name).read_bytes() == path.read_bytes()
    told = run("crf", "--out", "pseudo", cwd=tmp_path).stderr
    assert told.startswith("reading cams.h5, the last output here (name another one to choose it)\ncrf: 0 images")
    (tmp_path / "part-2" / "toy_000000.png").write_bytes((tmp_path / "whole" / "toy_000001.png").read_bytes())
    refused = run("merge", "part-1", "part-2", "--out", "other", cwd=tmp_path)
    assert refused.returncode == 1
    assert "not the same in both" in refused.stderr


def test_engines_that_are_none(clipseed: Runner, tmp_path: Path) -> None:
    for options, complaint in (
        (("--engine", "dask"), "'dask' is not one of 'local', 'ray'"),
        (("--ray-cpus", "2"), "belong to --engine ray"),
        (("--engine", "ray", "--ray-workers", "0"), "give auto or a number from 1"),
        (("--report", "nowhere/run.json"), "--report nowhere/run.json: the folder nowhere does not exist"),
    ):
        refused = clipseed("cam", "--dataset", "toy", *options, cwd=tmp_path)
        assert refused.returncode == 2, refused.stderr
        assert complaint in refused.stderr
