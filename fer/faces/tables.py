"""What a preparation remembers from one start to the next: csv files that survive a kill, and file names in use."""

import csv
import hashlib
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

from fer.data.images import EXTENSIONS
from fer.errors import UserError
from fer.runs import write_bytes

Row = dict[str, str]


def write_changed(path: Path, text: str) -> None:
    """Write a text file at once; one that says so already keeps its modification time, and what is built on it."""
    content = text.encode(errors="surrogateescape")
    if not path.exists() or path.read_bytes() != content:
        write_bytes(path, content)


class Table:
    """A csv file that grows by whole lines; a line cut by a kill is dropped when it is opened again.

    Attributes:
        rows: the row of each item.

    Raises:
        UserError: the file has other columns.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path, self.columns = path, columns
        self.rows: dict[str, Row] = {}
        self._text = path.read_bytes().decode(errors="surrogateescape") if path.exists() else ""
        whole = self._text[: self._text.rfind("\n") + 1]
        lines = csv.DictReader(io.StringIO(whole, newline=""))
        if whole and tuple(lines.fieldnames or ()) != columns:
            raise UserError(
                f"{path}: expected the columns {','.join(columns)}; remove the file to do its pictures anew"
            )
        for row in lines:
            if None not in row and None not in row.values():
                self.rows[row["item"]] = row

    def add(self, row: Row) -> None:
        """Append a row, in memory and in the file."""
        if not self.path.exists() or not self._text.endswith("\n"):
            self.write(self.rows)
        self.rows[row["item"]] = row
        line = self._lines([row])
        with self.path.open("ab") as file:
            file.write(line.encode(errors="surrogateescape"))
        self._text = line

    def write(self, items: Iterable[str]) -> None:
        """Replace the file by the rows of ``items`` in that order; a file that says so already is left alone."""
        self._text = ",".join(self.columns) + "\n" + self._lines([self.rows[item] for item in items])
        write_changed(self.path, self._text)

    def _lines(self, rows: Iterable[Row]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(rows)
        return text.getvalue()


class Names:
    """File names in the new root: the picture's own, with a hash of the item where that is taken."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = {name.lower() for name in taken}  # some file systems do not tell A from a

    def new(self, folder: str, item: str) -> str:
        """``<folder>/<name>.png``, not used before."""
        stem, extension = os.path.splitext(item.replace("\\", "/").rpartition("/")[2])
        if extension.lower() not in EXTENSIONS:
            stem += extension
        stem = re.sub(r"[^\w.-]+", "_", stem).lstrip(".")[:60] or "face"
        name = f"{folder}/{stem}.png"
        if name.lower() in self._taken:
            name = f"{folder}/{stem}-{hashlib.sha256(item.encode(errors='surrogateescape')).hexdigest()[:12]}.png"
        self._taken.add(name.lower())
        return name
