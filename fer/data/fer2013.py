"""FER2013: 35,887 grey faces of 48 x 48 pixels from the web, 7 expressions.

P.-L. Carrier and A. Courville in Goodfellow et al., "Challenges in Representation Learning", ICML 2013 workshop.
Train on Training, select on PublicTest, report PrivateTest.
"""

import re
from pathlib import Path
from typing import Unpack

import numpy as np

from fer.data.base import DataOptions
from fer.data.images import list_images, subfolders
from fer.data.manifest import Manifest
from fer.data.pixel_tables import PIXEL_COLUMNS, PixelTable, PixelTableModule, read_pixel_table
from fer.data.tables import Skipped, check_option, csv_files, find_form, plain_name, read_header
from fer.errors import UserError
from fer.labels import canonical

CLASSES = ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral")
USAGES = ("Training", "PublicTest", "PrivateTest")
OFFICIAL = {
    "Training": (3995, 436, 4097, 7215, 4830, 3171, 4965),
    "PublicTest": (467, 56, 496, 895, 653, 415, 607),
    "PrivateTest": (491, 55, 528, 879, 594, 416, 626),
}
_FULL_NAMES = (
    "fer2013.csv",
    "icml_face_data.csv",
)  # the same rows in the same order, the former is preferred
_WITH_USAGE = re.compile(r"(Training|PublicTest|PrivateTest)_\d+\.\w+$")
_NUMBERED = re.compile(r"im(\d+)\.\w+$")

EXPECTED_TREE = """\
fer2013.csv | icml_face_data.csv                  the whole set, plain or .xz .gz .bz2 .zip
train.csv + test.csv                              only where test.csv has an 'emotion' column
{train,test}/<class>/Training_<id>.jpg, PublicTest_<id>.jpg, PrivateTest_<id>.jpg
{train,test}/<class>/im<k>.png"""
REQUEST = (
    "log in, accept the rules and download from kaggle.com/c/challenges-in-representation-learning-facial-expression-"
    "recognition-challenge (unpack fer2013.tar.gz), or `kaggle datasets download msambare/fer2013`"
)


class FER2013(PixelTableModule):
    """FER2013 as a csv or as folders of images.

    Args:
        form: ``auto``, ``csv`` (the whole set), ``kaggle`` (train.csv + test.csv), ``prefix`` (Training_<id>.jpg) or
            ``numbered`` (im<k>.png).
        test_part: ``private``: val is PublicTest and test is PrivateTest; ``both``: test is the two together and
            there is no val, as many users of the folder form report.
        options: see `DataOptions`.
    """

    title = "FER2013"
    expected_tree = EXPECTED_TREE
    request = REQUEST

    def __init__(self, *, form: str, test_part: str, **options: Unpack[DataOptions]) -> None:
        super().__init__(**options)
        check_option("test_part", test_part, ("private", "both"))
        self.form = form
        self.test_part = test_part
        self.manifest_options = {"form": form, "test_part": test_part}

    def manifest(self) -> Manifest:
        """Read the form found under the root.

        Raises:
            UserError: nothing is recognised, several forms fit, or the test part cannot be told apart.
        """
        root = Path(self.root)
        detectors = {
            "csv": lambda folder: bool(full_tables(folder)),
            "kaggle": _has_kaggle_pair,
            "prefix": lambda folder: _has_files(folder, _WITH_USAGE),
            "numbered": lambda folder: _has_files(folder, _NUMBERED),
        }
        found = find_form(root, self.form, detectors)
        if found is None:
            raise self.missing("a csv with the columns emotion, pixels and Usage, or train/ and test/ class folders")
        form, folder = found
        if form in ("csv", "kaggle"):
            return self._from_tables(form, folder)
        return self._from_folders(form, folder)

    def _from_tables(self, form: str, folder: Path) -> Manifest:
        if form == "csv":
            table = read_full_table(folder)
            tables, name = [table], table.name
        else:
            train, test = (read_pixel_table(folder / name, len(CLASSES)) for name in ("train.csv", "test.csv"))
            tables, name = (
                [_with_usage(train, "Training"), self._kaggle_test(test)],
                "train.csv + test.csv",
            )
        self._tables = {table.name: table for table in tables}
        return self._finish(
            form=name,
            item=np.concatenate([table.item for table in tables]),
            label=np.concatenate([table.emotion for table in tables]),
            usage=np.concatenate([table.usage for table in tables]),
            skipped=[entry for table in tables for entry in table.skipped],
        )

    def _kaggle_test(self, table: PixelTable) -> PixelTable:
        """Name the parts of a labelled test.csv: Usage where it has one, else by position in the complete file."""
        if table.usage[0]:
            return table
        public, private = sum(OFFICIAL["PublicTest"]), sum(OFFICIAL["PrivateTest"])
        if table.rows == public + private:
            usage = np.where(table.row < public, "PublicTest", "PrivateTest")
            return PixelTable(
                table.name,
                table.rows,
                table.row,
                table.emotion,
                usage,
                table.pixels,
                table.skipped,
            )
        if self.test_part == "both":
            return _with_usage(table, "PrivateTest")
        raise UserError(
            f"{Path(self.root) / table.name}: {table.rows} rows and no Usage column, so PrivateTest cannot be told "
            f"from PublicTest (which needs {public + private} rows); set data.test_part=both to report on all of them"
        )

    def _from_folders(self, form: str, folder: Path) -> Manifest:
        self._tables = {}
        items, labels, usages = [], [], []
        skipped: Skipped = []
        pattern = _WITH_USAGE if form == "prefix" else _NUMBERED
        for part in ("train", "test"):
            for label, directory in _class_folders(folder / part):
                prefix = directory.relative_to(self.root).as_posix()
                names, left_out = list_images(directory)
                skipped += [(f"{prefix}/{name}", reason) for name, reason in left_out]
                for name in sorted(names, key=_natural):
                    match = pattern.match(name)
                    if match is None:
                        skipped.append(
                            (
                                f"{prefix}/{name}",
                                "the name does not say which part it belongs to",
                            )
                        )
                        continue
                    items.append(f"{prefix}/{name}")
                    labels.append(label)
                    usages.append(match[1] if form == "prefix" else _numbered_usage(part, label, int(match[1])))
        where = folder.relative_to(self.root).as_posix()
        return self._finish(
            form=f"folders with {'Training_<id>' if form == 'prefix' else 'im<k>'} names"
            + f" in {where}" * (where != "."),
            item=np.array(items, dtype=str),
            label=np.array(labels, dtype=np.int64),
            usage=np.array(usages, dtype=str),
            skipped=skipped,
            warning="JPEG copies differ from fer2013.csv by about 2 grey levels" if form == "prefix" else "",
        )

    def _finish(
        self,
        *,
        form: str,
        item: np.ndarray,
        label: np.ndarray,
        usage: np.ndarray,
        skipped: Skipped,
        warning: str = "",
    ) -> Manifest:
        """Turn Usage into the official parts."""
        both = self.test_part == "both"
        part = {
            "Training": "train",
            "PublicTest": "test" if both else "val",
            "PrivateTest": "test",
        }
        official: dict[str, dict[str, int]] = {}
        for name, counts in OFFICIAL.items():
            classes = official.setdefault(part[name], dict.fromkeys(CLASSES, 0))
            for cls, count in zip(CLASSES, counts, strict=True):
                classes[cls] += count
        warnings = [warning] if warning else []
        if both:
            form += ", test = PublicTest + PrivateTest"
            warnings.append("data.test_part=both: the test part is PublicTest and PrivateTest together (7,178 images)")
        return Manifest(
            item=item,
            label=label,
            class_names=CLASSES,
            split=np.array([part[name] for name in usage.tolist()], dtype=str),
            form=form,
            skipped=tuple(skipped),
            warnings=tuple(warnings),
            official=official,
        )


