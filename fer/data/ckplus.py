"""CK+: posed expressions filmed from neutral to their peak, 327 labelled sequences of 118 people.

P. Lucey, J. Cohn, T. Kanade, J. Saragih, Z. Ambadar, I. Matthews, "The Extended Cohn-Kanade Dataset (CK+)", CVPR 2010
workshops. No official split: the usual protocol is 10 folds by subject over the last three frames of each sequence.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

import numpy as np

from fer.data.base import DataOptions, class_left_out
from fer.data.images import list_images, subfolders, valid_boxes
from fer.data.manifest import Array, Manifest
from fer.data.pixel_tables import PIXEL_COLUMNS, PixelTableModule, read_pixel_table
from fer.data.tables import Skipped, check_option, csv_files, find_form, read_header, read_rows
from fer.errors import UserError
from fer.labels import canonical, spelled_as

CLASSES = ("neutral", "anger", "contempt", "disgust", "fear", "happiness", "sadness", "surprise")  # codes 0 to 7
SEQUENCES = dict(zip(CLASSES[1:], (45, 18, 59, 25, 69, 28, 83), strict=True))
CSV_CLASSES = ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral", "contempt")  # ckextended.csv
_FRAMES = {"last1": 1, "last3": 3}
_FRAME = re.compile(r"(S\d+)_(\d+)_(\d+)\.\w+$")  # subject, sequence, frame
_CSV_ROWS = 920
_MARGIN = 1.2  # side of the face square over the larger side of the landmarks' extent


class CKPlus(PixelTableModule):
    """CK+ in its release tree, as CK+48, or as ckextended.csv.

    Sequences of expressions that are not among ``class_names`` are left out whole, their neutral frame too.

    Args:
        form: ``auto``, ``official``, ``ck48`` or ``csv``.
        frames: ``last3`` or ``last1``: how many frames from a sequence's end carry its label.
        neutral: whether the first frame of each labelled sequence is taken as neutral (ckextended.csv: its neutral
            rows); ``class_names`` must agree.
        options: see `DataOptions`.
    """

    title = "CK+"
    expected_tree = """\
