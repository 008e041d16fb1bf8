"""Faces: the geometry of the crop, the detectors, and preparing a data root of aligned faces."""

import csv
import functools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from commands import call
from fakes import WRITERS, save
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fer.config import CONF
from fer.data.base import ExpressionDataModule
from fer.data.drawing import Face, render
from fer.data.images import read_image
from fer.errors import UserError
from fer.faces.align import align, box_transform, five_points, invert, landmark_transform, move_box, move_points
from fer.faces.detect import Detector, FoundFace, Haar, Mtcnn, YuNet, choose
from fer.faces.preparation import Preparation, Summary
from fer.faces.tables import Names, Table

PHOTOS = Path(os.environ.get("FER_DATA", "data")) / "photos"
FIVE = np.array([(38.0, 52), (74, 52), (56, 72), (41, 92), (71, 92)])  # a frontal face, eyes 36 px apart
LIGHT = """
import atexit, sys
import fer.prepare
sys.argv = ['prepare', '--help']
atexit.register(lambda: print('torch' in sys.modules))
fer.prepare.main()
"""
HAS_PHOTOS = pytest.mark.skipif(not PHOTOS.is_dir(), reason="FER_DATA has no photos/")


def similar(points: np.ndarray, degrees: float, scale: float, shift: tuple[float, float]) -> np.ndarray:
    """Points turned, scaled and moved, by complex numbers."""
    z = (points[..., 0] + 1j * points[..., 1]) * scale * np.exp(1j * np.radians(degrees)) + complex(*shift)
    return np.stack([z.real, z.imag], axis=-1)


def drawn(index: int, expression: str = "neutral", pose: float = 0.5, size: int = 224) -> Face:
    return render(
        0,
        index,
        size=size,
        channels=3,
        expression=expression,
        subject=index,
        intensity=0.8,
        pose=pose,
        light=0.3,
        occlusion=0.0,
    )


# -- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [-170, -90, -30, 0, 7, 45, 120])
@pytest.mark.parametrize("scale", [0.3, 1.0, 9.7])
def test_eyes_are_level_and_at_the_same_place_for_any_rotation_and_scale(degrees: float, scale: float) -> None:
    points = similar(FIVE, degrees, scale, (300, -40))
    transform = landmark_transform(points, 224, 0.1)
    assert transform is not None
    moved = move_points(points, transform)
    # By hand: eyes 1 / (2.8 * 1.2) apart about the middle, 0.45 / (2.8 * 1.2) above the centre.
    apart, above = 224 / 3.36, 224 * 0.45 / 3.36
    expected = [(111.5 - apart / 2, 111.5 - above), (111.5 + apart / 2, 111.5 - above)]
    np.testing.assert_allclose(moved[:2], expected, atol=1e-9)
    upright = landmark_transform(FIVE, 224, 0.1)
    assert upright is not None
    np.testing.assert_allclose(moved, move_points(FIVE, upright), atol=1e-9)
    np.testing.assert_allclose(move_points(moved, invert(transform)), points, atol=1e-9)


def test_a_turned_head_is_not_enlarged_by_its_narrow_eyes() -> None:
    turned = FIVE.copy()
    turned[:, 0] = 56 + (turned[:, 0] - 56) * 0.5
    transform, frontal = landmark_transform(turned, 100, 0.0), landmark_transform(FIVE, 100, 0.0)
    assert transform is not None
    assert frontal is not None
    # |m - e| = 40, so the unit is 28 instead of 36, and not 18.
    assert transform[0, 0] == pytest.approx(100 / (2.8 * 28))
    assert frontal[0, 0] == pytest.approx(100 / (2.8 * 36))
    eyes = move_points(turned, transform)[:2]
    assert eyes[0, 1] == pytest.approx(eyes[1, 1])
    assert eyes.mean(0) == pytest.approx([49.5, 49.5 - 45 / 2.8])


