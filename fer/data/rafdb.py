"""RAF-DB: real-world faces labelled by about forty people each; 7 basic or 11 compound expressions.

S. Li, W. Deng, J. Du, "Reliable Crowdsourcing and Deep Locality-Preserving Learning for Expression Recognition in the
Wild", CVPR 2017. Papers report the test part; there is no official validation part.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

import numpy as np

from fer.data.base import DataOptions, ExpressionDataModule
from fer.data.images import list_images, listed_images, subfolders, valid_boxes
from fer.data.manifest import Array, Manifest
from fer.data.tables import Skipped, check_option, find_form, read_rows
from fer.errors import UserError
from fer.labels import canonical

BASIC = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")  # labels 1 to 7
COMPOUND = (  # labels 1 to 11
    "happily surprised",
    "happily disgusted",
    "sadly fearful",
    "sadly angry",
    "sadly surprised",
    "sadly disgusted",
    "fearfully angry",
    "fearfully surprised",
    "angrily surprised",
    "angrily disgusted",
    "disgustedly surprised",
)
OFFICIAL = {  # of the basic set; the compound set's counts per class are not published
    "train": dict(zip(BASIC, (1290, 281, 717, 4772, 1982, 705, 2524), strict=True)),
    "test": dict(zip(BASIC, (329, 74, 160, 1185, 478, 162, 680), strict=True)),
}
_ATTRIBUTES = {  # value 0, 1, 2 ... of the last three lines of a manual annotation
    "gender": ("male", "female", "unsure"),
    "race": ("Caucasian", "African-American", "Asian"),
    "age": ("0-3", "4-19", "20-39", "40-69", "70+"),
}
_LISTS = ("list_patition_label.txt", "list_partition_label.txt")  # the release writes the former, its README the latter
_NAME = re.compile(r"(train|test)_\d+(_aligned)?\.\w+$")
_PART_FOLDERS = ("train", "test", "train_set", "val_set", "test_set")


class RAFDB(ExpressionDataModule):
    """RAF-DB in its official tree, or as folders by part and class.

    Args:
        form: ``auto``, ``official`` or ``folders``.
        labels: ``basic`` (7 classes) or ``compound`` (11).
        image: ``aligned``: the release's 100 x 100 crops, or ``original``: the photographs.
        crop: ``box``: photographs are cut to the annotated face box where there is one; ``none``: used whole.
        options: see `DataOptions`.
    """

    title = "RAF-DB"
    expected_tree = """\
basic/ (or compound/, data.labels=compound)
  EmoLabel/list_patition_label.txt        "train_00001.jpg 5"
  Image/aligned/train_00001_aligned.jpg   or Image/original/train_00001.jpg (data.image=original)
  Annotation/{manual,boundingbox}/        optional
