"""AffectNet: faces from the web with 8 expressions, valence and arousal.

A. Mollahosseini, B. Hasani, M. Mahoor, "AffectNet: A Database for Facial Expression, Valence, and Arousal Computing in
the Wild", IEEE Transactions on Affective Computing 2019. The test part was never released: papers report the
validation part, which is therefore our test part and never selects. Crops differ between the releases, and with them
the figures, so the form names the release.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from fer.data.base import DataOptions, ExpressionDataModule
from fer.data.images import EXTENSIONS, safe_join, valid_boxes
from fer.data.manifest import Array, Manifest
from fer.data.tables import Skipped, check_option, csv_files, find_form, plain_name, read_rows
from fer.errors import UserError

CLASSES = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt")  # labels 0 to 7
LABELS = len(CLASSES) + 3  # 8 none, 9 uncertain, 10 no-face: not expressions, left out
_TRAIN = dict(zip(CLASSES, (74874, 134415, 25459, 14090, 6378, 3803, 24882, 3750), strict=True))
OFFICIAL = {"train": _TRAIN, "test": dict.fromkeys(CLASSES, 500)}
OFFICIAL_NPY = {"train": _TRAIN, "test": dict.fromkeys(CLASSES, 500) | {"contempt": 499}}  # the test part as recalled

_BOX = ("face_x", "face_y", "face_width", "face_height")
_COLUMNS = ("subdirectory_filepath", *_BOX, "facial_landmarks", "expression", "valence", "arousal")
_LISTS = {"training.csv": "train", "validation.csv": "test"}
_IMAGES = (
    "Manually_Annotated/Manually_Annotated_Images",
    "Manually_Annotated_compressed/Manually_Annotated_Images",
    "Manually_Annotated_Images",
    "Manually_Annotated",
    ".",
)
_PART_FOLDERS = {"train_set": "train", "val_set": "test", "validation_set": "test"}
_SUBSETS = ("easy", "challenging", "difficult")  # of AffectNet+


class AffectNet(ExpressionDataModule):
    """AffectNet in its release of 2017, in the later release of 224 px crops, or as AffectNet+.

    Seven classes are ``class_names`` without contempt.

    Args:
        form: ``auto``, ``release2017`` (csv lists), ``npy`` (the later release) or ``plus`` (AffectNet+).
        crop: ``box``: the images of 2017 are cut to the listed face box; ``none``: used whole, as released.
        landmarks: whether the 68 points are kept in the manifest (156 MB for the whole set).
        options: see `DataOptions`.
    """

    title = "AffectNet"
    expected_tree = """\
