"""Ranking templates and words by sharpness: against plain loops, by hand, and through the command."""

from __future__ import annotations

import csv
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from clipseed.cli.main import main
from clipseed.clip import FrozenClip
from clipseed.clip.sharpness import image_sharpness, sharpness
from clipseed.clip.text import TextBank, present_mask
from clipseed.data.dataset import DatasetOptions, open_dataset
from clipseed.data.images import patch_grid, resize_to_grid
from clipseed.data.templates import load_templates
from clipseed.data.types import Sample
from clipseed.data.vocabulary import ClassText, Vocabulary, load_vocabulary
from clipseed.errors import InputError
from clipseed.jobs.prompts import word_choices
from clipseed.runtime import features as runtime
from clipseed.runtime import images as engine
from clipseed.store.features import FeatureSet

from helpers.images import photo


def loop_sharpness(scores: list[list[float]], labels: list[tuple[int, ...]]) -> float:
    """Eq. 9 as it stands in the paper, in Python floats, divided by the number of images."""
    total = 0.0
    for row, present in zip(scores, labels, strict=True):
        shown = [row[k] for k in present]
        mean = sum(shown) / len(shown)
        total += sum((s - mean) ** 2 for s in shown) / len(shown) / mean
    return total / len(labels)


def loop_scores(feature: np.ndarray, classes: np.ndarray, scale: float) -> list[float]:
    """Zero-shot probabilities of one image."""
    length = math.sqrt(sum(float(x) ** 2 for x in feature))
    logits = [scale * sum(float(x) * float(t) for x, t in zip(feature, row, strict=True)) / length for row in classes]
    largest = max(logits)
    weights = [math.exp(value - largest) for value in logits]
    return [value / sum(weights) for value in weights]


def test_by_hand() -> None:
    """(0.6, 0.2): mean 0.4, variance 0.04, 0.1. (0.5, 0.5): 0. Together 0.05; present 0.8 and 1."""
    probability = torch.tensor([[0.6, 0.2, 0.2], [0.5, 0.0, 0.5]])
    present = present_mask([(0, 1), (2, 0)], 3)
    torch.testing.assert_close(image_sharpness(probability.log(), present), torch.tensor([0.1, 0.0]))
    found = sharpness(probability.log(), present)
    assert found.value == pytest.approx(0.05)
    assert found.present == pytest.approx(0.9)
    assert found.images == 2


def test_against_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    features, classes = rng.normal(size=(50, 16)), rng.normal(size=(7, 16))
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    labels = [tuple(rng.permutation(7)[: rng.integers(2, 8)].tolist()) for _ in range(50)]
    words = torch.from_numpy(classes).float()
    ours = TextBank(words, words[:0], 20.0).log_probabilities(torch.from_numpy(features))
    scores = [loop_scores(row, classes, 20.0) for row in features]
    np.testing.assert_allclose(ours.exp().numpy(), scores, rtol=2e-5, atol=1e-7)
    assert sharpness(ours, present_mask(labels, 7)).value == pytest.approx(loop_sharpness(scores, labels), rel=2e-5)


def test_scores_that_underflow() -> None:
    """Present classes without any score are 0, not 0/0; one that takes all of it is (k - 1) / k."""
    rows = torch.tensor([[-300.0, -301.0, 0.0], [0.0, -400.0, -500.0], [0.0, -400.0, -500.0]])
    terms = image_sharpness(rows, present_mask([(0, 1), (0, 1), (0, 1, 2)], 3))
    torch.testing.assert_close(terms, torch.tensor([0.0, 1 / 2, 2 / 3]))


def test_images_it_cannot_use() -> None:
    rows = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="at least two"):
        image_sharpness(rows, present_mask([(1,)], 3))
    with pytest.raises(ValueError, match="at least one image"):
        sharpness(rows[:0], present_mask([], 3))


def test_templates_of_the_package() -> None:
    found = load_templates()
    assert 25 <= len(found) <= 40
    assert found[:2] == ("a clean origami {}.", "a rendering of a weird {}.")
    assert all(template.format("cat").count("cat") == 1 for template in found)


