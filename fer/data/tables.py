"""What the readers share: finding the form on disk, and reading csv files as they really circulate."""

import bz2
import csv
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fer.data.base import ExpressionDataModule, Image
from fer.data.images import BadImage, subfolders
from fer.data.manifest import Manifest
from fer.errors import UserError

Array = np.ndarray[Any, Any]
Skipped = list[tuple[str, str]]

SIDE = 48  # FER2013's images, and those of the csv files modelled on it, are 48 x 48
MAX_LINE = 10_000_000  # letters; a small compressed file could unpack to one line without end
_COMPRESSIONS = (".xz", ".gz", ".bz2", ".zip")
_UNREADABLE = (
    EOFError,
    OSError,
    lzma.LZMAError,
    zlib.error,
    zipfile.BadZipFile,
    csv.Error,
)


def find_form(
    root: Path, form: str, detectors: Mapping[str, Callable[[Path], bool]], depth: int = 1
) -> tuple[str, Path] | None:
    """Find which form of a data set lies under ``root`` or up to ``depth`` folders deeper, by content.

    Args:
        root: the data root.
        form: ``auto``, or the only form to look for.
        detectors: for each form, whether a folder holds it.
        depth: how many levels of folders are looked into; the highest that has a form wins.

    Returns:
        The form and its folder, or None where nothing is recognised.

    Raises:
        UserError: an unknown ``form``, or several forms or folders that fit equally.
    """
    if form not in ("auto", *detectors):
        raise UserError(f"data.form={form} is unknown: use auto or one of {', '.join(detectors)}")
    wanted = {name: fits for name, fits in detectors.items() if form in ("auto", name)}
    level = [root]
    for step in range(depth + 1):
        if step:
            level = [below for folder in level for below in subfolders(folder)]
        found = [(name, folder) for folder in level for name, fits in wanted.items() if fits(folder)]
        names = sorted({name for name, _ in found})
        if len(names) > 1:
            choices = " or ".join(f"data.form={name}" for name in names)
            raise UserError(f"{root}: several forms of this data set fit equally; choose {choices}")
        if len(found) > 1:
            folders = ", ".join(str(folder) for _, folder in found)
            raise UserError(f"{root}: the same form lies in several folders ({folders}); set data.root to one of them")
        if found:
            return found[0]
    return None


