"""Images in memory: the same numbers as the commands, the tutorial page as it stands, and what type checkers see."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clipseed
from clipseed.cli.main import main
from clipseed.data.toy.dataset import toy_scene
from clipseed.errors import ImageError, InputError, UsageError
from clipseed.store.label_masks import label_mask_note, read_label_mask

ROOT = Path(__file__).parents[2]
KEYS = ["toy_000000", "toy_000001", "toy_000002"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def clip() -> clipseed.FrozenClip:
    return clipseed.FrozenClip.load(weights="toy", device="cpu")


def test_label_equals_the_command(clip: clipseed.FrozenClip) -> None:
    assert main(["label", "--dataset", "toy", "--limit", "3", "--keep", "cams.h5", "--quiet"]) == 0
    scenes = [toy_scene(0, key).image() for key in KEYS]
    with clipseed.open_cams("cams.h5") as cams:
        shown = [[cams.class_names[k] for k in cams.classes(key)] for key in KEYS]
        found = clipseed.label(scenes, shown, classes="toy", clip=clip)
        maps = clip.cams(scenes, shown, classes="toy", refine="caa")
        for key, one, cam in zip(KEYS, found, maps, strict=True):
            stored = read_label_mask(Path("pseudo") / f"{key}.png")
            assert (one.mask != stored).mean() < 1e-3
            assert np.abs(one.cam.maps - cams[key].maps).max() < 2e-3
            assert np.abs(cam.maps - cams[key].maps).max() < 2e-3
            assert list(one.labels) == [cam.names[k] for k in range(len(cam.names))]
    one = clipseed.label(scenes[0], shown[0], classes="toy", clip=clip, confidence=0.9)
    assert isinstance(one, clipseed.PseudoLabel)
    assert one.confidence is not None
    assert (one.mask == 255).any()
    assert ((one.mask == 255) == (one.confidence < 0.9)).all()
    assert one.coverage == (one.mask != 255).mean()
    one.save("own.png")
    assert (read_label_mask(Path("own.png")) == one.mask).all()
    assert label_mask_note(Path("own.png")).classes == tuple(one.cam.classes)
    assert one._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"
    assert one.overlay().size == (scenes[0].shape[1], scenes[0].shape[0])


def test_images_of_every_kind(clip: clipseed.FrozenClip) -> None:
    pixels = toy_scene(0, KEYS[0]).image()
    Image.fromarray(pixels).save("a.png")
    kinds: list[object] = [pixels, Image.fromarray(pixels), "a.png", Path("a.png")]
    batch = clip.cams(kinds, ["boat", "cup"])  # type: ignore[arg-type, call-overload]
    alone = [clip.cams(kind, ["boat", "cup"]) for kind in kinds]  # type: ignore[call-overload]
    for cam in (*batch, *alone):
        assert cam.names == ("boat", "cup")
        assert np.abs(cam.maps - batch[0].maps).max() < 1e-4
        assert (cam.image == pixels).all()
    assert batch[0].overlay().size == (pixels.shape[1], pixels.shape[0])
    flat = clipseed.label(pixels, ["boat"], clip=clip, recipe="svc", background=["sky", "sea"])
    assert flat.confidence is None
    assert set(np.unique(flat.mask)) <= {0, 1}


@pytest.mark.parametrize(
    ("images", "labels", "options", "error", "message"),
    [
        (["x.png"], [["a"], ["b"]], {}, UsageError, "1 images, but 2 lists"),
        ("x.png", "dog", {}, UsageError, r"labels are a list"),
        ("x.png", ["dog"], {}, ImageError, "x.png: no such file"),
        (np.zeros((4, 4, 2), np.uint8), ["dog"], {}, ImageError, "is no image"),
        ("x.png", ["dog"], {"classes": ["cat"]}, InputError, "unknown class 'dog'"),
        ("x.png", [], {}, InputError, "no classes"),
        ("x.png", ["dog"], {"recipe": "segments"}, UsageError, "--checkpoint"),
    ],
)
def test_mistakes(
    images: object, labels: object, options: dict[str, object], error: type[Exception], message: str,
    clip: clipseed.FrozenClip,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        clipseed.label(images, labels, clip=clip, **options)  # type: ignore[call-overload]


def test_names_complete() -> None:
    assert dir(clipseed) == sorted(clipseed.__all__)
    assert all(getattr(clipseed, name) is not None for name in clipseed.__all__)


def test_tutorial(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    for line in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)[0].splitlines():
        assert main(line.split()[1:]) == 0
    variables: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/python.md", "exec"), variables)
    shown = capsys.readouterr().out
    assert "toy_000000 ('boat', 'fish')" in shown
    assert "nowhere.jpg: no such file" in shown
    assert Path("overlay.png").stat().st_size > Path("toy_000003.png").stat().st_size


def test_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    for name, key in (("boat", KEYS[0]), ("cup", KEYS[1])):
        Path(f"photos/{name}").mkdir(parents=True)
        Image.fromarray(toy_scene(0, key).image()).save(f"photos/{name}/{key}.png")
    script = str(ROOT / "examples" / "from_python.py")
    monkeypatch.setattr(sys, "argv", [script, "photos", "labels", "--weights", "toy"])
    runpy.run_path(script, run_name="__main__")
    assert re.fullmatch(r"boat/.* %\ncup/.* %\n", capsys.readouterr().out)
    assert set(np.unique(read_label_mask(Path(f"labels/cup/{KEYS[1]}.png")))) <= {0, 2}


SCRIPT = """
import clipseed
from pathlib import Path
from PIL import Image

reveal_type(clipseed.label(Image.open("a.jpg"), ["dog"]))
reveal_type(clipseed.label("a.jpg", ["dog"]))
reveal_type(clipseed.label([Path("a.jpg"), Path("b.jpg")], ["dog"]))
reveal_type(clipseed.FrozenClip.load("ViT-B-16").cams("a.jpg", ["dog"]).upsampled())
reveal_type(clipseed.open_cams("cams.h5")["a"])
reveal_type(clipseed.load_segmenter("x.safetensors").predict("a.jpg"))
reveal_type(clipseed.load_segmenter("x.safetensors").predict([Path("a.jpg")]))
clipseed.label("a.jpg", ["dog"]).nothing
clipseed.label("a.jpg", ["dog"], recipe="none")
"""


@pytest.mark.slow
def test_type_checkers_see_it(tmp_path: Path) -> None:
    """With the cache that ``make lint`` leaves a second, without it half a minute."""
    (tmp_path / "user.py").write_text(SCRIPT)
    words = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache")]
    scripts = [str(tmp_path / "user.py"), str(ROOT / "examples" / "from_python.py")]
    done = subprocess.run([*words, *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    revealed = re.findall(r'Revealed type is "(.*?)"', done.stdout)
    assert [re.sub(r"\w+\.(?=\w)", "", kind.split("[tuple")[0]) for kind in revealed] == [
        "PseudoLabel", "PseudoLabel", "list[PseudoLabel]", "ndarray", "Cam", "ndarray", "list[ndarray",
    ], done.stdout  # fmt: skip
    errors = re.findall(r"error: .*\[(.*)\]", done.stdout)
    assert errors == ["attr-defined", "call-overload"], done.stdout
