"""The HTML page: what it says equals what evaluate says, it needs nothing beside it, and it trusts nothing it shows."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipseed.cli.main import main
from clipseed.errors import InputError, StoreError, UsageError
from clipseed.evaluate.confusion import confusion, score
from clipseed.formats.palette import voc_palette
from clipseed.jobs.evaluate import EvaluateOptions, evaluate
from clipseed.jobs.report import ReportOptions, ReportResult, write_report
from clipseed.report.charts import HUES, confusion_chart, curve_chart
from clipseed.report.gallery import Gallery
from clipseed.report.overlay import outlined
from clipseed.report.text import escaped, percent
from clipseed.report.thumbnails import THUMBNAIL
from clipseed.store.cam_records import Cam
from clipseed.store.cam_writer import CamWriter
from clipseed.store.label_masks import write_label_mask
from clipseed.store.units import Unit

from helpers.images import photo

HOSTILE = '<script>alert("x")</script>&\'"><img src=http://evil.example/x onerror=alert(1)>'
_VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Parses strictly: every tag closed in order; collects text, attributes and tags."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.stack == []
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"attribute twice in {tag}"
        if tag not in _VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.words.append(data + " ")

    def images(self) -> dict[str, Image.Image]:
        """Decoded images by their alternative text."""
        found = {}
        for tag, attributes in self.tags:
            if tag == "img":
                kind, data = str(attributes["src"]).split(",", 1)
                assert kind in {"data:image/png;base64", "data:image/jpeg;base64"}
                found[str(attributes["alt"])] = Image.open(io.BytesIO(base64.b64decode(data)))
        return found


def read(path: Path) -> Page:
    """Parse a page and check that it needs nothing but itself."""
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    allowed = {
        *(
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "main",
            "header",
            "section",
            "article",
            "details",
            "summary",
        ),
        *(
            "h1",
            "h2",
            "h3",
            "h4",
            "p",
            "pre",
            "div",
            "span",
            "i",
            "b",
            "bdi",
            "small",
            "strong",
            "figure",
            "figcaption",
        ),
        *("table", "thead", "tbody", "tr", "th", "td", "img"),
        *("svg", "g", "rect", "line", "circle", "polyline", "polygon", "text"),
    }
    for tag, attributes in page.tags:
        assert tag in allowed
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert str(attributes.get(name, "data:")).startswith("data:")
        assert "url(" not in str(attributes.get("style", ""))
    style = re.findall(r"<style>(.*?)</style>", source, re.DOTALL)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]
    assert "default-src 'none'" in source
    return page


def write_seeds(path: Path, records: list[Cam], names: tuple[str, ...], **manifest: Any) -> Path:
    content = {
        "vocabulary": {"name": "some", "classes": [{"name": name} for name in names]},
        "options": {"paper": False},
        "dataset": {"name": "folder", "split": "all"},
        **manifest,
    }
    with CamWriter(path, content, "float32", 64) as writer:
        writer.write(Unit(0), records)
        writer.finish([record.id for record in records])
    return path


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Twelve images with CAMs and masks; image p00 is guessed best, p11 worst."""
    rng = np.random.default_rng(4)
    truth, masks, images = (tmp_path / name for name in ("gt", "masks", "photos"))
    for folder in (truth, masks, images):
        folder.mkdir()
    records = []
    for number in range(12):
        mask = np.kron(rng.integers(0, 4, (4, 5)), np.ones((12, 12))).astype(np.uint8)
        mask[0] = 255
        wrong = rng.random(mask.shape) < number / 12
        guess = np.where(wrong, (mask + 1) % 4, np.where(mask == 255, 0, mask)).astype(np.uint8)
        key = f"p{number:02d}"
        write_label_mask(truth / f"{key}.png", mask)
        write_label_mask(masks / f"{key}.png", guess)
        photo(number, *mask.shape).save(images / f"{key}.jpg")
        cam = np.stack([(guess == label) * rng.uniform(0.1, 1, mask.shape) for label in (1, 2, 3)])
        records.append(Cam(key, np.array([0, 1, 2], np.int32), cam.astype(np.float32), mask.shape))
    data = {"name": "folder", "split": "all", "images": str(images), "ground_truth": str(truth)}
    write_seeds(tmp_path / "cams.h5", records, ("ant", "bee", "cow"), dataset=data)
    (tmp_path / "classes.txt").write_text("ant\nbee\ncow\n")
    return tmp_path / "cams.h5", masks, truth


