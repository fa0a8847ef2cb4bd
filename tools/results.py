"""Measure what every step is worth, and write docs/results.md: `make results`.

On the built-in world the whole chain runs from images and labels. On photographs (`--photos DEVKIT`) no pretrained
CLIP is needed: ground truth blurred to something like a class activation map is refined, which says what PAR and the
dense CRF do with real colours and edges, and with `--coco` and `--segments` what seeding makes of segments. The
photographs stay where they are; images go to the working folder only.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from clipseed.data.dataset import DatasetOptions, image_finder, open_dataset
from clipseed.data.vocabulary import load_vocabulary
from clipseed.formats.palette import voc_palette
from clipseed.jobs.cam import CamOptions, run_cam
from clipseed.jobs.crf import CrfOptions, run_crf
from clipseed.jobs.demo import GRID
from clipseed.jobs.evaluate import EvaluateOptions, EvaluateReport, evaluate
from clipseed.jobs.refine import RefineOptions, run_refine
from clipseed.jobs.sam_masks import SamMasksOptions, run_sam_masks
from clipseed.jobs.sam_seed import SamSeedOptions, run_sam_seed
from clipseed.pseudo.rules import RuleOptions
from clipseed.refine.crf import CLIP_ES, IRN
from clipseed.runtime.run import RunOptions
from clipseed.store.cam_records import Cam
from clipseed.store.cam_writer import CamWriter
from clipseed.store.cams import open_cams
from clipseed.store.label_masks import read_label_mask
from clipseed.store.manifest import package_versions
from clipseed.store.units import Unit

ROOT = Path(__file__).resolve().parent.parent
DENSE = ("gradcam", "softmax-gradcam", "maskclip", "svc", "naclip")


class Toy:
    """Runs stages on the scored toy scenes, each once, and remembers their scores."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.folder, self.limit = folder, limit

    def cam(self, name: str, method: str = "softmax-gradcam", classes: str = "toy", paper: bool = False) -> Path:
        out = self.folder / f"{name}.h5"
        data = DatasetOptions("toy", classes=classes, limit=self.limit)
        run_cam(CamOptions(data, out, method=method, paper=paper, run=RunOptions(overwrite=True)))  # type: ignore[arg-type]
        return out

    def refine(self, source: Path, method: str, **given: object) -> Path:
        out = source.with_name(f"{source.stem}-{method}{'-'.join(map(str, given.values()))}.h5")
        run_refine(RefineOptions(method, source, out, run=RunOptions(overwrite=True), **given))  # type: ignore[arg-type]
        return out

    def crf(self, source: Path, name: str, **given: object) -> Path:
        out = self.folder / name
        run_crf(CrfOptions(source, out, run=RunOptions(overwrite=True), **given))  # type: ignore[arg-type]
        return out

    def words(self, name: str, *, synonyms: bool, background: bool) -> str:
        """A vocabulary file without synonyms or background words."""
        toy = load_vocabulary("toy")
        classes = [{"name": item.name, "synonyms": list(item.synonyms) if synonyms else []} for item in toy.classes]
        made = {
            "name": name,
            "templates": list(toy.templates),
            "classes": classes,
            "background": list(toy.background) if background else [],
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(made), encoding="utf-8")
        return str(path)


def miou(prediction: Path) -> EvaluateReport:
    return evaluate(EvaluateOptions(prediction))


def chain(toy: Toy) -> tuple[list[str], dict[str, Path]]:
    """The table of CLIP-ES's steps, and where their outputs are."""
    bare = toy.words("names", synonyms=False, background=False)
    background = toy.words("background", synonyms=False, background=True)
    made = {
        "Grad-CAM of the logit, class names": toy.cam("gradcam", "gradcam", bare),
        "softmax-GradCAM, class names of the image only": toy.cam("softmax", classes=bare),
        "+ background words": toy.cam("background", classes=background),
        "+ synonyms": toy.cam("cams"),
    }
    cams = made["+ synonyms"]
    made["+ CAA"] = caa = toy.refine(cams, "caa")
    made["+ CAA + PAR"] = toy.refine(caa, "par")
    made["+ CAA + CRF"] = toy.crf(caa, "pseudo")
    rows = ["| step | mIoU | gain | threshold |", "| --- | --- | --- | --- |"]
    before: dict[str, float] = {}
    base = {"+ CAA + PAR": "+ CAA", "+ CAA + CRF": "+ CAA"}
    last = ""
    for name, path in made.items():
        report = miou(path)
        before[name] = 100 * report.scores.miou
        gain = f"{before[name] - before[base.get(name, last)]:+.1f}" if last else ""
        threshold = "none" if report.threshold is None else f"{report.threshold:g} (best)"
        rows.append(f"| {name} | {before[name]:.1f} | {gain} | {threshold} |")
        last = name
    return rows, made


