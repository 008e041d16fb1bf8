"""``python -m fer.reporting.leaks RUNS...``: what two common mistakes are worth, from run folders to docs/leaks.md.

RUNS are folders with evaluations by ``python -m fer.evaluate run=... orders=5`` beside the trainings they test
(attention among the images of a batch), with pairs of trainings of ``sweep=selection`` (the epoch chosen on the test
part), or both. Their figures go to docs/results/leaks.json, in the place of earlier ones of the same setting and seed,
and from there to the page; without RUNS the page alone is written anew.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from fer.config import CONF
from fer.errors import UserError
from fer.reporting.collect import finished_runs
from fer.reporting.results import hardware_of
from fer.reporting.settings import setting_of
from fer.reporting.statistics import mean_interval
from fer.reporting.summaries import check_fields
from fer.reporting.tables import Row, Table, interval, mean_std, number, percent, words
from fer.runs import RunFolder, read_json, write_json

RECORD = CONF.parent / "docs" / "results" / "leaks.json"
METRICS = ("acc", "mean_acc")
SELECTED = ("protocol.select_on=", "protocol=paper")  # words by which the twins differ


@dataclass(frozen=True, kw_only=True)
class Order:
    """One network's test in several orders, see `fer.evaluation.orders.orders_record`.

    Attributes:
        setting, data, seed, commit, hardware, stamps: of the training.
        n: test images.
        batch: of the test.
        by_class: accuracy, sorted by class.
        drawn: accuracy in each drawn order.
        changed: images not answered alike in all orders.
        difference, low, high: by class minus drawn, and its 95 % interval over images.
    """

    setting: str
    data: str
    seed: int
    commit: str
    hardware: str
    stamps: list[str]
    n: int
    batch: int
    by_class: float
    drawn: list[float]
    changed: int
    difference: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The epochs of one training, seen by the validation and by the test part.

    Attributes:
        setting, data, seed, commit, hardware: of the training.
        n_val, n_test: images.
        core_minutes: of both runs.
        val, test: ``acc`` and ``mean_acc`` of every epoch, one view of each image.
    """

    setting: str
    data: str
    seed: int
    commit: str
    hardware: str
    n_val: int
    n_test: int
    core_minutes: float
    val: dict[str, list[float]]
    test: dict[str, list[float]]

    def reported(self, metric: str) -> tuple[float, float]:
        """The test figure of the epoch best on validation, and of the epoch best on the test part itself."""
        test = self.test[metric]
        return test[int(np.argmax(self.val[metric]))], max(test)


Kind = TypeVar("Kind", bound=Order | Selection)


# -- files --------------------------------------------------------------------------------------------------------


def load(path: Path = RECORD) -> tuple[list[Order], list[Selection]]:
    """Both lists of a record; empty where there is none yet.

    Raises:
        UserError: an entry lacks a field or has one too many.
    """
    content = read_json(path) if path.exists() else {"orders": [], "selection": []}
    for name, kind in (("orders", Order), ("selection", Selection)):
        for place, entry in enumerate(content[name], 1):
            check_fields(kind, entry, f"{path}, {name} {place}")
    return [Order(**one) for one in content["orders"]], [Selection(**one) for one in content["selection"]]


def record(
    runs: Sequence[Path], orders: Iterable[Order], selections: Iterable[Selection]
) -> tuple[list[Order], list[Selection]]:
    """Both lists with what the runs under folders say.

    Raises:
        UserError: they say nothing, or the runs of a pair are not the same training.
    """
    read = [(folder, read_json(folder.results)) for folder in finished_runs(runs)]
    trained = {results["job_key"]: results for _, results in read if "evaluation" not in results}
    new_orders = [
        _order(trained, results, folder)
        for folder, results in read
        if (results.get("evaluation") or {}).get("orders") is not None
    ]
    twins: dict[tuple[str, str, int], dict[str, RunFolder]] = defaultdict(dict)
    for folder, results in read:
        if "evaluation" not in results and results["fold"] is None:
            typed = setting_of(results["command"], results["weights"]).split()
            setting = " ".join(word for word in typed if not word.startswith(SELECTED))
            twins[setting, results["data"], results["seed"]][results["selected_on"]] = folder
    new_selections = [
        _selection(setting, pair["val"], pair["test"]) for (setting, _, _), pair in twins.items() if len(pair) == 2
    ]
    if not new_orders and not new_selections:
        where = ", ".join(map(str, runs))
        raise UserError(
            f"{where}: neither evaluations with orders= nor a training twice, with protocol.select_on=val and with "
            "test; docs/leaks.md has the commands"
        )
    return _joined(orders, new_orders), _joined(selections, new_selections)


def _joined(old: Iterable[Kind], new: Iterable[Kind]) -> list[Kind]:
    by_name = {(one.data, one.setting, one.seed): one for one in [*old, *new]}
    return [by_name[name] for name in sorted(by_name)]


