"""``clipseed label``: equal to the chain of single commands, resumable, and labels from where people have them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clipseed.cli.main import main
from clipseed.store.cams import open_cams
from clipseed.store.label_masks import read_label_mask
from clipseed.store.open import open_records
from clipseed.store.stages import newest_output

from helpers.images import photo

TOY = ["--dataset", "toy", "--limit", "3"]
CHAINS = {
    "clip-es": ["cam --refine caa --out cams.h5", "crf cams.h5 --out chain"],
    "svc": [
        "cam --method svc --refine caa --out cams.h5",
        "refine par cams.h5 --out par.h5",
        "threshold par.h5 --threshold 0.4 --out chain",
    ],
    "segments": [
        "cam --refine caa --out cams.h5",
        "sam-masks --seeds cams.h5 --out found.h5 --checkpoint toy --points-per-side 6 --crop-layers 0",
        "sam-seed cams.h5 --masks found.h5 --out chain",
    ],
}
"""The commands that a recipe stands for, written out."""


def run(*words: object) -> int:
    return main([str(word) for word in words])


def masks(folder: str) -> dict[str, np.ndarray]:
    return {path.stem: read_label_mask(path) for path in sorted(Path(folder).glob("*.png"))}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("recipe", CHAINS)
def test_equals_the_single_commands(recipe: str) -> None:
    for line in CHAINS[recipe]:
        command, *words = line.split()
        assert run(command, *words, *(TOY if command == "cam" else []), "--quiet") == 0
    words = ["--segments", "found.h5"] if recipe == "segments" else ["--recipe", recipe]
    assert run("label", *TOY, *words, "--keep", "kept.h5", "--quiet") == 0
    assert newest_output(Path(), "report") == Path("pseudo")
    chain, one = masks("chain"), masks("pseudo")
    assert len(one) == 3
    assert chain.keys() == one.keys()
    for key, labels in one.items():
        assert (labels != chain[key]).mean() < 1e-3, key  # rounding may turn a pixel
        assert labels.any()
    with open_cams("cams.h5") as cams, open_cams("kept.h5") as kept:
        assert list(kept) == list(cams)
        assert kept.manifest["method"] == cams.manifest["method"] == "caa"
        assert all(np.abs(kept[key].maps - cams[key].maps).max() < 2e-3 for key in cams)


@pytest.mark.parametrize("recipe", ["clip-es", "svc"])
def test_batches_equal_single_images(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does after CLIP, images of one size together, on a CPU."""
    for number in range(4):
        Path("photos").mkdir(exist_ok=True)
        photo(number, 40, 56 if number < 3 else 48).save(f"photos/{number}.png")
    Path("classes.txt").write_text("boat\nfish\n")
    Path("labels.csv").write_text('0.png,"boat,fish"\n1.png,fish\n2.png,\n3.png,boat\n')
    words = ["label", "--images", "photos", "--labels", "labels.csv", "--classes", "classes.txt", "--weights", "toy"]
    assert run(*words, "--recipe", recipe, "--quiet") == 0
    monkeypatch.setattr("clipseed.jobs.label.one_by_one", lambda device, largest: None)
    assert run(*words, "--recipe", recipe, "--quiet", "--out", "together") == 0
    alone, together = masks("pseudo"), masks("together")
    assert len(together) == 4
    assert not together["2"].any()
    assert all((labels != together[key]).mean() < 1e-3 for key, labels in alone.items())


def test_segments_on_the_way_equal_segments_from_a_file() -> None:
    """With SAM's own settings, which no option of the command changes: through the job."""
    from dataclasses import replace

    from clipseed.data.dataset import DatasetOptions
    from clipseed.jobs.label import LabelOptions, run_label
    from clipseed.sam.options import FMA

    grid = replace(FMA, points_per_side=6, crop_layers=0)
    options = LabelOptions(
        DatasetOptions("toy", limit=3), Path("pseudo"), recipe="segments", checkpoint="toy", proposals=grid
    )
    report = run_label(options)
    assert report.coverage == 1
    for line in CHAINS["segments"]:
        command, *words = line.split()
        assert run(command, *words, *(TOY if command == "cam" else []), "--quiet") == 0
    chain = masks("chain")
    assert all((labels != chain[key]).mean() < 1e-3 for key, labels in masks("pseudo").items())
    manifest = json.loads(Path("pseudo/manifest.json").read_text())
    assert manifest["source"]["masks"]["options"]["points_per_side"] == 6
    assert open_records(Path("found.h5")).manifest["model"] == manifest["source"]["masks"]["model"]


