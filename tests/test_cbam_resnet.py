"""CBAM-ResNet: counts, stages, and CBAM against its formulas."""

import pytest
import torch
from model_builds import EIGHT, build, cheap, parameter_count
from torch import nn

from fer.layers.cbam import CBAM
from fer.models.cbam_resnet import CBAMResNetwork


@pytest.mark.parametrize(
    ("placement", "count"),
    [("ends", 21_314_675), ("none", 21_280_583), ("first", 21_281_263), ("last", 21_313_995), ("blocks", 21_443_379)],
)
def test_cbam_resnet_parameters(placement, count):
    with torch.device("meta"):
        network = CBAMResNetwork(7, 64, [3, 4, 6, 3], placement, stem_stride=1, dropout=0.5)
    assert parameter_count(network) == count


def test_cbam_resnet_stages():
    network = build("cbam_resnet", classes=EIGHT).network.to("meta")
    x = network.first_attention(network.stem(torch.empty(2, 3, 44, 44, device="meta")))
    shapes = [tuple(x.shape[1:])]
    for stage in network.stages:
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 44, 44), (64, 44, 44), (128, 22, 22), (256, 11, 11), (512, 6, 6)]
    assert network.pool(x).shape == (2, 512, 1, 1)


def test_all_positions_reach_the_pool():
    network = cheap("cbam_resnet").network.eval()
    grid = torch.rand(1, 256, 6, 6, requires_grad=True)
    network.pool(grid).sum().backward()
    assert (grid.grad == 1 / 36).all()


def slow_cbam(x: list, cbam: CBAM) -> torch.Tensor:
    """Woo et al.'s formulas for one (C, H, W) image, element by element in float64, in eval mode."""
    w1, b1, w2, b2 = (p.double() for p in cbam.channel.mlp.parameters())
    x = x.double()
    channels, height, width = x.shape

    def perceptron(v):
        hidden = [max(0.0, (w1[j] @ v + b1[j]).item()) for j in range(len(b1))]
        return [sum(w2[c, j].item() * hidden[j] for j in range(len(b1))) + b2[c].item() for c in range(channels)]

    mean = torch.tensor([x[c].sum() / (height * width) for c in range(channels)], dtype=torch.float64)
    top = torch.tensor([max(x[c].flatten().tolist()) for c in range(channels)], dtype=torch.float64)
    scores = torch.tensor([a + b for a, b in zip(perceptron(mean), perceptron(top), strict=True)], dtype=torch.float64)
    refined = x * (1 / (1 + torch.exp(-scores)))[:, None, None]

    kernel, norm = cbam.spatial.conv.weight[0].double(), cbam.spatial.norm
    summary = [refined.max(0).values, refined.sum(0) / channels]
    result = torch.empty_like(refined)
    reach = kernel.shape[-1] // 2
    for i in range(height):
        for j in range(width):
            response = 0.0
            for plane in range(2):
                for di in range(-reach, reach + 1):
                    for dj in range(-reach, reach + 1):
                        if 0 <= i + di < height and 0 <= j + dj < width:
                            response += (kernel[plane, di + reach, dj + reach] * summary[plane][i + di, j + dj]).item()
            scaled = (response - norm.running_mean.item()) / (norm.running_var.item() + norm.eps) ** 0.5
            gate = 1 / (1 + torch.exp(torch.tensor(-(scaled * norm.weight.item() + norm.bias.item()))))
            result[:, i, j] = refined[:, i, j] * gate
    return result


def test_cbam_against_its_formulas():
    torch.manual_seed(0)
    cbam = CBAM(channels=32, reduction=16, kernel=7).double().eval()
    nn.init.normal_(cbam.spatial.norm.weight)
    cbam.spatial.norm.running_mean.fill_(0.3)
    cbam.spatial.norm.running_var.fill_(1.7)
    x = torch.randn(2, 32, 5, 6, dtype=torch.float64)
    with torch.inference_mode():
        got = cbam(x)
        expected = torch.stack([slow_cbam(image, cbam) for image in x])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_cbam_spatial_gate_starts_at_one_half():
    gate = CBAM(channels=64).spatial.gate(torch.randn(4, 64, 11, 11))
    assert (gate == 0.5).all()
