"""A run that ended before its time goes on as if it had not, where there is more to it than a step."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, composed, leave_out_pictures
from torch import nn

from fer.checkpoints import CheckpointFiles, load_checkpoint
from fer.errors import UserError
from fer.experiment import run_experiment
from fer.models.base import ExpressionModule
from fer.runs import RunFolder, read_json
from fer.stopping import Stopped
from fer.trainer import choose_threads

SMALL = [*TINY, "logger=csv", "model.width=4", "data.train=60", "data.val=14", "data.test=14", "data.batch_size=10"]
SMALL += ["trainer.precision=32-true", "trainer.num_sanity_val_steps=0"]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_pictures(monkeypatch)


def run(folder: RunFolder, *words: str) -> dict[str, Any]:
    run_experiment(composed(*SMALL, *words), folder.path)
    return dict(read_json(folder.results))


def steps(folder: RunFolder) -> list[int]:
    return [int(line) for line in folder.steps.read_text().split()]


def test_a_training_that_stopped_early_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed in its test; and its best weights are those of its best epoch, or it says so."""
    folder = RunFolder(tmp_path)
    words = ["optim.optimizer.lr=1e-12", "trainer.patience=1", "trainer.max_epochs=9", "augment=none"]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ExpressionModule, "test_step", killed)
        with pytest.raises(Stopped):
            run(folder, *words)
    made, best = steps(folder), load_checkpoint(folder.best)
    assert made == list(range(1, len(made) + 1))
    assert len(made) < 6 * 9
    CheckpointFiles().save_checkpoint({**best, "epoch": 70}, folder.best)
    with pytest.raises(UserError, match=r"best\.ckpt is of epoch 71, the best is \d: .*fresh=true"):
        run(folder, *words)
    CheckpointFiles().save_checkpoint(best, folder.best)
    results = run(folder, *words)
    assert (6 * results["epochs"], results["best_epoch"]) == (len(made), best["epoch"])
    assert steps(folder) == made


def test_accumulated_gradients_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal in the first batch of a step, a kill in the second one of another: checkpoints lie between steps."""
    words = ["+trainer.accumulate_grad_batches=2", "trainer.max_epochs=1", "trainer.checkpoint_steps=1"]
    whole, folder, step = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut"), ExpressionModule.training_step
    run(whole, *words)

    def asked(self: ExpressionModule, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    def killed(self: ExpressionModule, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 3:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    for change, last in ((asked, 1), (killed, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(ExpressionModule, "training_step", change)
            with pytest.raises(Stopped):
                run(folder, *words)
        assert load_checkpoint(folder.last)["global_step"] == last
    results = run(folder, *words)
    assert (results["resumed_from_step"], results["steps"]) == (1, 3)
    assert steps(folder) == steps(whole) == [1, 2, 3]
    a, b = (load_checkpoint(each.last)["state_dict"] for each in (whole, folder))
    assert [name for name, value in a.items() if not torch.equal(value, b[name])] == []


def test_what_is_drawn_does_not_depend_on_threads_having_been_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    network, image, draws = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 3)), torch.ones(2, 3, 2, 2), []
    threads = torch.get_num_threads()
    for measured in (False, True):
        assert (tmp_path / "threads").exists() == measured
        torch.manual_seed(0)
        choose_threads(network, image, tmp_path, bf16=False)
        draws.append(torch.rand(3))
    torch.set_num_threads(threads)
    assert torch.equal(*draws)
