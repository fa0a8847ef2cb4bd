"""The page about label masks and CAMs without a truth: areas, coverage, the images worth a look."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clipseed.cli.main import main
from clipseed.report.survey import Survey, areas_of
from clipseed.store.label_masks import LabelMaskNote, read_label_mask, write_label_mask

from helpers.images import photo

NAMES = ("cat", "dog", "cow")


def masks() -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
    """Ten ordinary images, one without a pixel of its label, one that is mostly 255, one with far too large a class."""
    generator = np.random.default_rng(0)
    made = {}
    for number in range(10):
        mask = np.zeros((20, 30), np.uint8)
        mask[: 4 + number % 3, :10] = 1
        mask[10:14, : 5 + generator.integers(5)] = 2
        made[f"plain-{number}"] = ((0, 1), mask)
    made["lost"] = ((0, 2), made["plain-0"][1].clip(max=1))
    unsure = np.full((20, 30), 255, np.uint8)
    unsure[:4, :10] = 1
    made["unsure"] = ((0,), unsure)
    made["flooded"] = ((0,), np.ones((20, 30), np.uint8))
    return made


def test_survey_equals_a_plain_count() -> None:
    made = masks()
    survey = Survey(NAMES)
    for key, (labels, mask) in made.items():
        survey.add(areas_of(key, labels, mask))
    everything = np.concatenate([mask.ravel() for _, mask in made.values()])
    assert survey.coverage == pytest.approx((everything != 255).mean())
    assert survey.foreground == pytest.approx(((everything > 0) & (everything != 255)).mean())
    assert survey.empty == 1
    for item in survey.classes:
        shares = [(mask == item.index + 1).mean() for _, mask in made.values() if (mask == item.index + 1).any()]
        assert item.name == NAMES[item.index]
        assert item.labelled == sum(item.index in labels for labels, _ in made.values())
        assert item.shown == len(shares)
        assert item.share == pytest.approx((everything == item.index + 1).mean())
        assert np.isnan(item.median) if not shares else item.median == pytest.approx(np.median(shares))
    worth = [(image.id, why) for image, why in survey.worth_a_look(5)]
    assert [key for key, _ in worth] == ["lost", "unsure", "flooded"]
    assert worth[0][1] == "no pixel of cow"
    assert "% is 255" in worth[1][1]
    assert worth[2][1].startswith("cat on 100.0 % (usually")
    assert not {image.id for image in survey.others(4, ["lost"])} & {"lost"}
    foreign = areas_of("x", None, made["plain-0"][1])
    assert (foreign.missing, foreign.invented) == ((), ())
    assert areas_of("x", (0,), made["plain-0"][1]).invented == (1,)


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("classes.txt").write_text("boat\nfish\ncup\n")
    for number in range(3):
        photo(number, 48, 64).save(f"photos/{number}.png")
    Path("labels.csv").write_text("0.png,boat\n1.png,fish\n2.png,cup\n")
    words = ["--images", "photos", "--labels", "labels.csv", "--classes", "classes.txt", "--weights", "toy"]
    assert main(["label", *words, "--keep", "cams.h5", "--quiet"]) == 0
    labels = read_label_mask(Path("pseudo/1.png"))
    write_label_mask(Path("pseudo/1.png"), np.zeros_like(labels), LabelMaskNote((1,)))
    assert main(["report", "cams.h5", "pseudo", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["input"] for one in told["inputs"]] == ["cams.h5", "pseudo"]
    assert told["inputs"][1]["coverage"] == 1
    assert told["worth_a_look"][0] == {"id": "1", "why": "no pixel of fish"}
    page = Path("report.html").read_text(encoding="utf-8")
    assert "no scores" in page
    for shown in ('alt="image 1"', 'alt="CAMs of 1, cams.h5"', 'alt="pseudo of 1"', 'alt="cams.h5 of 1"'):
        assert shown in page
    assert "Mean IoU" not in page
    assert main(["crf", "cams.h5", "--out", "crf", "--quiet"]) == 0
    assert main(["report", "crf"]) == 0  # the maps that masks were made from are found
    assert "labelled pixels" in capsys.readouterr().out
    assert 'alt="CAMs of 1, cams.h5"' in Path("report.html").read_text(encoding="utf-8")
    Path("gt").mkdir()
    for number in range(3):
        write_label_mask(Path(f"gt/{number}.png"), np.zeros((48, 64), np.uint8))
    assert main(["report", "pseudo", "--gt", "gt"]) == 0
    assert "Confusion" in Path("report.html").read_text(encoding="utf-8")


def test_foreign_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for key, (_, mask) in masks().items():
        Path("own").mkdir(exist_ok=True)
        write_label_mask(Path(f"own/{key}.png"), mask)
    assert main(["report", "own"]) == 0
    assert "mask value 1" in capsys.readouterr().out
    assert "name the folder with --images" in Path("report.html").read_text(encoding="utf-8")
    Path("classes.txt").write_text("<b>cat</b>\ndog\ncow\n")
    assert main(["report", "own", "--classes", "classes.txt"]) == 0
    page = Path("report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;cat&lt;/b&gt;" in page
    assert "<b>cat" not in page
    assert main(["report", "nowhere"]) == 1
