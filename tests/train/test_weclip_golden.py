"""WeCLIP against arrays computed by the authors' released code (tests/data, or $CLIPSEED_GOLDEN)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from clipseed.cam.gradcam import minmax
from clipseed.clip.vision import attention_map
from clipseed.data.vocabulary import load_vocabulary
from clipseed.evaluate.confusion import confusion, score
from clipseed.refine.affinity import balance, spread
from clipseed.refine.boxes import box_masks
from clipseed.refine.caa import CaaOptions
from clipseed.refine.par import refine_par
from clipseed.train.crops import Crops
from clipseed.train.inference import ViewOptions, averaged_logits, released_size
from clipseed.train.segmenter import enlarged
from clipseed.train.weclip import schedule
from clipseed.train.weclip import trainer as weclip_trainer
from clipseed.train.weclip.affinity import near, pair_labels, token_affinity
from clipseed.train.weclip.frozen import initial_cams, look, see
from clipseed.train.weclip.labels import score_maps, spread_cams, strongest
from clipseed.train.weclip.losses import affinity_loss, balanced_loss
from clipseed.train.weclip.network import WeclipNetwork
from clipseed.train.weclip.options import WeclipOptions, preset
from clipseed.train.weclip.pseudo_scores import pseudo_scores
from clipseed.train.weclip.refining import agreeing, confirmed_map, static_map
from clipseed.train.weclip.released import decoder_state
from clipseed.train.weclip.schedule import learning_rate_factor
from clipseed.train.weclip.trainer import Weclip

from helpers.weclip import decoder, labels_of, stored, tensor, text, tower


def close(ours: torch.Tensor, theirs: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["voc", "coco"])
def test_prompts(name: str) -> None:
    words = load_vocabulary(name)
    tokenizer = open_clip.SimpleTokenizer()
    for kind, phrases in (("fg", [item.prompt for item in words.classes]), ("bg", list(words.background))):
        theirs = stored("prompts")[f"{name}_{kind}"]
        ours = tokenizer([template.format(phrase) for phrase in phrases for template in words.templates]).numpy()
        assert not ours[:, theirs.shape[1] :].any()
        np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)


def test_backbone() -> None:
    """Statistics, positions (bilinear, no antialiasing), tokens and head-averaged attention of every block."""
    arrays = stored("backbone")
    levels = range(len(arrays["feats"]))
    pixels = tower().normalize(tensor("backbone", "rgb").permute(0, 3, 1, 2))
    close(pixels, arrays["image"], 1e-5)
    seen = tower().dense(tensor("backbone", "image"), block_tokens=levels, block_attention=levels)
    assert seen.grid == tuple(arrays["grid"])
    for level in levels:
        close(seen.block_tokens[level], arrays["feats"][level], 1e-4)
        close(seen.block_attention[level], arrays["attn"][level], 1e-5)


def test_backbone_of_a_size_that_is_no_multiple_of_a_patch() -> None:
    arrays, last = stored("backbone"), len(stored("backbone")["feats"]) - 1
    seen = tower().dense(tensor("backbone", "odd_image"), block_tokens=[last], block_attention=[last])
    assert seen.grid == tuple(arrays["odd_grid"])
    close(seen.block_tokens[last], arrays["odd_feat_last"], 1e-4)
    close(seen.block_attention[last], arrays["odd_attn_last"], 1e-5)


def test_decoder() -> None:
    arrays, network = stored("decoder"), decoder()
    levels = [level[:, 1:] for level in tensor("backbone", "feats")]
    grid = tuple(stored("backbone")["grid"].tolist())
    fused = network.fuse(levels)
    close(fused.transpose(1, 2).unflatten(2, grid), arrays["fused"], 1e-4)
    close(network.decode(fused, grid), arrays["seg"], 1e-4)
    close(network(levels, grid), arrays["seg"], 1e-4)
    close(token_affinity(fused), arrays["affinity"], 1e-4)
    assert np.abs(network(levels, grid).detach().numpy() - arrays["seg_halfproj"]).max() < 3.5e-3
    for block, theirs in zip(network.blocks, arrays["dec_attn_mean"], strict=True):
        q, k, _ = block.split_heads(fused)
        close(attention_map(q, k).mean(dim=1), theirs, 1e-4)
        fused = block(fused)


@pytest.mark.parametrize("data_set", ["voc", "coco"])
@pytest.mark.parametrize("phase", ["static", "rfm"])
def test_refining_map(data_set: str, phase: str) -> None:
    arrays = stored("rfm")
    name, threshold = f"{data_set}_{phase}", {"voc": 0.4, "coco": 0.7}[data_set]
    attention = list(tensor("rfm", "attn")[:, None, 1:, 1:])
    if phase == "static":
        spreading = static_map(attention[-8:])
    else:
        affinity = tensor("rfm", "seg_affinity")
        maps = attention[-len(arrays[f"{name}_layer_mass"]) :]
        stacked = torch.stack(maps)
        np.testing.assert_allclose(stacked.sum(dim=(-2, -1))[:, 0].numpy(), arrays[f"{name}_layer_mass"], rtol=1e-5)
        kept = agreeing(affinity, stacked)
        np.testing.assert_array_equal(kept[:, 0].numpy(), arrays[f"{name}_layer_selected"])
        spreading = confirmed_map(affinity, maps)
    close(spreading[0], arrays[f"{name}_pre_sinkhorn"], 1e-6)
    balanced = balance(spreading)[0]
    close(balanced @ balanced, arrays[f"{name}_trans_mat"], 1e-6)
    cams = tensor("rfm", "cams")
    masks = box_masks(cams.numpy(), threshold, released=True)
    np.testing.assert_array_equal(masks, arrays[f"{name}_box_mask"].astype(bool))
    raw = spread(balanced[None], (cams * torch.from_numpy(masks))[None])[0]
    close(raw, arrays[f"{name}_refined_lowres"], 1e-5)
    (low,) = spread_cams([cams], spreading, CaaOptions(threshold, released=True))
    close(low, minmax(raw, 1e-7).numpy(), 1e-5)
    wide = score_maps(low, (16 * low.shape[1], 16 * low.shape[2]))[1:, ::4, ::4]
    close(wide, arrays[f"{name}_refined_highres"], 1e-4)


@pytest.mark.parametrize("name", ["same_1", "same_20", "resized_20", "flat_20"])
def test_par(name: str) -> None:
    mask = tensor("par", "mask")
    kind, iterations = name.split("_")
    image = torch.full((1, 3, *mask.shape[-2:]), 0.3) if kind == "flat" else tensor("par", f"image_{kind}")
    close(refine_par(mask, image, int(iterations)), stored("par")[f"out_{name}"], 1e-4)


def test_losses() -> None:
    arrays, labels = stored("losses"), tensor("losses", "label")
    side = labels.shape[1] // tensor("losses", "seg_logits").shape[2]
    radius = int(arrays["radius"])
    grid = (labels.shape[1] // side, labels.shape[2] // side)
    np.testing.assert_array_equal(near(grid, radius).numpy(), arrays["radius_mask"].astype(bool))
    np.testing.assert_array_equal(pair_labels(labels, side).numpy(), arrays["affinity_label_nomask"])
    pairs = pair_labels(labels, side, radius)
    np.testing.assert_array_equal(pairs.numpy(), arrays["affinity_label"])
    assert int((pairs == 1).sum()) + 1 == arrays["pos_count_plus1"]
    assert int((pairs == 0).sum()) + 1 == arrays["neg_count_plus1"]
    affine = affinity_loss(tensor("losses", "affinity"), pairs)
    logits = tensor("losses", "seg_logits")
    loss = balanced_loss(logits, labels)
    close(affine, arrays["aff_loss"], 1e-5)
    close(loss, arrays["seg_loss"], 1e-5)
    close(loss + 0.1 * affine, arrays["total"], 1e-5)
    assert np.isnan(arrays["seg_loss_background_only"])
    background = torch.zeros_like(labels)
    wide = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    close(balanced_loss(logits, background), 0.5 * F.cross_entropy(wide, background.long()).numpy(), 1e-6)


def test_gradcam() -> None:
    """All classes of both images in one pass: maps, probabilities, and the last block's attention."""
    arrays, network = stored("gradcam"), tower()
    last = len(network.blocks) - 1
    image = tensor("backbone", "image")
    labels = [tuple(arrays[f"class_ids_{k}"].tolist()) for k in range(len(image))]
    sight = look(network, image, 1)
    cams, probability = initial_cams(network, text(), sight, labels, released=True)
    theirs = [arrays[f"prob_{k}"][0, : len(row)] for k, row in enumerate(labels)]
    close(probability, np.concatenate(theirs), 1e-5)
    attention = network.dense(image, block_attention=[last]).block_attention[last]
    for k, cam in enumerate(cams):
        close(cam, arrays[f"cam_{k}"], 1e-4)
        close(attention[k], arrays[f"last_attn_{k}"], 1e-5)
        close(sight.attention[0][k], arrays[f"last_attn_{k}"][1:, 1:], 1e-5)


