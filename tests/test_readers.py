"""Readers of the official data sets: every form in small, its traps and defects, and the real files where present."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakes
import hydra
import numpy as np
import pytest
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from fer.data.base import ExpressionDataModule
from fer.data.images import BadImage, window
from fer.data.manifest import Manifest
from fer.errors import UserError

CONF = Path(__file__).parents[1] / "conf" / "data"
COMMON: dict[str, Any] = {
    "image_size": 48,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "batch_size": 8,
    "eval_batch_size": 8,
    "num_workers": 0,
    "resident": "no",
    "on_bad_image": "fail",
    "sampling": "plain",
    "augment": None,
    "tta": "none",
    "protocol": None,
    "seed": 0,
    "cache": "unused",
}


def config(name: str) -> Any:
    """A data set's YAML with what it inherits, without the common options."""
    own = OmegaConf.load(CONF / f"{name}.yaml")
    parents = [parent for parent in own.pop("defaults") if parent not in ("_common", "_self_")]
    return OmegaConf.merge(*(config(parent) for parent in parents), own)


def reader(name: str, root: Path, **options: Any) -> ExpressionDataModule:
    """The data set as its YAML builds it, on another root."""
    try:
        return hydra.utils.instantiate(config(name), **COMMON, root=str(root), **options)
    except InstantiationException as error:
        raise error.__cause__ or error from None


def manifest(name: str, root: Path, **options: Any) -> Manifest:
    return reader(name, root, **options).manifest()


def images(name: str, root: Path, **options: Any) -> tuple[Manifest, list[np.ndarray]]:
    data = reader(name, root, **options)
    found = data.manifest()
    return found, list(kept(data, found, np.arange(len(found))))


def kept(data: ExpressionDataModule, found: Manifest, rows: np.ndarray) -> Iterator[Any]:
    """What the store keeps of each image."""
    for row, image in zip(rows, data.images(found, rows), strict=True):
        if isinstance(image, BadImage) or not data.crop_to_box or found.box is None:
            yield image
        else:
            x, y, width, height = window(*image.shape[:2], found.box[row])
            yield image[y : y + height, x : x + width]


def same_classes(found: dict[str, dict[str, int]], expected: dict[str, dict[str, int]]) -> bool:
    """Equal counts, whatever the classes' order; classes without images may be left out."""
    return {p: {c: n for c, n in classes.items() if n} for p, classes in found.items()} == expected


# -- what holds for every data set --------------------------------------------------------------------------------

FILE_SETS = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem in fakes.WRITERS)


@pytest.fixture(scope="module", params=FILE_SETS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A data set's default form, only to be read: its name, its root, the counts to be found."""
    root = tmp_path_factory.mktemp(request.param) / "unpacked"
    return request.param, root, fakes.WRITERS[request.param](root)


def test_every_yaml_of_files_has_a_writer() -> None:
    assert {path.stem for path in CONF.glob("[!_]*.yaml")} - set(fakes.WRITERS) <= {"synthetic", "scenes"}


def test_every_default_form(tmp_path: Path, written: tuple[str, Path, Any]) -> None:
    name, root, expected = written
    found, pictures = images(name, root)
    assert same_classes(found.counts(), expected)
    assert min(n for classes in expected.values() for n in classes.values()) >= 6
    assert len(np.unique(found.item)) == len(found)
    assert all(isinstance(picture, np.ndarray) and picture.dtype == np.uint8 for picture in pictures)
    assert all(picture.ndim == 2 or picture.shape[2] == 3 for picture in pictures)
    # The generated pictures tell the class, so a label that slipped to another image shows.
    drawn = [fakes.DRAWN[name].index(found.class_names[label]) for label in found.label]
    assert [fakes.recognise(picture) for picture in pictures] == drawn
    (tmp_path / "manifest.npz").write_bytes(found.to_bytes())
    assert Manifest.load(tmp_path / "manifest.npz").counts() == found.counts()
    # A manifest read back from the store serves a fresh reader.
    rows = np.array([len(found) - 1, 0])
    again = list(kept(reader(name, root), found, rows))
    assert all(np.array_equal(a, pictures[row]) for a, row in zip(again, rows, strict=True))
    # The YAML's classes are the data set's own, in its order.
    assert [c for c in found.class_names if c in config(name).class_names] == list(config(name).class_names)


def test_one_folder_deeper(written: tuple[str, Path, Any]) -> None:
    name, root, expected = written
    found, pictures = images(name, root.parent)
    assert same_classes(found.counts(), expected)
    assert all(isinstance(picture, np.ndarray) for picture in pictures)


def test_two_copies_are_refused(tmp_path: Path, written: tuple[str, Path, Any]) -> None:
    name, root, _ = written
    for copy in ("a", "b"):
        (tmp_path / copy).symlink_to(root)
    with pytest.raises(UserError, match="several folders"):
        manifest(name, tmp_path)


def test_unknown_form(written: tuple[str, Path, Any]) -> None:
    name, root, _ = written
    with pytest.raises(UserError, match=r"data.form=nonsense"):
        manifest(name, root, form="nonsense")


@pytest.mark.parametrize("name", FILE_SETS)
def test_nothing_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"data.root=") as caught:
        manifest(name, tmp_path)
    assert str(tmp_path) in str(caught.value)


