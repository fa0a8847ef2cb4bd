"""CAA, PAR and the dense CRF against arrays computed by the authors' released code (tests/data)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipseed.clip.attention import patch_attention
from clipseed.refine.affinity import balance, spread
from clipseed.refine.boxes import box_masks, boxes_of
from clipseed.refine.caa import CaaOptions, caa
from clipseed.refine.crf import CLIP_ES, clip_es_colours, clip_es_unary, dense_crf
from clipseed.refine.par import refine_par

from helpers.clip_es import load_set, pixels_of
from helpers.golden import CASES, CLIP_ES_DATA, WECLIP_DATA, arrays, case, config


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_attention(folder: str, name: str) -> None:
    clip, _ = load_set(folder)
    pixels, _ = pixels_of(case(folder, name), config(folder)["patch"])
    ours = patch_attention(clip.tower, pixels, 8)
    np.testing.assert_allclose(ours[0].numpy(), case(folder, name)["attn_mean"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_affinity(folder: str, name: str) -> None:
    ours = balance(torch.from_numpy(case(folder, name)["attn_mean"]))
    np.testing.assert_allclose(ours.numpy(), case(folder, name)["affinity"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_box_masks(folder: str, name: str) -> None:
    arrays = case(folder, name)
    ours = box_masks(case(folder, name)["cam"], float(arrays["box_threshold"]), released=True)
    np.testing.assert_array_equal(ours, arrays["box_mask"].astype(bool))


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_caa(folder: str, name: str) -> None:
    """Refined maps before and after the last normalisation; a class without a box comes out zero."""
    arrays = case(folder, name)
    cam = torch.from_numpy(arrays["cam"])
    threshold = float(case(folder, name)["box_threshold"])
    attention = torch.from_numpy(arrays["attn_mean"])[None]
    masks = torch.from_numpy(box_masks(arrays["cam"], threshold, released=True))
    raw = spread(balance(attention), (cam * masks)[None])[0]
    np.testing.assert_allclose(raw.numpy(), arrays["cam_refined"], atol=1e-5, rtol=0)
    (ours,) = caa([cam], attention, CaaOptions(threshold, released=True))
    lowest = arrays["cam_refined"].min(axis=(1, 2), keepdims=True)
    shifted = arrays["cam_refined"] - lowest
    np.testing.assert_allclose(ours.numpy(), shifted / (1e-7 + shifted.max(axis=(1, 2), keepdims=True)), atol=5e-5)


def test_boxes_of_many_maps() -> None:
    stored = arrays(CLIP_ES_DATA / "boxes.npz")
    for number in range(int(stored["count"])):
        cam, threshold = stored[f"map_{number}"], float(stored[f"thr_{number}"])
        expected = sorted(tuple(int(v) for v in box) for box in stored[f"boxes_{number}"])
        ours = boxes_of(cam, threshold, released=True)
        assert set(ours) <= set(expected), number  # the released code also boxes holes, inside other boxes
        mask = box_masks(cam[None], threshold, released=True)[0]
        np.testing.assert_array_equal(mask, stored[f"mask_{number}"].astype(bool))


@pytest.mark.parametrize("name", ["same_1", "same_20", "resized_20", "flat_20"])
def test_par(name: str) -> None:
    stored = arrays(WECLIP_DATA / "par.npz")
    mask = torch.from_numpy(stored["mask"])
    kind, iterations = name.split("_")
    image = torch.full((1, 3, *mask.shape[-2:]), 0.3) if kind == "flat" else torch.from_numpy(stored[f"image_{kind}"])
    ours = refine_par(mask, image, int(iterations))
    np.testing.assert_allclose(ours.numpy(), stored[f"out_{name}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_crf(folder: str, name: str) -> None:
    """The torch engine from the released unary and colours: posterior, arg-max and confident pixels."""
    arrays = case(folder, name)
    keys = np.array([0, *(case(folder, name)["keys"] + 1)])
    unary = torch.from_numpy(arrays["crf_unary"].astype(np.float32)).view(len(keys), *arrays["crf_label"].shape)
    (posterior,) = dense_crf([unary], [torch.from_numpy(arrays["crf_image"])], CLIP_ES)
    np.testing.assert_allclose(posterior.numpy(), arrays["crf_q"], atol=2e-3, rtol=0)
    labels = keys[posterior.argmax(dim=0).numpy()]
    assert (labels == arrays["crf_label"]).mean() >= 0.999
    labels[posterior.amax(dim=0).numpy() < 0.95] = 255
    assert (labels == arrays["pseudo_mask"]).mean() >= 0.999


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_crf_inputs(folder: str, name: str) -> None:
    """Unary in half precision and wrapped BGR colours, exactly."""
    arrays = case(folder, name)
    ours = clip_es_unary(arrays["crf_probmap_fp16"], released=True)
    np.testing.assert_array_equal(ours.reshape(len(ours), -1), arrays["crf_unary"].astype(np.float32))
    image = case(folder, name)["image"]
    image = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    np.testing.assert_array_equal(clip_es_colours(image), arrays["crf_image"])


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_pydensecrf_is_exact(folder: str, name: str) -> None:
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 needs a C++ compiler: pip install 'clipseed[crf]'")
    from clipseed.refine.crf_native import native_crf

    arrays = case(folder, name)
    unary = arrays["crf_unary"].astype(np.float32).reshape(-1, *arrays["crf_label"].shape)
    posterior = native_crf(unary, arrays["crf_image"], CLIP_ES)
    np.testing.assert_array_equal(posterior, arrays["crf_q"])
