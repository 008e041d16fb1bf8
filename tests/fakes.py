"""Every real folder layout in small, written from generated images.

One writer per data set: ``write_<name>(root, form, ...)`` writes one form and returns the images per part and class a
reader must find. `WRITERS` has, for each YAML in ``conf/data`` that reads files, the default form with at least
`N` images per class and part. Names, label orders, headers and oddities are those of the official files.
"""

import csv
import functools
import io
import json
import lzma
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

N = 6  # images per class and part
Counts = dict[str, dict[str, int]]

FER2013 = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
FERPLUS = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
NAMES = {"angry": "anger", "happy": "happiness", "sad": "sadness"}  # what the sources write -> canonical
PUBLIC = (467, 56, 496, 895, 653, 415, 607)  # PublicTest images per class of the full FER2013


def picture(label: int, seed: int, size: int = 48, colour: bool = False) -> np.ndarray:
    """A generated image: stripes whose direction tells the class, noise that makes every seed a different image."""
    rng = np.random.default_rng([label, seed])
    y, x = np.mgrid[:size, :size] / size
    angle = np.pi * label / 11
    stripes = 128 + 80 * np.sin(14 * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 1))
    channels = (3,) if colour else ()
    noise = rng.normal(0, 12, (size, size, *channels))
    return np.clip((stripes[..., None] if colour else stripes) + noise, 0, 255).astype(np.uint8)


@functools.cache
def _waves(height: int, width: int) -> np.ndarray:
    """(K, H * W) complex waves of every class's stripes, faded out at the border."""
    y, x = np.mgrid[:height, :width]
    angle = np.pi * np.arange(11)[:, None, None] / 11
    wave = np.exp(14j * (x / width * np.cos(angle) + y / height * np.sin(angle)))
    return (wave * np.outer(np.hanning(height), np.hanning(width))).reshape(11, -1)


def recognise(image: np.ndarray) -> int:
    """The class of a generated picture, read off its pixels; an independent check of what a reader pairs up."""
    grey = image.mean(-1) if image.ndim == 3 else image.astype(float)
    # einsum rather than @: many small products are no work for a multi-threaded BLAS.
    return int(np.abs(np.einsum("kp,p->k", _waves(*grey.shape), (grey - grey.mean()).ravel())).argmax())


def save(path: Path, image: np.ndarray) -> None:
    """Write an RGB or grey image in the format of the extension, making folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 else image)


def write_text(path: Path, text: str) -> None:
    """Write text as it is, line ends included, making folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def table(rows: Iterable[Sequence[Any]], *, newline: str = "\n", quote: bool = False, delimiter: str = ",") -> str:
    """Rows as csv text."""
    buffer = io.StringIO()
    quoting = csv.QUOTE_ALL if quote else csv.QUOTE_MINIMAL
    csv.writer(buffer, lineterminator=newline, quoting=quoting, delimiter=delimiter).writerows(rows)
    return buffer.getvalue()


def pixels(image: np.ndarray) -> str:
    """An image as FER2013's text."""
    return " ".join(map(str, image.ravel().tolist()))


def counts(parts: Iterable[str], classes: Iterable[str], n: int = N) -> Counts:
    """``n`` images per part and class, with canonical class names."""
    names = [NAMES.get(c, c) for c in classes]
    return {part: dict.fromkeys(names, n) for part in parts}


# -- FER2013 ------------------------------------------------------------------------------------------------------

USAGES = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}


def fer2013_rows(n: int = N, classes: int = 7) -> list[tuple[int, str, str]]:
    """(emotion, pixels, Usage) of a small fer2013.csv: Training, PublicTest, PrivateTest, classes mixed."""
    rows = []
    for part, usage in enumerate(USAGES):
        for i in range(n * classes):
            label = i % classes
            rows.append((label, pixels(picture(label, 1000 * part + i)), usage))
    return rows


