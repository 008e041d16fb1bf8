"""What stands in the report's tables: groups, claims, classes, data, times, comparisons, and what is missing."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fer.reporting.benches import Bench
from fer.reporting.claims import Beside, Claim
from fer.reporting.comparisons import METRICS, Verdict
from fer.reporting.groups import Group
from fer.reporting.results import hardware_of
from fer.reporting.statistics import wilson_half_width
from fer.reporting.tables import ABOUT_POOLED, DASH, NONE, Cell, Row, Table, interval, mean_std, number, percent, words

SHOWN = ("acc", "mean_acc", "macro_f1", "ece", "nll")
PARTS = ("train", "val", "test")
FOUND = {
    "map50": "mAP@0.5",
    "face_ap50": "face AP@0.5",
    "recall": "faces found",
    "matched_acc": "expression",
    "region_map50": "region mAP@0.5",
}


def results(bench: Bench) -> Table:
    """Scores of each group, best accuracy first, those set apart below; those of all folds together where there are."""
    pooled, rows = any(group.disjoint for group in bench.groups), []
    sequences = any(group.values("sequence_acc") for group in bench.groups)
    for group in bench.ranked:
        acc, mean_acc = group.interval("acc"), group.interval("mean_acc")
        cells = [words(group.label), mean_std(*acc[:2]), interval(*acc[2:]), mean_std(*mean_acc[:2])]
        cells += [interval(*mean_acc[2:]), percent(group.interval("macro_f1")[0]), percent(group.interval("ece")[0], 1)]
        cells += [mean_std(*group.interval("sequence_acc")[:2])] if sequences else []
        cells += [percent(group.pooled[metric]) if group.disjoint else NONE for metric in METRICS] if pooled else []
        half = wilson_half_width(group.pooled["acc"], group.effective_images)
        cells += [_runs(group), Cell(f"± {percent(half).text}", half)]
        rows.append(_row(bench, group, cells, _record(bench, group, half)))
    over = f"95 % over {bench.over}"
    columns = ["model", "accuracy, %", over, "mean class, %", over, "macro F1, %", "ECE, %"]
    columns += ["accuracy of sequences, %"] if sequences else []
    columns += ["pooled accuracy, %", "pooled mean class, %"] if pooled else []
    note = (
        "Mean ± standard deviation and Student's t interval of the mean: over folds, the seeds of each averaged first, "
        "or where there is one split over seeds. Last column: half of Wilson's 95 % interval of the accuracy for this "
        "number of test images, which no number of runs makes smaller; images of one person count for less where they "
        "are right or wrong together (Kish's design effect)."
    )
    note += f" {ABOUT_POOLED}" if pooled else ""
    return Table(f"{bench.title}: results", [*columns, "runs", "± by images"], rows, note)


def _row(bench: Bench, group: Group, cells: Sequence[Cell], record: dict[str, Any]) -> Row:
    return Row(cells, record, group.stamps, bench.apart(group), group.id)


def _runs(group: Group) -> Cell:
    folds, seeds = len(group.folds), len(group.seeds)
    text = f"{len(group.runs)}"
    if folds > 1:
        text += f" ({folds} folds" + (f" x {seeds} seeds)" if seeds > 1 else ")")
    elif seeds > 1:
        text += f" ({seeds} seeds)"
    absent = len(group.unfinished) + len(group.missing)
    return Cell(text + (f", {absent} not finished" if absent else ""), len(group.runs))


def _record(bench: Bench, group: Group, half: float) -> dict[str, Any]:
    out: dict[str, Any] = {"group": group.id, "model": group.model, "label": group.label, "data": group.data}
    out |= {"protocol": bench.protocol, "bench": bench.title, "set_apart": bench.apart(group)}
    out |= {"runs": len(group.runs), "folds": len(group.folds), "seeds": len(group.seeds), "images": group.images}
    out["effective_images"] = group.effective_images
    out["over"] = group.over
    for metric in SHOWN:
        names = ("mean", "std", "low", "high")
        out |= {f"{metric}_{name}": value for name, value in zip(names, group.interval(metric), strict=True)}
    out["sequence_acc_mean"] = group.interval("sequence_acc")[0]
    out |= {f"{metric}_pooled": group.pooled[metric] for metric in ("acc", "mean_acc", "macro_f1")}
    return out | {"acc_image_half_width": half, "settings": "; ".join(group.differs)}


def per_class(bench: Bench, claims: Sequence[Beside]) -> Table:
    """Accuracy of each class, and what papers claim for it."""
    classes, rows = bench.groups[0].classes, []
    for group in bench.ranked:
        found = {name: group.interval(f"acc_{name}") for name in classes}
        cells = [words(group.label), *(mean_std(*found[name][:2]) for name in classes)]
        record = {"group": group.id, "source": "measured", **{name: found[name][0] for name in classes}}
        rows.append(_row(bench, group, cells, record))
    for one in claims:
        if one.claim.per_class:
            found_claims = [one.claim.per_class.get(name) for name in classes]
            who = f"claimed: {one.claim.method}, {one.claim.paper}"
            record = {"group": who, "source": "claimed"}
            record |= {n: None if v is None else v / 100 for n, v in zip(classes, found_claims, strict=True)}
            cells = [words(who), *(number(value, 2) for value in found_claims)]
            rows.append(Row(cells, record, [f"void: {one.claim.void}"] if one.claim.void else [], apart=True))
    return Table(f"{bench.title}: accuracy of each class, %", ["model", *classes], rows)


def claimed(bench: Bench, claims: Sequence[Beside]) -> Table:
    """Each claim on a model that was run: what was measured, and in what the protocols differ."""
    here = [(one.claim, one.group) for one in claims if one.group is not None]
    by_class = any(claim.mean_acc is not None for claim, _ in here)
    rows = []
    for claim, group in here:
        acc, mean_acc = (group.interval(metric) for metric in METRICS)
        gap = 100 * acc[0] - claim.acc
        differs = "; ".join([*claim.remarks, *claim.differences(group)])
        cells = [words(f"{claim.method}, {claim.paper}"), words(group.label), words(differs)]
        cells += [number(claim.acc, 2), mean_std(*acc[:2]), _signed(gap)]
        cells += [number(claim.mean_acc, 2), mean_std(*mean_acc[:2])] if by_class else []
        record = _claim_record(bench, claim) | {"group": group.id, "measured_acc": 100 * acc[0], "gap": gap}
        record |= {"measured_mean_acc": 100 * mean_acc[0], "differences": differs}
        rows.append(_row(bench, group, cells, record))
    columns = ["method and paper", "measured by", "the protocols differ in", "claimed, %", "measured, %", "points"]
    columns += ["claimed mean class, %", "measured mean class, %"] if by_class else []
    return Table(f"{bench.title}: claimed and measured", columns, rows, left=3)


def not_run(bench: Bench, claims: Sequence[Beside]) -> Table:
    """Claims on the data set that no group was measured for, with the paper's protocol."""
    rows = []
    for claim in (one.claim for one in claims if one.group is None):
        remarks = "; ".join([*claim.remarks, claim.protocol])
        cells = [
            words(f"{claim.method}, {claim.paper}"),
            words(remarks),
            number(claim.acc, 2),
            number(claim.mean_acc, 2),
        ]
        rows.append(Row(cells, _claim_record(bench, claim)))
    columns = ["method and paper", "the paper's protocol", "claimed, %", "claimed mean class, %"]
    return Table(f"{bench.title}: claims on models not run here", columns, rows, left=2)


