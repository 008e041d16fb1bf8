"""From a face in a picture to a square crop: one geometry, for training data and for prediction alike.

Points are (x, y) in pixels, pixel centres at whole numbers (OpenCV's convention); left and right as seen in the image.
With l and r the eyes, e midway between them, m midway between the mouth's corners and ``down`` the direction at right
angles to r - l that points to the mouth:

    unit   = max(|r - l|, 0.7 |m - e|)
    side   = 2.8 unit (1 + 2 margin)         of the square cut out of the picture
    centre = e + (0.45 + shift) unit down    of that square, which is turned so that the eyes are level

so level eyes lie at height 0.5 - 0.45 / (2.8 (1 + 2 margin)) of the crop (0.37 at the default margin of 0.1) and, while
the first term is the larger, 1 / (2.8 (1 + 2 margin)) apart (0.30). The mouth of a frontal face lies about 1.1 eye
distances below its eyes, so the second term takes over only when the head is turned and its eyes draw together.
Crops others made have another ``shift`` than 0, see fer/faces/framing.py.
A face of which only the box is known is cut, not turned: side = max(width, height) (1 + 2 margin) about its centre,
shifted by max(width, height) / 2.8 as the unit. The constants make both cuts alike: MTCNN's boxes are about 2.8 eye
distances high.
"""

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np

Array = np.ndarray[Any, Any]

GEOMETRY = 1  # raise when the same face gives another crop
SIDE = 2.8
BELOW_EYES = 0.45
MOUTH_WEIGHT = 0.7
PROFILE = 0.25  # eyes closer than this share of the eye-mouth distance (about 75 degrees of yaw) tell no direction


@dataclass(frozen=True)
class Crop:
    """An aligned face.

    Attributes:
        image: (size, size) or (size, size, 3) uint8, as the picture was grey or RGB; black where it lies outside.
        transform: (2, 3) float64, from the picture's pixels to the crop's.
        by: what the crop was cut by.
    """

    image: Array
    transform: Array
    by: Literal["landmarks", "box"]


def align(
    image: Array, size: int, margin: float, landmarks: Array | None, box: Array | None, shift: float = 0.0
) -> Crop | None:
    """Cut a face out of a picture, by its landmarks where they will do, else by its box.

    Args:
        image: (H, W) or (H, W, 3) uint8.
        size: side of the crop in pixels.
        margin: added on each side, as a share of the face square's side.
        landmarks: (5, 2) or (68, 2), see `five_points`; NaN where unknown.
        box: (4,) x, y, width, height; NaN where unknown.
        shift: of the crop's centre towards the mouth, in units of the face.

    Returns:
        The crop, or None where neither landmarks nor box place a face.
    """
    transform = None if landmarks is None else landmark_transform(landmarks, size, margin, shift)
    if transform is not None:
        return Crop(warp(image, transform, size), transform, "landmarks")
    transform = None if box is None else box_transform(box, size, margin, shift)
    return None if transform is None else Crop(warp(image, transform, size), transform, "box")