def write_fer2013(root: Path, form: str = "csv", *, defects: bool = False) -> Counts:
    """Write FER2013.

    Args:
        root: the data root.
        form: ``csv``, ``csv.xz``, ``csv.zip``, ``icml`` (other column order, leading blanks), ``kaggle`` (train.csv
            and labelled test.csv), ``kaggle_unlabelled``, ``prefix``, ``numbered``.
        defects: adds six rows that cannot be read at the end (``csv`` only).
    """
    root.mkdir(parents=True, exist_ok=True)
    rows = fer2013_rows()
    header = ("emotion", "pixels", "Usage")
    if form.startswith("csv"):
        good = rows[0]
        bad = [
            (7, good[1], good[2]),
            (0, "1 2 3", good[2]),
            (0, "300 " + good[1].split(" ", 1)[1], good[2]),
            (0, "x" + good[1], good[2]),
            (0, good[1], "Test"),
            (0, good[1]),
        ]
        text = table([header, *rows, *(bad if defects else [])])
        if form == "csv.xz":
            (root / "fer2013.csv.xz").write_bytes(lzma.compress(text.encode(), preset=0))
        elif form == "csv.zip":
            with zipfile.ZipFile(root / "fer2013.csv.zip", "w") as archive:
                archive.writestr("fer2013/fer2013.csv", text)
        else:
            write_text(root / "fer2013.csv", text)
    elif form == "icml":
        text = table([("emotion", " Usage", " pixels"), *((e, u, p) for e, p, u in rows)])
        write_text(root / "icml_face_data.csv", text)
    elif form in ("kaggle", "kaggle_unlabelled"):
        train = [(e, p) for e, p, u in rows if u == "Training"]
        test = [(e, p) if form == "kaggle" else (p,) for e, p, u in rows if u != "Training"]
        write_text(root / "train.csv", table([("emotion", "pixels"), *train], newline="\r\n", quote=True))
        columns = ("emotion", "pixels") if form == "kaggle" else ("pixels",)
        write_text(root / "test.csv", table([columns, *test], newline="\r\n", quote=True))
    elif form == "prefix":
        for i, (label, _, usage) in enumerate(rows):
            part = "train" if usage == "Training" else "test"
            name = f"{usage}_{(i * 7919) % 100003}.jpg"
            save(root / part / FER2013[label] / name, picture(label, i))
    elif form == "numbered":
        folders = ("angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral")
        for label, name in enumerate(folders):
            for part, first in (("train", 0), ("test", 0), ("test", PUBLIC[label])):
                for k in range(first, first + N):
                    save(root / part / name / f"im{k}.png", picture(label, 3 * k + (part == "test")))
    else:
        raise ValueError(form)
    return counts(USAGES.values(), FER2013)


# -- FER+ ---------------------------------------------------------------------------------------------------------

NO_NAME = (0, 0, 0, 0, 0, 0, 0, 0, 0, 10)
SPREAD = (3, 0, 0, 3, 2, 0, 2, 0, 0, 0)
UNKNOWN = (2, 0, 0, 0, 0, 0, 0, 0, 8, 0)
NINE = (7, 0, 0, 1, 0, 0, 0, 0, 1, 0)  # the votes of one official row sum to 9