def _claim_record(bench: Bench, claim: Claim) -> dict[str, Any]:
    record = {"bench": bench.title, "paper": claim.paper, "method": claim.method, "claimed_acc": claim.acc}
    record |= {"claimed_mean_acc": claim.mean_acc, "paper_protocol": claim.protocol, "void": claim.void or ""}
    return record


def detections(bench: Bench) -> Table:
    """Scores of the faces and regions found, and the time it takes, for the groups that find some."""
    rows = []
    for group in bench.ranked:
        if not any(group.values(metric) for metric in FOUND):
            continue
        timed = [run.results.get("detection_seconds_per_image") for run in group.runs]
        median, p95 = (_mean([1000 * one[key] for one in timed if one]) for key in ("median", "p95"))
        where = ", ".join(dict.fromkeys(str(one["device"]) for one in timed if one))
        found = {metric: group.interval(metric) for metric in FOUND}
        cells = [words(group.label), *(mean_std(*values[:2]) for values in found.values())]
        cells += [number(median, 1), number(p95, 1), words(where), _runs(group)]
        record: dict[str, Any] = {"group": group.id, "milliseconds_median": median, "milliseconds_p95": p95}
        for metric, values in found.items():
            names = ("mean", "std", "low", "high")
            record |= {f"{metric}_{name}": value for name, value in zip(names, values, strict=True)}
        rows.append(_row(bench, group, cells, record | {"timed_on": where}))
    note = (
        "In %, at an overlap (IoU) of 0.5. Expression: share of the faces found whose expression is right. Time: one "
        "image from the network's input to its faces, batch 1."
    )
    columns = ["model", *FOUND.values(), "ms an image", "95th percentile", "timed on", "runs"]
    return Table(f"{bench.title}: faces and regions found", columns, rows, note)