def fixed_threshold(made: dict[str, Path]) -> list[str]:
    """What the thresholds chosen on these images flatter: the same threshold for all."""
    rows = ["| maps | best of the sweep | fixed 0.4 |", "| --- | --- | --- |"]
    for name in ("+ synonyms", "+ CAA", "+ CAA + PAR"):
        fixed = evaluate(EvaluateOptions(made[name], threshold=0.4))
        rows.append(f"| {name} | {100 * miou(made[name]).scores.miou:.1f} | {100 * fixed.scores.miou:.1f} |")
    return rows


def methods(toy: Toy) -> list[str]:
    """All map methods, alone and refined."""
    rows = ["| maps | alone | + CAA | + JS affinity |", "| --- | --- | --- | --- |"]
    for method in DENSE:
        maps = toy.cam(f"m-{method}", method)
        outputs = (maps, toy.refine(maps, "caa"), toy.refine(maps, "js"))
        rows.append(f"| {method} | " + " | ".join(f"{100 * miou(path).scores.miou:.1f}" for path in outputs) + " |")
    return rows


def with_segments(toy: Toy, made: dict[str, Path]) -> list[str]:
    """What the tiny SAM's segments make of the refined maps."""
    caa = made["+ CAA"]
    masks = toy.folder / "segments.h5"
    run_sam_masks(SamMasksOptions(masks, cams=caa, proposals=GRID, run=RunOptions(overwrite=True)))
    rows = ["| labels | mIoU |", "| --- | --- |", f"| + CAA, best threshold | {100 * miou(caa).scores.miou:.1f} |"]
    for name, source, rules in (
        ("segments, FMA-WSSS's seeding", caa, RuleOptions("fma")),
        ("segments, as released (`--paper`)", caa, RuleOptions("fma", paper=True)),
        ("segments, what none covers from the maps (`--uncovered cam`)", caa, RuleOptions("fma", uncovered="cam")),
        ("segments, votes of the maps' labels (SEPL)", caa, RuleOptions("vote")),
        ("+ CRF, then votes of its labels", made["+ CAA + CRF"], RuleOptions("vote")),
    ):
        out = toy.folder / f"CAMs-{len(rows)}"
        run_sam_seed(SamSeedOptions(source, masks, out, rules=rules, run=RunOptions(workers=0, overwrite=True)))
        rows.append(f"| {name} | {100 * miou(out).scores.miou:.1f} |")
    return rows


def quirks(toy: Toy, made: dict[str, Path]) -> list[str]:
    """The released code's behaviour against the default, step by step."""
    cams, caa = made["+ synonyms"], made["+ CAA"]
    paper = toy.cam("paper", paper=True)
    pairs = [
        ("maps: half-precision rounding, two min-max with 1e-7", cams, paper),
        ("CAA: boxes end before the last row and column", caa, toy.refine(cams, "caa", paper=True)),
        ("CRF: wrapped BGR colours, half-precision scores", made["+ CAA + CRF"], toy.crf(caa, "quirk", paper=True)),
    ]
    rows = ["| quirk of the released code | default | with the quirk |", "| --- | --- | --- |"]
    for name, default, quirk in pairs:
        rows.append(f"| {name} | {100 * miou(default).scores.miou:.2f} | {100 * miou(quirk).scores.miou:.2f} |")
    return rows


