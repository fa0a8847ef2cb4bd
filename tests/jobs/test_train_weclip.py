"""Whole runs of ``clipseed train weclip``: what they write, going on, several processes, and what is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipseed
from clipseed.cli.main import main
from clipseed.clip.model import FrozenClip
from clipseed.data.toy.dataset import HELD_OUT_SEED, TRAIN_SEED, toy_id, toy_mask, toy_scene
from clipseed.store.label_masks import write_label_mask
from clipseed.store.toy_devkit import save_devkit
from clipseed.train.checkpoint import read_checkpoint, read_weights
from clipseed.train.metrics import read_metrics

from helpers.images import photo
from helpers.program import environment

TOY = ["train", "weclip", "--dataset", "toy", "--split", "train", "--limit", "12", "--device", "cpu"]
SMALL = ["--crop", "64", "--width", "16", "--heads", "2", "--blocks", "1", "--par-iterations", "2", "--keep-every", "4"]
RUN = [*TOY, *SMALL, "--steps", "12", "--out", "w.safetensors"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_a_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A decoder, nothing else; scores while it learns, of which the best is kept; every number is recorded."""
    words = [*RUN, "--val", "held-out", "--val-limit", "3", "--val-every", "4"]
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert (told["steps"], told["images"], told["skipped"]) == (12, 12, [])
    assert "toy train: 12 images with labels, 12 steps of 4" in printed.err
    rows = read_metrics(here / "w-training" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    names = {"loss", "segmentation", "affinity", "saturated", "probability", "gradient", "lr"}
    assert names <= rows[0].keys()
    assert all(0 <= row["saturated"] <= 1 and 0 < row["probability"] <= 1 for row in rows)
    scores = {row["step"]: row["validation"]["score"] for row in rows if "validation" in row}
    assert scores.keys() == {4, 8, 12}
    assert told["best"]["score"] == max(scores.values())
    weights, about = read_weights(here / "w.safetensors")
    decoder = clipseed.load_segmenter("w.safetensors", device="cpu").network.decoder
    assert weights.keys() == decoder.state_dict().keys()
    assert sum(value.numel() for value in weights.values()) == sum(p.numel() for p in decoder.parameters())
    assert about["tower"]["sha256"] == told["model"]["sha256"]
    assert about["source"]["toy_seed"] == str(TRAIN_SEED)
    _, about = read_weights(here / "w-best.safetensors")
    assert (about["step"], about["score"]) == (told["best"]["step"], told["best"]["score"])
    # The score is that of `clipseed evaluate`: the best segmenter's predictions, one confusion matrix.
    segmenter = clipseed.load_segmenter(told["best"]["file"], device="cpu")
    (here / "predictions").mkdir()
    for k in range(3):
        scene = toy_scene(HELD_OUT_SEED, toy_id(k))
        labels = segmenter.predict(Image.fromarray(scene.image()))
        assert labels.shape == scene.size
        probabilities = segmenter.scores(Image.fromarray(scene.image()))
        np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)
        np.testing.assert_array_equal(probabilities.argmax(axis=0), labels)
        write_label_mask(here / "predictions" / f"{toy_id(k)}.png", labels)
    assert main(["evaluate", "predictions", "--gt", "toy", "--classes", "toy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["miou"] == pytest.approx(told["best"]["score"], abs=1e-6)


def outputs(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in (folder / "w-training").iterdir() if path.name != "lock"}
    return {**found, "w": (folder / "w.safetensors").read_bytes()}


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "clipseed", *RUN, *words]
    return subprocess.Popen(line, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 when some steps are done, Ctrl-C and SIGTERM; the same command ends where an undisturbed one does."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    chance = random.Random(0)
    for folder in (whole, broken):
        folder.mkdir()
    monkeypatch.chdir(whole)
    assert main(RUN) == 0
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)):
        before = len(read_metrics(broken / "w-training" / "metrics.jsonl"))
        process = start(broken, "--keep-every", "2")
        deadline = time.monotonic() + 240
        while len(read_metrics(broken / "w-training" / "metrics.jsonl")) < min(before + 2, 10):
            assert time.monotonic() < deadline
            if process.poll() is not None:
                break
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(number)
        ended = process.wait(timeout=60)
        assert ended in (code, 0)
        if ended in (130, 143):
            assert "interrupted; w-training/checkpoint.safetensors holds step" in process.stderr.read()
    monkeypatch.chdir(broken)
    assert main([*RUN, "--keep-every", "2"]) == 0
    assert outputs(broken)["w"] == outputs(whole)["w"]
    assert read_checkpoint(broken / "w-training" / "checkpoint.safetensors").step == 12
    assert [row["step"] for row in read_metrics(broken / "w-training" / "metrics.jsonl")] == list(range(1, 13))


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun with gloo, dropout and refinement module included."""
    words = [*RUN, "--rfm-from", "6"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "clipseed"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    assert main(words) == 0
    done = subprocess.run(
        [*torchrun, *words], cwd=tmp_path / "two", env=environment(), capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("w.safetensors: 12 steps") == 1  # one process talks
    curves = [read_metrics(tmp_path / name / "w-training" / "metrics.jsonl") for name in ("one", "two")]
    for alone, together in zip(*curves, strict=True):
        for name in ("loss", "segmentation", "affinity", "saturated"):
            assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-4), (alone["step"], name)
    one, two = (read_weights(tmp_path / name / "w.safetensors")[0] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-2, atol=1e-3)


def test_going_on_with_other_options_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--steps", "4"]) == 0
    capsys.readouterr()
    assert main([*RUN, "--steps", "4", "--lr", "0.001"]) == 1
    assert "was made with other settings (options.lr 0.002 -> 0.001)" in said(capsys)
    assert main([*RUN, "--steps", "4", "--limit", "11"]) == 1
    assert "images 12 -> 11" in said(capsys)
    assert main([*RUN, "--steps", "4", "--limit", "11", "--overwrite"]) == 0
    assert main([*RUN, "--steps", "4", "--init", "w.safetensors", "--out", "v.safetensors"]) == 0
    capsys.readouterr()
    assert main([*RUN, "--steps", "4", "--init", "w.safetensors", "--out", "u.safetensors", "--width", "32"]) == 1
    assert "w.safetensors: weights of another model" in said(capsys)


def test_masks_in_place_of_labels(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fully supervised, no text encoder; the masks' values are checked, and so are sizes and scores."""
    save_devkit(here / "devkit", seed=7, count=6)
    words = ["train", "weclip", "--dataset", "voc", "--root", "devkit", "--split", "train", "--classes", "toy",
             "--weights", "toy", "--device", "cpu", *SMALL, "--steps", "4"]  # fmt: skip
    assert main([*words, "--masks", "SegmentationClass", "--out", "m.safetensors"]) == 0
    assert "6 images with masks of" in said(capsys)
    rows = read_metrics(here / "m-training" / "metrics.jsonl")
    assert "probability" not in rows[0]
    Path("pseudo").mkdir()
    for k in range(4):
        write_label_mask(Path("pseudo") / f"{toy_id(k)}.png", toy_mask(7, toy_id(k)))
    assert main([*words, "--masks", "pseudo", "--out", "p.safetensors"]) == 0
    assert "2 of 6 images have no mask" in said(capsys)
    mask = toy_mask(7, toy_id(1))
    write_label_mask(Path("pseudo") / f"{toy_id(1)}.png", np.full_like(mask, 99))
    assert main([*words, "--masks", "pseudo", "--out", "q.safetensors"]) == 1
    assert f"the mask of {toy_id(1)}: holds the value 99, but this class list has 0 (background) to 10" in said(capsys)
    write_label_mask(Path("pseudo") / f"{toy_id(1)}.png", mask[:50])
    assert main([*words, "--masks", "pseudo", "--out", "r.safetensors"]) == 1
    assert "pixels, its image" in said(capsys)
    assert main([*words, "--soft", "crf.h5"]) == 2
    assert "--soft belongs to --masks" in said(capsys)
    assert main([*words, "--masks", "nowhere"]) == 1
    assert "--masks nowhere: no such folder" in said(capsys)