def run(world: tuple[Path, Path, Path], *inputs: Path, **options: Any) -> tuple[ReportResult, Page]:
    seeds, _, truth = world
    out = seeds.parent / "page.html"
    keys = ("threshold", "alphas", "split", "pred_ignore", "resize_pred")
    scoring = {key: options.pop(key) for key in keys if key in options}
    classes = str(seeds.parent / "classes.txt")
    result = write_report(
        ReportOptions(inputs, EvaluateOptions(inputs[0], str(truth), classes, **scoring), out, **options)
    )
    return result, read(out)


# The scores -----------------------------------------------------------------------------------------------------------


def test_the_page_says_what_evaluate_says(world: tuple[Path, Path, Path]) -> None:
    seeds, masks, truth = world
    result, page = run(world, seeds, masks)
    for path in (seeds, masks):
        alone = evaluate(EvaluateOptions(path, str(truth), str(seeds.parent / "classes.txt")))
        mine = next(found for found in result.reports if found.prediction == str(path))
        assert mine.as_dict() == alone.as_dict()
        scores = alone.scores
        for value in (scores.miou, scores.miou_foreground, scores.pixel_accuracy, scores.mean_accuracy):
            assert percent(value) in page.text
        for name, value in zip(alone.names, scores.class_iou, strict=True):
            assert name in page.text
            assert percent(float(value), 1) in page.text
        np.testing.assert_array_equal(score(mine.counts).class_iou, scores.class_iou)
    assert f"threshold {result.reports[0].threshold:g}, the best of 99 tried on this ground truth" in page.text
    assert "masks as they are" in page.text
    for report in result.reports:
        shares = report.counts / report.counts.sum(axis=1, keepdims=True)
        assert f"ant taken for bee: {percent(shares[1, 2])} %" in page.text
        assert f"cow: {percent(shares[3, 3])} % right" in page.text


@pytest.mark.parametrize("options", [{}, {"threshold": 0.3}, {"alphas": (2.0, 1.0)}, {"alphas": (1.0,)}])
@pytest.mark.parametrize("paper", [False, True])
def test_images_add_up_to_the_whole(world: tuple[Path, Path, Path], options: dict[str, Any], paper: bool) -> None:
    """What each image is counted with, at the setting that was found best, is what the score was made from."""
    seeds, _, truth = world
    if paper:
        from clipseed.store.cams import open_cams

        records = list(open_cams(seeds).values())
        seeds = write_seeds(seeds.with_name("paper.h5"), records, ("ant", "bee", "cow"), options={"paper": True})
    total = np.zeros((4, 4), np.int64)
    ids = []

    def each(identifier: str, counts: np.ndarray, mask: np.ndarray, labels: np.ndarray) -> None:
        nonlocal total
        total += counts
        ids.append(identifier)
        np.testing.assert_array_equal(counts, confusion(mask, labels, 4))

    steps = []
    report = evaluate(
        EvaluateOptions(seeds, str(truth), **options), lambda count: steps.append(count) or steps.append, each
    )
    np.testing.assert_array_equal(total, report.counts)
    assert ids == [f"p{number:02d}" for number in range(12)]
    assert steps[0] == sum(steps[1:]) == 24


def test_predicted_255_counts_as_evaluate_counts_it(world: tuple[Path, Path, Path]) -> None:
    _, masks, _ = world
    guess = np.asarray(Image.open(masks / "p03.png")).copy()
    guess[10:30] = 255
    write_label_mask(masks / "p03.png", guess)
    with pytest.raises(InputError, match="--pred-ignore background or --pred-ignore exclude"):
        run(world, masks)
    assert not (masks.parent / "page.html").exists()
    result, page = run(world, masks, pred_ignore="exclude")
    assert "of the pixels were left out because the prediction is 255 there" in page.text
    total = np.zeros((4, 4), np.int64)

    def each(identifier: str, counts: np.ndarray, *_: Any) -> None:
        nonlocal total
        total += counts

    options = EvaluateOptions(masks, str(world[2]), str(masks.parent / "classes.txt"), pred_ignore="exclude")
    np.testing.assert_array_equal(evaluate(options, None, each).counts, total)
    np.testing.assert_array_equal(result.reports[0].counts, total)


