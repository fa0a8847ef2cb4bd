"""Scores against independent implementations, and every mismatch between predictions and ground truth."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from clipseed.cli.main import main
from clipseed.data.vocabulary import load_vocabulary
from clipseed.errors import InputError, UsageError
from clipseed.evaluate.confusion import confusion, score
from clipseed.evaluate.sweep import DEFAULT_THRESHOLDS, PowerSweep, ThresholdSweep
from clipseed.formats.palette import voc_palette
from clipseed.jobs.evaluate import EvaluateOptions, evaluate
from clipseed.store.cam_records import Cam
from clipseed.store.cam_writer import CamWriter
from clipseed.store.label_masks import read_label_mask, write_label_mask
from clipseed.store.stages import newest_output
from clipseed.store.units import Unit

from helpers.records import make_cam, small_manifest, write_cache, write_seeds

VOC = load_vocabulary("voc")
NAMES = ("background", *VOC.class_names)


def plain_scores(pairs: list[tuple[np.ndarray, np.ndarray]], classes: int) -> dict[str, Any]:
    """The metric written down class by class, with no confusion matrix."""
    iou: list[float | None] = []
    occurs = []
    right = total = 0
    for label in range(classes):
        inter = union = there = 0
        for truth, prediction in pairs:
            scored = truth != 255
            inter += int(((truth == label) & (prediction == label) & scored).sum())
            union += int((((truth == label) | (prediction == label)) & scored).sum())
            there += int((truth == label).sum())
        iou.append(inter / union if union else None)
        occurs.append(there > 0)
        right += inter
    for truth, _ in pairs:
        total += int((truth != 255).sum())
    here = [value or 0.0 for value, there in zip(iou, occurs, strict=True) if there]
    known = [value for value in iou if value is not None]
    return {
        "miou": sum(here) / len(here) if here else None,
        "miou_all": sum(known) / len(known) if known else None,
        "pixel_accuracy": right / total if total else None,
        "iou": iou,
    }


masks = hnp.arrays(np.uint8, (6, 7), elements=st.sampled_from([0, 1, 2, 3, 4, 255]))
predictions = hnp.arrays(np.uint8, (6, 7), elements=st.integers(0, 4))


@settings(max_examples=150, deadline=None)
@given(pairs=st.lists(st.tuples(masks, predictions), min_size=1, max_size=4))
def test_scores_agree_with_the_plain_metric(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    counts = np.sum([confusion(truth, prediction, 5) for truth, prediction in pairs], axis=0)
    ours, expected = score(counts), plain_scores(pairs, 5)
    for name in ("miou", "miou_all", "pixel_accuracy"):
        value = getattr(ours, name)
        assert np.isnan(value) if expected[name] is None else abs(value - expected[name]) < 1e-9
    for value, other in zip(ours.class_iou, expected["iou"], strict=True):
        assert np.isnan(value) if other is None else abs(value - other) < 1e-9


def random_seed(rng: np.random.Generator, classes: int = 4) -> tuple[Cam, np.ndarray]:
    count = int(rng.integers(0, classes + 1))
    cam = rng.random((count, 3, 4)).astype(np.float16).astype(np.float32)
    cam[:, rng.random((3, 4)) < 0.2] = 0.5  # exact ties between classes and with thresholds
    ids = rng.permutation(classes)[:count].astype(np.int32)
    truth = rng.choice(np.array([*range(classes + 1), 255], np.uint8), (40, 50))
    return Cam("x", ids, cam, (40, 50)), truth


def brute_force(seed: Cam, background: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Arg-max over the stacked score volume, as published code does it; the background comes first."""
    volume = np.concatenate([background[None], maps])
    return np.concatenate([[0], seed.classes + 1])[volume.argmax(axis=0)].astype(np.uint8)


@pytest.mark.parametrize("half", [False, True])
def test_all_thresholds_at_once(half: bool) -> None:
    rng = np.random.default_rng(0)
    cases = [random_seed(rng) for _ in range(20)]
    thresholds = (0.0, 0.25, 0.5, 0.77)
    sweep = ThresholdSweep(5, thresholds, half=half)
    for seed, truth in cases:
        sweep.update(seed, truth)
    dtype = np.float16 if half else np.float32
    for threshold, matrix in zip(thresholds, sweep.matrices(), strict=True):
        expected = np.zeros((5, 5), np.int64)
        for seed, truth in cases:
            maps = seed.upsampled().astype(dtype)
            prediction = brute_force(seed, np.full(seed.size, threshold, dtype), maps)
            expected += confusion(truth, prediction, 5)
        np.testing.assert_array_equal(matrix, expected)


