"""FER+: FER2013's images with the votes of ten people each over eight expressions, unknown and no-face.

E. Barsoum, C. Zhang, C. Canton Ferrer, Z. Zhang, "Training Deep Networks for Facial Expression Recognition with
Crowd-Sourced Label Distribution", ICMI 2016; labels at github.com/microsoft/FERPlus (MIT). How votes become a label
follows section 3 of the paper and the official reader.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

import numpy as np

from fer.data.base import DataOptions
from fer.data.fer2013 import REQUEST, full_tables, read_full_table
from fer.data.images import list_images, listed_images
from fer.data.manifest import Array, Manifest
from fer.data.pixel_tables import PixelTableModule
from fer.data.tables import Skipped, check_option, csv_files, find_form, read_header, read_rows
from fer.errors import UserError

CLASSES = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
MODES = ("majority", "probability", "crossentropy", "multi_target", "argmax", "argmax8")
_VOTES = (*CLASSES, "unknown", "nf")
_NEW_COLUMNS = ("usage", "image name", *_VOTES)  # fer2013new.csv
_LABEL_COLUMNS = ("image name", "box", *_VOTES)  # label.csv, which has no header
_PARTS = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}
_FOLDERS = {"Train": "train", "Valid": "val", "Test": "test"}  # FER2013Train/, ferplus_label_Train.csv ...

_PROBABILITY = {
    "train": (10122, 7503, 3524, 3430, 2407, 169, 641, 160),
    "val": (1317, 897, 450, 401, 314, 31, 72, 23),
    "test": (1251, 925, 435, 435, 320, 22, 92, 25),
}
OFFICIAL = {  # counted with the rules below on the published files
    ("fer2013new", "majority"): {
        "train": (8740, 7287, 3149, 3014, 2100, 119, 532, 119),
        "val": (1182, 865, 415, 351, 287, 24, 62, 13),
        "test": (1090, 893, 396, 384, 273, 18, 83, 16),
    },
    ("label_csv", "majority"): {
        "train": (8733, 7284, 3136, 3022, 2098, 116, 536, 120),
        "val": (1180, 862, 411, 348, 289, 25, 60, 16),
        "test": (1083, 892, 394, 382, 269, 16, 86, 15),
    },
    ("fer2013new", "probability"): _PROBABILITY,
    ("fer2013new", "crossentropy"): _PROBABILITY,
    ("fer2013new", "multi_target"): {
        "train": (10071, 7492, 3486, 3399, 2327, 153, 598, 145),
        "val": (1307, 893, 446, 400, 307, 30, 71, 18),
        "test": (1243, 921, 438, 434, 302, 21, 90, 23),
    },
    ("fer2013new", "argmax"): {
        "train": (10309, 7528, 3562, 3515, 2467, 191, 652, 165),
        "val": (1335, 899, 456, 412, 319, 34, 74, 24),
        "test": (1262, 928, 444, 444, 325, 23, 93, 27),
    },
    ("fer2013new", "argmax8"): {
        "train": (10388, 7539, 3588, 3549, 2478, 194, 656, 167),
        "val": (1347, 899, 459, 418, 320, 36, 75, 25),
        "test": (1278, 929, 446, 448, 326, 23, 94, 29),
    },
}


class FERPlus(PixelTableModule):
    """FER+; the images come from fer2013.csv (or icml_face_data.csv), or from the folders the official script writes.

    A vote for a class that nobody else voted for is taken as a slip and set to 0; S is the sum of the other votes.

    Args:
        form: ``auto``, ``csv`` or ``folders``.
        labels: ``fer2013new``: the votes of fer2013new.csv; ``label_csv``: those of the three label.csv, which differ
            on 1,602 rows.
        mode: how votes become what training learns of an image. The label is the class with the most votes that the
            mode keeps, but for ``probability``.

            - ``majority``: the class with more than S / 2 votes.
            - ``probability``, ``crossentropy``: the top classes that make up 0.75 S, three at most. ``probability``
              draws the label from them by their votes, anew in every epoch, by (seed, epoch, row); for
              ``crossentropy`` the paper's loss is ``loss=soft``, of the whole distribution.
            - ``multi_target``: all classes with at least 0.3 S, any of which is right; for ``loss=multi_target``.
            - ``argmax``: most votes of all ten columns; ``argmax8``: most votes of the eight expressions.
        eval_mode: the same for validation and test images; the official protocol always reads these by ``majority``.
        options: see `DataOptions`.
    """

    title = "FER+"
    expected_tree = """\