def test_settings_in_words(world: tuple[Path, Path, Path]) -> None:
    seeds, masks, _ = world
    assert "threshold 0.25, fixed" in run(world, seeds, threshold=0.25)[1].text
    result, page = run(world, seeds, masks, alphas=(1.0, 2.0))  # masks beside CAMs have no setting
    assert f"background (1 − max)^{result.reports[0].alpha:g}, the best of 2 tried" in page.text
    assert "Mean IoU over the alpha" in page.text
    assert "Mean IoU over the threshold" not in page.text
    with pytest.raises(UsageError, match="apply to CAMs"):
        run(world, masks, threshold=0.25)


# The images ---------------------------------------------------------------------------------------------------------


def test_best_and_worst(world: tuple[Path, Path, Path]) -> None:
    _, masks, truth = world
    result, page = run(world, masks, worst=3, best=2, images=masks.parent / "photos")
    own = {}
    for path in truth.glob("*.png"):
        mask, guess = np.asarray(Image.open(path)), np.asarray(Image.open(masks / path.name))
        own[path.stem] = score(confusion(mask, guess, 4)).miou
    order = sorted(own, key=lambda key: (own[key], key))
    gallery = result.entries[0].gallery
    assert [item.id for item in gallery.worst] == order[:3]
    assert [item.id for item in gallery.best] == order[::-1][:2] == ["p00", "p01"]
    assert [item.score for item in gallery.worst] == [own[key] for key in order[:3]]
    assert gallery.median == pytest.approx(float(np.median(list(own.values()))))
    assert sum(gallery.histogram()) == 12
    shown = page.images()
    assert len(shown) == 3 * 5
    assert "background" not in [word.strip() for word in page.words[page.words.index("Worst images ") :]]
    for key in (*order[:3], "p00", "p01"):
        photo = np.asarray(Image.open(masks.parent / "photos" / f"{key}.jpg").convert("RGB")).astype(float)
        grey = photo @ [0.299, 0.587, 0.114]
        for kind, folder in (("truth", truth), ("prediction", masks)):
            labels = np.asarray(Image.open(folder / f"{key}.png"))
            inner = interior(labels)
            expected = np.where(
                (labels > 0)[..., None], 0.4 * grey[..., None] + 0.6 * voc_palette()[labels], grey[..., None]
            )
            drawn = np.asarray(shown[f"{kind} of {key}"].convert("RGB")).astype(float)
            assert np.abs(drawn - expected)[inner].mean() < 12  # JPEG
            if kind == "truth":
                assert drawn[edges(labels)].min(axis=-1).mean() > drawn[inner].min(axis=-1).mean() + 60
        assert shown[f"image {key}"].size == (60, 48)
        assert f"{key} {percent(own[key], 1)}" in page.text


def edges(labels: np.ndarray) -> np.ndarray:
    """Labelled pixels beside another label, one by one."""
    found = np.zeros(labels.shape, bool)
    for y, x in np.ndindex(*labels.shape):
        beside = [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        inside = [place for place in beside if 0 <= place[0] < labels.shape[0] and 0 <= place[1] < labels.shape[1]]
        found[y, x] = labels[y, x] > 0 and any(labels[place] != labels[y, x] for place in inside)
    return found


def interior(labels: np.ndarray) -> np.ndarray:
    """Pixels that are two or more away from any other label, where no line is and JPEG blurs none in."""
    padded = np.pad(labels, 2, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5)).reshape(*labels.shape, 25)
    return (windows == labels[..., None]).all(axis=-1)


def test_outlines_are_on_the_inside() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (9, 11)).repeat(3, 0).repeat(3, 1).astype(np.uint8)
    drawn = outlined(np.zeros((27, 33, 3), np.uint8), labels)
    np.testing.assert_array_equal((drawn == 255).all(axis=-1), edges(labels))
    assert set(np.unique(drawn)) == {0, 255}


def test_without_photos_the_masks_are_shown_as_they_are(world: tuple[Path, Path, Path]) -> None:
    _, masks, truth = world
    _, page = run(world, masks, worst=1, best=1)
    shown = page.images()
    assert len(shown) == 4
    for kind, folder in (("truth", truth), ("prediction", masks)):
        labels = np.asarray(Image.open(folder / "p00.png"))
        np.testing.assert_array_equal(np.asarray(shown[f"{kind} of p00"].convert("RGB")), voc_palette()[labels])