def full_tables(folder: Path) -> list[Path]:
    """The csv files in ``folder`` that hold the whole set; the best first."""
    paths = [path for path in csv_files(folder) if read_header(path, PIXEL_COLUMNS) == set(PIXEL_COLUMNS)]
    return sorted(paths, key=lambda path: plain_name(path) not in _FULL_NAMES)


def read_full_table(folder: Path) -> PixelTable:
    """Read the whole set out of a csv in ``folder``, with labels in FER2013's order.

    Raises:
        UserError: several unknown files fit, or the file is another set with the same columns.
    """
    path, *others = full_tables(folder)
    if plain_name(path) not in _FULL_NAMES and others:
        names = ", ".join(p.name for p in (path, *others))
        raise UserError(f"{folder}: several csv files fit ({names}); name the one to be read fer2013.csv")
    table = read_pixel_table(path, len(CLASSES), USAGES)
    contempt = sum("label '7'" in reason for _, reason in table.skipped)
    if contempt > max(1, 0.01 * table.rows):
        raise UserError(
            f"{path}: {contempt} rows have label 7, so this is ckextended.csv (CK+); read it with data=ckplus"
        )
    return table


def _with_usage(table: PixelTable, usage: str) -> PixelTable:
    column = np.full(len(table.row), usage)
    return PixelTable(
        table.name,
        table.rows,
        table.row,
        table.emotion,
        column,
        table.pixels,
        table.skipped,
    )


def _has_kaggle_pair(folder: Path) -> bool:
    """Whether train.csv and a labelled test.csv lie here and no complete csv (whose rows they repeat)."""
    train, test = folder / "train.csv", folder / "test.csv"
    if not (train.is_file() and test.is_file()) or full_tables(folder):
        return False
    if read_header(train, PIXEL_COLUMNS) < {"emotion", "pixels"}:
        return False
    if "emotion" not in read_header(test, PIXEL_COLUMNS):
        raise UserError(
            f"{test} has no labels: put fer2013.csv or icml_face_data.csv of the same Kaggle page beside it, "
            "which hold the whole set"
        )
    return True


def _class_folders(folder: Path) -> list[tuple[int, Path]]:
    """(label, folder) of each class folder, in FER2013's order; other folders are passed over."""
    found = []
    for path in subfolders(folder) if folder.is_dir() else ():
        try:
            found.append((CLASSES.index(canonical(path.name)), path))
        except (UserError, ValueError):
            continue
    return sorted(found)


def _has_files(folder: Path, pattern: re.Pattern[str]) -> bool:
    """Whether a class folder under train/ or test/ has a picture whose name fits."""
    directories = [path for part in ("train", "test") for _, path in _class_folders(folder / part)]
    return any(pattern.match(name) for path in directories for name in list_images(path)[0])


def _numbered_usage(part: str, label: int, k: int) -> str:
    """Part of im<k>.png: k counts a class in csv order, where all of PublicTest stands before PrivateTest."""
    if part == "train":
        return "Training"
    return "PublicTest" if k < OFFICIAL["PublicTest"][label] else "PrivateTest"


def _natural(name: str) -> tuple[int, str]:
    """Sort im2.png before im10.png."""
    match = _NUMBERED.match(name)
    return (int(match[1]) if match else 0), name