# -- FER2013 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "csv.xz", "csv.zip", "icml", "prefix", "numbered"])
def test_fer2013_forms(tmp_path: Path, form: str) -> None:
    expected = fakes.write_fer2013(tmp_path, form)
    found, pictures = images("fer2013", tmp_path)
    assert found.counts() == expected
    assert found.class_names == ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral")
    assert all(fakes.recognise(p) == label for p, label in zip(pictures, found.label, strict=True))
    assert "val/anger: 6, official 467, -461" in found.count_differences()
    if "csv" in form:
        assert found.form == "fer2013.csv"
        assert found.item[1] == "fer2013.csv:1"
        assert np.array_equal(pictures[1], fakes.picture(1, 1))  # lossless


@pytest.mark.parametrize("form", ["csv", "prefix", "numbered", "kaggle"])
def test_fer2013_whole_test(tmp_path: Path, form: str) -> None:
    expected = fakes.write_fer2013(tmp_path, form)
    found = manifest("fer2013", tmp_path, test_part="both")
    both = {c: n + expected["val"][c] for c, n in expected["test"].items()}
    assert found.counts() == {"train": expected["train"], "test": both}
    assert found.official is not None
    assert sum(found.official["test"].values()) == 7178
    assert "PublicTest + PrivateTest" in found.form
    assert any("7,178" in warning for warning in found.warnings)


def test_fer2013_kaggle_pair(tmp_path: Path) -> None:
    fakes.write_fer2013(tmp_path / "labelled", "kaggle")
    with pytest.raises(UserError, match=r"84 rows and no Usage.*data.test_part=both"):
        manifest("fer2013", tmp_path / "labelled")
    fakes.write_fer2013(tmp_path / "plain", "kaggle_unlabelled")
    with pytest.raises(UserError, match=r"test.csv has no labels: put fer2013.csv or icml_face_data.csv"):
        manifest("fer2013", tmp_path / "plain")
    expected = fakes.write_fer2013(tmp_path / "plain", "icml")  # as Kaggle ships them: the complete file is read
    assert manifest("fer2013", tmp_path / "plain").counts() == expected


def test_fer2013_bad_rows_are_listed(tmp_path: Path) -> None:
    expected = fakes.write_fer2013(tmp_path, "csv", defects=True)
    found = manifest("fer2013", tmp_path)
    assert found.counts() == expected
    first = sum(sum(part.values()) for part in expected.values())
    assert [item for item, _ in found.skipped] == [f"fer2013.csv:{first + i}" for i in range(6)]
    reasons = [
        "label '7'",
        "3 pixels, expected 2304",
        "a pixel is 300",
        "not a whole number",
        "Usage 'Test'",
        "2 fields",
    ]
    assert all(want in why for want, (_, why) in zip(reasons, found.skipped, strict=True))


def test_fer2013_texts_as_they_circulate(tmp_path: Path) -> None:
    """Byte order mark, CRLF, semicolons, blanks and case in the header, quoted pixels, no final newline."""
    expected = fakes.write_fer2013(tmp_path, "csv")
    text = (tmp_path / "fer2013.csv").read_text()
    rows = [line.split(",") for line in text.splitlines()]
    variants = {
        "bom": "\ufeff" + text,
        "crlf": text.replace("\n", "\r\n"),
        "semicolon": text.replace(",", ";"),
        "tab": text.replace(",", "\t"),
        "header": text.replace("emotion,pixels,Usage", "Emotion , PIXELS, usage"),
        "quoted": fakes.table(rows, quote=True),
        "no newline": text[:-1],
        "more columns": fakes.table([[*row, "x"] for row in rows]).replace("Usage,x", "Usage,note", 1),
    }
    for name, variant in variants.items():
        (tmp_path / "fer2013.csv").write_bytes(variant.encode())
        found, pictures = images("fer2013", tmp_path)
        assert found.counts() == expected, name
        assert not found.skipped, name
        assert np.array_equal(pictures[1], fakes.picture(1, 1)), name


@pytest.mark.parametrize(
    ("header", "message"),
    [("emotion,pixels,Usage,pixels", "names a column twice"), ("", "data.root="), ("emotion,Usage", "data.root=")],
)
def test_fer2013_bad_headers(tmp_path: Path, header: str, message: str) -> None:
    (tmp_path / "fer2013.csv").write_text(f"{header}\n" * bool(header))
    with pytest.raises(UserError, match=message):
        manifest("fer2013", tmp_path)


def test_fer2013_cut_archive(tmp_path: Path) -> None:
    fakes.write_fer2013(tmp_path, "csv.xz")
    path = tmp_path / "fer2013.csv.xz"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"fer2013.csv.xz: cannot be read to its end"):
        manifest("fer2013", tmp_path)


def test_fer2013_two_forms(tmp_path: Path) -> None:
    expected = fakes.write_fer2013(tmp_path, "csv")
    fakes.write_fer2013(tmp_path, "prefix")
    with pytest.raises(UserError, match=r"data.form=csv or data.form=prefix"):
        manifest("fer2013", tmp_path)
    assert manifest("fer2013", tmp_path, form="prefix").counts() == expected


def test_fer2013_refuses_ckextended(tmp_path: Path) -> None:
    rows = [(7 if i % 20 == 0 else i % 7, fakes.pixels(fakes.picture(0, i)), "Training") for i in range(60)]
    fakes.write_text(tmp_path / "fer2013.csv", fakes.table([("emotion", "pixels", "Usage"), *rows]))
    with pytest.raises(UserError, match="data=ckplus"):
        manifest("fer2013", tmp_path)