def confusion(group: Group) -> Table:
    """Counts summed over all runs of a group, and per cent of the row; rows are labels."""
    rows = []
    for name, counts in zip(group.classes, group.confusion, strict=True):
        total = int(counts.sum())
        cells = [Cell(f"{n:,} ({100 * n / max(total, 1):.1f} %)", float(n / max(total, 1))) for n in counts]
        record = {"group": group.id, "label": name, **dict(zip(group.classes, counts.tolist(), strict=True))}
        rows.append(Row([words(name), *cells, number(total, 0)], record))
    n = len(group.runs)
    title = f"{group.label} on {group.data}: all test predictions of {n} run{'s' if n > 1 else ''}, counts and row %"
    return Table(title, ["label \\ predicted", *group.classes, "images"], rows)


def _signed(value: float | None) -> Cell:
    if value is None or math.isnan(value):
        return NONE
    return Cell(("+" if value > 0 else "") + number(value, 2).text, value)


def distribution(bench: Bench) -> Table:
    """Images of each class in each part."""
    group = bench.groups[0]
    counts, classes = group.facts.get("counts") or {}, group.classes
    rows = []
    for part in PARTS:
        found = [counts.get(part, {}).get(name, 0) for name in classes]
        total = max(sum(found), 1)
        cells = [words(part), *(Cell(f"{n:,} ({100 * n / total:.1f} %)", n) for n in found), number(sum(found), 0)]
        record = {"bench": bench.title, "part": part, **dict(zip(classes, found, strict=True)), "all": sum(found)}
        rows.append(Row(cells, record))
    fold = group.runs[0].fold
    note = "" if fold is None else f"Of fold {fold}; the other folds differ by a few images."
    return Table(f"{bench.title}: images of each class", ["part", *classes, "all"], rows, note)


def times(benches: Sequence[Bench]) -> Table:
    """What the runs of each group cost."""
    rows = []
    for bench in benches:
        for group in bench.ranked:
            found = [run.results for run in group.runs]
            seconds, cpu = (_mean([one.get(key) for one in found]) for key in ("seconds", "cpu_seconds"))
            speed = [_mean([(one.get("images_per_second") or {}).get(part) for one in found]) for part in PARTS[::2]]
            first = found[0]
            machine = ", ".join(dict.fromkeys(f"{one.get('device')} {one.get('precision')}" for one in found))
            cells = [words(f"{group.label} on {bench.title}"), words(machine), number(first.get("parameters"), 0)]
            flops = first.get("forward_flops")
            cells += [
                number(None if flops is None else flops / 1e9, 2),
                number(_mean([r.get("epochs") for r in found]), 0),
            ]
            cells += [number(seconds / 60, 1), number(cpu / 60, 1), number(len(found) * cpu / 3600, 2)]
            cells += [number(speed[0], 0), number(speed[1], 0)]
            record = {"group": group.id, "machine": machine, "parameters": first.get("parameters"), "flops": flops}
            record |= {"seconds_mean": seconds, "cpu_seconds_mean": cpu, "runs": len(found)}
            record |= {"train_images_per_second": speed[0], "test_images_per_second": speed[1]}
            rows.append(Row(cells, record, group.stamps, link=group.id))
    columns = [
        "model",
        "ran on",
        "parameters",
        "GFLOP",
        "epochs",
        "minutes a run",
        "core-minutes a run",
        "core-hours, all",
    ]
    return Table("Cost", [*columns, "images/s training", "images/s test"], rows, left=2)


def _mean(values: Sequence[Any]) -> float:
    found = [float(value) for value in values if value is not None]
    return float(np.mean(found)) if found else math.nan


