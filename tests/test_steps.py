"""Steps that go wrong: numbers that are not finite stop the run or are left out; batches too large are cut."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from conftest import TINY, composed, leave_out_pictures
from torch import Tensor, nn

from fer.callbacks import Randomness
from fer.data.transforms import Finish
from fer.errors import UserError
from fer.experiment import run_experiment
from fer.models import guard
from fer.models.base import ExpressionModule
from fer.models.feature_losses import Center, FlipConsistency, Island, LocalityPreserving, MultiTask
from fer.models.guard import FILE
from fer.models.losses import ClassBalanced, CrossEntropy, ExpressionLoss, Focal, SoftCrossEntropy
from fer.models.mixing import Mixing
from fer.models.optim import Constant, Recipe
from fer.models.sam import SAM
from fer.session import protect
from fer.trainer import Trainer

BATCH, BATCHES, CLASSES, SIDE = 8, 6, 3, 6
BAD = 3  # the batch with the bad number
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3, fused=True)
ADAM = partial(torch.optim.AdamW, lr=0.01, fused=True)
OPTIMIZERS = {
    "sgd": SGD,
    "adamw": ADAM,
    "sam": partial(SAM, lr=0.01, rho=0.05, base=partial(torch.optim.AdamW, fused=True)),
    "plain": partial(torch.optim.SGD, lr=0.1),
}


class Bend(torch.autograd.Function):
    """The identity, whose gradient is infinite while its output is not; as a broken kernel would have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.inf


class Network(nn.Module):
    """A batch norm, a hidden layer, a classifier; memory for ``most`` images, of which a marked one bends."""

    def __init__(self, norm: bool, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3) if norm else nn.Identity()
        self.hidden, self.dropout = nn.Linear(3 * SIDE * SIDE, 5), nn.Dropout(dropout)
        self.classifier = nn.Linear(5, CLASSES)
        self.most = 10**9
        self.seen: list[int] = []

    def forward_features(self, image: Tensor) -> Tensor:
        bends = bool((image == 99).any())
        x = self.dropout(self.hidden(self.norm(image).flatten(1)).tanh())
        if self.training:
            self.seen.append(len(image))
        if len(image) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore of it")
        return Bend.apply(x) if bends else x

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.forward_features(image))


class Small(ExpressionModule):
    network: Network

    def __init__(self, loss: ExpressionLoss, optim: Recipe, norm: bool = True, dropout: float = 0.2) -> None:
        super().__init__(
            class_names=["a", "b", "c"], image_size=SIDE, mean=[0.0] * 3, std=[1.0] * 3, loss=loss, optim=optim
        )
        self.network = Network(norm, dropout)

    @property
    def cam_layer(self) -> nn.Module:
        return self.network.norm


class Batches:
    """Batches as a loader hands them out: what is changed in one does not stay."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (dict(batch) for batch in self.batches)


class Data(lightning.LightningDataModule):
    """Six batches of eight random images; ``bad`` says what stands in one of them."""

    def __init__(self, bad: float | None = None) -> None:
        super().__init__()
        self.bad = bad
        item = np.array([f"image {i}" for i in range(BATCH * BATCHES)])
        self.store = SimpleNamespace(manifest=SimpleNamespace(item=item))

    def train_batches(self) -> int:
        return BATCHES

    def class_counts(self, part: str) -> list[int]:
        return [16, 20, 12]

    def train_dataloader(self) -> Batches:
        generator = torch.Generator().manual_seed(1)
        batches = []
        for i in range(BATCHES):
            image = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
            label = torch.randint(CLASSES, (BATCH,), generator=generator)
            if self.bad is not None and i == BAD:
                image[2, 0, 0, 0] = self.bad
            batches.append({"image": image, "label": label, "index": torch.arange(BATCH) + i * BATCH})
        return Batches(batches)

    def val_dataloader(self) -> Batches:
        return Batches([])


def module_of(
    optimizer: str = "sgd", clip: float | None = None, loss: ExpressionLoss | None = None, **more: Any
) -> Any:
    torch.manual_seed(0)
    recipe = Recipe(OPTIMIZERS[optimizer], Constant(), no_decay_on_norm=True, clip_norm=clip, clip_value=None)
    return Small(loss or CrossEntropy(0.0, "none"), recipe, **more)


def fit(
    module: Small, folder: Path, data: Data, *callbacks: Any, resume: Path | None = None, **options: Any
) -> Trainer:
    """Two epochs of six batches as a run has them."""
    plain = {"on_nan": "stop", "auto_batch": False, "max_epochs": 2, "log_every_n_steps": 50}
    plain |= {"limit_val_batches": 0, "num_sanity_val_steps": 0}
    trainer = Trainer(
        **{
            **dict(threads=1, channels_last=False, weight_ema=None, patience=None, checkpoint_minutes=9),
            **dict(
                checkpoint_steps=None, compile=None, precision="32-true", devices=1, accelerator="cpu", logger=False
            ),
            **dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False),
            **plain,
            **options,
        },
        callbacks=[Randomness(5), *callbacks],
        default_root_dir=str(folder),
    )
    protect(module, trainer, SimpleNamespace(path=folder))
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return trainer


def load_checkpoint(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(params=["cpu", "accelerator"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Numbers read at once, or on the same CPU at logging points only, as on an accelerator."""
    if request.param == "accelerator":
        monkeypatch.setattr(guard, "AT_ONCE", ())
    return request.param


