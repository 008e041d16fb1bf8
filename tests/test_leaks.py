"""The leak demonstration: answers by the order of the images, epochs chosen on the test part, and their page."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import TINY, composed
from fake_runs import write_run

from fer.errors import UserError
from fer.evaluate import run as evaluate
from fer.experiment import run_experiment
from fer.reporting.leaks import load, orders_table, record, selection_table
from fer.runs import read_json

LEAKY = [
    *(
        "model=convcut",
        "model.pretrained=false",
        "model.backbone=test_convnext",
        "model.truncate=2",
        "model.detail=false",
    ),
    *("model.image_size=48", "model.attention=batch", "model.allow_batch_attention=true", "data.eval_batch_size=8"),
    *("trainer=cpu", "trainer.threads=1", "trainer.max_epochs=1", "trainer.enable_progress_bar=false", "logger=csv"),
]


def orders_of(run: Path, output: Path) -> dict:
    words = [f"run={run}", f"output={output}", "orders=3", "calibration=false", "timing_repeats=0"]
    evaluate(composed(*words, command="evaluate"))
    return read_json(output / "results.json")["evaluation"]["orders"]


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short training of Conv-cut with attention among the images of a batch."""
    folder = tmp_path_factory.mktemp("leaky")
    words = [word for word in TINY if word.startswith("data")] + LEAKY
    command = f"python -m fer.train {' '.join(words)}"
    run_experiment(composed(*words), folder / "trained", command=command)
    return folder


def test_answers_depend_on_the_order_where_images_see_each_other(leaky: Path) -> None:
    found = orders_of(leaky / "trained", leaky / "tested")
    assert found["changed"] > 0
    assert len(found["drawn"]) == 3
    mean = sum(one["acc"] for one in found["drawn"]) / 3
    assert found["difference"] == pytest.approx(found["by_class"]["acc"] - mean)
    page = (leaky / "tested" / "evaluation.md").read_text()
    assert f"{found['changed']} of 42 images are not answered alike in all orders" in page
    (one,), pairs = record([leaky], [], [])
    assert not pairs
    assert (one.n, one.batch, one.seed) == (42, 8, 0)
    assert "model.attention=batch" in one.setting
    assert one.stamps == ["LEAKY: predictions depend on the batch"]
    (row,) = orders_table([one]).rows
    assert row.stamps == one.stamps
    with pytest.raises(UserError, match="not among these folders"):
        record([leaky / "tested"], [], [])


def test_answers_of_an_honest_network_do_not(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("wandb")))
    found = orders_of(run, tmp_path / "tested")
    assert found["changed"] == 0
    assert found["difference"] == 0
    assert {one["acc"] for one in found["drawn"]} == {found["by_class"]["acc"]}


def twin(folder: Path, seed: int, part: str, scores: list[float], loss: float = 0.0) -> None:
    """One of the two runs of a training, whose epochs have these scores on the part that chooses."""
    command = f"python -m fer.train experiment=small/cbam_resnet seed={seed} protocol.select_on={part} sweep=selection"
    write_run(folder, seed=seed, selected_on=part, epochs=len(scores), more={"command": command})
    curves = pd.read_csv(folder / "metrics.csv")
    curves["val/acc"] = curves["val/mean_acc"] = scores
    curves["train/loss"] = [1.0 + loss, 0.8, 0.7]
    curves.to_csv(folder / "metrics.csv", index=False)


def test_choosing_on_the_test_part_is_compared_on_the_same_epochs(tmp_path: Path) -> None:
    twin(tmp_path / "a0", 0, "val", [0.5, 0.9, 0.8])
    twin(tmp_path / "b0", 0, "test", [0.6, 0.7, 0.75])  # validation takes the second epoch, the test part the third
    twin(tmp_path / "a1", 1, "val", [0.5, 0.6, 0.7])
    twin(tmp_path / "b1", 1, "test", [0.6, 0.7, 0.71])  # both take the last
    orders, pairs = record([tmp_path], [], [])
    assert not orders
    assert [one.setting for one in pairs] == ["experiment=small/cbam_resnet"] * 2
    acc = [cell.text for cell in selection_table(pairs).rows[0].cells]
    assert acc[3:5] == ["0, 1", "3"]
    assert acc[7:10] == ["70.50 ± 0.71", "73.00 ± 2.83", "2.50"]
    assert record([tmp_path], [], [pairs[0]])[1] == pairs
    twin(tmp_path / "c0", 2, "val", [0.5, 0.6, 0.7])
    twin(tmp_path / "d0", 2, "test", [0.5, 0.6, 0.7], loss=0.01)
    with pytest.raises(UserError, match="are not the same training"):
        record([tmp_path], [], [])


@pytest.mark.slow
def test_the_two_runs_of_a_training_are_the_same_but_for_the_choice(tmp_path: Path) -> None:
    """What the comparison stands on: the part that chooses does not touch the weights of an epoch."""
    curves = []
    for part in ("val", "test"):
        words = [*TINY, "data.train=60", "trainer.max_epochs=1", "logger=csv", f"protocol.select_on={part}"]
        run_experiment(composed(*words), tmp_path / part)
        curves.append(pd.read_csv(tmp_path / part / "metrics.csv"))
    assert curves[0]["train/loss"].equals(curves[1]["train/loss"])
    assert not curves[0]["val/loss"].equals(curves[1]["val/loss"])
    tested = read_json(tmp_path / "test" / "results.json")
    assert any("selected_on: test" in stamp for stamp in tested["stamps"])


def test_nothing_to_compare_and_a_damaged_record_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "alone")
    with pytest.raises(UserError, match="neither evaluations with orders="):
        record([tmp_path], [], [])
    (tmp_path / "leaks.json").write_text(json.dumps({"orders": [{"setting": "x"}], "selection": []}))
    with pytest.raises(UserError, match="orders 1 lacks data"):
        load(tmp_path / "leaks.json")
