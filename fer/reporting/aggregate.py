"""The figures of a sweep: what its run folders say, per network, data and protocol, over folds and seeds.

    sweep.json + <job>/results.json, <job>/outcome.json  ->  aggregate.json, aggregate.md

Runs are of one group when their command lines differ in nothing but ``protocol.fold`` and ``seed``. Reads run folders
only, so it is the same for every launcher and can be repeated at any time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.markup import escape
from rich.table import Table

from fer.metrics import scores, sequence_scores
from fer.reporting.statistics import mean_interval, repeated_over, repetitions
from fer.reporting.tables import inert
from fer.runs import RunFolder, read_json

REPEATS = ("protocol.fold", "seed")  # what the runs of a group differ in
COLUMNS = {"group", "fresh", "sweep", "model", "data", "protocol"}  # words that have a column, or say nothing of a run
HEADLINES = {"test/acc": "accuracy", "test/mean_acc": "mean class accuracy", "test/macro_f1": "macro F1"}
POOLED = ("acc", "mean_acc", "macro_f1")
SEQUENCES = {"sequence_acc": "accuracy", "sequence_mean_acc": "mean class accuracy"}  # of videos, by their frames


@dataclass
class Job:
    """One job of a sweep as its folder shows it.

    Attributes:
        name: its folder below the sweep's.
        words: its overrides by key.
        results: ``results.json`` of a job that counts, else None.
        state: ``done``, ``failed``, ``interrupted`` or ``missing`` (never came to an end).
        error: why, for a failed one.
    """

    name: str
    words: dict[str, str]
    results: dict[str, Any] | None
    state: str
    error: str | None


def split_words(overrides: Sequence[str]) -> dict[str, str]:
    """``["model=vit", "+x=1"]`` -> ``{"model": "vit", "x": "1"}``; the later of two wins, as in Hydra."""
    pairs = (word.partition("=") for word in overrides)
    return {key.lstrip("+"): value for key, _, value in pairs}


def jobs_of(folder: Path) -> list[Job]:
    """Every job planned for a sweep, in the order of the plan; for a search, whose jobs are not planned, those found.

    Raises:
        UserError: a damaged JSON file.
    """
    plan: dict[str, list[str]] | None = read_json(folder / "sweep.json")["jobs"]
    if plan is None:
        found = sorted(path.parent for path in folder.rglob(RunFolder(folder).outcome.name))
        plan = {p.relative_to(folder).as_posix(): list(OmegaConf.load(p / ".hydra" / "overrides.yaml")) for p in found}
    return [_job(folder / name, name, overrides) for name, overrides in plan.items()]


def _job(path: Path, name: str, overrides: list[str]) -> Job:
    run = RunFolder(path)
    outcome = read_json(run.outcome) if run.outcome.exists() else {"outcome": "missing", "error": None}
    state = str(outcome["outcome"])
    # A refused job's folder may hold the whole results of older code or data: its outcome says that they do not count.
    if state in ("run", "resumed", "skipped") and run.results.exists():
        return Job(name, split_words(overrides), read_json(run.results), "done", None)
    return Job(name, split_words(overrides), None, state, outcome["error"])


@dataclass
class Group:
    """Jobs that repeat one setting; `record` says what they amount to."""

    setting: dict[str, str]
    jobs: list[Job] = field(default_factory=list)

    def refusal(self) -> str | None:
        """Why these runs may not be averaged, or None."""
        done = [(job.name, job.results) for job in self.jobs if job.results]
        splits: dict[Any, tuple[str, str]] = {}
        for name, results in done:
            first, reference = done[0]
            if results["weights"] != reference["weights"]:
                return f"not averaged: {first} began with {reference['weights']}, {name} with {results['weights']}"
            if results["classes"] != reference["classes"]:
                return (
                    f"not averaged: {first} has the classes {', '.join(reference['classes'])}, "
                    f"{name} has {', '.join(results['classes'])}"
                )
            known = splits.setdefault(results["fold"], (name, results["split_fingerprint"]))
            if known[1] != results["split_fingerprint"]:
                return (
                    f"not averaged: {known[0]} and {name} split the data differently, so the data has changed between"
                )
        return None

    def record(self) -> dict[str, Any]:
        """The group's entry in ``aggregate.json``; NaN stands for what the number of runs does not give."""
        done = [job for job in self.jobs if job.results]
        results = [job.results for job in done if job.results]
        first = results[0] if results else {}
        record: dict[str, Any] = {
            "model": first["model"] if first else self.setting.get("model"),
            "data": first["data"] if first else self.setting.get("data"),
            "protocol": first["protocol_name"] if first else self.setting.get("protocol"),
            "setting": {key: value for key, value in self.setting.items() if key not in COLUMNS},
            "n": len(results),
            "folds_in_all": first["protocol"].get("folds") if first else None,
            "folds": sorted({r["fold"] for r in results if r["fold"] is not None}),
            "seeds": sorted({r["seed"] for r in results}),
            "selected_on": sorted({r["selected_on"] for r in results}),
            "stamps": sorted({stamp for r in results for stamp in r["stamps"]}),
            "code_versions": sorted({r["code_version"] for r in results}),
            "runs": [job.name for job in done],
            "failed": [{"job": j.name, "state": j.state, "error": j.error} for j in self.jobs if not j.results],
            "refused": self.refusal(),
        }
        usable = results if record["refused"] is None else []
        return record | _figures(usable)


