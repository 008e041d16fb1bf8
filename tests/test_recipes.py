"""Mixup and cutmix, the moving average of the weights, the multi-task loss; alone, and in runs that are resumed."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, composed, leave_out_pictures
from fakes import write_affectnet
from hydra.utils import instantiate
from model_builds import SEVEN, cheap
from torch import nn

from fer.checkpoints import load_checkpoint
from fer.errors import UserError
from fer.experiment import run_experiment
from fer.models.averaging import WeightAverage
from fer.models.base import ExpressionModule
from fer.models.feature_losses import MultiTask, concordance
from fer.models.losses import CrossEntropy
from fer.models.mixing import Mixing

# -- mixing -----------------------------------------------------------------------------------------------------------


def mixed(kind: str, seed: int = 0, **more: torch.Tensor) -> tuple[dict, dict]:
    """A batch of five images, and what mixing makes of it."""
    generator = torch.Generator().manual_seed(7)
    batch = {"image": torch.rand(5, 3, 20, 16, generator=generator), "label": torch.arange(5), **more}
    mixing = Mixing(**{"mixup": 0.0, "cutmix": 0.0, kind: 1.0}, probability=1.0, off_last_epochs=0)
    torch.manual_seed(seed)
    return batch, mixing.mixed(batch, num_classes=7)


@pytest.mark.parametrize("seed", range(5))
def test_mixup_adds_images_and_labels_in_the_same_shares(seed: int) -> None:
    batch, out = mixed("mixup", seed)
    share = out["target"][0, 0].item()  # of the image itself, class 0
    assert 0 < share < 1
    expected = share * batch["image"] + (1 - share) * batch["image"].roll(1, 0)
    torch.testing.assert_close(out["image"], expected)
    one_hot = torch.eye(7)[:5]
    torch.testing.assert_close(out["target"], share * one_hot + (1 - share) * one_hot.roll(1, 0))
    assert out["label"].tolist() == [i if share > 0.5 else (i - 1) % 5 for i in range(5)]


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_pastes_a_rectangle_whose_area_is_its_share(seed: int) -> None:
    batch, out = mixed("cutmix", seed)
    pasted = (out["image"] != batch["image"]).all(1)
    assert torch.equal(pasted[0], pasted[4])
    rows, columns = pasted[0].any(1), pasted[0].any(0)
    assert torch.equal(pasted[0], rows[:, None] & columns)
    other = batch["image"].roll(1, 0)
    assert torch.equal(torch.where(pasted[:, None], other, batch["image"]), out["image"])
    assert out["target"][0, 0].item() == pytest.approx(1 - pasted[0].float().mean().item(), abs=1e-6)
    torch.testing.assert_close(out["target"].sum(1), torch.ones(5))


def test_votes_and_valence_are_mixed_alike() -> None:
    soft = torch.rand(5, 7).softmax(1)
    annotated = torch.tensor([[0.5, 0.1], [-0.2, 0.3], [0.0, 0.0], [torch.nan, torch.nan], [0.9, -0.9]])
    _, out = mixed("mixup", soft=soft, valence_arousal=annotated)
    share = out["target"][0, 0].item()
    torch.testing.assert_close(out["soft"], share * soft + (1 - share) * soft.roll(1, 0))
    torch.testing.assert_close(out["valence_arousal"][1], share * annotated[1] + (1 - share) * annotated[0])
    assert out["valence_arousal"].isnan().any(1).tolist() == [False, False, False, True, True]


def test_mixing_is_a_function_of_the_generator() -> None:
    assert torch.equal(mixed("cutmix", 3)[1]["image"], mixed("cutmix", 3)[1]["image"])
    assert mixed("mixup", 3)[1]["target"][0, 0] != mixed("mixup", 4)[1]["target"][0, 0]


def test_both_kinds_share_the_batches_and_spare_some() -> None:
    mixing = Mixing(mixup=1.0, cutmix=1.0, probability=0.6, off_last_epochs=0)
    torch.manual_seed(0)
    batch = {"image": torch.rand(4, 3, 8, 8), "label": torch.arange(4)}
    counts = {"plain": 0, "mixup": 0, "cutmix": 0}
    for _ in range(300):
        out = mixing.mixed(batch, num_classes=4)
        copied = (out["image"] == batch["image"]) if out else None
        counts["plain" if copied is None else "cutmix" if copied.any() else "mixup"] += 1
    assert counts["plain"] == pytest.approx(120, abs=30)
    assert counts["cutmix"] + 15 >= counts["mixup"] * 0.6  # a rectangle that covers all looks like neither
    assert counts["mixup"] == pytest.approx(90, abs=30)


@pytest.mark.parametrize(("epoch", "epochs", "mixes"), [(0, 5, True), (2, 5, True), (3, 5, False)])
def test_the_last_epochs_see_plain_images(epoch: int, epochs: int, mixes: bool) -> None:
    mixing = Mixing(mixup=1.0, cutmix=0.0, probability=1.0, off_last_epochs=2)
    batch = {"image": torch.rand(4, 3, 8, 8), "label": torch.arange(4)}
    trainer = SimpleNamespace(current_epoch=epoch, max_epochs=epochs)
    mixing.on_train_batch_start(trainer, cheap("timm"), batch, 0)
    assert ("target" in batch) == mixes


REFUSED = [
    ("timm", "center"),
    ("timm", "locality_preserving"),
    ("dan", "cross_entropy"),
    ("multiscale_region", "focal"),
    ("resattn_vit detection=true anchors=[[20,30]]", "cross_entropy"),
]


@pytest.mark.parametrize(("model", "loss"), REFUSED)
def test_what_cannot_take_shares_refuses_mixing(model: str, loss: str) -> None:
    module = cheap(*model.split())
    module.loss_function = instantiate(composed(f"loss={loss}").loss)
    with pytest.raises(UserError, match=r"mix=none.*loss=cross_entropy"):
        instantiate(composed("mix=cutmix").mix).setup(None, module, "fit")
    instantiate(composed("mix=none").mix).setup(None, module, "fit")


@pytest.mark.parametrize("value", ["mixup=-0.1", "probability=1.5", "off_last_epochs=-1"])
def test_impossible_mixtures_are_refused(value: str) -> None:
    with pytest.raises(Exception, match="mix") as caught:
        instantiate(composed("mix=mixup", f"mix.{value}").mix)
    assert isinstance(caught.value.__cause__, UserError)


LOSSES = {
    "cross_entropy": [],
    "label_smoothing": ["loss.class_weights=balanced"],
    "focal": [],
    "class_balanced": [],
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_shares(name: str) -> None:
    """Of shares 1 and 0 the loss of the label; of other shares, the same blend of two labels' losses."""
    loss = instantiate(composed(f"loss={name}", *LOSSES[name]).loss)
    loss.setup(torch.tensor([400, 9, 120, 30, 900, 1, 60]))
    logits = 2 * torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    label, other = torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([3, 3, 6, 6, 0, 0])
    a, b = torch.eye(7)[label], torch.eye(7)[other]
    plain = loss(logits, {"label": label})
    torch.testing.assert_close(loss(logits, {"label": label, "target": a}), plain)
    half = loss(logits, {"label": label, "target": 0.7 * a + 0.3 * b})
    if name != "label_smoothing":  # whose class weights divide by their sum, which blends too
        torch.testing.assert_close(half, 0.7 * plain + 0.3 * loss(logits, {"label": other}))
    else:
        w = loss.weight
        x, y = w[label].sum(), w[other].sum()
        expected = (0.7 * x * plain + 0.3 * y * loss(logits, {"label": other})) / (0.7 * x + 0.3 * y)
        torch.testing.assert_close(half, expected)


