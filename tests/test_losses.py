"""Losses against their formulas, and schedules against their published values."""

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from fer.errors import UserError
from fer.layers.region_loss import focal_softmax
from fer.models.losses import ClassBalanced, CrossEntropy, ExpressionLoss, Focal, MultiTarget, SoftCrossEntropy
from fer.models.optim import Constant, Cosine, OneCycle, Recipe, StepDecay
from fer.models.sam import SAM

CONF = Path(__file__).parents[1] / "conf"
COUNTS = torch.tensor([400, 9, 120, 30, 900, 1, 60])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return {"label": torch.randint(7, (32,), generator=generator)}


@pytest.fixture
def logits():
    return 3 * torch.randn(32, 7, generator=torch.Generator().manual_seed(1))


def slow_cross_entropy(logits, label):
    """Per image, in float64, written out."""
    return torch.tensor(
        [
            math.log(sum(math.exp(z) for z in row)) - row[y]
            for row, y in zip(logits.double().tolist(), label.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )


def test_cross_entropy(logits, batch):
    loss = CrossEntropy(label_smoothing=0.0, class_weights="none")(logits, batch)
    assert loss.item() == pytest.approx(slow_cross_entropy(logits, batch["label"]).mean().item(), rel=1e-5)


def test_label_smoothing_mixes_in_the_uniform_target(logits, batch):
    loss = CrossEntropy(label_smoothing=0.1, class_weights="none")(logits, batch)
    every = torch.stack([slow_cross_entropy(logits, torch.full((32,), k)) for k in range(7)]).mean(0)
    expected = 0.9 * slow_cross_entropy(logits, batch["label"]) + 0.1 * every
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize(("kind", "power"), [("balanced", 1.0), ("sqrt", 0.5)])
def test_class_weights(logits, batch, kind, power):
    loss = CrossEntropy(label_smoothing=0.0, class_weights=kind)
    with pytest.raises(RuntimeError, match="setup"):
        loss(logits, batch)
    loss.setup(COUNTS)
    weight = (COUNTS.double() ** -power)[batch["label"]]
    expected = (weight * slow_cross_entropy(logits, batch["label"])).sum() / weight.sum()
    assert loss(logits, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert (loss.weight * COUNTS).sum() / COUNTS.sum() == pytest.approx(1.0)
    assert not loss.state_dict()


def test_focal(logits, batch):
    cross_entropy = slow_cross_entropy(logits, batch["label"])
    p = (-cross_entropy).exp()
    assert Focal(gamma=0.0)(logits, batch).item() == pytest.approx(cross_entropy.mean().item(), rel=1e-5)
    assert Focal(gamma=2.0)(logits, batch).item() == pytest.approx(
        ((1 - p) ** 2 * cross_entropy).mean().item(), rel=1e-5
    )


def test_focal_gradient_vanishes_for_sure_images():
    logits = torch.tensor([[12.0, 0.0, 0.0]], requires_grad=True)
    Focal(gamma=2.0)(logits, {"label": torch.tensor([0])}).backward()
    assert logits.grad.abs().max() < 1e-8


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_gradients_of_sure_images(gamma):
    """Finite for every gamma, of labels, shares and regions, and for whole gammas to the bit the bare formula's."""
    logits = torch.tensor([[60.0, 0.0, 0.0], [12.0, 0.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    label = torch.tensor([0, 0, 1])

    def gradient(loss):
        return torch.autograd.grad(loss, logits)[0]

    log_p = logits.log_softmax(1).gather(1, label[:, None])
    bare = gradient(-((-log_p.expm1()).pow(gamma) * log_p).mean())
    found = gradient(Focal(gamma)(logits, {"label": label}))
    shares = nn.functional.one_hot(label, 3).float()
    for other in (Focal(gamma)(logits, {"target": shares}), focal_softmax(logits, label, gamma).mean()):
        torch.testing.assert_close(gradient(other), found, rtol=1e-5, atol=1e-12)
    if gamma == 0.5:
        assert bare[0].isnan().all()
        assert torch.equal(found[1:], bare[1:])
        assert not found[0].any()
    else:
        assert torch.equal(found, bare)


def test_class_balanced(logits, batch):
    beta = 0.999
    loss = ClassBalanced(beta)
    loss.setup(COUNTS)
    weight = torch.tensor([(1 - beta) / (1 - beta**n) for n in COUNTS.tolist()], dtype=torch.float64)
    weight *= 7 / weight.sum()
    expected = (weight[batch["label"]] * slow_cross_entropy(logits, batch["label"])).mean()
    assert loss(logits, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_class_balanced_survives_absent_classes():
    loss = ClassBalanced(0.9999)
    loss.setup(torch.tensor([10, 0, 20]))
    assert loss.weight[1] == 0
    assert loss.weight.sum() == pytest.approx(2.0)


def test_soft_cross_entropy(logits, batch):
    soft = torch.rand(32, 7, generator=torch.Generator().manual_seed(2))
    soft /= soft.sum(1, keepdim=True)
    expected = sum(
        (soft[:, k].double() * slow_cross_entropy(logits, torch.full((32,), k))).sum().item() for k in range(7)
    )
    assert SoftCrossEntropy()(logits, batch | {"soft": soft}).item() == pytest.approx(expected / 32, rel=1e-5)
    with pytest.raises(UserError, match="data=ferplus"):
        SoftCrossEntropy()(logits, batch)


def test_multi_target(logits, batch):
    """-log of the largest of target times prediction, image by image, as the paper writes it."""
    accepted = torch.rand(32, 7, generator=torch.Generator().manual_seed(2)) < 0.3
    accepted[torch.arange(32), batch["label"]] = True
    assert (accepted.sum(1) > 1).any()
    products = accepted.double() * logits.double().softmax(1)
    expected = [-math.log(max(row)) for row in products.tolist()]
    loss = MultiTarget()(logits, batch | {"accepted": accepted})
    assert loss.item() == pytest.approx(sum(expected) / 32, rel=1e-5)
    with pytest.raises(UserError, match=r"data=ferplus data\.mode=multi_target"):
        MultiTarget()(logits, batch)


class TinyModule(nn.Module):
    """A convolution, a mean, a linear classifier: what losses may ask of a module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image_size = 8
        self.cam_layer = nn.Conv2d(3, 6, 3, padding=1)
        self.classify = nn.Linear(6, 7)

    def features(self, image):
        return self.cam_layer(image).mean((2, 3))

    def feature_size(self):
        return 6

    def forward(self, image):
        return self.classify(self.features(image))


def load(name):
    return instantiate(OmegaConf.load(CONF / "loss" / f"{name}.yaml"))


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "loss").glob("*.yaml")))
def test_configured_losses(name, batch):
    """All give a float32 loss and gradients to the module, in bf16 as nearly in float32."""
    batch |= {
        "image": torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        "soft": nn.functional.one_hot(batch["label"], 7).float(),
        "accepted": nn.functional.one_hot(batch["label"], 7) > 0,
        "valence_arousal": torch.rand(32, 2, generator=torch.Generator().manual_seed(3)) * 2 - 1,
    }
    values = []
    for enabled in (False, True):
        module, loss = TinyModule(), load(name)
        assert isinstance(loss, ExpressionLoss)
        loss.setup(COUNTS)
        loss.attach(module)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value, logits = loss.objective(module, batch)
        assert logits.shape == (32, 7)
        assert value.dtype == torch.float32
        value.backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in module.parameters())
        values.append(value.item())
    assert values[0] == pytest.approx(values[1], rel=0.02)


def per_epoch(schedule, epoch, *, epochs, steps=10):
    return schedule.factor(epoch * steps, steps, epochs * steps)


def test_step_decay_of_the_papers():
    fer2013 = StepDecay(start_epoch=80, every=5, gamma=0.9, floor=0.0)
    values = [per_epoch(fer2013, e, epochs=500) for e in (0, 80, 84, 85, 90, 499)]
    assert values == pytest.approx([1, 1, 1, 0.9, 0.81, 0.9**83])
    ckplus = StepDecay(start_epoch=20, every=1, gamma=0.8, floor=0.001)
    values = [per_epoch(ckplus, e, epochs=100) for e in (0, 20, 21, 22, 99)]
    assert values == pytest.approx([1, 1, 0.8, 0.64, 0.001])


def test_cosine():
    schedule = Cosine(warmup_epochs=2, floor=0.1)
    values = [schedule.factor(step, 10, 120) for step in (0, 9, 19, 20, 70, 120)]
    assert values == pytest.approx([0.05, 0.5, 1.0, 1.0, 0.55, 0.1])


def test_one_cycle_is_torchs():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.3, total_steps=40, pct_start=0.25, div_factor=25, final_div_factor=400
    )
    schedule = OneCycle(pct_start=0.25, div=25, final_div=400)
    for step in range(40):
        assert 0.3 * schedule.factor(step, 10, 40) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        if step < 39:
            scheduler.step()


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("schedule", [Constant(), Cosine(5), OneCycle(0.25, 25, 400), StepDecay(0, 1, 0.5)])
def test_schedules_survive_tiny_trainings(schedule, steps):
    assert all(0 <= schedule.factor(step, 1, steps) <= 1 for step in range(steps + 1))


@pytest.mark.parametrize("path", sorted((CONF / "optim").glob("*.yaml")), ids=lambda path: path.stem)
def test_configured_recipes(path):
    recipe = instantiate(OmegaConf.load(path))
    assert isinstance(recipe, Recipe)
    network = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    before = [p.detach().clone() for p in network.parameters()]
    built = recipe.configure(list(network.parameters()), steps_per_epoch=5, max_epochs=4)
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    assert built["lr_scheduler"]["interval"] == "step"

    def closure():
        optimizer.zero_grad()
        loss = network(torch.ones(2, 4)).square().sum()
        loss.backward()
        recipe.clip(network.parameters())
        return loss

    for _ in range(3):
        optimizer.step(closure)
        scheduler.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    # A resumed run builds a fresh pair and must follow the same curve.
    again = recipe.configure(list(network.parameters()), steps_per_epoch=5, max_epochs=4)
    again["optimizer"].load_state_dict(optimizer.state_dict())
    again["lr_scheduler"]["scheduler"].load_state_dict(scheduler.state_dict())
    again["optimizer"].step(closure)
    again["lr_scheduler"]["scheduler"].step()
    scheduler.step()
    assert again["lr_scheduler"]["scheduler"].get_last_lr() == scheduler.get_last_lr()


def test_recipe_groups():
    recipe = Recipe(
        instantiate({"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1, "weight_decay": 0.01}),
        Constant(),
        no_decay_on_norm=True,
        clip_norm=None,
        clip_value=None,
    )
    body, head, frozen = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2).requires_grad_(False)
    groups = [
        {"params": list(body.parameters()), "lr_scale": 0.1},
        {"params": [*head.parameters(), *frozen.parameters()]},
    ]
    optimizer = recipe.configure(groups, 1, 1)["optimizer"]
    seen = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert seen == {
        body.weight: (pytest.approx(0.01), 0.01),
        body.bias: (pytest.approx(0.01), 0.0),
        head.weight: (0.1, 0.01),
        head.bias: (0.1, 0.0),
    }


def test_recipe_clips():
    recipe = Recipe(torch.optim.SGD, Constant(), no_decay_on_norm=False, clip_norm=1.0, clip_value=0.5)
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([30.0, 40.0])
    recipe.clip(iter([parameter]))
    assert parameter.grad.tolist() == pytest.approx([0.5, 0.5])


def test_sam_descends_along_the_uphill_gradient():
    """On f(w) = sum a w^2 with plain SGD: w - lr 2 a (w + rho g / |g|), g = 2 a w."""
    a, lr, rho = torch.tensor([1.0, 3.0]), 0.1, 0.05
    w = nn.Parameter(torch.tensor([2.0, -1.0]))
    start = w.detach().clone()
    optimizer = SAM([w], lr=lr, rho=rho, base=torch.optim.SGD)

    def closure():
        optimizer.zero_grad()
        loss = (a * w**2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    gradient = 2 * a * start
    uphill = start + rho * gradient / gradient.norm()
    torch.testing.assert_close(w.detach(), start - lr * 2 * a * uphill)
    assert loss.item() == pytest.approx(7.0)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step()


def test_sam_resumes():
    """State and learning rate of the base optimiser travel through the state dict."""
    torch.manual_seed(0)

    def make(weight):
        layer = nn.Linear(3, 1)
        layer.weight.data.copy_(weight)
        layer.bias.data.zero_()
        return layer, SAM(layer.parameters(), lr=0.1, rho=0.05, base=torch.optim.Adam)

    def run(layer, optimizer, steps):
        def closure():
            optimizer.zero_grad()
            loss = (layer(torch.eye(3)) - torch.tensor([[1.0], [2.0], [3.0]])).square().sum()
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)

    straight, optimizer = make(torch.ones(1, 3))
    run(straight, optimizer, 6)
    first, optimizer = make(torch.ones(1, 3))
    run(first, optimizer, 3)
    second, resumed = make(first.weight)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    run(second, resumed, 3)
    assert torch.equal(second.weight, straight.weight)
