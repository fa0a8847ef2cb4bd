"""Maps from attention surgery against plain loops over photos, heads, patches and texts in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipseed.cam.dense import DENSE_METHODS, competitors, dense_cams, pair_scores, subtract_redundant
from clipseed.cam.methods import METHODS, compute_cams
from clipseed.clip.surgery import dual_path, neighbour_patches, self_correlation, value_patches, vicinity
from clipseed.clip.text import TextBank
from clipseed.clip.vision import VisionTower, tower_from
from clipseed.minmax import minmax

from helpers.models import tiny_config, tiny_model

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
TOWERS: dict[str, tuple[dict[str, Any], bool]] = {
    "openai": ({}, True),
    "layer scale": ({"ls_init_value": 0.3, "layers": 6}, False),
    "CLIPA": ({"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}, False),
    "one block, one head": ({"head_width": 64, "layers": 1}, True),
}
LABELS = [[2, 0, 5], [1], [4, 3]]


def make(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, VisionTower]:
    vision, quick = TOWERS[kind]
    model = tiny_model(tiny_config(**vision), quick_gelu=quick)
    return model, tower_from(model.visual, MEAN, STD, CPU, dtype)


def bank(classes: int = 6, background: int = 4, scale: float = 15.0) -> TextBank:
    rows = F.normalize(torch.randn(classes + background, 32, generator=torch.Generator().manual_seed(5)), dim=-1)
    return TextBank(rows[:classes], rows[classes:], scale)


def photos(seed: int, count: int = 3, grid: tuple[int, int] = (3, 5)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, grid[0] * 16, grid[1] * 16), dtype=torch.uint8, generator=generator)


class FakeClip:
    """Only what the maps need of a FrozenClip."""

    def __init__(self, tower: VisionTower) -> None:
        self.tower = tower

    def dense(self, images: Tensor) -> Any:
        return self.tower.dense(self.tower.normalize(images))

    @property
    def exact(self) -> FakeClip:
        return self


def array(tensor: Tensor) -> Any:
    return tensor.detach().double().numpy()


def softmax(row: Any) -> Any:
    powers = np.exp(np.asarray(row) - np.max(row))
    return powers / powers.sum()


class Loops:
    """The methods of one photo, one head, one patch at a time, on the weights of the open_clip module itself."""

    def __init__(self, model: Any, tower: VisionTower, image: Tensor) -> None:
        self.visual, self.quick = model.visual, tower.blocks[0].activation == "quickgelu"
        tokens, self.grid = tower.embed(tower.normalize(image[None]))
        self.start = list(array(tokens[0]))

    @staticmethod
    def norm(x: Any, module: Any) -> Any:
        return (x - x.mean()) / np.sqrt(x.var() + module.eps) * array(module.weight) + array(module.bias)

    def heads(self, block: Any, tokens: list[Any]) -> list[tuple[Any, Any, Any]]:
        """Queries, keys and values ``(N, d)`` per head."""
        weight, bias, count = array(block.attn.in_proj_weight), array(block.attn.in_proj_bias), block.attn.num_heads
        packed = np.stack([weight @ self.norm(x, block.ln_1) + bias for x in tokens])
        width = packed.shape[1] // 3
        d = width // count
        q, k, v = packed[:, :width], packed[:, width : 2 * width], packed[:, 2 * width :]
        return [(q[:, h * d : h * d + d], k[:, h * d : h * d + d], v[:, h * d : h * d + d]) for h in range(count)]

    @staticmethod
    def gain(module: Any, x: Any) -> Any:
        return x * array(module.gamma) if hasattr(module, "gamma") else x

    def out(self, block: Any, parts: list[Any]) -> Any:
        """One token's heads through the output map and LayerScale."""
        moved = array(block.attn.out_proj.weight) @ np.concatenate(parts) + array(block.attn.out_proj.bias)
        return self.gain(block.ls_1, moved)

    def block(self, block: Any, tokens: list[Any]) -> list[Any]:
        """The unchanged block."""
        heads, found = self.heads(block, tokens), []
        for i, token in enumerate(tokens):
            parts = [softmax([q[i] @ key / np.sqrt(len(key)) for key in k]) @ v for q, k, v in heads]
            x = token + self.out(block, parts)
            hidden = array(block.mlp.c_fc.weight) @ self.norm(x, block.ln_2) + array(block.mlp.c_fc.bias)
            hidden = hidden / (1 + np.exp(-1.702 * hidden)) if self.quick else F.gelu(torch.from_numpy(hidden)).numpy()
            last = array(block.mlp.c_proj.weight) @ hidden + array(block.mlp.c_proj.bias)
            found.append(x + self.gain(block.ls_2, last))
        return found

    def before_last(self) -> list[Any]:
        tokens = self.start
        for block in self.visual.transformer.resblocks[:-1]:
            tokens = self.block(block, tokens)
        return tokens

    def maskclip(self) -> list[Any]:
        block = self.visual.transformer.resblocks[-1]
        heads = self.heads(block, self.before_last())
        return [self.out(block, [v[i] for _, _, v in heads]) for i in range(1, len(self.start))]

    def naclip(self, sigma: float = 5.0) -> list[Any]:
        block = self.visual.transformer.resblocks[-1]
        heads = self.heads(block, self.before_last())
        place = [divmod(i, self.grid[1]) for i in range(len(self.start) - 1)]
        found = []
        for i in range(1, len(self.start)):
            parts = []
            for _, k, v in heads:
                row = [k[i] @ key / np.sqrt(len(key)) for key in k]
                for j in range(1, len(row)):
                    square = sum((a - b) ** 2 for a, b in zip(place[i - 1], place[j - 1], strict=True))
                    row[j] += np.exp(-square / (2 * sigma**2))
                parts.append(softmax(row) @ v)
            found.append(self.out(block, parts))
        return found

    def svc(self, blocks: int = 5, heads_as: str = "sum") -> list[Any]:
        every = self.visual.transformer.resblocks
        first = max(0, len(every) - blocks)
        tokens, fresh = self.start, self.start
        for position, block in enumerate(every):
            if position == first:
                fresh = tokens
            if position >= first:
                heads, moved = self.heads(block, tokens), []
                for i, token in enumerate(fresh):
                    shared = np.zeros(len(tokens))
                    for triple in heads:
                        for x in triple:
                            shared += softmax([x[i] @ other / np.sqrt(len(other)) for other in x]) / 3
                    if heads_as == "mean":
                        shared /= len(heads)
                    moved.append(token + self.out(block, [shared @ v for _, _, v in heads]))
                fresh = moved
            tokens = self.block(block, tokens)
        self.last = tokens
        return fresh[1:]

    def unit(self, token: Any) -> Any:
        """Final norm, projection, unit length."""
        joint = self.norm(token, self.visual.ln_post) @ array(self.visual.proj)
        return joint / np.linalg.norm(joint)

    def image(self) -> Any:
        """Unit image feature; after ``svc``."""
        if self.visual.pool_type == "avg":
            return self.unit(np.mean(self.last[1:], axis=0))
        return self.unit(self.last[0])