Manually_Annotated_file_lists/{training,validation}.csv
Manually_Annotated/Manually_Annotated_Images/<dir>/<name>.jpg
or
{train_set,val_set}/images/<n>.jpg
{train_set,val_set}/annotations/<n>_{exp,val,aro,lnd}.npy
or (AffectNet+)
human_annotated/{train_set,validation_set}/images/<n>.jpg
human_annotated/{train_set,validation_set}/annotations/<n>.json"""
    request = "mohammadmahoor.com/pages/databases/affectnet/ (by a professor or lab manager, academic research only)"

    def __init__(self, *, form: str, crop: str, landmarks: bool, **options: Unpack[DataOptions]) -> None:
        super().__init__(**options)
        check_option("crop", crop, ("box", "none"))
        self.form, self.crop_to_box, self.landmarks = form, crop == "box", landmarks
        self.manifest_options = {"form": form, "crop": crop, "landmarks": landmarks}

    def manifest(self) -> Manifest:
        """Read the form found under the root.

        Raises:
            UserError: nothing is recognised, several forms fit, or a list names a file outside the root.
        """
        detectors = {
            "release2017": lambda folder: bool(_lists(folder)),
            "npy": lambda folder: bool(_parts(folder, "_exp.npy")),
            "plus": lambda folder: bool(_parts(folder, ".json")),
        }
        found = find_form(Path(self.root), self.form, detectors, depth=2)
        if found is None:
            raise self.missing("training.csv and validation.csv, or train_set/ and val_set/ with annotations/")
        form, folder = found
        if form == "release2017":
            return self._from_lists(folder)
        return self._from_parts(folder, "_exp.npy" if form == "npy" else ".json")

    def _from_lists(self, folder: Path) -> Manifest:
        skipped: Skipped = []
        items: dict[str, str] = {}  # item -> part; a dict keeps the order and finds repetitions
        labels, numbers, points = [], [], []
        for part, path in _lists(folder).items():
            listing = _Listing(_image_folder(folder, path))
            prefix = f"{listing.root.relative_to(self.root).as_posix()}/".removeprefix("./")
            for row, values in read_rows(path, _COLUMNS, skipped, required=_COLUMNS[:1], headerless=True):
                name, expression = values["subdirectory_filepath"], values["expression"]
                where = f"{plain_name(path)}:{row}"
                if not name or not expression.isdecimal() or int(expression) >= LABELS:
                    skipped.append(
                        (where, f"expected a file and an expression 0 to {LABELS - 1}, found {expression!r}")
                    )
                    continue
                if int(expression) >= len(CLASSES):
                    continue
                item = prefix + name
                reason = "listed twice; the first row is used" if item in items else listing.problem(name, where)
                if reason:
                    skipped.append((item, reason))
                    continue
                items[item] = part
                labels.append(int(expression))
                numbers.append([_number(values[column]) for column in (*_BOX, "valence", "arousal")])
                if self.landmarks:
                    points.append(_points(values["facial_landmarks"].split(";")))
        table = np.array(numbers, dtype=np.float64).reshape(-1, 6)
        return self._finish(
            form="release of 2017" + (", cut to the face box" if self.crop_to_box else ", whole images"),
            items=list(items),
            labels=labels,
            parts=list(items.values()),
            valence_arousal=table[:, 4:],
            points=points,
            box=valid_boxes(table[:, :4]),
            skipped=skipped,
        )

    def _from_parts(self, folder: Path, ending: str) -> Manifest:
        skipped: Skipped = []
        items, labels, parts, valence_arousal, points = [], [], [], [], []
        facts: list[dict[str, Any]] = []
        read: Callable[[Path, str], dict[str, Any]] = self._read_npy if ending == "_exp.npy" else self._read_json
        for directory, part in _parts(folder, ending).items():
            prefix = directory.relative_to(self.root).as_posix()
            pictures = {os.path.splitext(name)[0]: name for name in os.listdir(directory / "images")}
            annotated = {name.removesuffix(ending) for name in os.listdir(directory / "annotations") if ending in name}
            for stem in sorted(annotated | pictures.keys(), key=_natural):
                if stem not in annotated or stem not in pictures:
                    if not stem.startswith("."):
                        absent = "annotation" if stem in pictures else "image"
                        skipped.append((f"{prefix}/images/{pictures.get(stem, stem)}", f"has no {absent}"))
                    continue
                item = f"{prefix}/images/{pictures[stem]}"
                try:
                    fact = read(directory / "annotations", stem)
                    if fact["label"] not in range(LABELS):
                        raise ValueError(f"label {fact['label']} is not one of 0 to {LABELS - 1}")
                except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                    skipped.append((item, f"the annotation cannot be used ({error})"))
                    continue
                if fact["label"] >= len(CLASSES):
                    continue
                items.append(item)
                labels.append(int(fact["label"]))
                parts.append(part)
                valence_arousal.append((fact["valence"], fact["arousal"]))
                if self.landmarks:
                    points.append(fact["points"])
                if ending == ".json":
                    facts.append(fact)
        soft = np.array([fact["soft"] for fact in facts], dtype=np.float32) if facts else None
        return self._finish(
            form="later release, 224 px crops" if ending == "_exp.npy" else "AffectNet+",
            items=items,
            labels=labels,
            parts=parts,
            valence_arousal=np.array(valence_arousal, dtype=np.float64).reshape(-1, 2),
            points=points,
            skipped=skipped,
            soft=soft,
            attributes={
                name: np.array([fact[name] for fact in facts], dtype=str)
                for name in ("subset", "gender", "race", "age")
                if facts
            },
            official=OFFICIAL_NPY if ending == "_exp.npy" else OFFICIAL,
        )

    def _read_npy(self, folder: Path, stem: str) -> dict[str, Any]:
        """Facts of ``<stem>_{exp,val,aro,lnd}.npy``, arrays without dimension that hold a number or its text."""

        def load(kind: str) -> Array:
            array: Array = np.load(folder / f"{stem}_{kind}.npy", allow_pickle=False)
            return array

        def value(kind: str) -> float:
            try:
                return _number(load(kind).item())
            except (OSError, EOFError, ValueError):
                return np.nan

        label = float(load("exp").item())
        try:
            points = _points(load("lnd").ravel().tolist()) if self.landmarks else None
        except (OSError, EOFError, ValueError):
            points = _points([])
        return {"label": label, "valence": value("val"), "arousal": value("aro"), "points": points}

    def _read_json(self, folder: Path, stem: str) -> dict[str, Any]:
        """Facts of ``<stem>.json`` of AffectNet+."""
        content = json.loads((folder / f"{stem}.json").read_bytes())
        label, meta = int(content["human-label"]), content.get("meta-data") or {}
        soft = np.array([_number(value) for value in content.get("soft-label") or ()])
        if soft.shape != (len(CLASSES),) or not (soft >= 0).all() or not soft.sum() > 0:
            soft = np.eye(len(CLASSES))[label % len(CLASSES)]
        subset, age = content.get("subset"), _number(meta.get("age"))
        return {
            "label": label,
            "soft": soft / soft.sum(),
            "valence": _number(meta.get("valence")),
            "arousal": _number(meta.get("arousal")),
            "points": _points(meta.get("landmark-68") or []),
            "subset": _SUBSETS[subset] if subset in range(len(_SUBSETS)) else "",
            "gender": _likeliest(meta.get("gender")),
            "race": _likeliest(meta.get("race")),
            "age": "" if np.isnan(age) else f"{int(age) // 10 * 10}-{int(age) // 10 * 10 + 9}",
        }

    def _finish(
        self,
        *,
        form: str,
        items: list[str],
        labels: list[int],
        parts: list[str],
        valence_arousal: Array,
        points: list[Array],
        skipped: Skipped,
        box: Array | None = None,
        soft: Array | None = None,
        attributes: dict[str, Array] | None = None,
        official: dict[str, dict[str, int]] = OFFICIAL,
    ) -> Manifest:
        """Blank valence and arousal that are not annotated (-2)."""
        annotated = (np.abs(valence_arousal) <= 1).all(axis=1, keepdims=True)
        return Manifest(
            item=np.array(items, dtype=str),
            label=np.array(labels, dtype=np.int64),
            class_names=CLASSES,
            split=np.array(parts, dtype=str),
            form=form,
            soft=soft,
            box=box,
            landmarks=np.stack(points) if points else None,
            valence_arousal=np.where(annotated, valence_arousal, np.nan).astype(np.float32),
            attributes=attributes or {},
            skipped=tuple(skipped),
            warnings=("the test part is AffectNet's validation part; its own test part was never released",),
            official=official,
        )


class _Listing:
    """The files under a folder, each directory read once instead of a stat per image."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: dict[str, set[str]] = {}

    def problem(self, name: str, source: str) -> str:
        """Why the image ``name`` cannot be used, empty if it can.

        Raises:
            UserError: the name, listed at ``source``, leads outside the root.
        """
        directory, _, file = name.rpartition("/")
        if directory not in self._names:
            self._names[directory] = set(self._read(safe_join(self.root, name, source).parent, directory, source))
        if file not in self._names[directory]:
            return "listed, but the file is not there"
        extension = os.path.splitext(file)[1].lower()
        return "" if extension in EXTENSIONS else f"{extension} is not read, only {', '.join(EXTENSIONS)}"

    def _read(self, path: Path, directory: str, source: str) -> Iterator[str]:
        if not path.is_dir():
            return
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_symlink():
                    safe_join(self.root, f"{directory}/{entry.name}", source)
                yield entry.name


