"""An evaluation for people: ``evaluation.md`` and the table at the end of the command."""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fer.reporting.statistics import wilson_half_width
from fer.reporting.tables import inert

SCORES = {
    "acc": "accuracy",
    "mean_acc": "mean class accuracy",
    "macro_f1": "macro F1",
    "sequence_acc": "accuracy of sequences",
    "sequence_mean_acc": "mean class accuracy of sequences",
}
SURE = {"ece": "ECE", "nll": "NLL", "brier": "Brier score"}


def _rows(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, the first column to the left."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return [*("| " + " | ".join(map(inert, line)) + " |" for line in lines), ""]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def _people(effective: float, n: int) -> str:
    """What to say of an interval where the n images tell as much as fewer would."""
    if effective > 0.995 * n:
        return ""
    return f" for {effective:,.0f} images: those of one person tend to be right or wrong together"


def page(results: dict[str, Any]) -> str:
    """Everything in ``results.json`` that a person wants to read."""
    found, test, n = results["evaluation"], results["metrics"]["test"], results["n"]["test"]
    lines = [f"# {inert(results['model'])} on {inert(results['data'])}", ""]
    lines += [f"- {inert(line)}" for line in notes(results)] + [""]
    half = 100 * wilson_half_width(test["acc"], found["effective_images"])
    lines += _rows(
        [f"test part, n = {n:,}", "%"],
        [
            (text, f"{100 * test[key]:.2f}" + (f" ± {half:.2f}" if key == "acc" else ""))
            for key, text in SCORES.items()
            if key in test
        ]
        + [(name, f"{100 * test[f'acc_{name}']:.2f}") for name in results["classes"] if f"acc_{name}" in test],
    )
    lines += [
        f"± is half of Wilson's 95 % interval{_people(found['effective_images'], n)}.",
        "",
        "![confusion](confusion_test.png)",
        "",
    ]
    lines += ["## Calibration", "", *_calibration(found["calibration"], test), "![reliability](reliability.png)", ""]
    lines += ["## Accuracy by coverage", "", *_coverage(found["coverage"]), "![coverage](coverage.png)", ""]
    if found["robustness"] is not None:
        lines += ["## Robustness", "", *_robustness(found["robustness"]), "![robustness](robustness.png)", ""]
    if found["orders"] is not None:
        lines += ["## Order of the images", "", *_orders(found["orders"])]
    if found["subgroups"]["groups"]:
        lines += ["## Subgroups", "", *_subgroups(found["subgroups"])]
    if found["seconds_per_image"]:
        lines += ["## Time", "", *_times(found)]
    lines += [f"Again: `{results['command']}`", ""]
    return "\n".join(lines)


def notes(results: dict[str, Any]) -> list[str]:
    """Stamps, networks, what was left out, which images were seen before."""
    found = results["evaluation"]
    out = [f"**{stamp}**" for stamp in results["stamps"]]
    out += [
        f"network: `{one['run']}`, {one['model']} trained on {one['data']}, seed {one['seed']}, "
        f"epoch {one['best_epoch'] + 1} chosen on {one['selected_on']}, views {one['tta']} in its own test"
        for one in found["networks"]
    ]
    out.append(f"views averaged here: {results['tta']}; {results['device']}, {results['precision']}")
    left = found["classes"]
    if left is not None and left["renormalised"]:
        out.append(
            f"the answer was one of the classes left out for {left['answers_of_classes_left_out']:,} images; counting "
            f"those as wrong, accuracy is {_percent(left['acc_if_those_count_as_wrong'])}"
        )
    same = found["identical_to_own_images"]
    if left is not None and same is None:
        out.append("not known how many test images are pixel-identical to the run's own: its data is not at hand")
    elif same is not None:
        out.append(
            "test images pixel-identical to one of the run's own: "
            + ", ".join(f"{count:,} of its {part} part" for part, count in same.items())
        )
    return out


def _calibration(one: dict[str, Any] | None, test: dict[str, float]) -> list[str]:
    if one is None or one["temperature"] is None:
        why = "not asked for" if one is None else one["reason"]
        return [f"Not calibrated: {why}.", "", *_rows(["test", "as predicted"], _pairs(test))]
    said = f"Temperature {one['temperature']:.3f}, fitted on the validation part of the network's own data"
    before, after = one["test"]["before"], one["test"]["after"]
    columns = ["test", "as predicted", "calibrated", "validation, as predicted", "validation, calibrated"]
    rows = [
        (text, *(f"{values[key]:.4f}" for values in (before, after, one["before"], one["after"])))
        for key, text in SURE.items()
    ]
    return [f"{said} (n = {one['n']:,}, views {one['tta']}).", "", *_rows(columns, rows)]


def _pairs(test: dict[str, float]) -> list[tuple[str, str]]:
    return [(text, f"{test[key]:.4f}") for key, text in SURE.items()]


def _coverage(one: dict[str, Any]) -> list[str]:
    shown = [point for point in one["points"] if round(100 * point["coverage"]) in (10, 25, 50, 75, 90, 100)]
    rows = [
        (f"{100 * p['coverage']:.0f} %", f"{p['images']:,}", _percent(p["accuracy"]), f"{p['least']:.3f}")
        for p in shown
    ]
    said = f"AURC {one['aurc']:.4f}, of which {one['excess_aurc']:.4f} above the best order of the same answers."
    return [said, "", *_rows(["coverage", "images", "accuracy", "least confidence"], rows)]


def _robustness(one: dict[str, Any]) -> list[str]:
    clean, places = one["clean"]["acc"], one["places"]
    rows = [
        (name.replace("_", " "), *(f"{100 * acc:.1f}" for acc in values["acc"]), f"{100 * values['drop']:.1f}")
        for name, values in sorted(one["corruptions"].items(), key=lambda item: -float(item[1]["drop"]))
    ]
    where = (
        f"Eyes and mouth: by the data's own places in {places['of_the_data']:,} images, in {places['aligned']:,} where "
        "an aligned face has them (fer/faces/align.py)."
    )
    said = (
        f"Accuracy in %, n = {one['n']:,}, views {one['tta']}, seed {one['seed']}; untouched {100 * clean:.1f}. "
        f"Mean loss over all corruptions and severities: {100 * one['mean_drop']:.1f} points. {where}"
    )
    columns = ["corruption", *(f"severity {severity}" for severity in one["severities"]), "mean loss"]
    return [said, "", *_rows(columns, rows)]


def _orders(one: dict[str, Any]) -> list[str]:
    rows = [("sorted by class", *(f"{100 * one['by_class'][key]:.2f}" for key in ("acc", "mean_acc")))]
    rows += [("drawn", *(f"{100 * drawn[key]:.2f}" for key in ("acc", "mean_acc"))) for drawn in one["drawn"]]
    said = (
        f"The same weights and images, batches of {one['batch']}. {one['changed']:,} of {one['n']:,} images are not "
        f"answered alike in all orders; sorted minus drawn: {100 * one['difference']:+.2f} points of accuracy "
        f"({100 * one['low']:+.2f} to {100 * one['high']:+.2f}, bootstrap over images)."
    )
    return [said, "", *_rows(["order", "accuracy, %", "mean class accuracy, %"], rows)]


def _subgroups(one: dict[str, Any]) -> list[str]:
    lines = []
    for name, groups in one["groups"].items():
        rows = [
            (
                value,
                f"{g['n']:,}",
                _percent(g["acc"]),
                f"{100 * g['low']:.2f} to {100 * g['high']:.2f}",
                _percent(g["mean_acc"]),
            )
            for value, g in groups.items()
        ]
        lines += _rows([name, "n", "accuracy", "95 %, Wilson", "mean class accuracy"], rows)
    left = ", ".join(f"{name} ({count:,} values)" for name, count in one["left_out"].items())
    return [*lines, *([f"Left out: {left}.", ""] if left else [])]


def _times(found: dict[str, Any]) -> list[str]:
    rows = []
    for network, timed in zip(found["networks"], found["seconds_per_image"], strict=True):
        threads = "" if timed["threads"] is None else f", {timed['threads']} threads"
        where = f"{network['model']}, {timed['device']}{threads}, {timed['precision']}"
        rows += [
            (where, str(b["batch"]), f"{1000 * b['forward']:.2f}", f"{1000 * b['with_preprocessing']:.2f}")
            for b in timed["batches"]
        ]
    repeats = found["seconds_per_image"][0]["repeats"]
    said = f"Milliseconds per image in one view, median of {repeats} passes; preprocessing begins with the uint8 crop."
    return [said, "", *_rows(["network", "batch", "network alone", "with preprocessing"], rows)]


def print_summary(results: dict[str, Any]) -> None:
    """The table at the end of the command."""
    # In a log file there is no terminal to ask for its width.
    out = Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "120")), highlight=False)
    found, test, n = results["evaluation"], results["metrics"]["test"], results["n"]["test"]
    table = Table(
        title=f"{results['model']} on {results['data']}",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
        header_style="bold",
    )
    table.add_column(f"test, n = {n:,}")
    table.add_column("as predicted", justify="right")
    after = (found["calibration"] or {}).get("test", {}).get("after", {})
    if after:
        table.add_column(f"at temperature {found['calibration']['temperature']:.3f}", justify="right")
    half = wilson_half_width(test["acc"], found["effective_images"])
    for key, text in (SCORES | SURE).items():
        if key not in test:
            continue
        mark = f" ± {half:.4f}" if key == "acc" else ""
        table.add_row(text, f"{test[key]:.4f}{mark}", *([f"{after[key]:.4f}"] if key in after else []))
    out.print(table)
    if found["robustness"] is not None:
        clean, drop = found["robustness"]["clean"]["acc"], found["robustness"]["mean_drop"]
        out.print(f"under corruption: {100 * (clean - drop):.1f} % on average, {100 * drop:.1f} points lost")
    for line in notes(results):
        out.print(f"  note: {line.strip('*')}", markup=False)