def test_fer2013_stray_files(tmp_path: Path) -> None:
    expected = fakes.write_fer2013(tmp_path, "prefix")
    for name in (".DS_Store", "Thumbs.db", "copy.jpg", "x.gif"):
        (tmp_path / "train" / "angry" / name).write_bytes(b"x")
    (tmp_path / "train" / "confused").mkdir()
    found = manifest("fer2013", tmp_path)
    assert found.counts() == expected
    assert sorted(item for item, _ in found.skipped) == ["train/angry/copy.jpg", "train/angry/x.gif"]


# -- FER+ ---------------------------------------------------------------------------------------------------------


def test_ferplus_drops_and_aligns(tmp_path: Path) -> None:
    expected = fakes.write_ferplus(tmp_path)
    found, pictures = images("ferplus", tmp_path)
    assert found.counts() == expected
    reasons = [why for _, why in found.skipped]
    assert [reasons.count(w) for w in ("most voters see no face", "most voters say unknown")] == [3, 3]
    assert reasons.count("votes too spread for mode majority") == 3
    # Names skip numbers: aligned by row, each picture fits its label.
    assert all(fakes.recognise(p) == label for p, label in zip(pictures, found.label, strict=True))
    assert found.soft is not None
    np.testing.assert_allclose(found.soft.sum(1), 1, atol=1e-6)
    nine = found.soft[list(found.item).index("fer2013.csv:3")]
    assert nine.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]  # single votes are taken as slips


def test_ferplus_label_csv(tmp_path: Path) -> None:
    fakes.write_ferplus(tmp_path / "csv")
    found, pictures = images("ferplus", tmp_path / "csv", labels="label_csv")
    assert "fer2013.csv:3" not in found.item  # its name is used again by row 4
    assert "fer2013.csv:4" in found.item
    assert ("fer2013.csv:0", "no votes in label_csv") in found.skipped
    assert all(fakes.recognise(p) == label for p, label in zip(pictures, found.label, strict=True))
    expected = fakes.write_ferplus(tmp_path / "folders", "folders")
    for labels in ("label_csv", "fer2013new"):
        found, pictures = images("ferplus", tmp_path / "folders", labels=labels)
        assert found.counts() == expected
        assert all(fakes.recognise(p) == label for p, label in zip(pictures, found.label, strict=True))


def test_ferplus_files_that_do_not_belong_together(tmp_path: Path) -> None:
    fakes.write_ferplus(tmp_path, labels=False)
    with pytest.raises(UserError, match=r"data.labels=fer2013new"):
        manifest("ferplus", tmp_path, labels="label_csv")
    path = tmp_path / "fer2013new.csv"
    text = path.read_text()
    path.write_text("\n".join(text.splitlines()[:-1]))
    with pytest.raises(UserError, match=r"158 rows of votes for 159 images"):
        manifest("ferplus", tmp_path)
    path.write_text(text.replace("PublicTest", "Training", 1))
    with pytest.raises(UserError, match=r"row 53 is Training, but PublicTest"):
        manifest("ferplus", tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"looked for fer2013new.csv"):
        manifest("ferplus", tmp_path)


@pytest.mark.parametrize(
    ("mode", "votes", "label", "soft"),
    [
        # neutral, happiness, surprise, sadness, anger, disgust, fear, contempt, unknown, no-face
        ("majority", (6, 4, 0, 0, 0, 0, 0, 0, 0, 0), 0, (0.6, 0.4)),
        ("majority", (5, 5, 0, 0, 0, 0, 0, 0, 0, 0), -1, ()),  # more than half, not half
        ("majority", (5, 4, 1, 0, 0, 0, 0, 0, 0, 0), 0, (5 / 9, 4 / 9)),  # the single vote does not count
        ("majority", (6, 0, 0, 0, 0, 0, 0, 0, 4, 0), 0, (1.0,)),  # unknown is cut off, the rest renormalised
        ("majority", (1, 1, 1, 1, 1, 1, 1, 1, 1, 1), -1, ()),
        ("majority", (0, 0, 0, 0, 0, 0, 0, 0, 0, 10), -1, ()),
        ("probability", (5, 3, 2, 0, 0, 0, 0, 0, 0, 0), 0, (5 / 8, 3 / 8)),  # 8 of 10 suffice
        ("probability", (4, 3, 3, 0, 0, 0, 0, 0, 0, 0), 0, (0.4, 0.3, 0.3)),
        ("probability", (0, 4, 2, 2, 2, 0, 0, 0, 0, 0), -1, ()),  # a tie brings four classes
        ("probability", (3, 2, 0, 0, 0, 0, 0, 0, 5, 0), -1, ()),  # unknown wins
        ("probability", (6, 2, 0, 0, 0, 0, 0, 0, 2, 0), 0, (0.75, 0.25)),
        ("probability", (5, 2, 0, 0, 0, 0, 0, 0, 3, 0), -1, ()),  # stops at unknown, holding only half
        ("crossentropy", (5, 3, 2, 0, 0, 0, 0, 0, 0, 0), 0, (5 / 8, 3 / 8)),
        ("multi_target", (4, 3, 3, 0, 0, 0, 0, 0, 0, 0), 0, (1 / 3, 1 / 3, 1 / 3)),
        ("multi_target", (5, 3, 2, 0, 0, 0, 0, 0, 0, 0), 0, (1 / 2, 1 / 2)),
        ("multi_target", (5, 0, 0, 0, 0, 0, 0, 0, 5, 0), 0, (1.0,)),
        ("multi_target", (2, 2, 2, 2, 2, 0, 0, 0, 0, 0), -1, ()),
        ("argmax", (3, 3, 0, 0, 0, 0, 0, 0, 3, 1), 0, (0.5, 0.5)),
        ("argmax", (2, 3, 0, 0, 0, 0, 0, 0, 4, 1), -1, ()),
        ("argmax8", (0, 1, 0, 0, 0, 0, 0, 0, 9, 0), 1, (0.0, 1.0)),
    ],
)
def test_ferplus_rules(mode: str, votes: tuple[int, ...], label: int, soft: tuple[float, ...]) -> None:
    from fer.data.ferplus import labels_from_votes

    labels, distribution = labels_from_votes(np.array([votes], dtype=float), mode)
    assert labels.tolist() == [label]
    np.testing.assert_allclose(distribution[0], [*soft, *[0] * (8 - len(soft))])