def blobs(data: DatasetOptions, out: Path, sigma: float) -> Path:
    """CAMs from blurred ground truth: what a class activation map of a good CLIP looks like."""
    import cv2

    images = open_dataset(data)
    records = []
    for sample in images.samples:
        mask = read_label_mask(Path(str(images.ground_truth)) / f"{sample.id}.png")
        height, width = mask.shape
        grid = (-(-height // 16), -(-width // 16))
        classes = [int(k) - 1 for k in np.unique(mask) if 0 < k < 255]
        maps = np.zeros((len(classes), *grid), np.float32)
        for row, class_id in enumerate(classes):
            inside = (mask == class_id + 1).astype(np.float32)
            coarse = cv2.resize(inside, grid[::-1], interpolation=cv2.INTER_AREA)
            soft = cv2.GaussianBlur(coarse, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
            maps[row] = soft / max(1e-6, float(soft.max()))
        records.append(Cam(sample.id, np.array(classes, np.int32), maps, (height, width)))
    manifest = {
        "kind": "cam", "method": "blurred ground truth", "options": {"sigma": sigma, "paper": False, "exif": False},
        "model": {}, "weights": None, "vocabulary": images.vocabulary.as_dict(), "versions": package_versions(),
        "dataset": {"name": images.name, "root": str(images.root), "split": images.split,
                    "ground_truth": images.ground_truth, **images.source},
    }  # fmt: skip
    with CamWriter(out, manifest, "float16", 64, overwrite=True) as writer:
        writer.write(Unit(0), records)
        writer.finish([record.id for record in records])
    return out


def photographs(devkit: Path, folder: Path, sigma: float) -> list[str]:
    """The table on photographs; images of five of them go to the working folder."""
    maps = blobs(DatasetOptions("voc", root=devkit), folder / "blobs.h5", sigma)
    par = folder / "blobs-par.h5"
    run_refine(RefineOptions("par", maps, par, run=RunOptions(overwrite=True)))
    made = {"blurred ground truth": maps, "+ PAR": par}
    for name, given in {
        "+ CRF, CLIP-ES's kernels": {"parameters": CLIP_ES},
        "+ CRF, CLIP-ES's kernels, released colours": {"parameters": CLIP_ES, "paper": True},
        "+ CRF, IRN's kernels": {"parameters": IRN},
        "+ CRF, CLIP-ES's kernels, background (1 - max)^2": {"parameters": CLIP_ES, "alpha": 2.0},
        "+ PAR + CRF, CLIP-ES's kernels": {"parameters": CLIP_ES},
    }.items():
        out = folder / f"crf-{len(made)}"
        run_crf(CrfOptions(par if "PAR" in name else maps, out, run=RunOptions(overwrite=True), **given))  # type: ignore[arg-type]
        made[name] = out
    rows = ["| step | mIoU | threshold |", "| --- | --- | --- |"]
    for name, path in made.items():
        report = miou(path)
        rows.append(f"| {name} | {100 * report.scores.miou:.1f} | {report.threshold or 'none'} |")
    rows += ["", "| kernels | pixels on which the torch solver and pydensecrf give the same label |", "| --- | --- |"]
    for name, parameters in (("+ CRF, CLIP-ES's kernels", CLIP_ES), ("+ CRF, IRN's kernels", IRN)):
        native = folder / f"native-{made[name].name}"
        run_crf(CrfOptions(maps, native, engine="pydensecrf", parameters=parameters, run=RunOptions(overwrite=True)))
        rows.append(f"| {name.split(', ')[1]} | {100 * agreement(made[name], native):.5f} % |")
    columns = [maps, par, made["+ CRF, CLIP-ES's kernels"]]
    show(devkit / "SegmentationClass", columns, folder / "photographs.png", 5)
    return rows


def agreement(one: Path, other: Path) -> float:
    """Share of pixels with equal labels in two folders of masks."""
    same = total = 0
    for path in one.glob("*.png"):
        labels = read_label_mask(path)
        same += int((labels == read_label_mask(other / path.name)).sum())
        total += labels.size
    return same / total


def segments(coco: Path, existing: Path, folder: Path, sigma: float) -> list[str]:
    """The table on photographs with segments that people drew; images of six of them go to the working folder."""
    maps = blobs(DatasetOptions("coco", root=coco), folder / "blobs.h5", sigma)
    par = folder / "blobs-par.h5"
    run_refine(RefineOptions("par", maps, par, run=RunOptions(overwrite=True)))
    run_sam_masks(SamMasksOptions(folder / "segments.h5", cams=maps, existing=existing, run=RunOptions(overwrite=True)))
    run_crf(CrfOptions(maps, folder / "crf", alpha=2.0, run=RunOptions(overwrite=True)))
    made = {"blurred ground truth": maps, "+ PAR": par, "+ CRF, background (1 - max)^2": folder / "crf"}
    for name, source, rules in (
        ("+ segments, FMA-WSSS's seeding", maps, RuleOptions("fma")),
        ("+ segments, as released (`--paper`)", maps, RuleOptions("fma", paper=True)),
        ("+ segments, what none covers from the maps (`--uncovered cam`)", maps, RuleOptions("fma", uncovered="cam")),
        ("+ segments, votes of the maps' labels (SEPL)", maps, RuleOptions("vote")),
        ("+ CRF, then votes of its labels", folder / "crf", RuleOptions("vote")),
    ):
        out = folder / f"CAMs-{len(made)}"
        run_sam_seed(SamSeedOptions(source, folder / "segments.h5", out, rules=rules, run=RunOptions(overwrite=True)))
        made[name] = out
    rows = ["| step | mIoU | threshold |", "| --- | --- | --- |"]
    for name, path in made.items():
        report = miou(path)
        rows.append(f"| {name} | {100 * report.scores.miou:.1f} | {report.threshold or 'none'} |")
    columns = [maps, folder / "crf", made["+ segments, FMA-WSSS's seeding"]]
    show(Path(str(open_dataset(DatasetOptions("coco", root=coco)).ground_truth)), columns, folder / "segments.png", 6)
    return rows


def show(truth: Path, columns: list[Path], out: Path, count: int) -> None:
    """Some photographs: image, truth, and one tile per output, maps at their best threshold."""
    opened = {path: open_cams(path) for path in columns if not path.is_dir()}
    best = {path: miou(path).threshold or 0.5 for path in opened}
    first = opened[columns[0]]
    find = image_finder(first.manifest["dataset"])
    palette = voc_palette()
    ids = list(first)
    rows = []
    for key in ids[:: max(1, len(ids) // count)][:count]:
        tiles = [np.asarray(find(key)), palette[read_label_mask(truth / f"{key}.png")]]
        for path in columns:
            if path in opened:
                labels = opened[path][key].label_mask(threshold=best[path])
            else:
                labels = read_label_mask(path / f"{key}.png")
            tiles.append(palette[labels])
        rows.append(
            np.concatenate([np.asarray(Image.fromarray(t.astype(np.uint8)).resize((250, 188))) for t in tiles], 1)
        )
    Image.fromarray(np.concatenate(rows)).save(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/results"), help="working folder")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where results.md goes")
    parser.add_argument("--limit", type=int, help="only the first scenes, to try it out")
    parser.add_argument("--photos", type=Path, help="a VOC devkit; writes results-photos.md instead")
    parser.add_argument("--sigma", type=float, default=4.0, help="blur of the ground truth in patches")
    parser.add_argument("--coco", type=Path, help="a COCO folder; with --segments: writes results-segments.md instead")
    parser.add_argument("--segments", type=Path, help="its segments: panoptic JSON, or a folder of instance maps")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    if chosen.photos:
        sections = {"TABLE": photographs(chosen.photos.resolve(), chosen.work, chosen.sigma)}
        name = "results-photos"
    elif chosen.coco:
        table = segments(chosen.coco.resolve(), chosen.segments.resolve(), chosen.work, chosen.sigma)
        sections, name = {"TABLE": table}, "results-segments"
    else:
        toy = Toy(chosen.work, chosen.limit)
        rows, made = chain(toy)
        sections = {
            "CHAIN": rows, "SEGMENTS": with_segments(toy, made), "FIXED": fixed_threshold(made),
            "METHODS": methods(toy), "QUIRKS": quirks(toy, made),
        }  # fmt: skip
        name = "results"
    text = (Path(__file__).parent / f"{name}.in.md").read_text(encoding="utf-8")
    for key, rows in sections.items():
        text = text.replace(f"@{key}@", "\n".join(rows))
    (chosen.out / f"{name}.md").write_text(text, encoding="utf-8")
    sys.stderr.write(f"{chosen.out / name}.md written in {time.perf_counter() - began:.0f} s\n")


if __name__ == "__main__":
    main()
