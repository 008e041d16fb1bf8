"""Prediction: the same crops as in training, calibrated answers, every form of input, one sentence for what is bad."""

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from commands import call
from conftest import composed
from corpus_images import bomb

import fer
import fer.predict
from fer.config import CONF
from fer.data.drawing import Face as Drawn
from fer.data.drawing import render
from fer.data.images import BadImage, read_image
from fer.errors import UserError
from fer.faces.align import move_points
from fer.faces.detect import FoundFace
from fer.faces.framing import Framing
from fer.labels import BASIC_7
from fer.prediction import sources
from fer.prediction.drawing import annotate
from fer.recognizer import Face, Recognizer
from fer.trained import open_run

PHOTOS = Path(os.environ.get("FER_DATA", "data")) / "photos"
HAS_PHOTOS = pytest.mark.skipif(not PHOTOS.is_dir(), reason="FER_DATA has no photos/")
SIDE = 200  # of the drawings


def drawn(index: int, expression: str = "happiness", size: int = SIDE) -> Drawn:
    options: dict[str, Any] = {"intensity": 0.9, "pose": 0.0, "light": 0.2, "occlusion": 0.0}
    return render(0, index, size=size, channels=3, expression=expression, subject=index, **options)


def scene(width: int, height: int, *corners: tuple[int, int]) -> tuple[np.ndarray, list[FoundFace]]:
    """A picture with a drawing at each corner, and the faces that are there."""
    image = np.tile(np.linspace(60, 180, width).astype(np.uint8)[None, :, None], (height, 1, 3))
    faces = []
    for index, (x, y) in enumerate(corners):
        face = drawn(index)
        image[y : y + SIDE, x : x + SIDE] = face.image
        faces.append(FoundFace(face.box + np.array([x, y, 0, 0]), face.landmarks5 + np.array([x, y]), 1.0))
    return image, faces


class Known:
    """Knows the faces of a picture by its height and width."""

    def __init__(self) -> None:
        self.faces: dict[tuple[int, ...], list[FoundFace]] = {}

    def add(self, width: int, height: int, *corners: tuple[int, int]) -> np.ndarray:
        image, self.faces[height, width] = scene(width, height, *corners)
        return image

    def detect(self, image: np.ndarray) -> list[FoundFace]:
        return self.faces.get(image.shape[:2], [])


@pytest.fixture(scope="module")
def known() -> Known:
    return Known()


@pytest.fixture(scope="module")
def recognizer(whole: Path, known: Known) -> Recognizer:
    return fer.Recognizer.load(whole, detector=known, device="cpu")


# -- the same crops as in training ------------------------------------------------------------------------------------


def test_framing_is_what_the_crops_were_cut_with() -> None:
    rng = np.random.default_rng(0)
    landmarks = []
    for _ in range(50):
        # As fer.faces.align says: the unit is 1 / (2.8 (1 + 2 margin)), the centre 0.45 + shift units under the eyes.
        unit = 1 / (2.8 * (1 + 2 * (0.1 + rng.uniform(-0.05, 0.05))))
        eyes = np.array([0.5, 0.5 - (0.45 - 0.2) * unit])
        five = eyes + unit * np.array([(-0.5, 0), (0.5, 0), (0, 0.5), (-0.4, 1.1), (0.4, 1.1)])
        landmarks.append(five)
    landmarks.append(np.full((5, 2), np.nan))
    framing = Framing.measured(np.array(landmarks), np.full(51, 96))
    assert framing is not None
    assert (framing.size, framing.shift) == (96, -0.2)
    assert framing.margin == pytest.approx(0.1, abs=0.02)
    assert Framing.measured(np.full((3, 5, 2), np.nan), np.ones(3)) is None
    assert Framing.measured(np.empty((0, 5, 2)), np.empty(0)) is None