def folder_of(here: Path, labels: str, count: int = 5) -> list[str]:
    """Photographs with these labels, one of them broken; the command that trains on them."""
    (here / "photos").mkdir(exist_ok=True)
    for number in range(count):
        photo(number, 48, 64).save(here / "photos" / f"{number}.jpg")
    (here / "photos" / "2.jpg").write_bytes(b"\xff\xd8\xff broken")
    (here / "labels.csv").write_text(labels)
    (here / "classes.txt").write_text("car\ntree\ncup\n")
    return ["train", "weclip", "--dataset", "folder", "--images", "photos", "--labels", "labels.csv", "--classes",
            "classes.txt", "--weights", "toy", "--device", "cpu", *SMALL, "--steps", "6"]  # fmt: skip


def test_a_broken_image_costs_that_image(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Empty labels train as background; no labels, and files that cannot be read, are left out and said."""
    words = folder_of(here, "id,label\n0,car\n1,\n2,car\n3,cup;tree\n")
    assert main(words) == 3
    told = said(capsys)
    assert "1 of 5 images have no labels (4 …); left out" in told
    assert "1 image skipped: 2 (" in told
    listed = (here / "weclip-training" / "skipped.csv").read_text()
    assert listed.startswith("id,reason\n2,")
    assert main(words) == 3  # nothing left to do, and still said
    assert main([*words, "--allow-skipped", "1"]) == 0


def test_bad_input(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[list[str], int, str]] = [
        (folder_of(here, "id,label\n0,\n1,\n"), 1, "no image shows any class; nothing but background"),
        ([*RUN, "--out", "w.pt"], 2, "--out w.pt: give the name of a .safetensors file"),
        ([*RUN, "--out", "gone/w.safetensors"], 2, "the folder gone does not exist"),
        ([*RUN, "--width", "30", "--heads", "8"], 2, "--width 30: give a multiple of --heads 8"),
        ([*RUN, "--scales", "1"], 2, "--scales: give two factors"),
        ([*RUN, "--batch-size", "6", "--accumulate", "4"], 2, "--batch-size 6: cannot be shared"),
        ([*RUN, "--val", "test"], 2, "--split test: the toy set has held-out and train"),
        ([*RUN, "--init", "gone.safetensors"], 1, "gone.safetensors: no such weights file"),
        ([*RUN, "--weights", "gone.pt"], 1, "--weights gone.pt: no such file"),
        ([*RUN, "--cache", "--scales", "0.5,1"], 2, "--scales: --cache is for runs without augmentation"),
        ([*RUN, "--crop", "8"], 2, "--crop 8: give a multiple of a patch's 16 pixels"),
    ]
    for words, code, message in cases:
        assert main(words) == code, words
        assert message in said(capsys), words
    words = folder_of(here, "id,label\n0,zebra\n")
    assert main(words) == 1
    assert "unknown class 'zebra'" in said(capsys)


def test_a_run_with_a_cache(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*RUN, "--cache", "-q"]) == 0
    assert read_weights(here / "w.safetensors")[1]["options"]["scales"] == [1.0, 1.0]
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    assert main([*RUN, "--cache", "--out", "v.safetensors"]) == 2
    assert "--cache: 12 images need" in said(capsys)


def test_nan_stops_with_what_to_do(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from clipseed.train.weclip import trainer

    monkeypatch.setattr(trainer, "affinity_loss", lambda affinity, *_: affinity.sum() / 0)
    assert main(RUN) == 1
    assert "is inf" in (told := said(capsys))
    assert "try a lower --lr" in told
    assert not (here / "w.safetensors").exists()


def test_another_tower_and_other_files_are_refused(here: Path, tiny_weights: Path) -> None:
    assert main([*RUN, "--steps", "1", "--quiet"]) == 0
    with pytest.raises(clipseed.ClipseedError, match="a decoder fits its own CLIP only"):
        clipseed.load_segmenter("w.safetensors", weights=tiny_weights, device="cpu")
    with pytest.raises(clipseed.ClipseedError, match="a checkpoint of training, not a segmenter"):
        clipseed.load_segmenter("w-training/checkpoint.safetensors", device="cpu")
    with pytest.raises(clipseed.ClipseedError, match=r"--classes voc: 20 classes, w.safetensors was trained on 10"):
        clipseed.load_segmenter("w.safetensors", device="cpu", classes="voc")
    with pytest.raises(clipseed.ClipseedError, match="gone.safetensors"):
        clipseed.load_segmenter("gone.safetensors")
    for content in (b"", b"text", Path("w.safetensors").read_bytes()[:-3]):
        Path("damaged.safetensors").write_bytes(content)
        with pytest.raises(clipseed.ClipseedError, match="damaged"):
            clipseed.load_segmenter("damaged.safetensors", device="cpu")
    with pytest.raises(clipseed.ClipseedError, match=r"no segmenter of clipseed, and no checkpoint of WeCLIP's"):
        clipseed.load_segmenter(tiny_weights, device="cpu")


def released_checkpoint(path: Path, state: dict[str, torch.Tensor], classes: int = 21, width: int = 16) -> None:
    """What the authors save: CLIP under ``encoder.``, fusion and decoder under names of their own."""
    from clipseed.train.weclip.decoder import Decoder

    layers = len({key.split(".")[3] for key in state if key.startswith("visual.transformer.resblocks.")})
    decoder = Decoder(layers - 1, state["visual.conv1.weight"].shape[0], classes, width, 3, 8)
    names = [("projections.", "decoder_fts_fuse.linears_modulelist."), (".first.", ".proj."), (".second.", ".proj_2."),
             ("fusion.", "decoder_fts_fuse.linear_fuse."), ("blocks.", "decoder.transformer.resblocks."),
             (".qkv.", ".attn.in_proj_"), (".out.", ".attn.out_proj."), (".norm_", ".ln_"), (".up.", ".mlp.c_fc."),
             (".down.", ".mlp.c_proj."), ("head.", "decoder.linear_pred.")]  # fmt: skip
    saved = {f"encoder.{key}": value for key, value in state.items()}
    saved["encoder.visual.positional_embedding_new"] = torch.zeros(5, 5)
    for key, value in decoder.state_dict().items():
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        saved[key] = value[:, :, None, None] if key.endswith(("linear_fuse.weight", "linear_pred.weight")) else value
    torch.save(saved, path)


def test_the_authors_checkpoints(here: Path, openai_state: dict[str, torch.Tensor]) -> None:
    """They predict with the CLIP inside them, start a run, and are refused where names or sizes do not fit."""
    released_checkpoint(here / "theirs.pth", openai_state)
    segmenter = clipseed.load_segmenter("theirs.pth", device="cpu", precision="fp32")
    assert segmenter.classes == clipseed.load_vocabulary("voc").class_names
    assert segmenter.network.statistics == "imagenet"
    assert segmenter.predict(photo(0, 48, 64)).shape == (48, 64)
    (here / "photos").mkdir()
    photo(0, 48, 64).save("photos/0.jpg")
    Path("labels.csv").write_text("id,label\n0,cat\n")
    words = ["train", "weclip", "--dataset", "folder", "--images", "photos", "--labels", "labels.csv", "--classes",
             "voc", "--weights", "theirs.pth", "--device", "cpu", "--crop", "64", "--steps", "1", "--batch-size", "1",
             "--lr", "1e-12", "--init", "theirs.pth"]  # fmt: skip
    assert main([*words, "--width", "16", "-q"]) == 0
    started = read_weights(here / "weclip.safetensors")[0]
    for name, value in segmenter.network.decoder.state_dict().items():
        torch.testing.assert_close(started[name], value, atol=1e-6, rtol=0)
    assert main([*words, "--width", "32", "--out", "other.safetensors", "-q"]) == 1
    released_checkpoint(here / "five.pth", openai_state, classes=6)
    with pytest.raises(clipseed.ClipseedError, match="a decoder for 5 classes, whose names it does not tell"):
        clipseed.load_segmenter("five.pth", device="cpu")
    saved = torch.load("theirs.pth")
    del saved["decoder.linear_pred.weight"]
    torch.save(saved, "less.pth")
    with pytest.raises(clipseed.ClipseedError, match=r"less.pth: no decoder of WeCLIP; it lacks 'head.weight'"):
        clipseed.load_segmenter("less.pth", device="cpu")
    torch.save({**torch.load("theirs.pth"), "evil": os.system}, "evil.pth")
    with pytest.raises(clipseed.ClipseedError, match="loading it could run code"):
        clipseed.load_segmenter("evil.pth", device="cpu")


def test_the_report_of_a_segmenter(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Curves, and image, truth, pseudo-label and prediction of a few images at every score; of the best one, too."""
    assert main([*RUN, "--val", "held-out", "--val-limit", "2", "--val-every", "6", "-q"]) == 0
    for name in ("w.safetensors", "w-best.safetensors"):
        assert main(["report", name, "--json", "--out", f"{name}.html"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["steps"] == 12
        page = Path(f"{name}.html").read_text(encoding="utf-8")
        assert page.count("<polyline") == 8  # mIoU and every number that is recorded
        assert page.count('alt="truth"') == page.count('alt="image"') == 2
        for step in (6, 12):
            assert page.count(f'alt="prediction, step {step}"') == page.count(f'alt="pseudo-label, step {step}"') == 2
        assert "<script" not in page
    assert main(["report", "w.safetensors", "w-best.safetensors"]) == 2
    assert "name it alone" in said(capsys)
    Path("w-training").rename("elsewhere")
    assert main(["report", "w.safetensors"]) == 2
    assert "nothing is known of its training" in said(capsys)


def test_labels_that_clip_gives(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of ``cam --labels auto``: the same tags, listed, made once; an edited list is given back with --labels."""
    save_devkit(here / "toy", 0, 6)
    photos = ["--dataset", "folder", "--images", "toy/JPEGImages", "--classes", "toy", "--weights", "toy"]
    words = ["train", "weclip", *photos, *SMALL, "--steps", "2", "--out", "t.safetensors"]
    load, loaded = FrozenClip.load, []
    monkeypatch.setattr(FrozenClip, "load", lambda *given, **more: loaded.append(given) or load(*given, **more))
    assert main([*words, "--labels", "auto"]) == 0
    assert len(loaded) == 1  # by the same model that is trained on
    assert "6 images tagged by CLIP" in capsys.readouterr().err
    tags = (here / "t-training" / "labels.csv").read_bytes()
    weights = (here / "t.safetensors").read_bytes()
    assert main(["cam", *photos, "--labels", "auto", "--device", "cpu", "--out", "cams.h5", "-q"]) in (0, 3)
    assert (here / "cams.labels.csv").read_bytes() == tags
    assert main([*words, "--labels", "auto"]) == 0
    assert (here / "t.safetensors").read_bytes() == weights
    assert main([*words, "--labels", "t-training/labels.csv", "--out", "u.safetensors"]) == 0
    assert read_weights(here / "u.safetensors")[0].keys() == read_weights(here / "t.safetensors")[0].keys()
    for name, value in read_weights(here / "u.safetensors")[0].items():
        assert torch.equal(value, read_weights(here / "t.safetensors")[0][name])