def subtracted(patches: list[Any], image: Any, texts: Any) -> Any:
    """Feature subtraction with every ``(class, channel)`` feature of a patch held."""
    share = softmax([2 * image @ t for t in texts])
    weights = share / share.mean()
    found = []
    for n in patches:
        features = np.array([[n[d] * t[d] * w for d in range(len(n))] for t, w in zip(texts, weights, strict=True)])
        found.append((features - features.mean(axis=0)).sum(axis=1))
    return np.array(found)


def expected(model: Any, tower: VisionTower, image: Tensor, text: TextBank, present: list[int], method: str) -> Any:
    """Similarities to the present classes and the probability maps, each ``(K, h, w)``, not normalised."""
    loops = Loops(model, tower, image)
    patches = [loops.unit(token) for token in getattr(loops, method)()]
    texts = np.concatenate([array(text.classes)[present], array(text.background)])
    if method == "svc":
        scores = subtracted(patches, loops.image(), texts)
    else:
        scores = np.array([[n @ t for t in texts] for n in patches])
    chance = np.array([softmax(text.logit_scale * row) for row in scores])
    return [x[:, : len(present)].T.reshape(-1, *loops.grid) for x in (scores, chance)]


@pytest.mark.parametrize("method", DENSE_METHODS)
@pytest.mark.parametrize("kind", TOWERS)
def test_maps_equal_plain_loops(kind: str, method: Any) -> None:
    model, tower = make(kind)
    side = tower.patch * 3
    images, text, clip = photos(1)[:, :, :side], bank(), FakeClip(tower)
    loops = [expected(model, tower, image, text, row, method) for image, row in zip(images, LABELS, strict=True)]
    scores = dense_cams(clip, images, text, LABELS, method, "similarity")  # type: ignore[arg-type]
    theirs = torch.from_numpy(np.concatenate([pair[0] for pair in loops])).float()
    assert theirs.std() > 0.02
    assert (scores - theirs).abs().max() < 2e-5
    found = torch.cat(compute_cams(clip, text, [images], LABELS, (3, 5), method).maps)  # type: ignore[arg-type]
    theirs = minmax(torch.from_numpy(np.concatenate([pair[1] for pair in loops])).float())
    assert (found - theirs).abs().max() < 1e-3
    assert found.amin(dim=(1, 2)).max() == 0
    assert found.amax(dim=(1, 2)).min() == 1


