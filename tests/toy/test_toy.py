"""The toy world is what docs/toy.md says, and its tiny CLIP does what a CLIP should (held-out scenes only)."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipseed.cli.main import main
from clipseed.clip.model import toy_weights_path
from clipseed.data.toy.dataset import HELD_OUT_COUNT
from clipseed.data.toy.shapes import SHAPES
from clipseed.data.toy.textures import MATERIALS, PATTERNS
from clipseed.data.toy.world import WorldOptions, lay_out
from clipseed.errors import InputError
from clipseed.store.cams import open_cams
from tools.toy.captions import CONCEPTS, Captioner, Description, concept_targets, hue_name

SCENES = 100


def test_scenes_depend_on_seed_and_index_alone() -> None:
    first, again = lay_out(3, 5), lay_out(3, 5)
    np.testing.assert_array_equal(first.image(), again.image())
    np.testing.assert_array_equal(first.image(), first.image())
    np.testing.assert_array_equal(first.mask(), again.mask())
    assert not np.array_equal(lay_out(3, 6).mask(), first.mask())
    assert not np.array_equal(lay_out(4, 5).mask(), first.mask())


def test_the_pixels_have_not_changed() -> None:
    """Scores in the documentation stand on these images; a changed world needs new weights and new numbers."""
    sums = [int(lay_out(0, index).image().astype(np.int64).sum()) for index in range(4)]
    areas = [int((lay_out(0, index).mask() > 0).sum()) for index in range(4)]
    assert [lay_out(0, index).labels for index in range(4)] == EXPECTED_LABELS
    assert areas == EXPECTED_AREAS
    assert sums == pytest.approx(EXPECTED_SUMS, rel=1e-5)  # rounding of sine and square root may differ by platform


EXPECTED_LABELS = [(8,), (1, 4, 7, 8), (0, 1, 3), (5, 6)]
EXPECTED_AREAS = [8382, 23392, 14279, 15629]
EXPECTED_SUMS = [12411623, 20476741, 11296557, 20831609]


def test_ground_truth_is_exact() -> None:
    for index in range(30):
        scene = lay_out(0, index)
        mask = scene.mask()
        assert mask.shape == scene.size == scene.image().shape[:2]
        assert set(np.unique(mask)) - {0} == {label + 1 for label in scene.labels}
        for item in scene.objects:
            assert item.visible.sum() > 150
            assert (mask[item.visible] == item.class_id + 1).all()
            assert item.visible_part.sum() <= item.visible.sum()


def test_the_world_is_varied() -> None:
    scenes = [lay_out(0, index) for index in range(HELD_OUT_COUNT)]
    sizes = {scene.size for scene in scenes}
    assert len(sizes) > 250
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4}
    assert {label for scene in scenes for label in scene.labels} == set(range(10))
    assert {name for scene in scenes for name in scene.materials} == set(MATERIALS)
    covered = np.mean([(scene.mask() > 0).mean() for scene in scenes])
    assert 0.2 < covered < 0.45
    parts = [item.visible_part.sum() / item.visible.sum() for scene in scenes for item in scene.objects]
    assert 0.15 < np.mean(parts) < 0.4  # a classifier sees a part, the segmentation asks for the body


def test_the_body_is_plain_and_the_part_is_not() -> None:
    """Body and part share the hue; only the part is patterned."""
    for index in range(20):
        scene = lay_out(0, index, WorldOptions(max_objects=1))
        image = scene.image().astype(float)
        (item,) = scene.objects
        part = item.visible_part
        body = item.visible & ~part
        assert image[part].std(axis=0).max() > 2 * image[body].std(axis=0).max()


def test_classes_have_their_own_look() -> None:
    assert len({shape.name for shape in SHAPES}) == len(SHAPES) == 10
    assert {shape.pattern for shape in SHAPES} == set(PATTERNS)
    assert {shape.habitat for shape in SHAPES} <= set(MATERIALS)


def test_captions_say_what_and_never_where() -> None:
    scene = Description(((0, 0.0), (7, 0.64)), ("water",))
    captioner = Captioner(np.random.default_rng(0))
    texts = [captioner.caption(scene) for _ in range(60)]
    assert len(set(texts)) > 20
    for text in texts:
        assert "boat" in text or "ship" in text
        assert "kite" in text
    assert any("red boat" in text and "blue kite" in text and "water" in text for text in texts)
    assert len(captioner.prompts()) == len(CONCEPTS) == 18
    targets = concept_targets([scene])
    assert [CONCEPTS[k] for k in np.flatnonzero(targets[0])] == ["boat", "kite", "water"]
    assert [hue_name(hue) for hue in (0.99, 0.33, 0.66)] == ["red", "green", "blue"]


def test_shipped_weights_are_small() -> None:
    assert toy_weights_path().stat().st_size <= 12_000_000


def test_training_looks_through_the_model_itself() -> None:
    import torch

    from tools.toy import train_clip
    from tools.toy.objective import attention_loss, kinship, look

    model = train_clip.build()
    pixels = torch.randn(2, 3, 176, 176, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens, values, attention = look(model, pixels)
        visual = model.visual
        expected = visual.ln_post(visual.transformer(visual._embeds(pixels)))
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
    assert values.shape == (2, 121, 192)
    assert all(torch.allclose(maps.sum(dim=-1), torch.ones(2, 122), atol=1e-5) for maps in attention)
    # Two fields of different hue: kin are within a field, and attention that says so costs nothing.
    colours = torch.zeros(1, 3, 4, 6)
    colours[:, 0, :, :3], colours[:, 2, :, 3:] = 0.8, 0.8
    kin = kinship(colours)[0]
    left = torch.arange(24) % 6 < 3
    assert kin[left][:, left].sum(dim=-1).min() > 0.999
    told = torch.zeros(1, 25, 25)
    told[0, 1:, 1:] = kin
    assert abs(float(attention_loss([told], colours))) < 1e-4
    assert float(attention_loss([torch.full((1, 25, 25), 1 / 25)], colours)) > 0.5


@pytest.mark.slow
def test_the_loop_teaches_it(tmp_path: Path) -> None:
    """One leg of few images, seen again and again: the loss falls, and attention stays a similarity."""
    from clipseed.train.checkpoint import read_checkpoint
    from clipseed.train.loop import CHECKPOINT, METRICS
    from clipseed.train.metrics import read_metrics
    from tools.toy import train_clip

    stage = replace(train_clip.STAGES[0], images=16, epochs=10, rate=2e-2)  # the warm-up takes it to 2e-3
    learner = train_clip.Learner(train_clip.build())
    train_clip.train_stage(learner, stage, train_clip.FIRST_SEED, tmp_path, batch=8)
    rows = read_metrics(tmp_path / METRICS)
    assert [row["step"] for row in rows] == list(range(1, 21))
    for name in ("loss", "label token", "label mean"):
        assert np.mean([row[name] for row in rows[-4:]]) < 0.8 * np.mean([row[name] for row in rows[:4]]), name
    state = read_checkpoint(tmp_path / CHECKPOINT).weights
    for block in range(8):  # queries and keys stay equal
        query, key, _ = state[f"model.visual.transformer.resblocks.{block}.attn.in_proj_weight"].chunk(3)
        np.testing.assert_allclose(query, key, atol=1e-6)
    assert 20 < int(state["used"].sum()) < 200  # the words of captions, of 49,408
    assert not (tmp_path / "pool.npy").exists()


@pytest.mark.slow
def test_training_resumes_and_its_weights_load(tmp_path: Path) -> None:
    import torch

    from clipseed.clip.model import FrozenClip
    from clipseed.train.checkpoint import read_checkpoint
    from clipseed.train.loop import CHECKPOINT
    from tools.toy import train_clip

    train_clip.main(["--out", str(tmp_path), "--scale", "0.002"])
    first = (tmp_path / "clip.npz").read_bytes()
    train_clip.main(["--out", str(tmp_path), "--scale", "0.002"])  # everything is there: only the export runs
    assert (tmp_path / "clip.npz").read_bytes() == first
    clip = FrozenClip.load(weights=str(tmp_path / "clip.npz"), device="cpu")
    state = read_checkpoint(tmp_path / train_clip.STAGES[-1].name / CHECKPOINT).weights
    torch.testing.assert_close(clip.tower.projection, state["model.visual.proj"].half().float())
    assert not list(tmp_path.rglob("pool*"))


@pytest.mark.slow
def test_the_tiny_clip_keeps_its_promises() -> None:
    """Zero-shot top-1, peaks, no class empty or inverted, mIoU, attention that follows objects."""
    from clipseed.clip.model import FrozenClip
    from tools.toy.measure import CAA_BLOCKS, measure

    found = measure(FrozenClip.load(weights="toy", device="cpu"), SCENES)  # make toy-report: all of them
    assert found.scenes == SCENES
    assert found.top1 >= 0.95
    assert found.top1_patch_mean >= 0.95
    assert found.peak_on_object >= 0.90
    assert found.miou >= 0.35
    assert all(iou > 0.15 for iou in found.class_iou.values()), found.class_iou
    assert all(hits > 0.6 for hits in found.class_peaks.values()), found.class_peaks
    assert all(value > 0.1 for value in found.contrast.values()), found.contrast
    assert sum(found.empty_maps.values()) <= 3, found.empty_maps
    assert max(found.empty_maps.values()) <= 2, found.empty_maps
    assert len(found.attention_within) >= CAA_BLOCKS
    within, across = (np.mean(x[-CAA_BLOCKS:]) for x in (found.attention_within, found.attention_across))
    assert within > 1.3 * across


@pytest.mark.slow
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--scenes", "16", "--json", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    data = json.loads(shown.out)
    assert [stage["name"] for stage in data["stages"]] == ["gradcam", "cam", "caa", "crf", "sam-seed"]
    scores = [stage["miou"] for stage in data["stages"]]
    assert scores == sorted(scores)  # every step is worth something
    assert scores[0] > 0.05
    assert scores[2] > scores[1] + 0.08
    assert scores[3] > 0.6
    assert scores[4] > scores[3] + 0.03  # segments know where things end
    assert [stage["images"] for stage in data["stages"]] == [16] * 5
    assert len(open_cams("demo/cams.h5")) == 16
    assert shown.err.startswith("5 stages on 16 scenes of the built-in world, about ")
    assert data["previews"] == ["demo/pseudo-labels.png", "demo/maps.png"]
    for preview in data["previews"]:
        assert f"{preview}: " in shown.err
        with Image.open(preview) as sheet:
            assert sheet.height > 5 * 200
    # The commands that it ends with work as they are printed.
    printed = [line.strip() for line in shown.err[shown.err.index("Try next:") :].splitlines()[1:]]
    assert [line.split("#")[0].split(" -m ")[-1].split()[1] for line in printed] == ["report", "inspect", "demo"]
    for line in printed:
        words = shlex.split(line, comments=True)
        words = words[words.index("clipseed") + 1 :] if "clipseed" in words else words[1:]
        assert main(words) == 0
    told = capsys.readouterr().err
    assert "warning" not in told
    assert "demo/devkit: 300 images as a VOC devkit" in told
    assert Path("demo/report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_the_demo_tells_every_score_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later stage that fails takes no score away; another demo replaces what an earlier one made."""
    from clipseed.jobs import demo

    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--scenes", "4", "--device", "cpu"]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0].startswith("toy world, 4 images")
    assert [line.split()[0] for line in text[2:]] == ["1/5", "2/5", "3/5", "4/5", "5/5"]

    def fail(*_: object, **__: object) -> None:
        raise InputError("no segments today")

    monkeypatch.setattr(demo, "run_sam_masks", fail)
    assert main(["demo", "--out", str(out), "--scenes", "4", "--device", "cpu"]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["1/5", "2/5", "3/5", "4/5"]


def test_demo_takes_as_many_scenes_as_are_scored(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--scenes", "301"]) == 2
    assert "--scenes 301: the demo scores up to 300; --save-dataset writes any number" in capsys.readouterr().err


def test_maps_are_shown_in_the_colours_of_their_classes() -> None:
    from clipseed.report.overlay import label_overlay, maps_overlay

    image = np.full((2, 3, 3), 100, np.uint8)
    maps = np.zeros((2, 2, 3), np.float32)
    maps[0, 0, 0], maps[1, 0, 0], maps[1, 1, 2], maps[1, 0, 1] = 1.0, 0.5, 1.0, 0.4
    shown = maps_overlay(image, maps, np.array([3, 7], np.int32), strength=0.6)
    labels = np.array([[4, 0, 0], [0, 0, 8]], np.uint8)
    whole = label_overlay(image, labels, strength=0.6)
    np.testing.assert_array_equal(shown[labels > 0], whole[labels > 0])
    np.testing.assert_array_equal(shown[1, :2], image[1, :2])
    part = label_overlay(image, np.full((2, 3), 8, np.uint8), strength=0.6 * 0.4)
    np.testing.assert_array_equal(shown[0, 1], part[0, 1])
    np.testing.assert_array_equal(maps_overlay(image, maps[:0], np.zeros(0, np.int32)), image)


@pytest.mark.slow
def test_the_saved_devkit_gives_the_same_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``demo --save-dataset`` then the three VOC commands, on the same scenes as the built-in set."""
    root = tmp_path / "toy"
    assert main(["demo", "--save-dataset", str(root), "--limit", "12"]) == 0
    capsys.readouterr()
    common = ["--device", "cpu", "--quiet"]
    voc = ["cam", "--dataset", "voc", "--root", str(root), "--classes", "toy", "--weights", "toy"]
    assert main([*voc, *common, "--out", str(tmp_path / "voc.h5")]) == 0
    assert main(["cam", "--dataset", "toy", "--limit", "12", *common, "--out", str(tmp_path / "toy.h5")]) == 0
    scores = []
    for words in (["voc.h5", "--gt", "SegmentationClass"], ["toy.h5", "--gt", "toy"], ["toy.h5"]):
        assert main(["evaluate", str(tmp_path / words[0]), *words[1:], "--json", "--quiet"]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert [data["images"] for data in scores] == [12, 12, 12]
    assert scores[0]["miou"] == pytest.approx(scores[1]["miou"], abs=2e-3)  # labels come in another order there
    assert scores[1] == scores[2]