def test_background_exponents() -> None:
    rng = np.random.default_rng(1)
    cases = [random_seed(rng) for _ in range(20)]
    sweep = PowerSweep(5, (1, 2, 0.5))
    for seed, truth in cases:
        sweep.update(seed, truth)
    for exponent, matrix in zip((1, 2, 0.5), sweep.matrices(), strict=True):
        expected = np.zeros((5, 5), np.int64)
        for seed, truth in cases:
            maps = seed.upsampled().astype(np.float16)
            strongest = maps.max(axis=0) if len(maps) else np.zeros(seed.size, np.float16)
            background = np.power(1 - strongest, exponent).astype(np.float16)
            expected += confusion(truth, brute_force(seed, background, maps), 5)
        np.testing.assert_array_equal(matrix, expected)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Five predictions and masks of different sizes, 255 on the masks' borders."""
    rng = np.random.default_rng(2)
    prediction, truth = tmp_path / "pred", tmp_path / "gt"
    for folder in (prediction, truth):
        (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "sub/c", "d", "e")):
        shape = (20 + number, 30)
        mask = rng.integers(0, 6, shape).astype(np.uint8)
        guess = np.where(rng.random(shape) < 0.6, mask, rng.integers(0, 21, shape)).astype(np.uint8)
        mask[0] = 255
        write_label_mask(truth / f"{name}.png", mask)
        write_label_mask(prediction / f"{name}.png", guess)
    return prediction, truth


def run(prediction: Path, truth: Path, **options: Any) -> Any:
    return evaluate(EvaluateOptions(prediction, str(truth), options.pop("classes", "voc"), **options))