def write_ferplus(root: Path, form: str = "csv", *, labels: bool = True) -> Counts:
    """Write FER+ in the majority reading's counts.

    Every part begins with four oddities: a row without name, one without majority, one where unknown wins, and two
    rows of the same name of which the official script keeps the last. Names are not row numbers.

    Args:
        root: the data root.
        form: ``csv`` (fer2013.csv, fer2013new.csv, label files beside them) or ``folders``.
        labels: whether the label.csv files are written.
    """
    images, new = [], [("Usage", "Image name", *FERPLUS, "unknown", "NF")]
    row = 0
    for usage in USAGES:
        votes = [NO_NAME, SPREAD, UNKNOWN, NINE, NINE]
        votes += [
            tuple(8 if c == label else 2 if c == (label + 1) % 8 else 0 for c in range(10)) for label in range(8)
        ] * N
        for i, vote in enumerate(votes):
            name = "" if vote == NO_NAME else f"fer{row + row // 5 - (i == 4):07d}.png"
            if i == 4:
                name = new[-1][1]
            images.append((row % 7, pixels(picture(int(np.argmax(vote)), row)), usage))
            new.append((usage, name, *vote))
            row += 1
    folders = dict(zip(USAGES, ("Train", "Valid", "Test"), strict=True))
    named = {(usage, name): votes for usage, name, *votes in new[1:] if name}  # the last of a repeated name stays
    for usage, folder in folders.items():
        path = root / f"FER2013{folder}" / "label.csv" if form == "folders" else root / f"ferplus_label_{folder}.csv"
        if labels:
            rows = [(name, "(0, 0, 48, 48)", *votes) for (u, name), votes in sorted(named.items()) if u == usage]
            write_text(path, table(rows))
    write_text(root / "fer2013new.csv", table(new))
    if form == "csv":
        write_text(root / "fer2013.csv", table([("emotion", "pixels", "Usage"), *images]))
    else:
        for (usage, name, *_), (_, text, _) in zip(new[1:], images, strict=True):
            if name:
                image = np.array(text.split(), dtype=np.uint8).reshape(48, 48)
                save(root / f"FER2013{folders[usage]}" / name, image)
    expected = counts(USAGES.values(), FERPLUS)
    for part in expected.values():
        part["neutral"] += 2 if form == "csv" else 1  # the two rows NINE
    return expected


# -- own folders --------------------------------------------------------------------------------------------------


def write_folder(
    root: Path, form: str = "parts", *, classes: Sequence[str] = FER2013, subjects: bool = False
) -> Counts:
    """Write a folder per class: ``parts`` (train, val, test) or ``classes``."""
    parts = ("train", "val", "test") if form == "parts" else ("",)
    people = [("path", "subject")]
    for p, part in enumerate(parts):
        for label, name in enumerate(classes):
            for i in range(N):
                path = Path(part, name, f"{i}.jpg")
                save(root / path, picture(label, 100 * p + i, size=64, colour=True))
                people.append((path.as_posix(), f"person {p}-{i // 2}"))
    if subjects:
        write_text(root / "subjects.csv", table(people, newline="\r\n"))
    return counts(parts if form == "parts" else ("all",), classes)


# -- RAF-DB -------------------------------------------------------------------------------------------------------

RAFDB = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")
COMPOUND = (
    *("happily surprised", "happily disgusted", "sadly fearful", "sadly angry", "sadly surprised", "sadly disgusted"),
    *("fearfully angry", "fearfully surprised", "angrily surprised", "angrily disgusted", "disgustedly surprised"),
)


def write_rafdb(
    root: Path, form: str = "official", *, labels: str = "basic", list_name: str = "list_patition_label.txt"
) -> Counts:
    """Write RAF-DB.

    Args:
        root: the data root, which gets ``basic/`` or ``compound/``.
        form: ``official`` (aligned and original images, manual landmarks, boxes), ``folders`` (1 to 7, with csv).
        labels: ``basic`` or ``compound``.
        list_name: the release spells it ``list_patition_label.txt``, its README ``list_partition_label.txt``.
    """
    classes = RAFDB if labels == "basic" else COMPOUND
    top = root / labels
    lines, csvs = [], {"train": [("image", "label")], "test": [("image", "label")]}
    for part, digits in (("train", 5), ("test", 4)):
        for i in range(N * len(classes)):
            label = i % len(classes)
            stem = f"{part}_{i + 1:0{digits}d}"
            lines.append(f"{stem}.jpg {label + 1}")
            csvs[part].append((f"{stem}_aligned.jpg", label + 1))
            face = picture(label, i + 1000 * (part == "test"), size=100, colour=True)
            if form == "folders":
                save(root / "DATASET" / part / str(label + 1) / f"{stem}_aligned.jpg", face)
                continue
            save(top / "Image/aligned" / f"{stem}_aligned.jpg", face)
            photo = np.full((160, 200, 3), 90, np.uint8)
            photo[20:120, 30:130] = face
            save(top / "Image/original" / f"{stem}.jpg", photo)
            points = [(60.5, 50), (100, 50.25), (80, 70), (65, 95), (95, 95)]
            text = "".join(f"{x}\t{y}\n" for x, y in points) + f"{i % 3}\n{i % 3}\n{i % 5}\n"
            write_text(top / "Annotation/manual" / f"{stem}_manu_attri.txt", text)
            write_text(top / "Annotation/boundingbox" / f"{stem}_boundingbox.txt", "30 20 130 120 \n")
    if form == "folders":
        for part, rows in csvs.items():
            write_text(root / f"{part}_labels.csv", table(rows))
    else:
        write_text(top / "EmoLabel" / list_name, "\n".join(lines) + "\n")
    return counts(("train", "test"), classes)


