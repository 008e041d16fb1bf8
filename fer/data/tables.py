"""What the readers share: finding the form on disk, and reading csv files as they really circulate."""

import bz2
import csv
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fer.data.images import subfolders
from fer.errors import UserError

Skipped = list[tuple[str, str]]

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
