"""Preparing a data root of aligned faces: what it holds, going on after a kill, refusals, the command."""

import csv
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import call
from conftest import composed
from fakes import WRITERS, save
from filelock import FileLock
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from test_faces import FIVE, drawn, no_faces, similar

from fer.data.base import ExpressionDataModule
from fer.data.images import read_image
from fer.errors import UserError
from fer.faces.align import align
from fer.faces.detect import Detector, FoundFace
from fer.faces.preparation import Preparation, Summary
from fer.faces.tables import Names, Table
from fer.prepare import main, run


def command(*overrides: str) -> DictConfig:
    return composed(*overrides, command="prepare")


class Planted:
    """Finds the face that a test says is there: its corner pixel's red tells where; 0 is no face."""

    def __init__(self) -> None:
        self.calls = 0
        self.stop_at: int | None = None

    def detect(self, image: np.ndarray) -> list[FoundFace]:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        x = float(image[0, 0, 0])
        box = np.array([x, 10, 40, 50])
        return [] if x == 0 else [FoundFace(box, similar(FIVE, 5, 0.5, (x, 0)), 0.9)]


def picture(x: int, seed: int = 0) -> np.ndarray:
    image = np.random.default_rng([x, seed]).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    image[0, 0] = (x, 0, 0)
    return image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six pictures in parts: two of the same name in one class, one without a face."""
    root = tmp_path / "photos"
    for name, x in {
        "train/happy/a.png": 5,
        "train/happy/a.bmp": 6,
        "train/sad/b.png": 7,
        "train/sad/none.png": 0,
        "test/happy/a.png": 8,
        "test/sad/c.png": 9,
    }.items():
        save(root / name, picture(x))
    return root


def folder(root: Path, **options: Any) -> ExpressionDataModule:
    config = command("data=folder", "output=x")
    data = instantiate(OmegaConf.merge(config.data, {"root": str(root), **options}))
    assert isinstance(data, ExpressionDataModule)
    return data


def prepared(
    data: ExpressionDataModule, output: Path, detector: Detector | None, size: int = 48, record: str = "planted"
) -> Summary:
    return Preparation(
        data, data.manifest(), detector, size=size, margin=0.1, output=output, record={"detector": record}
    ).run()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_prepared_root_is_complete_and_read_by_folder(root: Path, tmp_path: Path) -> None:
    summary = prepared(folder(root), tmp_path / "new/faces", Planted())
    output = tmp_path / "new/faces"
    assert summary == Summary(output, kept=0, landmarks=5, box=0, no_face=1, unreadable=0)
    assert sorted(path.name for path in output.parent.iterdir()) == ["faces"]
    faces = {row["item"]: row for row in rows(output / "manifest.csv")}
    assert list(faces) == [
        "test/happy/a.png",
        "test/sad/c.png",
        "train/happy/a.bmp",
        "train/happy/a.png",
        "train/sad/b.png",
    ]
    assert [(row["item"], row["reason"]) for row in rows(output / "no_face.csv")] == [
        ("train/sad/none.png", "no face found")
    ]
    for item, row in faces.items():
        image = read_image(root / item)
        (face,) = Planted().detect(image)
        crop = align(image, 48, 0.1, face.landmarks, face.box)
        assert crop is not None
        np.testing.assert_array_equal(read_image(output / row["file"]), crop.image)
        assert row["file"].startswith(item.rpartition("/")[0].replace("happy", "happiness").replace("sad", "sadness"))
        np.testing.assert_allclose(np.array(row["transform"].split(), float).reshape(2, 3), crop.transform, rtol=1e-7)
        np.testing.assert_allclose(np.array(row["box"].split(), float), face.box, atol=0.01)
        assert row["source"].startswith(f"{(root / item).stat().st_size} bytes")
    manifest = folder(output).manifest()
    assert sorted(manifest.item) == sorted(row["file"] for row in faces.values())
    assert manifest.counts() == {
        "train": {"happiness": 2, "sadness": 1},
        "test": {"happiness": 1, "sadness": 1},
    }
    assert manifest.subject is None


def test_without_official_parts_and_with_subjects(tmp_path: Path) -> None:
    root, output = tmp_path / "photos", tmp_path / "faces"
    for k, name in enumerate(("happy/a.png", "happy/b.png", "sad/c.png")):
        save(root / name, picture(5 + k))
    (root / "subjects.csv").write_text("path,subject\nhappy/a.png,p1\nhappy/b.png,p2\nsad/c.png,p1\n")
    prepared(folder(root), output, Planted())
    manifest = folder(output).manifest()
    assert dict(zip(manifest.item.tolist(), manifest.subject.tolist(), strict=True)) == {
        "happiness/a.png": "p1",
        "happiness/b.png": "p2",
        "sadness/c.png": "p1",
    }
    assert set(manifest.split) == {""}


def test_the_manifests_own_landmarks_and_boxes(tmp_path: Path) -> None:
    config = command("data=synthetic", "output=x")
    few = {"train": 3, "val": 2, "test": 2, "subjects": 10, "store_size": 96}
    data = instantiate(OmegaConf.merge(config.data, few))
    summary = prepared(data, tmp_path / "faces", None, size=64)
    assert (summary.landmarks, summary.box, summary.no_face) == (7, 0, 0)
    manifest = data.manifest()
    by_item = {row["item"]: row for row in rows(tmp_path / "faces/manifest.csv")}
    for row, image in enumerate(data.images(manifest, np.arange(7))):
        told = by_item[str(manifest.item[row])]
        crop = align(image, 64, 0.1, manifest.landmarks[row], None)
        assert crop is not None
        np.testing.assert_array_equal(read_image(tmp_path / "faces" / told["file"]), crop.image)
        assert told["subject"] == manifest.subject[row]
    assert set(folder(tmp_path / "faces").manifest().split) == {"train", "val", "test"}
    # A prepared folder keeps its landmarks and can be prepared again; a plain one has none.
    assert prepared(folder(tmp_path / "faces"), tmp_path / "again", None, size=64).landmarks == 7
    WRITERS["folder"](tmp_path / "plain")
    with pytest.raises(UserError, match="neither landmarks nor boxes"):
        prepared(folder(tmp_path / "plain"), tmp_path / "none", None)


class Everywhere:
    """Finds faces all over a picture."""

    def detect(self, image: np.ndarray) -> list[FoundFace]:
        height, width = image.shape[:2]
        places = [(x, y) for x in np.arange(0.05, 0.95, 0.1) for y in np.arange(0.05, 0.95, 0.1)]
        return [FoundFace(np.array([x * width, y * height, 0.1 * width, 0.1 * height]), None, 1.0) for x, y in places]


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_every_data_set_can_be_prepared(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / "root")
    config = command(f"data={name}", "output=x")
    data = instantiate(OmegaConf.merge(config.data, {"root": str(tmp_path / "root"), "on_bad_image": "skip"}))
    manifest = data.manifest()
    prepared(data, tmp_path / "faces", Everywhere(), size=16)
    again = folder(tmp_path / "faces", class_names=None).manifest()
    assert rows(tmp_path / "faces/no_face.csv") == []
    found, expected = again.counts(), manifest.counts()
    assert {part: +Counter(found[part]) for part in found} == {part: +Counter(expected[part]) for part in expected}
    if manifest.subject is not None:
        assert again.subject is not None
        assert set(again.subject) == set(manifest.subject)


class Stop(Exception):
    """The kill of a test."""


def test_a_killed_start_is_gone_on_with(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, output, unfinished = tmp_path / "whole", tmp_path / "faces", tmp_path / "faces.unfinished"
    prepared(folder(root), whole, Planted())
    stopped = Planted()
    stopped.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        prepared(folder(root), output, stopped)
    assert not output.exists()
    assert len(list(unfinished.rglob("*.png"))) == 3

    # Killed between a row and its file, which is half written under another name; then within a row.
    import fer.faces.preparation as module

    def half(path: Path, content: bytes) -> None:
        (path.parent / f".{path.name}.123").write_bytes(content[:40])
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_bytes", half)
        with pytest.raises(Stop):
            prepared(folder(root), output, Planted())
    table = unfinished / "manifest.csv"
    assert len(rows(table)) == 4
    table.write_bytes(table.read_bytes() + b'train/sadness/b.png,train/sad/b.png,sadn"')
    (unfinished / "no_face.csv").write_bytes(b"item,cl")

    going_on = Planted()
    summary = prepared(folder(root), output, going_on)
    assert summary.kept == 3
    assert going_on.calls == 3
    assert tree(output) == tree(whole)
    assert not unfinished.exists()

    nothing_to_do = Planted()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    summary = prepared(folder(root), output, nothing_to_do)
    assert (summary.kept, summary.landmarks, summary.no_face, nothing_to_do.calls) == (6, 5, 1, 0)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_what_changed_is_done_anew(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "faces"
    prepared(folder(root), output, Planted())
    save(root / "train/sad/b.png", picture(0))  # had a face
    save(root / "train/sad/none.png", picture(20))  # had none
    (root / "train/happy/a.png").rename(root / "train/sad/moved.png")
    (output / "test/sadness/c.png").unlink()
    save(root / "test/sad/new.png", picture(30))
    detector = Planted()
    summary = prepared(folder(root), output, detector)
    assert detector.calls == 5
    assert (summary.kept, summary.landmarks, summary.no_face) == (2, 6, 1)
    listed = [row["file"] for row in rows(output / "manifest.csv")]
    assert sorted(str(path.relative_to(output)) for path in output.rglob("*.png")) == sorted(listed)
    assert [row["item"] for row in rows(output / "no_face.csv")] == ["train/sad/b.png"]
    assert len(folder(output).manifest()) == 6


def test_unreadable_files_are_listed_then_fail_or_skipped(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "faces"
    (root / "test/sad/broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 of 7 pictures cannot be read, see .*no_face\.csv.*on_bad_image=skip"):
        prepared(folder(root), output, Planted())
    assert not output.exists()
    detector = Planted()
    summary = prepared(folder(root, on_bad_image="skip"), output, detector)
    assert (summary.kept, summary.unreadable, detector.calls) == (6, 1, 0)
    reasons = {row["item"]: row["reason"] for row in rows(output / "no_face.csv")}
    assert reasons["test/sad/broken.png"].startswith("cannot be read: content is not")


def test_nothing_of_others_is_touched(root: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        prepared(folder(root), taken, Planted())
    with pytest.raises(UserError, match=r"lies in data\.root"):
        prepared(folder(root), root / "faces", Planted())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "taken"]
    output = tmp_path / "faces"
    output.mkdir()  # an empty folder may be given
    prepared(folder(root), output, Planted())
    before = tree(output)
    with pytest.raises(UserError, match=r"faces was prepared with other size \(see prepared.json\)"):
        prepared(folder(root), output, Planted(), size=64)
    with pytest.raises(UserError, match="with other detector"):
        prepared(folder(root), output, Planted(), record="haar")
    (tmp_path / "faces.unfinished").mkdir()
    with pytest.raises(UserError, match="both exist"):
        prepared(folder(root), output, Planted())
    assert tree(output) == before
    with FileLock(tmp_path / ".busy.lock"), pytest.raises(UserError, match="by another process"):
        prepared(folder(root), tmp_path / "busy", Planted())


def test_no_face_at_all_is_said(tmp_path: Path) -> None:
    save(tmp_path / "photos/happy/a.png", picture(0))
    with pytest.raises(UserError, match=r"none of the 1 pictures has a face, see .*faces/no_face\.csv"):
        prepared(folder(tmp_path / "photos"), tmp_path / "faces", Planted())
    assert [row["reason"] for row in rows(tmp_path / "faces/no_face.csv")] == ["no face found"]


def test_file_names_stay_apart() -> None:
    names = Names(["train/anger/a.png"])
    assert names.new("train/anger", "x/b.jpg") == "train/anger/b.png"
    first, second = names.new("train/anger", "x/A.jpg"), names.new("train/anger", "y/a.jpeg")
    assert len({first.lower(), second.lower(), "train/anger/a.png"}) == 3
    assert names.new("anger", "fer2013.csv:17") == "anger/fer2013.csv_17.png"
    assert names.new("anger", "x/.hidden.png") == "anger/hidden.png"
    assert names.new("anger", "x/...") == "anger/face.png"
    assert len(names.new("anger", "x/" + "é" * 250 + ".png").encode()) < 200


def test_a_table_of_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="expected the columns item,reason"):
        Table(tmp_path / "t.csv", ("item", "reason"))


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prepares_drawn_photographs(tmp_path: Path) -> None:
    pytest.importorskip("facenet_pytorch")
    for index, expression in enumerate(("happiness", "surprise")):
        for part in ("train", "test"):
            save(tmp_path / f"photos/{part}/{expression}/{index}.png", drawn(index, expression).image)
    save(tmp_path / "photos/train/surprise/gradient.png", no_faces()["gradient"])
    words = ("data=folder", "data.root=photos", "output=faces", "size=96")
    done = call("prepare", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 faces of 5 pictures" in done.stdout
    assert "1 without a face, 0 unreadable" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces", "photos"]  # no log, no Hydra folder
    manifest = folder(tmp_path / "faces").manifest()
    assert manifest.counts() == {part: {"happiness": 1, "surprise": 1} for part in ("train", "test")}
    assert read_image(tmp_path / "faces" / str(manifest.item[0])).shape == (96, 96, 3)
    assert json.loads((tmp_path / "faces/prepared.json").read_text())["detector"]["min_confidence"] == 0.9


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "output is missing: set output="),
        (["output=x", "size=3"], "size=3: expected a whole number of pixels"),
        (["output=x", "margin=-1"], "margin=-1: expected a share"),
        (["output=x", "use_manifest_landmarks=maybe"], "expected true or false"),
        (["output=x", "detector=haar", "detector.min_neighbours=3"], "takes no such argument"),
        (["output=x", "data.root=nowhere"], "folder of images not found"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words: list[str], sentence: str) -> None:
    words = [f"+{word}" if "neighbours" in word else word for word in words]
    with pytest.raises(UserError, match=sentence):
        run(command(*words))


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [(["sizes=96"], 1, "sizes"), (["+data.evil._target_=os.system", "output=x"], 2, "os.system is refused")],
)
def test_exit_codes(
    words: list[str], code: int, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fer.prepare", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == code
    assert sentence in capsys.readouterr().err