@pytest.mark.parametrize(("blocks", "heads"), [(1, "sum"), (2, "mean"), (4, "sum"), (9, "mean")])
def test_number_of_blocks_and_heads_of_the_new_path(blocks: int, heads: Any) -> None:
    model, tower = make("layer scale")
    images = photos(2, 1)
    loops = Loops(model, tower, images[0])
    theirs = np.array(loops.svc(blocks, heads))
    found = dual_path(tower, tower.normalize(images), blocks, heads)
    assert np.abs(array(found.patches[0]) - theirs).max() < 1e-5 * np.abs(theirs).max()
    assert np.abs(array(F.normalize(found.image, dim=-1)[0]) - loops.image()).max() < 1e-5
    assert found.grid == (3, 5)


def test_the_original_path_is_the_model_itself() -> None:
    for kind in TOWERS:
        _, tower = make(kind)
        pixels = tower.normalize(photos(3))
        assert (dual_path(tower, pixels).image - tower.encode(pixels)).abs().max() < 1e-5, kind
    with pytest.raises(ValueError, match="at least 1 block"):
        dual_path(tower, pixels, 0)


def test_self_correlation_is_shared_by_the_heads() -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 8, generator=torch.Generator().manual_seed(4)).unbind(0)
    found = self_correlation(q, k, v)
    assert found.shape == (2, 7, 7)
    assert (found.sum(dim=-1) - 4).abs().max() < 1e-5
    assert (self_correlation(q, k, v, "mean") * 4 - found).abs().max() < 1e-6