fer2013.csv | icml_face_data.csv      plain or .xz .gz .bz2 .zip
fer2013new.csv                        the votes, in the same row order
ferplus_label_{Train,Valid,Test}.csv  only for data.labels=label_csv
or
FER2013{Train,Valid,Test}/fer0000000.png, label.csv"""
    request = f"github.com/microsoft/FERPlus (votes); images: {REQUEST}"

    def __init__(self, *, form: str, labels: str, mode: str, eval_mode: str, **options: Unpack[DataOptions]) -> None:
        super().__init__(**options)
        check_option("labels", labels, ("fer2013new", "label_csv"))
        check_option("mode", mode, MODES)
        check_option("eval_mode", eval_mode, MODES)
        self.form, self.labels, self.mode, self.eval_mode = form, labels, mode, eval_mode
        self.manifest_options = {"form": form, "labels": labels, "mode": mode, "eval_mode": eval_mode}

    def manifest(self) -> Manifest:
        """Read images' names and votes, and turn votes into labels.

        Raises:
            UserError: images or votes are missing, or they do not belong together.
        """
        detectors = {
            "csv": lambda folder: bool(full_tables(folder)) and _votes_file(folder) is not None,
            "folders": lambda folder: any((folder / f"FER2013{name}").is_dir() for name in _FOLDERS),
        }
        found = find_form(Path(self.root), self.form, detectors)
        if found is None:
            raise self.missing(
                "fer2013new.csv beside fer2013.csv, or the folders FER2013Train, FER2013Valid, FER2013Test"
            )
        form, folder = found
        return self._from_csv(folder) if form == "csv" else self._from_folders(folder)

    def _fields(self) -> dict[str, Array]:
        """What the mode's training needs besides."""
        fields = super()._fields()
        if self.mode == "probability":
            fields["cumulative"] = cumulative(fields["soft"])
        elif self.mode == "multi_target":
            fields["accepted"] = fields["soft"] > 0
        return fields

    def _from_csv(self, folder: Path) -> Manifest:
        table = read_full_table(folder)
        self._tables = {table.name: table}
        skipped: Skipped = list(table.skipped)
        new = {row: (usage, name, votes) for row, usage, name, votes in self._read_new(folder, skipped)}
        rows = max(new, default=-1) + 1
        if rows != table.rows:
            raise UserError(
                f"{_votes_file(folder)}: {rows} rows of votes for {table.rows} images of {table.name}; the two are "
                "matched row by row, so fetch both complete"
            )
        if self.labels == "label_csv":
            by_name = {name: votes for _, name, votes in self._read_labels(folder, skipped)}
            # The official script writes the images under these names in row order, so a repeated name is its last row.
            row_of = {name: row for row, (_, name, _) in new.items()}
            votes_of = {row_of[name]: votes for name, votes in by_name.items() if name in row_of}
        else:
            votes_of = {row: votes for row, (_, _, votes) in new.items()}
        keep = np.zeros(len(table.row), dtype=bool)
        for i, (row, usage) in enumerate(zip(table.row.tolist(), table.usage.tolist(), strict=True)):
            if row in new and new[row][0] != usage:
                raise UserError(
                    f"{_votes_file(folder)}: row {row} is {new[row][0]}, but {usage} in {table.name}; the two files do "
                    "not belong together, fetch both from their sources again"
                )
            keep[i] = row in votes_of
            if not keep[i]:
                skipped.append((f"{table.name}:{row}", f"no votes in {self.labels}"))
        votes = np.array([votes_of[row] for row in table.row[keep].tolist()], dtype=np.float64).reshape(-1, len(_VOTES))
        part = np.array([_PARTS[usage] for usage in table.usage[keep].tolist()], dtype=str)
        return self._finish(f"{table.name} + {self.labels}", table.item[keep], part, votes, skipped)

    def _from_folders(self, folder: Path) -> Manifest:
        self._tables = {}
        skipped: Skipped = []
        if self.labels == "label_csv":
            votes_of = {(part, name): votes for part, name, votes in self._read_labels(folder, skipped)}
        else:
            votes_of = {(_PARTS[u], name): votes for _, u, name, votes in self._read_new(folder, skipped)}
        items, parts, votes = [], [], []
        for name, part in _FOLDERS.items():
            directory = folder / f"FER2013{name}"
            files, left_out = list_images(directory) if directory.is_dir() else ([], [])
            if files:
                listed_images(directory, Path(self.root), directory / "label.csv")
            prefix = directory.relative_to(self.root).as_posix()
            skipped += [(f"{prefix}/{file}", reason) for file, reason in left_out]
            for file in files:
                if (part, file) in votes_of:
                    items.append(f"{prefix}/{file}")
                    parts.append(part)
                    votes.append(votes_of[part, file])
                else:
                    skipped.append((f"{prefix}/{file}", f"no votes in {self.labels}"))
        return self._finish(
            f"FER2013Train/Valid/Test folders + {self.labels}",
            np.array(items, dtype=str),
            np.array(parts, dtype=str),
            np.array(votes, dtype=np.float64).reshape(-1, len(_VOTES)),
            skipped,
        )

    def _read_new(self, folder: Path, skipped: Skipped) -> Iterator[tuple[int, str, str, list[float]]]:
        """(row, usage, image name, ten votes) of fer2013new.csv."""
        path = _votes_file(folder)
        if path is None:
            raise UserError(f"{folder}: no fer2013new.csv; put it there or set data.labels=label_csv")
        for row, values in read_rows(path, _NEW_COLUMNS, skipped, required=_NEW_COLUMNS):
            votes = _numbers(values)
            if votes is None or values["usage"] not in _PARTS:
                skipped.append((f"{path.name}:{row}", "expected a part (Training ...) and ten counts of votes"))
            else:
                yield row, values["usage"], values["image name"], votes

    def _read_labels(self, folder: Path, skipped: Skipped) -> Iterator[tuple[str, str, list[float]]]:
        """(part, image name, ten votes) of the three label.csv."""
        for name, part in _FOLDERS.items():
            inside, beside = folder / f"FER2013{name}" / "label.csv", folder / f"ferplus_label_{name}.csv"
            path = inside if inside.is_file() else beside
            if not path.is_file():
                raise UserError(f"neither {inside} nor {beside} is there; put it there or set data.labels=fer2013new")
            for row, values in read_rows(path, _LABEL_COLUMNS, skipped, headerless=True):
                votes = _numbers(values)
                if votes is None:
                    skipped.append((f"{path.relative_to(folder).as_posix()}:{row}", "expected ten counts of votes"))
                else:
                    yield part, values["image name"], votes

    def _finish(self, form: str, item: Array, part: Array, votes: Array, skipped: Skipped) -> Manifest:
        """Turn votes into labels and leave out what has none."""
        train = part == "train"
        label, soft = np.full(len(item), -1), np.zeros((len(item), len(CLASSES)))
        for rows, mode in ((train, self.mode), (~train, self.eval_mode)):
            label[rows], soft[rows] = labels_from_votes(votes[rows], mode)
        keep = label >= 0
        winner = votes.argmax(axis=1)
        for i in np.flatnonzero(~keep):
            why = {8: "most voters say unknown", 9: "most voters see no face"}
            mode = self.mode if train[i] else self.eval_mode
            skipped.append((str(item[i]), why.get(int(winner[i]), f"votes too spread for mode {mode}")))
        official = {
            name: dict(zip(CLASSES, OFFICIAL[self.labels, mode][name], strict=True))
            for name, mode in (("train", self.mode), ("val", self.eval_mode), ("test", self.eval_mode))
            if (self.labels, mode) in OFFICIAL
        }
        warnings = []
        if self.eval_mode != "majority":
            warnings.append(f"data.eval_mode={self.eval_mode}: the official test part is read by majority")
        return Manifest(
            item=item[keep],
            label=label[keep],
            class_names=CLASSES,
            split=part[keep],
            form=f"{form}, {self.mode} (val and test: {self.eval_mode})",
            soft=soft[keep].astype(np.float32),
            skipped=tuple(skipped),
            warnings=tuple(warnings),
            official=official or None,
        )