def test_ferplus_modes_of_train_and_evaluation(tmp_path: Path) -> None:
    fakes.write_ferplus(tmp_path)
    spread = {"fer2013.csv:1", "fer2013.csv:54", "fer2013.csv:107"}  # the votes (3, 0, 0, 3, 2, 0, 2, ...)
    assert not spread & set(manifest("ferplus", tmp_path).item)
    assert spread & set(manifest("ferplus", tmp_path, mode="argmax").item) == {"fer2013.csv:1"}
    found = manifest("ferplus", tmp_path, mode="argmax", eval_mode="argmax")
    assert spread <= set(found.item)
    assert found.warnings


# -- own folders --------------------------------------------------------------------------------------------------


def test_folder_forms_and_names(tmp_path: Path) -> None:
    expected = fakes.write_folder(tmp_path / "flat", "classes")
    found = manifest("folder", tmp_path / "flat")
    assert found.counts()["all"] == expected["all"]
    assert set(found.split) == {""}
    assert found.class_names == ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")
    fakes.write_folder(tmp_path / "named", "classes", classes=("happy", "Bored", "angry"))
    assert manifest("folder", tmp_path / "named").class_names == ("Bored", "angry", "happy")


def test_folder_without_classes(tmp_path: Path) -> None:
    for i in range(5):
        fakes.save(tmp_path / "img_align_celeba" / f"{i:06d}.jpg", fakes.picture(0, i, colour=True))
    for root in (tmp_path / "img_align_celeba", tmp_path):
        found = manifest("folder", root, form="unlabelled")
        assert found.class_names == ("unlabelled",)
        assert len(found) == 5
        assert (root / found.item[4]).name == "000004.jpg"
        assert found.form == "images without classes"
    assert manifest("folder", tmp_path / "img_align_celeba").class_names == ("unlabelled",)
    # One folder of images is one class, and pictures beside class folders are no data.
    assert manifest("folder", tmp_path).class_names == ("img_align_celeba",)
    fakes.save(tmp_path / "cover.jpg", fakes.picture(0, 9))
    assert len(manifest("folder", tmp_path)) == 5


def test_folder_refuses_classes_beside_parts(tmp_path: Path) -> None:
    expected = fakes.write_folder(tmp_path, "parts")
    fakes.write_folder(tmp_path, "classes")
    with pytest.raises(UserError, match=r"data.form=classes or data.form=parts"):
        manifest("folder", tmp_path)
    assert same_classes(manifest("folder", tmp_path, form="parts").counts(), expected)


def test_folder_subjects(tmp_path: Path) -> None:
    fakes.write_folder(tmp_path, "classes", subjects=True)
    found = manifest("folder", tmp_path)
    assert found.subject is not None
    assert len(set(found.subject)) == 3
    assert found.subject[list(found.item).index("angry/3.jpg")] == "person 0-1"
    path = tmp_path / "subjects.csv"
    lines = path.read_text().splitlines()
    for change, message in [
        (lines[:-1], r"1 of 42 images have no row, the first is"),
        ([*lines, "../../etc/passwd,x"], r"row 42: the path '../../etc/passwd' must be relative"),
        ([*lines[:-1], lines[-1].split(",")[0] + ","], r"row 41: no subject for"),
        (["file,subject", *lines[1:]], r"expected the columns path, subject"),
        ([*lines, "a,b,c"], r"3 fields, expected 2"),
    ]:
        path.write_text("\n".join(change))
        with pytest.raises(UserError, match=message):
            manifest("folder", tmp_path)


def test_folder_bad_files_come_back_as_bad_images(tmp_path: Path) -> None:
    fakes.write_folder(tmp_path, "classes")
    (tmp_path / "angry" / "0.jpg").write_bytes(b"")
    found, pictures = images("folder", tmp_path)
    bad = [i for i, picture in enumerate(pictures) if isinstance(picture, BadImage)]
    assert found.item[bad].tolist() == ["angry/0.jpg"]


# -- RAF-DB -------------------------------------------------------------------------------------------------------


def test_rafdb_forms(tmp_path: Path) -> None:
    for name, options in {
        "release": {},
        "README's list": {"list_name": "list_partition_label.txt"},
        "folders": {"form": "folders"},
    }.items():
        expected = fakes.write_rafdb(tmp_path / name, **options)
        found, pictures = images("rafdb", tmp_path / name)
        assert found.counts() == expected, name
        assert found.item[0].endswith("train_00001_aligned.jpg")
        assert all(picture.shape == (100, 100, 3) for picture in pictures)
        assert all(fakes.recognise(p) == label for p, label in zip(pictures, found.label, strict=True))
        assert "test/fear: 6, official 74, -68" in found.count_differences()
    assert found.box is None


@pytest.mark.parametrize("root", [".", "basic"])
def test_rafdb_roots(tmp_path: Path, root: str) -> None:
    expected = fakes.write_rafdb(tmp_path)
    assert manifest("rafdb", tmp_path / root).counts() == expected


