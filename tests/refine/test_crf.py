"""The dense CRF: two engines that agree, validated parameters, isolated crashes, masks on disk."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clipseed
from clipseed.cli.main import main
from clipseed.data.types import Sample
from clipseed.formats.palette import voc_palette
from clipseed.jobs.crf import NativeSolver, Problem
from clipseed.refine.crf import CLIP_ES, PRESETS, CrfParameters, clip_es_unary, crf_parameters, dense_crf
from clipseed.refine.permutohedral import build_lattice
from clipseed.runtime.decode import DecodePool
from clipseed.store.label_mask_folder import read_label_mask_manifest
from clipseed.store.label_masks import read_label_mask

from helpers.images import photo

needs_native = pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None,
    reason="pydensecrf2 is not installed (it needs a C++ compiler): pip install 'clipseed[crf]'",
)


def blobs(labels: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth probabilities ``(labels, height, width)``."""
    coarse = torch.rand(1, labels, 5, 6, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return (4 * smooth).softmax(dim=0).numpy()


@needs_native
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("labels", "height", "width"), [(2, 60, 83), (5, 97, 64), (3, 1, 40), (2, 33, 1)])
def test_engines_agree(preset: str, labels: int, height: int, width: int) -> None:
    from clipseed.refine.crf_native import native_crf

    unary = clip_es_unary(blobs(labels, height, width))
    noise = np.random.default_rng(0).integers(-6, 7, (height, width, 3))
    image = np.clip(np.asarray(photo(3, height, width)).astype(int) + noise, 0, 255).astype(np.uint8)
    theirs = native_crf(unary, image, PRESETS[preset])
    (ours,) = dense_crf([torch.from_numpy(unary)], [torch.from_numpy(image)], PRESETS[preset])
    np.testing.assert_allclose(ours.sum(dim=0).numpy(), 1, atol=1e-5)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=5e-3)
    assert (ours.numpy().argmax(axis=0) == theirs.argmax(axis=0)).mean() >= 0.999


def test_batch_equals_one_by_one() -> None:
    cases = [(2, 40, 52), (4, 31, 60), (3, 40, 52)]
    unaries = [torch.from_numpy(clip_es_unary(blobs(*case, seed=k))) for k, case in enumerate(cases)]
    images = [torch.from_numpy(np.asarray(photo(k, case[1], case[2])).copy()) for k, case in enumerate(cases)]
    together = dense_crf(unaries, images, CLIP_ES)
    for unary, image, found in zip(unaries, images, together, strict=True):
        (alone,) = dense_crf([unary], [image], CLIP_ES)
        assert found.shape == unary.shape
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def test_without_steps_or_kernels_it_is_the_softmax() -> None:
    unary = torch.from_numpy(clip_es_unary(blobs(3, 20, 20)))
    image = torch.zeros(20, 20, 3, dtype=torch.uint8)
    for parameters in (replace(CLIP_ES, iterations=0), replace(CLIP_ES, smooth_weight=0.0, colour_weight=0.0)):
        (found,) = dense_crf([unary], [image], parameters)
        torch.testing.assert_close(found, (-unary).softmax(dim=0))


