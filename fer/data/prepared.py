"""Where faces lie in crops made by ``python -m fer.prepare``: its ``manifest.csv``, read beside the images."""

from pathlib import Path

import numpy as np

from fer.data.images import safe_join
from fer.data.manifest import Array
from fer.data.tables import read_header, read_rows
from fer.errors import UserError
from fer.faces.align import move_box, move_points

COLUMNS = ("file", "box", "landmarks", "transform")


def prepared_places(root: Path, item: Array) -> tuple[Array, Array] | None:
    """Face boxes (N, 4) and five landmarks (N, 5, 2) of crops, in their pixels, NaN where unknown.

    Args:
        root: the data root; its ``manifest.csv`` counts when it has the columns of a preparation.
        item: (N,) images, relative to the root.

    Returns:
        None where there is no such file, or it knows no landmarks.

    Raises:
        UserError: a row's numbers cannot be read.
    """
    path = root / "manifest.csv"
    if not path.is_file() or read_header(path, COLUMNS) != set(COLUMNS):
        return None
    row_of = {name: row for row, name in enumerate(item.tolist())}
    box, landmarks = np.full((len(item), 4), np.nan), np.full((len(item), 5, 2), np.nan)
    for number, values in read_rows(path, COLUMNS, [], required=COLUMNS):
        where = f"{path}, row {number}"
        row = row_of.get(safe_join(root, values["file"], where).relative_to(root).as_posix())
        if row is None:
            continue
        transform = _numbers(values["transform"], 6, where).reshape(2, 3)
        if values["landmarks"]:
            landmarks[row] = move_points(_numbers(values["landmarks"], 10, where).reshape(5, 2), transform)
        if values["box"]:
            # The transform counts from the centre of the first pixel, a box from the image's corner.
            half = np.array([0.5, 0.5, 0, 0])
            box[row] = move_box(_numbers(values["box"], 4, where) - half, transform) + half
    if not np.isfinite(landmarks).any():
        return None
    return box.astype(np.float32), landmarks.astype(np.float32)


def _numbers(text: str, count: int, where: str) -> Array:
    try:
        values = np.array(text.split(), dtype=np.float64)
    except ValueError:
        values = np.empty(0)
    if len(values) != count:
        raise UserError(f"{where}: expected {count} numbers, found {text[:60]!r}; prepare the images again")
    return values
