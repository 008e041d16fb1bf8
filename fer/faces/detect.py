"""Finding faces: where they are in a picture, with landmarks where the detector gives them.

A detector takes one picture and returns what it finds, largest first; a picture without a face gives an empty list.
Large photographs are searched on a smaller copy, boxes and landmarks are given in the picture's own pixels. Detectors
are chosen by ``detector=``, a file of ``conf/detector``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from fer.errors import UserError
from fer.faces.align import invert, landmark_transform, move_points, square_transform, warp

Array = np.ndarray[Any, Any]

# Views over which MTCNN's landmarks are averaged: shares of the face box's side.
_SCALES = (0.95, 1.05, 1.15)
_SHIFTS = ((0.0, 0.0), (0.05, 0.05), (-0.05, 0.05))
_MIRRORED = [1, 0, 2, 4, 3]  # left and right change places


@dataclass(frozen=True)
class FoundFace:
    """A face in a picture, in the picture's pixels.

    Attributes:
        box: (4,) float64, x, y, width, height; may reach beyond the picture.
        landmarks: (5, 2) float64, left eye, right eye, nose, left mouth corner, right mouth corner as seen in the
            image, NaN for those the detector does not give; or None.
        confidence: the detector's own score; comparable within one detector only.
    """

    box: Array
    landmarks: Array | None
    confidence: float


class Detector(Protocol):
    """What finds faces."""

    def detect(self, image: Array) -> list[FoundFace]:
        """Faces of an (H, W) or (H, W, 3) RGB uint8 picture, largest first."""
        ...


def choose(faces: list[FoundFace], shape: tuple[int, ...], annotated: Array | None = None) -> FoundFace | None:
    """The face that a labelled picture is about.

    With an annotated box: the face whose centre is nearest to the box's, if it lies inside the box. Otherwise the face
    with the greatest sqrt(width * height) * (1 - d / 2), where d is the distance of its centre from the picture's,
    1 in the corners: the largest, unless one more than half as large is more central. Ties go to the face found first,
    which is the larger one.

    Args:
        faces: what a detector found, largest first.
        shape: (H, W, ...) of the picture.
        annotated: (4,) x, y, width, height of the face meant, NaN where unknown.

    Returns:
        None where there is no face, or none in the annotated box.
    """
    if not faces:
        return None
    centres = np.array([face.box[:2] + face.box[2:] / 2 for face in faces])
    if annotated is not None and not np.isnan(annotated).any():
        offset = np.abs(centres - (annotated[:2] + annotated[2:] / 2))
        nearest = int(np.argmin(np.hypot(*offset.T)))
        return faces[nearest] if (offset[nearest] <= annotated[2:] / 2).all() else None
    middle = np.array([shape[1], shape[0]]) / 2
    distance = np.hypot(*(centres - middle).T) / np.hypot(*middle)
    size = np.sqrt([face.box[2] * face.box[3] for face in faces])
    return faces[int(np.argmax(size * (1 - distance / 2)))]


class CopyDetector(ABC):
    """Base of the detectors here: searches a copy of at most ``max_side`` pixels.

    Args:
        max_side: longer side of the copy in pixels; smaller pictures are searched as they are.
        min_face: least side of a face on the copy in pixels.
    """

    def __init__(self, *, max_side: int, min_face: int) -> None:
        if max_side < min_face or min_face < 12:
            raise UserError(f"detector: min_face={min_face}, max_side={max_side}: expected 12 <= min_face <= max_side")
        self.max_side, self.min_face = max_side, min_face

    @abstractmethod
    def find(self, copy: Array) -> list[FoundFace]:
        """Faces of an (H, W, 3) RGB uint8 picture at least ``min_face`` high and wide, in its pixels."""

    def detect(self, image: Array) -> list[FoundFace]:
        """See `Detector`."""
        height, width = image.shape[:2]
        shrink = min(1.0, self.max_side / max(height, width))
        size = (max(round(width * shrink), 1), max(round(height * shrink), 1))
        if min(size) < self.min_face:
            return []
        copy = image if shrink == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        if copy.ndim == 2:
            copy = cv2.cvtColor(copy, cv2.COLOR_GRAY2RGB)
        factor = np.array([width / size[0], height / size[1]])
        faces = [_enlarged(face, factor) for face in self.find(np.ascontiguousarray(copy))]
        return sorted(faces, key=lambda face: (-face.box[2] * face.box[3], *face.box[:2]))


def _enlarged(face: FoundFace, factor: Array) -> FoundFace:
    """A face of the copy in the pixels of the picture, ``factor`` (x, y) times larger."""
    centre = (factor - 1) / 2  # pixel 0 of the copy covers pixels 0 to factor - 1 of the picture
    box = np.concatenate([face.box[:2] * factor + centre, face.box[2:] * factor])
    landmarks = None if face.landmarks is None else face.landmarks * factor + centre
    return FoundFace(box, landmarks, face.confidence)


class Mtcnn(CopyDetector):
    """MTCNN (Zhang et al., IEEE Signal Processing Letters 2016) of facenet-pytorch 2.5.3 (MIT), weights in its wheel.

    Pictures are searched one at a time although the library can stack them: overlapping candidates often tie at a
    confidence of 1, the last bit of a sum decides between them, and in a batch that bit depends on the company
    (landmarks of 5 % of FER2013's images then move by up to 7 of 48 pixels). Training and prediction must see the same.

    Args:
        max_side: see `CopyDetector`.
        min_face: see `CopyDetector`.
        min_confidence: least probability of a face in the last of the three networks.
        device: ``auto`` (an accelerator where there is one), ``cpu``, ``cuda`` ...
    """

    def __init__(self, *, max_side: int, min_face: int, min_confidence: float, device: str) -> None:
        super().__init__(max_side=max_side, min_face=min_face)
        import torch

        try:
            from facenet_pytorch import MTCNN
        except ImportError as error:
            raise UserError(
                f"detector=mtcnn needs facenet-pytorch ({error}): pip install facenet-pytorch==2.5.3 (later versions "
                "ask for an old torch), or choose detector=haar"
            ) from None
        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            where = torch.device(place)
            self._network = MTCNN(
                min_face_size=min_face, thresholds=[0.6, 0.7, min_confidence], keep_all=True, device=where
            )
        except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
            reason = str(error).splitlines()[0]
            raise UserError(f"detector.device={device} cannot be used ({reason}): use auto or cpu") from None

    def find(self, copy: Array) -> list[FoundFace]:
        """See `CopyDetector`."""
        if min(copy.shape[:2]) * (12.0 / self.min_face) < 12:  # as the library rounds; it fails on an empty pyramid
            return []
        boxes, confidences, points = self._network.detect(copy, landmarks=True)
        if boxes is None:
            return []
        # Its arrays have dtype object.
        corners, landmarks = np.array(boxes.tolist(), dtype=np.float64), np.array(points.tolist(), dtype=np.float64)
        boxes = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]])
        return [
            FoundFace(box, self._settled(copy, box, points), float(confidence))
            for box, points, confidence in zip(boxes, landmarks, confidences, strict=True)
        ]

    def _settled(self, copy: Array, box: Array, landmarks: Array) -> Array:
        """(5, 2) landmarks averaged over views of the face: turned level, shifted, scaled and mirrored.

        The last network sees 48 x 48 pixels, so its points jump by several per cent of the face when the picture is
        turned or scaled a little. Averaging cuts that to a quarter and levels eyes to 0.1 to 0.3 degrees instead of
        1 to 2 (frontal photographs, turned by up to 18 degrees and mapped back).
        """
        import torch

        level = landmark_transform(landmarks, 48, 0.0) is not None
        across = landmarks[1] - landmarks[0] if level else np.array([1.0, 0.0])
        centre, side = box[:2] + box[2:] / 2, float(max(box[2:]))
        transforms = [
            square_transform(centre + np.multiply(shift, side), scale * side, across / np.hypot(*across), 48, 0.0)
            for scale in _SCALES
            for shift in _SHIFTS
        ]
        views = np.stack([warp(copy, transform, 48) for transform in transforms])
        both = np.ascontiguousarray(np.concatenate([views, views[:, :, ::-1]]).transpose(0, 3, 1, 2))
        with torch.no_grad():
            pixels = (torch.from_numpy(both).to(self._network.device).float() - 127.5) / 128  # as the library does
            _, answer, _ = self._network.onet(pixels)
        # Ten numbers a view: five x, then five y, as shares of its side.
        points = answer.cpu().numpy().astype(np.float64).reshape(2, len(views), 2, 5).swapaxes(2, 3) * 48 - 0.5
        points[1] = points[1][:, _MIRRORED] * (-1, 1) + (47, 0)
        back = [move_points(p, invert(t)) for p, t in zip(points.mean(0), transforms, strict=True)]
        settled: Array = np.mean(back, axis=0)
        return settled


class Haar(CopyDetector):
    """OpenCV's cascades (Viola and Jones, CVPR 2001): upright frontal faces; eyes where both are found, no mouth.

    Args:
        max_side: see `CopyDetector`.
        min_face: see `CopyDetector`.
        scale_factor: step between the sizes searched.
        min_neighbors: detections that must agree on a face.
    """

    def __init__(self, *, max_side: int, min_face: int, scale_factor: float, min_neighbors: int) -> None:
        super().__init__(max_side=max_side, min_face=min_face)
        self.scale_factor, self.min_neighbors = scale_factor, min_neighbors
        folder = Path(cv2.__file__).with_name("data")
        self._faces = cv2.CascadeClassifier(str(folder / "haarcascade_frontalface_alt2.xml"))
        self._eyes = cv2.CascadeClassifier(str(folder / "haarcascade_eye.xml"))

    def find(self, copy: Array) -> list[FoundFace]:
        """See `CopyDetector`."""
        grey = cv2.equalizeHist(cv2.cvtColor(copy, cv2.COLOR_RGB2GRAY))
        boxes, _, weights = self._faces.detectMultiScale3(
            grey,
            scaleFactor=self.scale_factor,
            minNeighbors=self.min_neighbors,
            minSize=(self.min_face, self.min_face),
            outputRejectLevels=True,
        )
        return [
            FoundFace(box, self._landmarks(grey, box), float(weight))
            for box, weight in zip(np.array(boxes, dtype=np.float64), np.ravel(weights), strict=True)
        ]

    def _landmarks(self, grey: Array, box: Array) -> Array | None:
        """Both eyes, the rest NaN; None unless a likely eye is found on each side."""
        x, y, width, height = box.astype(int)
        upper = grey[y : y + int(0.6 * height), x : x + width]
        eyes, _, weights = self._eyes.detectMultiScale3(
            upper, minSize=(width // 8, width // 8), outputRejectLevels=True
        )
        best: dict[bool, tuple[float, Array]] = {}
        for (ex, ey, ew, eh), weight in zip(eyes, np.ravel(weights), strict=True):
            centre = np.array([x + ex + ew / 2, y + ey + eh / 2])
            right = bool(centre[0] > x + width / 2)
            if right not in best or weight > best[right][0]:
                best[right] = (float(weight), centre)
        if len(best) < 2:
            return None
        landmarks = np.full((5, 2), np.nan)
        landmarks[0], landmarks[1] = best[False][1], best[True][1]
        across = landmarks[1] - landmarks[0]
        # The cascade finds faces turned by up to about 20 degrees; steeper or closer pairs are not both eyes.
        likely = abs(across[1]) < 0.4 * across[0] and 0.25 * width < across[0] < 0.65 * width
        return landmarks if likely else None


class YuNet(CopyDetector):
    """YuNet (Wu et al., Machine Intelligence Research 2023) through OpenCV; its ONNX file is the user's to fetch.

    Args:
        max_side: see `CopyDetector`.
        min_face: see `CopyDetector`.
        min_confidence: least score of a face.
        model: path of face_detection_yunet_*.onnx, from github.com/opencv/opencv_zoo (MIT).
    """

    def __init__(self, *, max_side: int, min_face: int, min_confidence: float, model: str | None) -> None:
        super().__init__(max_side=max_side, min_face=min_face)
        if model is None or not Path(model).is_file():
            raise UserError(
                f"detector.model={model}: expected the path of face_detection_yunet_2023mar.onnx, which "
                "github.com/opencv/opencv_zoo has under models/face_detection_yunet"
            )
        try:
            self._network = cv2.FaceDetectorYN.create(model, "", (320, 320), score_threshold=min_confidence)
        except cv2.error as error:
            raise UserError(f"detector.model={model} is no YuNet that OpenCV can read ({error.err})") from None

    def find(self, copy: Array) -> list[FoundFace]:
        """See `CopyDetector`."""
        self._network.setInputSize((copy.shape[1], copy.shape[0]))
        _, rows = self._network.detect(cv2.cvtColor(copy, cv2.COLOR_RGB2BGR))
        # A row: x, y, width, height, the person's right eye (left in the image), left eye, nose, right and left mouth
        # corner, score.
        return [
            FoundFace(row[:4], row[4:14].reshape(5, 2), float(row[14]))
            for row in (() if rows is None else rows.astype(np.float64))
            if min(row[2:4]) >= self.min_face
        ]
