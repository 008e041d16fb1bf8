"""Your own images: a folder per class, with or without folders for the parts; or without classes, for pre-training.

root/happy/a.jpg                       no official split; the protocol makes one
root/train/happy/a.jpg, root/test/...  the parts are taken as official
root/a.jpg                             no classes: unlabelled faces, such as CelebA's img_align_celeba
root/subjects.csv                      optional: path,subject (paths relative to the csv's folder)
"""

from pathlib import Path
from typing import Unpack

import numpy as np

from fer.data.base import DataOptions, ExpressionDataModule
from fer.data.images import list_images, safe_join, subfolders
from fer.data.manifest import Array, Manifest
from fer.data.prepared import prepared_places
from fer.data.tables import Skipped, find_form, read_rows
from fer.errors import UserError
from fer.labels import canonical_all

UNLABELLED = "unlabelled"
_PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_FORMS = {
    "parts": "folders by part and class",
    "classes": "one folder per class",
    UNLABELLED: "images without classes",
}


class Folder(ExpressionDataModule):
    """Images in one folder per class.

    Class names become canonical (``happy`` is ``happiness``) when all of them are known expressions; otherwise they
    stay as they are.

    Args:
        form: ``auto``, ``parts`` (train/<class>, test/<class> ...), ``classes`` (<class> directly) or ``unlabelled``
            (images directly, all of one class of that name).
        options: see `DataOptions`.
    """

    title = "folder of images"
    expected_tree = """\
<class>/*.jpg                   one folder per class, no official split; or
{train,val,test}/<class>/*.jpg  with the parts given; or
*.jpg                           no classes, for python -m fer.pretrain
subjects.csv                    optional, with the columns path,subject"""
    request = "your own pictures"

    def __init__(self, *, form: str, **options: Unpack[DataOptions]) -> None:
        super().__init__(**options)
        self.form = form
        self.manifest_options = {"form": form}

    def manifest(self) -> Manifest:
        """List the images.

        Raises:
            UserError: there are none, or subjects.csv does not fit them.
        """
        detectors = {
            "parts": lambda folder: any(_class_folders(path) for path, _ in _part_folders(folder)),
            "classes": lambda folder: bool(_class_folders(folder)),
            UNLABELLED: lambda folder: (self.form == UNLABELLED or not _labelled(folder)) and _has_image(folder),
        }
        found = find_form(Path(self.root), self.form, detectors)
        if found is None:
            raise self.missing("JPEG, PNG, WEBP or BMP files, in one folder per class or by themselves")
        form, folder = found
        items, names, parts = [], [], []
        skipped: Skipped = []
        for directory, part in _part_folders(folder) if form == "parts" else [(folder, "")]:
            for class_folder in [directory] if form == UNLABELLED else _class_folders(directory):
                prefix = class_folder.relative_to(self.root)
                files, left_out = list_images(class_folder)
                skipped += [((prefix / file).as_posix(), reason) for file, reason in left_out]
                items += [(prefix / file).as_posix() for file in files]
                names += [UNLABELLED if form == UNLABELLED else class_folder.name] * len(files)
                parts += [part] * len(files)
        class_of = _class_names(set(names))
        class_names = tuple(sorted(set(class_of.values())))
        item = np.array(items, dtype=str)
        box, landmarks = prepared_places(Path(self.root), item) or (None, None)
        return Manifest(
            item=item,
            label=np.array([class_names.index(class_of[name]) for name in names], dtype=np.int64),
            class_names=class_names,
            split=np.array(parts, dtype=str),
            form=_FORMS[form],
            subject=self._subjects(folder, item),
            box=box,
            landmarks=landmarks,
            skipped=tuple(skipped),
        )

    def _subjects(self, folder: Path, item: Array) -> Array | None:
        """(N,) str from subjects.csv, None where there is none."""
        path = next(
            (place / "subjects.csv" for place in (folder, Path(self.root)) if (place / "subjects.csv").is_file()), None
        )
        if path is None:
            return None
        subject_of: dict[str, str] = {}
        malformed: Skipped = []
        for row, values in read_rows(path, ("path", "subject"), malformed, required=("path", "subject")):
            file = safe_join(path.parent, values["path"], f"{path}, row {row}")
            if not values["subject"]:
                raise UserError(f"{path}, row {row}: no subject for {values['path']}; fill it in")
            subject_of[file.relative_to(self.root).as_posix()] = values["subject"]
        if malformed:
            raise UserError(f"{path}: {malformed[0][0]} has {malformed[0][1]} (path,subject); correct that row")
        unnamed = [name for name in item.tolist() if name not in subject_of]
        if unnamed:
            raise UserError(
                f"{path}: {len(unnamed)} of {len(item)} images have no row, the first is {unnamed[0]}; add them, or "
                "remove subjects.csv to split without regard to people"
            )
        return np.array([subject_of[name] for name in item.tolist()], dtype=str)


def _part_folders(folder: Path) -> list[tuple[Path, str]]:
    """(folder, part) of train, val and test folders."""
    return [(path, _PARTS[path.name.lower()]) for path in subfolders(folder) if path.name.lower() in _PARTS]


def _class_folders(folder: Path) -> list[Path]:
    """Folders directly in ``folder`` that hold an image, but for those named as parts."""
    return [path for path in subfolders(folder) if path.name.lower() not in _PARTS and _has_image(path)]


def _has_image(folder: Path) -> bool:
    return bool(list_images(folder)[0])


def _labelled(folder: Path) -> bool:
    """Whether there are class folders, directly or by part."""
    return bool(_class_folders(folder)) or any(_class_folders(path) for path, _ in _part_folders(folder))


def _class_names(names: set[str]) -> dict[str, str]:
    """Class name of each folder name: canonical when all are expressions."""
    ordered = sorted(names)
    try:
        return dict(zip(ordered, canonical_all(ordered), strict=True))
    except UserError:
        return {name: name for name in ordered}
