"""``python -m fer.reporting.outputs FOLDER ...``: pages that commands wrote, quoted in the documentation.

A folder is what ``python -m fer.evaluate output=FOLDER`` or ``python -m fer.export output=FOLDER int8=true`` wrote; the
quotation bears its name. Its text goes to docs/results/outputs, its charts to docs/figures, and
``<!-- output NAME -->`` shows both.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from fer.config import CONF
from fer.errors import UserError
from fer.reporting.results import hardware_of
from fer.runs import read_json, write_json

DOCS = CONF.parent / "docs"
RECORDS = DOCS / "results" / "outputs"
FIGURES = DOCS / "figures"
_PAGES = {"evaluation.md": "results.json", "export.md": "export.json"}  # a command's page, and its record
_PICTURE = re.compile(r"!\[(\w+)\]\((\w+)\.png\)")


def update(folders: list[Path], records: Path = RECORDS, figures: Path = FIGURES) -> None:
    """Keep the pages of folders.

    Raises:
        UserError: no such page in a folder.
    """
    records.mkdir(exist_ok=True)
    for folder in folders:
        pages = [name for name in _PAGES if (folder / name).is_file()]
        if not pages:
            raise UserError(
                f"{folder} has neither {' nor '.join(_PAGES)}: expected the output of python -m fer.evaluate, or of "
                "python -m fer.export with int8=true"
            )
        record, text = read_json(folder / _PAGES[pages[0]]), (folder / pages[0]).read_text()
        for _, picture in _PICTURE.findall(text):
            shutil.copyfile(folder / f"{picture}.png", figures / f"{folder.name}-{picture}.png")
        kept: dict[str, Any] = {key: record[key] for key in ("command", "git_commit", "cpu_seconds")}
        write_json(
            records / f"{folder.name}.json", {**kept, "hardware": hardware_of(record), "page": text.splitlines()}
        )


def section(name: str, records: Path = RECORDS) -> str:
    """A kept page without its title, its headings two levels down, and what it cost."""
    path = records / f"{name}.json"
    if not path.is_file():
        return "Not measured yet."
    kept = read_json(path)
    page = "\n".join(line for line in kept["page"] if not line.startswith("# ")).strip()
    page = _PICTURE.sub(rf"![\1](figures/{name}-\2.png)", re.sub(r"^## ", "#### ", page, flags=re.MULTILINE))
    cost = f"{kept['cpu_seconds'] / 60:.1f} core-minutes, {kept['hardware']}, commit {kept['git_commit']}"
    command = "" if f"`{kept['command']}`" in page else f"\n\n`{kept['command']}`"
    return f"{page}{command}\n\n{cost}."


if __name__ == "__main__":
    from fer.reporting.manual import from_runs  # which reads this module

    from_runs(__doc__, update)