# -- the moving average -----------------------------------------------------------------------------------------------


def test_the_average_is_the_recursion_written_out() -> None:
    module = cheap("swin")
    module.network.register_buffer("counter", torch.tensor(0))
    average, decay = WeightAverage(0.95), 0.95
    average.setup(None, module, "fit")
    expected = {k: v.clone().double() for k, v in module.network.state_dict().items()}
    tables = {k: v.clone() for k, v in module.network.named_buffers() if not v.is_floating_point()}
    assert len(tables) > 2, "Swin has tables of relative positions"
    for step in range(1, 30):
        with torch.no_grad():
            for p in module.network.parameters():
                p += 0.1 * torch.randn_like(p)
        module.network.counter += 1
        for _ in range(2):  # the second batch of an accumulated step changes nothing
            average.on_train_batch_end(SimpleNamespace(global_step=step), module)
        d = min(decay, (step - 1) / (step + 9))
        for key, value in module.network.state_dict().items():
            expected[key] = d * expected[key] + (1 - d) * value.double()
    for key, value in average.average.module.named_parameters():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-4, atol=1e-5)
    for key, value in average.average.module.named_buffers():
        if key != "counter" and key in tables:
            assert torch.equal(value, tables[key])
    assert average.average.module.counter == 29


def test_decay_must_be_a_share() -> None:
    with pytest.raises(UserError, match="weight_ema"):
        WeightAverage(1.0)