def _figures(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation and interval of every metric, and the summed test confusion matrix."""
    places = [(r["seed"], r["fold"]) for r in results]
    flat = [{f"{part}/{name}": v for part in r["metrics"] for name, v in r["metrics"][part].items()} for r in results]
    # A fold that lacks a class has no accuracy for it; the mean is over those that have.
    values = {metric: [run.get(metric) for run in flat] for metric in dict.fromkeys(m for run in flat for m in run)}
    alone = {metric: repetitions(dict(zip(places, of_runs, strict=True))) for metric, of_runs in values.items()}
    moments = {metric: mean_interval(figures) for metric, figures in alone.items()}
    classes = results[0]["classes"] if results else []
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for run in results:
        confusion += np.asarray(run["confusion"]["test"])
    pooled = scores(confusion, classes) if results else {}
    videos = [np.asarray(run["confusion"]["test_sequences"]) for run in results if "test_sequences" in run["confusion"]]
    if videos:
        pooled |= sequence_scores(np.sum(videos, axis=0), classes)
    return {
        "classes": classes,
        "over": repeated_over(places),
        "mean": {metric: m[0] for metric, m in moments.items()},
        "std": {metric: m[1] for metric, m in moments.items()},
        "interval": {metric: [m[2], m[3]] for metric, m in moments.items()},
        "values": values,
        "confusion": confusion.tolist(),
        "pooled": {f"test/{name}": pooled[name] for name in (*POOLED, *SEQUENCES) if name in pooled},
        "sequences": int(np.sum(videos)) if videos else None,
    }


def aggregate(folder: Path) -> dict[str, Any]:
    """What the jobs of a sweep amount to; nothing in it depends on when, where or in how many sessions they ran.

    Args:
        folder: the sweep's folder.

    Returns:
        The content of ``aggregate.json``; each of its ``groups`` has model, data, protocol, further setting, n, folds,
        seeds; ``over``, ``folds`` (the seeds of each averaged first) or ``seeds``, and over these mean, std and 95 %
        interval (Student's t) per metric; its values of the single runs; summed confusion (rows are labels), scores of
        that matrix (``pooled``), failed jobs, and ``refused``, why it is not averaged.
    """
    jobs = jobs_of(folder)
    varying = {
        key
        for job in jobs
        for key, value in job.words.items()
        if key not in REPEATS and any(other.words.get(key) != value for other in jobs)
    }
    groups: dict[tuple[tuple[str, str], ...], Group] = {}
    for job in jobs:
        setting = {
            key: value for key, value in job.words.items() if key in varying or key in COLUMNS - {"group", "fresh"}
        }
        groups.setdefault(tuple(sorted(setting.items())), Group(setting)).jobs.append(job)
    records = [group.record() for group in groups.values()]
    if read_json(folder / "sweep.json")["jobs"] is None:  # a search's best comes first
        records.sort(key=lambda record: -record["mean"].get("val/mean_acc", -1.0))
    return {"sweep": folder.name, "jobs": len(jobs), "groups": records}


# -- for people -----------------------------------------------------------------------------------------------------


def title(group: dict[str, Any]) -> str:
    """``convcut on rafdb, kfold, loss=focal``."""
    setting = [f"{key}={value}" for key, value in group["setting"].items()]
    named = f"{group['model'] or '?'} on {group['data'] or '?'}"
    return ", ".join([named, *([group["protocol"]] if group["protocol"] else []), *setting])


def spread(group: dict[str, Any], metric: str) -> str:
    """``71.20 ± 0.84 [70.16, 72.24]`` in per cent: mean, standard deviation, 95 % interval; a dash without runs."""
    if metric not in group["mean"]:
        return "-"
    mean, std, (low, high) = group["mean"][metric], group["std"][metric], group["interval"][metric]
    if group["n"] < 2 or not np.isfinite(std):
        return f"{100 * mean:.2f}"
    return f"{100 * mean:.2f} ± {100 * std:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def failures(record: dict[str, Any]) -> list[str]:
    """A line for each job without results and each group that was not averaged."""
    lines = [
        f"{job['job']}: {job['state']}" + (f", {job['error']}" if job["error"] else "")
        for group in record["groups"]
        for job in group["failed"]
    ]
    return lines + [f"{title(group)}: {group['refused']}" for group in record["groups"] if group["refused"]]


def rows(record: dict[str, Any]) -> list[list[str]]:
    """The head and a row per group, as printed."""
    head = ["model, data, protocol", "n", "folds", "seeds", *HEADLINES.values(), "validation mean class", "failed"]
    body = [
        [
            title(group) + "".join(f" [{stamp}]" for stamp in group["stamps"]),
            str(group["n"]),
            _folds(group),
            str(len(group["seeds"])),
            *(spread(group, metric) for metric in HEADLINES),
            spread(group, "val/mean_acc"),
            str(len(group["failed"])) if group["failed"] else "",
        ]
        for group in record["groups"]
    ]
    return [head, *body]


def _folds(group: dict[str, Any]) -> str:
    """``5``, ``3 of 5`` or ``-``."""
    n, of = len(group["folds"]), group["folds_in_all"]
    return "-" if not n else str(n) if of in (None, n) else f"{n} of {of}"


def table(record: dict[str, Any]) -> Table:
    """The rows for a terminal."""
    head, *body = rows(record)
    over = " or ".join(sorted({group["over"] for group in record["groups"] if group["values"]})) or "runs"
    title = f"{record['sweep']}: test figures in %, mean ± standard deviation [95 % interval] over {over}"
    shown = Table(title=title, box=None)
    for heading in head:
        shown.add_column(heading, justify="left" if heading == head[0] else "right", overflow="fold")
    for row in body:
        shown.add_row(*map(escape, row))
    return shown


def markdown(record: dict[str, Any], command: str) -> str:
    """The page ``aggregate.md``."""
    head, *body = rows(record)
    lines = [f"# {record['sweep']}", "", f"`{command}`", "", *_markdown_table(head, body), ""]
    lines += [
        "Test figures in per cent: mean ± sample standard deviation [95 % interval, Student's t] over folds, the seeds",
        "of each averaged first, or where there are none over seeds. Folds share training images, so their interval is",
        "a guide, not a guarantee.",
        "",
    ]
    if problems := failures(record):
        lines += ["## Missing from these figures", "", *(f"- {inert(line)}" for line in problems), ""]
    for group in record["groups"]:
        lines += _confusion_section(group) if group["n"] and not group["refused"] else []
    return "\n".join(lines)


def _confusion_section(group: dict[str, Any]) -> list[str]:
    classes, counts = group["classes"], np.asarray(group["confusion"])
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    body = [
        [name, *(f"{n} ({p:.1f} %)" for n, p in zip(counts[i], share[i], strict=True)), str(counts[i].sum())]
        for i, name in enumerate(classes)
    ]
    pooled = ", ".join(f"{text} {100 * group['pooled'][metric]:.2f} %" for metric, text in HEADLINES.items())
    chosen = ", ".join(group["selected_on"])
    return [
        f"## {inert(title(group))}",
        "",
        f"All {counts.sum():,} held-out predictions together: {pooled}.{_sequences(group)} Epoch chosen on: {chosen}.",
        *(f"**{inert(stamp)}**" for stamp in group["stamps"]),
        "",
        *_markdown_table(["label \\ predicted", *classes, "predictions"], body),
        "",
    ]


def _sequences(group: dict[str, Any]) -> str:
    """What videos come to, each named by the mean of its frames, once for every run that tested it."""
    if group["sequences"] is None:
        return ""
    found = ", ".join(f"{text} {100 * group['pooled'][f'test/{name}']:.2f} %" for name, text in SEQUENCES.items())
    return f" By sequence, {group['sequences']:,} predictions: {found}."


def _markdown_table(head: list[str], body: list[list[str]]) -> list[str]:
    align = ["---", *("---:" for _ in head[1:])]
    return ["| " + " | ".join(map(inert, cells)) + " |" for cells in (head, align, *body)]