def test_rafdb_both_sets_under_one_root(tmp_path: Path) -> None:
    basic = fakes.write_rafdb(tmp_path)
    compound = fakes.write_rafdb(tmp_path, labels="compound")
    assert manifest("rafdb", tmp_path).counts() == basic
    found = manifest("rafdb_compound", tmp_path)
    assert found.counts() == compound
    assert found.item[0].startswith("compound/")


def test_rafdb_zips_unpacked_into_their_own_folders(tmp_path: Path) -> None:
    expected = fakes.write_rafdb(tmp_path)
    for folder in ("EmoLabel", "Image/aligned", "Image/original", "Annotation/manual", "Annotation/boundingbox"):
        path = tmp_path / "basic" / folder
        path.rename(path.with_name("moved"))
        path.mkdir()
        path.with_name("moved").rename(path / path.name)
    (tmp_path / "basic/Image/aligned/.DS_Store").write_bytes(b"x")
    found, pictures = images("rafdb", tmp_path, image="original")
    assert found.counts() == expected
    assert found.box is not None
    assert found.attributes
    assert all(fakes.recognise(p) == label for p, label in zip(pictures, found.label, strict=True))
    assert manifest("rafdb", tmp_path).item[0] == "basic/Image/aligned/aligned/train_00001_aligned.jpg"


def test_rafdb_annotations(tmp_path: Path) -> None:
    fakes.write_rafdb(tmp_path)
    manual = tmp_path / "basic/Annotation/manual"
    (manual / "train_00002_manu_attri.txt").unlink()
    (manual / "train_00003_manu_attri.txt").write_text("60 50\n1")
    (tmp_path / "basic/Annotation/boundingbox/train_00002_boundingbox.txt").write_text("30 20 20 10")  # negative width
    (tmp_path / "basic/Annotation/boundingbox/train_00003_boundingbox.txt").write_text("-10 20 90 120")
    found, pictures = images("rafdb", tmp_path, image="original")
    assert found.landmarks is not None
    assert found.box is not None
    assert found.landmarks[0].tolist() == [[60.5, 50], [100, 50.25], [80, 70], [65, 95], [95, 95]]
    assert np.isnan(found.landmarks[1:3]).all()
    assert found.box[0].tolist() == [30, 20, 100, 100]
    assert np.isnan(found.box[1]).all()
    assert found.box[2].tolist() == [0, 20, 90, 100]
    assert [picture.shape[:2] for picture in pictures[:3]] == [(100, 100), (160, 200), (100, 90)]
    assert [values[3] for values in found.attributes.values()] == ["male", "Caucasian", "40-69"]
    assert [values[1] for values in found.attributes.values()] == ["", "", ""]
    assert "2 of 84 images have no readable manual annotation" in found.warnings
    aligned = manifest("rafdb", tmp_path)
    assert aligned.landmarks is None  # they belong to the photographs
    assert aligned.attributes["gender"][3] == "male"


def test_rafdb_list_defects(tmp_path: Path) -> None:
    expected = fakes.write_rafdb(tmp_path)
    path = tmp_path / "basic/EmoLabel/list_patition_label.txt"
    lines = path.read_text().splitlines()
    # Three columns, tabs, CRLF and a byte order mark are as good.
    path.write_bytes(("\ufeff" + "".join(line.replace(" ", "\t") + "\t0\r\n" for line in lines)).encode())
    assert manifest("rafdb", tmp_path).counts() == expected
    (tmp_path / "basic/Image/aligned/test_0001_aligned.jpg").unlink()
    path.write_text("\n".join([*lines, "train_00099.jpg 5", lines[0], "x.jpg 2", "train_00001 one", "../x.jpg 3", ""]))
    found = manifest("rafdb", tmp_path)
    assert len(found) == len(lines) - 1
    reasons = [why for _, why in found.skipped]
    assert [item for item, why in found.skipped if "not there" in why] == [
        "basic/Image/aligned/test_0001_aligned.jpg",
        "basic/Image/aligned/train_00099_aligned.jpg",
    ]
    assert sum("listed twice" in why for why in reasons) == 1
    assert sum("neither train_ nor test_" in why for why in reasons) == 1
    assert sum("not an image name and a label" in why for why in reasons) == 2
    path.write_text("\n".join(line[:-1] + str(int(line[-1]) - 1) for line in lines))
    with pytest.raises(UserError, match="counts from 1"):
        manifest("rafdb", tmp_path)


def test_rafdb_images_still_zipped(tmp_path: Path) -> None:
    fakes.write_rafdb(tmp_path)
    shutil.rmtree(tmp_path / "basic/Image/aligned")
    with pytest.raises(UserError, match=r"unpack aligned.zip there, or set data.image=original"):
        manifest("rafdb", tmp_path)


def test_rafdb_folders_that_contradict(tmp_path: Path) -> None:
    fakes.write_rafdb(tmp_path, "folders")
    path = tmp_path / "test_labels.csv"
    path.write_text(path.read_text().replace("test_0002_aligned.jpg,2", "test_0002_aligned.jpg,3"))
    with pytest.raises(UserError, match=r"test_labels.csv, row 1: .* label 3 but lies in folder 2"):
        manifest("rafdb", tmp_path)
    (tmp_path / "DATASET/train/7").rename(tmp_path / "DATASET/train/0")
    with pytest.raises(UserError, match="from 1 to 7"):
        manifest("rafdb", tmp_path)


# -- CK+ ----------------------------------------------------------------------------------------------------------

