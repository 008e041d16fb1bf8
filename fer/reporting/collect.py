"""Reading run folders: what each run is, how it ended, and its test predictions in a few bytes per image."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from fer.errors import UserError
from fer.metrics import Array, calibration_bins, confusion_counts
from fer.reporting.checks import CONFIG, RESULTS, check
from fer.reporting.statistics import effective_images
from fer.runs import RunFolder, read_json

BINS = 15  # of the reliability diagram, as in the results' ECE
WRONG_KEPT = 64  # most confidently wrong images kept of each run
# Of the config: what a run is made of, everything else but `start_from` reaches these; and what fer.evaluate made of a
# trained one.
SECTIONS = ("data", "model", "mix", "trainer", "evaluation")
# Leaves that change where a run stands or how it is watched, not what it measures; `seed` and `fold` are the axes that
# runs of one group differ in.
NOT_SETTINGS = (
    *("seed", "fold", "root", "cache", "num_workers", "accelerator", "threads", "enable_progress_bar"),
    *("enable_model_summary", "checkpoint_minutes", "checkpoint_steps", "log_every_n_steps"),
)
PATHS = ("/", "~", "./", "../")  # begin a path; `.5` is a number
CHECKSUM = "sha256:"
DIGITS = 12  # of a checksum, where it is shown
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Answers:
    """Test predictions of one run, images in the order of their hashes.

    Attributes:
        image: (n,) uint64 hash of each image's item, ascending; the item is what people look an image up by.
        label: (n,) class indices.
        predicted: (n,) class indices.
        person: (n,) uint64 hash of who each image shows, of the image itself where nobody is known.
        confidence: (n,) float32 probability of the predicted class.
        bins: (BINS, 3) calibration bins, see `fer.metrics.calibration_bins`.
        wrong: the most confidently wrong images: hash, index, item, label, predicted, confidence.
    """

    image: Array
    label: Array
    predicted: Array
    person: Array
    confidence: Array
    bins: Array
    wrong: pd.DataFrame

    @property
    def right(self) -> Array:
        """(n,) bool, whether each image was named right."""
        right: Array = self.label == self.predicted
        return right

    @property
    def effective_images(self) -> float:
        """See `fer.reporting.statistics.effective_images`."""
        return effective_images(self.right, self.person)


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        path: the folder.
        status: ``done``, ``failed``, ``interrupted``, ``running``, or ``damaged`` when its files cannot be believed.
        error: why it failed or is damaged, empty otherwise.
        config: the resolved config; empty when it cannot be read.
        settings: `SECTIONS` of the config as dotted names, without `NOT_SETTINGS`.
        results: ``results.json`` of a finished run, else empty.
        answers: predictions of a finished run.
    """

    path: Path
    status: str
    error: str
    config: dict[str, Any]
    settings: dict[str, Any]
    results: dict[str, Any]
    answers: Answers | None

    @property
    def model(self) -> str:
        """The model's public name."""
        return str(self.results.get("model") or self.config.get("model_name") or "unknown")

    @property
    def data(self) -> str:
        """The data set's public name."""
        return str(self.results.get("data") or self.config.get("data_name") or "unknown")

    @property
    def protocol(self) -> str:
        """The protocol in a few words: ``kfold, 5 folds``."""
        options = self.config.get("protocol") or {}
        name = self.config.get("protocol_name") or str(options.get("_target_", "unknown")).rpartition(".")[2].lower()
        words = [str(name)]
        words += [f"{options['folds']} folds"] if options.get("folds") is not None else []
        words += ["official test, rotating validation"] if options.get("held_out") == "val" else []
        words += ["selected on test"] if options.get("select_on") == "test" and name != "paper" else []
        return ", ".join(words)

    @property
    def seed(self) -> int | None:
        """The training seed."""
        return self.config.get("seed")

    @property
    def fold(self) -> int | None:
        """The fold, None where the protocol has none."""
        return (self.config.get("protocol") or {}).get("fold")

    @property
    def stamps(self) -> tuple[str, ...]:
        """Sentences that stand beside every figure of this run."""
        stamps = tuple(map(str, self.results.get("stamps", ())))
        part = self.results.get("selected_on", "val")
        said = part == "val" or any("selected_on" in stamp for stamp in stamps)
        return stamps if said else (f"selected_on: {part}", *stamps)

    def curves(self) -> pd.DataFrame:
        """``metrics.csv``, a row per epoch; empty where there is none, NaN where a cell holds no finite number."""
        try:
            table: pd.DataFrame = pd.read_csv(self.path / "metrics.csv", dtype=str)
            table = table.apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan)
            return table.groupby("epoch", as_index=False).last()
        except (OSError, ValueError, KeyError):  # KeyError: it has no epochs
            return pd.DataFrame()