or
{train,test}/{1..7}/train_00001_aligned.jpg, with train_labels.csv and test_labels.csv where they came along"""
    request = "whdeng.cn/RAF/model1.html, by e-mail from an academic staff address"

    def __init__(self, *, form: str, labels: str, image: str, crop: str, **options: Unpack[DataOptions]) -> None:
        super().__init__(**options)
        check_option("labels", labels, ("basic", "compound"))
        check_option("image", image, ("aligned", "original"))
        check_option("crop", crop, ("box", "none"))
        self.form, self.image, self.crop_to_box = form, image, crop == "box"
        self.classes = BASIC if labels == "basic" else COMPOUND
        self.manifest_options = {"form": form, "labels": labels, "image": image}

    def manifest(self) -> Manifest:
        """Read the form found under the root.

        Raises:
            UserError: nothing is recognised, several forms fit, or labels are not RAF-DB's own.
        """
        detectors = {
            "official": lambda folder: self._is_official(folder),
            "folders": lambda folder: self.classes == BASIC and self.image == "aligned" and _is_folders(folder),
        }
        found = find_form(Path(self.root), self.form, detectors, depth=2)
        if found is None:
            kind = "compound (labels to 11)" if self.classes == COMPOUND else "basic (labels 1 to 7)"
            raise self.missing(f"EmoLabel/list_patition_label.txt of the {kind} set, or train/ and test/ class folders")
        form, folder = found
        return self._from_official(folder) if form == "official" else self._from_folders(folder)

    def _is_official(self, folder: Path) -> bool:
        """Whether a partition list lies here whose labels are those of the wanted set."""
        labels = [label for path in _list_files(folder) for _, label in _read_list(path, [])]
        return bool(labels) and (max(labels) > len(BASIC)) == (self.classes == COMPOUND)

    def _from_official(self, folder: Path) -> Manifest:
        skipped: Skipped = []
        path = _list_files(folder)[0]
        directory = _with_files(folder / "Image" / self.image, ".jpg")
        prefix = directory.relative_to(self.root).as_posix()
        there = listed_images(directory, Path(self.root), path) if directory.is_dir() else set()
        if not there:
            raise UserError(
                f"{folder / 'Image' / self.image} holds no images: unpack {self.image}.zip there, or set "
                f"data.image={'original' if self.image == 'aligned' else 'aligned'}"
            )
        stems: dict[str, None] = {}
        items, labels = [], []
        for name, label in _read_list(path, skipped):
            stem, _, extension = name.rpartition(".")
            file = f"{stem}_aligned.{extension}" if self.image == "aligned" else name
            if label == 0:
                raise UserError(f"{path}: {name} has label 0, but RAF-DB counts from 1; restore the release's own list")
            if label > len(self.classes):
                skipped.append((f"{prefix}/{file}", f"label {label} is not one of 1 to {len(self.classes)}"))
            elif not name.startswith(("train_", "test_")):
                skipped.append((f"{prefix}/{file}", "the name begins with neither train_ nor test_"))
            elif stem in stems:
                skipped.append((f"{path.name}: {name}", "listed twice; the first line is used"))
            elif file not in there:
                skipped.append((f"{prefix}/{file}", "listed, but the file is not there"))
            else:
                stems[stem] = None
                items.append(f"{prefix}/{file}")
                labels.append(label - 1)
        form = f"official {'basic' if self.classes == BASIC else 'compound'} set, {self.image} images"
        return self._finish(form, items, labels, list(stems), skipped, folder / "Annotation")

    def _from_folders(self, folder: Path) -> Manifest:
        skipped: Skipped = []
        items, labels, stems = [], [], []
        for part in _PART_FOLDERS:
            for label, directory in _class_folders(folder / part):
                prefix = directory.relative_to(self.root).as_posix()
                names, left_out = list_images(directory)
                skipped += [(f"{prefix}/{name}", reason) for name, reason in left_out]
                for name in names:
                    if _NAME.match(name):
                        items.append(f"{prefix}/{name}")
                        labels.append(label)
                        stems.append(name.rpartition(".")[0].removesuffix("_aligned"))
                    else:
                        skipped.append((f"{prefix}/{name}", "the name is not train_<n> or test_<n>"))
        self._check_label_files(folder, items, labels)
        return self._finish("folders by part and class, aligned images", items, labels, stems, skipped, None)

    def _check_label_files(self, folder: Path, items: list[str], labels: list[int]) -> None:
        """Compare the folders with train_labels.csv and test_labels.csv where they lie beside or above them."""
        by_name = {item.rpartition("/")[2]: label for item, label in zip(items, labels, strict=True)}
        for place in {folder, Path(self.root)}:
            for path in (place / "train_labels.csv", place / "test_labels.csv"):
                if not path.is_file():
                    continue
                for row, values in read_rows(path, ("image", "label"), [], required=("image", "label")):
                    if values["image"] in by_name and values["label"] != str(by_name[values["image"]] + 1):
                        raise UserError(
                            f"{path}, row {row}: {values['image']} has label {values['label']} but lies in folder "
                            f"{by_name[values['image']] + 1}; fetch the set again"
                        )

    def _finish(
        self,
        form: str,
        items: list[str],
        labels: list[int],
        stems: list[str],
        skipped: Skipped,
        annotation: Path | None,
    ) -> Manifest:
        """Add the parts, told by the name's beginning, and the annotations."""
        warnings = []
        landmarks = box = None
        attributes: dict[str, Array] = {}
        manual = _with_files(annotation / "manual", "_manu_attri.txt") if annotation else None
        if manual is not None and manual.is_dir():
            numbers = _read_numbers(manual, stems, "_manu_attri.txt", 13)
            attributes = {
                name: np.array([_word(words, value) for value in numbers[:, 10 + i].tolist()], dtype=str)
                for i, (name, words) in enumerate(_ATTRIBUTES.items())
            }
            absent = int(np.isnan(numbers).all(axis=1).sum())
            if absent:
                warnings.append(f"{absent} of {len(stems)} images have no readable manual annotation")
            landmarks = numbers[:, :10].reshape(-1, 5, 2).astype(np.float32)
        boxes = _with_files(annotation / "boundingbox", "_boundingbox.txt") if annotation else None
        if boxes is not None and boxes.is_dir():
            corners = _read_numbers(boxes, stems, "_boundingbox.txt", 4)
            box = valid_boxes(np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]]))
        if self.image == "aligned":  # the annotations are in the photographs' pixels
            landmarks = box = None
        elif box is None:
            warnings.append("no Annotation/boundingbox: photographs are used whole")
        return Manifest(
            item=np.array(items, dtype=str),
            label=np.array(labels, dtype=np.int64),
            class_names=self.classes,
            split=np.array([stem.partition("_")[0] for stem in stems], dtype=str),
            form=form,
            box=box,
            landmarks=landmarks,
            attributes=attributes,
            skipped=tuple(skipped),
            warnings=tuple(warnings),
            official=OFFICIAL if self.classes == BASIC else None,
        )


