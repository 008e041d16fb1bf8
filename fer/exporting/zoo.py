"""A zoo: of all runs under a folder the best of each data set and network, exported side by side."""

from pathlib import Path
from typing import Any

from fer.errors import UserError
from fer.reporting.collect import find_runs, read_answers
from fer.reporting.statistics import wilson_half_width
from fer.reporting.tables import Row, Table, number, percent, words
from fer.runs import DROPPED, RunFolder, read_json, write_text


def best_runs(root: Path) -> dict[str, Path]:
    """The run that was best on its validation part, by name (``fer2013-cbam_resnet``).

    What counts is a finished training on the official parts whose epoch the validation part chose and whose figures
    carry no stamp but that leaked copies were left out. The test part has no say.

    Raises:
        UserError: there is no such run under ``root``.
    """
    best: dict[str, tuple[float, Path]] = {}
    for path in find_runs([root]):
        results = read_json(RunFolder(path).results) if RunFolder(path).results.exists() else {}
        if not results or not _counts(results):
            continue
        score = results["metrics"]["val"][results["monitor"]]
        if score > best.get(results["name"], (-1.0, path))[0]:
            best[results["name"]] = (score, path)
    if not best:
        raise UserError(
            f"run={root} holds no finished training on official parts, chosen on validation and without stamps, so "
            "there is nothing for a zoo"
        )
    return {name: path for name, (_, path) in sorted(best.items())}


def _counts(results: dict[str, Any]) -> bool:
    honest = results["selected_on"] == "val" and all(stamp.endswith(DROPPED) for stamp in results["stamps"])
    return "evaluation" not in results and honest and results["fold"] is None


def write_index(zoo: Path, runs: dict[str, Path]) -> Path:
    """Write the zoo's ``README.md``: what each package reached on its test part."""
    rows = []
    for name, path in runs.items():
        results = read_json(RunFolder(path).results)
        answers = read_answers(RunFolder(path).predictions, results["classes"])
        test, n = results["metrics"]["test"], results["n"]["test"]
        cells = [
            words(name),
            percent(test["acc"]),
            percent(wilson_half_width(test["acc"], answers.effective_images)),
            percent(test["mean_acc"]),
        ]
        cells += [number(n, 0), words(results["tta"]), number(results["seed"], 0), number(results["parameters"], 0)]
        rows.append(Row([*cells, words(str(results["git_commit"])), words(results["command"])], {}, results["stamps"]))
    columns = ["package", "accuracy, %", "± by images", "mean class, %", "n", "views", "seed", "parameters", "commit"]
    note = (
        "Of all runs of a data set and network the one best on validation; its figures on the test part, with "
        "half of Wilson's 95 % interval, images of one person counted for what they tell together. "
        "Each folder has a card."
    )
    path = zoo / "README.md"
    write_text(path, Table("Networks", [*columns, "command"], rows, note).markdown())
    return path
