"""Which weights may be used for what: the list, the manifest, and ``--permissive``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from open_clip import pretrained

from clipseed.cli.main import main
from clipseed.clip.licenses import license_of
from clipseed.clip.model import FrozenClip
from clipseed.store.differences import differences


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    """Every pair is one of open_clip's; what is stated has a source; the three publishers of free weights are there."""
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    pairs = {(item["model"], item["tag"]): item for item in found}
    assert len(pairs) == len(found)
    for (model, tag), item in pairs.items():
        assert tag in pretrained.list_pretrained_tags_by_model(model)
        known = item["license"]["name"] != "unknown"
        assert known == (item["license"]["commercial"] is not None) == item["license"]["source"].startswith("https://")
    for model, tag, name, free in (
        ("ViT-B-16", "openai", "MIT", True), ("ViT-B-16", "laion2b_s34b_b88k", "MIT", True),
        ("ViT-B-16", "datacomp_xl_s13b_b90k", "MIT", True), ("ViT-B-16", "metaclip_fullcc", "CC-BY-NC-4.0", False),
        ("ViT-H-14", "dfn5b", "apple-amlr", False),
    ):  # fmt: skip
        assert (pairs[model, tag]["license"]["name"], pairs[model, tag]["license"]["commercial"]) == (name, free)
    assert pairs["ViT-L-14-336", "openai"]["image_size"] == 336
    assert (pairs["ViT-L-14", "openai"]["patch"], pairs["ViT-L-14", "openai"]["blocks"]) == (14, 24)
    dense = {(model, tag) for (model, tag), item in pairs.items() if item["dense"]}
    assert ("ViT-B-16", "metaclip_fullcc") in dense
    assert ("ViT-L-14", "metaclip_fullcc") in dense
    assert all("metaclip" in tag for _, tag in dense)
    assert main(["models", "b-16", "--permissive"]) == 0
    said = capsys.readouterr().out
    assert "datacomp_xl_s13b_b90k" in said
    assert "metaclip" not in said
    assert "dfn" not in said
    assert "ViT-L" not in said


def test_permissive_refuses_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"x")
    for command in ("cam", "prompts", "train weclip"):
        for weights, told in (
            ("metaclip_fullcc", "CC-BY-NC-4.0"),
            (str(file), "is not known"),
            ("nosuch", "not known"),
        ):
            words = [
                *command.split(),
                "--dataset",
                "voc",
                "--root",
                str(tmp_path),
                "--permissive",
                "--weights",
                weights,
            ]
            assert main(words) == 2
            assert told in capsys.readouterr().err
    words = ["cam", "--dataset", "voc", "--root", str(tmp_path), "--permissive", "--weights", "openai"]
    assert main(words) == 1  # there are no images
    assert "no JPEGImages" in capsys.readouterr().err
    assert license_of(None, "toy").commercial


def test_the_manifest_says_it_and_nothing_depends_on_it() -> None:
    model = FrozenClip.load(weights="toy", device="cpu").manifest()
    assert model["license"] == "Apache-2.0"
    older = {key: value for key, value in model.items() if key != "license"}
    assert differences({"kind": "cam", "model": older}, {"kind": "cam", "model": model}) == []
