"""Grad-CAM against arithmetic by hand, attention rows against formulas, a map of every architecture, the figures."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from commands import call
from model_builds import MODELS, cheap, images, shaken
from torch import nn

from fer.errors import UserError
from fer.explanation.attention import attention, rollout
from fer.explanation.cam import as_map, grad_cam
from fer.explanation.embedding import Seen, pick, plane
from fer.explanation.pictures import confusion_figure, save
from fer.explanation.study import Options, explain
from fer.trained import open_run


class Tiny(nn.Module):
    """One convolution, a ReLU, the mean, a linear layer."""

    def __init__(self):
        super().__init__()
        self.num_classes = 3
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.linear = nn.Linear(4, 3)
        self.cam_layer = self.conv

    def forward(self, image):
        return self.linear(self.conv(image).mean((2, 3)))


def by_hand(module, image, target):
    """Grad-CAM of `Tiny` in float64 loops: its gradients are weight / area, whatever the activations."""
    weight, bias = (p.double().numpy() for p in (module.conv[0].weight.detach(), module.conv[0].bias.detach()))
    linear = module.linear.weight.detach().double().numpy()
    pixels = np.pad(image.double().numpy(), ((0, 0), (1, 1), (1, 1)))
    side = image.shape[1]
    total = np.zeros((side, side))
    for y, x in itertools.product(range(side), repeat=2):
        for k in range(4):
            activation = max(0.0, bias[k] + (weight[k] * pixels[:, y : y + 3, x : x + 3]).sum())
            total[y, x] += linear[target, k] / side**2 * activation
    total = np.maximum(total, 0)
    total = total - total.min()
    return total / total.max()


def test_grad_cam_by_hand():
    torch.manual_seed(1)
    module, image = Tiny().eval(), torch.randn(2, 3, 6, 6)
    with torch.inference_mode():  # as callers have it
        found = grad_cam(module, image, torch.tensor([2, 0]))
        named = module(image).argmax(1)
    expected = np.stack([by_hand(module, image[0], 2), by_hand(module, image[1], 0)])
    assert expected.max() > 0.99
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5)
    of_named = grad_cam(module, image)
    np.testing.assert_allclose(
        of_named, np.stack([by_hand(module, image[i], int(named[i])) for i in (0, 1)]), atol=1e-5
    )
    with pytest.raises(ValueError, match=r"one class of 0\.\.2"):
        grad_cam(module, image, torch.tensor([2, 3]))


def test_nothing_speaks_for_the_class():
    module = Tiny().eval()
    with torch.no_grad():
        module.linear.weight[1] = -1.0
    assert not grad_cam(module, torch.randn(1, 3, 6, 6), torch.tensor([1])).any()


def test_tokens_become_maps():
    places = torch.arange(16.0).view(1, 16, 1).expand(2, 16, 3)
    square = torch.arange(16.0).view(4, 4).expand(2, 3, 4, 4)
    registers = torch.full((2, 5, 3), 99.0)
    assert torch.equal(as_map(torch.cat([registers, places], dim=1)), square)
    assert torch.equal(as_map(places), square)
    assert torch.equal(as_map(square.permute(0, 2, 3, 1)), square)
    assert torch.equal(as_map(square), square)


SOFT = ("tokens", "windows", "rollout")
# The names of modules with a map of their own.
ATTENTIVE = {
    "cbam_resnet": ["first_attention.spatial", "last_attention.spatial"],
    "convcut": ["attention"],
    "dan": ["heads.0", "heads.1"],
    "multiscale_region": [],
    "resattn_vit": [
        *["fine_attention.local", "coarse_attention.local", "ema", "encoder.blocks.1.attention"],
        "encoder.blocks rollout",
    ],
    "swin": [],
    "timm": [],
    "vit": ["blocks.5.attn", "blocks rollout"],
}


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_has_maps(name):
    module = shaken(cheap(name))
    image = images(2, module.image_size)
    with torch.inference_mode():
        before = module(image)
    maps = grad_cam(module, image, torch.tensor([0, 1]))
    assert maps.shape == (2, module.image_size, module.image_size)
    assert np.isfinite(maps).all()
    assert maps.min() >= 0
    assert maps.max() <= 1
    found = attention(module, image)
    own = {one.name: one.map for one in found if one.map is not None}
    if name in ATTENTIVE:
        assert list(own) == ATTENTIVE[name]
    for places in own.values():
        assert places.ndim == 3
        assert places.shape[0] == 2
        assert places.shape[1] == places.shape[2]
    for one in found:
        if one.kind in SOFT:
            np.testing.assert_allclose(one.values.sum(-1), 1, atol=1e-5)
        if one.kind == "windows":
            assert one.map.mean() == pytest.approx(1, abs=1e-5)
    with torch.inference_mode():
        assert torch.equal(module(image), before), "looking must change nothing"


def values_of(module, image):
    return {one.name: one.values.double().numpy() for one in attention(module, image)}


def softmax(scores):
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def heads(x, number):
    """(B, N, D) -> (B, heads, N, D / heads)."""
    return x.reshape(*x.shape[:2], number, -1).transpose(0, 2, 1, 3)


def linear(layer, x):
    bias = 0 if layer.bias is None else layer.bias.detach().double().numpy()
    return x @ layer.weight.detach().double().numpy().T + bias


def recorded(layer, module, image):
    """What a layer is given."""
    given = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: given.extend(x.double().numpy() for x in inputs))
    with torch.no_grad():
        module(image)
    handle.remove()
    return given


def test_self_attention_rows():
    module = shaken(cheap("convcut", "detail=false"))
    layer, image = module.network.attention, images(2, module.image_size)
    (tokens,) = recorded(layer, module, image)
    assert tokens.shape[1] == 36
    scores = linear(layer.query, tokens) @ linear(layer.key, tokens).transpose(0, 2, 1) / math.sqrt(tokens.shape[2])
    found = next(one for one in attention(module, image) if one.name == "attention")
    np.testing.assert_allclose(found.values[:, 0], softmax(scores), atol=1e-5)
    np.testing.assert_allclose(found.map.reshape(2, 36), softmax(scores).mean(1), atol=1e-5)


def test_vision_transformer_rows_and_rollout():
    module = shaken(cheap("vit"))
    layer, image = module.network.blocks[2].attn, images(2, module.image_size)
    (tokens,) = recorded(layer, module, image)
    q, k, _ = (heads(part, layer.num_heads) for part in np.split(linear(layer.qkv, tokens), 3, axis=2))
    expected = softmax(q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[3]))
    found = values_of(module, image)
    np.testing.assert_allclose(found["blocks.2.attn"], expected, atol=1e-5)
    assert layer.fused_attn, "the fused kernel is put back"
    total = np.eye(17)
    for number in range(6):
        total = (found[f"blocks.{number}.attn"].mean(1) / 2 + np.eye(17) / 2) @ total
    np.testing.assert_allclose(found["blocks rollout"], total, atol=1e-6)
    seen = {one.name: one.map for one in attention(module, image)}
    np.testing.assert_allclose(seen["blocks rollout"], total[:, 0, 1:].reshape(2, 4, 4), atol=1e-6)


def test_rollout_of_one_layer():
    weights = torch.rand(1, 2, 3, 3).softmax(3)
    np.testing.assert_allclose(rollout([weights]), weights.mean(1) / 2 + torch.eye(3) / 2, atol=1e-6)


def test_carried_scores():
    module = shaken(cheap("resattn_vit"))
    image = images(2, module.image_size)
    total = 0
    for number, block in enumerate(module.network.encoder.blocks):
        layer = block.attention
        tokens = recorded_first(layer, module, image)
        q, k, _ = (heads(part, layer.heads) for part in np.split(linear(layer.qkv, tokens), 3, axis=2))
        total = total + q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[3])
        found = values_of(module, image)[f"encoder.blocks.{number}.attention"]
        np.testing.assert_allclose(found, softmax(total), atol=1e-5)


def recorded_first(layer, module, image):
    given = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].double().numpy()))
    with torch.no_grad():
        module(image)
    handle.remove()
    return given[0]


def test_windows():
    from fer.layers.window_attention import WindowCrossAttention

    torch.manual_seed(0)
    layer = WindowCrossAttention(8, 2, 3).eval()
    nn.init.normal_(layer.bias.relative_position_bias_table)
    query, context = torch.randn(4, 9, 8), torch.randn(4, 9, 8)
    with torch.no_grad():
        found = layer.weights(query, context).double().numpy()
        attended = layer(query, context)
        bias = layer.bias.get_bias().double().numpy()
        keys, values = (part.numpy() for part in layer.kv(context).double().chunk(2, dim=2))
    q, k, v = (heads(x, 2) for x in (query.double().numpy(), keys, values))
    np.testing.assert_allclose(found, softmax(q @ k.transpose(0, 1, 3, 2) / 2 + bias), atol=1e-5)
    joined = (found @ v).transpose(0, 2, 1, 3).reshape(4, 9, 8)
    np.testing.assert_allclose(attended, linear(layer.proj, joined), atol=1e-5)


def test_pictures_take_turns():
    label = np.array([0] * 20 + [1] * 3 + [2] * 2)
    predicted = label.copy()
    predicted[[0, 1, 2]] = 1
    seen = Seen(np.arange(25), label, predicted, np.zeros((25, 2)))
    right = pick(seen, True, 6, seed=0)
    assert sorted(label[right].tolist()) == [0, 0, 1, 1, 2, 2]
    assert set(pick(seen, False, 6, seed=0)) == {0, 1, 2}
    assert np.array_equal(right, pick(seen, True, 6, seed=0))
    assert not np.array_equal(right, pick(seen, True, 6, seed=1))


def test_tsne_keeps_clusters_and_is_repeatable():
    generator = np.random.default_rng(0)
    features = np.concatenate([generator.normal(10 * k, 1, (20, 5)) for k in range(3)])
    points = plane(features, seed=0)
    assert np.array_equal(points, plane(features, seed=0))
    centre = points.reshape(3, 20, 2).mean(1)
    nearest = np.linalg.norm(points[:, None] - centre, axis=2).argmin(1)
    assert np.array_equal(nearest, np.repeat(np.arange(3), 20))


def test_figures_of_print_quality(tmp_path):
    figure = confusion_figure(np.array([[9, 1], [3, 7]]), ["a", "b$"], "net on data, n = 20")
    pdf, png = save(figure, tmp_path / "confusion", stamps=["LEAKY: stamped"])
    content = pdf.read_bytes()
    assert b"/FontFile2" in content, "fonts are embedded"
    assert b"/Type3" not in content
    assert b"CreationDate" not in content
    assert int.from_bytes(png.read_bytes()[16:20], "big") == 1050, "3.5 inches at 300 dpi"
    again = confusion_figure(np.array([[9, 1], [3, 7]]), ["a", "b$"], "net on data, n = 20")
    other, _ = save(again, tmp_path / "again", stamps=["LEAKY: stamped"])
    assert other.read_bytes() == content


def test_two_runs(whole, tmp_path):
    options = Options(
        figures=["tsne", "attention"],
        points=30,
        pictures=1,
        maps=1,
        seed=0,
        device="cpu",
        root=None,
    )
    written = explain([whole, whole], tmp_path / "out", options)
    names = {path.name for path in written}
    assert {"tsne.pdf", "tsne.png", "attention-1.pdf", "attention-2.png", "explain.json"} <= names
    assert all(path.stat().st_size > 500 for path in written)
    record = json.loads((tmp_path / "out" / "explain.json").read_text())
    results = open_run(whole).results
    first = record["runs"][0]
    assert first["images"] == 30
    assert first["attention"] == record["runs"][1]["attention"]
    assert 1 <= len(first["attention"]) <= 2
    assert record["perplexity"] == [29 / 3] * 2
    assert first["code_version"] == results["code_version"]


def test_data_gone(whole, tmp_path, monkeypatch):
    from fer.data.synthetic import Synthetic

    monkeypatch.setattr(Synthetic, "on_disk", True)
    options = Options(["tsne"], 30, 1, 1, 0, "cpu", root=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"no longer in .*gone: set root=/path/to/it"):
        explain([whole], tmp_path / "out", options)


def test_mistakes_are_sentences(tmp_path):
    words = ["run=nowhere", "figures=[tsne,umap]", "points=3"]
    done = call("explain", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert "figures=['tsne', 'umap']: expected some of [tsne,attention,confusion,classes]" in done.stderr
    assert "points=3: expected a whole number from 10 on" in done.stderr
    assert "Traceback" not in done.stderr
