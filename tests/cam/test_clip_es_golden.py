"""Our functions against arrays computed by CLIP-ES's released code (tests/data/clip_es, whose README has the
tolerances).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clipseed
from clipseed.cam.gradcam import (
    channel_weights,
    gradcam,
    normalize,
    pair_index,
    run_last_block,
    score_gradient,
)
from clipseed.clip.text import prototypes
from clipseed.data import load_vocabulary
from clipseed.data.voc import object_names
from clipseed.evaluate.confusion import confusion, score
from clipseed.evaluate.sweep import PowerSweep, ThresholdSweep
from clipseed.store import Cam

from helpers.clip_es import load_set, pixels_of
from helpers.golden import CASES, CLIP_ES_DATA, SETS, case, config, vocabulary


def close(ours: torch.Tensor, theirs: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("folder", SETS)
def test_text_prototypes(folder: str) -> None:
    clip, bank = load_set(folder)
    text = case(folder, "text")
    words = load_vocabulary(vocabulary(folder))
    assert [item.prompt for item in words.classes] == text["fg_names"].tolist()
    assert list(words.background) == text["bg_names"].tolist()
    assert words.templates == (str(text["template"]),)
    close(bank.classes, text["fg_text_features"], 1e-6)
    close(bank.background, text["bg_text_features"], 1e-6)
    tokens = clip._tokenizer([words.templates[0].format(name) for name in text["fg_names"]])
    np.testing.assert_array_equal(tokens.numpy(), text["fg_tokens"])
    ensemble, _ = prototypes(
        clip._model, clip._tokenizer, text["fg_names"].tolist(), text["ensemble_templates"].tolist()
    )
    close(ensemble, text["fg_text_features_ensemble"], 1e-6)


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_forward_pass(folder: str, name: str) -> None:
    clip, bank = load_set(folder)
    arrays = case(folder, name)
    pixels, grid = pixels_of(arrays, config(folder)["patch"])
    assert grid == tuple(arrays["patch_grid"])
    np.testing.assert_array_equal(clip.tower.position_table(grid).numpy(), arrays["pos_embed"])
    frozen = range(max(0, len(clip.tower.blocks) - 8), len(clip.tower.blocks) - 1)
    features = clip.dense(pixels, tuple(frozen))
    close(features.tokens[0], arrays["tokens_last"], 1e-5)
    state = run_last_block(clip.tower, features.tokens)
    close(state.feature[0], arrays["image_feature"], 1e-5)
    assert features.attention is not None
    mean = (features.attention * len(frozen) + state.mean_attention()) / (len(frozen) + 1)
    close(mean[0], arrays["attn_mean"], 1e-5)
    present = torch.zeros(1, len(bank.classes), dtype=torch.bool)
    present[0, arrays["keys"]] = True
    logits = bank.logits(state.feature, present)[0]
    chosen = torch.cat([logits[arrays["keys"]], logits[len(bank.classes) :]])
    close(chosen, arrays["logits"], 1e-4)
    close(chosen.softmax(dim=0), arrays["probs"], 1e-5)


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_class_activation_maps(folder: str, name: str) -> None:
    clip, bank = load_set(folder)
    arrays = case(folder, name)
    pixels, grid = pixels_of(arrays, config(folder)["patch"])
    labels = [arrays["keys"].tolist()]
    with torch.inference_mode():
        state = run_last_block(clip.tower, clip.dense(pixels).tokens)
        image, label = pair_index(labels, torch.device("cpu"))
        present = torch.zeros(1, len(bank.classes), dtype=torch.bool)
        present[image, label] = True
        gradient = score_gradient(state.feature, bank, present, image, label, "softmax")
        weights = channel_weights(clip.tower, state, [len(labels[0])], gradient)
        raw = gradcam(clip.tower, state, bank, labels, grid)
    peak = np.abs(arrays["grad_mean"]).max(axis=1, keepdims=True)
    close(weights / torch.from_numpy(peak), arrays["grad_mean"] / peak, 5e-5)
    strength = np.abs(arrays["cam_raw"]).max()
    close(raw / strength, arrays["cam_raw"] / strength, 5e-5)
    close(normalize(raw, released=True), arrays["cam"], 5e-5)


@pytest.mark.parametrize(("folder", "name"), [pair for pair in CASES if vocabulary(pair[0]) == "voc"])
def test_labels_from_the_annotation(folder: str, name: str) -> None:
    arrays = case(folder, name)
    names = object_names(str(arrays["annotation_xml"]).encode(), name)
    assert names == arrays["labels"].tolist()
    assert load_vocabulary("voc").indices(names, name) == tuple(arrays["keys"])


def refined_seed(arrays: dict[str, np.ndarray]) -> Cam:
    maps = arrays["cam_refined"]
    maps = maps - maps.min(axis=(1, 2), keepdims=True)
    maps = (maps / (1e-7 + maps.max(axis=(1, 2), keepdims=True))).astype(np.float32)
    return Cam("x", arrays["keys"].astype(np.int32), maps, arrays["gt"].shape)


@pytest.mark.parametrize("folder", SETS)
def test_evaluation(folder: str) -> None:
    """Labels and scores of CLIP-ES's evaluation: exponents 1 and 2, and a constant background of 0.3."""
    classes = len(load_vocabulary(vocabulary(folder)).classes) + 1
    stored = case(folder, "evaluate")
    powers, constant = PowerSweep(classes, (1, 2)), ThresholdSweep(classes, (0.3,), half=True)
    flips = 0
    for case_folder, name in CASES:
        if case_folder != folder:
            continue
        arrays = case(folder, name)
        seed = refined_seed(arrays)
        for exponent in (1, 2):
            flips += int((seed.label_mask(alpha=exponent) != arrays[f"pred_thr{exponent}"]).sum())
        powers.update(seed, arrays["gt"])
        constant.update(seed, arrays["gt"])
    assert flips == 0
    matrices = dict(zip(("thr1", "thr2", "thr0.3"), [*powers.matrices(), *constant.matrices()], strict=True))
    for setting, matrix in matrices.items():
        scores = score(matrix)
        tolerance = 1e-9 if setting != "thr0.3" else 2e-5  # one unit of half precision moves single pixels
        assert scores.miou == pytest.approx(float(stored[f"miou_{setting}"]), abs=tolerance)
        assert scores.pixel_accuracy == pytest.approx(float(stored[f"pixel_acc_{setting}"]), abs=tolerance)
        assert scores.mean_accuracy == pytest.approx(float(stored[f"mean_acc_{setting}"]), abs=tolerance)
        assert scores.frequency_weighted_iou == pytest.approx(float(stored[f"fw_iou_{setting}"]), abs=tolerance)
        np.testing.assert_allclose(scores.class_iou, stored[f"class_iou_{setting}"], rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("folder", SETS)
def test_metric_alone(folder: str) -> None:
    stored = case(folder, "evaluate")
    classes = len(stored["metric_class_iou"])
    pairs = zip(stored["metric_true"], stored["metric_pred"], strict=True)
    scores = score(np.sum([confusion(truth, prediction, classes) for truth, prediction in pairs], axis=0))
    assert scores.miou == pytest.approx(float(stored["metric_miou"]), abs=1e-12)
    assert scores.mean_accuracy == pytest.approx(float(stored["metric_mean_acc"]), abs=1e-12)
    np.testing.assert_allclose(scores.class_iou, stored["metric_class_iou"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("folder", SETS)
def test_the_command_reproduces_the_maps(folder: str, tmp_path: Path) -> None:
    """``clipseed cam --paper`` on image files, with labels from a JSON file, gives the released code's maps."""
    from clipseed.cli.main import main

    images = tmp_path / "images"
    images.mkdir()
    labels = {}
    names = [name for case_folder, name in CASES if case_folder == folder]
    for name in names:
        arrays = case(folder, name)
        Image.fromarray(arrays["image"]).save(images / f"{name}.png")
        labels[name] = [int(key) for key in arrays["keys"]]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    out = tmp_path / "cams.h5"
    code = main([
        "cam", "--dataset", "folder", "--images", str(images), "--labels", str(tmp_path / "labels.json"),
        "--classes", vocabulary(folder), "--weights", str(CLIP_ES_DATA / folder / "weights.npz"), "--paper",
        "--precision", "fp32", "--device", "cpu", "--out", str(out), "--quiet",
    ])  # fmt: skip
    assert code == 0, (tmp_path / "cams.skipped.csv").read_text()
    seeds = clipseed.open_cams(out)
    assert sorted(seeds) == sorted(names)
    for name in names:
        arrays = case(folder, name)
        assert seeds[name].classes.tolist() == arrays["keys"].tolist()
        assert seeds[name].size == arrays["image"].shape[:2]
        np.testing.assert_allclose(seeds[name].maps, arrays["cam"], rtol=0, atol=5e-5)
