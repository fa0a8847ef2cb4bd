"""Every command in the README and the examples is run, with seeded random weights in place of the downloaded ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clipseed.store.cams import open_cams

from helpers.images import photo

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a random ViT-B/16 where the pretrained one is looked for."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    state = open_clip.create_model("ViT-B-16").state_dict()
    save_file({key: value.half() for key, value in state.items()}, folder / "ViT-B-16-openai.safetensors")
    return folder


def run(script: str, folder: Path, weights: Path) -> str:
    """Run shell lines as typed, with the installed program on the path."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CLIPSEED_WEIGHTS": str(weights),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash", "-ec", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_setup_commands_are_make_targets() -> None:
    (setup,) = [block for block in blocks("sh") if "make" in block]
    words = [line.split() for line in setup.strip().splitlines()]
    assert [line[0] for line in words] == ["make", "make"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {line[1] for line in words} <= set(targets)
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "lint", "bench", "help"):
        assert re.search(rf"^{target}\s+\S", shown, re.MULTILINE)


@pytest.mark.slow
def test_voc_commands(devkit: Path, weights: Path) -> None:
    (script,) = [block for block in blocks("sh") if "cam --dataset voc" in block]
    assert [line.split()[1] for line in script.strip().splitlines()] == ["cam", "refine", "evaluate"]
    shown = run(script, devkit, weights)
    assert "6 of 6 images" in shown
    assert "mean IoU" in shown
    assert "cams-caa.h5" in shown
    (reading,) = blocks("python")
    (devkit / "read.py").write_text(reading)
    lines = run("python read.py", devkit, weights).splitlines()
    assert lines[0].startswith("2007_000001 ['cat'] (1, 48, 64)")
    assert len(lines) == 6


@pytest.mark.slow
def test_segmenter(devkit: Path, weights: Path) -> None:
    """As typed, but for one step of small crops."""
    (script,) = [block for block in blocks("sh") if "train weclip" in block]
    assert [line.split()[1] for line in script.strip().splitlines()] == ["train", "predict"]
    lists = devkit / "ImageSets" / "Segmentation"
    (lists / "trainaug.txt").write_text((lists / "val.txt").read_text())
    (devkit / "photos").symlink_to(devkit / "JPEGImages")
    shown = run(script.replace("trainaug", "trainaug --steps 1 --crop 64 --batch-size 2"), devkit, weights)
    assert "weclip.safetensors: 1 step on " in shown
    assert len(list((devkit / "predictions").glob("*.png"))) == len(list((devkit / "JPEGImages").iterdir()))


@pytest.mark.slow
def test_segments(devkit: Path, weights: Path) -> None:
    """The SAM commands, with seeded random weights of a small model in place of Meta's."""
    import torch

    from clipseed.sam.architecture import SamConfig, build_sam

    torch.manual_seed(0)
    small = SamConfig(image_size=64, embed_dim=32, depth=2, heads=2, window_size=0, global_attn_indexes=(0, 1))
    torch.save(build_sam(small).state_dict(), devkit / "sam_vit_h_4b8939.pth")
    (script,) = [block for block in blocks("sh") if "sam-masks" in block]
    assert [line.split()[1] for line in script.strip().splitlines()] == ["sam-masks", "sam-seed", "evaluate"]
    shown = run(f"clipseed cam --dataset voc --split val --out cams.h5\n{script}", devkit, weights)
    assert "segments.h5: 2 of 2 images" in shown
    assert "pseudo-sam: 2 of 2 masks" in shown
    assert re.search(r"pseudo-sam.*mean IoU", shown, re.DOTALL)


@pytest.mark.slow
def test_own_images(tmp_path: Path, weights: Path) -> None:
    (script,) = [block for block in blocks("sh") if "--labels labels.csv" in block]
    assert len(script.splitlines()) == 1
    script = script.replace("clipseed label", "clipseed label --keep cams.h5")
    (tmp_path / "photos").mkdir()
    for number in (1, 2):
        photo(number, 64, 48).save(tmp_path / "photos" / f"IMG_000{number}.jpg")
    (tmp_path / "labels.csv").write_text("IMG_0001.jpg,rust\nIMG_0002.jpg,rust\nIMG_0002.jpg,crack\n")
    (tmp_path / "classes.txt").write_text("rust\ncrack: thin crack, fissure\n")
    assert "2 of 2 label masks" in run(script, tmp_path, weights)
    assert len(list((tmp_path / "pseudo").glob("*.png"))) == 2
    with open_cams(tmp_path / "cams.h5") as seeds:
        assert seeds.manifest["vocabulary"]["background_from"] == "general"
        for key, seed in seeds.items():
            assert len(seed.classes) == {"IMG_0001": 1, "IMG_0002": 2}[key]
            assert (seed.maps.max(axis=(1, 2)) > 0.5).all(), key  # one class alone in its image, too
    assert not (tmp_path / "cams.empty.csv").exists()


def test_every_command_is_in_the_table() -> None:
    from clipseed.cli.main import app

    table = re.findall(r"^\| `clipseed ([a-z-]+)` \|", README, re.MULTILINE)
    assert sorted(table) == sorted(str(item.name) for item in (*app.registered_commands, *app.registered_groups))


def test_linked_pages_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