def write_rafdb_compound(root: Path) -> Counts:
    """RAF-DB's compound set."""
    return write_rafdb(root, labels="compound")


# -- CK+ ----------------------------------------------------------------------------------------------------------

CKPLUS = ("neutral", "anger", "contempt", "disgust", "fear", "happiness", "sadness", "surprise")  # codes 0 to 7
CKEXTENDED = ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral", "contempt")
CK_SUBJECTS = tuple(f"S{n:03d}" for n in (5, 10, 11, 14, 22, 26, 28, 29, 32, 34, 35, 37, 42, 44))


def write_ckplus(root: Path, form: str = "official", *, landmarks: bool = True) -> Counts:
    """Write CK+: 14 subjects with 3 labelled sequences each, 6 per emotion, of which the last three frames count.

    Args:
        root: the data root.
        form: ``official`` (with an unlabelled sequence per subject, of which some have an empty Emotion folder),
            ``ck48`` (the last three frames in class folders) or ``csv`` (ckextended.csv).
        landmarks: whether the release's landmarks are written.
    """
    rows = [("emotion", "pixels", "Usage")]
    points = "".join(f"   {55 + 50 * i / 67:.7e}   {35 + 50 * i / 67:.7e}\n" for i in range(68))
    for s, subject in enumerate(CK_SUBJECTS):
        for k in range(4):
            sequence = f"{k + 1:03d}"
            code = 1 + (3 * s + k) % 7 if k < 3 else None
            for frame in (1, 2, 4, 5, 6):
                name = f"{subject}_{sequence}_{frame:08d}"
                face = picture(code if code and frame > 3 else 0, 100 * s + 10 * k + frame, size=60)
                if form == "official":
                    image = np.full((120, 160), 90, np.uint8)
                    image[30:90, 50:110] = face
                    save(root / "cohn-kanade-images" / subject / sequence / f"{name}.png", image)
                    if landmarks:
                        write_text(root / "Landmarks" / subject / sequence / f"{name}_landmarks.txt", points)
                elif form == "ck48" and code and frame > 3:
                    save(
                        root / "CK+48" / CKPLUS[code].replace("happiness", "happy") / f"{name}.png",
                        cv2.resize(face, (48, 48)),
                    )
                elif form == "csv" and code and frame in (1, 6):
                    label = CKEXTENDED.index(CKPLUS[code] if frame == 6 else "neutral")
                    usage = ("Training", "PublicTest", "PrivateTest")[s % 3]
                    rows.append((label, pixels(cv2.resize(face, (48, 48))), usage))
            emotion = root / "Emotion" / subject / sequence
            if form == "official" and code:
                write_text(emotion / f"{subject}_{sequence}_00000006_emotion.txt", f"   {code:.7e}\n")
            elif form == "official" and s % 2:
                emotion.mkdir(parents=True)
                write_text(emotion / ".DS_Store", "x")
    if form == "csv":
        write_text(root / "ckextended.csv", table(rows))
    return counts(("all",), CKPLUS[1:], 6 if form == "csv" else 18)