def find_runs(roots: Sequence[Path]) -> list[Path]:
    """Every run folder at or under the roots, each once, in order of their names.

    Raises:
        UserError: a root is no folder, or there is no run under any.
    """
    found: dict[Path, None] = {}
    for root in roots:
        if not root.is_dir():
            raise UserError(f"runs={root}: no such folder; expected one under which python -m fer.train wrote runs")
        found |= dict.fromkeys(_walk(root.resolve()))
    if not found:
        raise UserError(
            f"runs={','.join(map(str, roots))}: no run folder (one with a status.json) there; "
            "train first: python -m fer.train"
        )
    return sorted(found)


def finished_runs(roots: Sequence[Path]) -> list[RunFolder]:
    """Every run folder with results at or under the roots, the oldest first, so that of several the newest is the last.

    Raises:
        UserError: as `find_runs`.
    """
    return sorted((folder for folder in map(RunFolder, find_runs(roots)) if folder.results.exists()), key=finished_at)


def finished_at(folder: RunFolder) -> float:
    """When a run finished, in seconds: the time of its results."""
    return folder.results.stat().st_mtime


def _walk(root: Path) -> Iterator[Path]:
    for folder, inner, files in os.walk(root):
        if "pretraining.json" in files:  # weights, no classifier: nothing to report on
            inner.clear()
        elif "status.json" in files or "results.json" in files:
            yield Path(folder)
            inner.clear()
        inner[:] = [name for name in inner if not name.startswith(".")]


def never_started(roots: Sequence[Path]) -> list[tuple[Path, str, str]]:
    """Every job that a sweep at or under the roots planned and that left no run folder: folder, status and reason."""
    out = []
    for root in roots:
        for plan in sorted(root.resolve().rglob("sweep.json")):
            for name, words in (dict(read_json(plan)).get("jobs") or {}).items():
                folder = RunFolder(plan.parent / name)
                if folder.status_file.exists():
                    continue
                error = read_json(folder.outcome)["error"] if folder.outcome.exists() else None
                planned = f"planned by a sweep, never started: {' '.join(map(str, words))}"
                out.append((folder.path, "failed" if error else "missing", str(error or planned)))
    return out


