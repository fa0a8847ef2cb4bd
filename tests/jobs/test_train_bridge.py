"""Whole runs of ``clipseed train bridge``, ``predict`` and ``export-model`` on what it made, and what is refused."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipseed
from clipseed.cli.main import main
from clipseed.data.toy.dataset import HELD_OUT_SEED, toy_id, toy_mask, toy_scene
from clipseed.jobs.train_bridge import TrainBridgeOptions
from clipseed.store.label_masks import read_label_mask, write_label_mask
from clipseed.store.toy_devkit import save_devkit
from clipseed.train.bridge.data import CamMasks
from clipseed.train.bridge.text import tokens_of
from clipseed.train.bridge.trainer import TextSegmentation
from clipseed.train.checkpoint import read_checkpoint, read_weights
from clipseed.train.inference import ViewOptions
from clipseed.train.metrics import read_metrics

from helpers.images import photo
from helpers.program import environment

SMALL = ["--backbone", "test_efficientnet", "--crop", "64", "--width", "16", "--token-width", "16", "--heads", "2",
         "--blocks", "1", "--fpn-width", "8", "--batch-size", "4", "--device", "cpu"]  # fmt: skip
TOY = ["train", "bridge", *SMALL, "--dataset", "toy", "--split", "train", "--limit", "8"]
RUN = [*TOY, "--masks", "toy", "--steps", "6", "--out", "b.safetensors"]
PREDICT = ["predict", "b.safetensors", "--dataset", "toy", "--limit", "3", "--device", "cpu", "-q"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the segmenter of ``RUN`` and its training."""
    folder = tmp_path_factory.mktemp("trained")
    words = [*RUN[:-1], str(folder / "b.safetensors"), "--val", "held-out", "--val-limit", "2", "--val-every", "3"]
    assert main([*words, "-q"]) == 0
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(trained / "b.safetensors", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def image(index: int) -> Image.Image:
    return Image.fromarray(toy_scene(HELD_OUT_SEED, toy_id(index)).image())


def masks(folder: str) -> dict[str, np.ndarray]:
    return {path.stem: read_label_mask(path) for path in sorted(Path(folder).glob("*.png"))}


def test_what_a_run_leaves(trained: Path) -> None:
    """Curves, scores, and one file with network and texts; no CLIP in it, and no tensor that is not ours."""
    rows = read_metrics(trained / "b-training" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7))
    for row in rows:
        assert row["loss"] == pytest.approx(row["segmentation"] + 0.4 * row["scores"], rel=1e-4)
    assert [row["step"] for row in rows if "validation" in row] == [3, 6]
    weights, about = read_weights(trained / "b.safetensors")
    segmenter = clipseed.load_segmenter(trained / "b.safetensors", device="cpu")
    assert weights.keys() == segmenter.network.module.state_dict().keys()
    clip = clipseed.FrozenClip.load(weights="toy", device="cpu")
    text = tokens_of(clip.encode_text(clipseed.load_vocabulary("toy")))
    torch.testing.assert_close(weights["text"], text)
    assert about["tower"]["sha256"] == clip.info.sha256
    assert about["network"] == {"backbone": "test_efficientnet", "text": "clip"}
    best = max((row["validation"]["score"], row["step"]) for row in rows if "validation" in row)
    assert read_weights(trained / "b-best.safetensors")[1]["score"] == best[0]


