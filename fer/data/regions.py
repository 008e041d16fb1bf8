"""Pseudo-labels: boxes of face, eyes, nose and mouth from landmarks, for networks that learn to find them.

Zhang N. et al. (Instrumentation 9(3), 2022) took what a face detector found and removed bad regions by hand. Here the
data set's own landmarks come first, and four rules remove what cannot be right:

- 68 points: the tight box of each organ's points and a quarter of its longer side around;
- 5 points, face of width w: squares of 0.33 w about eyes and nose, 0.5 w x 0.3 w midway between the mouth's corners;
- a face without a box gets the square that `fer.faces.align` would cut, upright and without margin.

The organs of an image are rejected together, since a network must not learn from half of them that the others are
background.
"""

import dataclasses
from typing import Any

import numpy as np

from fer.data.manifest import Array, Manifest
from fer.faces.align import BELOW_EYES, MOUTH_WEIGHT, SIDE

EYE_DISTANCE = 0.15  # of the face's width, at least
_ORGANS_68 = (range(36, 42), range(42, 48), range(27, 36), range(48, 68))  # left eye, right eye, nose, mouth
_AROUND = 0.25
_SIDES = np.array([(0.33, 0.33), (0.33, 0.33), (0.33, 0.33), (0.5, 0.3)])  # of the face's width

OUTSIDE = "face or organ outside the image"
ELSEWHERE = "organ outside the face"
ORDER = "eyes, nose and mouth not in this order from above"
CLOSE = f"eyes closer than {EYE_DISTANCE} of the face's width"


def with_regions(manifest: Manifest, windows: Array) -> tuple[Manifest, dict[str, Any] | None]:
    """A manifest whose landmarks have become boxes.

    Args:
        manifest: N images.
        windows: (N, 4) x, y, width, height of the part of its source each stored image shows.

    Returns:
        The manifest, with ``organ_boxes`` and a ``box`` wherever landmarks allow; and how many were made and rejected,
        by rule. A manifest that has organ boxes of its own, or no landmarks, comes back as it was, with None.
    """
    if manifest.landmarks is None or manifest.organ_boxes is not None:
        return manifest, None
    landmarks = manifest.landmarks.astype(np.float64)
    own = np.full((len(manifest), 4), np.nan) if manifest.box is None else manifest.box.astype(np.float64)
    known = np.isfinite(own).all(axis=1)
    box = np.where(known[:, None], own, face_boxes(landmarks))
    organs = organ_boxes(landmarks, box[:, 2])
    there = np.isfinite(organs).all(axis=(1, 2)) & np.isfinite(box).all(axis=1)
    reason = rejections(box, organs, windows)
    good = there & (reason == "")
    # A box of the data set's own says where the face is, whatever its landmarks are worth.
    box[~good & ~known] = np.nan
    organs[~good] = np.nan
    made = dataclasses.replace(manifest, box=box.astype(np.float32), organ_boxes=organs.astype(np.float32))
    return made, {
        "landmarks": landmarks.shape[1],
        "accepted": int(good.sum()),
        "no_landmarks": int((~there).sum()),
        "rejected": {rule: int((there & (reason == rule)).sum()) for rule in (OUTSIDE, ELSEWHERE, ORDER, CLOSE)},
    }


def organ_boxes(landmarks: Array, width: Array) -> Array:
    """(N, 4, 4) x, y, width, height of left eye, right eye, nose and mouth; NaN where a point is missing.

    Args:
        landmarks: (N, 5, 2) or (N, 68, 2).
        width: (N,) widths of the faces, used with 5 points.
    """
    if landmarks.shape[1] == 5:
        left, right, nose, *corners = landmarks.swapaxes(0, 1)
        centre = np.stack([left, right, nose, np.mean(corners, axis=0)], axis=1)
        side = width[:, None, None] * _SIDES
    else:
        organs = [landmarks[:, list(points)] for points in _ORGANS_68]
        low, high = (np.stack([reach(points, axis=1) for points in organs], axis=1) for reach in (np.min, np.max))
        centre, side = (low + high) / 2, high - low
        side = side + 2 * _AROUND * side.max(axis=2, keepdims=True)
    # A landmark counts from the centre of the first pixel, a box from the image's corner.
    return np.concatenate([centre + 0.5 - side / 2, side], axis=2)


def face_boxes(landmarks: Array) -> Array:
    """(N, 4) upright squares around faces of 5 or 68 points; NaN where eyes or mouth are missing."""
    if landmarks.shape[1] == 5:
        left, right, *_ = landmarks.swapaxes(0, 1)
        mouth = landmarks[:, 3:].mean(axis=1)
    else:
        left, right, mouth = (
            landmarks[:, points].mean(axis=1) for points in ([*range(36, 42)], [*range(42, 48)], [48, 54])
        )
    eyes, across = (left + right) / 2, right - left
    distance = np.hypot(*across.T)
    unit = np.maximum(distance, MOUTH_WEIGHT * np.hypot(*(mouth - eyes).T))
    down = np.column_stack([-across[:, 1], across[:, 0]]) / np.maximum(distance, 1e-9)[:, None]
    side = (SIDE * unit)[:, None]
    centre = eyes + 0.5 + BELOW_EYES * unit[:, None] * down
    return np.hstack([centre - side / 2, side, side])


def rejections(box: Array, organs: Array, windows: Array) -> Array:
    """(N,) the first rule that an image breaks, ``""`` for none; says nothing about images with NaN.

    The eyes' distance is taken from left to right, so that exchanged eyes are too close as well.

    Args:
        box: (N, 4) of the faces.
        organs: (N, 4, 4).
        windows: (N, 4) of the parts of the sources that are seen.
    """
    centre = np.concatenate([box[:, None], organs], axis=1)
    centre = centre[..., :2] + centre[..., 2:] / 2
    eyes, nose, mouth = centre[:, 1:3].mean(axis=1), centre[:, 3], centre[:, 4]
    return np.select(
        [
            ~_within(centre, windows).all(axis=1),
            ~_within(centre[:, 1:], box).all(axis=1),
            ~((eyes[:, 1] < nose[:, 1]) & (nose[:, 1] < mouth[:, 1])),
            ~(centre[:, 2, 0] - centre[:, 1, 0] >= EYE_DISTANCE * box[:, 2]),
        ],
        [OUTSIDE, ELSEWHERE, ORDER, CLOSE],
        "",
    )


def _within(points: Array, boxes: Array) -> Array:
    """(N, P) whether points (N, P, 2) lie in their image's box (N, 4)."""
    low = boxes[:, None, :2]
    inside: Array = np.logical_and(points >= low, points <= low + boxes[:, None, 2:])
    return np.asarray(inside.all(axis=2))
