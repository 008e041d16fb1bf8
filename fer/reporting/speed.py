"""The tables of docs/speed.md, from what ``python -m fer.bench out=docs/results/speed`` wrote."""

from typing import Any

from fer.config import CONF
from fer.reporting.tables import together
from fer.runs import read_json

RECORDS = CONF.parent / "docs" / "results" / "speed"
COLUMNS = ("what", "measured", "beside", "baseline", "figure", "quartiles", "95 %", "n", "goal", "")


def table(rows: list[Any]) -> str:
    """Rows as a Markdown table, a note under those that have one."""
    lines = [f"| {' | '.join(map(together, COLUMNS))} |", "|---|---:|---|---:|---:|---:|---:|---:|---|---|"]
    for row in rows:
        unit = row["unit"]
        beside = [row["baseline"] or "", "" if row["baseline"] is None else f"{number(row['baseline_value'])} {unit}"]
        of = {"ratio": "", "difference": f" {unit}", "value": f" {unit}"}[row["figure"]]
        interval = "" if row["lo"] is None or row["hi"] is None else f"{number(row['lo'])} to {number(row['hi'])}"
        verdict = {None: "", True: "holds", False: "**missed**"}[row["holds"]]
        cells = [
            row["name"] + (f"; {row['note']}" if row["note"] else ""),
            f"{number(row['value'])} {unit}",
            *beside,
            f"{number(row['median'])}{of}",
            f"{number(row['q1'])} to {number(row['q3'])}",
            interval,
            str(row["n"]),
            row["goal"] or "",
            verdict,
        ]
        lines.append(f"| {' | '.join([cells[0], *map(together, cells[1:])])} |")
    return "\n".join(lines)


def number(value: float) -> str:
    """Four significant digits, thousands apart."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def section(part: str) -> str:
    """What ran where, and the part's table."""
    path = RECORDS / f"{part}.json"
    return section_of(read_json(path)) if path.is_file() else "Not measured yet."


def section_of(record: dict[str, Any]) -> str:
    """`section` of what `fer.benching.records.save` wrote."""
    where, made = record["machine"], record["versions"]
    threads = f"{record['threads']} thread{'s' if record['threads'] > 1 else ''}"
    facts = (
        f"`{record['command']}`, commit {record['git_commit']}, {record['taken']}: {where['cpu']}, "
        f"{where['cores']} cores, {threads}, torch {made['torch']}, lightning {made['lightning']}."
    )
    return f"{facts}\n\n{table(record['rows'])}"