def test_landmarks_that_tell_no_direction_are_refused_and_the_box_is_used() -> None:
    one_eye, profile, exchanged = FIVE.copy(), FIVE.copy(), FIVE[[1, 0, 2, 4, 3]]
    one_eye[1] = np.nan
    profile[:2, 0] = (52, 60)
    image, box = np.full((120, 120, 3), 90, np.uint8), np.array([20.0, 30, 50, 60])
    for landmarks in (one_eye, profile, exchanged, np.full((5, 2), np.nan), np.zeros((5, 2))):
        assert landmark_transform(landmarks, 64, 0.1) is None
        crop = align(image, 64, 0.1, landmarks, box)
        assert crop is not None
        assert crop.by == "box"
        assert align(image, 64, 0.1, landmarks, None) is None
        assert align(image, 64, 0.1, landmarks, np.full(4, np.nan)) is None
    no_mouth = FIVE.copy()
    no_mouth[2:] = np.nan
    np.testing.assert_array_equal(landmark_transform(no_mouth, 64, 0.1), landmark_transform(FIVE, 64, 0.1))
    with pytest.raises(ValueError, match=r"\(7, 2\)"):
        five_points(np.zeros((7, 2)))


def test_68_points_place_a_face_as_their_five_do() -> None:
    face = drawn(3)
    np.testing.assert_allclose(five_points(face.landmarks68), face.landmarks5, atol=1e-4)
    np.testing.assert_allclose(
        landmark_transform(face.landmarks68, 112, 0.2), landmark_transform(face.landmarks5, 112, 0.2), atol=1e-4
    )


def test_a_box_is_centred_with_its_margin() -> None:
    transform = box_transform(np.array([10.0, 20, 30, 50]), 100, 0.25)
    assert transform is not None
    np.testing.assert_allclose(
        move_box(np.array([10.0, 20, 30, 50]), transform), [29.5, 16.1667, 40, 66.6667], atol=1e-3
    )
    for empty in ((10, 20, 0, 50), (10, 20, 30, -5), (np.nan, 20, 30, 50)):
        assert box_transform(np.array(empty, dtype=float), 100, 0.25) is None


@pytest.mark.parametrize("scale", [0.15, 0.7, 1.0, 3.0])
def test_pixels_go_where_the_transform_says(scale: float) -> None:
    """Discs drawn at known places are found, as centres of mass, where the transform puts those places."""
    points = np.round(similar(FIVE - FIVE.mean(0), 20, 6, (800, 700)) * 16) / 16
    image = np.zeros((1500, 1600), np.uint8)
    radius = max(5, round(4 / scale))
    for x, y in points:
        cv2.circle(image, (int(x * 16), int(y * 16)), radius * 16, 255, -1, cv2.LINE_AA, shift=4)
    size = round(6 * 36 * 2.8 * 1.2 * scale)
    crop = align(image, size, 0.1, points, None)
    assert crop is not None
    assert crop.image.shape == (size, size)
    assert np.sqrt(np.linalg.det(crop.transform[:, :2])) == pytest.approx(scale, rel=0.01)
    for x, y in move_points(points, crop.transform):
        reach = int(2 * radius * scale) + 3
        left, top = round(x) - reach, round(y) - reach
        patch = crop.image[top : top + 2 * reach + 1, left : left + 2 * reach + 1].astype(float)
        v, u = np.mgrid[: patch.shape[0], : patch.shape[1]]
        found = (left + (u * patch).sum() / patch.sum(), top + (v * patch).sum() / patch.sum())
        # warpAffine interpolates at steps of 1/32 of the picture's pixels.
        assert found == pytest.approx((x, y), abs=0.08 * max(1, scale))


def test_shrinking_averages_and_outside_is_black() -> None:
    dots = np.random.default_rng(0).integers(0, 2, (800, 800), dtype=np.uint8) * 255
    crop = align(dots, 40, 0.0, None, np.array([-100.0, 100, 600, 600]))
    assert crop is not None
    inside = crop.image[:, 10:]
    assert inside.std() < 15  # the mean of 15 x 15 dots has a deviation of 8.5, that of four 64
    assert inside.mean() == pytest.approx(127.5, abs=1)
    assert crop.image[:, :6].max() == 0
    away = align(np.full((50, 50, 3), 255, np.uint8), 32, 0.0, None, np.array([900.0, 900, 40, 40]))
    assert away is not None
    assert away.image.shape == (32, 32, 3)
    assert away.image.max() == 0


