"""``clipseed try``: one picture out of one photo, and words for what is in the way."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipseed.cli.main import main
from clipseed.data.toy.dataset import toy_scene


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_one_photo(capsys: pytest.CaptureFixture[str]) -> None:
    pixels = toy_scene(0, "toy_000003").image()
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.rot90(pixels)).save("p.png", exif=exif)  # lying on its side, as phones store them
    assert main(["try", "p.png", "boat", "fish", "--weights", "toy", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["out"] == "p-try.png"
    assert "maps of photographs mean nothing" in err
    import clipseed

    found = clipseed.label(pixels, ["boat", "fish"], weights="toy")
    shares = {name: float((found.mask == k + 1).mean()) for k, name in enumerate(found.classes)}
    assert told["shares"] == pytest.approx(shares, abs=1e-3)
    with Image.open("p-try.png") as sheet:
        assert sheet.height == pytest.approx(320, abs=60)
        assert sheet.width == pytest.approx(4 * 320 * pixels.shape[1] / pixels.shape[0], abs=60)


def test_no_weights_and_no_network(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(toy_scene(0, "toy_000003").image()).save("p.png")
    asked = []

    def nobody(address: tuple[str, int], timeout: float) -> None:
        asked.append(address)
        raise OSError("no route")

    monkeypatch.setattr(socket, "create_connection", nobody)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLIPSEED_WEIGHTS", str(Path.cwd()))
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.setattr("clipseed.clip.model._in_hub_cache", lambda model, tag: None)
    level = logging.getLogger("huggingface_hub").level
    assert main(["try", "p.png", "boat", "--model", "ViT-B-32", "--weights", "laion2b_e16"]) == 1
    err = capsys.readouterr().err
    assert asked == [("huggingface.co", 443)]
    assert "not here, and https://huggingface.co/" in err
    assert str(Path.cwd() / "ViT-B-32-laion2b_e16.safetensors") in err
    assert "Retrying" not in err
    assert logging.getLogger("huggingface_hub").level == level
    assert main(["try", "nowhere.png", "boat"]) == 1
    assert "nowhere.png: no such file" in capsys.readouterr().err
