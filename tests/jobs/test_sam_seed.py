"""``clipseed sam-seed``: each rule beside its own function, masks that are missing or do not fit, resuming, scoring."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipseed.cli.main import main
from clipseed.errors import UsageError
from clipseed.jobs import sam_seed
from clipseed.pseudo.background import Background
from clipseed.pseudo.pixels import label_pixels
from clipseed.pseudo.prompted import label_from_prompted_masks
from clipseed.pseudo.rules import RuleOptions, decide
from clipseed.pseudo.seeding import PRESETS, seed_from_masks
from clipseed.pseudo.voting import VotingOptions, vote
from clipseed.segments import enlarged, from_masks
from clipseed.store.label_masks import label_mask_note, read_label_mask, write_label_mask
from clipseed.store.segment_records import pack_segments, segment_format
from clipseed.store.writer import RecordWriter

from helpers.records import GRID, SIZE, make_cam, rectangles, small_manifest, write_cache, write_seeds

SEEDS = [make_cam("a", (7, 2), 0), make_cam("b", (), 1), make_cam("sub/c", (0,), 2), make_cam("d", (4, 19, 2), 3)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder: four images' CAMs, and their masks at half their size."""
    write_seeds(tmp_path / "cams.h5", SEEDS, small_manifest(tmp_path))
    records = [pack_segments(seed.id, SIZE, rectangles(GRID, k)) for k, seed in enumerate(SEEDS)]
    write_cache(tmp_path / "segments.h5", records)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def seeded(*words: object) -> int:
    return main(["sam-seed", *map(str, words)])


def labels(out: str = "pseudo-sam") -> dict[str, np.ndarray]:
    return {seed.id: read_label_mask(Path(out) / f"{seed.id}.png") for seed in SEEDS}