cohn-kanade-images/S005/001/S005_001_00000011.png
Emotion/S005/001/S005_001_00000011_emotion.txt
Landmarks/S005/001/S005_001_00000011_landmarks.txt    optional, frames are cut to the face with them
or
CK+48/{anger,contempt,disgust,fear,happy,sadness,surprise}/S010_004_00000017.png
or
ckextended.csv"""
    request = "jeffcohn.net (signed agreement, non-commercial)"
    crop_to_box = True

    def __init__(self, *, form: str, frames: str, neutral: bool, **options: Unpack[DataOptions]) -> None:
        super().__init__(**options)
        check_option("frames", frames, tuple(_FRAMES))
        wanted = CLASSES[not neutral :] if self.wanted_classes is None else spelled_as(self.wanted_classes, CLASSES)
        if ("neutral" in wanted) != neutral:
            raise UserError(
                f"data.neutral={str(neutral).lower()} does not fit data.class_names={list(wanted)}: "
                f"{'add' if neutral else 'remove'} neutral there or set data.neutral={str(not neutral).lower()}"
            )
        self.form, self.frames, self.neutral = form, frames, neutral
        self.classes = tuple(name for name in CLASSES if name in wanted)
        self.manifest_options = {"form": form, "frames": frames, "classes": list(self.classes)}

    def manifest(self) -> Manifest:
        """Read the form found under the root.

        Raises:
            UserError: nothing is recognised, several forms fit, or the form lacks the neutral frames asked for.
        """
        detectors = {
            "official": lambda folder: None not in (_tree(folder, ".png"), _tree(folder, "_emotion.txt")),
            "ck48": lambda folder: any(
                _FRAME.match(n) for _, path in _class_folders(folder) for n in list_images(path)[0]
            ),
            "csv": lambda folder: bool(_extended_csv(folder)),
        }
        found = find_form(Path(self.root), self.form, detectors)
        if found is None:
            raise self.missing("cohn-kanade-images/ and Emotion/, class folders with S010_004_00000017.png, or a csv")
        form, folder = found
        self._tables = {}
        return {"official": self._from_release, "ck48": self._from_folders, "csv": self._from_csv}[form](folder)

    def _from_release(self, folder: Path) -> Manifest:
        images, emotions = _tree(folder, ".png"), _tree(folder, "_emotion.txt")
        if images is None or emotions is None:
            raise self.missing("cohn-kanade-images/ and Emotion/")
        skipped: Skipped = []
        paths: list[Path] = []
        names = []
        for path, name in _labels(emotions, Path(self.root), skipped):
            if name not in self.classes:
                skipped.append((path.relative_to(self.root).as_posix(), class_left_out(name)))
                continue
            directory = images / path.parent.relative_to(emotions)
            frames = [file for file in list_images(directory)[0] if _FRAME.match(file)] if directory.is_dir() else []
            if not frames:
                skipped.append((path.relative_to(self.root).as_posix(), "a label without frames"))
                continue
            last = frames[-_FRAMES[self.frames] :]
            if self.neutral and frames[0] not in last:
                last, labels = [frames[0], *last], ["neutral"] + [name] * len(last)
            else:
                labels = [name] * len(last)
            paths += [directory / file for file in last]
            names += labels
        landmarks = _landmarks(_tree(folder, "_landmarks.txt"), images, paths)
        box = None if landmarks is None else _face_boxes(landmarks)
        warning = "no Landmarks/: whole frames are used, face and background" if landmarks is None else ""
        return self._finish("release tree", self._relative(paths), names, skipped, warning, landmarks, box)

    def _from_folders(self, folder: Path) -> Manifest:
        if self.neutral and "neutral" not in {name for name, _ in _class_folders(folder)}:
            raise UserError(f"{folder}: CK+48 has no neutral frames; set data.neutral=false and class_names to match")
        skipped: Skipped = []
        paths: list[Path] = []
        names = []
        for name, directory in _class_folders(folder):
            files, left_out = list_images(directory)
            prefix = directory.relative_to(self.root).as_posix()
            if name not in self.classes:
                skipped += [(f"{prefix}/{file}", class_left_out(name)) for file in files]
                continue
            sequences: dict[str, list[str]] = {}
            skipped += [(f"{prefix}/{file}", reason) for file, reason in left_out]
            for file in files:
                match = _FRAME.match(file)
                if match is None:
                    skipped.append((f"{prefix}/{file}", "the name does not tell subject, sequence and frame"))
                else:
                    sequences.setdefault(f"{match[1]}_{match[2]}", []).append(file)
            for frames in sequences.values():
                kept = frames[-_FRAMES[self.frames] :]
                paths += [directory / file for file in kept]
                names += [name] * len(kept)
        return self._finish("CK+48 class folders", self._relative(paths), names, skipped)

    def _from_csv(self, folder: Path) -> Manifest:
        path = _extended_csv(folder)[0]
        table = read_pixel_table(path, len(CSV_CLASSES))
        self._tables = {table.name: table}
        names = [CSV_CLASSES[label] for label in table.emotion.tolist()]
        keep = np.array([name in self.classes for name in names], dtype=bool)
        left = zip(table.item.tolist(), names, keep.tolist(), strict=True)
        unnamed = [(item, class_left_out(name)) for item, name, kept in left if not kept]
        count = SEQUENCES | {"neutral": 593}
        return Manifest(
            item=table.item[keep],
            label=np.array([self.classes.index(name) for name in names if name in self.classes], dtype=np.int64),
            class_names=self.classes,
            split=np.full(int(keep.sum()), ""),
            form=f"{table.name}, peak frames",
            skipped=(*table.skipped, *unnamed),
            warnings=(
                f"{table.name} names no subjects, so every split has the same people on both sides (so has its Usage "
                "column, which is not used)",
            ),
            stamps=(f"not subject-independent: {table.name} names no subjects",),
            official={"all": {name: count[name] for name in self.classes}},
        )

    def _relative(self, paths: list[Path]) -> Array:
        return np.array([path.relative_to(self.root).as_posix() for path in paths], dtype=str)

    def _finish(
        self,
        form: str,
        item: Array,
        names: list[str],
        skipped: Skipped,
        warning: str = "",
        landmarks: Array | None = None,
        box: Array | None = None,
    ) -> Manifest:
        """Add subject and sequence, which the file names tell."""
        files = [name.rpartition("/")[2].split("_") for name in item.tolist()]
        sequences = {name: n for name, n in SEQUENCES.items() if name in self.classes}
        official = {name: n * _FRAMES[self.frames] for name, n in sequences.items()}
        if self.neutral:
            official["neutral"] = sum(sequences.values())
        return Manifest(
            item=item,
            label=np.array([self.classes.index(name) for name in names], dtype=np.int64),
            class_names=self.classes,
            split=np.full(len(item), ""),
            form=f"{form}, {'peak frame' if self.frames == 'last1' else 'last three frames'}",
            subject=np.array([parts[0] for parts in files], dtype=str),
            sequence=np.array(["_".join(parts[:2]) for parts in files], dtype=str),
            fold=default_folds(np.array([parts[0] for parts in files], dtype=str)),
            landmarks=landmarks,
            box=box,
            skipped=tuple(skipped),
            warnings=(warning,) if warning else (),
            official={"all": official},
        )


def default_folds(subjects: Array, k: int = 10) -> Array:
    """Fold of each image by the field's usual rule: labelled subjects in ascending order, dealt out one by one.

    With the 118 subjects of the 327 labelled sequences and ``k = 10`` these are the folds of the list that Meng et
    al., "Frame Attention Networks for Facial Expression Recognition in Videos", ICIP 2019, published. The last has no
    fear.

    Args:
        subjects: (N,) subject of each image.
        k: number of folds.

    Returns:
        (N,) int64, 0 to ``k - 1``.
    """
    rank: Array = np.unique(subjects, return_inverse=True)[1]
    return rank.astype(np.int64) % k


def _tree(folder: Path, ending: str) -> Path | None:
    """The folder that has ``S005/001/<file with this ending>``, or the folder of the same name its zip unpacked to."""
    for path in subfolders(folder):
        inner = [below for below in subfolders(path) if below.name in path.name]
        for candidate in (path, *inner):
            if next(candidate.glob(f"S[0-9]*/[0-9]*/S*{ending}"), None) is not None:
                return candidate
    return None


def _labels(emotions: Path, root: Path, skipped: Skipped) -> Iterator[tuple[Path, str]]:
    """(file, class name) of each labelled sequence; a folder without file is a sequence without label."""
    for path in sorted(emotions.glob("S[0-9]*/[0-9]*/S*_emotion.txt")):
        try:
            code = float(path.read_text())
            if code not in range(1, len(CLASSES)):
                raise ValueError
        except ValueError:
            skipped.append((path.relative_to(root).as_posix(), "does not hold one number from 1 to 7"))
            continue
        yield path, CLASSES[int(code)]


def _landmarks(tree: Path | None, images: Path, paths: list[Path]) -> Array | None:
    """(N, 68, 2) float32 of the frames, NaN where a file is missing or malformed; None without landmarks."""
    if tree is None:
        return None
    out = np.full((len(paths), 68, 2), np.nan, dtype=np.float32)
    for row, path in enumerate(paths):
        file = tree / path.parent.relative_to(images) / f"{path.stem}_landmarks.txt"
        try:
            values = np.array(file.read_text().split(), dtype=np.float32)
        except (OSError, ValueError):
            continue
        if values.size == out[row].size:
            out[row] = values.reshape(68, 2)
    return out


def _face_boxes(landmarks: Array) -> Array:
    """(N, 4) squares around the landmarks, a little larger than their extent."""
    low, high = landmarks.min(axis=1), landmarks.max(axis=1)
    side = _MARGIN * (high - low).max(axis=1, keepdims=True)
    return valid_boxes(np.hstack([(low + high - side) / 2, side, side]))


def _class_folders(folder: Path) -> list[tuple[str, Path]]:
    """(class name, folder) of the folders named after an expression."""
    found = []
    for path in subfolders(folder):
        try:
            found.append((canonical(path.name), path))
        except UserError:
            continue
    return found


def _extended_csv(folder: Path) -> list[Path]:
    """Csv files with FER2013's columns that can only be ckextended.csv: few rows, among them label 7."""
    found = []
    for path in csv_files(folder):
        if read_header(path, PIXEL_COLUMNS) != set(PIXEL_COLUMNS):
            continue
        labels = []
        for row, values in read_rows(path, PIXEL_COLUMNS, []):
            labels.append(values["emotion"])
            if row > 2 * _CSV_ROWS:  # FER2013 has 35,887 rows: no need to read on
                break
        if "7" in labels and len(labels) <= 2 * _CSV_ROWS:
            found.append(path)
    return found[:1]