class Weights(lightning.Callback):
    """Notes the weights before each batch."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.before.append(state(module))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "sam"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_stop_leaves_the_weights_of_the_step_before(
    tmp_path: Path, place: str, optimizer: str, clip: float | None
) -> None:
    module, weights = module_of(optimizer, clip), Weights()
    with pytest.raises(UserError, match=rf"the loss is nan in step {BAD} \(epoch 0\), .*{FILE}.*trainer.on_nan=skip"):
        fit(module, tmp_path, Data(torch.nan), weights)
    good = weights.before[BAD]
    weights_now = dict(module.named_parameters())
    assert all(torch.equal(good[key], value) for key, value in weights_now.items())
    record = json.loads((tmp_path / FILE).read_text())
    assert (record["step"], record["epoch"], record["batch"], record["loss"]) == (BAD, 0, BAD, "nan")
    assert record["rows"] == list(range(BAD * BATCH, (BAD + 1) * BATCH))
    assert record["items"][0] == f"image {BAD * BATCH}"
    assert record["lr"] == pytest.approx(0.1 if optimizer == "sgd" else 0.01)
    if place == "cpu":
        assert len(weights.before) == BAD + 1  # ended there and then


@pytest.mark.parametrize(
    ("clip", "named"), [(1.0, "the gradient of network.norm.weight"), (None, "network.norm.weight is not finite after")]
)
def test_an_infinite_gradient_of_a_finite_loss(tmp_path: Path, clip: float | None, named: str) -> None:
    """Clipping finds it in its own step; without, the next step's loss does, and the step before is named."""
    with pytest.raises(UserError, match=rf"{named}.* step {BAD} \(epoch 0\)"):
        fit(module_of(clip=clip), tmp_path, Data(99.0))
    record = json.loads((tmp_path / FILE).read_text())
    assert record["rows"][0] == BAD * BATCH
    assert record["gradient" if clip else "weight"] == "network.norm.weight"
    assert np.isfinite(float(record["loss"]))


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    """A checkpoint that falls between the bad gradient and the loss that would show it."""

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    with pytest.raises(UserError, match=f"is not finite after step {BAD} "):
        fit(module_of(), tmp_path, Data(99.0), Save())
    saved = load_checkpoint(tmp_path / "last.ckpt")
    assert saved["global_step"] == BAD
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def by_hand(module: Small, data: Data, left_out: set[int], accumulate: int = 1) -> dict[str, Tensor]:
    """Plain PyTorch over two epochs without the batches left out."""
    recipe = module.optim
    optimizer = recipe.configure(module.parameter_groups(), BATCHES, 2)["optimizer"]
    module.loss_function.setup(torch.as_tensor(data.class_counts("train")))
    module.train()

    def closure(batches: list[dict[str, Tensor]], seed: int) -> Tensor:
        optimizer.zero_grad()
        for place, batch in enumerate(batches):
            if accumulate > 1:
                torch.manual_seed(seed + place * 2_654_435_761)
            loss = nn.functional.cross_entropy(module(batch["image"]), batch["label"]) / accumulate
            loss.backward()
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(module.parameters(), recipe.clip_norm)
        return loss

    for step in range(2 * BATCHES // accumulate):
        start = step * accumulate % BATCHES
        seed = 5 * 1_000_000_007 + step
        torch.manual_seed(seed)
        if not left_out & set(range(start, start + accumulate)):
            optimizer.step(partial(closure, data.train_dataloader().batches[start : start + accumulate], seed))
    return state(module)


@pytest.mark.parametrize("bad", [torch.nan, 99.0], ids=["loss", "gradient"])
@pytest.mark.parametrize(
    ("optimizer", "clip", "accumulate"),
    [("sgd", None, 1), ("sgd", 1.0, 1), ("adamw", None, 1), ("sam", None, 1), ("sam", 1.0, 1), ("sgd", None, 2)],
)
def test_skipping_equals_never_having_seen_the_batch(
    tmp_path: Path, place: str, bad: float, optimizer: str, clip: float | None, accumulate: int
) -> None:
    """Weights, momentum and statistics of batch norm, against plain PyTorch without the bad window."""
    module = module_of(optimizer, clip)
    fit(module, tmp_path, Data(bad), on_nan="skip", accumulate_grad_batches=accumulate)
    window = {BAD} if accumulate == 1 else {2, 3}
    expected = by_hand(module_of(optimizer, clip), Data(bad), window, accumulate)
    found = state(module)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert module.guard.skipped == 2
    assert module.guard.stamps == ["2 training steps left out: loss or gradient not finite"]


def test_the_very_first_step_is_left_out(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused SGD leaves momentum unwritten when it is told to do nothing in its first step."""
    monkeypatch.setattr("test_steps.BAD", 0)
    module = module_of("sgd")
    fit(module, tmp_path, Data(torch.nan), on_nan="skip")
    expected = by_hand(module_of("sgd"), Data(torch.nan), {0})
    for key, value in expected.items():
        torch.testing.assert_close(state(module)[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_training_scores_leave_the_skipped_batch_out(tmp_path: Path, place: str) -> None:
    module = module_of()
    trainer = fit(module, tmp_path, Data(torch.nan), on_nan="skip", max_epochs=1)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_skips_resume_exactly(tmp_path: Path, place: str) -> None:
    """From a checkpoint after the first of two skipped steps: weights, optimiser, statistics and the count."""

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == BATCHES:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    straight, resumed = module_of("adamw"), module_of("adamw")
    fit(straight, tmp_path, Data(torch.nan), Save(), on_nan="skip")
    fit(resumed, tmp_path, Data(torch.nan), on_nan="skip", resume=tmp_path / "middle.ckpt")
    assert equal(state(straight), state(resumed))
    assert resumed.guard.skipped == straight.guard.skipped == 2


def test_a_training_beyond_help_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_IN_A_ROW", 4)
    module = module_of()
    with torch.no_grad():
        module.network.hidden.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite for 4 steps in a row, up to step 3 "):
        fit(module, tmp_path, Data(), on_nan="skip")


def test_a_gradient_scaler_is_left_to_its_work(tmp_path: Path) -> None:
    class Scaled(lightning.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.precision_plugin.scaler = object()

    with pytest.raises(UserError, match="16-mixed such steps are left out anyway"):
        fit(module_of(), tmp_path, Data(), Scaled(), on_nan="skip")
    module = module_of(clip=1.0)
    fit(module, tmp_path, Data(), Scaled())
    assert not module.guard.looks


@pytest.mark.parametrize("most", [BATCH, 3], ids=["whole", "parts"])
def test_sam_counts_a_batch_once_and_at_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """So far uphill that the second look would tell."""

    class Counts(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.images, self.loss = module.tally("train").sums[:2].tolist()

    monkeypatch.setitem(OPTIMIZERS, "sam", partial(SAM, lr=0.0, rho=5.0, base=torch.optim.SGD))
    counts, module = Counts(), module_of("sam", norm=False, dropout=0.0)
    module.network.most = most
    fit(module, tmp_path, Data(), counts, max_epochs=1, auto_batch=most < BATCH)
    batches = Data().train_dataloader().batches
    assert counts.images == BATCH * BATCHES
    module.network.most = BATCH
    with torch.no_grad():
        loss = sum(module.loss(batch)[0].item() for batch in batches) / BATCHES
    assert counts.loss / counts.images == pytest.approx(loss, rel=1e-5)


def test_sam_accumulates_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="looks at each batch twice"):
        fit(module_of("sam"), tmp_path, Data(), accumulate_grad_batches=2)


def test_an_accelerator_needs_an_optimiser_that_can_hold_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(module_of("plain"), tmp_path, Data(), on_nan="skip", max_epochs=1)
    monkeypatch.setattr(guard, "AT_ONCE", ())
    with pytest.raises(UserError, match=r"trainer.on_nan=skip: this optimiser cannot leave out a step"):
        fit(module_of("plain"), tmp_path, Data(), on_nan="skip")


def test_an_accelerator_is_read_at_logging_points_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of the device per 12 steps; a step's own count is 0."""
    monkeypatch.setattr(guard, "AT_ONCE", ())
    reads: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, _original: Any = original, _name: str = name) -> Any:
            reads.append(_name)
            return _original(self)

        monkeypatch.setattr(Tensor, name, counted)

    class Mark(lightning.Callback):
        def __init__(self) -> None:
            self.at: list[int] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.at.append(len(reads))

    mark, module = Mark(), module_of("adamw", 1.0)
    module.network.forward_features = lambda x: module.network.hidden(x.flatten(1))  # it reads the image
    fit(module, tmp_path, Data(), mark, on_nan="skip", log_every_n_steps=2)
    at_step = np.diff(mark.at)
    assert at_step[:5].tolist() == [0, 1, 0, 1, 0] or at_step[:5].tolist() == [1, 0, 1, 0, 1], at_step


# -- batches cut to fit in memory ---------------------------------------------------------------------------------


def portioned(folder: Path, most: int, optimizer: str = "sgd", **more: Any) -> tuple[Small, Trainer]:
    options = {key: more.pop(key) for key in ("on_nan",) if key in more}
    callbacks = more.pop("callbacks", [])
    module = module_of(optimizer, **{"norm": False, "dropout": 0.0, **more})
    module.network.most = most
    return module, fit(module, folder, Data(), *callbacks, auto_batch=most < BATCH, **options)


@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
@pytest.mark.parametrize("most", [5, 3, 1])
def test_parts_add_up_to_the_batch(tmp_path: Path, optimizer: str, most: int) -> None:
    whole, one = portioned(tmp_path, BATCH, optimizer)
    module, trainer = portioned(tmp_path, most, optimizer)
    for key, value in state(whole).items():
        torch.testing.assert_close(state(module)[key], value, rtol=1e-4, atol=1e-6, msg=key)
    assert module.portions.micro_batch == {5: 4, 3: 2, 1: 1}[most]
    assert trainer.global_step == one.global_step == 2 * BATCHES
    for score in ("train/loss", "train/acc"):
        assert trainer.callback_metrics[score] == pytest.approx(float(one.callback_metrics[score]), rel=1e-5)
    tried = module.network.seen
    assert tried[: {5: 3, 3: 6, 1: 11}[most]] == {5: [8, 4, 4], 3: [8, 4, 2, 2, 2, 2], 1: [8, 4, 2] + [1] * 8}[most]
    assert tried.count(8) == 1  # later steps begin with what fitted


@pytest.mark.parametrize(
    "loss", [CrossEntropy(0.1, "none"), Focal(2.0), ClassBalanced(0.99)], ids=lambda loss: type(loss).__name__
)
def test_parts_add_up_under_every_loss_that_says_so(tmp_path: Path, loss: ExpressionLoss) -> None:
    whole, _ = portioned(tmp_path, BATCH, loss=loss)
    module, _ = portioned(tmp_path, 3, loss=loss)
    for key, value in state(whole).items():
        torch.testing.assert_close(state(module)[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_parts_of_mixed_batches(tmp_path: Path) -> None:
    """Images are mixed with others of the whole batch before it is cut."""
    mixed = [Mixing(0.4, 1.0, 1.0, 0)]
    whole, _ = portioned(tmp_path, BATCH, callbacks=mixed)
    module, _ = portioned(tmp_path, 3, callbacks=mixed)
    for key, value in state(whole).items():
        torch.testing.assert_close(state(module)[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_what_was_drawn_does_not_depend_on_the_failed_try(tmp_path: Path) -> None:
    """Two runs, one of which is told at once how many parts there are."""
    module, _ = portioned(tmp_path, 4, norm=True, dropout=0.5)
    told = module_of("sgd", norm=True, dropout=0.5)
    told.network.most = 4

    class Told(lightning.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.portions.parts = 2

    fit(told, tmp_path, Data(), Told(), auto_batch=True)
    assert equal(state(module), state(told))
    assert 8 not in told.network.seen


def test_a_single_image_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out of memory with a single image"):
        portioned(tmp_path, 0)


def test_out_of_memory_without_parts_is_a_sentence(tmp_path: Path) -> None:
    module = module_of()
    module.network.most = 4
    with pytest.raises(UserError, match=r"out of memory .*2 GiB\): .*trainer.auto_batch=true") as caught:
        fit(module, tmp_path, Data())
    assert "\n" not in str(caught.value)


def test_losses_of_whole_batches_are_refused(tmp_path: Path) -> None:
    plain = CrossEntropy(0.0, "none")
    kept = [plain, Focal(1.0), ClassBalanced(0.9), SoftCrossEntropy(), FlipConsistency(plain, 1.0)]
    refused = [
        CrossEntropy(0.0, "balanced"),
        Center(plain, 0.1, 0.5),
        Island(plain, 0.1, 0.5, 1.0),
        LocalityPreserving(plain, 0.1, 2),
        MultiTask(plain, 1.0, "concordance"),
        FlipConsistency(CrossEntropy(0.0, "sqrt"), 1.0),
    ]
    assert [loss.splits for loss in kept] == [True] * 5
    assert [loss.splits for loss in refused] == [False] * 6
    with pytest.raises(UserError, match=r"trainer.auto_batch=true cannot be had here, since the loss of Small"):
        fit(module_of(loss=refused[1]), tmp_path, Data(), auto_batch=True)
    with pytest.raises(UserError, match="accumulate_grad_batches joins"):
        fit(module_of(), tmp_path, Data(), auto_batch=True, accumulate_grad_batches=2)


# -- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def nan_in_row(monkeypatch: pytest.MonkeyPatch) -> int:
    """One training image is NaN wherever it turns up."""
    original, row = Finish.__call__, 7

    def spoilt(self: Finish, batch: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
        out = original(self, batch, epoch)
        if self.train and epoch == 1:
            out["image"] = torch.where((out["index"] == row)[:, None, None, None], torch.nan, out["image"])
        return out

    monkeypatch.setattr(Finish, "__call__", spoilt)
    return row


def run(folder: Path, *words: str) -> None:
    small = ["data.train=40", "data.val=14", "data.test=14", "model.width=4", "trainer.checkpoint_steps=1"]
    run_experiment(composed(*TINY, *small, "logger=csv", *words), folder)


def test_a_run_stops_and_its_last_checkpoint_is_good(tmp_path: Path, nan_in_row: int) -> None:
    with pytest.raises(UserError, match="the loss is nan in step") as caught:
        run(tmp_path / "run")
    record = json.loads((tmp_path / "run" / FILE).read_text())
    assert nan_in_row in record["rows"]
    assert record["epoch"] == 1
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["status"] == "failed"
    assert str(caught.value) in status["error"]
    last = load_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    assert last["global_step"] == record["step"]
    assert all(value.isfinite().all() for value in last["state_dict"].values() if value.is_floating_point())


def test_a_run_that_skips_says_so(tmp_path: Path, nan_in_row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_pictures(monkeypatch)
    run(tmp_path / "run", "trainer.on_nan=skip")
    record = json.loads((tmp_path / "run/results.json").read_text())
    assert (record["skipped_steps"], record["steps"], record["micro_batch"]) == (1, 4, None)
    assert record["stamps"][-1] == "1 training steps left out: loss or gradient not finite"
    assert nan_in_row in json.loads((tmp_path / "run" / FILE).read_text())["rows"]