# Rules ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], PRESETS["voc-coarse"]),
        (["--preset", "voc-fine"], PRESETS["voc-fine"]),
        (["--alpha", "2.5"], replace(PRESETS["voc-coarse"], background=Background("power", 2.5))),
        (["--uncovered", "cam"], replace(PRESETS["voc-coarse"], uncovered="cam")),
        (["--uncovered", "ignore", "--paper"], replace(PRESETS["voc-coarse"], uncovered="ignore", paper=True)),
        (["--min-confidence", "0.7"], replace(PRESETS["voc-coarse"], min_confidence=0.7)),
    ],
)
def test_fma(words: list[str], options: object, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels of the small masks, each pixel of the image taking its nearest one's."""
    assert seeded(*words) == 0
    said = capsys.readouterr().err
    assert "reading cams.h5" in said
    assert "pseudo-sam: 4 of 4 masks, 4 made now" in said
    found = labels()
    for k, seed in enumerate(SEEDS):
        small = seed_from_masks(seed.maps, rectangles(GRID, k), seed.classes, options).labels
        wanted = np.asarray(Image.fromarray(small).resize((SIZE[1], SIZE[0]), Image.Resampling.NEAREST))
        np.testing.assert_array_equal(found[seed.id], wanted)
        assert label_mask_note(folder / "pseudo-sam" / f"{seed.id}.png").classes == tuple(seed.classes.tolist())
    assert len(np.unique(np.concatenate([mask.ravel() for mask in found.values()]))) > 3
    with Image.open("pseudo-sam/a.png") as image:
        assert (image.mode, image.size) == ("P", (64, 48))


@pytest.mark.parametrize(("vocabulary", "alpha"), [("coco", 0.3), ("coco-corrected", 0.3), ("voc", 0.6), ("pets", 0.6)])
def test_the_preset_follows_the_vocabulary(vocabulary: str, alpha: float) -> None:
    rules = decide(RuleOptions(), vocabulary, label_map=False, asked=False)
    assert (rules.method, rules.manifest()["alpha"]) == ("fma", alpha)


def test_pixels_alone(folder: Path) -> None:
    """No masks are looked at, so none need be there."""
    (folder / "segments.h5").unlink()
    assert seeded("--method", "pixel", "--alpha", "3") == 0
    for seed in SEEDS:
        wanted = label_pixels(seed.maps, seed.classes, SIZE, Background("power", 3.0)).labels
        np.testing.assert_array_equal(labels()[seed.id], wanted)


@pytest.mark.parametrize("paper", [False, True])
def test_voting_from_maps(paper: bool, folder: Path) -> None:
    assert seeded("--method", "vote", *(["--paper"] if paper else [])) == 0
    for k, seed in enumerate(SEEDS):
        before = label_pixels(seed.maps, seed.classes, GRID, Background("power", 2.0), paper=paper).labels
        wanted = vote(before, rectangles(GRID, k).masks, VotingOptions(paper=paper))
        np.testing.assert_array_equal(labels()[seed.id], enlarged(wanted, SIZE))


@pytest.mark.parametrize("ours", [False, True])
def test_voting_from_label_masks(ours: bool, folder: Path) -> None:
    """A folder of anybody's masks; the segments grow to their size, so no label loses its outline."""
    assert seeded("--method", "pixel", "--out", "pseudo") == 0
    if not ours:
        (folder / "pseudo" / "manifest.json").unlink()
        for seed in SEEDS:
            write_label_mask(folder / "pseudo" / f"{seed.id}.png", labels("pseudo")[seed.id])
    assert seeded("pseudo", "--uncovered", "background") == 0
    for k, seed in enumerate(SEEDS):
        masks = enlarged(rectangles(GRID, k).masks, SIZE)
        wanted = vote(labels("pseudo")[seed.id], masks, VotingOptions(keep_uncovered=False))
        np.testing.assert_array_equal(labels()[seed.id], wanted)
    manifest = json.loads((folder / "pseudo-sam" / "manifest.json").read_text())
    assert manifest["method"] == "vote"
    assert ("vocabulary" in manifest) == ours


def test_masks_that_were_asked_for(folder: Path) -> None:
    """Each mask keeps its class; where two overlap, the one whose map is stronger inside wins."""
    seed = SEEDS[3]
    proposals = rectangles(SIZE, 9, 5)
    asked = [2, 4, 11, 19, -1]  # 11 is not among the image's classes, -1 was asked for nothing
    write_cache(folder / "asked.h5", [pack_segments("d", SIZE, proposals, asked)], "voc")
    assert seeded("--masks", "asked.h5") == 0
    rows, kept = np.array([2, 0, 1]), [0, 1, 3]
    answers = np.where(proposals.masks[kept], 1.0, -1.0)
    wanted = label_from_prompted_masks(answers, rows, seed.maps, seed.classes)
    np.testing.assert_array_equal(labels()["d"], wanted)
    assert len(np.unique(wanted)) > 2
    assert json.loads(Path("pseudo-sam/manifest.json").read_text())["method"] == "prompted"
    assert seeded("--masks", "asked.h5", "--out", "ignored", "--uncovered", "ignore") == 0
    expected = np.where(proposals.masks[kept].any(axis=0), wanted, 255)
    np.testing.assert_array_equal(labels("ignored")["d"], expected)
    assert seeded("--masks", "asked.h5", "--out", "plain", "--method", "fma") == 0
    plain = seed_from_masks(seed.maps, proposals, seed.classes).labels
    np.testing.assert_array_equal(labels("plain")["d"], plain)


def test_masks_asked_for_with_other_classes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cache(folder / "asked.h5", [pack_segments("d", SIZE, rectangles(SIZE, 9, 1), [2])], "coco")
    assert seeded("--masks", "asked.h5") == 2
    assert "its masks were asked for with other classes than those of cams.h5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("small", "large"), [((1, 1), (3, 4)), ((5, 7), (5, 7)), ((24, 31), (48, 64)), ((68, 102), (200, 301))]
)
def test_enlarging_takes_the_nearest(small: tuple[int, int], large: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(0, 256, small).astype(np.uint8)
    rows, columns = (
        [int(Fraction(2 * k + 1, 2) * short / long) for k in range(long)]
        for short, long in zip(small, large, strict=True)
    )
    wanted = np.array([[values[row, column] for column in columns] for row in rows])
    np.testing.assert_array_equal(enlarged(values, large), wanted)
    np.testing.assert_array_equal(enlarged(values[None].repeat(2, 0), large)[1], wanted)


# Masks that are missing or do not fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["background", "ignore", "cam"])
def test_images_without_masks(policy: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One is not in the cache, one is there with no mask; both are labelled as the policy says, and told apart."""
    empty = from_masks(np.zeros((0, *GRID), bool))
    records = [pack_segments("b", SIZE, rectangles(GRID, 1)), pack_segments("a", SIZE, empty),
               pack_segments("d", SIZE, rectangles(GRID, 3))]  # fmt: skip
    write_cache(folder / "few.h5", records)
    assert seeded("--masks", "few.h5", "--without-masks", policy) == 0
    said = capsys.readouterr().err
    assert "warning: 1 image is not in few.h5" in said
    assert (folder / "pseudo-sam" / "without-masks.csv").read_text() == "id,reason\nsub/c,not in few.h5\n"
    assert "2 of them from no segment" in said
    found = labels()
    for seed in (SEEDS[0], SEEDS[2]):
        pixels = label_pixels(seed.maps, seed.classes, SIZE, Background("power", 2.0)).labels
        wanted = {"background": np.zeros_like(pixels), "ignore": np.full_like(pixels, 255), "cam": pixels}[policy]
        np.testing.assert_array_equal(found[seed.id], wanted)
    assert seeded("--masks", "few.h5", "--without-masks", policy) == 0  # told again, nothing is done again
    said = capsys.readouterr().err
    assert "0 images to do" in said
    assert "1 image is not in few.h5" in said


def test_votes_without_masks_leave_labels_alone(folder: Path) -> None:
    write_cache(folder / "few.h5", [pack_segments("b", SIZE, rectangles(GRID, 1))])
    assert seeded("--method", "pixel", "--out", "pseudo") == 0
    assert seeded("pseudo", "--masks", "few.h5") == 0
    np.testing.assert_array_equal(labels()["a"], labels("pseudo")["a"])
    assert seeded("pseudo", "--masks", "few.h5", "--without-masks", "ignore", "--out", "other") == 0
    assert (labels("other")["a"] == 255).all()


def test_masks_of_another_size(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [pack_segments(seed.id, (64, 48) if seed.id == "d" else SIZE, rectangles(GRID, k))
               for k, seed in enumerate(SEEDS)]  # fmt: skip
    write_cache(folder / "turned.h5", records)
    assert seeded("--masks", "turned.h5") == 3
    assert (
        "masks were made for an image of 48x64 pixels, not 64x48" in (folder / "pseudo-sam" / "skipped.csv").read_text()
    )
    assert not (folder / "pseudo-sam" / "d.png").exists()
    assert "1 image skipped: d" in capsys.readouterr().err


def test_another_data_set_or_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cache(folder / "other.h5", [pack_segments("x", SIZE, rectangles(GRID, 1))])
    assert seeded("--masks", "other.h5") == 1
    assert (
        "other.h5: holds masks of none of the 4 images of cams.h5 (the first is 'a', its first is 'x')"
        in capsys.readouterr().err
    )
    (folder / "void.h5.parts").mkdir()
    write_cache(folder / "void", [])
    with RecordWriter(folder / "void.h5", {"kind": "sam-masks", "options": {}, "source": {}, "model": {}, "dataset": {},
                                           "vocabulary": {}}, segment_format(), 4) as writer:  # fmt: skip
        writer.finish([])
    assert seeded("--masks", "void.h5") == 1
    assert "it holds no image at all" in capsys.readouterr().err
    assert not (folder / "pseudo-sam").exists()


def test_foreign_masks(folder: Path) -> None:
    """Masks in another format give what their cache gives."""
    maps = folder / "maps"
    (maps / "sub").mkdir(parents=True)
    photos = folder / "photos"
    (photos / "sub").mkdir(parents=True)
    for k, seed in enumerate(SEEDS):
        values = np.random.default_rng(k).integers(0, 4, (6, 8)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(values).save(maps / f"{seed.id}.png")
        Image.fromarray(values).convert("RGB").save(photos / f"{seed.id}.png")
    words = ["--dataset", "folder", "--images", str(photos), "--import", str(maps), "--out", "imported.h5"]
    assert main(["sam-masks", *words]) == 0
    assert seeded("--masks", maps) == 0
    assert seeded("--masks", "imported.h5", "--out", "again") == 0
    for key, mask in labels().items():
        np.testing.assert_array_equal(labels("again")[key], mask)
    (maps / "d.png").write_bytes(b"junk")
    assert seeded("--masks", maps, "--out", "third") == 3
    assert "d.png: not a PNG" in (folder / "third" / "skipped.csv").read_text()


def test_a_damaged_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((folder / "segments.h5").read_bytes())
    code = pack_segments("a", SIZE, rectangles(GRID, 0)).rle.tobytes()
    content[content.index(code) + 2] ^= 1
    (folder / "segments.h5").write_bytes(content)
    assert seeded() == 1
    assert "segments.h5: damaged" in capsys.readouterr().err


def test_damaged_maps_are_skipped(folder: Path) -> None:
    broken = replace(SEEDS[0], maps=np.full((2, 6, 8), np.nan, np.float32))
    write_seeds(folder / "broken.h5", [broken, *SEEDS[1:]], small_manifest(folder))
    assert seeded("broken.h5") == 3
    assert "a,its CAMs hold NaN or infinity" in (folder / "pseudo-sam" / "skipped.csv").read_text()


# Complaints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["--method", "magic"], 2, "Invalid value for '--method'"),
        (["--method", "prompted"], 2, "clipseed sam-masks --prompt points"),
        (["--preset", "city"], 2, "Invalid value for '--preset'"),
        (["--preset", "voc-fine", "--method", "vote"], 2, "--preset belongs to --method fma"),
        (["--uncovered", "white"], 2, "Invalid value for '--uncovered'"),
        (["--without-masks", "white"], 2, "Invalid value for '--without-masks'"),
        (["--method", "vote", "--uncovered", "ignore"], 2, "a vote keeps uncovered labels (cam) or drops them"),
        (["--method", "pixel", "--uncovered", "cam"], 2, "--method pixel looks at no masks"),
        (["--alpha", "0"], 2, "give an exponent from 0.01 to 100"),
        (["--alpha", "nan"], 2, "give an exponent from 0.01 to 100"),
        (["--min-confidence", "2"], 2, "give a score from 0 to 1"),
        (["--min-confidence", "0.5", "--method", "vote"], 2, "--method vote gives no confidence"),
        (["--masks", "nowhere.h5"], 1, "nowhere.h5: no such segments file; clipseed sam-masks makes one"),
        (["--masks", "nowhere"], 1, "nowhere: no such file or folder of masks"),
        (["--masks", "cams.h5"], 1, "cams.h5: a clipseed-cams file, but not a clipseed segments file"),
        (["segments.h5"], 1, "segments.h5: a clipseed-segments file, but not a clipseed CAM file"),
        (["--masks-kind", "sa-1b"], 2, "segments.h5 is a segments file"),
        (["nowhere.h5"], 1, "nowhere.h5: no such CAM file or mask folder"),
        (["labels", "--method", "fma"], 2, "only vote takes those"),
        (["labels", "--alpha", "1"], 2, "a label map has no scores"),
        (["labels", "--out", "labels"], 2, "--out labels: is the source as well"),
        (["empty"], 1, "empty: neither CAMs nor PNG masks"),
        (["--workers", "many"], 2, "--workers many: give auto or a number"),
    ],
)
def test_complaints(
    words: list[str], code: int, complaint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("labels", "empty"):
        (folder / name).mkdir()
    write_label_mask(folder / "labels" / "a.png", np.zeros(SIZE, np.uint8))
    assert seeded(*words) == code
    assert complaint in capsys.readouterr().err
    assert not (folder / "pseudo-sam").exists()


def test_nothing_to_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert seeded() == 2
    assert "nothing to label in" in capsys.readouterr().err
    with pytest.raises(UsageError):
        decide(RuleOptions(alpha=-1), "voc", label_map=False, asked=False)


# Running it -----------------------------------------------------------------------------------------------------------


def test_scored_without_naming_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The most refined output in the folder is pseudo-sam/."""
    (folder / "truth" / "sub").mkdir(parents=True)
    assert seeded("--report", "run.json") == 0
    for key, mask in labels().items():
        write_label_mask(folder / "truth" / f"{key}.png", mask)
    capsys.readouterr()
    assert main(["evaluate", "--gt", "truth", "--json"]) == 0
    said = capsys.readouterr()
    assert "scoring pseudo-sam" in said.err
    assert json.loads(said.out)["miou"] == pytest.approx(1.0)
    told = json.loads((folder / "run.json").read_text())
    assert (told["method"], told["computed"], told["missing"]) == ("fma", 4, 0)


def test_resuming_shares_and_corrected_labels(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sam_seed, "_UNIT_SIZE", 1)
    assert seeded("--out", "whole") == 0
    for k in (2, 1):
        assert seeded("--out", "cut", "--shard", f"{k}/2") == 0
    files = sorted(path.relative_to("whole") for path in Path("whole").rglob("*.*"))
    assert files == sorted(path.relative_to("cut") for path in Path("cut").rglob("*.*"))
    assert all((Path("cut") / name).read_bytes() == (Path("whole") / name).read_bytes() for name in files)
    (folder / "cut" / "a.png").unlink()
    capsys.readouterr()
    assert seeded("--out", "cut") == 0
    assert "1 image to do, 3 done already" in capsys.readouterr().err
    assert (folder / "cut" / "a.png").read_bytes() == (folder / "whole" / "a.png").read_bytes()
    assert seeded("--out", "cut", "--alpha", "3") == 1
    assert "--alpha 0.6 then, 3.0 now" in capsys.readouterr().err
    write_cache(folder / "other.h5", [pack_segments(seed.id, SIZE, rectangles(GRID, 5)) for seed in SEEDS], "voc")
    assert seeded("--out", "cut", "--masks", "other.h5", "--method", "fma") == 0  # same settings, so the same output
    (folder / "cams.h5").unlink()
    corrected = [make_cam("a", (7,), 0), *SEEDS[1:]]
    write_seeds(folder / "cams.h5", corrected, small_manifest(folder))
    assert seeded("--out", "cut") == 0
    assert "1 mask was made for other labels; made again" in capsys.readouterr().err
    assert label_mask_note(folder / "cut" / "a.png").classes == (7,)


@pytest.mark.slow
def test_workers_give_the_same(folder: Path) -> None:
    assert seeded("--out", "one", "--workers", "0") == 0
    assert seeded("--out", "two", "--workers", "2") == 0
    for seed in SEEDS:
        assert (folder / f"one/{seed.id}.png").read_bytes() == (folder / f"two/{seed.id}.png").read_bytes()