def _lists(folder: Path) -> dict[str, Path]:
    """Part and file of the csv lists in ``folder``, recognised by their first rows."""
    found = {}
    for place in (folder, folder / "Manually_Annotated_file_lists"):
        for path in csv_files(place) if place.is_dir() else ():
            part = _LISTS.get(plain_name(path).lower())
            rows = _first_rows(path) if part else []
            if part and any("/" in row["subdirectory_filepath"] and row["expression"].isdecimal() for row in rows):
                found[part] = path
    return found


def _image_folder(folder: Path, path: Path) -> Path:
    """The folder that the names in a list are relative to."""
    directories = {row["subdirectory_filepath"].partition("/")[0] for row in _first_rows(path)} - {""}
    for name in _IMAGES:
        if any((folder / name / directory).is_dir() for directory in directories):
            return folder / name
    raise UserError(
        f"{path} names files in {', '.join(sorted(directories)[:3])} ..., which are in none of {', '.join(_IMAGES)} "
        f"under {folder}; unpack the images"
    )


def _first_rows(path: Path) -> list[dict[str, str]]:
    return [row for _, row in itertools.islice(read_rows(path, _COLUMNS, [], headerless=True), 1000)]


def _parts(folder: Path, ending: str) -> dict[Path, str]:
    """Folder and part of each part with images/ and annotations/ of this kind."""
    found = {}
    for place in (folder, folder / "human_annotated"):
        for name, part in _PART_FOLDERS.items():
            annotations = place / name / "annotations"
            if annotations.is_dir() and (place / name / "images").is_dir():
                with os.scandir(annotations) as entries:
                    if any(entry.name.endswith(ending) for entry in entries):
                        found[place / name] = part
    return found


def _number(value: Any) -> float:
    """A number or its text, NaN for anything else (``NULL``)."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return np.nan


def _points(values: list[Any]) -> Array:
    """(68, 2) float32 of x and y in turn, NaN where there are not 136 numbers."""
    if len(values) != 136:
        return np.full((68, 2), np.nan, dtype=np.float32)
    return np.array([_number(value) for value in values], dtype=np.float32).reshape(68, 2)


def _likeliest(scores: dict[str, float] | None) -> str:
    """The name with the highest score, empty where there are none."""
    return max(scores, key=lambda name: _number(scores[name])) if scores else ""


def _natural(stem: str) -> tuple[int, str]:
    """Sort 2 before 10."""
    return (int(stem) if stem.isdecimal() else -1), stem
