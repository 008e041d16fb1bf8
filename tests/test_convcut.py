"""Conv-cut: counts of every cut, stages, blocks against their formulas, and the attention that leaks."""

import copy

import pytest
import timm
import torch
from model_builds import cheap, images, neighbour_dependence, parameter_count, shaken
from torch import nn

from fer.errors import UserError
from fer.layers.detail import TokenAttention, separable_conv
from fer.models.convcut import LEAKY, ConvCutNetwork, cut_convnext


def convcut_on_meta(truncate, attention="spatial", at="det2", detail=True):
    with torch.device("meta"):
        trunk = cut_convnext(timm.create_model("convnext_base", num_classes=0), truncate)
        return ConvCutNetwork(trunk, 7, detail, attention, at, dropout=0.1)


@pytest.mark.parametrize(
    ("truncate", "attention", "count"),
    [
        (24, "spatial", 54_219_719),
        (24, "none", 53_956_039),
        (24, "batch", 53_956_040),
        ("released", "batch", 51_855_304 + 512),  # the released graph has no norm after the detail block: 2 x 256
    ],
)
def test_convcut_parameters(truncate, attention, count):
    assert parameter_count(convcut_on_meta(truncate, attention)) == count


def test_convcut_trunks():
    """All cuts of one network, from the whole of stage 3 downwards."""
    with torch.device("meta"):
        network = timm.create_model("convnext_base", num_classes=0)
    sizes = {n: parameter_count(cut_convnext(network, n)) for n in (27, 26, 25, 24, 23, 22)}
    assert sizes == {n: 53_740_672 + (n - 24) * 2_126_848 for n in sizes}


def test_convcut_stages():
    network = convcut_on_meta(24)
    x = network.trunk.stem(torch.empty(2, 3, 224, 224, device="meta"))
    shapes = []
    for stage in network.trunk.stages:
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    x = network.detail1(x)
    shapes += [tuple(x.shape[1:]), tuple(network.detail2(x).shape[1:])]
    assert shapes == [(128, 56, 56), (256, 28, 28), (512, 14, 14), (256, 4, 4), (256, 2, 2)]


@pytest.mark.parametrize("overrides", [["attention_at=det1"], ["attention=none"], ["detail=false"], ["truncate=1"]])
def test_convcut_options_keep_the_contract(overrides):
    assert neighbour_dependence(cheap("convcut", *overrides)) < 1e-9


def test_convcut_released_cut_is_half_a_block():
    torch.manual_seed(0)
    whole = timm.create_model("convnext_atto", depths=(1, 1, 24, 1), dims=(4, 4, 8, 8), num_classes=0)
    blocks = copy.deepcopy(whole.stages[2].blocks)
    x = torch.rand(1, 8, 4, 4)
    expected = blocks[:23](x)
    expected = blocks[23].conv_dw(expected).permute(0, 2, 3, 1)
    expected = nn.functional.layer_norm(expected, (8,), blocks[23].norm.weight, blocks[23].norm.bias, 1e-6)
    got = cut_convnext(whole, "released").stages[2].blocks(x)
    torch.testing.assert_close(got, expected.permute(0, 3, 1, 2))


def test_detail_padding_is_tensorflows_same():
    """At 14 -> 4, TensorFlow pads one row and one column on each side: (4 - 1) * 4 + 4 - 14 = 2, split evenly."""
    torch.manual_seed(0)
    layer = separable_conv(2, 3, kernel=4, padding=1)
    x = torch.randn(1, 2, 14, 14)
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    expected = torch.zeros(1, 3, 4, 4)
    for i in range(4):
        for j in range(4):
            patch = padded[0, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            depth = (patch * layer[0].weight[:, 0]).sum((1, 2))
            expected[0, :, i, j] = (layer[1].weight[:, :, 0, 0] @ depth + layer[1].bias).clamp(min=0)
    torch.testing.assert_close(layer(x), expected)


def test_token_attention_against_its_formula():
    torch.manual_seed(0)
    layer = TokenAttention(16).double()
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    q, k, v = layer.query(x), layer.key(x), layer.value(x)
    weight = torch.exp(torch.einsum("bnd,bmd->bnm", q, k) / 4)
    mixed = torch.einsum("bnm,bmd->bnd", weight / weight.sum(2, keepdim=True), v)
    y = x + layer.out(mixed)
    expected = (y - y.mean(2, keepdim=True)) / (y.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), expected)


def test_batch_attention_leaks_and_is_refused():
    with pytest.raises(UserError, match="allow_batch_attention=true"):
        cheap("convcut", "attention=batch")
    module = cheap("convcut", "attention=batch", "allow_batch_attention=true")
    assert module.leaky == LEAKY
    assert cheap("convcut").leaky is None
    assert neighbour_dependence(module) > 1e-4
    # Permuting one batch shows nothing: the positive control of the other comparisons.
    batch, order = images(8, 96).double(), torch.arange(7, -1, -1)
    with torch.inference_mode():
        torch.testing.assert_close(module(batch)[order], module(batch[order]), rtol=0, atol=1e-9)


def test_batch_attention_of_one_image_is_none():
    leaking = shaken(cheap("convcut", "attention=batch", "allow_batch_attention=true"))
    plain = cheap("convcut", "attention=none").eval()
    plain.load_state_dict({k: v for k, v in leaking.state_dict().items() if not k.endswith("classifier.4.scale")})
    with torch.inference_mode():
        torch.testing.assert_close(leaking(images(1, 96)), plain(images(1, 96)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["image_size=64"], "96 pixels"),
        (["truncate=30"], "model.truncate to 1..6"),
        (["truncate=released"], "model.truncate to 1..6"),
        (["backbone=test_resnet"], "no ConvNeXt"),
    ],
)
def test_convcut_refusals(overrides, message):
    with pytest.raises(UserError, match=message):
        cheap("convcut", *overrides)


def test_convcut_layer_decay():
    module = cheap("convcut", "layer_decay=0.5")
    scale = {id(p): g.get("lr_scale", 1.0) for g in module.parameter_groups() for p in g["params"]}
    names = {n: scale[id(p)] for n, p in module.network.named_parameters()}
    assert len(names) == len(scale)
    assert (
        names["trunk.stem.0.weight"] < names["trunk.stages.0.blocks.0.gamma"] < names["trunk.stages.2.blocks.1.gamma"]
    )
    assert names["classifier.1.weight"] == 1.0
