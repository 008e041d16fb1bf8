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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fer.config import CONF
from fer.errors import UserError
from fer.metrics import Array, scores
from fer.reporting.collect import LOADER, finished_runs, read_answers, settings_of
from fer.reporting.settings import setting_of
from fer.reporting.statistics import mean_interval, repeated_over, repetitions
from fer.runs import AGAIN, RunFolder, read_json, write_json

RECORDS = CONF.parent / "docs" / "results" / "measured"
TRAIN = "python -m fer.train"
VIEWS = ("none", "flip", "five_crop", "ten_crop")


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """One training.

    Attributes:
        seed: of everything but the split.
        fold: the fold held out, None without folds.
        job_key: of its run folder; evaluations are matched by it.
        commit: of the code, with ``+`` where files had changed.
        hardware: what it ran on.
        core_minutes: CPU time of training and test.
        epochs: how many were trained.
        val_acc, val_mean_acc: scores of the chosen epoch where it was chosen.
        tests: by views, the test's confusion matrix, a row of counts per label.
        effective_images: by views, `fer.metrics.effective_images` of the test.
    """

    seed: int
    fold: int | None
    job_key: str
    commit: str
    hardware: str
    core_minutes: float
    epochs: int
    val_acc: float
    val_mean_acc: float
    tests: dict[str, list[str]]
    effective_images: dict[str, float]

    def confusion(self, views: str) -> Array:
        """(K, K) counts, rows are labels."""
        return np.array([row.split() for row in self.tests[views]], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Result:
    """A row: trainings that differ in seed and fold alone.

    Attributes:
        setting: the command's words that made the figures, `TRAIN` before them.
        settings: digest of all values of its config but seed and fold, and of the weights it began with.
        model, data: public names.
        classes: K names.
        n: images of each part, of the first repeat.
        selected_on: ``val`` or ``test``.
        stamps: what must stand beside every figure.
        rotating: whether every fold tests the same images (``protocol.held_out=val``), not a part of its own.
        weights: where the initial ones came from.
        parameters: how many there are.
        repeats: by seed and fold.
    """

    setting: str
    settings: str
    model: str
    data: str
    classes: list[str]
    n: dict[str, int]
    selected_on: str
    stamps: list[str]
    rotating: bool
    weights: str
    parameters: int
    repeats: list[Repeat]

    @property
    def views(self) -> list[str]:
        """The choices of views every repeat was tested with."""
        return [views for views in VIEWS if all(views in one.tests for one in self.repeats)]

    @property
    def folds(self) -> list[int | None]:
        """The folds held out, ``[None]`` without folds."""
        return sorted({one.fold for one in self.repeats}, key=lambda fold: -1 if fold is None else fold)

    @property
    def disjoint(self) -> bool:
        """Whether there are several folds, each with a test part of its own."""
        return len(self.folds) > 1 and not self.rotating

    @property
    def over(self) -> str:
        """``folds`` or ``seeds``: what `interval` is over."""
        return repeated_over((one.seed, one.fold) for one in self.repeats)

    @property
    def uneven(self) -> str:
        """A sentence where not every seed has every fold, which moves the mean; empty otherwise."""
        seeds = {one.seed: {other.fold for other in self.repeats if other.seed == one.seed} for one in self.repeats}
        lacking = {seed: [str(fold) for fold in self.folds if fold not in have] for seed, have in seeds.items()}
        short = [f"seed {seed} lacks fold {', '.join(folds)}" for seed, folds in sorted(lacking.items()) if folds]
        return f"the seeds have different folds: {'; '.join(short)}" if short else ""

    def confusion(self, views: str) -> Array:
        """(K, K) counts of every test image once: mean over a fold's seeds, summed over folds or, if rotating, mean."""
        counts = [
            np.mean([one.confusion(views) for one in self.repeats if one.fold == fold], axis=0) for fold in self.folds
        ]
        total: Array = np.mean(counts, axis=0) if self.rotating else np.sum(counts, axis=0)
        return total

    def effective_images(self, views: str) -> float:
        """`fer.metrics.effective_images` of what `confusion` counts, people standing in one fold only."""
        found = [
            np.mean([one.effective_images[views] for one in self.repeats if one.fold == fold]) for fold in self.folds
        ]
        return float(np.mean(found) if self.rotating else np.sum(found))

    def values(self, views: str, metric: str) -> dict[tuple[int | None, int | None], float]:
        """``acc`` or ``mean_acc`` of the test of every repeat, by seed and fold."""
        return {(one.seed, one.fold): scores(one.confusion(views), self.classes)[metric] for one in self.repeats}

    def interval(self, views: str, metric: str) -> tuple[float, float, float, float]:
        """Mean, standard deviation and 95 % interval over folds, the seeds of each averaged, or else over seeds."""
        return mean_interval(repetitions(self.values(views, metric)))


# -- files --------------------------------------------------------------------------------------------------------


def load_results(folder: Path = RECORDS) -> list[Result]:
    """Every row of a folder of summaries.

    Raises:
        UserError: one lacks a field, has one too many, or a test that does not count its images.
    """
    return [row for path in sorted(folder.glob("*.json")) for row in _load(path)]


def _load(path: Path) -> list[Result]:
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise UserError(f"{path} has no list of rows: expected what python -m fer.reporting.results writes")
    return [_result(row, f"{path}, row {place}") for place, row in enumerate(rows, 1)]


def _result(entry: Any, where: str) -> Result:
    check_fields(Result, entry, where)
    repeats = []
    for place, one in enumerate(entry["repeats"], 1):
        inside = f"{where}, repeat {place}"
        check_fields(Repeat, one, inside)
        repeats.append(Repeat(**one))
        for views in repeats[-1].tests:
            counted = int(repeats[-1].confusion(views).sum())
            if (one["fold"] is None or entry["rotating"]) and counted != entry["n"]["test"]:
                raise UserError(f"{inside}: its test with views {views} counts {counted} images, not n.test")
    if not repeats:
        raise UserError(f"{where} has no repeats: a row stands for at least one training")
    return Result(**{**entry, "repeats": repeats})


def check_fields(kind: type, entry: Any, where: str) -> None:
    """Refuse an entry that has not all fields of a dataclass and no other, by a UserError.

    Args:
        kind: the dataclass.
        entry: of a JSON file.
        where: words for the message.
    """
    known = [field.name for field in fields(kind)]
    if not isinstance(entry, dict) or (lacking := [name for name in known if name not in entry]):
        lacks = lacking[0] if isinstance(entry, dict) else "everything"
        raise UserError(f"{where} lacks {lacks}: expected all of {', '.join(known)}")
    if unknown := [name for name in entry if name not in known]:
        raise UserError(f"{where} has {unknown[0]}, expected nothing but {', '.join(known)}")


def save_results(results: Sequence[Result], folder: Path = RECORDS) -> None:
    """Write rows to ``<data>.json``, in the order of their settings."""
    folder.mkdir(parents=True, exist_ok=True)
    for data in sorted({row.data for row in results}):
        rows = sorted((row for row in results if row.data == data), key=lambda row: (row.model, row.setting))
        write_json(folder / f"{data}.json", {"rows": [asdict(row) for row in rows]})


# -- from run folders ---------------------------------------------------------------------------------------------


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
        effective_images={results["tta"]: _effective_images(folder, results)},
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


def _effective_images(folder: RunFolder, results: dict[str, Any]) -> float:
    return round(read_answers(folder.predictions, results["classes"]).effective_images, 1)


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
    tests, effective = same.tests | repeat.tests, same.effective_images | repeat.effective_images
    repeat = replace(repeat, tests=tests, effective_images=effective)
    return replace(new, repeats=sorted([*kept, repeat], key=lambda one: (one.seed, one.fold or 0)))


def _add_test(
    rows: dict[tuple[str, str], Result], network: dict[str, Any], folder: RunFolder, results: dict[str, Any]
) -> bool:
    """Add an evaluation's test to its training; whether there is that training."""
    for key, row in rows.items():
        for place, one in enumerate(row.repeats):
            if one.job_key == network["job_key"]:
                repeats = list(row.repeats)
                repeats[place] = replace(
                    one,
                    tests=one.tests | {results["tta"]: _rows_of(results)},
                    effective_images=one.effective_images | {results["tta"]: _effective_images(folder, results)},
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
