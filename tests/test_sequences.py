"""Frames of videos: scored one by one and by sequence (CK+)."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import composed
from fakes import WRITERS

from fer.experiment import run_experiment
from fer.metrics import sequence_counts
from fer.reporting.aggregate import aggregate, markdown
from fer.reporting.benches import make_benches
from fer.reporting.collect import read_runs
from fer.reporting.contents import results as results_table
from fer.reporting.groups import make_groups

WORDS = ["data=ckplus", "model=cbam_resnet", "model.width=4", "model.layers=[1,1,1,1]", "model.image_size=24"]
WORDS += ["data.store_size=24", "data.batch_size=18", "trainer=cpu", "trainer.threads=1", "trainer.max_epochs=1"]
WORDS += [
    "protocol=kfold",
    "protocol.folds=2",
    "protocol.val_fraction=0.3",
    "trainer.enable_progress_bar=false",
    "logger=csv",
]


def test_a_sequence_is_named_by_the_mean_of_its_frames() -> None:
    sequence = np.array(["x", "y", "x", "y", "z", "x"])
    label = np.array([0, 1, 0, 1, 1, 2])  # x has a frame with another label
    probabilities = np.array(
        [[0.6, 0.4, 0.0], [0.7, 0.3, 0.0], [0.3, 0.7, 0.0], [0.2, 0.8, 0.0], [0.9, 0.1, 0.0], [0.0, 0.1, 0.9]]
    )
    # x: (0.45, 0.55) and its own third class; y: (0.45, 0.55); z: (0.9, 0.1).
    assert sequence_counts(sequence, label, probabilities).tolist() == [[0, 1, 0], [1, 1, 0], [0, 0, 1]]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Both folds of a tiny training on a small CK+."""
    folder = tmp_path_factory.mktemp("ckplus")
    WRITERS["ckplus"](folder / "data")
    jobs = {f"protocol.fold-{fold}": ["data=ckplus", "protocol=kfold", f"protocol.fold={fold}"] for fold in (0, 1)}
    for name, words in jobs.items():
        run_experiment(
            composed(*WORDS, *words, f"data.root={folder / 'data'}", f"data.cache={cache}"), folder / "sweep" / name
        )
        (folder / "sweep" / name / "outcome.json").write_text(json.dumps({"outcome": "run", "error": None}))
    (folder / "sweep" / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    return folder / "sweep"


def by_hand(predictions: Path) -> pd.DataFrame:
    """Label and prediction of each sequence: the names of CK+'s files begin with person and sequence."""
    table = pd.read_csv(predictions)
    names = [name for name in table.columns if name not in ("index", "item", "subject", "label", "predicted")]
    table["sequence"] = table["item"].str.extract(r"(S\d+_\d+)_\d+\.png$")[0]
    assert (table.groupby("sequence").size() == 3).all()
    means = table.groupby(["sequence", "label"])[names].mean()
    return means.idxmax(axis=1).rename("predicted").reset_index()


def test_a_run_and_its_sweep_score_sequences(sweep: Path) -> None:
    found = []
    for job in sorted(sweep.glob("protocol*")):
        test = json.loads((job / "results.json").read_text())["metrics"]["test"]
        videos = by_hand(job / "predictions.csv")
        right = videos["label"] == videos["predicted"]
        assert test["sequence_acc"] == pytest.approx(right.mean())
        assert test["sequence_mean_acc"] == pytest.approx(right.groupby(videos["label"]).mean().mean())
        found.append(videos)
    both = pd.concat(found)
    record = aggregate(sweep)
    (group,) = record["groups"]
    right = both["label"] == both["predicted"]
    assert group["sequences"] == len(both) == 42
    assert group["pooled"]["test/sequence_acc"] == pytest.approx(right.mean())
    assert f"By sequence, 42 predictions: accuracy {100 * right.mean():.2f} %" in markdown(record, "")


def test_the_report_has_a_column_of_sequences(sweep: Path) -> None:
    (bench,) = make_benches(make_groups(read_runs([sweep])))
    table = results_table(bench)
    cell = table.rows[0].cells[table.columns.index("accuracy of sequences, %")]
    assert cell.value == pytest.approx(aggregate(sweep)["groups"][0]["mean"]["test/sequence_acc"])