def check_option(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value of ``data.<name>`` that is not among ``choices``."""
    if value not in choices:
        raise UserError(f"data.{name}={value} is unknown: use one of {', '.join(map(str, choices))}")


def plain_name(path: Path) -> str:
    """File name without the compression: ``fer2013.csv.xz -> fer2013.csv``."""
    return path.stem if path.suffix.lower() in _COMPRESSIONS else path.name


def csv_files(folder: Path) -> list[Path]:
    """Every csv in ``folder``, compressed or not, a plain copy before a compressed one."""
    files = [path for path in folder.iterdir() if plain_name(path).lower().endswith(".csv") and path.is_file()]
    return sorted(
        files,
        key=lambda path: (
            plain_name(path),
            path.suffix.lower() in _COMPRESSIONS,
            path.name,
        ),
    )


def open_text(path: Path) -> io.TextIOWrapper:
    """Open a text file, unpacking xz, gzip, bzip2 and zip (told apart by content), dropping a byte order mark.

    Bytes that are not UTF-8 survive as surrogates, so that a name in such a file still finds its file on disk.
    """
    with path.open("rb") as raw:
        magic = raw.read(6)
    openers: dict[bytes, Callable[[Path], Any]] = {
        b"\xfd7zXZ": lzma.open,
        b"\x1f\x8b": gzip.open,
        b"BZh": bz2.open,
        b"PK\x03\x04": _open_zip,
    }
    fits = [opener for start, opener in openers.items() if magic.startswith(start)]
    stream = fits[0](path) if fits else path.open("rb")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _open_zip(path: Path) -> Any:
    archive = zipfile.ZipFile(path)
    members = [name for name in archive.namelist() if name.lower().endswith(".csv")]
    if len(members) != 1:
        raise UserError(f"{path}: expected one csv in the zip, found {len(members)}; unpack the one to be read")
    return archive.open(members[0])


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    """The lines of a text, none longer than any table's."""
    while line := text.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise csv.Error(f"a line is longer than {MAX_LINE:,} letters")
        yield line


def _split_first_line(line: str, columns: Sequence[str]) -> tuple[str, list[str]]:
    """Delimiter and fields of the first line: the delimiter that yields most known column names, or their number."""

    def fit(delimiter: str) -> tuple[int, bool]:
        fields = _names(next(csv.reader([line], delimiter=delimiter), []))
        return sum(name in columns for name in fields), len(fields) == len(columns)

    delimiter = max(",;\t", key=fit)
    return delimiter, next(csv.reader([line], delimiter=delimiter), [])


def _names(fields: Sequence[str]) -> list[str]:
    return [field.strip().lower() for field in fields]


def read_header(path: Path, columns: Sequence[str]) -> set[str]:
    """The names among ``columns`` that the first line of a csv has; empty where it has no header."""
    try:
        with open_text(path) as text:
            fields = _split_first_line(text.readline(MAX_LINE), columns)[1]
    except _UNREADABLE:
        return set()
    return set(_names(fields)) & set(columns)


def read_rows(
    path: Path,
    columns: Sequence[str],
    skipped: Skipped,
    *,
    required: Sequence[str] = (),
    headerless: bool = False,
) -> Iterator[tuple[int, dict[str, str]]]:
    """Read a csv row by row, whatever its line ends, delimiter, quoting, header case and column order.

    Args:
        path: the csv, compressed or not.
        columns: the names to look for, lower case, in the order a copy without header has them.
        skipped: gets (``file.csv:row``, reason) for each row with too few or too many fields.
        required: names that must be there.
        headerless: whether a first line without any of the names is a row.

    Yields:
        The row number, counted from 0 after the header, and its fields by column name, empty where the file lacks
        the column. Empty lines are passed over.

    Raises:
        UserError: the file is damaged or empty, a required column is missing, or a column occurs twice.
    """
    try:
        with open_text(path) as text:
            first = text.readline(MAX_LINE)
            delimiter, fields = _split_first_line(first, columns)
            names = _names(fields)
            has_header = any(name in columns for name in names)
            if not has_header and headerless and first.strip():
                names = list(columns)
                text.seek(0)
            missing = [name for name in required if name not in names]
            if missing or not (has_header or headerless) or not first.strip():
                wanted = ", ".join(required or columns)
                raise UserError(
                    f"{path}: expected the columns {wanted} in the first line, found {first.strip()[:80]!r}"
                )
            if len(set(names)) < len(names):
                raise UserError(f"{path}: the header names a column twice ({', '.join(names)}); remove one of them")
            position = {name: names.index(name) for name in columns if name in names}
            blank = dict.fromkeys(columns, "")
            for row, values in enumerate(csv.reader(_lines(text), delimiter=delimiter, skipinitialspace=True)):
                if len(values) == len(names):
                    yield (
                        row,
                        blank | {name: values[i].strip() for name, i in position.items()},
                    )
                elif values:
                    skipped.append(
                        (
                            f"{plain_name(path)}:{row}",
                            f"{len(values)} fields, expected {len(names)}",
                        )
                    )
    except _UNREADABLE as error:
        raise UserError(f"{path}: cannot be read to its end ({error}); fetch it again") from error


@dataclass(frozen=True)
class PixelTable:
    """A csv that holds its images as text, as fer2013.csv does; N readable rows.

    Attributes:
        name: file name without compression.
        rows: how many rows the file has, readable or not.
        row: (N,) int64, row numbers, ascending.
        emotion: (N,) int64.
        usage: (N,) str, the ``Usage`` column; empty strings where there is none.
        pixels: (N, 48, 48) uint8.
        skipped: (``file.csv:row``, reason) of the other rows.
    """

    name: str
    rows: int
    row: Array
    emotion: Array
    usage: Array
    pixels: Array
    skipped: Skipped

    @property
    def item(self) -> Array:
        """(N,) str, ``file.csv:row``."""
        return np.array([f"{self.name}:{row}" for row in self.row], dtype=str)


PIXEL_COLUMNS = ("emotion", "pixels", "usage")


def read_pixel_table(path: Path, classes: int, usages: Sequence[str] | None = None) -> PixelTable:
    """Read the images of a csv with the columns ``emotion``, ``pixels`` and, where there is one, ``Usage``.

    Args:
        path: the csv, compressed or not.
        classes: labels must lie in 0 to ``classes - 1``.
        usages: the values ``Usage`` may have; None for any.
    """
    skipped: Skipped = []
    rows, labels, usage, pixels = [], [], [], bytearray()
    last = -1
    for last, values in read_rows(path, PIXEL_COLUMNS, skipped, required=("emotion", "pixels")):
        try:
            label = _label(values["emotion"], classes)
            if usages is not None and values["usage"] not in usages:
                raise ValueError(f"Usage {values['usage']!r} is none of {', '.join(usages)}")
            image = _pixels(values["pixels"])
        except ValueError as error:
            skipped.append((f"{plain_name(path)}:{last}", str(error)))
            continue
        rows.append(last)
        labels.append(label)
        usage.append(values["usage"])
        pixels += image
    if not rows:
        first = f", the first: {skipped[0][1]}" if skipped else ""
        raise UserError(f"{path}: none of its {last + 1} rows is an image that can be read{first}; fetch it again")
    total = max([last, *(int(item.rpartition(":")[2]) for item, _ in skipped)]) + 1
    return PixelTable(
        name=plain_name(path),
        rows=total,
        row=np.array(rows, dtype=np.int64),
        emotion=np.array(labels, dtype=np.int64),
        usage=np.array(usage, dtype=str),
        pixels=np.frombuffer(pixels, dtype=np.uint8).reshape(-1, SIDE, SIDE),
        skipped=skipped,
    )


def _label(text: str, classes: int) -> int:
    if not text.isdecimal() or int(text) >= classes:
        raise ValueError(f"label {text!r} is not a whole number from 0 to {classes - 1}")
    return int(text)


def _pixels(text: str) -> bytes:
    # Only digits and blanks, so that NumPy's fast parser, which stops at anything else, reads to the end.
    digits = text.replace(" ", "")
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError("a pixel is not a whole number from 0 to 255")
    values = np.fromstring(text, dtype=np.int64, sep=" ")
    if len(values) != SIDE * SIDE:
        raise ValueError(f"{len(values)} pixels, expected {SIDE * SIDE}")
    if values.max() > 255:
        raise ValueError(f"a pixel is {values.max()}, expected at most 255")
    return values.astype(np.uint8).tobytes()


class PixelTableModule(ExpressionDataModule):
    """A data set that has a form whose images lie in csv files instead of one file each."""

    _tables: dict[str, PixelTable] | None = None  # by name, filled by `manifest`; FER2013 needs 83 MB

    def images(self, manifest: Manifest, rows: Array) -> Iterator[Image | BadImage]:
        """Yield the image of each row, out of the csv files where the form has them."""
        if self._tables is None:  # a manifest read back from the store
            self.manifest()
        if not self._tables:
            yield from super().images(manifest, rows)
            return
        for item in manifest.item[rows]:
            name, _, row = str(item).rpartition(":")
            table = self._tables[name]
            yield table.pixels[np.searchsorted(table.row, int(row))]