# -- multi-task -------------------------------------------------------------------------------------------------------


def test_concordance_against_its_definition() -> None:
    """Pearson's r times the bias correction, by numpy in float64."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(-1, 1, (50, 2))
    predicted = 0.6 * truth + rng.normal(0.1, 0.3, (50, 2))
    expected = []
    for x, y in zip(predicted.T, truth.T, strict=True):
        r = np.corrcoef(x, y)[0, 1]
        expected.append(2 * r * x.std() * y.std() / (x.var() + y.var() + (x.mean() - y.mean()) ** 2))
    got = concordance(torch.tensor(predicted), torch.tensor(truth))
    assert got.tolist() == pytest.approx(expected, rel=1e-9)
    assert concordance(torch.tensor(truth), torch.tensor(truth)).tolist() == pytest.approx([1, 1])
    assert concordance(torch.zeros(9, 2), torch.zeros(9, 2)).tolist() == [0, 0]


@pytest.mark.parametrize("regression", ["concordance", "smooth_l1"])
def test_multi_task_leaves_out_what_is_not_annotated(regression: str) -> None:
    module = cheap("timm").eval()
    loss = MultiTask(CrossEntropy(0.0, "none"), weight=2.0, regression=regression)
    torch.manual_seed(0)
    loss.attach(module)
    image, label = torch.rand(6, 3, 64, 64), torch.arange(6)
    annotated = torch.rand(6, 2) * 2 - 1
    annotated[[1, 4], [0, 1]] = torch.nan
    known = [0, 2, 3, 5]
    predicted = loss.head(module.features(image[known]))
    if regression == "concordance":
        term = 1 - concordance(predicted, annotated[known]).mean()
    else:
        term = nn.functional.smooth_l1_loss(predicted, annotated[known])
    value, logits = loss.objective(module, {"image": image, "label": label, "valence_arousal": annotated})
    torch.testing.assert_close(value, nn.functional.cross_entropy(logits, label) + 2 * term)
    # Nothing annotated: the expression alone, and finite gradients.
    value, _ = loss.objective(module, {"image": image, "label": label, "valence_arousal": annotated * torch.nan})
    value.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)
    constant = 2.0 if regression == "concordance" else 0.0
    torch.testing.assert_close(value, nn.functional.cross_entropy(logits, label) + constant)
    with pytest.raises(UserError, match="data=affectnet"):
        loss.objective(module, {"image": image, "label": label})


@pytest.mark.parametrize("name", ["center", "multi_task", "flip_consistency"])
def test_models_with_a_loss_of_their_own_refuse_losses_of_features(name: str) -> None:
    module = cheap("dan").train()
    module.loss_function = instantiate(composed(f"loss={name}").loss)
    with pytest.raises(UserError, match="needs features"):
        module.loss({"image": torch.rand(4, 3, 64, 64), "label": torch.arange(4)})


# -- runs -------------------------------------------------------------------------------------------------------------

AVERAGED = [*TINY, "logger=csv", "mix=mixup", "mix.cutmix=1.0", "mix.off_last_epochs=0", "trainer.weight_ema=0.8"]
NETWORK = "network."


def weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(NETWORK): value for key, value in state.items() if key.startswith(NETWORK)}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A finished run with mixing and averaged weights."""
    folder = tmp_path_factory.mktemp("averaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FER_CACHE", str(cache))
        leave_out_pictures(patch)
        run_experiment(composed(*AVERAGED), folder)
    return folder