def test_vicinity() -> None:
    found = vicinity((2, 3), 1.5, CPU)
    for i in range(6):
        for j in range(6):
            square = (i // 3 - j // 3) ** 2 + (i % 3 - j % 3) ** 2
            assert found[i, j] == pytest.approx(np.exp(-square / 4.5), rel=1e-5)
    _, tower = make("openai")
    tokens = tower.dense(tower.normalize(photos(5))).tokens
    narrow, wide = (neighbour_patches(tower, tokens, (3, 5), sigma) for sigma in (0.5, 50.0))
    assert (narrow - wide).abs().max() > 1e-3
    assert value_patches(tower, tokens).shape == narrow.shape == (3, 15, 64)


@pytest.mark.parametrize("method", DENSE_METHODS)
def test_images_and_absent_classes_do_not_matter(method: Any) -> None:
    _, tower = make("layer scale")
    clip: Any = FakeClip(tower)
    images, text = photos(6), bank()
    together = compute_cams(clip, text, [images], LABELS, (3, 5), method).maps
    for k, maps in enumerate(together):
        alone = compute_cams(clip, text, [images[k : k + 1]], LABELS[k : k + 1], (3, 5), method).maps[0]
        assert (maps - alone).abs().max() < 1e-4
    other = text.classes.clone()
    other[[0, 1, 2, 3, 5]] = other[[5, 3, 0, 1, 2]]  # everything that the last photo does not show, but class 3
    other[3] = text.classes[3]
    swapped = TextBank(other, text.background, text.logit_scale)
    again = compute_cams(clip, swapped, [images], LABELS, (3, 5), method).maps
    assert (again[2] - together[2]).abs().max() < 1e-5
    assert (again[0] - together[0]).abs().max() > 1e-2


@pytest.mark.parametrize("method", DENSE_METHODS)
def test_scales_and_flip(method: Any) -> None:
    _, tower = make("openai")
    clip: Any = FakeClip(tower)
    images, large, text = photos(7, 2), photos(8, 2, (4, 7)), bank()
    labels = LABELS[:2]

    def single(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        return torch.cat(compute_cams(clip, text, [pixels], labels, grid, method).maps)

    combined = torch.cat(compute_cams(clip, text, [images, large], labels, (3, 5), method, flip=True).maps)
    views = [single(x, grid) for x, grid in ((images, (3, 5)), (large, (4, 7)))]
    views += [single(x.flip(-1), grid).flip(-1) for x, grid in ((images, (3, 5)), (large, (4, 7)))]
    resized = [F.interpolate(view[None], size=(3, 5), mode="bilinear")[0] for view in views]
    assert (combined - minmax(torch.stack(resized).mean(dim=0))).abs().max() < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
@pytest.mark.parametrize("method", DENSE_METHODS)
def test_half_precision_stays_close(method: Any, dtype: torch.dtype, tolerance: float) -> None:
    model, tower = make("openai")
    half: Any = FakeClip(tower_from(model.visual, MEAN, STD, CPU, dtype))
    whole: Any = FakeClip(tower)
    images, text = photos(9), bank()
    found = compute_cams(half, text, [images], LABELS, (3, 5), method)
    exact = compute_cams(whole, text, [images], LABELS, (3, 5), method)
    assert found.recomputed == 0
    difference = torch.cat(found.maps) - torch.cat(exact.maps)
    assert difference.abs().mean() < tolerance


@pytest.mark.parametrize("method", DENSE_METHODS)
def test_nan_is_computed_again_in_float32(method: Any) -> None:
    _, tower = make("openai")
    whole: Any = FakeClip(tower)

    class Broken(FakeClip):
        """The second photo overflows."""

        @property
        def exact(self) -> FakeClip:
            return whole

    class Overflowing:
        def __getattr__(self, name: str) -> Any:
            return getattr(tower, name)

        def embed(self, pixels: Tensor) -> Any:
            tokens, grid = tower.embed(pixels)
            tokens[1] = float("inf")
            return tokens, grid

        def dense(self, pixels: Tensor) -> Any:
            return VisionTower.dense(self, pixels)  # type: ignore[arg-type]

    broken: Any = Broken(Overflowing())  # type: ignore[arg-type]
    images, text = photos(10), bank()
    found = compute_cams(broken, text, [images], LABELS, (3, 5), method)
    assert found.recomputed == 1
    for ours, theirs in zip(found.maps, compute_cams(whole, text, [images], LABELS, (3, 5), method).maps, strict=True):
        assert (ours - theirs).abs().max() < 1e-4


def test_a_class_without_competitors_keeps_its_similarity() -> None:
    """One label and no background words: a softmax over one text would be 1 everywhere, a difference 0."""
    _, tower = make("openai")
    clip: Any = FakeClip(tower)
    text = bank(background=0)
    for method in DENSE_METHODS:
        maps = compute_cams(clip, text, [photos(11)], [[1], [2, 4], []], (3, 5), method).maps
        assert [len(row) for row in maps] == [1, 2, 0]
        assert all((row.amax(dim=(1, 2)) == 1).all() for row in maps)


def test_a_softmax_keeps_only_the_weights_of_feature_subtraction() -> None:
    cosines = torch.rand(2, 7, 10, generator=torch.Generator().manual_seed(12))
    text, labels = bank(), [[0, 3], [4]]
    among = competitors(text, labels)
    assert among.sum(dim=1).tolist() == [6, 5]
    even = torch.zeros(2, 10)  # every text equally like the photo: all weights are 1
    found = pair_scores(subtract_redundant(cosines, even, among), text, labels)
    assert (found - pair_scores(cosines, text, labels)).abs().max() < 1e-5
    uneven = torch.linspace(0, 1, 10).expand(2, -1)
    found = pair_scores(subtract_redundant(cosines, uneven, among), text, labels)
    assert (found - pair_scores(cosines, text, labels)).abs().max() > 0.1


def test_every_method_can_be_chosen(tmp_path: Path) -> None:
    from clipseed.data.dataset import DatasetOptions
    from clipseed.jobs.cam import CamOptions, run_cam
    from clipseed.runtime.run import RunOptions
    from clipseed.store.cams import open_cams

    assert set(DENSE_METHODS) < set(METHODS)
    for method in DENSE_METHODS:
        data = DatasetOptions(dataset="toy", limit=3)
        report = run_cam(
            CamOptions(data, tmp_path / f"{method}.h5", method=method, flip=True, run=RunOptions(device="cpu"))
        )
        assert report.stats.computed == 3
        with open_cams(report.out) as seeds:
            assert seeds.manifest["method"] == method


@pytest.mark.slow
def test_maps_find_the_toy_objects() -> None:
    """Measured on these 40 scenes: 60.9, 72.4 and 23.5; maps of random numbers score 11.5."""
    from clipseed.clip.model import FrozenClip
    from clipseed.data.toy.world import lay_out
    from clipseed.data.vocabulary import load_vocabulary
    from clipseed.evaluate.confusion import score
    from clipseed.evaluate.sweep import ThresholdSweep
    from clipseed.store.cam_records import Cam
    from tools.toy.measure import _pixels

    clip = FrozenClip.load(weights="toy", device="cpu")
    text = clip.encode_text(load_vocabulary("toy"))
    sweeps = {method: ThresholdSweep(len(text.classes) + 1) for method in (*DENSE_METHODS, "random")}
    rng = np.random.default_rng(0)
    for index in range(40):
        scene = lay_out(0, index)
        pixels, grid = _pixels(clip, scene)
        for method, sweep in sweeps.items():
            if method == "random":
                maps = rng.random((len(scene.labels), *grid), np.float32)
            else:
                maps = compute_cams(clip, text, [pixels], [scene.labels], grid, method).maps[0].numpy()  # type: ignore[arg-type]
            sweep.update(Cam("", np.array(scene.labels, np.int32), maps, scene.size), scene.mask())
    found = {method: max(score(m).miou for m in sweep.matrices()) for method, sweep in sweeps.items()}
    assert found["random"] < 0.15
    for method, floor in {"maskclip": 0.55, "svc": 0.66, "naclip": 0.18}.items():
        assert found[method] > floor, found
