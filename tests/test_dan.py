"""DAN: counts, stages, and its auxiliary losses against their formulas."""

import math

import pytest
import torch
from model_builds import batch_of, build, cheap, parameter_count

from fer.models.dan import affinity_loss, partition_loss


def test_dan_parameters_and_stages():
    with torch.device("meta"):
        network = build("dan").network
        x = network.backbone(torch.empty(2, 3, 224, 224))[-1]
    assert x.shape == (2, 512, 7, 7)
    assert network.forward_heads(x).shape == (2, 4, 512)
    assert parameter_count(network) == 19_723_733


def test_affinity_loss():
    generator = torch.Generator().manual_seed(0)
    features, centres = torch.randn(6, 4, generator=generator), torch.randn(3, 4, generator=generator)
    label = torch.tensor([0, 2, 1, 1, 0, 2])
    distances = [sum((features[i, d] - centres[label[i], d]).item() ** 2 for d in range(4)) for i in range(6)]
    variance = sum(sum((centres[k, d] - centres[:, d].mean()).item() ** 2 for k in range(3)) / 2 for d in range(4))
    assert affinity_loss(features, label, centres).item() == pytest.approx(sum(distances) / 6 / variance, rel=1e-5)


def test_partition_loss():
    heads = torch.tensor([[[0.0, 1.0], [2.0, 1.0]], [[5.0, 5.0], [1.0, 3.0]]])  # variances 2, 0, 8, 2
    assert partition_loss(heads).item() == pytest.approx(math.log(1 + 2 / 3))


def test_dan_sums_its_losses():
    module = cheap("dan", "affinity=0", "partition=0").eval()
    batch = batch_of(module, 4)
    plain, logits = module.loss(batch)
    assert torch.equal(module(batch["image"]), logits)
    module.affinity = 2.0
    with_affinity, _ = module.loss(batch)
    x = module.network.backbone(batch["image"])[-1]
    expected = plain + 2 * affinity_loss(x.mean((2, 3)), batch["label"], module.centres)
    torch.testing.assert_close(with_affinity, expected)
    assert any(p is module.centres for group in module.parameter_groups() for p in group["params"])


def test_dan_with_one_head():
    loss, _ = (module := cheap("dan", "heads=1")).loss(batch_of(module, 4))
    assert loss.isfinite()
