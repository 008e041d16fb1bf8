"""Residual-attention ViT: counts, stages, and its three attentions against their formulas."""

import pytest
import torch
from model_builds import build, cheap, neighbour_dependence, parameter_count
from torch import nn

from fer.layers.ema_attention import EMAttention
from fer.layers.local_attention import LocalAttention
from fer.layers.score_attention import ResidualScoreAttention


def test_resattn_vit_parameters_and_stages():
    with torch.device("meta"):
        network = build("resattn_vit").network
        image = torch.empty(2, 3, 224, 224)
        fine, coarse = network.backbone(image)
        assert (fine.shape[1:], coarse.shape[1:]) == ((1024, 14, 14), (2048, 7, 7))
        assert network.deconvolution(network.coarse_attention(coarse)).shape[1:] == (512, 14, 14)
        assert network.lateral(network.fine_attention(fine)).shape[1:] == (512, 14, 14)
        assert network.forward_map(image).shape[1:] == (512, 14, 14)
        assert network.forward_tokens(image).shape[1:] == (197, 768)
        assert network.forward_features(image).shape[1:] == (1024,)
    assert parameter_count(network) == 83_509_367
    assert parameter_count(network.ema) == 2_624
    assert parameter_count(network.encoder) == 47_242_752


def test_resattn_vit_released_attention_keeps_the_contract():
    assert neighbour_dependence(cheap("resattn_vit", "mad_p=0.6", "residual=false")) < 1e-9


def test_resattn_vit_with_timms_encoder():
    with torch.device("meta"):
        module = build("resattn_vit", "encoder=vit_b8")
        assert module(torch.empty(2, 3, 224, 224)).shape == (2, 7)
    assert parameter_count(module.network.encoder) == 8 * 7_087_872 + 2 * 768


def test_resattn_vit_learns_its_backbone_slowly():
    module = cheap("resattn_vit", "backbone_lr=0.25")
    scale = {id(p): g.get("lr_scale", 1.0) for g in module.parameter_groups() for p in g["params"]}
    for name, parameter in module.network.named_parameters():
        assert scale[id(parameter)] == (0.25 if name.startswith("backbone.") else 1.0)


def slow_ema(x: torch.Tensor, layer: EMAttention) -> torch.Tensor:
    """EMA attention of one (C, H, W) image, group by group and element by element."""
    channels, height, width = x.shape
    size = channels // layer.groups
    w1, b1 = layer.conv1.weight[:, :, 0, 0], layer.conv1.bias
    result = torch.empty_like(x)
    for start in range(0, channels, size):
        group = x[start : start + size]
        row = torch.stack([w1 @ group[:, i, :].sum(1) / width + b1 for i in range(height)])
        column = torch.stack([w1 @ group[:, :, j].sum(1) / height + b1 for j in range(width)])
        first, second = torch.empty_like(group), torch.empty_like(group)
        padded = nn.functional.pad(group, (1, 1, 1, 1))
        for i in range(height):
            for j in range(width):
                gates = 1 / (1 + torch.exp(-row[i])) / (1 + torch.exp(-column[j]))
                first[:, i, j] = group[:, i, j] * gates
                patch = padded[:, i : i + 3, j : j + 3]
                second[:, i, j] = (layer.conv3.weight * patch).sum((1, 2, 3)) + layer.conv3.bias
        centred = first - first.mean((1, 2), keepdim=True)
        first = centred / (centred.square().mean((1, 2), keepdim=True) + 1e-5).sqrt()
        first = first * layer.norm.weight[:, None, None] + layer.norm.bias[:, None, None]
        e1, e2 = first.mean((1, 2)).exp(), second.mean((1, 2)).exp()
        for i in range(height):
            for j in range(width):
                weight = (e1 / e1.sum()) @ second[:, i, j] + (e2 / e2.sum()) @ first[:, i, j]
                result[start : start + size, i, j] = group[:, i, j] / (1 + torch.exp(-weight))
    return result


def test_ema_attention_against_its_formulas():
    torch.manual_seed(0)
    layer = EMAttention(12, groups=3).double()
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    x = torch.randn(2, 12, 4, 5, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), torch.stack([slow_ema(image, layer) for image in x]), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="multiple of 32"):
        EMAttention(16, groups=32)


def test_local_attention_is_the_maximum_of_separate_branches():
    torch.manual_seed(0)
    layer = LocalAttention(channels=32, branches=3, reduction=16, drop=0.0).double().eval()
    for norm in (layer.maps[1], layer.maps[4]):
        nn.init.normal_(norm.weight)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 32, 3, 4, dtype=torch.float64)
    first, norm1, _, second, norm2, _ = layer.maps
    branches = []
    for b in range(3):
        own = slice(2 * b, 2 * b + 2)
        y = torch.einsum("oc,nchw->nohw", first.weight[own, :, 0, 0], x) + first.bias[own, None, None]
        y = (y - norm1.running_mean[own, None, None]) / (norm1.running_var[own, None, None] + 1e-5).sqrt()
        y = (y * norm1.weight[own, None, None] + norm1.bias[own, None, None]).clamp(min=0)
        y = torch.einsum("c,nchw->nhw", second.weight[b, :, 0, 0], y) + second.bias[b]
        y = (y - norm2.running_mean[b]) / (norm2.running_var[b] + 1e-5).sqrt() * norm2.weight[b] + norm2.bias[b]
        branches.append(1 / (1 + torch.exp(-y)))
    with torch.inference_mode():
        torch.testing.assert_close(layer(x)[:, 0], torch.stack(branches).max(0).values)


def test_attention_dropping_acts_in_training_alone():
    torch.manual_seed(0)
    layer = LocalAttention(channels=32, branches=2, reduction=16, drop=1.0)
    x = torch.randn(64, 32, 4, 4)
    one = layer.maps(x)
    dropped = layer(x)
    # One of the two maps of every image is zeroed, so the maximum is the other one.
    which = [(dropped[i, 0] == one[i, b]).all().item() for i in range(64) for b in (0, 1)]
    assert sum(which) >= 64
    assert any(which[0::2])
    assert any(which[1::2])
    layer.eval()
    assert torch.equal(layer(x), layer.maps(x).amax(1, keepdim=True))


def test_scores_are_carried_between_layers():
    torch.manual_seed(0)
    first, second = ResidualScoreAttention(16, heads=2).double(), ResidualScoreAttention(16, heads=2).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    _, scores = first(x, None)
    q, k, _ = first.qkv(x).chunk(3, dim=2)
    expected = torch.stack([q[..., h : h + 8] @ k[..., h : h + 8].transpose(1, 2) for h in (0, 8)], 1) / 8**0.5
    torch.testing.assert_close(scores, expected)
    carried, total = second(x, scores)
    alone, own = second(x, torch.zeros_like(scores))
    assert not torch.allclose(carried, alone)
    torch.testing.assert_close(total, own + scores)