def labels_from_votes(votes: Array, mode: str) -> tuple[Array, Array]:
    """Turn votes into labels by the official rules.

    Args:
        votes: (N, 10) votes for the eight classes, unknown and no-face. They need not sum to ten.
        mode: one of `MODES`.

    Returns:
        (N,) int64 label, -1 for images to be left out, and (N, 8) float64 distribution over the classes, which sums
        to 1 for the images kept: what the mode keeps of the votes, for ``majority`` all votes but single ones.
    """
    k = len(CLASSES)
    clean = np.where(votes > 1, votes, 0.0)
    total = clean.sum(axis=1)
    if mode == "majority":
        weight = clean
        keep = clean.max(axis=1, initial=0) > 0.5 * total
    elif mode in ("probability", "crossentropy"):
        patterns, where = np.unique(clean, axis=0, return_inverse=True)
        where = where.reshape(-1)  # NumPy 2.0 alone gives it two dimensions
        weight = np.array([_top_classes(pattern) for pattern in patterns]).reshape(-1, votes.shape[1])[where]
        keep = weight.any(axis=1)
    elif mode == "multi_target":
        weight = np.where(clean >= 0.3 * total[:, None], clean, 0)
        keep = weight.sum(axis=1) > 0.5 * total
    elif mode == "argmax":
        weight = votes
        keep = votes.any(axis=1)
    else:
        weight = np.where(np.arange(votes.shape[1]) < k, votes, 0)
        keep = weight.any(axis=1)
    winner = weight.argmax(axis=1)
    keep &= winner < k  # neither unknown nor no-face wins
    soft = (weight[:, :k] > 0).astype(np.float64) if mode == "multi_target" else weight[:, :k].astype(np.float64)
    soft = np.where(keep[:, None], soft, 0)
    return np.where(keep, winner, -1), soft / np.maximum(soft.sum(axis=1, keepdims=True), 1e-12)