def absent(groups: Sequence[Group], planned: Sequence[tuple[Path, str, str]], root: Path) -> Table:
    """Runs that failed, did not finish, were never started, or count no more; ``planned`` are a sweep's jobs."""
    rows = []

    names = ("run", "status", "group", "reason", "fold", "seed")

    def add(group: Group | None, status: str, where: str, fold: int | None, seed: int | None, why: str) -> None:
        whose = "" if group is None else f"{group.label} on {group.data}, {group.protocol}"
        cells = [words(where), words(status), words(whose), words(why), number(fold, 0), number(seed, 0)]
        values = (where, status, "" if group is None else group.id, why, fold, seed)
        rows.append(Row(cells, dict(zip(names, values, strict=True))))

    for group in groups:
        for run in group.unfinished:
            add(group, run.status, shown(run.path, root), run.fold, run.seed, run.error)
        for run in group.repeated:
            add(group, "repeated", shown(run.path, root), run.fold, run.seed, "a newer run has its fold and seed")
        for line in group.missing:
            add(group, "missing", DASH, None, None, line)
    for folder, status, reason in planned:
        add(None, status, shown(folder, root), None, None, reason)
    return Table("Failed, unfinished and missing runs", names, rows, left=4)


def shown(path: Path, root: Path) -> str:
    """A run's path as the report shows it."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) and path != root else str(path)


def runs(group: Group, root: Path) -> Table:
    """Each run of a group."""
    rows = []
    for run in group.runs:
        test, first = run.results["metrics"]["test"], run.results
        cells = [words(shown(run.path, root)), number(run.fold, 0), number(run.seed, 0)]
        cells += [percent(test.get("acc")), percent(test.get("mean_acc")), percent(test.get("macro_f1"))]
        cells += [number(first["best_epoch"] + 1, 0), number(first["n"]["test"], 0)]
        cells += [words(str(first.get("code_version", ""))), words(first["split_fingerprint"])]
        hardware = hardware_of(first) if first.get("machine") else ""
        spent = None if first.get("cpu_seconds") is None else first["cpu_seconds"] / 60
        cells += [words(str(first.get("git_commit") or "")), words(hardware), number(spent, 1)]
        cells += [words(str(first.get("command", "")))]
        record = {"group": group.id, "run": cells[0].text, "fold": run.fold, "seed": run.seed, "n": first["n"]["test"]}
        record |= {metric: test.get(metric) for metric in SHOWN} | {"best_epoch": first["best_epoch"]}
        record |= {"code_version": first.get("code_version"), "split_fingerprint": first["split_fingerprint"]}
        record |= {"git_commit": first.get("git_commit"), "hardware": hardware, "core_minutes": spent}
        record |= {"command": first.get("command")}
        rows.append(Row(cells, record, run.stamps))
    columns = ["run", "fold", "seed", "accuracy, %", "mean class, %", "macro F1, %", "epoch", "images", "code", "split"]
    return Table("", [*columns, "commit", "hardware", "core-minutes", "command"], rows)


def compared(verdicts: Sequence[Verdict]) -> Table:
    """Every test."""
    rows = []
    for one in verdicts:
        d = one.outcome
        cells = [words(one.a), words(one.b), words(one.data), words(one.test), words(METRICS[one.metric]), words(one.n)]
        cells += [_signed(100 * d.difference), _points(d.low, d.high), _p(d.p), _p(one.p_holm)]
        record: dict[str, Any] = {
            "a": one.a,
            "b": one.b,
            "data": one.data,
            "test": one.test,
            "metric": one.metric,
            "n": one.n,
        }
        record |= {"difference": d.difference, "low": d.low, "high": d.high, "p": d.p, "p_holm": one.p_holm}
        rows.append(Row(cells, record, one.stamps))
    note = (
        "Points: a minus b. McNemar (exact) compares two trained networks on these images; the bootstrap asks about "
        "other images, the corrected resampled t-test (Nadeau and Bengio 2003) about other training parts, Wilcoxon "
        "about other data sets. Holm: corrected over all lines of one test and metric."
    )
    columns = ["a", "b", "data", "test", "of", "n", "points", "95 %", "p", "p, Holm"]
    return Table("Comparisons", columns, rows, note, left=6)


def _points(low: float, high: float) -> Cell:
    return NONE if math.isnan(low) else Cell(f"{_signed(100 * low).text} to {_signed(100 * high).text}", low)


def _p(value: float) -> Cell:
    return Cell("< 0.0001" if value < 1e-4 else f"{value:.4f}", value)
