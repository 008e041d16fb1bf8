"""Faces: the geometry of the crop, which face of several, and the detectors."""

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fer.config import CONF
from fer.data.drawing import Face, render
from fer.data.images import read_image
from fer.errors import UserError
from fer.faces.align import align, box_transform, five_points, invert, landmark_transform, move_box, move_points
from fer.faces.detect import FoundFace, Haar, Mtcnn, YuNet, choose

PHOTOS = Path(os.environ.get("FER_DATA", "data")) / "photos"
FIVE = np.array([(38.0, 52), (74, 52), (56, 72), (41, 92), (71, 92)])  # a frontal face, eyes 36 px apart
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