def test_a_crop_does_not_depend_on_the_picture_around_it() -> None:
    image = np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    points = similar(FIVE, 10, 0.8, (150, 120))
    whole = align(image, 64, 0.1, points, None)
    part = align(image[80:300, 60:400], 64, 0.1, points - (60, 80), None)
    assert whole is not None
    assert part is not None
    assert np.abs(whole.image.astype(int) - part.image).max() <= 1


# -- which face -------------------------------------------------------------------------------------------------------


def found(x: float, y: float, side: float, confidence: float = 1.0) -> FoundFace:
    return FoundFace(np.array([x, y, side, side], dtype=float), None, confidence)


def test_choice_of_a_face() -> None:
    large, small, tiny = found(700, 400, 200), found(450, 250, 120), found(480, 290, 30)
    shape = (600, 1000, 3)
    assert choose([], shape) is None
    assert choose([large, small, tiny], shape) is large  # 200 (1 - .60 / 2) > 120
    assert choose([found(700, 400, 130), small], shape) is small
    assert choose([large, small, tiny], shape, np.array([470.0, 280, 50, 50])) is tiny
    assert choose([large, small], shape, np.array([0.0, 0, 80, 80])) is None  # not the face that was labelled
    assert choose([large, small], shape, np.full(4, np.nan)) is large
    twins = [found(100, 250, 100), found(800, 250, 100)]
    assert choose(twins, shape) is twins[0]


# -- detectors --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings() -> DictConfig:
    """The files of conf/detector by name."""
    return OmegaConf.create({path.stem: OmegaConf.load(path) for path in (CONF / "detector").glob("*.yaml")})


@pytest.fixture(scope="module")
def mtcnn(settings: DictConfig) -> Mtcnn:
    pytest.importorskip("facenet_pytorch")
    detector = built(settings.mtcnn, device="cpu")
    assert isinstance(detector, Mtcnn)
    return detector


@functools.cache
def command(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("prepare", list(overrides))
    GlobalHydra.instance().clear()
    return config


def built(node: DictConfig, **options: Any) -> Any:
    """What a config node makes; Hydra's wrapping around a user's mistake taken off, as the commands do."""
    try:
        return instantiate(node, **options)
    except InstantiationException as error:
        raise error.__cause__ or error from None


def no_faces() -> dict[str, np.ndarray]:
    ramp = np.linspace(0, 255, 320).astype(np.uint8)
    return {
        "noise": np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8),
        "gradient": np.repeat(np.tile(ramp, (240, 1))[..., None], 3, axis=2),
        "plain": np.full((240, 320, 3), 128, np.uint8),
        "grey": np.full((60, 60), 70, np.uint8),
        "thin": np.full((3, 4000, 3), 200, np.uint8),
        "speck": np.zeros((1, 1, 3), np.uint8),
        "nineteen": np.random.default_rng(1).integers(0, 256, (19, 80, 3), dtype=np.uint8),
        "twenty": np.random.default_rng(2).integers(0, 256, (20, 20), dtype=np.uint8),
    }


def test_mtcnn_finds_drawn_faces_and_their_landmarks(mtcnn: Mtcnn) -> None:
    errors, tilts = [], []
    for index, expression in enumerate(("anger", "happiness", "surprise", "neutral")):
        face = drawn(index, expression)
        picture = cv2.copyMakeBorder(face.image, 60, 60, 60, 60, cv2.BORDER_REPLICATE)
        faces = mtcnn.detect(picture)
        assert len(faces) == 1, expression
        truth, got = face.landmarks5 + 60, faces[0].landmarks
        assert got is not None
        errors.append(np.linalg.norm(got - truth, axis=1).mean() / np.linalg.norm(truth[1] - truth[0]))
        crop = align(picture, 224, 0.1, got, faces[0].box)
        assert crop is not None
        left, right = move_points(truth, crop.transform)[:2]
        tilts.append(abs(right[1] - left[1]) / 224)
        assert right[0] - left[0] == pytest.approx(224 / 3.36, rel=0.15)
    assert np.mean(errors) < 0.1
    assert np.mean(tilts) < 0.02


