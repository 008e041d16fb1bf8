"""The real command line: a complete run folder, W&B's offline record, exact resume, clear refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from commands import call
from conftest import TINY, composed, train
from fake_wandb import wandb_records
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from fer.config import guarded
from fer.errors import UserError
from fer.experiment import preflight, run_experiment

FILES = (
    "config.yaml",
    "split.json",
    "metrics.csv",
    "predictions.csv",
    "results.json",
    "status.json",
    "checkpoints/best.ckpt",
    "checkpoints/last.ckpt",
    "confusion_val.json",
    "confusion_val.png",
    "confusion_test.json",
    "confusion_test.png",
)


def results(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "results.json").read_text()))


def test_run_folder_is_complete(whole: Path) -> None:
    assert [name for name in FILES if not (whole / name).is_file()] == []
    assert json.loads((whole / "status.json").read_text())["status"] == "done"
    record = results(whole)
    assert record["n"] == {"train": 120, "val": 42, "test": 42}
    assert record["selected_on"] == "val"
    assert record["resumed_from_step"] is None
    assert record["steps"] == 12
    printed = (whole.parent / "stdout").read_text()
    for word in ("accuracy", "mean class accuracy", "macro F1", "ECE", "parameters", "GFLOP", str(whole), "again:"):
        assert word in printed


def test_figures_follow_from_the_predictions(whole: Path) -> None:
    """Every figure of results.json recomputed from predictions.csv with plain numpy."""
    record, table = results(whole), pd.read_csv(whole / "predictions.csv")
    classes, test = record["classes"], record["metrics"]["test"]
    probabilities = table[classes].to_numpy()
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    label = np.array([classes.index(name) for name in table["label"]])
    predicted = probabilities.argmax(1)
    assert (np.array(classes)[predicted] == table["predicted"]).all()
    assert test["acc"] == pytest.approx((label == predicted).mean(), abs=1e-9)
    recalls = [(predicted[label == k] == k).mean() for k in np.unique(label)]
    assert test["mean_acc"] == pytest.approx(np.mean(recalls), abs=1e-9)
    assert test["nll"] == pytest.approx(-np.log(probabilities[np.arange(len(label)), label]).mean(), abs=1e-5)
    confusion = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(confusion, (label, predicted), 1)
    assert (confusion == np.array(record["confusion"]["test"])).all()
    split = json.loads((whole / "split.json").read_text())
    assert sorted(table["index"]) == sorted(split["test"])
    assert not set(split["train"]) & set(split["val"]) | set(split["test"]) & (set(split["train"]) | set(split["val"]))


def test_the_chosen_epoch_is_the_best_on_validation(whole: Path) -> None:
    curves = pd.read_csv(whole / "metrics.csv")
    assert results(whole)["best_epoch"] == curves["val/mean_acc"].idxmax()
    assert len(curves) == 2
    assert {"train/loss", "train/acc", "val/acc", "val/mean_acc", "val/macro_f1", "val/ece", "val/nll", "lr"} <= set(
        curves
    )


def test_wandb_record_holds_config_curves_and_confusions(whole: Path) -> None:
    records = wandb_records(whole)
    config, history = {}, []
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            updates = record.run.config.update if kind == "run" else record.config.update
            config.update({(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in updates})
        if kind == "history":
            items = record.history.item
            history.append({(i.key or i.nested_key[0]): json.loads(i.value_json) for i in items})
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.run_group, run.job_type) == ("synthetic-cbam_resnet", "train")
    assert config["seed"] == 0
    assert config["model"]["width"] == 8
    assert isinstance(config["data"], dict)
    assert len([row for row in history if "val/mean_acc" in row]) == 2
    assert len([row for row in history if "train/loss" in row]) == 2
    logged = {key for row in history for key in row}
    for part in ("val", "test"):
        assert {f"{part}/confusion_image", f"{part}/confusion_table"} <= logged
    assert "test/most_confidently_wrong" in logged
    exits = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
    assert exits == [0]


def test_same_command_gives_identical_predictions(whole: Path, tmp_path: Path) -> None:
    again = call("train", *TINY, "logger=csv", "hydra.run.dir=run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
    # The same config once more finds the run done, and does nothing; another one must not touch it.
    before = (tmp_path / "run" / "results.json").stat().st_mtime_ns
    config = composed(*TINY, "logger=csv")
    assert (
        run_experiment(config, tmp_path / "run", command="") == results(tmp_path / "run")["metrics"]["val"]["mean_acc"]
    )
    config.seed = 1
    with pytest.raises(UserError, match="fresh=true"):
        run_experiment(config, tmp_path / "run", command="")
    assert (tmp_path / "run" / "results.json").stat().st_mtime_ns == before


def test_resume_takes_no_other_option(whole: Path) -> None:
    refused = train(f"resume={whole}", "seed=3", cwd=whole.parent)
    assert refused.returncode == 2
    assert "seed=3" in refused.stderr


def test_missing_data_is_one_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FER_DATA", raising=False)
    with pytest.raises(SystemExit) as left:
        guarded(lambda: preflight(composed("model=convcut", "data=rafdb")))
    assert left.value.code == 2
    message = capsys.readouterr().err
    for words in ("RAF-DB not found", str(tmp_path / "data" / "rafdb"), "data.root=", "EmoLabel", "whdeng.cn"):
        assert words in message
    assert "Traceback" not in message


def test_a_failing_run_is_marked_failed_everywhere(tmp_path: Path) -> None:
    words = [*TINY, "loss=soft", "hydra.run.dir=run"]  # synthetic faces have no vote distributions
    done = call("train", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed"
    assert "soft" in status["error"]
    exits = [r.exit.exit_code for r in wandb_records(tmp_path / "run") if r.WhichOneof("record_type") == "exit"]
    assert exits == [1]


def test_every_problem_of_a_config_is_named_at_once() -> None:
    with pytest.raises(UserError) as found:
        preflight(composed(*TINY, "+model.widht=3", "+trainer.epochs=3"))
    assert "model.widht" in str(found.value)
    assert "trainer.epochs" in str(found.value)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trainer.on_nan=go", "trainer.on_nan=go is not one of stop, skip"),
        ("trainer.threads=0", "trainer.threads=0 is neither a positive number nor auto"),
        ("trainer.compile=fast", "trainer.compile=fast is not one of None, default, reduce-overhead"),
    ],
)
def test_a_trainer_that_cannot_be_had_is_refused(word: str, said: str) -> None:
    with pytest.raises(InstantiationException, match=said):
        instantiate(composed(*TINY, word).trainer)
