"""Projects that move, images that are replaced, labels that go, and runs that find nothing to do."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

import clipseed
from clipseed.cli.main import main
from clipseed.data.stamps import UNKNOWN, FileStamp, file_stamp, is_replaced, replaced
from clipseed.store.differences import differences
from clipseed.store.label_masks import label_mask_note
from clipseed.store.segments import SegmentSet

from helpers.images import photo

CAM = ["cam", "--dataset", "folder", "--images", "photos", "--labels", "labels.csv", "--classes", "classes.yaml",
       "--weights", "tiny.npz", "--device", "cpu"]  # fmt: skip
GRID = ["--points-per-side", "2", "--crop-layers", "0", "--iou-threshold", "-9", "--stability-threshold", "0"]
SAM = ["--checkpoint", "sam.pth", "--device", "cpu", *GRID]
REFINE = ["refine", "caa", "cams.h5", "--device", "cpu"]
CRF = ["crf", "cams-caa.h5", "--device", "cpu"]
THRESHOLD = ["threshold", "cams-caa.h5", "--threshold", "0.4", "--out", "pseudo-threshold"]
SEGMENTS = ["sam-masks", "--seeds", "cams.h5", *SAM]
SEED = ["sam-seed", "cams-caa.h5"]
STAGES = {"cam": CAM, "refine": REFINE, "crf": CRF, "threshold": THRESHOLD, "sam-masks": SEGMENTS, "sam-seed": SEED}


@pytest.fixture
def project(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five photos, two of them alike in size, labels, words and weights in one folder, which is the working one."""
    import torch

    from clipseed.sam.architecture import SamConfig, build_sam

    folder = tmp_path / "project"
    (folder / "photos").mkdir(parents=True)
    for number, (key, size) in enumerate(zip("abcde", [(48, 64), (48, 64), (70, 50), (33, 90), (64, 64)], strict=True)):
        photo(number, *size).save(folder / "photos" / f"{key}.png")
    shutil.move(tiny_weights, folder / "tiny.npz")
    torch.manual_seed(0)
    small = SamConfig(image_size=64, embed_dim=32, depth=2, heads=2, window_size=0, global_attn_indexes=(0, 1))
    torch.save(build_sam(small).state_dict(), folder / "sam.pth")
    write_labels(folder / "labels.csv", a="rust", b="rust|crack", c="crack", d="rust", e="crack")
    write_classes(folder / "classes.yaml")
    monkeypatch.chdir(folder)
    return folder


def write_labels(path: Path, **labels: str) -> None:
    path.write_text("".join(f"{key},{value}\n" for key, value in labels.items()))