def _order(trained: dict[str, Any], results: dict[str, Any], folder: RunFolder) -> Order:
    network, found = results["evaluation"]["networks"][0], results["evaluation"]["orders"]
    training = trained.get(network["job_key"])
    if training is None:
        raise UserError(f"{folder.path} tests a training that is not among these folders: give those of both")
    return Order(
        setting=setting_of(training["command"], training["weights"]),
        data=training["data"],
        seed=training["seed"],
        commit=str(training["git_commit"]),
        hardware=hardware_of(training),
        stamps=training["stamps"],
        n=found["n"],
        batch=found["batch"],
        by_class=found["by_class"]["acc"],
        drawn=[one["acc"] for one in found["drawn"]],
        changed=found["changed"],
        **{key: found[key] for key in ("difference", "low", "high")},
    )


def _selection(setting: str, honest: RunFolder, flattering: RunFolder) -> Selection:
    by_val, by_test = (read_json(folder.results) for folder in (honest, flattering))
    val, test = (pd.read_csv(folder.path / "metrics.csv") for folder in (honest, flattering))
    if len(val) != len(test) or not np.allclose(val["train/loss"], test["train/loss"], rtol=1e-6):
        raise UserError(
            f"{honest.path} and {flattering.path} are not the same training: their training losses differ; repeat both "
            "with trainer.threads=1 from one commit"
        )
    return Selection(
        setting=setting,
        data=by_val["data"],
        seed=by_val["seed"],
        commit=str(by_val["git_commit"]),
        hardware=hardware_of(by_val),
        n_val=by_val["n"]["val"],
        n_test=by_val["n"]["test"],
        core_minutes=round((by_val["cpu_seconds"] + by_test["cpu_seconds"]) / 60, 1),
        val={metric: val[f"val/{metric}"].round(6).tolist() for metric in METRICS},
        test={metric: test[f"val/{metric}"].round(6).tolist() for metric in METRICS},
    )


# -- tables -------------------------------------------------------------------------------------------------------


def orders_table(orders: Sequence[Order]) -> Table:
    """Accuracy sorted by class beside drawn orders, a line per network."""
    rows = []
    for one in orders:
        cells = [words(one.data), words(one.setting), number(one.seed, 0), number(one.n, 0), number(one.batch, 0)]
        cells += [percent(one.by_class), mean_std(*mean_interval(one.drawn)[:2]), number(len(one.drawn), 0)]
        cells += [percent(one.difference), interval(one.low, one.high), number(one.changed, 0)]
        rows.append(Row([*cells, words(one.hardware), words(one.commit)], stamps=one.stamps))
    columns = ["data", "setting", "seed", "n", "batch", "sorted by class, %", "drawn orders, %", "orders"]
    columns += ["points", "95 % over images", "answers that change", "hardware", "commit"]
    return Table("", columns, rows, left=2)


def selection_table(selections: Sequence[Selection]) -> Table:
    """The test figure by either choice of the epoch, mean over seeds, and what choosing on the test part adds."""
    rows = []
    for data, setting in dict.fromkeys((one.data, one.setting) for one in selections):
        alike = [one for one in selections if (one.data, one.setting) == (data, setting)]
        for metric, name in zip(METRICS, ("accuracy", "mean class accuracy"), strict=True):
            honest, flattering = zip(*(one.reported(metric) for one in alike), strict=True)
            gain = mean_interval([b - a for a, b in zip(honest, flattering, strict=True)])
            epochs = sorted({len(one.val[metric]) for one in alike})
            cells = [words(data), words(setting), words(name), words(", ".join(str(one.seed) for one in alike))]
            cells += [words(", ".join(map(str, epochs))), number(alike[0].n_val, 0), number(alike[0].n_test, 0)]
            cells += [mean_std(*mean_interval(values)[:2]) for values in (honest, flattering)]
            cells += [percent(gain[0]), interval(*gain[2:]), number(sum(one.core_minutes for one in alike), 1)]
            cells += [words("; ".join(sorted({getattr(one, key) for one in alike}))) for key in ("hardware", "commit")]
            rows.append(Row(cells))
    columns = ["data", "setting", "of", "seeds", "epochs", "n validation", "n test", "chosen on validation, %"]
    columns += ["chosen on the test part, %", "points", "95 % over seeds", "core-minutes", "hardware", "commit"]
    return Table("", columns, rows, left=3)


def section(name: str, path: Path = RECORD) -> str:
    """``orders`` or ``selection`` as Markdown."""
    orders, selections = load(path)
    one = orders_table(orders) if name == "orders" else selection_table(selections)
    return one.body() if one.rows else "Not measured yet."


def update(folders: list[Path]) -> None:
    """Record the runs under folders."""
    orders, selections = record(folders, *load())
    write_json(RECORD, {"orders": [*map(asdict, orders)], "selection": [*map(asdict, selections)]})


if __name__ == "__main__":
    from fer.reporting.manual import from_runs  # which reads this module

    from_runs(__doc__, update)