@pytest.mark.parametrize("index", range(3))
def test_a_face_of_a_large_picture_lands_where_the_runs_images_have_theirs(recognizer: Recognizer, index: int) -> None:
    size, corner = recognizer.store_size, (170 + 40 * index, 90)
    image, _ = scene(640, 420)
    large = drawn(index)
    image[90 : 90 + SIDE, corner[0] : corner[0] + SIDE] = large.image
    face = FoundFace(large.box, large.landmarks5 + np.array(corner), 1.0)
    crop = recognizer.framing.crop(image, face)
    assert crop is not None
    assert face.landmarks is not None
    there = (move_points(face.landmarks, crop.transform) + 0.5) / recognizer.framing.size * size - 0.5
    stored = drawn(index, size=size)  # the same face as the data set draws it
    assert np.linalg.norm(there - stored.landmarks5, axis=1).max() < 0.08 * size
    seen = recognizer.crop(image, face)
    assert seen is not None
    assert seen.shape == (size, size, recognizer.channels)
    grey = cv2.cvtColor(stored.image, cv2.COLOR_RGB2GRAY)
    inner = slice(size // 6, -size // 6)
    assert np.corrcoef(seen[inner, inner, 0].ravel(), grey[inner, inner].ravel())[0, 1] > 0.5


def test_framing_of_a_prepared_root_is_its_own(tmp_path: Path, cache: Path) -> None:
    from hydra.utils import instantiate

    from fer.faces.preparation import Preparation

    image, (face,) = scene(400, 300, (60, 40))
    for part in ("train", "val", "test"):
        for number in range(2):
            path = tmp_path / f"photos/{part}/happiness/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), image[..., ::-1])

    class Here:
        def detect(self, image: np.ndarray) -> list[FoundFace]:
            return [face]

    def folder(root: Path) -> Any:
        words = ("data=folder", f"data.root={root}", f"data.cache={cache}", "data.class_names=[happiness]")
        return instantiate(composed(*words, "data.store_size=96").data)

    data = folder(tmp_path / "photos")
    output = tmp_path / "faces"
    Preparation(data, data.manifest(), Here(), size=80, margin=0.2, output=output, record={}).run()
    prepared = folder(output)
    prepared.open()
    framing = prepared.framing()
    assert framing == Framing(80, 0.2, 0.0)
    assert prepared.facts()["framing"] == {"size": 80, "margin": 0.2, "shift": 0.0}
    crop = framing.crop(image, face)
    assert crop is not None
    np.testing.assert_array_equal(crop.image, read_image(output / str(prepared.store.manifest.item[0])))


def test_recorded_framing_names_data_sets_without_landmarks(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    from fer.recognizer import framing_of

    run = open_run(whole)
    assert framing_of(run, {}) == Framing(**run.results["data_facts"]["framing"])
    run.results["data_facts"]["framing"] = None
    run.config.data["_target_"] = "fer.data.fer2013.FER2013"
    assert framing_of(run, {}) == Framing(48, -0.035, -0.13)
    assert framing_of(run, {"shift": 0.0}) == Framing(48, -0.035, 0.0)
    assert not caplog.records
    run.config.data["_target_"] = "fer.data.rafdb.RAFDB"
    assert framing_of(run, {}).margin == 0.1
    assert "faces lie in the images of RAFDB is not known" in caplog.text


# -- answers ----------------------------------------------------------------------------------------------------------


def test_faces_of_pictures_alone_and_together(recognizer: Recognizer, known: Known, tmp_path: Path) -> None:
    pictures = [known.add(700, 300, (10, 20), (400, 60)), known.add(500, 310, (30, 30)), known.add(90, 80)]
    together = recognizer.predict(pictures)
    assert [len(faces) for faces in together] == [2, 1, 0]
    cv2.imwrite(str(tmp_path / "a.png"), pictures[0][..., ::-1])
    for alone in (recognizer.predict(pictures[0]), recognizer.predict(tmp_path / "a.png")):
        for one, other in zip(alone, together[0], strict=True):
            assert one.box == other.box
            assert list(one.probabilities.values()) == pytest.approx(list(other.probabilities.values()), abs=1e-5)
    face = together[0][0]
    assert face.expression == max(face.probabilities, key=lambda name: face.probabilities[name])
    assert face.probability == face.probabilities[face.expression]
    assert list(face.probabilities) == recognizer.class_names
    assert sum(face.probabilities.values()) == pytest.approx(1, abs=1e-4)
    assert np.shape(face.landmarks) == (5, 2)
    with pytest.raises(BadImage, match="no such file"):
        recognizer.predict(tmp_path / "b.png")


def test_a_face_known_by_its_box_or_not_at_all(recognizer: Recognizer, known: Known) -> None:
    image = known.add(333, 300, (20, 20))
    (face,) = known.faces[300, 333]
    eyes = np.where(np.arange(5)[:, None] < 2, face.landmarks, np.nan)
    known.faces[300, 333] = [
        dataclasses.replace(face, landmarks=None),
        dataclasses.replace(face, landmarks=eyes),
        dataclasses.replace(face, landmarks=None, box=np.array([5.0, 5, 0, 0])),
    ]
    by_box, by_eyes = recognizer.predict(image)
    assert by_box.landmarks is None
    assert by_eyes.landmarks is not None
    assert by_eyes.landmarks[2:] == [None] * 3
    json.dumps(by_eyes.as_json(), allow_nan=False)


def test_the_temperature_of_the_run_is_used(whole: Path, recognizer: Recognizer, known: Known, tmp_path: Path) -> None:
    from fer.evaluation.calibration import Calibration, checkpoint_fingerprint

    folder = shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("wandb"))
    (folder / "calibration.json").unlink(missing_ok=True)
    record = Calibration(2.0, "val", 42, "none", checkpoint_fingerprint(open_run(folder)), {}, {})
    plain = Recognizer.load(folder, detector=known, device="cpu")
    assert (plain.calibrated, plain.temperature) == (False, 1.0)
    (folder / "calibration.json").write_text(json.dumps(dataclasses.asdict(record)))
    calibrated = Recognizer.load(folder, detector=known, device="cpu")
    assert (calibrated.calibrated, calibrated.temperature) == (True, 2.0)
    image, (face,) = scene(450, 320, (50, 50))
    crop = plain.crop(image, face)
    assert crop is not None
    one, other = (torch.from_numpy(r.probabilities([crop])) for r in (plain, calibrated))
    np.testing.assert_allclose(other, (one.log() / 2).softmax(1), atol=1e-6)
    # A temperature of another checkpoint does not count.
    (folder / "calibration.json").write_text(json.dumps({**dataclasses.asdict(record), "fingerprint": "other"}))
    assert not Recognizer.load(folder, detector=known, device="cpu").calibrated


def test_detectors_are_known_by_name(whole: Path) -> None:
    with pytest.raises(UserError, match=r"detector=mtcn is not one of haar, mtcnn, yunet"):
        Recognizer.load(whole, detector="mtcn", device="cpu")
    assert type(Recognizer.load(whole, detector="haar", device="cpu").detector).__name__ == "Haar"


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def predict(recognizer: Recognizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """``python -m fer.predict WORDS output=answers`` with known faces; gives the output folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fer.predict, "make_recognizer", lambda config: recognizer)

    def command(*words: str) -> Path:
        assert fer.predict.run(composed("run=run", "output=answers", *words, command="predict"))
        return tmp_path / "answers"

    return command


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_with_bad_files_finishes_and_lists_them(
    predict: Any, known: Known, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    (photos / "below").mkdir(parents=True)
    group = known.add(720, 330, (10, 20), (300, 60), (520, 100))
    cv2.imwrite(str(photos / "group.jpg"), group[..., ::-1])
    cv2.imwrite(str(photos / "below/empty.png"), known.add(160, 120))
    sixteen = known.add(410, 300, (100, 50))[..., 0].astype(np.uint16) * 257
    PIL.Image.fromarray(sixteen).save(photos / "sixteen.png")
    PIL.Image.fromarray(known.add(420, 300, (100, 50))).convert("CMYK").save(photos / "cmyk.jpg")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = known.add(430, 300, (100, 50))
    PIL.Image.fromarray(np.ascontiguousarray(np.rot90(turned))).save(photos / "turned.jpg", exif=exif)
    (photos / "text.jpg").write_text("no picture")
    (photos / "half.jpg").write_bytes((photos / "group.jpg").read_bytes()[:9000])
    (photos / "bomb.png").write_bytes(bomb(20_000, 10_000))
    (photos / "scan.tif").write_bytes(b"II*\0")
    (photos / "film.mp4").write_text("no film")
    (photos / "notes.txt").write_text("no picture either")
    answers = predict("input=photos")
    found = {line["input"]: line for line in lines(answers)}
    assert {name: len(line["faces"]) for name, line in found.items()} == {
        **{"group.jpg": 3, "below/empty.png": 0, "sixteen.png": 1, "cmyk.jpg": 1, "turned.jpg": 1}
    }
    assert list(found["group.jpg"]) == ["input", "calibrated", "faces"]
    keys = ["box", "landmarks", "expression", "probability", "probabilities"]
    assert list(found["group.jpg"]["faces"][0]) == keys
    assert found["turned.jpg"]["faces"][0]["box"] == pytest.approx(known.faces[300, 430][0].box, abs=0.01)
    errors = {row["input"]: row["reason"] for row in rows(answers / "errors.csv")}
    assert errors.keys() == {"text.jpg", "half.jpg", "bomb.png", "scan.tif", "film.mp4"}
    assert "content is not JPEG" in errors["text.jpg"]
    assert "cut short" in errors["half.jpg"]
    assert "50 million" in errors["bomb.png"]
    assert "not a video" in errors["film.mp4"]
    table = rows(answers / "predictions.csv")
    assert [row["input"] for row in table].count("group.jpg") == 3
    assert float(table[0]["probability"]) == pytest.approx(max(float(table[0][name]) for name in BASIC_7))
    summary = json.loads((answers / "prediction.json").read_text())
    assert (summary["pictures"], summary["faces"], summary["errors"], summary["whole"]) == (5, 6, 5, True)
    assert read_image(answers / "annotated/group.jpg").shape == group.shape
    assert read_image(answers / "annotated/turned.jpg").shape[0] == turned.shape[0]  # upright, beside it the bars
    assert not list(tmp_path.glob("*.unfinished"))
    said = capsys.readouterr().out
    assert "6 faces in 5 pictures, 5 files with errors" in said
    assert "half.jpg: " in said
    with pytest.raises(UserError, match="answers holds other files"):
        predict("input=photos")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["input=nowhere.jpg"], "input=nowhere.jpg: no such file or folder"),
        (["input=text.jpg"], "text.jpg: content is not JPEG, PNG, WEBP or BMP"),
        (["input=."], "none of 2 files could be read"),
        (["input=empty"], "there are no pictures or videos in this folder"),
        (["input=77"], "there is no camera of that number"),
        ([], "input is missing"),
        (["input=.", "device=gpu", "framing.margin=9", "every=0", "limit=0"], "device=gpu.*margin=9.*every=0.*limit=0"),
        (["input=.", "run=''"], "run is missing"),
    ],
)
def test_mistakes_are_told_in_a_sentence(predict: Any, words: list[str], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "other.png").write_text("no picture")
    with pytest.raises(UserError, match=f"(?s){sentence}"):
        predict(*words)


def film(path: Path, frame: np.ndarray, count: int, codec: str = "MJPG") -> None:
    height, width = frame.shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10, (width, height))
    assert writer.isOpened()
    for _ in range(count):
        writer.write(frame[..., ::-1])
    writer.release()


def test_a_video_and_one_cut_short(
    predict: Any, known: Known, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = known.add(320, 240, (60, 20))
    film(tmp_path / "film.avi", frame, 41)
    answers = predict("input=film.avi", "every=3")
    found = lines(answers)
    assert [line["frame"] for line in found] == list(range(0, 41, 3))
    assert found[-1]["time"] == 3.9
    assert all(len(line["faces"]) == 1 for line in found)
    made = cv2.VideoCapture(str(answers / "annotated/film.avi.mp4"))
    assert made.get(cv2.CAP_PROP_FRAME_COUNT) == 14
    assert made.get(cv2.CAP_PROP_FPS) == pytest.approx(10 / 3, abs=0.01)
    read, shown = made.read()
    assert read
    assert shown.shape[0] >= 240
    assert not (answers / "errors.csv").exists()
    whole = (tmp_path / "film.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    shutil.rmtree(answers)
    answers = predict("input=cut.avi")
    assert 15 <= len(lines(answers)) <= 25
    assert "cut.avi: cut short" in capsys.readouterr().out
    shutil.rmtree(answers)
    assert len(lines(predict("input=film.avi", "limit=4", "annotate=false"))) == 4
    assert not (answers / "annotated").exists()


def test_few_frames_are_held_and_ctrl_c_keeps_what_was_done(
    predict: Any, recognizer: Recognizer, known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film(tmp_path / "film.avi", known.add(324, 240, (60, 20)), 60)
    given = 0
    original = recognizer.predict

    def until_stopped(pictures: Any) -> Any:
        nonlocal given
        assert len(pictures) <= sources.FRAMES
        given += len(pictures)
        if given > 40:
            raise KeyboardInterrupt
        return original(pictures)

    monkeypatch.setattr(recognizer, "predict", until_stopped)
    assert not fer.predict.run(composed("run=run", "output=answers", "input=film.avi", command="predict"))
    assert len(lines(tmp_path / "answers")) == 32
    assert json.loads((tmp_path / "answers/prediction.json").read_text())["whole"] is False
    assert cv2.VideoCapture(str(tmp_path / "answers/annotated/film.avi.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 32


def test_a_camera_keeps_time(monkeypatch: pytest.MonkeyPatch, predict: Any, known: Known) -> None:
    picture = known.add(328, 240, (60, 20))

    class Camera:
        """Gives a frame every 0.35 s."""

        now = 0.0

        def isOpened(self) -> bool:
            return True

        def get(self, what: int) -> float:
            return 0.0

        def grab(self) -> bool:
            Camera.now += 0.35
            return True

        def retrieve(self) -> tuple[bool, np.ndarray]:
            return True, picture[..., ::-1]

        def release(self) -> None:
            pass

    original = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda given: Camera() if given == 0 else original(given))
    monkeypatch.setattr(sources.time, "monotonic", lambda: Camera.now)
    answers = predict("input=0", "limit=6")
    found = lines(answers)
    assert [line["input"] for line in found] == ["camera 0"] * 6
    assert found[-1]["time"] == pytest.approx(2.1)
    made = original(str(answers / "annotated/camera 0.mp4"))
    assert made.get(cv2.CAP_PROP_FRAME_COUNT) / made.get(cv2.CAP_PROP_FPS) == pytest.approx(2.2)


def test_the_command_line_finds_drawn_faces(whole: Path, tmp_path: Path) -> None:
    """MTCNN finds the faces."""
    pytest.importorskip("facenet_pytorch")
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos/two.png"), scene(640, 300, (30, 40), (380, 60))[0][..., ::-1])
    (tmp_path / "photos/text.jpg").write_text("no picture")
    words = [f"run={whole}", "input=photos", "output=answers", "device=cpu"]
    done = call("predict", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 faces in 1 picture, 1 file with errors" in done.stdout
    assert "python -m fer.evaluate" in done.stdout  # not calibrated
    (line,) = lines(tmp_path / "answers")
    truth = scene(640, 300, (30, 40), (380, 60))[1]
    for face in line["faces"]:
        apart = [np.abs(np.array(face["landmarks"]) - one.landmarks).max() for one in truth]
        assert min(apart) < 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers", "photos"]


# -- drawing ----------------------------------------------------------------------------------------------------------


def named(box: tuple[float, ...], expression: str = "happiness") -> Face:
    probabilities = {name: 0.82 if name == expression else 0.03 for name in BASIC_7}
    return Face(box, None, expression, 0.82, probabilities, np.zeros((48, 48, 1), np.uint8))


@pytest.mark.parametrize("size", [(48, 48), (60, 900), (300, 200), (640, 480), (1500, 1000)])
def test_drawing_keeps_the_picture_and_its_size(size: tuple[int, int]) -> None:
    width, height = size
    image = np.full((height, width, 3), 90, np.uint8)
    box = (0.3 * width, 0.3 * height, 0.3 * width, 0.3 * height)
    shown = annotate(image, [named(box)], BASIC_7)
    assert shown.shape == annotate(image, [], BASIC_7).shape  # frames of a video stay alike
    if min(size) >= 480:
        assert shown.shape == image.shape
    else:
        assert shown.shape[1] > width  # a margin for the bars
    x, y = (round(v) for v in box[:2])
    assert (shown[y + 1 : y + 9, x : x + 2] != 90).any()
    assert (shown != 90).any(2).mean() > 0.005
    np.testing.assert_array_equal(annotate(image[..., 0], [named(box)], BASIC_7), shown)


def test_bars_cover_no_face_and_no_other_bars() -> None:
    rng = np.random.default_rng(0)
    image = np.full((900, 1400, 3), 90, np.uint8)
    boxes = [(100.0 + 260 * i, 100.0 + 40 * (i % 2), 120.0, 150.0) for i in range(5)]
    shown = annotate(image, [named(box, BASIC_7[int(rng.integers(7))]) for box in boxes], BASIC_7)
    for x, y, width, height in boxes:
        inside = shown[int(y) + 30 : int(y + height) - 30, int(x) + 10 : int(x + width) - 10]
        assert (inside == 90).all()


# -- real photographs and data ----------------------------------------------------------------------------------------


@HAS_PHOTOS
def test_every_photograph_has_its_faces(whole: Path) -> None:
    pytest.importorskip("facenet_pytorch")
    paths = sorted(PHOTOS.iterdir())
    found = dict(zip(paths, Recognizer.load(whole, device="cpu").predict(paths), strict=True))
    for path, faces in found.items():
        assert len(faces) >= (3 if "group" in path.name else 1), path.name
        image = read_image(path)
        for face in faces:
            x, y, width, height = face.box
            assert 0 < x + width / 2 < image.shape[1]
            assert 0 < y + height / 2 < image.shape[0]


@HAS_PHOTOS
def test_fer2013_lies_as_recorded() -> None:
    pytest.importorskip("facenet_pytorch")
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    data = instantiate(composed("data=fer2013", f"data.root={PHOTOS.parent / 'fer2013'}").data)
    detector = instantiate(OmegaConf.load(CONF / "detector/mtcnn.yaml"), device="cpu")
    points = []
    for image in data.images(data.manifest(), np.arange(0, 60)):
        large = cv2.copyMakeBorder(cv2.resize(image, (192, 192)), 48, 48, 48, 48, cv2.BORDER_CONSTANT)
        points += [(face.landmarks - 48 + 0.5) / 192 for face in detector.detect(large)[:1]]
    assert len(points) > 40
    measured = Framing.measured(np.array(points), np.full(len(points), 48))
    recorded = OmegaConf.load(CONF / "framing.yaml")["fer.data.fer2013.FER2013"]
    assert measured is not None
    assert measured.margin == pytest.approx(recorded.margin, abs=0.03)
    assert measured.shift == pytest.approx(recorded.shift, abs=0.05)