def test_a_stopped_run_ends_in_the_same_bits(here: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a step; the same command goes on, and refuses other options, other texts and other masks."""
    losses = TextSegmentation.losses

    def stopping(self: TextSegmentation, batch: Any, step: int) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return losses(self, batch, step)

    words = [*RUN, "--keep-every", "2", "-q"]
    words[words.index("b.safetensors")] = "again.safetensors"
    monkeypatch.setattr(TextSegmentation, "losses", stopping)
    assert main(words) == 130
    assert read_checkpoint(Path("again-training/checkpoint.safetensors")).step == 4
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert main(words) == 0
    assert Path("again.safetensors").read_bytes() == (trained / "b.safetensors").read_bytes()
    for other in (["--lr", "0.5"], ["--head", "fpn"], ["--text", "random"], ["--limit", "7"]):
        assert main([*words, *other]) == 1


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Under torchrun with gloo: one of them writes and talks."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "clipseed", *RUN]
    done = subprocess.run(
        line, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("b.safetensors: 6 steps") == 1
    assert len(read_metrics(tmp_path / "b-training" / "metrics.jsonl")) == 6
    assert (
        clipseed.load_segmenter(tmp_path / "b.safetensors", device="cpu").predict(image(0)).shape == image(0).size[::-1]
    )


def test_predictions_are_those_of_the_segmenter(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scales, mirror image and window; any folder of images; scores as CAMs."""
    segmenter = clipseed.load_segmenter("b.safetensors", device="cpu")
    for out, words, view in (
        ("whole", ["--scales", "1,0.75", "--flip"], ViewOptions((1.0, 0.75), flip=True)),
        ("window", ["--window", "96", "--window-stride", "64"], ViewOptions(window=96, window_stride=64)),
    ):
        assert main([*PREDICT, "--out", out, *words]) == 0
        for index, found in enumerate(masks(out).values()):
            np.testing.assert_array_equal(found, segmenter.predict(image(index), view))
    assert main([*PREDICT, "--out", "window", "--window", "96"]) == 1
    assert "made with other settings" in said(capsys)
    Path("photos").mkdir()
    for number, size in enumerate([(48, 64), (1, 1), (5, 300)]):
        photo(number, *size).save(f"photos/{number}.png")
    words = ["predict", "b.safetensors", "--images", "photos", "--out", "out", "--soft", "soft.h5", "--device", "cpu"]
    assert main([*words, "-q"]) == 0
    assert [mask.shape for mask in masks("out").values()] == [(48, 64), (1, 1), (5, 300)]
    for wrong in (["--window", "32", "--window-stride", "64"], ["--window-stride", "8"], ["--window", "64", "--paper"]):
        assert main([*words, *wrong]) == 2
    assert main([*words, "--labels", "own"]) == 2
    assert main(["train", "weclip", "--dataset", "toy", "--init", "b.safetensors", "--limit", "4", "-q"]) == 1


def test_heads_losses_and_sources(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every head learns; from label masks with scores, and from CAMs with soft labels."""
    toy = ["--dataset", "toy", "--split", "train", "--limit", "8", "--device", "cpu", "-q"]
    assert main(["cam", *toy, "--out", "cams.h5"]) == 0
    assert main(["threshold", "cams.h5", "--out", "pseudo", "--threshold", "0.4", "-q"]) in (0, 3)
    source = pickle.loads(pickle.dumps(CamMasks(Path("cams.h5"))))  # as worker processes get it
    assert {int(value) for value in np.unique(source.read(toy_id(0)))} <= {0, *(source.cams[toy_id(0)].classes + 1)}
    runs = [
        ("fpn", ["--masks", "pseudo", "--soft", "cams.h5", "--confidence", "0.5"], {"segmentation"}),
        ("lseg", ["--masks", "cams.h5", "--absent", "mask"], {"segmentation"}),
        ("denseclip", ["--masks", "cams.h5", "--loss", "soft-ce", "--absent", "keep"], {"segmentation", "scores"}),
        ("bridge", ["--masks", "cams.h5", "--loss", "ce", "--mask-text"], {"segmentation", "scores"}),
    ]
    for head, words, names in runs:
        out = f"{head}.safetensors"
        assert main([*TOY, "--head", head, *words, "--steps", "2", "--out", out, "-q"]) == 0
        about = read_weights(Path(out))[1]
        assert about["options"]["head"] == head
        rows = read_metrics(Path(f"{head}-training/metrics.jsonl"))
        assert rows[0].keys() & {"segmentation", "scores"} == names
        assert about["options"]["loss"] == {"fpn": "ce", "lseg": "collision"}.get(head, words[3])
        assert clipseed.load_segmenter(out, device="cpu").predict(image(0)).shape == image(0).size[::-1]
    capsys.readouterr()
    assert main([*TOY, "--masks", "pseudo", "--loss", "collision"]) == 2
    assert "--loss collision is for soft labels" in said(capsys)
    assert main([*TOY, "--masks", "cams.h5", "--soft", "cams.h5"]) == 2
    assert "--soft belongs to label masks" in said(capsys)
    # Other words than trained: the plain FPN has nothing to compare them with.
    save_devkit(here / "devkit", count=2)
    Path("two.txt").write_text("cup: mug\nstar\n")
    words = ["--images", "devkit/JPEGImages", "--classes", "two.txt", "--device", "cpu"]
    assert main(["predict", "fpn.safetensors", *words]) == 2
    assert "fpn.safetensors has a plain FPN head" in said(capsys)
    for head in ("lseg", "denseclip"):
        assert main(["predict", f"{head}.safetensors", *words, "--out", f"{head}-two", "-q"]) == 0
        for mask in masks(f"{head}-two").values():
            assert set(np.unique(mask)) <= {0, 1, 2}


def test_other_words(here: Path, tiny_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The scores by text, of words that CLIP reads now; the trained classes in another order give the same labels."""
    names = list(clipseed.load_vocabulary("toy").class_names)
    own = clipseed.load_segmenter("b.safetensors", device="cpu")
    assert clipseed.load_segmenter("b.safetensors", device="cpu", classes="toy").classes == own.classes
    vocabulary = clipseed.load_vocabulary("toy").as_dict()
    vocabulary["classes"].reverse()
    Path("reversed.json").write_text(json.dumps(vocabulary))
    segmenter = clipseed.load_segmenter("b.safetensors", device="cpu", classes="reversed.json")
    assert segmenter.classes == tuple(reversed(names))
    pixels = torch.rand(1, 3, 64, 96) * 255
    with torch.inference_mode():
        scores = own.network.module.eval()(pixels).scores
    order = [0, *range(len(names), 0, -1)]
    torch.testing.assert_close(segmenter.logits(pixels), scores[:, order], atol=1e-4, rtol=0)
    with pytest.raises(clipseed.ClipseedError, match="was trained on toy with SHA-256"):
        clipseed.load_segmenter("b.safetensors", device="cpu", classes="voc", weights=tiny_weights)
    assert main([*RUN, "--steps", "1", "--text", "random", "--out", "r.safetensors", "-q"]) == 0
    with pytest.raises(clipseed.ClipseedError, match="trained with random vectors in place of texts"):
        clipseed.load_segmenter("r.safetensors", device="cpu", classes="voc")
    np.save("text.npy", np.eye(11, 40, dtype=np.float32))
    assert main([*RUN, "--steps", "1", "--text", "text.npy", "--out", "f.safetensors", "-q"]) == 0
    with pytest.raises(clipseed.ClipseedError, match="name the CLIP they are of: --weights"):
        clipseed.load_segmenter("f.safetensors", device="cpu", classes="voc")
    with pytest.raises(
        clipseed.ClipseedError, match=r"text features have \d+ numbers, f.safetensors was trained on 40"
    ):
        clipseed.load_segmenter("f.safetensors", device="cpu", classes="voc", weights="toy")


def test_it_predicts_without_open_clip(here: Path) -> None:
    """In a process in which open_clip cannot be imported."""
    script = (
        "import sys; sys.modules['open_clip'] = None; from clipseed.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", script, *PREDICT, "--limit", "1"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    expected = clipseed.load_segmenter("b.safetensors", device="cpu").predict(image(0))
    np.testing.assert_array_equal(masks("predictions")[toy_id(0)], expected)


def test_one_class_from_a_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command as the documentation has it, without labels; unknown ids in masks, and images without masks."""
    save_devkit(here / "devkit", seed=5, count=4)
    Path("one").mkdir()
    for k in range(3):
        write_label_mask(Path("one") / f"{toy_id(k)}.png", (toy_mask(5, toy_id(k)) > 0).astype(np.uint8))
    Path("thing.txt").write_text("thing\n")
    words = ["train", "bridge", *SMALL, "--head", "bridge", "--images", "devkit/JPEGImages", "--masks", "one",
             "--classes", "thing.txt", "--weights", "toy", "--steps", "2", "--out", "one.safetensors"]  # fmt: skip
    assert main(words) == 0
    assert f"1 of 4 images have no mask ({toy_id(3)}" in said(capsys)
    assert set(np.unique(clipseed.load_segmenter("one.safetensors", device="cpu").predict(image(0)))) <= {0, 1}
    write_label_mask(Path("one") / f"{toy_id(1)}.png", np.full_like(toy_mask(5, toy_id(1)), 7))
    assert main([*words, "--overwrite"]) == 1
    assert f"the mask of {toy_id(1)}: holds the value 7, but this class list has 0 (background) to 1" in said(capsys)
    assert main([*words, "--overwrite", "--background", "none"]) == 1
    assert "no words for the background" in said(capsys)
    assert main(["cam", "--dataset", "toy", "--limit", "2", "--device", "cpu", "--out", "cams.h5", "-q"]) in (0, 3)
    assert main([*words, "--masks", "cams.h5"]) == 1
    assert "--masks cams.h5: CAMs of 10 classes that are not the 1 of thing" in said(capsys)


def test_bad_input(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"conv.weight": torch.zeros(1)}, "other.pth")
    np.save("text.npy", np.ones((3, 8), np.float32))
    cases = [
        ([*RUN, "--crop", "32"], 2, "--crop 32: give a multiple of 32 pixels, the backbone's coarsest stride, from 64"),
        ([*RUN, "--crop", "100"], 2, "--crop 100: give a multiple of 32 pixels"),
        ([*RUN, "--backbone", "test_vit"], 2, "--backbone test_vit: no maps of stride 4, 8, 32"),
        ([*RUN, "--backbone", "resnet1"], 2, "timm has no network of this name"),
        ([*RUN, "--backbone-weights", "other.pth"], 1, "give weights of test_efficientnet"),
        ([*RUN, "--backbone-weights", "gone.pth"], 1, "gone.pth: no such weights file"),
        ([*RUN, "--text", "text.npy"], 1, "--text text.npy: (3, 8), but 11 rows are needed"),
        ([*RUN, "--text", "gone.npy"], 1, "--text gone.npy: no such file"),
        ([*RUN, "--width", "30", "--heads", "4"], 2, "--width 30: give a multiple of --heads 4"),
        ([*RUN, "--head", "lseg", "--fpn-width", "0"], 2, "--fpn-width 0: only --head bridge goes without an FPN"),
        ([*RUN, "--masks", "nowhere"], 1, "--masks nowhere: no such folder"),
        ([*RUN, "--lr", "0"], 2, "--lr, --weight-decay, --score-weight: give ordinary positive numbers"),
        ([*RUN, "--scales", "2,1"], 2, "--scales: give two factors"),
        ([*RUN, "--out", "b.pt"], 2, "give the name of a .safetensors file"),
        (["export-model", "b.safetensors", "--onnx", "b.pt"], 2, "--onnx b.pt: give the name of an .onnx file"),
        (["export-model", "gone.safetensors", "--onnx", "b.onnx"], 1, "gone.safetensors"),
    ]  # fmt: skip
    for words, code, message in cases:
        assert main(words) == code, words
        assert message in said(capsys), words
    content = bytearray(Path("b.safetensors").read_bytes())
    content[-5] ^= 1
    Path("damaged.safetensors").write_bytes(content)
    with pytest.raises(clipseed.ClipseedError, match="its checksum does not fit"):
        clipseed.load_segmenter("damaged.safetensors", device="cpu")


def test_without_the_packages_for_onnx(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from clipseed.train import onnx_file

    monkeypatch.setattr(onnx_file, "_PACKAGES", ("onnx", "no_such_package"))
    assert main(["export-model", "b.safetensors", "--onnx", "b.onnx"]) == 2
    assert "need no_such_package, not installed here: pip install 'clipseed[onnx]'" in said(capsys)


@pytest.mark.slow
def test_onnx_is_the_segmenter(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other sizes and batches than it was exported with; classes and pixels in the metadata; 8-bit weights."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    line = ["export-model", "b.safetensors", "--onnx", "b.onnx", "--int8", "small.onnx", "--json"]
    assert main(line) == 0
    told = json.loads(capsys.readouterr().out)
    segmenter = clipseed.load_segmenter("b.safetensors", device="cpu")
    sessions = {
        name: onnxruntime.InferenceSession(name, providers=["CPUExecutionProvider"])
        for name in ("b.onnx", "small.onnx")
    }
    kept = sessions["b.onnx"].get_modelmeta().custom_metadata_map["clipseed"]
    assert json.loads(kept) == told["metadata"]
    assert told["metadata"]["classes"] == ["background", *segmenter.classes]
    for shape in ((1, 3, 64, 160), (3, 3, 128, 96)):
        pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 255
        logits, labels = sessions["b.onnx"].run(None, {"images": pixels.numpy()})
        expected = segmenter.logits(pixels)
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)
        wide = torch.nn.functional.interpolate(expected, size=shape[2:], mode="bilinear", align_corners=False)
        assert (wide.argmax(dim=1).numpy() == labels).mean() >= 0.999
        (small,) = sessions["small.onnx"].run(["labels"], {"images": pixels.numpy()})
        assert (small == labels).mean() > 0.9
    assert Path("small.onnx").stat().st_size < Path("b.onnx").stat().st_size
    # The lines of docs/bridge.md, which import neither torch nor clipseed.
    page = (Path(__file__).parents[2] / "docs" / "bridge.md").read_text(encoding="utf-8")
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "onnxruntime" in block]
    Path("b.onnx").rename("bridge.onnx")
    image(0).save("photo.jpg")
    there: dict[str, Any] = {}
    exec(lines, there)
    expected = segmenter.predict("photo.jpg")
    assert (np.asarray(there["mask"]) == expected).mean() > 0.97  # labels are enlarged here, logits there


def test_options_are_told_apart(tmp_path: Path) -> None:
    """Options of the job have the command's defaults."""
    from clipseed.data.dataset import DatasetOptions

    options = TrainBridgeOptions(data=DatasetOptions("toy"), out=tmp_path / "b.safetensors", backbone="x", masks="toy")
    assert (options.steps, options.batch, options.text) == (None, None, "clip")  # as published for the class list