EMOTIONS = ["anger", "contempt", "disgust", "fear", "happiness", "sadness", "surprise"]


@pytest.mark.parametrize("form", ["official", "ck48", "csv"])
def test_ckplus_forms(tmp_path: Path, form: str) -> None:
    expected = fakes.write_ckplus(tmp_path, form)
    found, pictures = images("ckplus", tmp_path)
    assert found.counts() == expected
    drawn = [fakes.CKPLUS.index(found.class_names[label]) for label in found.label]
    assert [fakes.recognise(picture) for picture in pictures] == drawn
    if form == "csv":
        assert found.subject is None
        assert "names no subjects" in found.warnings[0]
        assert "all/anger: 6, official 45, -39" in found.count_differences()
        return
    assert found.subject is not None
    assert found.sequence is not None
    assert sorted(set(found.subject)) == sorted(fakes.CK_SUBJECTS)
    assert len(set(found.sequence)) == 42  # of 56: the others have no label
    assert [item[-12:-4] for item in found.item[:3]] == ["00000004", "00000005", "00000006"]
    assert "all/anger: 18, official 135, -117" in found.count_differences()


@pytest.mark.parametrize(("form", "per_class"), [("official", 6), ("ck48", 6)])
def test_ckplus_peak_frames(tmp_path: Path, form: str, per_class: int) -> None:
    fakes.write_ckplus(tmp_path, form)
    found = manifest("ckplus", tmp_path, frames="last1")
    assert found.counts()["all"] == dict.fromkeys(EMOTIONS, per_class)
    assert {item[-12:] for item in found.item} == {"00000006.png"}
    assert "all/contempt: 6, official 18, -12" in found.count_differences()


def test_ckplus_neutral_frames(tmp_path: Path) -> None:
    fakes.write_ckplus(tmp_path / "release")
    found, pictures = images("ckplus", tmp_path / "release", neutral=True, class_names=["neutral", *EMOTIONS])
    assert found.counts()["all"] == {"neutral": 42} | dict.fromkeys(EMOTIONS, 18)
    drawn = [fakes.CKPLUS.index(found.class_names[label]) for label in found.label]
    assert [fakes.recognise(picture) for picture in pictures] == drawn
    # Without contempt its sequences go whole, the first frames too.
    basic = [name for name in EMOTIONS if name != "contempt"]
    found = manifest("ckplus", tmp_path / "release", neutral=True, class_names=["neutral", *basic])
    assert found.counts()["all"] == {"neutral": 36} | dict.fromkeys(basic, 18)
    assert found.official is not None
    assert found.official["all"]["neutral"] == 309
    fakes.write_ckplus(tmp_path / "csv", "csv")
    found = manifest("ckplus", tmp_path / "csv", neutral=True, class_names=["neutral", *EMOTIONS])
    assert found.counts()["all"]["neutral"] == 42
    fakes.write_ckplus(tmp_path / "ck48", "ck48")
    with pytest.raises(UserError, match="no neutral frames"):
        manifest("ckplus", tmp_path / "ck48", neutral=True, class_names=["neutral", *EMOTIONS])
    for options in ({"neutral": True}, {"class_names": ["neutral", *EMOTIONS]}):
        with pytest.raises(UserError, match=r"data.neutral=.* does not fit data.class_names"):
            reader("ckplus", tmp_path, **options)


def test_ckplus_official_counts() -> None:
    from fer.data.ckplus import SEQUENCES

    assert (sum(SEQUENCES.values()), 3 * sum(SEQUENCES.values())) == (327, 981)
    assert [3 * n for n in SEQUENCES.values()] == [135, 54, 177, 75, 207, 84, 249]


def test_ckplus_faces_are_cut_out(tmp_path: Path) -> None:
    fakes.write_ckplus(tmp_path / "with")
    found, pictures = images("ckplus", tmp_path / "with")
    assert found.landmarks is not None
    assert found.landmarks.shape == (126, 68, 2)
    assert found.landmarks[0, 0].tolist() == [55, 35]
    assert found.box is not None
    np.testing.assert_allclose(found.box[0], [50, 30, 60, 60])  # 1.2 times the landmarks' 50 px, round their middle
    assert pictures[0].shape == (60, 60)
    fakes.write_ckplus(tmp_path / "without", landmarks=False)
    found, pictures = images("ckplus", tmp_path / "without")
    assert pictures[0].shape == (120, 160)
    assert "whole frames" in found.warnings[0]


def test_ckplus_defects(tmp_path: Path) -> None:
    fakes.write_ckplus(tmp_path)
    emotion = tmp_path / "Emotion"
    (emotion / "S005/001/S005_001_00000006_emotion.txt").write_text("   8.0000000e+00\n")
    (emotion / "S010/001/S010_001_00000006_emotion.txt").write_text("")
    shutil.rmtree(tmp_path / "cohn-kanade-images/S011/001")
    (tmp_path / "Landmarks/S014/001/S014_001_00000005_landmarks.txt").write_text("1 2 3")
    found = manifest("ckplus", tmp_path)
    assert len(found) == 126 - 9
    assert [item for item, _ in found.skipped] == [
        "Emotion/S005/001/S005_001_00000006_emotion.txt",
        "Emotion/S010/001/S010_001_00000006_emotion.txt",
        "Emotion/S011/001/S011_001_00000006_emotion.txt",
    ]
    assert found.box is not None
    assert np.isnan(found.box).all(1).sum() == 1