def test_mtcnn_sees_which_way_a_head_is_turned(mtcnn: Mtcnn) -> None:
    """Landmarks are averaged over mirrored views too; a face taken for its mirror image would come out frontal."""

    def nose(landmarks: np.ndarray) -> float:
        left, right, tip = landmarks[:3]
        return float((tip - (left + right) / 2)[0] / np.linalg.norm(right - left))

    for index in (0, 3, 7):
        face = drawn(index, pose=1.5)
        assert abs(nose(face.landmarks5)) > 0.2
        (one,) = mtcnn.detect(cv2.copyMakeBorder(face.image, 60, 60, 60, 60, cv2.BORDER_REPLICATE))
        assert one.landmarks is not None
        assert nose(one.landmarks) == pytest.approx(nose(face.landmarks5), abs=0.08)


def test_large_pictures_are_searched_small_and_answered_in_their_own_pixels(mtcnn: Mtcnn) -> None:
    face = drawn(1)
    small = cv2.copyMakeBorder(face.image, 400, 336, 336, 400, cv2.BORDER_REPLICATE)  # 960 x 960: searched as it is
    large = cv2.resize(small, None, fx=3, fy=3, interpolation=cv2.INTER_NEAREST)
    (one,), (other,) = mtcnn.detect(small), mtcnn.detect(large)
    np.testing.assert_allclose(other.box, [*(one.box[:2] * 3 + 1), *(one.box[2:] * 3)], atol=0.01)
    assert one.landmarks is not None
    assert other.landmarks is not None
    np.testing.assert_allclose(other.landmarks, one.landmarks * 3 + 1, atol=0.01)


def test_mtcnn_is_repeatable_and_sees_grey_as_colour(mtcnn: Mtcnn) -> None:
    grey = cv2.cvtColor(drawn(2).image, cv2.COLOR_RGB2GRAY)
    (one,), (again,) = mtcnn.detect(grey), mtcnn.detect(np.repeat(grey[..., None], 3, axis=2))
    assert one.landmarks is not None
    np.testing.assert_array_equal(one.landmarks, again.landmarks)
    np.testing.assert_array_equal(one.box, again.box)


@pytest.mark.parametrize("name", list(no_faces()))
def test_a_picture_without_a_face_gives_none(mtcnn: Mtcnn, settings: DictConfig, name: str) -> None:
    assert mtcnn.detect(no_faces()[name]) == []
    assert built(settings.haar).detect(no_faces()[name]) == []


@HAS_PHOTOS
@pytest.mark.parametrize("name", ["angry.jpg", "happy-baby.jpeg", "neutral.jpeg", "surprised.jpeg"])
def test_photographs_give_upright_crops_with_level_eyes(mtcnn: Mtcnn, name: str) -> None:
    picture = read_image(PHOTOS / f"pexels_{name}")
    faces = mtcnn.detect(picture)
    assert len(faces) >= 1
    crop = align(picture, 224, 0.1, faces[0].landmarks, faces[0].box)
    assert crop is not None
    assert crop.by == "landmarks"
    again = mtcnn.detect(crop.image)
    assert again
    points = again[0].landmarks
    assert points is not None
    assert abs(points[1, 1] - points[0, 1]) < 0.03 * 224
    assert points[1, 0] - points[0, 0] == pytest.approx(224 / 3.36, rel=0.1)
    assert points[3:, 1].min() > points[2, 1] > points[:2, 1].max()  # mouth under nose under eyes


@HAS_PHOTOS
def test_a_turned_photograph_gives_the_same_crop(mtcnn: Mtcnn) -> None:
    picture = read_image(PHOTOS / "pexels_neutral.jpeg")
    height, width = picture.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), 14, 0.7)
    (face,), (other,) = mtcnn.detect(picture), mtcnn.detect(cv2.warpAffine(picture, turn, (width, height)))
    assert face.landmarks is not None
    assert other.landmarks is not None
    back = move_points(other.landmarks, invert(turn))
    eyes = np.linalg.norm(face.landmarks[1] - face.landmarks[0])
    assert np.linalg.norm(back - face.landmarks, axis=1).max() < 0.05 * eyes  # one pass of MTCNN alone: about 0.1


@HAS_PHOTOS
def test_a_group_gives_several_faces(mtcnn: Mtcnn) -> None:
    faces = mtcnn.detect(read_image(PHOTOS / "pexels_group.jpeg"))
    assert len(faces) >= 3
    areas = [face.box[2] * face.box[3] for face in faces]
    assert areas == sorted(areas, reverse=True)


