"""A compiled training: its checkpoints are like any other's, need no compiler, and go on to the same end."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, composed
from torch._dynamo.utils import counters

from fer.callbacks import Recorder
from fer.checkpoints import load_checkpoint
from fer.evaluate import run as evaluate
from fer.experiment import run_experiment
from fer.runs import RunFolder, read_json
from fer.trained import open_run

pytestmark = pytest.mark.slow
WORDS = [*TINY, "data.train=60", "trainer.precision=32-true", "logger=csv"]


def graphs() -> int:
    """How many the compiler has made."""
    return int(counters["stats"]["unique_graphs"])


def trained(folder: Path, *words: str, resumed: bool = False) -> RunFolder:
    run_experiment(composed(*WORDS, *words), folder, resumed=resumed)
    return RunFolder(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """One training as it is and one compiled."""
    place = tmp_path_factory.mktemp("compiled")
    before = graphs()
    eager = trained(place / "eager")
    assert graphs() == before
    compiled = trained(place / "compiled", "trainer.compile=default")
    assert graphs() >= before + 2  # training and evaluation
    assert "compile: default" in compiled.config.read_text()
    return {"eager": eager, "compiled": compiled}


def form(entry: Any) -> Any:
    """What a checkpoint is made of: names, kinds, shapes."""
    if isinstance(entry, dict):
        return {key: form(value) for key, value in entry.items()}
    if isinstance(entry, list | tuple):
        return [form(value) for value in entry]
    return (entry.dtype, entry.shape) if isinstance(entry, torch.Tensor) else type(entry)


def test_a_compiled_training_learns_the_same_and_keeps_it_in_the_same_form(folders: dict[str, RunFolder]) -> None:
    curves = [pd.read_csv(folder.path / "metrics.csv")["train/loss"].to_numpy() for folder in folders.values()]
    np.testing.assert_allclose(curves[0], curves[1], rtol=0.02)
    for name in ("best", "last"):
        eager, compiled = (load_checkpoint(getattr(folder, name)) for folder in folders.values())
        assert form(compiled) == form(eager)
        assert not torch.equal(*(next(iter(each["state_dict"].values())) for each in (eager, compiled)))


def test_it_is_evaluated_without_a_compiler(folders: dict[str, RunFolder], tmp_path: Path) -> None:
    run = folders["compiled"].path
    assert open_run(run).module.network._compiled_call_impl is None
    before = graphs()
    words = [f"run={run}", f"output={tmp_path / 'again'}", "calibration=false", "timing_repeats=0"]
    evaluate(composed(*words, command="evaluate"))
    assert graphs() == before
    was, now = (pd.read_csv(folder / "predictions.csv") for folder in (run, tmp_path / "again"))
    classes = read_json(run / "results.json")["classes"]
    assert now["index"].tolist() == was["index"].tolist()
    np.testing.assert_allclose(now[classes], was[classes], atol=1e-5)
    assert np.ptp(was[classes].to_numpy(), axis=0).max() > 5e-4  # so short a training tells images apart by little


def test_it_goes_on_to_the_same_weights(
    folders: dict[str, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = [4]  # in the middle of the second epoch, once

    def dies(self: Recorder, trainer: Any, *_: Any) -> None:
        if trainer.global_step in cut:
            cut.clear()
            raise RuntimeError("the power went")

    monkeypatch.setattr(Recorder, "on_train_batch_start", dies, raising=False)
    with pytest.raises(RuntimeError, match="the power went"):
        trained(tmp_path / "cut", "trainer.compile=default")
    folder = RunFolder(tmp_path / "cut")
    assert load_checkpoint(folder.last)["global_step"] == 3
    trained(tmp_path / "cut", "trainer.compile=default", resumed=True)
    results = read_json(folder.results)
    assert (results["resumed_from_step"], results["steps"]) == (3, 6)
    whole = load_checkpoint(folders["compiled"].last)["state_dict"]
    weights = load_checkpoint(folder.last)["state_dict"]
    assert [name for name, value in whole.items() if not torch.equal(value, weights[name])] == []