@pytest.mark.parametrize("phase", ["static", "rfm"])
def test_end_to_end(phase: str) -> None:
    """From normalised images to pseudo-labels, refined by the decoder's own affinity or not."""
    arrays, network, image = stored("end_to_end"), decoder(), tensor("end_to_end", "image")
    labels = [tuple(arrays[f"keys_{k}"].tolist()) for k in range(len(image))]
    assert labels == labels_of(arrays["label_onehot"])
    options = WeclipOptions(**preset("voc", released=True))
    sight = look(tower(), image, options.rfm_layers if phase == "rfm" else options.static_layers)
    fused = network.fuse(sight.levels)
    close(network.decode(fused, sight.grid), arrays["seg"], 1e-4)
    affinity = token_affinity(fused).detach()
    close(affinity, arrays["affinity"], 1e-4)
    cams, _ = initial_cams(tower(), text(), sight, labels, released=True)
    spreading = confirmed_map(affinity, sight.attention) if phase == "rfm" else static_map(sight.attention)
    for k, maps in enumerate(spread_cams(cams, spreading, options.caa)):
        masks = torch.from_numpy(box_masks(cams[k].numpy(), options.box_threshold, released=True))
        raw = spread(balance(spreading[k : k + 1]), (cams[k] * masks)[None])[0]
        close(raw, arrays[f"{phase}_refined_lowres_{k}"], 1e-4)
        close(score_maps(maps, image.shape[2:]), arrays[f"{phase}_par_in_{k}"], 1e-3)
    kept = affinity if phase == "rfm" else None
    scores = pseudo_scores(cams, sight.attention, kept, image, options, image.shape[2:])
    for k, refined in enumerate(scores):
        close(refined, arrays[f"{phase}_par_out_{k}"], 1e-3)
    assert (strongest(scores, labels).numpy() == arrays[f"{phase}_pseudo_label"]).mean() >= 0.999


