"""Images written as numbers in a csv, as FER2013 has them and those modelled on it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fer.data.base import ExpressionDataModule, Image
from fer.data.images import BadImage
from fer.data.manifest import Array, Manifest
from fer.data.tables import Skipped, plain_name, read_rows
from fer.errors import UserError

SIDE = 48
PIXEL_COLUMNS = ("emotion", "pixels", "usage")


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