def test_what_is_kept_is_the_average_that_was_validated(averaged: Path) -> None:
    results = json.loads((averaged / "results.json").read_text())
    best, last = (load_checkpoint(averaged / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    kept, training = weights(best["state_dict"]), weights(last["state_dict"])
    average = last["callbacks"]["WeightAverage"]["average"]
    assert kept.keys() == training.keys() == average.keys()
    assert last["callbacks"]["WeightAverage"]["step"] == 12
    floats = [key for key, value in kept.items() if value.is_floating_point()]
    assert any(not torch.equal(average[key], training[key]) for key in floats)
    if results["best_epoch"] == 1:
        assert all(torch.equal(kept[key], average[key]) for key in kept)
    # The confusion matrix of the validation belongs to the weights kept.
    config = composed(*AVERAGED)
    data = instantiate(config.data)
    data.open()
    config.data.class_names = data.class_names
    module = instantiate(config.model).eval()
    module.load_state_dict(best["state_dict"])
    confusion = np.zeros((7, 7), dtype=int)
    with torch.inference_mode():
        for batch in data.val_dataloader():
            np.add.at(confusion, (batch["label"].numpy(), module(batch["image"]).argmax(1).numpy()), 1)
    assert confusion.tolist() == results["confusion"]["val"]


def test_mixed_and_averaged_runs_resume_bitwise(
    averaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ExpressionModule.training_step

    def killed(module: ExpressionModule, batch: dict, batch_idx: int) -> torch.Tensor:
        if module.trainer.global_step == 9:
            raise KeyboardInterrupt
        return step(module, batch, batch_idx)

    words = [*AVERAGED, "trainer.checkpoint_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(ExpressionModule, "training_step", killed)
        with pytest.raises(SystemExit):
            run_experiment(composed(*words), tmp_path)
    leave_out_pictures(monkeypatch)
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 8
    run_experiment(composed(*words), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["resumed_from_step"] == 8
    for name in ("best", "last"):
        a, b = (load_checkpoint(folder / "checkpoints" / f"{name}.ckpt") for folder in (averaged, tmp_path))
        assert all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"])
    a, b = (
        load_checkpoint(folder / "checkpoints" / "last.ckpt")["callbacks"]["WeightAverage"]["average"]
        for folder in (averaged, tmp_path)
    )
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert (tmp_path / "metrics.csv").read_bytes() == (averaged / "metrics.csv").read_bytes()
    assert (tmp_path / "predictions.csv").read_bytes() == (averaged / "predictions.csv").read_bytes()


def test_a_multi_task_run_learns_its_layer_and_its_weights_load_elsewhere(tmp_path: Path) -> None:
    """Under SAM, whose two passes must see one mixture."""
    write_affectnet(tmp_path / "data")
    tiny = [word for word in TINY if not word.startswith(("data", "trainer.max_epochs"))]
    words = ["data=affectnet", f"data.root={tmp_path / 'data'}", "data.store_size=48", "data.batch_size=10", *tiny]
    words += [
        "loss=multi_task",
        "optim=sam",
        "mix=mixup",
        "trainer.max_epochs=1",
        "logger=csv",
        "protocol.val_fraction=0.25",
    ]
    seen: list[torch.Tensor] = []
    step = ExpressionModule.training_step

    def watched(module: ExpressionModule, batch: dict, batch_idx: int) -> torch.Tensor:
        seen.append(batch["image"].clone())
        return step(module, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpressionModule, "training_step", watched)
        leave_out_pictures(patch)
        run_experiment(composed(*words, "mix.off_last_epochs=0"), tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(seen) == 2 * results["steps"]
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    best = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")
    config = composed(*words)
    module = instantiate(config.model)
    module.load_state_dict(best["state_dict"])
    torch.manual_seed(config.seed)
    assert module.loss_function.head.weight.shape == (2, module.feature_size())
    assert len(config.data.class_names) == len(SEVEN) + 1
    # The layer is among the optimiser's parameters: warm-up's first steps move it from where it began.
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    groups = state["optimizer_states"][0]["param_groups"]
    assert sum(len(g["params"]) for g in groups) == len(list(module.parameters()))
