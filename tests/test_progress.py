"""What a training says of its progress where nobody looks at a terminal."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fer.progress import Bar, Lines, progress


def trainer(**more: Any) -> Any:
    metrics = {"train/loss": torch.tensor(1.25), "val/mean_acc": torch.tensor(0.5)}
    known = {"is_global_zero": True, "current_epoch": 2, "max_epochs": 10, "callback_metrics": metrics}
    return SimpleNamespace(**known | more)


def test_an_epoch_is_a_line_also_of_a_run_that_goes_on_within_it(capsys: pytest.CaptureFixture[str]) -> None:
    module: Any = SimpleNamespace(monitor="val/mean_acc")
    lines = Lines()
    lines.on_train_epoch_end(trainer(), module)
    assert capsys.readouterr().out == "epoch 3 of 10: train/loss 1.2500, val/mean_acc 0.5000, 0 s\n"
    lines.on_train_epoch_start(trainer(), module)
    lines.on_train_epoch_end(trainer(is_global_zero=False), module)
    assert capsys.readouterr().out == ""


def test_a_bar_is_for_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(progress(), Lines)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert isinstance(progress(), Bar)