def five_points(landmarks: Array) -> Array:
    """Left eye, right eye, nose, left mouth corner, right mouth corner, (5, 2) float64, of 5 or 68 (iBUG) points.

    Raises:
        ValueError: another number of points.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    if points.shape == (68, 2):
        return np.stack([points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]])
    if points.shape != (5, 2):
        raise ValueError(f"landmarks of shape {points.shape}, expected (5, 2) or (68, 2)")
    return points


@dataclass(frozen=True)
class Pose:
    """Where a face is and how large.

    Attributes:
        eyes: (2,) the point midway between them.
        unit: see this module.
        across: (2,) unit vector from the left eye to the right one.
        down: (2,) unit vector towards the mouth.
    """

    eyes: Array
    unit: float
    across: Array
    down: Array


def pose(landmarks: Array) -> Pose | None:
    """What 5 or 68 landmarks tell of a face.

    Returns:
        None where they tell no direction: an eye is unknown, the eyes coincide (a profile), or the mouth lies above
        them, as when left and right are exchanged. An unknown mouth is done without.
    """
    left, right, _, *corners = five_points(landmarks)
    between, across = (left + right) / 2, right - left
    distance = float(np.hypot(*across))
    if not distance > 0:  # nor for NaN
        return None
    unit = distance
    down = np.array([-across[1], across[0]]) / distance
    mouth = np.mean(corners, axis=0) - between
    if not np.isnan(mouth).any():
        length = float(np.hypot(*mouth))
        if mouth @ down <= 0 or distance < PROFILE * length:
            return None
        unit = max(distance, MOUTH_WEIGHT * length)
    return Pose(between, unit, across / distance, down)


def landmark_transform(landmarks: Array, size: int, margin: float, shift: float = 0.0) -> Array | None:
    """The (2, 3) transform that puts the eyes level into the crop; None where `pose` is."""
    face = pose(landmarks)
    if face is None:
        return None
    centre = face.eyes + (BELOW_EYES + shift) * face.unit * face.down
    return square_transform(centre, SIDE * face.unit, face.across, size, margin)


def box_transform(box: Array, size: int, margin: float, shift: float = 0.0) -> Array | None:
    """The (2, 3) transform that scales a box x, y, width, height into the crop; None for an empty or unknown box."""
    x, y, width, height = np.asarray(box, dtype=np.float64)
    if not (width > 0 and height > 0 and np.isfinite([x, y, width, height]).all()):
        return None
    side = max(width, height)
    centre = np.array([x + width / 2, y + height / 2 + shift * side / SIDE])
    return square_transform(centre, side, np.array([1.0, 0.0]), size, margin)


def square_transform(centre: Array, side: float, across: Array, size: int, margin: float) -> Array:
    """The (2, 3) transform of the square about ``centre``, margins added, to the crop; turns ``across`` level.

    Args:
        centre: (2,) in the picture.
        side: of the square without margins, in pixels of the picture.
        across: (2,) unit vector in the picture that becomes the crop's horizontal.
        size: side of the crop in pixels.
        margin: added on each side, as a share of ``side``.
    """
    scale = size / (side * (1 + 2 * margin))
    linear = scale * np.array([[across[0], across[1]], [-across[1], across[0]]])
    return np.column_stack([linear, (size - 1) / 2 - linear @ centre])


def move_points(points: Array, transform: Array) -> Array:
    """(..., 2) points of the picture as points of the crop."""
    moved: Array = np.asarray(points, dtype=np.float64) @ transform[:, :2].T + transform[:, 2]
    return moved


def move_box(box: Array, transform: Array) -> Array:
    """(4,) upright box x, y, width, height around a box moved into the crop."""
    x, y, width, height = np.asarray(box, dtype=np.float64)
    corners = move_points(np.array([(x, y), (x + width, y), (x, y + height), (x + width, y + height)]), transform)
    return np.concatenate([corners.min(0), corners.max(0) - corners.min(0)])


def invert(transform: Array) -> Array:
    """The (2, 3) transform back from the crop to the picture."""
    back: Array = cv2.invertAffineTransform(np.asarray(transform, dtype=np.float64))
    return back


def warp(image: Array, transform: Array, size: int) -> Array:
    """Draw the crop: shrinking averages areas, enlarging and turning interpolate bilinearly, outside is black."""
    scale = float(np.sqrt(np.linalg.det(transform[:, :2])))
    # Only the part that is needed: a group photograph is not shrunk anew for each of its faces.
    edge = np.array([(-1, -1), (size, -1), (-1, size), (size, size)], dtype=np.float64)
    corners = move_points(edge, invert(transform))
    reach = 2 + 1 / scale
    low = np.maximum(np.floor(corners.min(0) - reach), 0).astype(int)
    high = np.ceil(corners.max(0) + reach).astype(int)
    part = image[low[1] : max(high[1], 0), low[0] : max(high[0], 0)]
    if not part.size:
        return np.zeros((size, size, *image.shape[2:]), dtype=np.uint8)
    to_part = np.array([[1.0, 0.0, low[0]], [0.0, 1.0, low[1]], [0.0, 0.0, 1.0]])
    if scale < 1:
        # warpAffine reads four pixels for each it writes, so a face shrunk by it alone would alias.
        height, width = part.shape[:2]
        small = (max(round(width * scale), 1), max(round(height * scale), 1))
        part = cv2.resize(part, small, interpolation=cv2.INTER_AREA)
        fx, fy = width / small[0], height / small[1]
        to_part = to_part @ np.array([[fx, 0, fx / 2 - 0.5], [0, fy, fy / 2 - 0.5], [0, 0, 1]])
    crop: Array = cv2.warpAffine(np.ascontiguousarray(part), transform @ to_part, (size, size), flags=cv2.INTER_LINEAR)
    return crop
