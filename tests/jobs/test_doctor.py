"""The doctor's diagnoses, each provoked."""

from __future__ import annotations

import importlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from clipseed.cli.main import main
from clipseed.jobs.doctor import Finding, examine


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLIPSEED_WEIGHTS", str(tmp_path / "weights"))


def finding(topic: str, **options: Any) -> Finding:
    (found,) = [item for item in examine(network=False, **options) if item.topic == topic]
    return found


def failing_import(name: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def load(module: str, *rest: Any) -> Any:
        if module == name:
            raise error
        return real(module, *rest)

    monkeypatch.setattr("clipseed.jobs.doctor.importlib.import_module", load)


def test_a_healthy_installation() -> None:
    found = examine(network=False)
    assert [item for item in found if item.verdict == "problem"] == []
    assert finding("torch").text == metadata.version("torch")
    assert "precision" in finding("device").text


def test_torchvision_of_another_build(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("operator torchvision::nms does not exist")
    failing_import("torchvision", error, monkeypatch)
    problems = [item for item in examine(network=False) if item.verdict == "problem"]
    assert len(problems) == 1
    assert "does not belong to torch" in problems[0].text
    assert "pip install --force-reinstall torch torchvision" in problems[0].text


def test_broken_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_import("torch", ImportError("libcudart.so.13: cannot open shared object file"), monkeypatch)
    problems = [item for item in examine(network=False) if item.verdict == "problem"]
    assert "libcudart.so.13" in problems[0].text


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "h5py":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr("clipseed.jobs.doctor.metadata.version", version)
    assert finding("h5py") == Finding("h5py", "problem", "is not installed; run: pip install h5py")


def test_two_opencvs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr("clipseed.jobs.doctor.metadata.version", lambda n: "4" if n == "opencv-python" else real(n))
    assert "one hides the other" in finding("opencv-python").text


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipseed.jobs.doctor.importlib.util.find_spec", lambda name: None)
    text = finding("extra [sam]").text
    assert text.startswith("not installed (reads COCO's files of masks")
    assert text.endswith("pip install 'clipseed[sam]'")


def test_weights_by_hand_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipseed.jobs.doctor.reachable", lambda host: False)
    monkeypatch.setattr("clipseed.jobs.doctor._cached", lambda hub: None)
    (note,) = [item for item in examine() if item.topic == "ViT-B-16 openai"]
    place = tmp_path / "weights" / "ViT-B-16-openai.safetensors"
    assert note.verdict == "note"
    assert f"put the file at {place}" in note.text
    place.parent.mkdir()
    place.write_bytes(b"x")
    assert finding("ViT-B-16 openai") == Finding("ViT-B-16 openai", "ok", f"at {place}")
    assert "not a pretrained tag" in finding("ViT-B-16 nonsense", tag="nonsense").text


def test_exit_codes_and_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor", "--offline"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("clipseed can run")
    failing_import("torchvision", RuntimeError("operator torchvision::nms does not exist"), monkeypatch)
    assert main(["doctor", "--offline", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] is False
    assert {item["verdict"] for item in data["findings"]} >= {"ok", "problem"}