def theirs_of(name: str) -> str:
    """Our name for a tensor of the authors' decoder."""
    (ours,) = decoder_state({name: torch.zeros(1)}, Path(name))
    return ours


def test_train_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven steps: losses, learning rates, pseudo-labels, the first gradients and the last weights."""
    arrays, image = stored("train_steps"), tensor("train_steps", "image")
    steps = len(arrays["total"])
    monkeypatch.setattr(schedule, "WARM_UP_START", float(arrays["warmup_ratio"]))
    options = WeclipOptions(
        **preset("voc", released=True) | {"rfm_from": int(arrays["rfm_from_step"])},
        dropout=0.0, lr=10 * float(arrays["base_lr"]), warm_up=int(arrays["warmup_iter"]),
    )  # fmt: skip
    trainer = Weclip(tower(), text(), decoder().train(), options, int(arrays["max_iter"]))
    optimizer, labels = trainer.optimizer(), labels_of(arrays["label_onehot"])
    crops = Crops(image, torch.zeros(len(image), *image.shape[2:], dtype=torch.uint8), labels)
    made: list[torch.Tensor] = []
    monkeypatch.setattr(weclip_trainer, "strongest", lambda *given: made.append(strongest(*given)) or made[-1])
    for step in range(steps):
        rate = options.lr * trainer.schedule(step)
        assert abs(rate - arrays["lr"][step]) < 1e-12
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        losses = trainer.step(image, crops, step)
        losses["loss"].backward()
        for key, name in (("seg_loss", "segmentation"), ("aff_loss", "affinity"), ("total", "loss")):
            np.testing.assert_allclose(losses[name].item(), arrays[key][step], rtol=1e-3)
        assert (made[step].numpy() == arrays["pseudo_label"][step]).mean() >= 0.999
        if step == 0:
            gradients = {name: value.grad for name, value in trainer.module.named_parameters()}
            for key in (key for key in arrays if key.startswith("grad0.")):
                theirs = arrays[key].reshape(*arrays[key].shape[:2])
                close(gradients[theirs_of(key.removeprefix("grad0."))], theirs, 1e-4 * np.abs(theirs).max())
        optimizer.step()
    weights = trainer.module.state_dict()
    for key in (key for key in arrays if key.startswith("final.")):
        theirs = arrays[key].reshape(*arrays[key].shape[:2])
        difference = np.abs(weights[theirs_of(key.removeprefix("final."))].numpy() - theirs)
        assert difference.max() < 1e-3
        assert difference.mean() < 1e-5


def test_schedule() -> None:
    theirs = stored("train_steps")["schedule_mult_w50_m300"]
    ours = [learning_rate_factor(step, 300, 50) for step in range(len(theirs))]
    np.testing.assert_allclose(ours, theirs, atol=1e-12, rtol=0)


def bytes_of(image: torch.Tensor) -> torch.Tensor:
    """A normalised image as the network's user gives it: 0 to 255."""
    return (image * tower().std + tower().mean) * 255


