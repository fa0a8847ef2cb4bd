"""``clipseed reproduce``: the published protocols as commands that exist, and what becomes of their numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from clipseed.cli import reproduce as command
from clipseed.cli.main import app, main
from clipseed.errors import UsageError
from clipseed.jobs import reproduce as job
from clipseed.jobs.reproduce import Published, ReproduceOptions, protocol

VOC = ReproduceOptions("clip-es", "voc", Path("out"), Path("devkit"), checkpoint="sam.pth")


@pytest.fixture(autouse=True)
def _in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "_run", lambda words: main([*words]))


def options_of(words: Sequence[str]) -> set[str]:
    """Options of the command that a command line names."""
    found: Any = get_command(app)
    for word in words:
        if not hasattr(found, "commands") or word not in found.commands:
            break
        found = found.commands[word]
    return {name for param in found.params for name in param.opts}


@pytest.mark.parametrize("dataset", ["voc", "coco", "toy"])
@pytest.mark.parametrize("system", ["clip-es", "weclip", "fma-wsss"])
def test_protocols_are_made_of_commands(system: Any, dataset: Any) -> None:
    steps = protocol(replace(VOC, system=system, dataset=dataset, limit=4, steps=2))
    made = {
        word for step in steps for before, word in zip(step.words, step.words[1:], strict=False) if before == "--out"
    }
    for step in steps:
        if "prompts" in step.words or "--prompts" in step.words or "fma-" in " ".join(step.words):
            continue  # what trains and uses learned prompts is a command of its own
        assert {word for word in step.words if word.startswith("--")} <= options_of(step.words), step.words
    for step in steps:
        named = {word for word in step.words if word.startswith("{out}")}
        assert named <= made, step.words
        if step.score is not None:
            assert "{out}/" + step.score.prediction in step.words
    assert steps[-1].score is not None


def test_fma_goes_from_coarse_to_fine() -> None:
    steps = protocol(replace(VOC, system="fma-wsss"))
    assert [step.title for step in steps] == [
        "segments", "prompts learned on labels", "coarse CAMs", "coarse CAMs after CAA", "coarse seeds",
        "prompts learned on coarse seeds", "fine CAMs", "fine CAMs after CAA", "fine seeds",
    ]  # fmt: skip
    coco = protocol(replace(VOC, system="fma-wsss", dataset="coco"))
    assert "fine CAMs after CAA" not in [step.title for step in coco]
    assert "{out}/cams-fine.h5" in coco[-1].words
    with pytest.raises(UsageError, match="--checkpoint FILE"):
        protocol(replace(VOC, system="fma-wsss", checkpoint=None))


def test_bands() -> None:
    assert Published(70.8, (70.71, 70.82)).band == pytest.approx((70.41, 71.12))
    assert Published(76.4, (74.4, 75.7)).band == pytest.approx((74.1, 76.7))
    assert Published(58.6).band == pytest.approx((58.3, 58.9))


def test_clip_es_on_the_toy(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["reproduce", "clip-es", "--dataset", "toy", "--limit", "2", "--device", "cpu"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert [line.split("  ")[0] for line in out.splitlines()[2:]] == [
        "initial CAMs", "CAMs after CAA", "pseudo-labels after CRF",
    ]  # fmt: skip
    assert "no number was judged" in err
    first = json.loads(Path("reproduce-clip-es-toy/reproduce.json").read_text())
    assert [score["images"] for score in first["scores"]] == [2, 2, 2]
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out[out.rindex('{\n "file"') :])["scores"] == first["scores"]
    assert err.count("2 done already") == 3  # every step goes on where it stopped
    assert len(first["scores"][0]["weights"]) == 64
    assert main(["evaluate", "reproduce-clip-es-toy/cams.h5", "--alpha", "1,2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["miou"] * 100 == pytest.approx(first["scores"][0]["miou"], abs=0.005)


@pytest.mark.parametrize(("low", "code", "verdict"), [(0.0, 0, "inside"), (99.0, 3, "OUTSIDE")])
def test_numbers_are_judged(
    low: float, code: int, verdict: str, devkit: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """On a devkit with seeded weights, whose score is whatever it is: the band decides."""
    monkeypatch.setattr(Published, "band", property(lambda self: (low, low + 60)))
    words = ["reproduce", "clip-es", "--root", str(devkit), "--weights", str(tiny_weights), "--quiet"]
    assert main(words) == code
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 3
    assert all(verdict in row and " 6 " in row for row in rows)
    assert "58.6" in rows[0]


def test_a_failing_step_stops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "_run", lambda words: 130 if words[0] == "refine" else main([*words]))
    words = ["reproduce", "clip-es", "--dataset", "toy", "--limit", "1", "--quiet"]
    assert main(words) == 130
    assert "step 2, CAMs after CAA: ended with exit code 130" in capsys.readouterr().err
    assert not Path("reproduce-clip-es-toy", job.RESULTS).exists()