def write_classes(path: Path, classes: Any = ("rust", "crack"), background: Any = ("wall", "sky")) -> None:
    path.write_text(json.dumps({"classes": list(classes), "background": list(background)}))


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must succeed, and give what it reports as JSON, with its messages."""

    def call(words: list[str], code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*words, "--json"]) == code, capsys.readouterr().err
        captured = capsys.readouterr()
        return {**json.loads(captured.out), "err": captured.err}

    return call


def computed(run: Run) -> dict[str, int]:
    return {name: run(words)["computed"] for name, words in STAGES.items()}


def digests() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path().rglob("*.png")) if path.parts[0] != "photos"}


def test_a_project_moves_and_goes_on(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """mv of the whole folder: every command has nothing to do, and images and weights are found where they are now."""
    assert set(computed(run).values()) == {5}
    monkeypatch.chdir(project.parent)
    project.rename("elsewhere")
    monkeypatch.chdir(project.parent / "elsewhere")
    for folder in (project, project.parent):
        assert not (folder / "photos").exists()
    assert set(computed(run).values()) == {0}
    # Computing again needs images and weights, which the records name by their old places.
    for words in (REFINE, CRF, SEGMENTS):
        assert run([*words, "--overwrite"])["computed"] == 5
    for path in ("cams.h5", "segments.h5"):
        assert main(["inspect", path, "--preview", "preview.png", "--quiet"]) == 0
    assert "not there any more" not in capsys.readouterr().err


def test_a_renamed_photo_folder(project: Path, run: Run, capsys: Any) -> None:
    """Elsewhere than the outputs say: messages name --images, cam takes the new place up, and what follows knows it."""
    run(CAM)
    Path("photos").rename("images")
    assert main(REFINE) == 1
    error = capsys.readouterr().err
    assert "not there any more" in error
    assert "--images" in error
    assert main(["inspect", "cams.h5", "--preview", "p.png"]) == 1
    assert "--images" in capsys.readouterr().err
    assert main(["inspect", "cams.h5", "--preview", "p.png", "--images", "images"]) == 0
    assert main(["inspect", "cams.h5", "--images", "images"]) == 2
    assert "--images belongs to --preview" in capsys.readouterr().err
    assert run([*REFINE, "--images", "images", "--out", "other.h5"])["computed"] == 5
    assert run(["crf", "other.h5", "--out", "masks", "--device", "cpu"])["computed"] == 5  # as refine was told
    assert run([*SEGMENTS, "--images", "images"])["computed"] == 5
    assert main(["inspect", "segments.h5", "--preview", "p.png"]) == 0
    moved = [word if word != "photos" else "images" for word in CAM]
    assert run(moved)["computed"] == 0
    assert run(REFINE)["computed"] == 5
    assert main([*CRF, "--images", "nowhere"]) == 2
    assert "--images nowhere: no such folder" in capsys.readouterr().err
    assert main([*CRF, "--root", "."]) == 2
    assert "--root belongs to voc and coco" in capsys.readouterr().err


def test_a_devkit_that_moved(devkit: Path, tiny_weights: Path, tmp_path: Path, run: Run, monkeypatch: Any) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    words = ["cam", "--dataset", "voc", "--weights", str(tiny_weights), "--device", "cpu"]
    assert run([*words, "--root", str(devkit)])["computed"] == 6
    (tmp_path / "deep" / "er").mkdir(parents=True)
    root = devkit.rename(tmp_path / "deep" / "er" / "VOC2012")
    assert run([*REFINE, "--root", str(root)])["computed"] == 6
    assert run([*CRF])["computed"] == 6
    assert run(["report", "cams.h5", "--root", str(root), "--gt", str(root / "SegmentationClass")])
    assert "No image" not in Path("report.html").read_text()
    assert main(["inspect", "cams.h5", "--preview", "p.png", "--root", str(root), "--quiet"]) == 0
    assert run([*words, "--root", str(root)])["computed"] == 0
    assert main(["inspect", "cams.h5", "--preview", "p.png", "--quiet"]) == 0  # cam noted the new place


def test_renamed_files_with_equal_content(project: Path, run: Run) -> None:
    """Names of the label file, the class list and the weights are notes."""
    run(CAM)
    for old, new in (("labels.csv", "l_v2.csv"), ("classes.yaml", "words.yaml"), ("tiny.npz", "clip.npz")):
        shutil.copy(old, new)
    names = {"labels.csv": "l_v2.csv", "classes.yaml": "words.yaml", "tiny.npz": "clip.npz"}
    assert run([names.get(word, word) for word in CAM])["computed"] == 0
    write_labels(Path("l_v2.csv"), a="rust", b="rust|crack", c="rust", d="rust", e="crack")
    assert run([names.get(word, word) for word in CAM])["computed"] == 1


def replace_photo(key: str, size: tuple[int, int], *, keep_time: bool = False) -> None:
    path = Path("photos") / f"{key}.png"
    before = path.stat()
    photo(99, *size).save(path)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("size", [(48, 64), (40, 64)], ids=["same-size", "other-size"])
def test_a_replaced_photo_is_made_again_everywhere(size: tuple[int, int], project: Path, run: Run) -> None:
    assert set(computed(run).values()) == {5}
    before, old = digests(), clipseed.open_cams("cams.h5")["a"]
    replace_photo("a", size)
    # What would mix the old maps with the new image refuses it.
    assert run([*REFINE, "--out", "other.h5"], 3)["skipped"][0]["id"] == "a"
    found = run(CAM)
    assert (found["found"], found["computed"]) == (4, 1)
    assert "1 image was replaced (a)" in found["err"]
    assert run(SEED)["computed"] == 0  # refine has not looked yet
    assert run(REFINE)["computed"] == 1
    assert run(CRF)["computed"] == run(THRESHOLD)["computed"] == 1
    skipped = run(SEED, 3)["skipped"]  # its segments are still those of the old image
    assert [item["id"] for item in skipped] == ["a"]
    assert "run clipseed sam-masks again" in skipped[0]["reason"] or size != (48, 64)
    assert not Path("pseudo-sam/a.png").exists()
    assert run(SEGMENTS)["computed"] == 1
    assert run(SEED)["computed"] == 1
    assert set(computed(run).values()) == {0}
    new = clipseed.open_cams("cams.h5")["a"]
    assert new.size == size
    assert not np.array_equal(old.maps, new.maps)
    after = digests()
    assert {key for key in before if before[key] != after[key]} <= {
        f"{out}/a.png" for out in ("pseudo", "pseudo-threshold", "pseudo-sam")
    }
    # The same as if everything had been made of the new image in the first place.
    for words, out in ((CAM, "cams.h5"), (REFINE, "cams-caa.h5"), (SEGMENTS, "segments.h5")):
        there = Path(out).read_bytes()
        assert run([*words, "--overwrite"])["computed"] == 5
        assert Path(out).read_bytes() == there, out


def test_copies_are_not_replacements(project: Path, run: Run) -> None:
    """Other times with the same content, as cp, git and containers leave them, cost no computing."""
    run(CAM)
    for path in Path("photos").iterdir():
        os.utime(path, ns=(1, 1))
    assert run(CAM)["computed"] == 0
    assert run(SEGMENTS)["computed"] == 5
    shutil.copytree("photos", "copy", copy_function=shutil.copyfile)
    assert run([*SEGMENTS, "--images", "copy"])["computed"] == 0


def test_stamps(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    stamp = file_stamp(path)
    assert (stamp.length, stamp.time) == (3, path.stat().st_mtime_ns)
    assert stamp.sha256.hex() == "ba7816bf8f01cfea414140de5dae2223"  # FIPS 180-4's example, its first half
    assert FileStamp.unpacked(stamp.packed()) == stamp
    assert not is_replaced(stamp, path)
    path.write_bytes(b"abd")
    os.utime(path, ns=(5, stamp.time + 1))
    assert is_replaced(stamp, path)
    os.utime(path, ns=(5, stamp.time))
    assert not is_replaced(stamp, path)  # what cannot be told without reading
    path.write_bytes(b"abcd")
    os.utime(path, ns=(5, stamp.time))
    assert is_replaced(stamp, path)
    assert not is_replaced(UNKNOWN, path)
    assert replaced([("x", stamp, path), ("y", UNKNOWN, path), ("z", stamp, None)]) == {"x"}
    path.unlink()
    assert not is_replaced(stamp, path)  # gone is not replaced
    assert file_stamp(path) == UNKNOWN
    os.mkfifo(path)
    assert file_stamp(path) == UNKNOWN


def test_files_say_what_they_were_made_from(project: Path, run: Run) -> None:
    computed(run)
    wanted = {key: file_stamp(Path("photos") / f"{key}.png") for key in "abcde"}
    for opened in (clipseed.open_cams("cams.h5"), clipseed.open_cams("cams-caa.h5"), SegmentSet(Path("segments.h5"))):
        assert {key: opened.stamp(key) for key in opened} == wanted
        assert {key: opened[key].stamp for key in opened} == wanted
    for key, stamp in wanted.items():
        for folder in ("pseudo", "pseudo-sam"):
            assert label_mask_note(Path(folder) / f"{key}.png").image.sha256 == stamp.sha256


def test_stamps_can_be_read_without_clipseed(project: Path, run: Run) -> None:
    run(CAM)
    with h5py.File("cams.h5") as file:
        for row, key in enumerate(file["id"][:]):
            content = (Path("photos") / f"{key.decode()}.png").read_bytes()
            assert file["file_sha256"][row].tobytes() == hashlib.sha256(content).digest()[:16]
            assert file["file_bytes"][row] == len(content)


def without_stamps(path: str) -> None:
    """The file as an older version would have written it: without stamps, and with the checksum of what it has."""
    from clipseed.store.layout import Checksum
    from clipseed.store.open import format_of

    form = format_of(Path(path))
    with h5py.File(path, "r+") as file:
        for name in ("file_bytes", "file_time", "file_sha256"):
            del file[name]
        checksum = Checksum(form.stored_in(file))
        for name in form.stored_in(file):
            checksum.add(name, file[name][...])
        file.attrs["checksum"] = checksum.hexdigest(str(file.attrs["manifest"]))


def test_outputs_of_older_versions(project: Path, run: Run) -> None:
    """They open, go on, and are never taken for replaced; what is added to them has stamps."""
    computed(run)
    for path in ("cams.h5", "cams-caa.h5", "segments.h5"):
        without_stamps(path)
    assert clipseed.open_cams("cams.h5", verify=True)["a"].stamp == UNKNOWN
    assert set(computed(run).values()) == {0}
    replace_photo("a", (48, 64))
    assert run(CAM)["computed"] == 0
    write_labels(Path("labels.csv"), a="rust", b="crack", c="crack", d="rust", e="crack")
    assert run(CAM)["computed"] == 1
    assert [key for key in "abcde" if clipseed.open_cams("cams.h5").stamp(key).known] == ["b"]
    assert run(REFINE)["computed"] == 1


def test_stamps_are_all_or_none(project: Path, run: Run) -> None:
    run(CAM)
    with h5py.File("cams.h5", "r+") as file:
        del file["file_time"]
    with pytest.raises(clipseed.errors.StoreError, match="dataset 'file_time' is missing"):
        clipseed.open_cams("cams.h5")
    with h5py.File("cams.h5", "r+") as file:
        for name in ("file_bytes", "file_sha256"):
            del file[name]
    with pytest.raises(clipseed.errors.StoreError, match="its checksum does not match"):
        clipseed.open_cams("cams.h5", verify=True)


def test_a_removed_label_row_leaves_everywhere(project: Path, run: Run) -> None:
    computed(run)
    write_labels(Path("labels.csv"), a="rust", b="rust|crack", c="crack", d="rust")
    found = run(CAM, 3)
    assert "1 image has no labels any more (e); gone from cams.h5" in found["err"]
    assert "computed again" not in found["err"]
    assert list(clipseed.open_cams("cams.h5")) == ["a", "b", "c", "d"]
    assert run(REFINE)["computed"] == 0
    assert list(clipseed.open_cams("cams-caa.h5")) == ["a", "b", "c", "d"]
    for words, out in ((CRF, "pseudo"), (THRESHOLD, "pseudo-threshold"), (SEED, "pseudo-sam")):
        assert run(words)["computed"] == 0
        assert sorted(path.stem for path in Path(out).glob("*.png")) == ["a", "b", "c", "d"]
    write_labels(Path("labels.csv"), a="rust", b="rust|crack", c="crack", d="rust", e="rust")
    assert {name: count for name, count in computed(run).items() if name != "sam-masks"} == dict.fromkeys(
        ("cam", "refine", "crf", "threshold", "sam-seed"), 1
    )


def test_a_label_file_of_other_images_is_refused(project: Path, run: Run, capsys: Any) -> None:
    run(CAM)
    before = Path("cams.h5").read_bytes()
    write_labels(Path("labels.csv"), a="rust", b="rust")
    assert main(CAM) == 1
    assert "3 of the 5 images that it holds have no labels now" in capsys.readouterr().err
    assert Path("cams.h5").read_bytes() == before


def test_a_trial_on_a_few_images_deletes_nothing(project: Path, run: Run) -> None:
    """Another, smaller input with the same settings: what the larger one made stays, however often it is run."""
    computed(run)
    assert run([*CAM, "--limit", "2", "--out", "try.h5"])["computed"] == 2
    assert run(["refine", "caa", "try.h5", "--out", "try-caa.h5", "--device", "cpu"])["computed"] == 2
    for _ in range(2):
        assert run(["refine", "caa", "try.h5", "--out", "cams-caa.h5", "--device", "cpu"])["computed"] == 0
        assert run(["crf", "try-caa.h5", "--device", "cpu"])["computed"] == 0
    assert len(clipseed.open_cams("cams-caa.h5")) == 5
    assert len(list(Path("pseudo").glob("*.png"))) == 5


def test_replaced_photos_are_tagged_again(project: Path, run: Run) -> None:
    words = [word if word != "labels.csv" else "auto" for word in CAM]
    assert run(words)["tags"]["tagged"] == 5
    replace_photo("b", (48, 64))
    found = run(words)
    assert found["computed"] == 1
    assert "5 images tagged by CLIP (1 now)" in found["err"]
    assert run(words)["computed"] == 0


def test_corrected_tags_are_taken_up_by_the_same_output(project: Path, run: Run) -> None:
    words = [word if word != "labels.csv" else "auto" for word in CAM]
    run(words)
    tags = {key: set(clipseed.open_cams("cams.h5")[key].classes.tolist()) for key in "abcde"}
    write_labels(Path("cams.labels.csv"), **{key: "|".join(map(str, sorted(tags[key]))) for key in "abcd"}, e="crack")
    changed = sum(list(clipseed.open_cams("cams.h5")[key].classes) != sorted(tags[key]) for key in "abcd")
    found = run([word if word != "labels.csv" else "cams.labels.csv" for word in CAM])
    assert found["computed"] == changed + (tags["e"] != {1})
    assert clipseed.open_cams("cams.h5")["e"].classes.tolist() == [1]


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model from here on fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    for name in ("clipseed.clip.model._assemble", "clipseed.clip.model.read_checkpoint",
                 "clipseed.clip.model.encode_vocabulary", "clipseed.sam.load.assemble",
                 "clipseed.sam.load.read_sam_checkpoint"):  # fmt: skip
        monkeypatch.setattr(name, refuse)


def test_with_nothing_to_do_no_model_is_loaded(project: Path, run: Run, request: Any, capsys: Any) -> None:
    tagged = [*(word if word != "labels.csv" else "auto" for word in CAM), "--out", "tagged.h5"]
    assert "loading tiny.npz" in run(tagged)["err"]
    assert "loading tiny.npz" in run(CAM)["err"]
    assert "loading tiny.npz" in run(REFINE)["err"]
    assert "loading SAM (sam.pth)" in run(SEGMENTS)["err"]
    shards = [*CAM, "--out", "shards"]
    run(shards)
    request.getfixturevalue("no_models")
    for words in (CAM, tagged, REFINE, SEGMENTS, shards):
        found = run(words)
        assert found["computed"] == 0
        assert "loading" not in found["err"]
    for quiet in ([], ["--quiet"]):
        assert main([*CAM, "--out", "more.h5", *quiet]) == 1
        error = capsys.readouterr().err
        assert "a model is loaded" in error
        assert ("loading tiny.npz" in error) == (not quiet)


def test_other_weights_are_noticed_without_loading_them(project: Path, run: Run, capsys: Any) -> None:
    run(CAM)
    with np.load("tiny.npz") as arrays:
        state = dict(arrays)
    state["visual.proj"] = state["visual.proj"] * 2
    np.savez("other.npz", **state)
    assert main([word if word != "tiny.npz" else "other.npz" for word in CAM]) == 1
    error = capsys.readouterr().err
    assert "other weights: tiny.npz (sha256 " in error
    assert "other.npz (sha256" in error
    assert main([*CAM, "--precision", "bf16"]) == 1
    assert "--precision fp32 then, bf16 now" in capsys.readouterr().err


def test_refine_with_nothing_to_do_satisfies_make(project: Path, run: Run) -> None:
    run(CAM)
    run(REFINE)
    content = Path("cams-caa.h5").read_bytes()
    later = Path("cams-caa.h5").stat().st_mtime_ns + 10**9
    os.utime("cams.h5", ns=(later, later))
    os.utime("cams-caa.h5", ns=(1, 1))
    assert run(REFINE)["computed"] == 0
    assert Path("cams-caa.h5").stat().st_mtime > 2
    assert Path("cams-caa.h5").read_bytes() == content


def test_changed_words_are_told(project: Path, run: Run, capsys: Any) -> None:
    run(CAM)

    def told(classes: Any = ("rust", "crack"), background: Any = ("wall", "sky"), *words: str) -> str:
        write_classes(Path("classes.yaml"), classes, background)
        capsys.readouterr()
        assert main([*CAM, *words]) == 1
        return str(capsys.readouterr().err)

    assert "class 'bird' was added" in told(("rust", "crack", "bird"))
    other = told(("rust", {"name": "crack", "text": "thin crack", "synonyms": ["fissure"]}))
    assert "class 'crack' is called by other words now: thin crack, fissure; then: crack" in other
    assert "the classes have another order: rust, crack then, crack, rust now" in told(("crack", "rust"))
    changed = told(background=("wall", "grass"))
    assert "background word 'sky' was removed" in changed
    assert "background word 'grass' was added" in changed
    assert "--max-side 640 then, 512 now" in told(("rust", "crack"), ("wall", "sky"), "--max-side", "512")


def test_differences_of_what_an_output_was_made_from() -> None:
    source = {"kind": "cam", "method": "softmax-gradcam", "options": {"max_side": 640}}
    one = {"kind": "crf", "method": "dense-crf", "options": {"alpha": 1.0}, "source": source}
    other = {**source, "options": {"max_side": 512}}
    assert differences(one, {**one, "source": other}) == ["what it was made from: --max-side 640 then, 512 now"]
    assert differences(one, {**one, "kind": "sam-seed"}) == ["made by clipseed crf then, clipseed sam-seed now"]
    moved = {"dataset": {"name": "voc", "root": "/a", "images": "/a/b", "split": "train"}}
    assert differences(moved, {"dataset": {**moved["dataset"], "root": "/c", "images": "/c/b"}}) == []
    assert differences(moved, {"dataset": {**moved["dataset"], "split": "val"}}) == ["--split train then, val now"]


def test_imported_masks_are_known_by_their_content(project: Path, run: Run, capsys: Any) -> None:
    """The same files elsewhere go on; other files in the same place are refused."""
    for key in "abcde":
        (Path("sam") / key).mkdir(parents=True)
        size = Image.open(Path("photos") / f"{key}.png").size
        mask = np.zeros(size[::-1], np.uint8)
        mask[:9, :9] = 255
        Image.fromarray(mask).save(Path("sam") / key / "0.png")
    run(CAM)
    words = ["sam-masks", "--seeds", "cams.h5", "--import"]
    assert run([*words, "sam"])["computed"] == 5
    Path("sam").rename("sam2")
    assert run([*words, "sam2"])["computed"] == 0
    assert run(["sam-seed", "cams.h5", "--masks", "sam2"])["computed"] == 5
    Path("sam2").rename("sam3")
    assert run(["sam-seed", "cams.h5", "--masks", "sam3"])["computed"] == 0
    shutil.copy("sam3/a/0.png", "sam3/a/1.png")
    assert main(["sam-seed", "cams.h5", "--masks", "sam3"]) == 1
    assert "other masks" in capsys.readouterr().err