def flatten(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every leaf of a plain container; lists count as leaves unless they hold containers."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from flatten(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list) and any(isinstance(value, dict) for value in node):
        for place, value in enumerate(node):
            yield from flatten(value, f"{name}.{place}")
    else:
        yield name, node


def without_folder(path: str) -> str:
    """The name of a file given by its path; any other text as it is. Where a file lies is not what it holds."""
    return Path(path).name if path.startswith(PATHS) else path


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """What two runs must share to be averaged, as dotted names; lists as text, so that values can be hashed.

    Files go by their names and `start_from` by its checksum; which weights the files held, ``results.json`` says.
    """
    leaves = flatten({key: config[key] for key in SECTIONS if key in config})
    found = {
        name: without_folder(value) if isinstance(value, str) else str(value) if isinstance(value, list) else value
        for name, value in leaves
        if name.rpartition(".")[2] not in NOT_SETTINGS
    }
    if config.get("start_from"):
        folder, _, checksum = str(config["start_from"]).partition(f"@{CHECKSUM}")
        found["start_from"] = short_checksums(f"{CHECKSUM}{checksum}") if checksum else Path(folder).name
    return found


def short_checksums(text: str) -> str:
    """A text whose checksums have `DIGITS` hexadecimal digits, for people."""
    return re.sub(rf"({CHECKSUM}[0-9a-f]{{{DIGITS}}})[0-9a-f]+", r"\1", text)


def read_run(path: Path) -> Run:
    """Read one run folder; what cannot be read makes the run ``damaged``, never the report fail."""
    folder = RunFolder(path)
    config: dict[str, Any] = {}
    try:
        status = folder.status()
        if folder.config.exists():
            content = yaml.load(folder.config.read_text(), LOADER)
            check(folder.config, content, CONFIG)
            config = content
        state, error = str(status.get("status", "done")), str(status.get("error") or "")
        if state != "done" or not folder.results.exists():
            state = state if state != "done" else "damaged"
            return Run(path, state, error or _unfinished(state), config, settings_of(config), {}, None)
        results = read_json(folder.results)
        check(folder.results, results, RESULTS)
        answers = read_answers(folder.predictions, results["classes"])
        counts = confusion_counts(answers.label, answers.predicted, len(results["classes"]))
        if not np.array_equal(counts, results["confusion"]["test"]):
            raise UserError(f"{folder.predictions} and {folder.results} do not tell the same test")
        if not config:
            raise UserError(f"{folder.config} is missing: without it nobody knows with which runs it belongs")
        return Run(path, "done", "", config, settings_of(config), results, answers)
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return Run(path, "damaged", f"{kind}{error}", config, settings_of(config), {}, None)


def _unfinished(state: str) -> str:
    return {
        "damaged": "its status says done, but there is no results.json",
        "interrupted": "stopped; resume= goes on",
        "running": "still running, or killed; resume= goes on",
    }.get(state, "")


def read_answers(path: Path, classes: Sequence[str]) -> Answers:
    """Read ``predictions.csv``.

    Args:
        path: the file.
        classes: names of its probability columns, in the order of the indices to give.

    Raises:
        UserError: a column is missing, or it holds a class that is none of ``classes``, an image twice, or something
            that is no probability.
    """
    text = ("item", "subject", "label", "predicted")
    table = pd.read_csv(path, dtype=dict.fromkeys(text, "str"), keep_default_na=False)
    lacking = [name for name in ("index", *text, *classes) if name not in table]
    if lacking:
        raise UserError(f"{path} has no column {lacking[0]}")
    index = {name: place for place, name in enumerate(classes)}
    label, predicted = (table[column].map(index).to_numpy(np.float64) for column in ("label", "predicted"))
    if np.isnan(label).any() or np.isnan(predicted).any():
        raise UserError(f"{path} names a class that is none of {', '.join(classes)}")
    probabilities = table[list(classes)].to_numpy(np.float64)
    if not (np.isfinite(probabilities).all() and (probabilities >= 0).all()):
        raise UserError(f"{path} holds something that is no probability")
    label, predicted = label.astype(np.int16), predicted.astype(np.int16)
    image = pd.util.hash_array(table["item"].to_numpy(object))
    order = np.argsort(image)
    if (np.diff(image[order]) == 0).any():
        raise UserError(f"{path} holds an image twice")
    person = pd.util.hash_array(table["subject"].where(table["subject"] != "", table["item"]).to_numpy(object))
    confidence = probabilities[np.arange(len(table)), predicted].astype(np.float32)
    wrong = np.flatnonzero(predicted != label)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:WRONG_KEPT]
    worst = table.iloc[wrong][["index", "item", "label", "predicted"]]
    return Answers(
        image=image[order],
        label=label[order],
        predicted=predicted[order],
        person=person[order],
        confidence=confidence[order],
        bins=calibration_bins(probabilities, label, BINS),
        wrong=worst.assign(image=image[wrong], confidence=confidence[wrong]),
    )


def read_runs(roots: Sequence[Path]) -> list[Run]:
    """Every run at or under the roots."""
    return [read_run(path) for path in find_runs(roots)]
