"""`clipseed refine` and `cam --refine`: the released numbers through the program, resumption, wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import clipseed
from clipseed.cli.main import main
from clipseed.refine.affinity import balance, spread
from clipseed.refine.boxes import boxes_of
from clipseed.refine.caa import CaaOptions, caa
from clipseed.refine.par import refine_par
from clipseed.store.manifest import differences

from helpers.golden import CASES, CLIP_ES_DATA, SETS, case, vocabulary
from helpers.images import photo

TOY = ["--dataset", "toy", "--device", "cpu", "--quiet"]


def refined_cams(folder: Path, count: int = 6) -> Path:
    """Toy class activation maps in a folder of their own."""
    out = folder / "cams.h5"
    assert main(["cam", *TOY, "--limit", str(count), "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("folder", SETS)
def test_released_maps_through_the_program(folder: str, tmp_path: Path) -> None:
    """cam --paper, then refine caa with nothing else: the released final maps, for VOC's and COCO's constants."""
    images = tmp_path / "images"
    images.mkdir()
    names = [name for case_folder, name in CASES if case_folder == folder]
    labels = {name: [int(key) for key in case(folder, name)["keys"]] for name in names}
    for name in names:
        Image.fromarray(case(folder, name)["image"]).save(images / f"{name}.png")
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    assert main([
        "cam", "--dataset", "folder", "--images", str(images), "--labels", str(tmp_path / "labels.json"),
        "--classes", vocabulary(folder), "--weights", str(CLIP_ES_DATA / folder / "weights.npz"), "--paper",
        "--precision", "fp32", "--device", "cpu", "--out", str(tmp_path / "cams.h5"), "--quiet",
    ]) == 0  # fmt: skip
    assert main(["refine", "caa", str(tmp_path / "cams.h5"), "--quiet", "--device", "cpu"]) == 0
    seeds = clipseed.open_cams(tmp_path / "cams-caa.h5")
    assert seeds.manifest["options"]["box_threshold"] == {"voc": 0.4, "coco": 0.7}[vocabulary(folder)]
    for name in names:
        np.testing.assert_allclose(seeds[name].upsampled(), case(folder, name)["attn_highres"], atol=5e-5, rtol=0)


def test_one_pass_equals_two_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["cam", *TOY, "--limit", "12"]) == 0
    assert main(["refine", "caa", "--quiet", "--device", "cpu"]) == 0
    Path("cams-caa.h5").rename("two.h5")
    assert main(["cam", *TOY, "--limit", "12", "--refine", "caa"]) == 0
    one, two = clipseed.open_cams("cams-caa.h5"), clipseed.open_cams("two.h5")
    assert differences(one.manifest, two.manifest) == []
    assert list(one) == list(two)
    for key in one:
        np.testing.assert_allclose(one[key].maps, two[key].maps, atol=1.1e-3)
        assert one[key].maps.max() == pytest.approx(1)
    assert differences(one.manifest, clipseed.open_cams("cams.h5").manifest) != []


def test_batches_do_not_matter(tmp_path: Path) -> None:
    cams = refined_cams(tmp_path, 10)
    for name, size in (("a.h5", "1"), ("b.h5", "8")):
        words = ["refine", "caa", str(cams), "--out", str(tmp_path / name), "--batch-size", size, "--device", "cpu"]
        assert main([*words, "--quiet"]) == 0
    one, many = clipseed.open_cams(tmp_path / "a.h5"), clipseed.open_cams(tmp_path / "b.h5")
    for key in one:
        np.testing.assert_allclose(one[key].maps, many[key].maps, atol=1.1e-3)


def test_spreading_against_plain_loops() -> None:
    rng = np.random.default_rng(0)
    weights = rng.random((12, 12))
    expected = weights.copy()
    for _ in range(3):
        for column in range(12):
            expected[:, column] /= expected[:, column].sum()
        for row in range(12):
            expected[row] /= expected[row].sum()
    expected = (expected + expected.T) / 2
    ours = balance(torch.from_numpy(weights)[None])[0]
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-6)
    maps = rng.random((2, 3, 4)).astype(np.float32)
    power = expected @ expected @ expected
    reached = spread(ours[None], torch.from_numpy(maps)[None], 3)[0]
    np.testing.assert_allclose(reached.numpy().reshape(2, -1), maps.reshape(2, -1) @ power.T, atol=1e-5)


def test_boxes_reach_the_border_unless_the_released_code_is_asked_for() -> None:
    cam = np.zeros((5, 6), np.float32)
    cam[4, 5] = 1
    assert boxes_of(cam, 0.4) == [(5, 4, 6, 5)]
    assert boxes_of(cam, 0.4, released=True) == [(5, 4, 5, 4)]  # empty
    attention = torch.full((1, 30, 30), 1 / 30) + torch.eye(30)
    (ours,) = caa([torch.from_numpy(cam)[None]], attention)
    assert ours.argmax() == 29
    (theirs,) = caa([torch.from_numpy(cam)[None]], attention, CaaOptions(released=True))
    assert theirs.max() == 0


def test_maps_of_zero_stay_zero() -> None:
    cams = [torch.zeros(2, 3, 3), torch.rand(1, 3, 3), torch.zeros(0, 3, 3)]
    first, second, third = caa(cams, torch.rand(3, 9, 9))
    assert first.max() == 0
    assert second.max() == 1
    assert third.shape == (0, 3, 3)


def plain_par(mask: np.ndarray, image: np.ndarray, dilations: tuple[int, ...]) -> np.ndarray:
    """One iteration of PAR, pixel by pixel."""
    height, width = image.shape[1:]
    out = np.zeros_like(mask)
    steps = [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    away = np.array([np.hypot(*step) for step in steps])
    near = np.exp(-((away / (away.std(ddof=1) + 1e-8) / 0.3) ** 2))
    near /= near.sum()
    for y in range(height):
        for x in range(width):
            places = [(min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)) for dy, dx in steps]
            around = np.array([image[:, py, px] for py, px in places])
            spreads = around.std(axis=0, ddof=1) + 1e-8
            likeness = -(((np.abs(around - image[:, y, x]) / spreads / 0.3) ** 2).mean(axis=1))
            weights = np.exp(likeness - likeness.max())
            weights = weights / weights.sum() + 0.01 * near
            out[:, y, x] = sum(w * mask[:, py, px] for w, (py, px) in zip(weights, places, strict=True))
    return out


def test_par_against_plain_loops() -> None:
    rng = np.random.default_rng(1)
    mask, image = rng.random((2, 7, 9)), rng.random((3, 7, 9))
    expected = plain_par(plain_par(mask, image, (1, 3)), image, (1, 3))
    ours = refine_par(torch.from_numpy(mask)[None], torch.from_numpy(image)[None], 2, (1, 3))[0]
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


def test_par_and_js_through_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refined_cams(tmp_path)
    assert main(["refine", "js", "--quiet", "--device", "cpu"]) == 0
    Path("cams-js.h5").unlink()
    assert main(["refine", "caa", "--quiet", "--device", "cpu"]) == 0
    assert main(["refine", "par", "--quiet", "--device", "cpu"]) == 0  # of cams-caa.h5, the stage before
    seeds = clipseed.open_cams("cams-caa-par.h5")
    for seed in seeds.values():
        assert seed.maps.shape[1:] == seed.size
        assert 0 <= seed.maps.min() <= seed.maps.max() <= 1
    assert seeds.manifest["source"]["method"] == "caa"
    assert main(["evaluate", "--gt", "toy", "--quiet", "--json"]) == 0
    assert main(["refine", "caa", "cams-caa-par.h5", "--out", "x.h5", "--quiet"]) == 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--box-threshold", "1"], 2, "--box-threshold 1.0: give a share of the peak"),
        (["--layers", "0"], 2, "--layers 0: give a number from 1"),
        (["--power", "0"], 2, "--power 0"),
        (["--rounds", "-1"], 2, "--rounds -1"),
        (["--weights", "MISSING.npz"], 1, "no such file"),
        (["--weights", str(CLIP_ES_DATA / SETS[0] / "weights.npz")], 1, "not the weights that"),
        (["--out", "SOURCE"], 2, "is the file that is being refined"),
        (["--images", "NOWHERE"], 2, "no such folder"),
    ],
)
def test_wrong_use(
    words: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cams = refined_cams(tmp_path, 2)
    given = [str(cams) if word == "SOURCE" else str(tmp_path / word) if word == "NOWHERE" else word for word in words]
    assert main(["refine", "caa", str(cams), "--device", "cpu", *given]) == code
    assert message in capsys.readouterr().err


def test_images_that_moved_or_changed(
    tmp_path: Path, devkit: Path, tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cams = tmp_path / "cams.h5"
    words = ["--dataset", "voc", "--root", str(devkit), "--weights", str(tiny_weights), "--out", str(cams)]
    assert main(["cam", *words, "--device", "cpu", "--quiet"]) == 0
    images = devkit / "JPEGImages"
    images.rename(tmp_path / "elsewhere")
    original = (tmp_path / "elsewhere" / "2007_000003.jpg").read_bytes()
    assert main(["refine", "caa", str(cams), "--device", "cpu"]) == 1
    assert "not there any more" in capsys.readouterr().err
    moved = ["refine", "caa", str(cams), "--images", str(tmp_path / "elsewhere"), "--device", "cpu", "--quiet"]
    assert main(moved) == 0
    (tmp_path / "elsewhere" / "2007_000003.jpg").unlink()
    assert main([*moved, "--overwrite"]) == 3
    assert "2007_000003" in (tmp_path / "cams-caa.skipped.csv").read_text()
    photo(2, 50, 70).save(tmp_path / "elsewhere" / "2007_000003.jpg")
    assert main(moved) == 3
    assert "the image is 70x50 pixels now, 50x70 when its CAMs were made" in (
        tmp_path / "cams-caa.skipped.csv"
    ).read_text().replace('"', "")
    photo(3, 70, 50).save(tmp_path / "elsewhere" / "2007_000003.jpg")
    assert main(moved) == 3
    assert "the image is another one than its maps were made from" in (tmp_path / "cams-caa.skipped.csv").read_text()
    (tmp_path / "elsewhere" / "2007_000003.JpG").write_bytes(original)
    (tmp_path / "elsewhere" / "2007_000003.jpg").unlink()
    assert main(moved) == 0  # suffixes are found in any case
    assert len(clipseed.open_cams(tmp_path / "cams-caa.h5")) == 6


def test_corrected_labels_are_taken_up(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run after the label file was edited redoes what it changes, in every stage and every kind of output."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number in range(5):
        photo(number, 48, 64).save(f"photos/{number}.png")
    Path("classes.txt").write_text("rust\ncrack\nhole\n")
    cam = ["cam", "--dataset", "folder", "--images", "photos", "--labels", "labels.txt", "--classes", "classes.txt"]
    cam += ["--weights", str(tiny_weights), "--device", "cpu", "--quiet"]

    def run() -> None:
        assert main(cam) == 0
        assert main([*cam, "--out", "shards"]) == 0
        assert main(["refine", "caa", "cams.h5", "--device", "cpu", "--quiet"]) == 0
        assert main(["crf", "--iterations", "1", "--soft", "soft.h5", "--device", "cpu", "--quiet"]) == 0

    Path("labels.txt").write_text("".join(f"{k} rust crack\n" for k in range(5)))
    run()
    Path("labels.txt").write_text("".join(f"{k} rust crack\n" for k in range(4)) + "4 hole\n")
    run()
    for name in ("cams.h5", "shards", "cams-caa.h5", "soft.h5"):
        seeds = clipseed.open_cams(name)
        assert sorted(seeds) == list("01234")
        assert seeds["4"].classes.tolist() == [2], name
        assert seeds["3"].classes.tolist() == [0, 1], name
    assert set(np.unique(np.asarray(Image.open("pseudo/4.png")))) <= {0, 3}


def test_damaged_maps_are_skipped(tmp_path: Path) -> None:
    cams = refined_cams(tmp_path, 3)
    with h5py.File(cams, "r+") as file:
        file["cam"][0] = np.nan
        file.attrs["checksum"] = _checksum(file)
    for words in (["refine", "caa"], ["refine", "par"], ["crf", "--iterations", "1"]):
        out = tmp_path / "-".join(words)
        name = out if words[0] == "crf" else out.with_suffix(".h5")
        assert main([*words, str(cams), "--out", str(name), "--device", "cpu", "--quiet"]) == 3
    assert "NaN" in (tmp_path / "refine-caa.skipped.csv").read_text()
    assert "NaN" in (tmp_path / "crf---iterations-1" / "skipped.csv").read_text()
    assert len(list((tmp_path / "crf---iterations-1").glob("*.png"))) == 2


def _checksum(file: h5py.File) -> str:
    from clipseed.store.cam_records import cam_format
    from clipseed.store.layout import Checksum

    checksum = Checksum(cam_format().datasets)
    for name in cam_format().datasets:
        checksum.add(name, file[name][:])
    return checksum.hexdigest(str(file.attrs["manifest"]))
