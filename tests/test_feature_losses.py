"""Losses on features against their formulas."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from model_builds import batch_of, cheap
from omegaconf import OmegaConf
from torch import nn

from fer.errors import UserError
from fer.models.feature_losses import Center, FlipConsistency, Island, LocalityPreserving
from fer.models.losses import CrossEntropy

LABEL = torch.tensor([0, 2, 2, 0, 2, 1])


@pytest.fixture
def features():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def cross_entropy():
    return CrossEntropy(label_smoothing=0.0, class_weights="none")


def moved_centres(centres, features, rate):
    """Equation 4 of Wen et al., class by class."""
    moved = centres.clone()
    for k in range(len(centres)):
        members = [i for i in range(len(LABEL)) if LABEL[i] == k]
        moved[k] -= rate * sum((centres[k] - features[i] for i in members), torch.zeros(4)) / (1 + len(members))
    return moved


def test_center_loss_and_its_centres(features):
    loss = Center(cross_entropy(), weight=1.0, rate=0.5)
    first = loss.term(features, LABEL, 4)
    assert first.item() == pytest.approx(0.5 * features.square().sum().item() / 6, rel=1e-5)
    centres = moved_centres(torch.zeros(4, 4), features, 0.5)
    torch.testing.assert_close(loss.centres, centres)
    second = loss.term(features, LABEL, 4)
    assert second.item() == pytest.approx(0.5 * (features - centres[LABEL]).square().sum().item() / 6, rel=1e-5)
    torch.testing.assert_close(loss.centres, moved_centres(centres, features, 0.5))
    kept = loss.centres.clone()
    loss.eval().term(features, LABEL, 4)
    assert torch.equal(loss.centres, kept)
    fresh = Center(cross_entropy(), weight=1.0, rate=0.5)
    fresh.load_state_dict(loss.state_dict())
    assert torch.equal(fresh.centres, kept)


def test_center_loss_pulls_features(features):
    loss = Center(cross_entropy(), weight=1.0, rate=0.5)
    loss.term(features, LABEL, 3)
    centres = loss.centres.clone()
    x = features.clone().requires_grad_()
    loss.term(x, LABEL, 3).backward()
    torch.testing.assert_close(x.grad, (features - centres[LABEL]) / 6)


def test_island_loss(features):
    """The centres' step against the gradient printed by Cai et al."""
    loss = Island(cross_entropy(), weight=1.0, rate=0.5, push=3.0)
    centres = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    loss.centres = centres.clone()
    value = loss.term(features, LABEL, 3)
    near = sum(
        (centres[j] @ centres[k] / centres[j].norm() / centres[k].norm()).item() + 1
        for j in range(3) for k in range(3) if j != k
    )  # fmt: skip
    pull = 0.5 * (features - centres[LABEL]).square().sum().item() / 6
    assert value.item() == pytest.approx(pull + 3 * near, rel=1e-5)
    expected = moved_centres(centres, features, 0.5)
    for j in range(3):
        for k in range(3):
            if j != k:
                a, b = centres[j], centres[k]
                slope = b / (a.norm() * b.norm()) - (a @ b) * a / (a.norm() ** 3 * b.norm())
                expected[j] -= 0.5 * 3 / 2 * slope
    torch.testing.assert_close(loss.centres, expected)


def test_island_loss_survives_classes_not_met_yet(features):
    loss = Island(cross_entropy(), weight=1.0, rate=0.5, push=10.0)
    for _ in range(5):
        value = loss.term(features, LABEL, 8)
    assert value.isfinite()
    assert loss.centres.abs().max() < 100


def test_locality_preserving_loss(features):
    loss = LocalityPreserving(cross_entropy(), weight=1.0, neighbours=1)
    expected = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i and LABEL[j] == LABEL[i]]
        if others:
            nearest = min(others, key=lambda j: (features[i] - features[j]).norm().item())
            expected += 0.5 * (features[i] - features[nearest]).square().sum().item() / 6
    assert loss.term(features, LABEL, 3).item() == pytest.approx(expected, rel=1e-4)
    everyone = LocalityPreserving(cross_entropy(), weight=1.0, neighbours=20).term(features, LABEL, 3).item()
    expected = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i and LABEL[j] == LABEL[i]]
        if others:
            expected += 0.5 * (features[i] - features[others].mean(0)).square().sum().item() / 6
    assert everyone == pytest.approx(expected, rel=1e-4)


def test_flip_consistency():
    loss = FlipConsistency(cross_entropy(), weight=2.0)
    module = cheap("cbam_resnet").eval()
    batch = batch_of(module, 3)
    loss.attach(module)
    assert not list(loss.parameters())
    value, logits = loss.objective(module, batch)
    torch.testing.assert_close(logits, module(batch["image"]))
    network = module.network
    maps = [network.last_attention(network.stages(network.first_attention(network.stem(x))))
            for x in (batch["image"], batch["image"].flip(3))]  # fmt: skip
    cams = [torch.einsum("bchw,kc->bkhw", m, network.classifier[1].weight) for m in maps]
    expected = cross_entropy()(logits, batch) + 2 * (cams[0] - cams[1].flip(3)).square().mean()
    torch.testing.assert_close(value, expected)


class Pointwise(nn.Module):
    image_size = 4

    def __init__(self, *between):
        super().__init__()
        self.cam_layer = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU())
        self.classify = nn.Sequential(*between, nn.Linear(5, 7))

    def features(self, image):
        return self.cam_layer(image).mean((2, 3))


def test_symmetric_convolutions_are_consistent():
    """A network of 1x1 convolutions commutes with the flip: what it drops out must not look like a difference."""
    module = Pointwise(nn.Dropout(0.5)).train()
    loss = FlipConsistency(cross_entropy(), weight=1e3)
    loss.attach(module)
    assert module.training
    batch = {"image": torch.rand(2, 3, 4, 4), "label": torch.tensor([1, 2])}
    value, logits = loss.objective(module, batch)
    torch.testing.assert_close(value, cross_entropy()(logits, batch))
    value.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("between", [nn.BatchNorm1d(5), nn.Linear(5, 5), nn.LayerNorm(5)])
def test_flip_consistency_needs_the_mean_at_the_last_layer(between):
    with pytest.raises(UserError, match="mean of its last map by one linear layer"):
        FlipConsistency(cross_entropy(), weight=1.0).attach(Pointwise(between))


def test_losses_say_what_they_need():
    module = cheap("convcut")
    batch = batch_of(module, 2)
    for refused in (module, cheap("convcut", "detail=false"), cheap("vit")):
        with pytest.raises(UserError, match="mean of its last map"):
            FlipConsistency(cross_entropy(), weight=1.0).attach(refused)
    FlipConsistency(cross_entropy(), weight=1.0).attach(cheap("timm"))
    with pytest.raises(UserError, match="needs features"):
        Center(cross_entropy(), weight=1.0, rate=0.5)(torch.zeros(2, 7), batch)


@pytest.mark.parametrize("name", ["cbam_resnet", "convcut", "timm"])
def test_feature_losses_train_models(name):
    module = cheap(name)
    loss = instantiate(OmegaConf.load(Path(__file__).parents[1] / "conf" / "loss" / "island.yaml"))
    value, logits = loss.objective(module, batch_of(module, 6))
    value.backward()
    assert logits.shape == (6, 7)
    assert loss.centres.shape[0] == 7
