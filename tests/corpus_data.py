"""Tables, lists of labels and trees of images as they come: what each must give, images, a listed row or a sentence."""

import bz2
import gzip
import json
import lzma
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from corpus_images import REFUSED as BAD_IMAGES
from fakes import picture, pixels, save, table, write_text


class Read(NamedTuple):
    """So many images, each in its class."""

    images: int


class Listed(NamedTuple):
    """The others are read; this one is named with a reason, each a regular expression."""

    item: str
    reason: str


class Case(NamedTuple):
    """Files for a reader.

    Attributes:
        reader: YAML under conf/data.
        write: makes the files under a new folder.
        expected: a str is the sentence, as a regular expression.
    """

    reader: str
    write: Callable[[Path], object]
    expected: Read | Listed | str


# -- FER2013's csv: an image of each part, its label its number --------------------------------------------------------

HEADER = ("emotion", "pixels", "Usage")
ROWS = [(i, pixels(picture(i, i)), usage) for i, usage in enumerate(("Training", "PublicTest", "PrivateTest"))]
TEXT = table([HEADER, *ROWS])
GOOD = ROWS[0]


def csv_of(content: str | bytes, name: str = "fer2013.csv") -> Callable[[Path], object]:
    """Writes the csv."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda root: (root / name).write_bytes(data)


def zipped(*names: str) -> Callable[[Path], object]:
    """Writes a zip with the csv under each of the names."""

    def write(root: Path) -> None:
        with zipfile.ZipFile(root / "fer2013.csv.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(name, TEXT)

    return write


THREE = Read(3)


def fer2013(write: Callable[[Path], object], expected: Read | Listed | str = THREE) -> Case:
    return Case("fer2013", write, expected)


def odd(*fields: object) -> Case:
    """A fourth row that must be listed; the last of the fields is the reason."""
    return fer2013(csv_of(table([HEADER, *ROWS, fields[:-1]])), Listed("fer2013.csv:3", str(fields[-1])))


NOTED = table([(*HEADER, "note"), *((*row, "a\nb") for row in ROWS)])
NOT_FOUND, NOT_WHOLE = r"FER2013 not found: .*data\.root=", "cannot be read to its end .*fetch it again"

TABLES: dict[str, Case] = {
    "as published": fer2013(csv_of(TEXT)),
    "byte order mark": fer2013(csv_of("\ufeff" + TEXT)),
    "crlf": fer2013(csv_of(TEXT.replace("\n", "\r\n"))),
    "cr alone": fer2013(csv_of(TEXT.replace("\n", "\r"))),
    "semicolons": fer2013(csv_of(TEXT.replace(",", ";"))),
    "tabs": fer2013(csv_of(TEXT.replace(",", "\t"))),
    "header in capitals with blanks": fer2013(
        csv_of(TEXT.replace("emotion,pixels,Usage", " EMOTION , Pixels, usage "))
    ),
    "quoted": fer2013(csv_of(table([HEADER, *ROWS], quote=True))),
    "columns in another order": fer2013(csv_of(table([HEADER[::-1], *(row[::-1] for row in ROWS)]))),
    "a column more, in latin-1": fer2013(csv_of(NOTED.replace("a\nb", "é").encode("latin-1"))),
    "a line break in quotes": fer2013(csv_of(NOTED)),
    "empty lines": fer2013(csv_of(TEXT.replace("\n", "\n\n"))),
    "no last line end": fer2013(csv_of(TEXT[:-1])),
    "xz": fer2013(csv_of(lzma.compress(TEXT.encode()), "fer2013.csv.xz")),
    "gzip": fer2013(csv_of(gzip.compress(TEXT.encode()), "fer2013.csv.gz")),
    "bzip2": fer2013(csv_of(bz2.compress(TEXT.encode()), "fer2013.csv.bz2")),
    "gzip without the name": fer2013(csv_of(gzip.compress(TEXT.encode()))),
    "zip": fer2013(zipped("fer2013/fer2013.csv")),
    "zip with paths that lead out": fer2013(zipped("../../fer2013.csv")),  # read in place, never unpacked
    "zip with two csv": fer2013(zipped("a.csv", "b.csv"), "expected one csv in the zip, found 2"),
    "xz cut": fer2013(csv_of(lzma.compress(TEXT.encode())[:-30], "fer2013.csv.xz"), NOT_WHOLE),
    "gzip cut": fer2013(csv_of(gzip.compress(TEXT.encode())[:-30], "fer2013.csv.gz"), NOT_WHOLE),
    "zip cut": fer2013(csv_of(b"PK\x03\x04" + b"x" * 99, "fer2013.csv.zip"), NOT_FOUND),
    "gzip of one line of 20 MB": fer2013(
        csv_of(gzip.compress((TEXT + "0" * 20_000_000).encode()), "fer2013.csv.gz"), "a line is longer than 10,000,000"
    ),
    "a field of 200,000 letters": fer2013(csv_of(TEXT + f"0,{'1 ' * 100_000},Training\n"), "field larger than"),
    "a million columns": fer2013(csv_of("a," * 1_000_000 + "\n" + TEXT), NOT_FOUND),
    "nul byte": fer2013(csv_of(TEXT + "0,\0,Training\n"), Listed("fer2013.csv:3", "not a whole number")),
    "utf-16": fer2013(csv_of(TEXT.encode("utf-16")), NOT_FOUND),
    "empty": fer2013(csv_of(""), NOT_FOUND),
    "a web page": fer2013(csv_of("<html>log in</html>"), NOT_FOUND),
    "a picture": fer2013(csv_of(BAD_IMAGES["tiff"][0]), NOT_FOUND),
    "a header alone": fer2013(csv_of("emotion,pixels,Usage\n"), r"fer2013\.csv: none of its 0 rows .*fetch it again"),
    "no header": fer2013(csv_of(table(ROWS)), NOT_FOUND),
    "a column twice": fer2013(csv_of(TEXT.replace("Usage", "Usage,pixels", 1)), "names a column twice .*remove one"),
    "a column missing": fer2013(csv_of(table([HEADER[:2], *(row[:2] for row in ROWS)])), NOT_FOUND),
    "two copies under unknown names": fer2013(
        lambda root: [csv_of(TEXT, name)(root) for name in ("a.csv", "b.csv")],
        r"several csv files fit \(a.csv, b.csv\)",
    ),
    "a folder of that name": fer2013(lambda root: (root / "fer2013.csv").mkdir(), NOT_FOUND),
}

LABELS: dict[str, Case] = {
    "too large": odd(7, *GOOD[1:], "label '7' is not a whole number from 0 to 6"),
    "negative": odd(-1, *GOOD[1:], "label '-1'"),
    "a fraction": odd(1.5, *GOOD[1:], "label '1.5'"),
    "nan": odd("nan", *GOOD[1:], "label 'nan'"),
    "a name": odd("happy", *GOOD[1:], "label 'happy'"),
    "none": odd("", *GOOD[1:], "label ''"),
    "of 40 digits": odd("1" * 40, *GOOD[1:], "is not a whole number from 0 to 6"),
    "unknown part": odd(0, GOOD[1], "Test", "Usage 'Test' is none of"),
    "three pixels": odd(0, "1 2 3", "Training", "3 pixels, expected 2304"),
    "a pixel too many": odd(0, GOOD[1] + " 7", "Training", "2305 pixels"),
    "a pixel of 300": odd(0, "300 " + GOOD[1].split(" ", 1)[1], "Training", "a pixel is 300"),
    "a negative pixel": odd(0, "-1 " + GOOD[1].split(" ", 1)[1], "Training", "not a whole number from 0 to 255"),
    "a pixel of 30 digits": odd(0, "9" * 30 + " " + GOOD[1].split(" ", 1)[1], "Training", "a pixel"),
    "pixels in words": odd(0, "black", "Training", "not a whole number"),
    "no pixels": odd(0, "", "Training", "pixel"),
    "a field short": odd(0, GOOD[1], "2 fields, expected 3"),
    "a field more": odd(*GOOD, "x", "4 fields, expected 3"),
}

# -- lists of files ----------------------------------------------------------------------------------------------------


def rafdb(extra: str = "", before: Callable[[Path], object] = lambda root: None) -> Callable[[Path], object]:
    """Writes RAF-DB with two images, and more lines in its list."""

    def write(root: Path) -> None:
        for name in ("train_00001", "test_0001"):
            save(root / f"basic/Image/aligned/{name}_aligned.jpg", picture(0, 0, 100, colour=True))
        write_text(root / "basic/EmoLabel/list_patition_label.txt", f"train_00001.jpg 1\ntest_0001.jpg 1\n{extra}\n")
        before(root)

    return write


def linked(name: str) -> Callable[[Path], object]:
    """Puts an image outside the root, and a link to it."""

    def write(root: Path) -> None:
        save(root.parent / "private.jpg", picture(0, 1, 100, colour=True))
        (root / name).symlink_to(root.parent / "private.jpg")

    return write


def affectnet(name: str, expression: str = "1", before: Callable[[Path], object] = lambda root: None) -> Any:
    """Writes AffectNet with an image in each list, and a row more in the first."""

    def write(root: Path) -> None:
        columns = ("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height", "facial_landmarks")
        header = (*columns, "expression", "valence", "arousal")
        for part, file in enumerate(("training", "validation")):
            save(root / f"Manually_Annotated/Manually_Annotated_Images/1/{part}.jpg", picture(0, part, 80, colour=True))
            rows = [(f"1/{part}.jpg", 0, 0, 80, 80, "", 0, 0, 0)]
            rows += [(name, 0, 0, 80, 80, "", expression, 0, 0)] if part == 0 else []
            write_text(root / f"Manually_Annotated_file_lists/{file}.csv", table([header, *rows]))
        before(root)

    return write


def folder(*names: str, subjects: str | None = None, more: Callable[[Path], object] = lambda root: None) -> Any:
    """Writes images of one's own, two of them by default, and a list of their people."""

    def write(root: Path) -> None:
        for name in names or ("happy/a.png", "sad/b.png"):
            save(root / name, picture(0, 0))
        if subjects is not None:
            write_text(root / "subjects.csv", f"path,subject\n{subjects}")
        more(root)

    return write