def pairs_in(prediction: Path, truth: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    names = sorted(
        path.relative_to(truth) for path in truth.rglob("*.png") if (prediction / path.relative_to(truth)).exists()
    )
    return [(np.asarray(Image.open(truth / name)), np.asarray(Image.open(prediction / name))) for name in names]


def test_folders(folders: tuple[Path, Path]) -> None:
    report = run(*folders)
    expected = plain_scores(pairs_in(*folders), 21)
    assert report.images == 5
    assert report.unscored == 0
    assert report.threshold is None
    assert report.scores.miou == pytest.approx(expected["miou"], abs=1e-9)
    assert report.scores.miou_all == pytest.approx(expected["miou_all"], abs=1e-9)
    assert report.scores.miou_all < report.scores.miou  # classes that are only predicted


def test_json_and_csv(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prediction, truth = folders
    table = tmp_path / "scores.csv"
    code = main(["evaluate", str(prediction), "--gt", str(truth), "--classes", "voc", "--json", "--csv", str(table)])
    assert code == 0
    data = json.loads(capsys.readouterr().out)
    expected = plain_scores(pairs_in(*folders), 21)
    assert data["miou"] == pytest.approx(expected["miou"], abs=1e-9)
    assert data["pixel_accuracy"] == pytest.approx(expected["pixel_accuracy"], abs=1e-9)
    assert tuple(data["class_iou"]) == NAMES
    for value, other in zip(data["class_iou"].values(), expected["iou"], strict=True):
        assert (value is None) == (other is None)
        assert value is None or abs(value - other) < 1e-9
    assert (data["images"], data["split"], data["threshold"]) == (5, "all", None)
    rows = dict(line.rsplit(",", 1) for line in table.read_text().splitlines())
    assert float(rows["mean IoU"]) == pytest.approx(expected["miou"], abs=1e-9)
    assert float(rows["background"]) == pytest.approx(expected["iou"][0], abs=1e-9)


def test_the_table_names_what_was_scored(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    prediction, truth = folders
    assert main(["evaluate", str(prediction), "--gt", str(truth), "--classes", "voc"]) == 0
    out = capsys.readouterr().out
    assert f"{prediction} on all, 5 images" in out
    assert "mean IoU without background" in out
    assert "mean IoU over all predicted classes" in out


def test_predicted_255(folders: tuple[Path, Path]) -> None:
    """Never shifted into another class: an error, background, or left out, and said so."""
    prediction, truth = folders
    guess = np.asarray(Image.open(prediction / "b.png")).copy()
    guess[5:9] = 255
    write_label_mask(prediction / "b.png", guess)
    with pytest.raises(InputError, match=r"b.png: holds 255.*--pred-ignore background or --pred-ignore exclude"):
        run(prediction, truth)
    pairs = pairs_in(prediction, truth)
    background = plain_scores([(mask, np.where(p == 255, 0, p)) for mask, p in pairs], 21)
    excluded = plain_scores([(np.where(p == 255, 255, mask), p) for mask, p in pairs], 21)
    first = run(prediction, truth, pred_ignore="background")
    second = run(prediction, truth, pred_ignore="exclude")
    assert first.scores.miou == pytest.approx(background["miou"], abs=1e-9)
    assert second.scores.miou == pytest.approx(excluded["miou"], abs=1e-9)
    assert (first.excluded_pixels, second.excluded_pixels) == (0, 4 * 30)


def test_ids_missing_on_either_side(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prediction, truth = folders
    (truth / "a.png").unlink()
    (prediction / "d.png").unlink()
    report = run(prediction, truth)
    assert report.images == 3
    assert (report.missing_ground_truth, report.missing_predictions) == (["a"], ["d"])
    words = ["evaluate", str(prediction), "--gt", str(truth), "--classes", "voc"]
    assert main(words) == 3
    errors = capsys.readouterr().err
    assert "1 prediction has no ground truth; not scored: a" in errors
    assert "1 ground-truth mask without a prediction; not scored: d" in errors
    split = tmp_path / "some.txt"
    split.write_text("b\nd\n")
    assert main([*words, "--split", str(split), "--json"]) == 3
    data = json.loads(capsys.readouterr().out)
    assert (data["split"], data["images"], data["missing_predictions"]) == ("some", 1, ["d"])
    split.write_text("b\ne\n")
    assert main([*words, "--split", str(split)]) == 0


def test_nothing_in_common(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r"other: no \.png masks here"):
        run(folders[0], tmp_path / "other")
    with pytest.raises(InputError, match="neither CAMs nor PNG masks"):
        run(tmp_path / "other", folders[1])
    with pytest.raises(InputError, match="no such CAM file or mask folder"):
        run(tmp_path / "nowhere", folders[1])
    with pytest.raises(InputError, match=r"--gt .*nowhere: no such folder \(looked for"):
        run(folders[0], tmp_path / "nowhere")


def test_sizes_must_agree(folders: tuple[Path, Path]) -> None:
    prediction, truth = folders
    guess = Image.open(prediction / "sub" / "c.png")
    small = np.asarray(guess.resize((15, 11), Image.Resampling.NEAREST))
    write_label_mask(prediction / "sub" / "c.png", small)
    with pytest.raises(
        InputError, match=r"sub/c: the prediction is 15x11 pixels, the ground truth 30x22.*--resize-pred"
    ):
        run(prediction, truth)
    report = run(prediction, truth, resize_pred=True)
    large = np.asarray(Image.fromarray(small).resize((30, 22), Image.Resampling.NEAREST))
    pairs = [(mask, large if p.shape != mask.shape else p) for mask, p in pairs_in(prediction, truth)]
    assert report.scores.miou == pytest.approx(plain_scores(pairs, 21)["miou"], abs=1e-9)


def test_values_that_are_no_class(folders: tuple[Path, Path]) -> None:
    prediction, truth = folders
    with pytest.raises(
        InputError, match=r"pred/a.png: holds the value \d+, but this class list has 0 \(background\) to 10"
    ):
        run(prediction, truth, classes="toy")
    write_label_mask(truth / "a.png", np.full((20, 30), 77, np.uint8))
    with pytest.raises(InputError, match=r"gt/a: holds the value 77"):
        run(prediction, truth)


def test_rgb_ground_truth_in_voc_colours(folders: tuple[Path, Path]) -> None:
    before = run(*folders).scores.miou
    for path in folders[1].rglob("*.png"):
        labels = np.asarray(Image.open(path))
        Image.fromarray(voc_palette()[labels]).save(path)
    assert run(*folders).scores.miou == before


def test_usage_mistakes(folders: tuple[Path, Path]) -> None:
    for options, message in (
        ({"classes": None}, "say which classes the masks hold"),
        ({"threshold": 0.5}, "apply to CAMs"),
        ({"threshold": 1.5}, "--threshold 1.5"),
        ({"threshold": float("nan")}, "--threshold"),
        ({"alphas": (0.0,)}, "--alpha"),
        ({"alphas": (1.0,), "threshold": 0.2}, "give one"),
        ({"pred_ignore": "skip"}, "--pred-ignore skip"),
    ):
        with pytest.raises(UsageError, match=message):
            run(*folders, **options)


@pytest.fixture
def seeds(tmp_path: Path) -> tuple[Path, Path, list[tuple[Cam, np.ndarray]]]:
    rng = np.random.default_rng(3)
    cases = []
    (tmp_path / "root" / "truth").mkdir(parents=True)
    for number in range(6):
        seed, mask = random_seed(rng)
        cases.append((Cam(f"p{number}", seed.classes, seed.maps, seed.size), mask))
        write_label_mask(tmp_path / "root" / "truth" / f"p{number}.png", mask)
    manifest = {
        "vocabulary": {"name": "four", "classes": [{"name": name} for name in "abcd"]},
        "dataset": {"name": "voc", "root": str(tmp_path / "root"), "split": "train"},
        "options": {"paper": False},
    }
    with CamWriter(tmp_path / "cams.h5", manifest, "float16", 4) as writer:
        writer.write(Unit(0), [seed for seed, _ in cases])
        writer.finish([seed.id for seed, _ in cases])
    return tmp_path / "cams.h5", tmp_path / "root", cases


def test_seeds(seeds: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path, _, cases = seeds
    monkeypatch.chdir(path.parent)
    assert main(["evaluate", "--gt", "truth", "--json"]) == 0  # finds cams.h5 here and truth below the data set's root
    captured = capsys.readouterr()
    assert "scoring cams.h5" in captured.err
    data = json.loads(captured.out)
    curve = {}
    for threshold in DEFAULT_THRESHOLDS:
        pairs = [
            (mask, brute_force(seed, np.full(seed.size, threshold, np.float32), seed.upsampled()))
            for seed, mask in cases
        ]
        curve[threshold] = plain_scores(pairs, 5)["miou"]
    best = max(curve, key=lambda threshold: (curve[threshold], -threshold))
    assert data["threshold"] == best
    assert data["miou"] == pytest.approx(curve[best], abs=1e-9)
    assert {point["setting"]: point["miou"] for point in data["curve"]} == pytest.approx(curve, abs=1e-9)
    assert (data["split"], data["images"]) == ("train", 6)
    assert list(data["class_iou"]) == ["background", "a", "b", "c", "d"]

    assert main(["evaluate", "--gt", "truth", "--threshold", "0.4", "--json"]) == 0
    fixed = json.loads(capsys.readouterr().out)
    assert (fixed["threshold"], fixed["miou"]) == (0.4, pytest.approx(curve[0.4], abs=1e-9))
    assert main(["evaluate", "--gt", "truth", "--alpha", "1,2"]) == 0
    assert "background (1 - max)^" in capsys.readouterr().out


def test_seeds_without_known_ground_truth(seeds: Any) -> None:
    with pytest.raises(InputError, match="name the mask folder with --gt"):
        evaluate(EvaluateOptions(seeds[0]))
    with pytest.raises(UsageError, match="made with other classes"):
        evaluate(EvaluateOptions(seeds[0], str(seeds[1] / "truth"), "voc"))


def test_seeds_of_another_size(seeds: Any) -> None:
    path, root, cases = seeds
    mask = cases[0][1][:30, :20]
    write_label_mask(root / "truth" / "p0.png", mask)
    with pytest.raises(InputError, match=r"p0: the prediction is 50x40 pixels, the ground truth 20x30"):
        evaluate(EvaluateOptions(path, str(root / "truth")))
    report = evaluate(EvaluateOptions(path, str(root / "truth"), resize_pred=True))
    assert report.images == 6


def test_which_output_is_scored_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--gt", "x"]) == 2
    assert "nothing to score" in capsys.readouterr().err
    plain = small_manifest(tmp_path)
    refined = {**plain, "kind": "refine", "method": "caa"}
    for number, (name, manifest) in enumerate(
        (("c.h5", plain), ("c-caa.h5", refined), ("other.h5", plain), ("soft.h5", {**plain, "kind": "crf"}))
    ):
        write_seeds(tmp_path / name, [make_cam("a", (1,), number)], manifest)
        os.utime(name, (1000 + number, 1000 + number))
    segments = write_cache(tmp_path / "segments.h5", [])
    os.utime(segments, (9000, 9000))
    Path("broken.h5").write_bytes(b"")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "manifest.json").write_text(json.dumps({**plain, "kind": "crf"}))
    os.utime("masks/manifest.json", (2000, 2000))
    os.utime("masks", (2000, 2000))
    assert newest_output(Path()) == Path("masks")
    assert newest_output(Path(), "crf") == Path("other.h5")
    os.utime("c-caa.h5", (3000, 3000))
    assert newest_output(Path(), "crf") == newest_output(Path()) == Path("c-caa.h5")
    assert newest_output(Path(), "caa") == Path("other.h5")  # the last one that is not refined
    assert newest_output(Path(), "inspect") == Path("segments.h5")
    assert main(["evaluate", "--gt", "x"]) == 1
    assert "scoring c-caa.h5, the last output here" in capsys.readouterr().err


def test_memory_does_not_grow(folders: tuple[Path, Path]) -> None:
    """Masks are read a bounded number ahead of the matrix they are added to."""
    from clipseed.runtime.threads import ahead

    alive: set[int] = set()
    most = 0

    class Mask:
        def __init__(self, key: str) -> None:
            nonlocal most
            alive.add(int(key))
            most = max(most, len(alive))
            self.key = int(key)

        def __del__(self) -> None:
            alive.discard(self.key)

    for _ in ahead(Mask, [str(k) for k in range(500)]):
        pass
    assert most <= 40


def test_coverage_and_single_images(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What 255 costs, and which images are bad: against loops over the pixels."""
    prediction, truth = folders
    rng = np.random.default_rng(5)
    ids = ["a", "b", "sub/c", "d", "e"]
    for key in ids:
        mask = read_label_mask(prediction / f"{key}.png").copy()
        mask[rng.random(mask.shape) < 0.3] = 255
        write_label_mask(prediction / f"{key}.png", mask)
    write_label_mask(truth / "b.png", np.full((20, 30), 255, np.uint8))
    write_label_mask(prediction / "b.png", np.full((20, 30), 4, np.uint8))
    pairs = {key: (read_label_mask(truth / f"{key}.png"), read_label_mask(prediction / f"{key}.png")) for key in ids}
    certain = [(np.where(guess == 255, 255, mask), guess) for mask, guess in pairs.values()]
    known = sum(int((mask != 255).sum()) for mask, _ in pairs.values())
    covered = sum(int((mask != 255).sum()) for mask, _ in certain)
    for policy in ("exclude", "background"):
        report = run(prediction, truth, pred_ignore=policy)
        assert report.coverage == covered / known
        assert report.labelled.miou == pytest.approx(plain_scores(certain, 21)["miou"], abs=1e-9)
        whole = certain if policy == "exclude" else [(m, np.where(p == 255, 0, p)) for m, p in pairs.values()]
        assert report.scores.miou == pytest.approx(plain_scores(whole, 21)["miou"], abs=1e-9)
    words = ["evaluate", str(prediction), "--gt", str(truth), "--classes", "voc", "--pred-ignore", "background"]
    table = tmp_path / "images.csv"
    assert main([*words, "--per-image", str(table), "--worst", "1"]) == 0
    said = capsys.readouterr().out
    assert "coverage" in said
    assert "the 1 worst images" in said
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows][-1] == "b"
    assert (rows[-1]["miou"], rows[-1]["coverage"], rows[-1]["missed"], rows[-1]["invented"]) == ("", "", "", "")
    assert float(rows[0]["miou"]) <= float(rows[1]["miou"])
    for row in rows[:-1]:
        mask, guess = pairs[row["id"]]
        alone = plain_scores([(mask, np.where(guess == 255, 0, guess))], 21)
        assert float(row["miou"]) == pytest.approx(alone["miou"], abs=1e-6)
        there, said_there = ({int(v) for v in np.unique(part[mask != 255])} - {0, 255} for part in (mask, guess))
        assert row["missed"] == ";".join(NAMES[k] for k in sorted(there - said_there))
        assert row["invented"] == ";".join(NAMES[k] for k in sorted(said_there - there))
        assert float(row["coverage"]) == pytest.approx((guess[mask != 255] != 255).mean(), abs=1e-6)
    assert main([*words, "--worst", "2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [item["id"] for item in data["worst"]] == [row["id"] for row in rows[:2]]
    assert main(["report", *words[1:], "--out", str(tmp_path / "page.html")]) == 0
    told = f"{100 * covered / known:.2f} % of the pixels are labelled; mean IoU there"
    assert told in capsys.readouterr().err
    assert told in (tmp_path / "page.html").read_text()
    assert data["coverage"] == covered / known


def test_maps_cover_everything(seeds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, root, cases = seeds
    words = ["evaluate", str(path), "--gt", str(root / "truth"), "--threshold", "0.3"]
    assert main([*words, "--per-image", str(tmp_path / "x.csv"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["coverage"], data["miou_labelled"]) == (1.0, data["miou"])
    assert len((tmp_path / "x.csv").read_text().splitlines()) == len(cases) + 1
    assert main(words) == 0
    assert "coverage" not in capsys.readouterr().out