def test_resumes_shards_and_follows_labels(capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("a", "b", "c")):
        Path("photos").mkdir(exist_ok=True)
        photo(number, 40, 56).save(f"photos/{name}.png")
    Path("classes.txt").write_text("boat\nfish\ncup\n")
    Path("labels.csv").write_text("a.png,boat\nb.png,fish\nc.png,cup\n")
    words = ["label", "--images", "photos", "--labels", "labels.csv", "--classes", "classes.txt", "--weights", "toy"]
    assert run(*words, "--json", "--report", "run.json", "--confidence", "0.6") == 0
    first = {path.name: path.read_bytes() for path in Path("pseudo").glob("*.png")}
    told = json.loads(capsys.readouterr().out)
    assert (told["command"], told["recipe"], told["computed"]) == ("label", "clip-es", 3)
    unsure = np.mean([labels == 255 for labels in masks("pseudo").values()])
    assert told["coverage"] == pytest.approx(1 - unsure)
    assert json.loads(Path("run.json").read_text())["images"] == 3
    Path("pseudo/b.png").unlink()
    Path("labels.csv").write_text("a.png,boat\nb.png,fish\nc.png,cup\nc.png,boat\n")
    assert run(*words, "--json", "--confidence", "0.6") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["computed"] == 2  # the one that is gone, and the one with another label
    assert "made for other labels" in err
    assert "clipseed report pseudo" in err
    again = {path.name: path.read_bytes() for path in Path("pseudo").glob("*.png")}
    assert {name: again[name] == content for name, content in first.items()} == {
        "a.png": True, "b.png": True, "c.png": False,
    }  # fmt: skip
    assert run(*words, "--json", "--confidence", "0.6") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["computed"] == 0
    assert "loading" not in err  # nothing to do loads nothing
    assert run(*words) == 1  # another confidence
    assert "made with other settings" in capsys.readouterr().err
    for shard in ("2/2", "1/2"):
        assert run(*words, "--confidence", "0.6", "--out", "shards", "--shard", shard, "--quiet") == 0
    assert {path.name: path.read_bytes() for path in Path("shards").glob("*.png")} == again
    Path("labels.csv").rename("given.csv")
    assert run(*["auto" if word == "labels.csv" else word for word in words], "--out", "tagged") == 0
    assert "3 images tagged by CLIP" in capsys.readouterr().err
    assert len(Path("tagged/labels.csv").read_text().splitlines()) > 3
    assert len(masks("tagged")) == 3


def test_labels_from_folders(capsys: pytest.CaptureFixture[str]) -> None:
    for number, place in enumerate(("fish/a", "fish/old/b", "cup/c", "d")):
        Path(f"photos/{place}").parent.mkdir(parents=True, exist_ok=True)
        photo(number, 40, 56).save(f"photos/{place}.png")
    words = ["cam", "--images", "photos", "--labels", "folders", "--weights", "toy"]
    assert run(*words, "--allow-skipped") == 0
    assert "d (no labels are given for it)" in capsys.readouterr().err
    with open_cams("cams.h5") as cams:
        shown = {key: [cams.class_names[k] for k in cams.classes(key)] for key in cams}
    assert shown == {"fish/a": ["fish"], "fish/old/b": ["fish"], "cup/c": ["cup"]}
    Path("classes.txt").write_text("fish\nplate\n")
    assert run(*words, "--classes", "classes.txt", "--out", "x.h5") == 1
    assert "unknown class 'cup'" in capsys.readouterr().err
    assert run("label", "--dataset", "toy", "--labels", "folders") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "nowhere", "--labels", "x.csv", "--classes", "voc"], "nowhere: no such image folder"),
        ([], "name the images: --images DIR"),
        (["--dataset", "toy", "--recipe", "svc", "--segments", "s.h5"], "--segments belongs to --recipe segments"),
        (["--dataset", "toy", "--recipe", "svc", "--confidence", "0.9"], "--confidence"),
        (["--dataset", "voc", "--recipe", "segments"], "needs --segments FILE"),
        (["--dataset", "toy", "--segments", "s.h5", "--checkpoint", "toy"], "give the segments, or the SAM"),
        (["--dataset", "toy", "--keep", "pseudo"], "give each its own place"),
    ],
)
def test_refuses(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("label", *words) in (1, 2)
    assert message in capsys.readouterr().err