@pytest.mark.parametrize(
    ("limits", "parts"),
    [((6, 6), (4, 4)), ((3, 9), (2, 6)), ((20, 20), (4, 4)), ((4, 4), (4, 4)), ((2, 2), (2, 2)), ((0, 9), (0, 8))],
)
@pytest.mark.parametrize("tied", [False, True])
def test_best_and_worst_share_no_image(limits: tuple[int, int], parts: tuple[int, int], tied: bool) -> None:
    gallery = Gallery(*limits)
    mask = np.ones((2, 4), np.uint8)
    order = np.random.default_rng(1).permutation(8)
    for rank in order:
        guess = np.where(np.arange(8).reshape(2, 4) < (4 if tied else rank), 1, 0).astype(np.uint8)
        gallery.add(f"{rank}", confusion(mask, guess, 2), mask, guess)
    ids = [str(k) for k in range(8)]
    assert [item.id for item in gallery.worst] == ids[: parts[0]]
    assert [item.id for item in gallery.best] == ids[::-1][: parts[1]]


def test_equal_scores_go_by_id_and_none_is_lost() -> None:
    gallery = Gallery(2, 3)
    mask = np.ones((4, 4), np.uint8)
    for key in ("d", "b", "e", "a", "c"):
        gallery.add(key, confusion(mask, mask, 2), mask, mask)
    gallery.add("empty", np.zeros((2, 2), np.int64), np.full((4, 4), 255, np.uint8), mask)
    assert [item.id for item in gallery.worst] == ["a", "b"]
    assert [item.id for item in gallery.best] == ["e", "d", "c"]
    assert (len(gallery.scores), gallery.unscored) == (5, 1)
    other = Gallery(0, 0)
    for key in ("a", "b", "c", "d", "e", "empty"):
        other.add(key, confusion(mask, mask, 2), mask, mask)
    assert other.fingerprint == gallery.fingerprint
    assert (other.worst, other.best) == ([], [])
    alone = Gallery(6, 6)
    alone.add("a", confusion(mask, mask, 2), mask, mask)
    assert ([item.id for item in alone.worst], [item.id for item in alone.best]) == ([], ["a"])


def test_memory_does_not_grow_with_the_images() -> None:
    """Only scores are kept of images that are not shown; large masks are shrunk."""
    gallery = Gallery(2, 2)
    rng = np.random.default_rng(0)
    for number in range(300):
        mask = rng.integers(0, 3, (50, 900), dtype=np.uint8)
        gallery.add(f"{number}", confusion(mask, np.roll(mask, number), 3), mask, np.roll(mask, number))
    kept = [*gallery.worst, *gallery.best]
    assert len(kept) == 4
    assert all(item.truth.shape == item.prediction.shape == (20, THUMBNAIL) for item in kept)
    assert all(item.truth.base is None or len(item.truth.base) < 50 * 900 for item in kept)
    assert gallery.scores.itemsize * len(gallery.scores) == 2400


def test_missing_images_are_said_so(world: tuple[Path, Path, Path]) -> None:
    seeds, masks, _ = world
    photos = masks.parent / "photos"
    _, page = run(world, masks, worst=1, best=1)
    assert page.text.count("No image: this input does not say where its images are; name the folder with --images") == 2
    (photos / "p00.jpg").unlink()
    photo(1, 30, 30).save(photos / "p01.jpg")
    (photos / "p02.jpg").write_bytes(b"no image")
    _, page = run(world, seeds, masks, worst=0, best=4, images=photos)
    assert "the image is not there any more" in page.text
    assert "No image: it is 30x30 pixels now, its ground truth 60x48" in page.text
    assert "is not an image in a supported format" in page.text
    assert "image p03" in page.images()
    assert "Worst images" not in page.text


def test_images_beside_the_ground_truth(devkit: Path, tmp_path: Path) -> None:
    shutil.copytree(devkit / "SegmentationClass", tmp_path / "same")
    for path in (tmp_path / "same").glob("*.png"):
        labels = np.asarray(Image.open(path)).copy()
        labels[labels == 255] = 0
        write_label_mask(path, labels)
    (tmp_path / "same" / "manifest.json").write_text('{"kind": "crf", "made": "by hand"}')
    scoring = EvaluateOptions(tmp_path, str(devkit / "SegmentationClass"), "voc")
    write_report(ReportOptions((tmp_path / "same",), scoring, tmp_path / "page.html"))
    page = read(tmp_path / "page.html")
    assert "image 2007_000004" in page.images()
    assert "No image" not in page.text
    assert '"made": "by hand"' in page.text
    assert "15 of 21 classes" in page.text