@pytest.mark.parametrize("name", ["single", "msflip"])
def test_inference(name: str) -> None:
    """Logits of one scale, and averaged over scales and mirror images; predictions; their score."""
    arrays, images = stored("inference"), bytes_of(tensor("inference", "image"))
    network = WeclipNetwork(SimpleNamespace(tower=tower()), decoder(), WeclipOptions(statistics="imagenet"))
    scales = tuple(arrays["scales"].tolist()) if name == "msflip" else (1.0,)
    view = ViewOptions(scales, name == "msflip", int(arrays["resize_long"]), released=True)
    predicted = []
    for k in range(len(images)):
        small = released_size(images[k : k + 1], tower().patch, view.max_side)
        logits = averaged_logits(network, small, view)
        close(logits, arrays[f"logits_{name}_{k}"], 1e-3)
        predicted.append(enlarged(logits, images.shape[2:])[0].argmax(dim=0).numpy().astype(np.uint8))
    assert (np.stack(predicted) == arrays[f"pred_{name}"]).mean() >= 0.999
    counts = sum(confusion(*pair, len(arrays["hist_single"])) for pair in zip(arrays["gt"], predicted, strict=True))
    assert abs(counts - arrays[f"hist_{name}"]).sum() <= 2e-3 * counts.sum()


def test_pseudo_labels_of_whole_images() -> None:
    """The released code's val mode: labels at the image's own size, from a smaller view of it."""
    arrays, images, network = stored("inference"), tensor("inference", "image"), decoder()
    options = WeclipOptions(**preset("voc", released=True))
    labels = labels_of(arrays["label_onehot"])
    for k in range(len(images)):
        small = released_size(images[k : k + 1], tower().patch, int(arrays["resize_long"]))
        seen = see(tower(), text(), small, labels[k : k + 1], options.rfm_layers, released=True)
        affinity = token_affinity(network.fuse(seen.levels))
        scores = pseudo_scores(seen.cams, seen.attention, affinity, small, options, images.shape[2:])
        ours = strongest(scores, labels[k : k + 1])[0].numpy()
        assert (ours == arrays["cam_label"][k]).mean() >= 0.999


def test_metric() -> None:
    arrays = stored("inference")
    classes = len(arrays["metric_hist"])
    pairs = zip(arrays["metric_gt"], arrays["metric_pred"], strict=True)
    counts = sum(confusion(truth, predicted, classes) for truth, predicted in pairs)
    np.testing.assert_array_equal(counts, arrays["metric_hist"])
    found = score(counts)
    np.testing.assert_allclose(found.miou, arrays["metric_miou"], rtol=1e-12)
    np.testing.assert_allclose(found.pixel_accuracy, arrays["metric_pacc"], rtol=1e-12)
    np.testing.assert_allclose(found.mean_accuracy, arrays["metric_macc"], rtol=1e-12)
    np.testing.assert_allclose(found.class_iou, arrays["metric_iou"], rtol=1e-12)
    for name in ("single", "msflip", "cam"):
        hist = arrays[f"hist_{name}"].astype(np.int64)
        np.testing.assert_allclose(score(hist).miou, arrays[f"miou_{name}"], rtol=1e-12)