# -- AffectNet ----------------------------------------------------------------------------------------------------

AFFECTNET = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt")
AFFECTNET_HEADER = (
    *("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height"),
    *("facial_landmarks", "expression", "valence", "arousal"),
)


def write_affectnet(root: Path, form: str = "release2017", *, header: bool = True) -> Counts:
    """Write AffectNet; every part has images of the labels none, uncertain and no-face too.

    Args:
        root: the data root.
        form: ``release2017``, ``npy`` (the later release) or ``plus`` (AffectNet+).
        header: whether the csv lists have their header.
    """
    for part in ("training", "validation"):
        rows: list[Sequence[Any]] = [AFFECTNET_HEADER] if header else []
        for i in range(11 * N):
            label, seed = i % 11, i + 1000 * (part == "training")
            valence, arousal = (-2, -2) if label > 7 else (round(label / 8 - 0.5, 3), 0.25)
            points = [round(float(v), 2) for v in np.random.default_rng(i).uniform(10, 70, 136)]
            face = picture(label, seed, size=60, colour=True)
            if form == "release2017":
                image = np.full((80, 90, 3), 90, np.uint8)
                image[10:70, 20:80] = face
                name = f"{1 + i % 2}/{seed * 7919:056x}.{'png' if i % 5 == 4 else 'jpg'}"
                save(root / "Manually_Annotated/Manually_Annotated_Images" / name, image)
                rows.append((name, 20, 10, 60, 60, ";".join(map(str, points)), label, valence, arousal))
                continue
            number = 3 * i + 2  # not consecutive
            if form == "npy":
                folder = root / {"training": "train_set", "validation": "val_set"}[part]
                (folder / "annotations").mkdir(parents=True, exist_ok=True)
                facts = {"exp": str(label) if i % 2 else label, "val": str(valence), "aro": arousal, "lnd": points}
                for kind, value in facts.items():
                    np.save(folder / "annotations" / f"{number}_{kind}.npy", np.array(value))
            else:
                folder = root / "human_annotated" / {"training": "train_set", "validation": "validation_set"}[part]
                fact = {
                    "human-label": label,
                    "soft-label": [0.75 if c == label else 0.05 for c in range(8)],
                    "subset": i % 3,
                    "meta-data": {
                        "valence": valence,
                        "arousal": arousal,
                        "age": 20 + i % 30,
                        "gender": {"female": 10.0, "male": 90.0},
                        "race": {"asian": 60.0, "white": 40.0},
                        "landmark-68": points,
                    },
                }
                write_text(folder / "annotations" / f"{number}.json", json.dumps(fact))
            save(folder / "images" / f"{number}.jpg", face)
        if form == "release2017":
            write_text(root / "Manually_Annotated_file_lists" / f"{part}.csv", table(rows))
    return counts(("train", "test"), AFFECTNET)


def write_affectnet7(root: Path) -> Counts:
    """AffectNet; the seven classes are chosen by the configuration."""
    return write_affectnet(root)


# Class names in the order of the generated pictures, so that a test can tell the class from the pixels.
DRAWN = {
    "fer2013": ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral"),
    "ferplus": FERPLUS,
    "folder": ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral"),
    "rafdb": RAFDB,
    "rafdb_compound": COMPOUND,
    "ckplus": CKPLUS,
    "affectnet": AFFECTNET,
    "affectnet7": AFFECTNET,
}

WRITERS: dict[str, Callable[[Path], Any]] = {
    "fer2013": write_fer2013,
    "ferplus": write_ferplus,
    "folder": write_folder,
    "rafdb": write_rafdb,
    "rafdb_compound": write_rafdb_compound,
    "ckplus": write_ckplus,
    "affectnet": write_affectnet,
    "affectnet7": write_affectnet7,
}
