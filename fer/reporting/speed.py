"""``python -m fer.reporting.speed``: docs/speed.md from the figures in docs/results/speed/.

``python -m fer.bench out=docs/results/speed`` writes ``<part>.json`` there; ``<part>.md`` beside it, by hand, says what
is compared, and where a goal is missed, why.
"""

import sys
from typing import Any

from fer.config import CONF
from fer.errors import UserError
from fer.runs import read_json, write_text

DOCS = CONF.parent / "docs"
RECORDS, PAGE = DOCS / "results" / "speed", DOCS / "speed.md"

HEAD = """# Speed, measured

    python -m fer.bench                      # every part that needs no GPU
    python -m fer.bench parts=[overhead]     # one of them

Every figure is taken beside its baseline in one run on one machine, in windows that take turns, the threads pinned.
The figure is the median over the rounds of what is compared within a round; then its quartiles, and in brackets the
95 % interval of the median. Times are CPU time unless a row says otherwise. The figures are in `results/speed/`;
`python -m fer.reporting.speed` makes this page from them.

"""
COLUMNS = ("what", "measured", "beside", "baseline", "figure", "quartiles", "95 %", "n", "goal", "")


def table(rows: list[Any]) -> str:
    """Rows as a Markdown table, a note under those that have one."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---:|---|---:|---:|---:|---:|---:|---|---|"]
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
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def number(value: float) -> str:
    """Four significant digits, thousands apart."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def page(records: dict[str, Any], texts: dict[str, str]) -> str:
    """The Markdown of all parts.

    Args:
        records: what `fer.benching.records.save` wrote, by part.
        texts: the hand-written text above each table, by part; it begins with the part's heading.
    """
    sections = []
    for part, record in records.items():
        where, made = record["machine"], record["versions"]
        facts = (
            f"`{record['command']}`, commit {record['git_commit']}, {record['taken']}: {where['cpu']}, "
            f"{where['cores']} cores, {record['threads']} thread{'s' if record['threads'] > 1 else ''}, "
            f"torch {made['torch']}, lightning {made['lightning']}."
        )
        sections.append(f"{texts.get(part, f'## {part}').strip()}\n\n{facts}\n\n{table(record['rows'])}\n")
    return HEAD + "\n".join(sections)


def main() -> None:
    """The command."""
    if sys.argv[1:]:
        print(__doc__)
        return
    try:
        records = {path.stem: read_json(path) for path in sorted(RECORDS.glob("*.json"))}
        if not records:
            raise UserError(f"{RECORDS} holds no figures: write them by python -m fer.bench out=docs/results/speed")
        write_text(PAGE, page(records, {part: text_of(part) for part in records}))
    except UserError as error:
        sys.exit(f"error: {error}")
    print(PAGE)


def text_of(part: str) -> str:
    """The hand-written text above a part's table."""
    path = RECORDS / f"{part}.md"
    return path.read_text() if path.is_file() else f"## {part}"


if __name__ == "__main__":
    main()
