"""``python -m fer.reporting.results RUNS...``: what trainings measured, from run folders to docs/results and the pages.

RUNS are folders, such as a sweep's. Every finished training under them, and every evaluation of one by
``python -m fer.evaluate run=... tta=...`` on its own test part, goes to docs/results/measured/<data>.json: a row per
setting, in it a repeat per seed and fold, with the confusion matrix of the test for each choice of views. Rows and
repeats of earlier calls stay. Of trainings with one setting, seed and fold the newest counts, and of those whose
setting stands for other values than the newest's none: by the time of their results, those of earlier calls being older
than those of this one. Then the pages are written anew; without RUNS only that.
"""

import functools
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fer.errors import UserError
from fer.reporting.collect import LOADER, finished_runs, read_answers, settings_of
from fer.reporting.settings import setting_of
from fer.reporting.summaries import RECORDS, Repeat, Result, load_results, packed, save_results
from fer.runs import AGAIN, RunFolder, read_json


def record(runs: Sequence[Path], before: Iterable[Result]) -> list[Result]:
    """Rows with the finished runs of folders among them.

    Raises:
        UserError: there is none, or one was written by code that did not note its machine.
    """
    read = [(folder, read_json(folder.results)) for folder in finished_runs(runs)]
    rows = {(row.data, row.setting): row for row in before}
    trained: dict[tuple[str, str], list[tuple[Path, Result]]] = defaultdict(list)
    for folder, results in read:
        if "evaluation" not in results:
            row = _row(folder, results)
            trained[row.data, row.setting].append((folder.path, row))
    for key, found in trained.items():
        rows[key] = _joined(rows.get(key), found)
    seen = len(trained)
    for folder, results in read:
        networks = results.get("evaluation", {}).get("networks", [])
        if len(networks) == 1 and any(stamp.startswith(AGAIN) for stamp in results["stamps"]):
            seen += _add_test(rows, networks[0], folder, results)
    if not seen:
        raise UserError(f"{_named(runs)} holds no finished training, nor an evaluation of one that is in {RECORDS}")
    return list(rows.values())


def _named(runs: Sequence[Path]) -> str:
    return f"runs={','.join(map(str, runs))}"


def _row(folder: RunFolder, results: dict[str, Any]) -> Result:
    if "machine" not in results:
        raise UserError(f"{folder.results} does not say on which machine it ran: it is of older code, train it anew")
    settings = settings_of(yaml.load(folder.config.read_text(), LOADER))
    # How many views a test averages stands by each test.
    text = str(sorted((name, str(value)) for name, value in settings.items() if name != "data.tta"))
    text += results["weights"]
    val = results["metrics"]["val"]
    answers = read_answers(folder.predictions, results["classes"])
    several = len(np.unique(answers.person)) < len(answers.person)
    repeat = Repeat(
        seed=results["seed"],
        fold=results["fold"],
        job_key=results["job_key"],
        commit=str(results["git_commit"]),
        hardware=hardware_of(results),
        core_minutes=round(results["cpu_seconds"] / 60, 1),
        epochs=results["epochs"],
        val_acc=val["acc"],
        val_mean_acc=val["mean_acc"],
        tests={results["tta"]: _rows_of(results)},
        images=hashlib.sha256(answers.image.tobytes()).hexdigest()[:12],
        people=packed(answers.person.astype(np.uint32)) if several else None,
        hits={results["tta"]: packed(np.packbits(answers.right))},
    )
    return Result(
        setting=setting_of(results["command"], results["weights"]),
        settings=hashlib.sha256(text.encode()).hexdigest()[:12],
        model=results["model"],
        data=results["data"],
        classes=results["classes"],
        n=results["n"],
        selected_on=results["selected_on"],
        stamps=results["stamps"],
        rotating=results["protocol"].get("held_out") == "val",
        weights=results["weights"],
        parameters=results["parameters"],
        repeats=[repeat],
    )


def _rows_of(results: dict[str, Any]) -> list[str]:
    return [" ".join(map(str, row)) for row in results["confusion"]["test"]]


def hardware_of(results: dict[str, Any]) -> str:
    """What a run was computed on, in words."""
    where = results["machine"]
    if where["accelerators"]:
        return ", ".join(where["accelerators"])
    threads = results["threads"]
    return f"{where['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def _joined(before: Result | None, found: Sequence[tuple[Path, Result]]) -> Result:
    """The row recorded before and runs of its setting, oldest first, as far as they have the values of the newest."""
    path, newest = found[-1]
    alike = [row for _, row in found if row.settings == newest.settings]
    other = [f"{older} ({_repeats(row)})" for older, row in found if row.settings != newest.settings]
    if before is not None and before.settings == newest.settings:
        alike.insert(0, before)
    elif before is not None:
        other.insert(0, f"what was recorded before ({_repeats(before)})")
    if other:
        print(f"{newest.setting}: dropped {', '.join(other)}, since {path} is newer and has other values behind it")
    return functools.reduce(_merged, alike)


def _repeats(row: Result) -> str:
    names = [f"seed {one.seed}" + ("" if one.fold is None else f" fold {one.fold}") for one in row.repeats]
    return f"{', '.join(names)} of commit {', '.join(dict.fromkeys(one.commit for one in row.repeats))}"


def _merged(old: Result, new: Result) -> Result:
    """The older repeats with the new one, which keeps the tests of the same training by other views."""
    (repeat,) = new.repeats
    kept = [one for one in old.repeats if (one.seed, one.fold) != (repeat.seed, repeat.fold)]
    same = next((one for one in old.repeats if one.job_key == repeat.job_key), repeat)
    repeat = replace(repeat, tests=same.tests | repeat.tests, hits=same.hits | repeat.hits)
    return replace(new, repeats=sorted([*kept, repeat], key=lambda one: (one.seed, one.fold or 0)))


def _add_test(
    rows: dict[tuple[str, str], Result], network: dict[str, Any], folder: RunFolder, results: dict[str, Any]
) -> bool:
    """Add an evaluation's test to its training; whether there is that training."""
    for key, row in rows.items():
        for place, one in enumerate(row.repeats):
            if one.job_key == network["job_key"]:
                answers = read_answers(folder.predictions, results["classes"])
                repeats = list(row.repeats)
                repeats[place] = replace(
                    one,
                    tests=one.tests | {results["tta"]: _rows_of(results)},
                    hits=one.hits | {results["tta"]: packed(np.packbits(answers.right))},
                )
                rows[key] = replace(row, repeats=repeats)
                return True
    return False


def update(folders: list[Path]) -> None:
    """Record the runs under folders."""
    save_results(record(folders, load_results()))


if __name__ == "__main__":
    from fer.reporting.manual import from_runs  # which reads this module

    from_runs(__doc__, update)