def test_ckplus_zips_unpacked_into_their_own_folders(tmp_path: Path) -> None:
    expected = fakes.write_ckplus(tmp_path)
    for name, folder in (("cohn-kanade-images", "extended-cohn-kanade-images"), ("Emotion", "Emotion_labels")):
        (tmp_path / name).rename(tmp_path / "moved")
        (tmp_path / folder).mkdir()
        (tmp_path / "moved").rename(tmp_path / folder / name)
    found, pictures = images("ckplus", tmp_path)
    assert found.counts() == expected
    assert pictures[0].shape == (60, 60)


def test_ckplus_default_folds() -> None:
    from fer.data.ckplus import default_folds

    subjects = np.array(
        ["S034", "S005", "S035", "S010", "S005", "S011", "S032", "S014", "S022", "S026", "S028", "S029"]
    )
    assert default_folds(subjects, 10).tolist() == [9, 0, 0, 1, 0, 2, 8, 3, 4, 5, 6, 7]


# -- AffectNet ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["release2017", "npy", "plus"])
def test_affectnet_forms(tmp_path: Path, form: str) -> None:
    expected = fakes.write_affectnet(tmp_path, form)
    found, pictures = images("affectnet", tmp_path, landmarks=True)
    assert found.counts() == expected  # none, uncertain and no-face are left out
    assert not found.skipped
    assert all(fakes.recognise(p) == label for p, label in zip(pictures, found.label, strict=True))
    assert all(picture.shape == (60, 60, 3) for picture in pictures)  # cut to the box, or released so
    assert found.valence_arousal is not None
    np.testing.assert_allclose(found.valence_arousal[:, 0], found.label / 8 - 0.5, atol=1e-6)
    np.testing.assert_allclose(found.valence_arousal[:, 1], 0.25)
    assert found.landmarks is not None
    points = np.round(np.random.default_rng(0).uniform(10, 70, 136), 2).reshape(68, 2)
    np.testing.assert_allclose(found.landmarks[list(found.split).index("train")], points, atol=1e-4)
    contempt = 499 if form == "npy" else 500
    assert f"test/contempt: 6, official {contempt}, -{contempt - 6}" in found.count_differences()
    assert manifest("affectnet", tmp_path).landmarks is None


def test_affectnet_plus_facts(tmp_path: Path) -> None:
    fakes.write_affectnet(tmp_path, "plus")
    odd = tmp_path / "human_annotated/train_set/annotations"
    (odd / "2.json").write_text('{"human-label": 0, "soft-label": [1, 2], "meta-data": null}')
    (odd / "5.json").write_text("{")
    (odd / "8.json").write_text("[1]")
    found = manifest("affectnet", tmp_path)
    assert found.soft is not None
    np.testing.assert_allclose(found.soft[0], [1, 0, 0, 0, 0, 0, 0, 0])  # nothing usable: the label alone
    np.testing.assert_allclose(found.soft[1], np.where(np.arange(8) == 3, 0.75, 0.05) / 1.1, atol=1e-6)
    assert [values[0] for values in found.attributes.values()] == ["", "", "", ""]
    assert [values[1] for values in found.attributes.values()] == ["easy", "male", "asian", "20-29"]
    assert [item.rpartition("/")[2] for item, _ in found.skipped] == ["5.jpg", "8.jpg"]


@pytest.mark.parametrize("header", [True, False])
def test_affectnet_lists_as_they_circulate(tmp_path: Path, header: bool) -> None:
    expected = fakes.write_affectnet(tmp_path, header=header)
    path = tmp_path / "Manually_Annotated_file_lists/training.csv"
    folder = tmp_path / "Manually_Annotated/Manually_Annotated_Images/1"
    lines = path.read_text().splitlines()
    rows = [line.split(",") for line in lines]
    good = rows[header]
    (folder / "a.tif").write_bytes(b"x")
    odd = [
        ["1/" + "f" * 56 + ".jpg"],  # the malformed row
        [*good[:6], "happy", *good[7:]],
        [*good[:6], "11", *good[7:]],
        ["", *good[1:]],
        good,  # once more
        ["1/absent.jpg", *good[1:]],
        ["1/a.tif", *good[1:]],
        ["1/x/absent.jpg", *good[1:]],
    ]
    rows[header + 1][1:5] = ["NULL"] * 4
    rows[header + 2][1:5] = ["-10", "10", "50", "60"]
    rows[header + 3][1:5] = ["20", "10", "-5", "60"]
    rows[header + 4][7:] = ["-2", "-2"]
    path.write_bytes(("\ufeff" + fakes.table([*rows, *odd], newline="\r\n")).encode())
    found, pictures = images("affectnet", tmp_path)
    assert found.counts() == expected
    assert [why.split(";")[0].split(",")[0] for _, why in found.skipped] == [
        "1 fields",
        *["expected a file and an expression 0 to 10"] * 3,
        "listed twice",
        "listed",
        ".tif is not read",
        "listed",
    ]
    assert found.box is not None
    assert found.valence_arousal is not None
    assert found.box[:4].tolist()[0] == [20, 10, 60, 60]
    assert np.isnan(found.box[[1, 3]]).all()
    assert found.box[2].tolist() == [0, 10, 40, 60]
    assert [picture.shape[:2] for picture in pictures[:4]] == [(60, 60), (80, 90), (60, 40), (80, 90)]
    assert np.isnan(found.valence_arousal[4]).all()
    whole, pictures = images("affectnet", tmp_path, crop="none")
    assert pictures[0].shape == (80, 90, 3)
    assert "whole images" in whole.form