def test_lattice_filters_like_a_gaussian() -> None:
    """One dimension, one impulse: a bell of unit deviation (the lattice's own blur is not an exact Gaussian)."""
    points = torch.linspace(-6, 6, 241)[:, None]
    values = torch.zeros(241, 1)
    values[120] = 1
    bell = build_lattice(points).filter(values)[:, 0]
    bell = bell / bell.sum()
    deviation = float((bell * points[:, 0] ** 2).sum() ** 0.5)
    assert 0.9 < deviation < 1.15
    assert float((bell * points[:, 0]).sum()) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize(
    "words",
    [
        ["--smooth-xy", "0"], ["--colour-xy", "-3"], ["--colour-rgb", "nan"], ["--colour-rgb", "inf"],
        ["--smooth-weight", "-1"], ["--iterations", "-1"], ["--alpha", "0"], ["--confidence", "1.5"],
        ["--preset", "mine"], ["--solver", "cuda"], ["--engine", "pydensecrf"],
        ["--colour-weight", "nan"], ["--colour-rgb", "1e-9"],
    ],
)  # fmt: skip
def test_parameters_are_validated(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0, negative and NaN end the C++ library's process; here they end in a sentence."""
    assert main(["crf", str(tmp_path / "cams.h5"), *words]) == 2
    assert words[0].removeprefix("--") in capsys.readouterr().err


def test_presets_can_be_changed() -> None:
    assert crf_parameters("irn", colour_rgb=7.0) == CrfParameters(10, 3.0, 3.0, 50.0, 7.0, 10.0)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Refined toy maps."""
    folder = tmp_path_factory.mktemp("toy")
    words = ["cam", "--dataset", "toy", "--limit", "6", "--refine", "caa", "--device", "cpu", "--quiet"]
    assert main([*words, "--out", str(folder / "cams-caa.h5")]) == 0
    return folder


def test_masks(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, soft = tmp_path / "pseudo", tmp_path / "soft.h5"
    words = ["crf", str(toy / "cams-caa.h5"), "--out", str(out), "--soft", str(soft), "--device", "cpu"]
    assert main([*words, "--confidence", "0.9", "--quiet"]) == 0
    seeds, posterior = clipseed.open_cams(toy / "cams-caa.h5"), clipseed.open_cams(soft)
    assert {path.stem for path in out.glob("*.png")} == set(seeds) == set(posterior)
    for key, seed in seeds.items():
        with Image.open(out / f"{key}.png") as image:
            assert image.mode == "P"
            assert image.size == seed.size[::-1]
            assert np.array_equal(np.array(image.getpalette()).reshape(-1, 3)[:256], voc_palette()[:256])
        labels = read_label_mask(out / f"{key}.png")
        assert set(np.unique(labels)) <= {0, 255, *(seed.classes + 1)}
        chances = posterior[key].maps
        everything = np.concatenate([1 - chances.sum(axis=0, keepdims=True), chances])
        certain = everything.max(axis=0)
        assert (labels == 255)[certain < 0.89].all()
        assert not (labels == 255)[certain > 0.91].any()
        kept = labels != 255
        expected = np.concatenate([[0], seed.classes + 1])[everything.argmax(axis=0)]
        assert (labels[kept] == expected[kept]).all()
    capsys.readouterr()
    assert main(words) == 1  # other settings
    assert "--confidence 0.9 then, none now" in capsys.readouterr().err
    assert main([*words, "--confidence", "0.9"]) == 0
    assert "6 of 6 masks, 0 made now" in capsys.readouterr().err
    assert main(["evaluate", str(out), "--gt", "toy", "--pred-ignore", "exclude", "--quiet", "--json"]) == 0


@needs_native
def test_solvers_make_equal_masks(toy: Path, tmp_path: Path) -> None:
    same = total = 0
    for solver in ("torch", "pydensecrf"):
        words = ["crf", str(toy / "cams-caa.h5"), "--solver", solver, "--workers", "1", "--device", "cpu", "--quiet"]
        assert main([*words, "--out", str(tmp_path / solver)]) == 0
        manifest = read_label_mask_manifest(tmp_path / solver)
        assert manifest is not None
        assert manifest["options"]["solver"] == solver
    for path in (tmp_path / "torch").glob("*.png"):
        ours, theirs = read_label_mask(path), read_label_mask(tmp_path / "pydensecrf" / path.name)
        same, total = same + int((ours == theirs).sum()), total + ours.size
    assert same / total >= 0.999


def test_a_folder_of_other_masks_is_left_alone(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (3, 3)).save(tmp_path / "mine.png")
    assert main(["crf", str(toy / "cams-caa.h5"), "--out", str(tmp_path), "--overwrite"]) == 2
    assert "masks that clipseed did not make" in capsys.readouterr().err
    assert (tmp_path / "mine.png").exists()


def test_what_is_not_ours_is_never_deleted(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = str(toy / "cams-caa.h5")
    Path("theirs").mkdir()
    Path("theirs/manifest.json").write_text('{"made": "by hand"}')
    Image.new("L", (3, 3)).save("theirs/mine.png")
    assert main(["crf", source, "--out", "theirs", "--overwrite"]) == 2
    assert "another command's output" in capsys.readouterr().err
    assert main(["crf", source, "--iterations", "0", "--device", "cpu", "--quiet"]) == 0
    Image.new("L", (3, 3)).save("pseudo/mine.png")
    assert main(["crf", source, "--iterations", "0", "--device", "cpu", "--quiet", "--overwrite"]) == 0
    assert Path("pseudo/mine.png").exists()
    for words in (["--soft", source], ["--out", "x", "--soft", "x"], ["--out", source]):
        assert main(["crf", source, *words, "--overwrite"]) == 2
        assert "are both" in capsys.readouterr().err
    assert len(clipseed.open_cams(source)) == 6
    small = ["--smooth-xy", "0.01", "--colour-xy", "0.01", "--colour-rgb", "0.01"]
    assert main(["crf", source, "--out", "small", *small, "--device", "cpu", "--quiet"]) == 2
    assert "too small" in capsys.readouterr().err


@dataclass(frozen=True)
class DeadlyReader:
    """Ends the process on one photo, as a crash in native code does."""

    deadly: str

    def __call__(self, sample: Sample) -> Image.Image:
        from clipseed.data.toy.dataset import ToyReader

        if sample.id == self.deadly:
            os._exit(139)
        return ToyReader(0)(sample)

    def file(self, sample: Sample) -> None:
        return None


@needs_native
@pytest.mark.slow
def test_a_crash_of_the_library_costs_one_image(toy: Path) -> None:
    source = toy / "cams-caa.h5"
    ids = list(clipseed.open_cams(source))
    reader = DeadlyReader(ids[2])
    problem = Problem(replace(CLIP_ES, iterations=1), 1.0, False)
    with DecodePool(NativeSolver(problem, clipseed.open_cams(source), reader), 1, 4) as pool:
        outcomes = dict(pool.stream(Sample(key, Path(key), None) for key in ids))
    failed = [sample.id for sample, outcome in outcomes.items() if isinstance(outcome, Exception)]
    assert failed == [ids[2]]