def test_templates_of_a_file(tmp_path: Path) -> None:
    lines = tmp_path / "mine.txt"
    lines.write_text("# mine\n\n a scan of a {}.\n{}, seen from above\n")
    assert load_templates(lines) == ("a scan of a {}.", "{}, seen from above")
    listed = tmp_path / "mine.yaml"
    listed.write_text('- a scan of a {}.\n- "{}, seen from above"\n')
    assert load_templates(listed) == load_templates(lines)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "a {}\na photo\n", "a.txt: line 2: the template 'a photo' must contain exactly one {}"),
        ("a.txt", "a {} and a {}\n", "line 1: .* exactly one {}"),
        ("a.txt", "a {x} {}\n", "line 1: .* no other brace"),
        ("a.txt", "a {}\n\na {}\n", "line 3: the template 'a {}' is already on line 1"),
        ("a.txt", "# nothing\n", "a.txt: no templates here"),
        ("a.yaml", "- a {}\n- a photo\n", "a.yaml: line 2: the template 'a photo' must contain"),
        ("a.yaml", "- a {}\n- {}\n", "a.yaml: line 2: a template must be a text"),
        ("a.yaml", "- a {}\n- 3\n", "line 2: a template must be a text"),
        ("a.yaml", "templates:\n- a {}\n", "line 1: templates are a list"),
        ("a.yaml", "- a {}\n- [\n", "a.yaml: line 3: not valid YAML"),
        ("a.yaml", "", "a.yaml: no templates here"),
    ],
)
def test_bad_templates(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_templates(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_templates(tmp_path / "none.txt")


def test_words_to_choose_from() -> None:
    bird = ClassText("bird", "bird avian", ("fowl", "bird"))
    assert list(word_choices(bird)) == [
        ("name", "bird"), ("text", "bird avian"), ("synonym", "fowl"), ("fused", "bird avian,fowl,bird"),
    ]  # fmt: skip
    assert list(word_choices(ClassText("cup", "", ("mug",)))) == [
        ("name", "cup"),
        ("synonym", "mug"),
        ("fused", "cup,mug"),
    ]


LIMIT = 40


def toy_scores(vocabulary: Vocabulary, samples: list[Sample], reader: Any) -> list[list[float]]:
    """Zero-shot probabilities one image at a time."""
    clip = FrozenClip.load(weights="toy", device="cpu")
    text = clip.encode_text(vocabulary)
    rows = []
    for sample in samples:
        image = reader(sample)
        grid = patch_grid(image.height, image.width, 16)
        pixels = torch.from_numpy(resize_to_grid(image, grid, 16).copy()).permute(2, 0, 1)[None]
        rows.append(loop_scores(clip.encode_image(pixels)[0].numpy(), text.classes.numpy(), text.logit_scale))
    return rows


@pytest.mark.slow
def test_the_command_on_the_toy_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, encode = [], runtime.image_features
    monkeypatch.setattr(
        runtime, "image_features", lambda clip, pixels: (seen.append(len(pixels)), encode(clip, pixels))[1]
    )
    words = ["prompts", "--dataset", "toy", "--limit", str(LIMIT), "--synonyms", "--device", "cpu"]
    assert main([*words, "--csv", str(tmp_path / "p.csv"), "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    data = json.loads(captured.out)
    image_set = open_dataset(DatasetOptions("toy", limit=LIMIT))
    several = [sample for sample in image_set.samples if len(sample.labels or ()) > 1]
    assert data["images"] == len(several) == sum(seen)  # every image goes through the encoder once
    assert data["total"] == LIMIT

    ranked = data["templates"]
    assert [row["words"] for row in sorted(ranked, key=lambda row: row["sharpness"])] == [
        row["words"] for row in ranked
    ]
    assert [row["rank"] for row in ranked] == list(range(1, len(load_templates()) + 1))
    assert {row["words"] for row in ranked} == set(load_templates())
    labels = [sample.labels or () for sample in several]
    toy = load_vocabulary("toy")
    for template in ("a photo of a {}.", "a black and white photo of a {}."):
        scores = toy_scores(replace(toy, templates=(template,)), several, image_set.reader)
        (row,) = [row for row in ranked if row["words"] == template]
        assert row["sharpness"] == pytest.approx(loop_sharpness(scores, labels), rel=1e-4)
        mass = np.mean([sum(row[k] for k in present) for row, present in zip(scores, labels, strict=True)])
        assert row["present"] == pytest.approx(mass, rel=1e-4)

    boats = [sample for sample in several if 0 in (sample.labels or ())]
    ship = (ClassText("boat", "ship"), *toy.classes[1:])
    scores = toy_scores(replace(toy, classes=ship), boats, image_set.reader)
    (row,) = [row for row in data["classes"] if (row["class_name"], row["words"]) == ("boat", "ship")]
    assert (row["kind"], row["images"]) == ("synonym", len(boats))
    assert row["sharpness"] == pytest.approx(loop_sharpness(scores, [b.labels or () for b in boats]), rel=1e-4)
    assert {row["class_name"] for row in data["classes"]} == {"boat", "bottle", "car", "cup", "house", "mushroom"}
    assert [row["kind"] for row in data["classes"]].count("fused") == 6

    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["words"] for row in rows] == [row["words"] for row in (*ranked, *data["classes"])]
    assert float(rows[0]["sharpness"]) == pytest.approx(ranked[0]["sharpness"])


@pytest.fixture
def photos(tmp_path: Path, tiny_weights: Path) -> list[str]:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        photo(number, 48, 64).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "classes.txt").write_text("rust\ncrack: thin crack, fissure\nstain: stain, spot\n")
    (tmp_path / "labels.csv").write_text("0,rust\n0,crack\n1,rust;crack\n2,rust\n")
    return ["prompts", "--dataset", "folder", "--images", str(tmp_path / "photos"), "--labels",
            str(tmp_path / "labels.csv"), "--classes", str(tmp_path / "classes.txt"), "--weights", str(tiny_weights),
            "--device", "cpu"]  # fmt: skip


def test_tables_and_own_templates(photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("{}.\na scan of a {}.\n")
    assert main([*photos, "--templates", str(tmp_path / "t.txt"), "--synonyms"]) == 0
    captured = capsys.readouterr()
    lines = [line.split() for line in captured.out.splitlines()]
    assert lines[0] == ["template", "rank", "sharpness", "present", "images"]
    assert {lines[2][-4], lines[3][-4]} == {"1", "2"}
    assert {lines[2][-1], lines[3][-1]} == {"2"}
    assert "2 of 3 images show two classes or more" in captured.err
    rows = {line.split("  ")[0]: line.split() for line in captured.out.splitlines()[5:]}
    assert rows["crack: thin crack,fissure"][-1] == "2"
    assert rows["stain: spot"][-4:] == ["-", "-", "-", "0"]  # no image shows a stain


def test_unreadable_images_are_code_3(photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos" / "0.png").write_bytes(b"")
    assert main([*photos, "--json"]) == 3
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["images"], found["computed"], found["templates"][0]["images"]) == (2, 1, 1)
    assert "1 image skipped: 0 (" in captured.err
    (tmp_path / "photos" / "1.png").write_bytes(b"")
    assert main(photos) == 1
    assert "none of the 2 images could be used; the first, 0:" in capsys.readouterr().err


def test_what_it_refuses(photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*photos, "--template", "a {}"]) == 2
    assert "--template: is for --synonyms" in capsys.readouterr().err
    assert main([*photos, "--templates", str(tmp_path / "labels.csv")]) == 1
    assert "labels.csv: line 1: the template '0,rust' must contain exactly one {}" in capsys.readouterr().err
    (tmp_path / "labels.csv").write_text("0,rust\n1,crack\n")
    assert main(photos) == 1
    captured = capsys.readouterr()
    assert "none of its 3 images shows two classes or more" in captured.err
    assert captured.out == ""


TOY = ["prompts", "--dataset", "toy", "--limit", "20", "--device", "cpu", "--max-side", "96"]


def forbid_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("an image was encoded again")

    monkeypatch.setattr(runtime, "image_features", refuse)


def test_features_in_shards_and_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any cut gives the file of one run to the byte, and the ranking without a file; the last shard ranks."""
    monkeypatch.setitem(engine._UNIT_SIZE, "cpu", 3)
    monkeypatch.chdir(tmp_path)
    assert main([*TOY, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert (plain["out"], plain["found"], plain["computed"]) == (None, 0, plain["images"])
    for count in (1, 2, 3):
        for k in reversed(range(1, count + 1)):
            assert main([*TOY, "--features", f"{count}.h5", "--shard", f"{k}/{count}", "--json"]) == 0
            captured = capsys.readouterr()
            ranked = json.loads(captured.out)
            assert (ranked["templates"] is None) == (k > 1)
            assert ("nothing is ranked yet" in captured.err) == (k > 1)
            assert ranked["open_shards"] == k - 1
        assert ranked["templates"] == plain["templates"]
        assert Path(f"{count}.h5").read_bytes() == Path("1.h5").read_bytes()

    for k in (1, 2):  # on two disks
        Path(f"disk-{k}").mkdir()
        assert main([*TOY, "--features", f"disk-{k}/f.h5", "--shard", f"{k}/2"]) == 0
    assert main(["merge", "disk-1/f.h5", "disk-2/f.h5", "--out", "merged.h5"]) == 0
    with FeatureSet(Path("merged.h5"), verify=True) as merged, FeatureSet(Path("1.h5")) as whole:
        assert set(merged) == set(whole)
        assert all(np.array_equal(merged[key].values, whole[key].values) for key in whole)
        assert all(merged[key].size == whole[key].size and merged[key].grid == whole[key].grid for key in whole)
    capsys.readouterr()
    forbid_encoding(monkeypatch)
    assert main([*TOY, "--features", "merged.h5", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["templates"] == plain["templates"]
    assert (again["found"], again["computed"], again["out"]) == (plain["images"], 0, "merged.h5")


def test_features_rank_other_words_without_images(
    photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [*photos, "--features", str(tmp_path / "f")]
    assert main(kept) == 0
    (tmp_path / "t.txt").write_text("a scan of a {}.\n")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        forbid_encoding(patch)
        assert main([*kept, "--templates", str(tmp_path / "t.txt"), "--synonyms", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["words"] for row in found["templates"]] == ["a scan of a {}."]
    assert found["classes"]
    assert main([*photos, "--templates", str(tmp_path / "t.txt"), "--synonyms", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["templates"] == found["templates"]

    photo(7, 48, 64).save(tmp_path / "photos" / "0.png")  # replaced
    with (tmp_path / "labels.csv").open("a") as labels:
        labels.write("2,crack\n")  # now one of them
    assert main([*kept, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["computed"] == 3  # units go as a whole
    assert "1 image was replaced (0)" in captured.err
    with FeatureSet(tmp_path / "f") as stored:
        assert set(stored) == {"0", "1", "2"}
        for key in stored:
            assert np.linalg.norm(stored[key].values) == pytest.approx(1, abs=1e-5)
            assert stored[key].size == (48, 64)


def test_features_files_that_do_not_fit(photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "f.h5"
    assert main([*photos, "--features", str(path)]) == 0
    for words, code, message in (
        ([*photos, "--features", str(path), "--max-side", "32"], 1, "--max-side 640 then, 32 now"),
        ([*photos, "--features", str(path), "--max-side", "32"], 1, "choose another --features, or"),
        ([*photos, "--features", str(tmp_path / "photos")], 2, "a folder that holds other things; choose a new one"),
        ([*photos, "--shard", "1/2"], 2, "shards add up in a file; give --features FILE.h5"),
        ([*photos, "--overwrite"], 2, "--overwrite: belongs to --features"),
        (["refine", "caa", str(path)], 1, "a clipseed-features file, but not a clipseed CAM file"),
        (["inspect", str(path), "--preview", str(tmp_path / "x.png")], 2, "features are nothing to look at"),
    ):
        capsys.readouterr()
        assert main(words) == code
        assert message in capsys.readouterr().err
    assert main([*photos, "--features", str(path), "--max-side", "32", "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(path), "--verify"]) == 0
    text = capsys.readouterr().out
    assert "max_side 32" in text
    assert "images           2\n" in text
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["length"]) == (2, found["manifest"]["model"]["embed_dim"])
    with h5py.File(path, "r+") as file:
        file["feature"][0] = 9
    assert main([*photos, "--features", str(path)]) == 1
    assert "delete it, or start again with --overwrite" in capsys.readouterr().err


def test_an_interruption_says_what_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine._UNIT_SIZE, "cpu", 3)
    encode, calls = runtime.image_features, []

    def stop(clip: FrozenClip, pixels: torch.Tensor) -> Any:
        calls.append(len(pixels))
        if sum(calls) > 6:
            raise KeyboardInterrupt
        return encode(clip, pixels)

    path = tmp_path / "f.h5"
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "image_features", stop)
        assert main([*TOY, "--features", str(path)]) == 130
    told = capsys.readouterr().err
    assert f"interrupted; 6 of 16 images are safe in {path}.parts. Run the same command again to go on" in told
    assert main([*TOY, "--features", str(path)]) == 0
    assert "10 images to do, 6 done already" in capsys.readouterr().err
    assert main([*TOY, "--features", str(tmp_path / "once.h5")]) == 0
    assert path.read_bytes() == (tmp_path / "once.h5").read_bytes()
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "image_features", stop)
        assert main(TOY) == 130
    assert "interrupted; nothing was kept" in capsys.readouterr().err


def test_seconds_are_those_of_computing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading is apart, whether images are encoded or only texts; and it is done once."""
    load, loaded = FrozenClip.load, []

    def slowly(*words: Any, **options: Any) -> FrozenClip:
        time.sleep(3)
        loaded.append(words)
        return load(*words, **options)

    monkeypatch.setattr(FrozenClip, "load", slowly)
    words = [
        *TOY,
        "--limit",
        "3",
        "--quiet",
        "--features",
        str(tmp_path / "f.h5"),
        "--report",
        str(tmp_path / "r.json"),
    ]
    for times, computed in ((1, True), (2, False)):
        assert main(words) == 0
        report = json.loads((tmp_path / "r.json").read_text())
        assert len(loaded) == times
        assert report["loading_seconds"] >= 3
        assert report["seconds"] < 3
        assert (report["computed"] > 0) == computed