def ferplus(votes: str) -> Callable[[Path], object]:
    """Writes FER+ whose second row has these votes."""

    def write(root: Path) -> None:
        names = "neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
        lines = [
            f"{usage},fer{i:07d}.png,{votes if i == 1 else '10' + ',0' * 9}" for i, (_, _, usage) in enumerate(ROWS)
        ]
        csv_of(TEXT)(root)
        write_text(root / "fer2013new.csv", "\n".join([f"Usage,Image name,{names}", *lines, ""]))

    return write


def ckplus(emotion: str) -> Callable[[Path], object]:
    """Writes CK+ with two sequences, one of them with this label."""

    def write(root: Path) -> None:
        for subject, code in (("S005", "   1.0000000e+00\n"), ("S010", emotion)):
            for frame in range(1, 5):
                save(root / f"cohn-kanade-images/{subject}/001/{subject}_001_{frame:08d}.png", picture(0, frame))
            write_text(root / f"Emotion/{subject}/001/{subject}_001_00000004_emotion.txt", code)

    return write


def affectnet_npy(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """Writes the later release with two images a part, and changes the annotations of the first."""

    def write(root: Path) -> None:
        for part in ("train_set", "val_set"):
            for number in range(2):
                save(root / f"{part}/images/{number}.jpg", picture(0, number, 60, colour=True))
                for kind, value in {"exp": 0, "val": 0.1, "aro": 0.1, "lnd": np.zeros(136)}.items():
                    (root / part / "annotations").mkdir(exist_ok=True)
                    np.save(root / f"{part}/annotations/{number}_{kind}.npy", np.array(value))
        change(root / "train_set/annotations/0_exp.npy")

    return write


def pickled(path: Path) -> None:
    """An array of objects, which NumPy keeps as a pickle."""
    np.save(path, np.array({"a": 1}, dtype=object), allow_pickle=True)


def prepared(file: str, box: str = "0 0 9 9") -> Callable[[Path], object]:
    """Writes what fer.prepare leaves, with one row changed."""
    points, transform = "1 1 8 1 5 5 2 8 7 8", "1 0 0 0 1 0"
    text = table([("file", "box", "landmarks", "transform"), (file, box, points, transform)])
    return folder(more=lambda root: write_text(root / "manifest.csv", text))


OUT, LINK = "must be relative and stay under", "is a link leading outside"
PEOPLE = "happy/a.png,x\nsad/b.png,y\n"

LISTS: dict[str, Case] = {
    "people": Case("folder", folder(subjects=PEOPLE), Read(2)),
    "people, an absolute path": Case(
        "folder", folder(subjects=PEOPLE + "/etc/passwd,x\n"), f"subjects.csv, row 2.*{OUT}"
    ),
    "people, a path upwards": Case("folder", folder(subjects=PEOPLE + "../../etc/passwd,x\n"), f"row 2.*{OUT}"),
    "people, a path up and down": Case("folder", folder(subjects=PEOPLE + "happy/../../x.png,x\n"), f"row 2.*{OUT}"),
    "people, a path of Windows": Case("folder", folder(subjects=PEOPLE + "..\\x.png,x\n"), f"row 2.*{OUT}"),
    "people, a drive": Case("folder", folder(subjects=PEOPLE + "C:\\x.png,x\n"), f"row 2.*{OUT}"),
    "people, a link outwards": Case(
        "folder", folder(subjects=PEOPLE + "happy/l.png,x\n", more=linked("happy/l.png")), f"row 2.*{LINK}"
    ),
    "people, an image without": Case(
        "folder", folder(subjects="happy/a.png,x\n"), "1 of 2 images have no row.*sad/b.png"
    ),
    "people, one without a name": Case("folder", folder(subjects="happy/a.png,\n"), "row 0: no subject .*fill it in"),
    "people, a field more": Case("folder", folder(subjects=PEOPLE + "a,b,c\n"), "3 fields, expected 2"),
    "people, an image that is not there": Case("folder", folder(subjects=PEOPLE + "happy/c.png,x\n"), Read(2)),
    "people, other columns": Case(
        "folder",
        folder(more=lambda root: write_text(root / "subjects.csv", "a,b\n")),
        "expected the columns path, subject",
    ),
    "crops, a path upwards": Case("folder", prepared("../x.png"), f"manifest.csv, row 0.*{OUT}"),
    "crops, words for numbers": Case(
        "folder", prepared("happy/a.png", "a b c d"), "expected 4 numbers, found 'a b c d'"
    ),
    "crops": Case("folder", prepared("happy/a.png"), Read(2)),
    "rafdb": Case("rafdb", rafdb(), Read(2)),
    "rafdb, label 0": Case("rafdb", rafdb("train_00001.jpg 0"), "label 0, but RAF-DB counts from 1"),
    "rafdb, label 9": Case("rafdb", rafdb("train_00002.jpg 9", linked("x")), r"RAF-DB not found"),
    "rafdb, a label in words": Case(
        "rafdb", rafdb("train_00002.jpg five"), Listed("list_patition_label.txt:2", "a label")
    ),
    "rafdb, twice": Case("rafdb", rafdb("train_00001.jpg 2"), Listed("train_00001.jpg", "listed twice")),
    "rafdb, not there": Case("rafdb", rafdb("train_00007.jpg 2"), Listed("train_00007", "the file is not there")),
    "rafdb, a path upwards": Case(
        "rafdb", rafdb("../../x.jpg 2"), Listed("list_patition_label.txt:2", "not an image name")
    ),
    "rafdb, a link outwards": Case(
        "rafdb", rafdb("train_00002.jpg 1", linked("basic/Image/aligned/train_00002_aligned.jpg")), LINK
    ),
    "affectnet": Case("affectnet", affectnet("1/9.jpg"), Listed("1/9.jpg", "the file is not there")),
    "affectnet, an absolute path": Case("affectnet", affectnet("/etc/1.jpg"), f"training.csv:1.*{OUT}"),
    "affectnet, a path upwards": Case("affectnet", affectnet("1/../../../1.jpg"), f"training.csv:1.*{OUT}"),
    "affectnet, a link outwards": Case(
        "affectnet",
        affectnet("1/9.jpg", before=linked("Manually_Annotated/Manually_Annotated_Images/1/9.jpg")),
        LINK,
    ),
    "affectnet, expression 11": Case(
        "affectnet", affectnet("1/0.jpg", "11"), Listed("training.csv:1", "0 to 10, found '11'")
    ),
    "affectnet, expression in words": Case(
        "affectnet", affectnet("1/0.jpg", "happy"), Listed("training.csv:1", "'happy'")
    ),
    "affectnet, a tiff": Case("affectnet", affectnet("1/0.tif"), Listed("1/0.tif", "not there|is not read")),
    "affectnet npy, a pickle": Case("affectnet", affectnet_npy(pickled), Listed("0.jpg", "allow_pickle=False")),
    "affectnet npy, empty": Case(
        "affectnet", affectnet_npy(lambda p: p.write_bytes(b"")), Listed("0.jpg", "cannot be used")
    ),
    "affectnet npy, not there": Case("affectnet", affectnet_npy(os.unlink), Listed("0.jpg", "has no annotation")),
    "affectnet npy, 3.5": Case("affectnet", affectnet_npy(lambda p: np.save(p, np.array(3.5))), Listed("0.jpg", "3.5")),
    "ferplus": Case("ferplus", ferplus("0,10" + ",0" * 8), Read(3)),
    "ferplus, negative votes": Case(
        "ferplus", ferplus("-1,9" + ",0" * 8), Listed("fer2013new.csv:1", "ten counts of votes")
    ),
    "ferplus, nobody sees a face": Case("ferplus", ferplus("0," * 9 + "10"), Listed("fer2013.csv:1", "no face")),
    "ckplus": Case("ckplus", ckplus("3.0"), Read(6)),
    "ckplus, label 8": Case("ckplus", ckplus("8.0"), Listed("S010_001_00000004_emotion.txt", "one number from 1 to 7")),
    "ckplus, nan": Case("ckplus", ckplus("nan"), Listed("S010_001_00000004_emotion.txt", "one number from 1 to 7")),
    "ckplus, no label": Case("ckplus", ckplus(""), Listed("S010_001_00000004_emotion.txt", "one number from 1 to 7")),
}

# -- trees -------------------------------------------------------------------------------------------------------------


def not_text(root: Path) -> None:
    """A file whose name is no UTF-8."""
    os.close(os.open(os.fsencode(root / "happy") + b"/\xff.jpg", os.O_CREAT))


def loop(root: Path) -> None:
    """A folder that is inside itself."""
    (root / "happy/again").symlink_to(root)


def many(*places: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """The same at several places under the root."""
    return lambda root: [make(root / place) for place in places]


NO_IMAGES = r"folder of images not found: .*data\.root="

TREES: dict[str, Case] = {
    "classes": Case("folder", folder(), Read(2)),
    "parts": Case("folder", folder("train/happy/a.png", "Test/happy/a.png"), Read(2)),
    "one folder deeper": Case("folder", folder("unpacked/happy/a.png", "unpacked/sad/b.png"), Read(2)),
    "left behind by other systems": Case(
        "folder", folder("happy/a.png", "sad/b.png", "__MACOSX/happy/a.png", "happy/._a.png", ".trash/c.png"), Read(2)
    ),
    "names with blanks and letters of the world": Case("folder", folder("sehr glücklich/ä b.png", "哀/ب.png"), Read(2)),
    "capitals": Case("folder", folder("Happy/a.PNG", "happy/a.png"), Read(2)),
    "a folder inside itself": Case("folder", folder(more=loop), Read(2)),
    "nothing": Case("folder", lambda root: None, NO_IMAGES),
    "no pictures": Case("folder", lambda root: write_text(root / "happy/notes.txt", "x"), NO_IMAGES),
    "empty class folders": Case("folder", many("happy", "sad", make=Path.mkdir), NO_IMAGES),
    "classes beside parts": Case(
        "folder", folder("train/happy/a.png", "sad/b.png"), "data.form=classes or data.form=parts"
    ),
    "two copies": Case("folder", folder("a/happy/a.png", "b/happy/a.png"), "lies in several folders .*set data.root"),
    "a gif": Case(
        "folder", folder(more=lambda root: write_text(root / "happy/x.gif", "x")), Listed("x.gif", ".gif is not")
    ),
    "a name that is no text": Case("folder", folder(more=not_text), Listed(r"udcff\.jpg", "rename the file")),
    "a text for a picture": Case(
        "folder", folder(more=lambda r: write_text(r / "sad/x.jpg", "x")), Listed("x.jpg", "content")
    ),
    "a fifo": Case("folder", folder(more=lambda root: os.mkfifo(root / "sad/x.jpg")), Listed("x.jpg", "not a regular")),
    "a folder for a picture": Case(
        "folder", folder(more=lambda root: (root / "sad/x.jpg").mkdir()), Listed("x", "regular")
    ),
    "a broken link": Case(
        "folder", folder(more=lambda r: (r / "sad/x.jpg").symlink_to("y")), Listed("x.jpg", "no such file")
    ),
    "a bomb": Case(
        "folder",
        folder(more=lambda root: (root / "sad/x.png").write_bytes(BAD_IMAGES["png 196 million pixels"][0])),
        Listed("x.png", "50 million|more than 50"),
    ),
}

# -- decoded images kept from an earlier start -------------------------------------------------------------------------


def cut(path: Path) -> None:
    """Half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


STORES: dict[str, tuple[str, Callable[[Path], object]]] = {  # the file, and what happens to it
    "images cut": ("images.npy", cut),
    "images a pickle": ("images.npy", pickled),
    "windows a pickle": ("windows.npy", pickled),
    "pixel hashes gone": ("pixels.npy", os.unlink),
    "manifest cut": ("manifest.npz", cut),
    "manifest of pickles": ("manifest.npz", lambda path: np.savez(path, text=np.array([{"a": 1}], dtype=object))),
    "manifest without text": ("manifest.npz", lambda path: np.savez(path, item=np.array(["a"]))),
    "list of bad images no JSON": ("bad.json", lambda path: path.write_text("x")),
    "list of bad images of another kind": ("bad.json", lambda path: path.write_text(json.dumps({"a": 1}))),
}