def test_toy_images_are_drawn(tmp_path: Path) -> None:
    from clipseed.data.toy.dataset import toy_mask

    (tmp_path / "masks").mkdir()
    for number in range(2):
        write_label_mask(tmp_path / "masks" / f"toy_{number:06d}.png", toy_mask(0, f"toy_{number:06d}"))
    scoring = EvaluateOptions(tmp_path, "toy", "toy")
    write_report(ReportOptions((tmp_path / "masks",), scoring, tmp_path / "page.html"))
    assert "image toy_000001" in read(tmp_path / "page.html").images()


# Hostile and broken content -------------------------------------------------------------------------------------------


def test_escaping() -> None:
    assert escaped("<a href='x'>&\"") == "&lt;a href=&#39;x&#39;&gt;&amp;&#34;"
    assert escaped("a\u202eb\x00c\udcffd\x1be\nf") == "a\ufffdb\ufffdc\ufffdd\ufffde\nf"
    assert escaped("Käse 猫 🐈") == "Käse 猫 🐈"
    escaped("\udcff").encode("utf-8")
    assert escaped(escaped("<")) == "&lt;"  # markup stays as it is


def test_the_template_leaves_escaping_to_the_environment() -> None:
    """Autoescape protects quoted attributes and text only: no value is called safe, none stands in a bare attribute."""
    source = resources.files("clipseed.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    assert re.search(r"\|\s*safe|%-?\s*autoescape", source) is None
    assert re.search(r"=\s*\{\{", source) is None
    assert "<script" not in source


def test_hostile_names_are_text(tmp_path: Path) -> None:
    """Class names, ids, paths, titles and manifests from files cannot become markup."""
    names = (HOSTILE, "</title></style><b>", "\u202eevil\x07", "x" * 3000)
    keys = ["a<b>&\"'", "sub/<svg onload=alert(1)>", "../../etc/passwd", "\udcff"]
    truth = tmp_path / "<gt>"
    truth.mkdir()
    (truth / "sub").mkdir()
    mask = np.repeat(np.arange(5, dtype=np.uint8), 4)[:, None].repeat(10, axis=1)
    records = []
    for key in keys:
        if not key.startswith(".."):
            write_label_mask(truth / f"{key}.png", mask)
        cam = np.random.default_rng(0).random((4, 5, 3)).astype(np.float32)
        records.append(Cam(key, np.arange(4, dtype=np.int32), cam, mask.shape))
    data = {"name": "folder", "images": str(tmp_path), "split": HOSTILE, "x": "</pre></script>\ud800"}
    seeds = write_seeds(tmp_path / "<i>&.h5", records, names, dataset=data)
    out = tmp_path / "page.html"
    result = write_report(ReportOptions((seeds,), EvaluateOptions(seeds, str(truth)), out, title=HOSTILE))
    assert result.unscored
    source = out.read_text(encoding="utf-8")
    page = read(out)
    assert "alert(" in page.text
    assert "<script" not in source
    assert "<img src=http" not in source
    assert page.text.count(HOSTILE) > 5
    assert "\u202e" not in source
    assert "1 prediction has no ground truth; not scored: ../../etc/passwd" in page.text


def test_ids_cannot_lead_out_of_the_image_folder(world: tuple[Path, Path, Path]) -> None:
    seeds, _, truth = world
    mask = np.ones((48, 60), np.uint8)
    (truth / "deep").mkdir()
    write_label_mask(truth / "p00.png", mask)
    photo(0, 48, 60).save(truth.parent / "secret.jpg")
    write_label_mask(truth.parent / "secret.png", mask)
    record = Cam("../secret", np.array([0], np.int32), np.ones((1, 2, 2), np.float32), (48, 60))
    path = write_seeds(seeds.with_name("evil.h5"), [record], ("ant", "bee", "cow"))
    _, page = run(world, path, images=truth.parent / "photos")
    assert "leaves the image folder" in page.text
    assert "image ../secret" not in page.images()


@pytest.mark.parametrize("seed", ["x", "9" * 5000, -1, {"a": 1}, None])
def test_a_nonsensical_manifest_does_no_harm(world: tuple[Path, Path, Path], seed: Any) -> None:
    records = [Cam("p01", np.array([0], np.int32), np.ones((1, 2, 2), np.float32), (48, 60))]
    data = {"name": "toy", "toy_seed": seed, "split": 3}
    path = write_seeds(world[0].with_name("odd.h5"), records, ("ant", "bee", "cow"), dataset=data, options={"exif": []})
    assert "No image" in run(world, path)[1].text


def test_nothing_but_ignored_pixels(world: tuple[Path, Path, Path]) -> None:
    seeds, masks, truth = world
    for path in truth.glob("*.png"):
        write_label_mask(path, np.full((48, 60), 255, np.uint8))
    result, page = run(world, seeds, masks)
    assert "12 images have no score: all their ground truth is ignored" in page.text
    assert result.as_dict()["inputs"][0]["miou"] is None
    assert "nan" not in page.text.lower()


# Comparing, charts ----------------------------------------------------------------------------------------------------


def test_several_inputs(world: tuple[Path, Path, Path]) -> None:
    seeds, masks, _ = world
    others = []
    for number in range(HUES + 1):
        others.append(masks.parent / str(number) / "masks")
        shutil.copytree(masks, others[-1])
    (others[0] / "p11.png").unlink()
    result, page = run(world, seeds, *others, worst=1, best=0)
    assert len({entry.name for entry in result.entries}) == len(others) + 1
    assert str(others[1]) in page.text
    assert "scored on different images" in page.text
    assert "different images" not in run(world, seeds, masks, masks)[1].text
    names = [entry.name for entry in run(world, masks, masks)[0].entries]
    assert len(set(names)) == 2


@pytest.mark.parametrize("classes", [1, 2, 21, 26, 27, 81, 255])
def test_confusion_matrix_of_any_size(classes: int) -> None:
    rng = np.random.default_rng(classes)
    counts = rng.integers(0, 50, (classes, classes))
    counts[-1] = 0
    names = [f"class <{k}>" for k in range(classes)]
    source = confusion_chart(names, counts)
    page = Page(source)
    assert len([tag for tag, _ in page.tags if tag == "text"]) >= 2 * classes + 1
    for k in range(classes):
        assert page.text.count(f"class <{k}>") >= 4  # both names, each with its full form
    if classes == 21:
        share = counts[3, 5] / counts[3].sum()
        assert f"class <3> taken for class <5>: {percent(share)} %" in page.text
    font = float(re.search(r'font-size="([\d.]+)"', source).group(1))
    assert font >= 10


def test_curves_of_any_kind() -> None:
    nan = float("nan")
    for points in ([(1.0, 0.5)], [(1.0, 0.5), (1.0, 0.5)], [(1.0, nan), (2.0, nan)], [(0.5, 0.0), (8.0, 1.0)]):
        source = curve_chart([(9, ("<x>", points, 1.0))], "alpha")
        Page(source)
        assert "nan" not in source.lower()
        assert "inf" not in source


# The command ----------------------------------------------------------------------------------------------------------


def test_command(
    world: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds, _, truth = world
    monkeypatch.chdir(seeds.parent)
    assert main(["report"]) == 0  # the newest stage, the data set's own ground truth
    captured = capsys.readouterr()
    assert "report.html: the page" in captured.err
    assert "cams.h5" in captured.out
    words = [
        "report",
        "cams.h5",
        "masks",
        "--gt",
        "gt",
        "--classes",
        "classes.txt",
        "--out",
        "b.html",
        "--title",
        "A & B",
    ]
    assert main([*words, "--worst", "1", "--best", "2", "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    data = json.loads(captured.out)
    assert data["out"] == "b.html"
    assert main(["evaluate", "masks", "--gt", "gt", "--classes", "classes.txt", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert {key: data["inputs"][1][key] for key in alone} == alone
    assert [item["id"] for item in data["inputs"][1]["best"]] == ["p00", "p01"]
    assert len(data["inputs"][0]["worst"]) == 1
    assert "A & B" in read(Path("b.html")).text
    before = Path("b.html").read_bytes()
    assert main([*words, "--worst", "1", "--best", "2", "-q"]) == 0
    assert Path("b.html").read_bytes() == before
    assert [path.name for path in Path().iterdir() if path.name.startswith(".tmp")] == []

    (truth / "p05.png").unlink()
    capsys.readouterr()
    assert main(words) == 3
    assert "1 prediction has no ground truth; not scored: p05" in capsys.readouterr().err
    assert "1 prediction has no ground truth" in read(Path("b.html")).text


def test_mistakes_are_found_before_scoring(
    world: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = world[0]
    monkeypatch.chdir(seeds.parent)
    for words, code, message in (
        (["--worst", "-1"], 2, "--worst -1: give a number"),
        (["--best", "100000"], 2, "--best 100000: give a number"),
        (["--images", "nowhere"], 2, "--images nowhere: no such folder"),
        (["--out", "masks"], 2, "--out masks: is a folder"),
        (["--out", "nowhere/x.html"], 2, "the folder nowhere does not exist"),
        (["--threshold", "2"], 2, "--threshold 2"),
        (["--alpha", "x"], 2, "--alpha x"),
        (["nowhere.h5"], 1, "nowhere.h5: no such CAM file"),
    ):
        assert main(["report", "cams.h5", *words]) == code
        assert message in capsys.readouterr().err
        assert not Path("report.html").exists()
    assert main(["report", "masks", "--gt", str(world[2])]) == 2
    assert "--classes voc" in capsys.readouterr().err
    with pytest.raises(UsageError, match="at least one"):
        write_report(ReportOptions((), EvaluateOptions(seeds)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(world: tuple[Path, Path, Path]) -> None:
    seeds, _, truth = world
    locked = seeds.parent / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(StoreError, match="read-only"):
        write_report(ReportOptions((seeds,), EvaluateOptions(seeds, str(truth)), locked / "x.html"))


# In a browser ---------------------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def screenshot(page: Path, shot: Path, width: int, height: int, *flags: str) -> list[str]:
    """Render a page in a headless browser; returns its console messages."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser on the path (looked for {', '.join(BROWSERS)})")
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        "--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={shot.parent / 'profile'}",
        f"--window-size={width},{height}", f"--screenshot={shot}", *flags, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert shot.exists(), done.stderr[-2000:]
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
def test_in_a_browser(world: tuple[Path, Path, Path]) -> None:
    """The page renders without a complaint, light and dark, wide and narrow, and is not blank."""
    seeds, masks, _ = world
    run(world, seeds, masks)
    page = seeds.parent / "page.html"
    shades = []
    for name, width, flags in (
        ("light", 1280, ("--blink-settings=preferredColorScheme=1",)),
        ("dark", 1280, ("--blink-settings=preferredColorScheme=0",)),
        ("narrow", 500, ("--blink-settings=preferredColorScheme=1",)),
    ):
        shot = seeds.parent / f"{name}.png"
        assert screenshot(page, shot, width, 2400, *flags) == []
        pixels = np.asarray(Image.open(shot).convert("RGB")).astype(np.int64)
        assert pixels.shape == (2400, width, 3)
        shades.append(float(np.median(pixels)))
        drawn = np.abs(pixels - pixels[2, 2]).max(axis=2) > 24
        assert 0.02 < drawn.mean() < 0.8
        # Something is drawn all the way down, and nothing runs out of the page to the right.
        assert all(part.any() for part in np.array_split(drawn[:1800], 12))
        assert not drawn[:, -4:].any()
    assert shades[0] > 230
    assert shades[1] < 60


@pytest.mark.slow
def test_matrices_of_several_inputs_stand_side_by_side(world: tuple[Path, Path, Path]) -> None:
    seeds, masks, _ = world
    run(world, seeds, masks, worst=0, best=0)
    apart = {}
    for width in (900, 500):  # at 900, words that widened the figures would leave no room for two
        shot = seeds.parent / f"{width}.png"
        screenshot(seeds.parent / "page.html", shot, width, 2400, "--blink-settings=preferredColorScheme=1")
        red, green, blue = np.moveaxis(np.asarray(Image.open(shot).convert("RGB")).astype(int), -1, 0)
        hits = (green - red > 40) & (green - blue > 15) & (blue - red > 15)  # the diagonals; no swatch is such a green
        assert hits.sum() > 1000
        apart[width] = max(np.ptp(np.flatnonzero(row)) for row in hits if row.any())
    assert apart[900] > 250  # green in one row of pixels is of both matrices
    assert apart[500] < 40  # there, of one cell


@pytest.mark.slow
def test_the_browser_test_would_see_an_error(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<!DOCTYPE html><title>x</title><script>nonsense()</script>")
    assert any("nonsense is not defined" in line for line in screenshot(bad, tmp_path / "bad.png", 500, 300))