def test_affectnet_paths_stay_under_the_root(tmp_path: Path) -> None:
    fakes.write_affectnet(tmp_path / "data")
    path = tmp_path / "data/Manually_Annotated_file_lists/training.csv"
    text = path.read_text()
    first = text.splitlines()[1]
    for name in ("../../../secret.jpg", "/etc/secret.jpg", "1/../../../x.jpg"):
        path.write_text(text + first.replace(first.split(",")[0], name) + "\n")
        with pytest.raises(UserError, match=r"training.csv:66: the path .* must be relative"):
            manifest("affectnet", tmp_path / "data")
    path.write_text(text)
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (tmp_path / "data/Manually_Annotated/Manually_Annotated_Images/1/link.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(UserError, match="leading outside"):
        manifest("affectnet", tmp_path / "data")


def test_affectnet_images_not_unpacked(tmp_path: Path) -> None:
    fakes.write_affectnet(tmp_path)
    shutil.rmtree(tmp_path / "Manually_Annotated")
    with pytest.raises(UserError, match="unpack the images"):
        manifest("affectnet", tmp_path)


def test_affectnet_npy_defects(tmp_path: Path) -> None:
    fakes.write_affectnet(tmp_path, "npy")
    folder = tmp_path / "train_set"
    np.save(folder / "annotations/2_exp.npy", np.array({"a": 1}, dtype=object), allow_pickle=True)
    (folder / "annotations/5_exp.npy").write_bytes(b"")
    (folder / "annotations/8_exp.npy").unlink()
    (folder / "images/11.jpg").unlink()
    np.save(folder / "annotations/14_exp.npy", np.array([4]))
    np.save(folder / "annotations/17_exp.npy", np.array("5.0"))
    np.save(folder / "annotations/20_exp.npy", np.array(3.5))
    (folder / "annotations/14_val.npy").unlink()
    found = manifest("affectnet", tmp_path)
    reasons = {item.rpartition("/")[2]: why for item, why in found.skipped}
    assert list(reasons) == ["2.jpg", "5.jpg", "8.jpg", "11", "20.jpg"]
    assert "allow_pickle" in reasons["2.jpg"]
    assert reasons["8.jpg"] == "has no annotation"
    assert reasons["11"] == "has no image"
    items = [item.rpartition("/")[2] for item in found.item[:3]]
    assert items == ["14.jpg", "17.jpg", "23.jpg"]
    assert found.label[:2].tolist() == [4, 5]
    assert found.valence_arousal is not None
    assert np.isnan(found.valence_arousal[0]).all()


# -- the real files -----------------------------------------------------------------------------------------------

REAL = Path(os.environ["FER_DATA"]) / "fer2013" if "FER_DATA" in os.environ else None
needs_real = pytest.mark.skipif(REAL is None or not REAL.is_dir(), reason="set FER_DATA to the folder with fer2013/")


@needs_real
@pytest.mark.slow
def test_real_fer2013(tmp_path: Path) -> None:
    assert REAL is not None
    found, pictures = images("fer2013", REAL)
    assert found.count_differences() == []
    assert len(found) == 35887
    assert not found.skipped
    stack = np.stack(pictures)
    train = stack[found.split == "train"] / 255
    assert (round(train.mean(), 5), round(train.std(), 5)) == (0.50774, 0.25501)
    black = [6458, 7629, 10423, 11286, 13148, 13402, 13988, 15894, 22198, 22927, 28601, 30002]
    assert np.flatnonzero(stack.reshape(len(stack), -1).max(1) == 0).tolist() == black


KEPT = {  # labels, mode: kept train, val, test as published counts give them
    ("fer2013new", "majority"): (25060, 3199, 3153),
    ("label_csv", "majority"): (25045, 3191, 3137),
    ("fer2013new", "probability"): (27956, 3505, 3505),
    ("fer2013new", "crossentropy"): (27956, 3505, 3505),
    ("fer2013new", "multi_target"): (27671, 3472, 3472),
    ("fer2013new", "argmax"): (28389, 3553, 3546),
    ("fer2013new", "argmax8"): (28559, 3579, 3573),
}
PER_CLASS = {
    ("fer2013new", "majority", "train"): (8740, 7287, 3149, 3014, 2100, 119, 532, 119),
    ("fer2013new", "majority", "val"): (1182, 865, 415, 351, 287, 24, 62, 13),
    ("fer2013new", "majority", "test"): (1090, 893, 396, 384, 273, 18, 83, 16),
    ("label_csv", "majority", "train"): (8733, 7284, 3136, 3022, 2098, 116, 536, 120),
    ("label_csv", "majority", "val"): (1180, 862, 411, 348, 289, 25, 60, 16),
    ("label_csv", "majority", "test"): (1083, 892, 394, 382, 269, 16, 86, 15),
    ("fer2013new", "argmax", "train"): (10309, 7528, 3562, 3515, 2467, 191, 652, 165),
}


@needs_real
@pytest.mark.slow
def test_real_ferplus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert REAL is not None
    from fer.data import ferplus

    table = ferplus.read_full_table(REAL)
    monkeypatch.setattr(ferplus, "read_full_table", lambda folder: table)  # 19 s each
    for (labels, mode), kept in KEPT.items():
        found = manifest("ferplus", REAL, labels=labels, mode=mode, eval_mode=mode)
        assert found.count_differences() == []
        assert tuple((found.split == part).sum() for part in ("train", "val", "test")) == kept
        assert len(found) + len(found.skipped) == 35887
        for part, classes in found.counts().items():
            if (labels, mode, part) in PER_CLASS:
                assert tuple(classes.values()) == PER_CLASS[labels, mode, part]