def _list_files(folder: Path) -> list[Path]:
    """The list of parts and labels in ``folder/EmoLabel``, or one folder deeper as zips unpack; at most one is read."""
    paths = [folder / "EmoLabel" / below / name for below in ("", "EmoLabel") for name in _LISTS]
    return [path for path in paths if path.is_file()][:1]


def _read_list(path: Path, skipped: Skipped) -> Iterator[tuple[str, int]]:
    """(image name, label) of each line; copies with a third column, tabs or CRLF are as good."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()):
        fields = line.split()
        if len(fields) >= 2 and "." in fields[0] and "/" not in fields[0] and fields[1].isdecimal():
            yield fields[0], int(fields[1])
        elif fields:
            skipped.append((f"{path.name}:{number}", f"{line.strip()[:60]!r} is not an image name and a label"))


def _with_files(folder: Path, ending: str) -> Path:
    """``folder``, or the one below it that holds the files when a zip was unpacked into a folder of its own."""
    if not folder.is_dir():
        return folder
    candidates = [folder, *subfolders(folder)]
    return next((f for f in candidates if any(p.name.endswith(ending) and p.is_file() for p in f.iterdir())), folder)


def _read_numbers(folder: Path, stems: list[str], ending: str, n: int) -> Array:
    """(N, n) float64 of the annotation files ``<stem><ending>``; a row of NaN where one is missing or malformed."""
    out = np.full((len(stems), n), np.nan)
    for row, stem in enumerate(stems):
        try:
            values = [float(text) for text in (folder / f"{stem}{ending}").read_text().split()]
        except (OSError, ValueError):
            continue
        if len(values) == n:
            out[row] = values
    return out


def _word(words: tuple[str, ...], value: float) -> str:
    """The meaning of an attribute's value, empty where unknown."""
    return words[int(value)] if value in range(len(words)) else ""


def _class_folders(folder: Path) -> list[tuple[int, Path]]:
    """(label, folder) of the class folders, numbered 1 to 7 or named.

    Raises:
        UserError: a folder ``0``, so the numbers are not RAF-DB's.
    """
    found = []
    for path in subfolders(folder) if folder.is_dir() else ():
        if path.name == "0":
            raise UserError(f"{path}: RAF-DB counts classes from 1 to 7; rename the folders, or use data=folder")
        if path.name.isdecimal() and int(path.name) <= len(BASIC):
            found.append((int(path.name) - 1, path))
            continue
        try:
            found.append((BASIC.index(canonical(path.name)), path))
        except (UserError, ValueError):
            continue
    return sorted(found)


def _is_folders(folder: Path) -> bool:
    """Whether class folders under a part hold images with RAF-DB's names."""
    return any(
        _NAME.match(name)
        for part in _PART_FOLDERS
        for _, path in _class_folders(folder / part)
        for name in list_images(path)[0]
    )