def test_haar_finds_an_upright_face_with_its_eyes(settings: DictConfig) -> None:
    haar = built(settings.haar)
    assert isinstance(haar, Haar)
    hits = 0
    for index in range(6):
        face = drawn(index, pose=0.0)
        for one in haar.detect(face.image)[:1]:
            centre = one.box[:2] + one.box[2:] / 2
            assert np.linalg.norm(centre - (face.box[:2] + face.box[2:] / 2)) < 0.25 * face.box[3]
            if one.landmarks is not None:
                hits += 1
                assert np.isnan(one.landmarks[2:]).all()
                apart = np.linalg.norm(face.landmarks5[1] - face.landmarks5[0])
                assert np.linalg.norm(one.landmarks[:2] - face.landmarks5[:2], axis=1).max() < 0.25 * apart
                assert landmark_transform(one.landmarks, 64, 0.1) is not None
    assert hits >= 2


def test_yunet_reads_rows_and_needs_its_file(
    settings: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"detector\.model=None: expected the path"):
        built(settings.yunet)
    model = tmp_path / "yunet.onnx"
    model.write_bytes(b"no onnx")
    with pytest.raises(UserError, match="no YuNet that OpenCV can read"):
        built(settings.yunet, model=str(model))

    class Network:
        def setInputSize(self, size: tuple[int, int]) -> None:
            self.size = size

        def detect(self, image: np.ndarray) -> tuple[int, np.ndarray | None]:
            assert image.shape[1::-1] == self.size
            assert tuple(image[0, 0]) == (3, 2, 1)  # BGR
            row = [100, 50, 60, 80, *FIVE.ravel().tolist(), 0.95]
            return 1, np.array([row, [*row[:2], 5, 5, *row[4:]]], dtype=np.float32)

    monkeypatch.setattr(cv2.FaceDetectorYN, "create", lambda *a, **k: Network())
    detector = built(settings.yunet, model=str(model))
    assert isinstance(detector, YuNet)
    picture = np.broadcast_to(np.array([1, 2, 3], np.uint8), (960, 1920, 3))
    (face,) = detector.detect(picture)  # searched at half size
    np.testing.assert_allclose(face.box, [200.5, 100.5, 120, 160])
    np.testing.assert_allclose(face.landmarks, FIVE * 2 + 0.5)
    assert face.confidence == pytest.approx(0.95)


def test_detector_settings_are_checked(settings: DictConfig) -> None:
    with pytest.raises(UserError, match="min_face=5"):
        built(settings.haar, min_face=5)
    pytest.importorskip("facenet_pytorch")
    with pytest.raises(UserError, match=r"device=nowhere cannot be used"):
        built(settings.mtcnn, device="nowhere")


# -- preparing a data set ---------------------------------------------------------------------------------------------


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


def prepare(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return call("prepare", *words, cwd=cwd)


def test_the_command_prepares_drawn_photographs(tmp_path: Path) -> None:
    pytest.importorskip("facenet_pytorch")
    for index, expression in enumerate(("happiness", "surprise")):
        for part in ("train", "test"):
            save(tmp_path / f"photos/{part}/{expression}/{index}.png", drawn(index, expression).image)
    save(tmp_path / "photos/train/surprise/gradient.png", no_faces()["gradient"])
    words = ("data=folder", "data.root=photos", "output=faces", "size=96")
    done = prepare(*words, cwd=tmp_path)
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
    from fer.prepare import run

    words = [f"+{word}" if "neighbours" in word else word for word in words]
    with pytest.raises(UserError, match=sentence):
        run(command(*words))


def test_exit_codes_and_help_need_no_torch(tmp_path: Path) -> None:
    mistyped = prepare("sizes=96", cwd=tmp_path)
    assert (mistyped.returncode, "sizes" in mistyped.stderr) == (1, True)
    refused = prepare("+data.evil._target_=os.system", "output=x", cwd=tmp_path)
    assert (refused.returncode, "os.system is refused" in refused.stderr) == (2, True)
    shown = subprocess.run([sys.executable, "-c", LIGHT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "python -m fer.prepare data=folder" in shown.stdout
    assert shown.stdout.strip().endswith("False")
