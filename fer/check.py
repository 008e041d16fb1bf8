"""``python -m fer.check``: what is wrong with a data set on disk, for people as a table and for programs as JSON.

python -m fer.check data=fer2013 data.root=/path/to/fer2013 report=fer2013.json

Exit code 0: clean; 1: there are findings; 2: the data cannot be used or the command is mistyped.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fer.config import CONF, USER_MISTAKE, argument_problems, check_command_line, guarded, resolved
from fer.errors import UserError

CONFIG = "check"
CLEAN, FINDINGS = 0, 1
NAMED = 3  # images of a group that the table names


def run(config: DictConfig) -> int:
    """Check one data set, print the table and write the report.

    Returns:
        The exit code.

    Raises:
        UserError: anything the user can mend, all problems of the config at once.
    """
    plain = resolved(config)
    problems = argument_problems({"data": plain["data"]}) + _value_problems(plain)
    if problems:
        raise UserError("\n".join(problems))

    from hydra.utils import instantiate

    from fer.data.base import ExpressionDataModule
    from fer.data.inspection import inspect
    from fer.runs import write_bytes

    path = None if plain["report"] is None else Path(plain["report"])
    if path is not None:
        _writable(path.parent)
    data = instantiate(config.data)
    if not isinstance(data, ExpressionDataModule):
        raise UserError(f"data._target_={plain['data']['_target_']} is no data set: expected an ExpressionDataModule")
    report = {"data": plain["data_name"], **inspect(data)}
    tell(report, plain["shown"])
    if path is not None:
        # A file name that is no valid text becomes an escape, which JSON has.
        write_bytes(path, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
        print(f"report: {path}")
    if not report["readable"]:
        return USER_MISTAKE
    return FINDINGS if report["findings"] else CLEAN


def _value_problems(plain: dict[str, Any]) -> list[str]:
    problems = []
    report, shown = plain["report"], plain["shown"]
    if report is not None and (not isinstance(report, str) or not report or Path(report).is_dir()):
        problems.append(f"report={report}: expected the name of a JSON file to write")
    if isinstance(shown, bool) or not isinstance(shown, int) or shown < 0:
        problems.append(f"shown={shown}: expected how many entries of a list to print, 0 or more")
    return problems


def _writable(folder: Path) -> None:
    """Make the report's folder; known before the images are read."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"report: the folder {folder} cannot be made ({error.strerror}); choose another") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"report: the folder {folder} cannot be written to; choose another")


def _legible(text: str) -> str:
    """Text without what would act on a terminal or cannot be printed."""
    return text if text.isprintable() else ascii(text)[1:-1]


def tell(report: dict[str, Any], shown: int) -> None:
    """Print a report: counts beside the official ones, then what was looked for and what was found."""
    # In a log file there is no terminal to ask for its width.
    console = Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "120")), highlight=False)
    where = f" in {report['root']}" if report["root"] else ""
    console.print(_legible(f"{report['title']}: {report['form']}{where}"), markup=False, soft_wrap=True)
    console.print(_count_table(report))
    console.print()
    console.print(_finding_table(report, shown))
    for warning in report["warnings"]:
        console.print(f"note: {_legible(warning)}", markup=False)
    if not report["readable"]:
        console.print("unusable: no image can be read", style="bold red")
    elif report["findings"]:
        console.print(f"findings: {'; '.join(report['findings'])}", style="bold", markup=False)
    else:
        console.print("clean", style="bold green")


def _count_table(report: dict[str, Any]) -> Table:
    """Classes by parts, each beside its official count."""
    table = Table(box=None, header_style="bold", padding=(0, 1))
    table.add_column("images")
    parts = list(dict.fromkeys([*report["counts"], *report["official"]]))
    for part in parts:
        table.add_column(part, justify="right")
        if part in report["official"]:
            table.add_column("official", justify="right", style="dim")

    def row(name: str, classes: list[str]) -> None:
        cells = []
        for part in parts:
            have = sum(report["counts"].get(part, {}).get(c, 0) for c in classes)
            official = report["official"].get(part)
            want = None if official is None else sum(official.get(c, 0) for c in classes)
            cells.append(f"{have:,}" if want in (None, have) else f"[red]{have:,}[/]")
            if want is not None:
                cells.append(f"{want:,}")
        table.add_row(escape(_legible(name)), *cells)

    for name in report["classes"]:
        row(name, [name])
    row("all", report["classes"])
    return table


def _finding_table(report: dict[str, Any], shown: int) -> Table:
    """What was looked for, how much of it was found, and the first of it."""
    table = Table(box=None, header_style="bold", padding=(0, 1))
    table.add_column("looked for")
    table.add_column("found", justify="right")
    table.add_column(f"the first {shown}" if shown else "", overflow="fold")

    def row(what: str, number: int, lines: list[str], harmless: bool = False) -> None:
        text = escape("\n".join(_legible(line) for line in lines[:shown]))
        table.add_row(what, f"{number:,}" if harmless or not number else f"[red]{number:,}[/]", text)

    def named(entries: list[dict[str, str]]) -> list[str]:
        return [": ".join(entry.values()) for entry in entries]

    def groups(members: list[dict[str, list[str]]], key: str) -> list[str]:
        lines = []
        for group in members:
            names = [f"{item} ({what})" for item, what in zip(group["items"], group[key], strict=True)]
            more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
            lines.append(", ".join(names[:NAMED]) + more)
        return lines

    row("counts that differ", len(report["count_differences"]), report["count_differences"])
    row("left out", len(report["skipped"]), named(report["skipped"]))
    row("unreadable", len(report["unreadable"]), named(report["unreadable"]))
    row("constant", len(report["constant"]), named(report["constant"]))
    row("unusual", len(report["unusual"]), named(report["unusual"]))
    duplicates, conflicts = report["duplicates"], report["conflicts"]
    row("exact duplicates", duplicates["excess"], groups(duplicates["members"], "parts"))
    for part, number in duplicates["within"].items():
        row(f"  within {part}", number, [])
    for entry in duplicates["across"]:
        row("  {1} images also in {0}".format(*entry["parts"]), entry["images"], [])
    row("conflicting labels", conflicts["images"], groups(conflicts["members"], "classes"))
    near = report["near_duplicates"]
    row("near duplicates", sum(len(group["items"]) for group in near), groups(near, "parts"), harmless=True)
    for entry in report["near_across"]:
        row("  {1} images nearly in {0}".format(*entry["parts"]), entry["images"], [], harmless=True)
    for where, number in report["shared"].items():
        row(where, number, [])
    return table


@hydra.main(config_path=str(CONF), config_name=CONFIG, version_base="1.3")
def _job(config: DictConfig) -> None:
    try:
        code = guarded(lambda: run(config))
    except Exception:  # Hydra's code for it would be 1, which stands for findings
        traceback.print_exc()
        code = USER_MISTAKE
    sys.exit(code)


def main() -> None:
    """The command."""
    try:
        check_command_line(CONFIG, sys.argv[1:])
    except SystemExit as stop:  # 1 for a mistyped option
        sys.exit(USER_MISTAKE if stop.code else CLEAN)
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        print("error: fer.check looks at one data set at a time, without -m", file=sys.stderr)
        sys.exit(USER_MISTAKE)
    try:
        _job()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
