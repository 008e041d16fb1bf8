"""Tables of the report: one form for Markdown, LaTeX, CSV and the page.

A table shows rounded text and carries its full-precision values along: they sort the page's columns and fill the CSV.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

ABOUT_POOLED = "Pooled: of all folds' test predictions together, in which every class has all its images."
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def together(text: str) -> str:
    """The text, not to be broken into lines."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


class Cell(NamedTuple):
    """What is shown, and what is sorted by."""

    text: str
    value: float | str | None = None


NONE = Cell(DASH)


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        cells: as many as the table has columns.
        record: full-precision values by name, a line of the CSV.
        stamps: sentences that stand beside its figures.
        apart: it carries a stamp that others do not; it stands below them and is never sorted among them.
        link: id of the section its first cell leads to, empty for none.
    """

    cells: Sequence[Cell]
    record: dict[str, Any] = field(default_factory=dict)
    stamps: Sequence[str] = ()
    apart: bool = False
    link: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: heading.
        columns: headings; the first columns hold text and stand left.
        rows: in their order.
        note: what a reader must know to read it.
        left: how many columns stand left.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    note: str = ""
    left: int = 1

    def parts(self) -> list[list[Row]]:
        """The rows that may be sorted among each other: ordinary ones, and those set apart."""
        divided = [[row for row in self.rows if row.apart is apart] for apart in (False, True)]
        return [rows for rows in divided if rows]

    def markdown(self) -> str:
        """`body` below its title."""
        return f"#### {markdown(self.title)}\n\n{self.body()}\n"

    def body(self) -> str:
        """As GitHub writes tables, the note below; stamps follow the first cell in bold."""
        align = ["---" if place < self.left else "---:" for place in range(len(self.columns))]
        lines = [[markdown(name) for name in self.columns], align]
        for row in self.rows:
            first, *rest = [markdown(cell.text) for cell in row.cells]
            lines.append([first + "".join(f" **{markdown(stamp)}**" for stamp in row.stamps), *rest])
        body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        note = f"\n\n{markdown(self.note)}" if self.note else ""
        return f"{body}{note}"

    def latex(self) -> str:
        """A booktabs table; rows set apart stand below a rule, stamps follow the first cell in italics."""
        align = "l" * self.left + "r" * (len(self.columns) - self.left)
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(self.title)}}}", r"\small"]
        lines += [rf"\begin{{tabular}}{{{align}}}", r"\toprule", _latex_row(self.columns), r"\midrule"]
        for place, rows in enumerate(self.parts()):
            lines += [r"\midrule"] if place else []
            for row in rows:
                first, *rest = [_latex(cell.text) for cell in row.cells]
                stamps = "".join(rf" \textit{{{_latex(stamp)}}}" for stamp in row.stamps)
                lines.append(" & ".join([first + stamps, *rest]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\par\smallskip {_latex(self.note)}"] if self.note else []
        return "\n".join([*lines, r"\end{table}", ""])


def write_csv(path: Path, tables: Sequence[Table]) -> None:
    """Write the records of several tables of one kind as one CSV, at full precision."""
    records = [{**row.record, "stamps": "; ".join(row.stamps)} for table in tables for row in table.rows]
    pd.DataFrame(records).to_csv(path, index=False, errors="backslashreplace")


# -- text of figures ----------------------------------------------------------------------------------------------


def number(value: float | None, digits: int) -> Cell:
    """A figure with so many decimals; a dash where there is none."""
    if value is None or math.isnan(value):
        return NONE
    return Cell(f"{value:,.{digits}f}".replace("-", MINUS), value)


def percent(value: float | None, digits: int = 2) -> Cell:
    """A share in per cent."""
    return number(None if value is None else 100 * value, digits)


def mean_std(mean: float, std: float) -> Cell:
    """A share in per cent with its standard deviation, where there are runs enough for one."""
    text = percent(mean).text + ("" if math.isnan(std) else f" ± {percent(std).text}")
    return Cell(text, None if math.isnan(mean) else mean)


def interval(low: float, high: float) -> Cell:
    """An interval of shares in per cent."""
    return NONE if math.isnan(low) else Cell(f"{percent(low).text} to {percent(high).text}", low)


def words(text: str) -> Cell:
    """Plain text."""
    text = writable(text)
    return Cell(text, text.lower())


def writable(text: str) -> str:
    """Text as UTF-8 can write it: what of a file's name is none is shown escaped."""
    return text.encode(errors="backslashreplace").decode()


def markdown(text: str) -> str:
    """Text as Markdown shows it: nothing in it is markup."""
    for mark in ("\\", "|", "<", "`", "*", "_"):
        text = text.replace(mark, "&lt;" if mark == "<" else f"\\{mark}")
    return " ".join(text.split())


def inert(text: str) -> str:
    """Text whose HTML, table cells and lines do not act in Markdown, for pages that use other marks of Markdown."""
    return " ".join(text.replace("<", "&lt;").replace("|", "\\|").split())


_LATEX = {
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    DASH: "--",
    "·": r"$\cdot$",
    "±": r"$\pm$",
    MINUS: "$-$",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(mark, mark) for mark in text)


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(_latex(cell) for cell in cells) + r" \\"
