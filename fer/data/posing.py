"""Pose a synthetic person for a picture: expression, head pose and camera, and where every landmark then lies.

Image units: x right and y down, 0 to 1 over the picture's side, so that one picture is the same at every size.
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.interpolate import CubicSpline

from fer.data.identities import PICTURE, Array, Identity, activations, deform, identity, stream

OCCLUDERS = ("none", "hand", "mask", "object")
_CAMERA = 0.12  # strength of the perspective: 1 / distance, face units
_MIDDLE = np.array([0.0, 0.05, 0.0])  # the point of the head that pose turns about
_ORGANS, _ORGAN_ORDER = [0, 27, 36, 42, 48], [2, 3, 1, 4]  # first landmark of jaw and brows, nose, eyes, mouth


@dataclass(frozen=True, eq=False)
class Conditions:
    """How one picture was taken.

    Attributes:
        yaw, pitch, roll: radians; positive yaw turns to the right of the image, positive pitch nods down.
        scale: image units per face unit.
        centre: (2,) image place of the middle of the head.
        gaze: (2,) shift of the irises, face units.
        light: (3,) unit vector towards the lamp (right, down, towards the viewer).
        ambient: share of the light that has no direction.
        shadow: angle, offset and depth of the edge of a cast shadow.
        exposure, gamma: of the camera.
        tint: (3,) colour of the light.
        blur: standard deviation, image units.
        noise: standard deviation of the sensor noise, grey levels.
        occluder: one of `OCCLUDERS`.
    """

    yaw: float
    pitch: float
    roll: float
    scale: float
    centre: Array
    gaze: Array
    light: Array
    ambient: float
    shadow: tuple[float, float, float]
    exposure: float
    gamma: float
    tint: Array
    blur: float
    noise: float
    occluder: str


@dataclass(frozen=True, eq=False)
class Geometry:
    """Everything that has a place in a picture, (n, 2) image units unless said otherwise.

    Attributes:
        activation: (2, A) action units of the left and the right half of the face.
        landmarks: (68, 2) iBUG order.
        depth: (68, 3) the same before posing, face units.
        axes: (2, 2) the image vectors of one face unit to the right and down, in the plane of the face.
        skull, skin: points whose convex hull is the head with its hair, and the visible face.
        strands: (M, n, 2) meridians of the skull from the crown down.
        hairline: (17, 2) from the right temple over the forehead to the left.
        irises, ears: (2, 2) centres, left and right.
        freckles: (F, 2).
        box: (4,) x, y, width, height of the visible face, hairline to chin.
        organ_boxes: (4, 4) left eye, right eye, nose, mouth: their landmarks and a quarter of the longer side around.
    """

    person: Identity
    conditions: Conditions
    activation: Array
    landmarks: Array
    depth: Array
    axes: Array
    skull: Array
    skin: Array
    strands: Array
    hairline: Array
    irises: Array
    ears: Array
    freckles: Array
    box: Array
    organ_boxes: Array


def spline(controls: int, samples: int) -> Array:
    """(samples, controls) matrix that turns control points into a smooth curve through them."""
    matrix: Array = CubicSpline(np.arange(controls), np.eye(controls))(np.linspace(0, controls - 1, samples))
    return matrix


def draw_conditions(rng: np.random.Generator, *, pose: float, light: float, occlusion: float) -> Conditions:
    """Draw how a picture is taken.

    Args:
        rng: where the chance comes from.
        pose: 1 for the usual spread of head pose, position and size, 0 for frontal and centred faces.
        light: 1 for the usual spread of light, exposure, blur and noise, 0 for even light and a perfect camera.
        occlusion: probability of a hand, a mask or an object before the face.
    """
    n: list[float] = rng.standard_normal(10).clip(-2.2, 2.2).tolist()
    u: list[float] = rng.random(13).tolist()
    around, towards = 2 * math.pi * u[0], 0.3 + 0.55 * u[1]
    flat = math.sqrt(1 - towards**2)
    return Conditions(
        yaw=pose * 0.18 * n[0],
        pitch=pose * 0.09 * n[1],
        roll=pose * 0.12 * n[2],
        scale=0.415 * math.exp(pose * 0.06 * n[3]),
        centre=0.5 + pose * 0.034 * np.array(n[4:6]),
        gaze=np.array([0.025 * n[6], 0.01 * n[7]]),
        light=np.array([flat * math.cos(around), flat * math.sin(around), towards]),
        ambient=1 - light * (0.25 + 0.35 * u[2]),
        shadow=(2 * math.pi * u[3], 0.5 * u[4], light * 0.4 * max(0.0, 2 * u[5] - 1)),
        exposure=math.exp(light * 0.22 * n[8]),
        gamma=math.exp(light * 0.18 * n[9]),
        tint=1 + light * 0.1 * (2 * np.array(u[6:9]) - 1),
        blur=light * 0.011 * u[9],
        noise=light * 7 * u[10],
        occluder=OCCLUDERS[1 + int(3 * u[12])] if u[11] < occlusion else "none",
    )


def geometry(
    seed: int,
    index: int,
    *,
    expression: str,
    subject: int,
    intensity: float,
    pose: float = 1.0,
    light: float = 1.0,
    occlusion: float = 0.1,
) -> Geometry:
    """Place everything of a picture without painting it; the arguments are those of `fer.data.drawing.render`."""
    person = identity(seed, subject)
    rng = stream(seed, PICTURE, index)
    conditions = draw_conditions(rng, pose=pose, light=light, occlusion=occlusion)
    activation = activations(person, expression, intensity, rng)
    face = deform(person, activation)
    irises = 0.5 * (face[[36, 42]] + face[[39, 45]])
    irises[:, :2] += conditions.gaze
    rotation = _rotation(conditions)
    flat = _project(np.concatenate([face, irises, _JAW @ face[:17], _still(person)]), rotation, conditions)
    cuts = itertools.pairwise(itertools.accumulate((0, *_COUNTS, len(person.freckles), _SPHERE.size // 3)))
    landmarks, irises, jaw, ears, hairline, front, spots, skull = (flat[a:b] for a, b in cuts)
    skin = np.concatenate([jaw, hairline, front])
    low, high = np.minimum(skin.min(0), landmarks.min(0)), np.maximum(skin.max(0), landmarks.max(0))
    return Geometry(
        person=person,
        conditions=conditions,
        activation=activation,
        landmarks=landmarks,
        depth=face,
        axes=rotation[:2, :2].T * conditions.scale,
        skull=np.concatenate([skull, jaw]),
        skin=skin,
        strands=skull.reshape(*_SPHERE.shape[:2], 2),
        hairline=hairline,
        irises=irises,
        ears=ears,
        freckles=spots,
        box=np.concatenate([low, high - low]),
        organ_boxes=_organ_boxes(landmarks, low, high),
    )


def _organ_boxes(landmarks: Array, low: Array, high: Array) -> Array:
    """(4, 4) boxes of the organs' landmarks with a quarter of the longer side around, within the face's corners."""
    first = np.minimum.reduceat(landmarks, _ORGANS)[_ORGAN_ORDER]
    last = np.maximum.reduceat(landmarks, _ORGANS)[_ORGAN_ORDER]
    margin = 0.25 * (last - first).max(1, keepdims=True)
    first, last = np.maximum(first - margin, low), np.minimum(last + margin, high)
    return np.concatenate([first, last - first], axis=1)


def _rotation(conditions: Conditions) -> Array:
    sy, cy = np.sin(conditions.yaw), np.cos(conditions.yaw)
    sp, cp = np.sin(conditions.pitch), np.cos(conditions.pitch)
    sr, cr = np.sin(conditions.roll), np.cos(conditions.roll)
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    nod = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    tilt = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    rotation: Array = tilt @ nod @ turn
    return rotation


def _project(points: Array, rotation: Array, conditions: Conditions) -> Array:
    """(n, 3) face units to (n, 2) image units, in perspective."""
    turned = (points - _MIDDLE) @ rotation.T
    flat: Array = turned[:, :2] * (conditions.scale / (1 - _CAMERA * turned[:, 2:])) + conditions.centre
    return flat


_JAW = spline(17, 49)
_ARC = np.linspace(0, np.pi, 17)
_LONGITUDE, _LATITUDE = np.meshgrid(
    np.linspace(0, 2 * np.pi, 16, endpoint=False), np.linspace(0.15, 2.0, 10), indexing="ij"
)
_SPHERE = np.stack(
    [np.sin(_LATITUDE) * np.cos(_LONGITUDE), -np.cos(_LATITUDE), np.sin(_LATITUDE) * np.sin(_LONGITUDE)], axis=-1
)
_VOLUME = {"bald": 1.0, "short": 1.05, "fringe": 1.08, "side": 1.1, "long": 1.1, "volume": 1.27}


_FRONT = np.array([[0.72, -0.1, 0.38], [0.66, 0.2, 0.36], [0.5, 0.45, 0.38], [0.66, -0.4, 0.32], [0.4, -0.5, 0.55]])
_COUNTS = (68, 2, len(_JAW), 2, len(_ARC), 2 * len(_FRONT))  # landmarks, irises, jaw, ears, hairline, front


@lru_cache(maxsize=4096)
def _still(person: Identity) -> Array:
    """(n, 3) points no action unit moves: ears, hairline, front, freckles, skull.

    The front are points of cheeks and forehead that become the outline when the head turns; the skull holds the
    meridians of the head and its hair from the crown down, long hair going on to the shoulders.
    """
    spots = np.column_stack([person.freckles[:, :2], 0.55 - 0.9 * person.freckles[:, 0] ** 2])
    ears = person.width * np.array([[-1.01, 0, -0.2], [1.01, 0, -0.2]])
    cos, sin = np.cos(_ARC), np.sin(_ARC)
    x = person.width * 0.98 * np.sign(cos) * np.abs(cos) ** 0.8
    hairline = np.stack([x, -0.1 + (person.hairline + 0.1) * sin**0.75, -0.2 + 0.7 * sin], axis=1)
    front = np.concatenate([_FRONT, _FRONT * (-1, 1, 1)]) * (person.width, 1, 1)
    skull = _SPHERE * (person.width * 1.03, 0.92, 0.86) * _VOLUME[person.hair] + (0, -0.3, -0.18)
    if person.hair == "long":
        skull[:, -3:, 1] = np.array([0.25, 0.6, 0.95])
        skull[:, -3:, 2] = np.minimum(skull[:, -3:, 2], -0.2)
    return np.concatenate([ears, hairline, front, spots, skull.reshape(-1, 3)])