def cumulative(soft: Array) -> Array:
    """(N, K) shares of the classes, summed up to each of them; 1 from the last class with a share on."""
    total = soft.cumsum(axis=1)
    return np.where(total >= total[:, -1:], 1, total).astype(np.float32)


def _top_classes(votes: Array) -> Array:
    """(10,) votes kept by ``probability``: from the top down, ties together; zeros for an image to leave out."""
    kept = np.zeros_like(votes)
    total, taken = votes.sum(), 0.0
    for level in sorted(set(votes[votes > 0]), reverse=True):
        if taken >= 0.75 * total or np.count_nonzero(kept) >= 3:
            break
        for column in np.flatnonzero(votes == level):
            if column >= len(CLASSES):  # unknown and no-face end the list, and win only where nothing is above them
                if not kept.any():
                    return kept
                taken = total
                break
            kept[column] = level
            taken += level
    discard = kept.sum() <= 0.5 * total or np.count_nonzero(kept) > 3
    return np.zeros_like(kept) if discard else kept


def _numbers(values: dict[str, str]) -> list[float] | None:
    """The ten votes of a row, None where one is no count."""
    texts = [values[name] for name in _VOTES]
    return [float(text) for text in texts] if all(text.isdecimal() for text in texts) else None


def _votes_file(folder: Path) -> Path | None:
    """The csv with fer2013new.csv's columns."""
    fits = (path for path in csv_files(folder) if read_header(path, _NEW_COLUMNS) == set(_NEW_COLUMNS))
    return next(fits, None)
