"""The figures of docs/reliability.md that ``make soak`` and ``tests/wandb_cost.py`` wrote into docs/results/."""

from typing import Any

from fer.config import CONF
from fer.runs import read_json

RESULTS = CONF.parent / "docs" / "results"
_FIGURES = {
    "memory": "memory, MiB",
    "descriptors": "file descriptors",
    "threads": "threads",
    "processes": "processes",
}
_MORE = ("extra", "extra_cpu", "added")


def section(what: str) -> str:
    """One table.

    Args:
        what: ``soak`` or ``wandb``.
    """
    path = RESULTS / f"{what}.json"
    if not path.is_file():
        return "Not measured yet."
    return _soak(read_json(path)) if what == "soak" else _wandb(read_json(path))


def _soak(found: dict[str, Any]) -> str:
    training, sweep = found["training"], found["sweep"]
    rows = [f"| | {training['steps']:,} steps of a training | {sweep['jobs']} jobs of a sweep |", "|---|---|---|"]
    for key, meaning in _FIGURES.items():
        cells = []
        for part in (training, sweep):
            warm, end, grown = part["warm"][key], part["end"][key], part["growth"][key]
            cells.append(f"{warm:,.0f} after warm-up, {end:,.0f} at the end, growth {grown:+,.1f}")
        rows.append(f"| {meaning} | {' | '.join(cells)} |")
    rows.append(f"| cost, CPU seconds | {training['cpu_seconds']:,.0f} | {sweep['cpu_seconds']:,.0f} |")
    return "\n".join(rows)


def _wandb(found: dict[str, Any]) -> str:
    rows = [
        "| server | run, s | more than `logger=csv`, s | CPU seconds more | more than with a server that is well, s "
        "| metrics kept |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for case, figures in found["cases"].items():
        shown = [f"{figures[what][1]:+.2f} ({figures[what][0]:+.2f} to {figures[what][2]:+.2f})" for what in _MORE]
        kept = f"{figures['recorded']} of {figures['metrics']}"
        rows.append(f"| {case} | {figures['seconds'][1]:.1f} | {' | '.join(shown)} | {kept} |")
    return "\n".join([*rows, "", f"n = {found['repeats']}, medians and quartiles."])
