"""Draw synthetic faces: a person before a background, occluders, light on the relief, and the camera.

`render` is a pure function of its arguments: picture ``index`` of the world ``seed`` never depends on what was drawn
before it. `fer.data.posing` decides all places, `fer.data.painting` paints the person.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from fer.data.identities import PAINT, SENSOR, Array, Colour, mix, stream
from fer.data.painting import BOX, CIRCLE, CURVE, DARK, WHITE, Canvas, Path, paint_person
from fer.data.posing import Geometry, geometry

cv2.setNumThreads(0)  # pictures this small are slower with threads, and loaders run their own processes


@dataclass(frozen=True, eq=False)
class Face:
    """A picture and all that is known of it, places in pixels as in `fer.data.manifest.Manifest`.

    Attributes:
        image: (size, size) or (size, size, 3) uint8 RGB.
        landmarks68: (68, 2) iBUG order; they may lie outside of the picture.
        landmarks5: (5, 2) left eye, right eye, nose tip, left and right mouth corner, as seen in the image.
        box: (4,) x, y, width, height of the face from hairline to chin, clipped to the picture.
        organ_boxes: (4, 4) left eye, right eye, nose, mouth, clipped to the picture.
    """

    image: Array
    landmarks68: Array
    landmarks5: Array
    box: Array
    organ_boxes: Array


def render(
    seed: int,
    index: int,
    *,
    size: int,
    channels: int,
    expression: str,
    subject: int,
    intensity: float,
    pose: float = 1.0,
    light: float = 1.0,
    occlusion: float = 0.1,
) -> Face:
    """Draw picture ``index`` of the world ``seed``.

    Args:
        seed: the world: its people and pictures.
        index: number of the picture, 0 or more.
        size: side in pixels, 32 to 448.
        channels: 1 (grey) or 3 (RGB).
        expression: canonical name.
        subject: number of the person; any picture may show any person.
        intensity: strength of the expression, 0 to 1.
        pose: spread of head pose, place and size, 0 none to 1 usual.
        light: spread of light, exposure, blur and noise, 0 none to 1 usual.
        occlusion: probability of a hand, a mask or an object before the face.
    """
    placed = geometry(
        seed,
        index,
        expression=expression,
        subject=subject,
        intensity=intensity,
        pose=pose,
        light=light,
        occlusion=occlusion,
    )
    return Face(paint(placed, seed, index, size, channels), *annotations(placed, size))


def annotations(placed: Geometry, size: int) -> tuple[Array, Array, Array, Array]:
    """68 landmarks, 5 landmarks, face box and organ boxes of a picture, in pixels (see `Face`)."""
    points = placed.landmarks * size - 0.5
    five = np.stack([points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]])
    boxes = np.concatenate([placed.box[None], placed.organ_boxes])
    low = np.clip(boxes[:, :2], 0, 1) * size
    high = np.clip(boxes[:, :2] + boxes[:, 2:], 0, 1) * size
    clipped = np.concatenate([low, high - low], axis=1)
    return points, five, clipped[0], clipped[1:]


def paint(placed: Geometry, seed: int, index: int, size: int, channels: int) -> Array:
    """Paint a placed picture: (size, size) or (size, size, 3) uint8."""
    finer = 3 if size <= 32 else 2 if size <= 112 else 1
    rng = stream(seed, PAINT, index)
    canvas = Canvas(size * finer, placed)
    _background(canvas, rng)
    paint_person(canvas)
    _occluder(canvas, rng)
    if finer > 1:
        canvas.reduce(size)
    return _photograph(canvas, _light(canvas), channels, stream(seed, SENSOR, index))


def _paint(rng: np.random.Generator) -> Colour:
    """A colour for things: any brightness, moderately saturated."""
    return mix(255 * rng.random(3), [255 * rng.random()] * 3, 0.6)


def _background(canvas: Canvas, rng: np.random.Generator) -> None:
    """A gradient with a texture, clutter, and the person's neck and shoulders."""
    corners = 10 + 235 * rng.random((2, 2, 1)) + 25 * rng.standard_normal((2, 2, 3))
    coarse: Array = cv2.resize(corners, (16, 16), interpolation=cv2.INTER_LINEAR)
    coarse += 40 * rng.random() * rng.standard_normal((16, 16, 1))
    side = (canvas.side, canvas.side)
    cv2.resize(np.clip(coarse, 0, 255).astype(np.uint8), side, canvas.colour, interpolation=cv2.INTER_CUBIC)
    for _ in range(int(7 * rng.random())):
        angle, centre, half = np.pi * rng.random(), rng.random(2), 0.02 + 0.28 * rng.random(2)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        canvas.fill(centre + ((CIRCLE if rng.random() < 0.4 else BOX) * half) @ turn, _paint(rng))
    person, how = canvas.person, canvas.placed.conditions
    sin, cos = how.scale * np.sin(0.4 * how.roll), how.scale * np.cos(0.4 * how.roll)
    upright = np.array([[cos, sin], [-sin, cos]])
    chin = how.centre + 0.75 * upright[1]
    canvas.fill(chin + _SHOULDERS @ upright, person.shirt)
    canvas.fill(chin + _NECK @ upright, mix(person.skin, DARK, 0.28))


_SHOULDERS = np.array([[-0.42, 0.25], [-1.3, 0.55], [-1.5, 2.0], [1.5, 2.0], [1.3, 0.55], [0.42, 0.25]])
_NECK = np.array([[-0.45, -0.5], [-0.42, 0.4], [0.0, 0.62], [0.42, 0.4], [0.45, -0.5]])


_MASK = Path(
    *((i, 0, 0) for i in range(2, 15)),
    *((14, -0.02, -0.12), (28, 0.12, 0.06), (28, 0, 0), (28, -0.12, 0.06), (2, 0.02, -0.12)),
)
_PLEATS = [Path((3, 0.1, y - 0.1), (33, 0, y), (13, -0.1, y - 0.1)) for y in (0.12, 0.3)]
_FINGERS = [
    np.array([-0.25 + 0.165 * i, n / 2]) + CIRCLE * (0.088, n / 2) for i, n in enumerate((0.5, 0.6, 0.57, 0.42))
]


def _occluder(canvas: Canvas, rng: np.random.Generator) -> None:
    """A mask, a hand or an object before the face."""
    face, kind, scale = canvas.placed.landmarks, canvas.placed.conditions.occluder, canvas.placed.conditions.scale
    if kind == "mask":
        colour = _paint(rng)
        canvas.fill(canvas.along(_MASK), colour, 0.08)
        for pleat in _PLEATS:
            canvas.line(CURVE[3] @ canvas.along(pleat), mix(colour, DARK, 0.3), 0.02)
    elif kind == "hand":
        skin = mix(canvas.person.skin, DARK, 0.05)
        palm, goal = face[rng.choice([3, 5, 8, 11, 13])], face[rng.choice([30, 33, 36, 45, 48, 54])]
        along = (goal - palm) / np.linalg.norm(goal - palm)
        frame = np.array([[-along[1], along[0]], along]) * scale
        canvas.fill(palm + (CIRCLE * (0.34, 0.4)) @ frame - 0.25 * frame[1], skin, 0.2, solid=True)
        for finger in _FINGERS:
            outline = palm + finger @ frame
            canvas.fill(outline, skin, 0.22, solid=True)
            canvas.line(np.concatenate([outline, outline[:1]]), mix(skin, DARK, 0.35), 0.02)
    elif kind == "object":
        colour, angle, half = _paint(rng), np.pi * rng.random(), rng.uniform((0.08, 0.2), (0.24, 0.6))
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) * scale
        centre, outline = face[rng.integers(0, 68)], (BOX * half) @ turn
        canvas.fill(centre + outline, colour, 0.2, solid=True)
        canvas.fill(centre + 0.6 * outline, mix(colour, WHITE, 0.3))


def _light(canvas: Canvas) -> Array:
    """(S, S) brightness: Lambert's law on an ellipsoid with the relief's slopes, and a cast shadow."""
    how, side = canvas.placed.conditions, canvas.side
    relief = cv2.GaussianBlur(canvas.height, (0, 0), max(0.5, 0.035 * canvas.unit))
    slope_x = cv2.Sobel(relief, cv2.CV_32F, 1, 0, scale=canvas.unit / 8)
    slope_y = cv2.Sobel(relief, cv2.CV_32F, 0, 1, scale=canvas.unit / 8)
    grid = (np.arange(side, dtype=np.float32) + 0.5) / side
    x, y = ((grid - c) / how.scale for c in how.centre.tolist())
    x, y = x[None, :], y[:, None]
    cos, sin = math.cos(how.roll), math.sin(how.roll)
    u, v = (cos * x + sin * y) / 0.95, (cos * y - sin * x) / 1.3
    depth = np.sqrt(np.maximum(0.1, 1 - u * u - v * v))
    nx, ny = u * cos - v * sin - slope_x, u * sin + v * cos - slope_y
    lx, ly, lz = how.light.tolist()
    lambert = np.maximum(0, (nx * lx + ny * ly + depth * lz) / np.sqrt(nx * nx + ny * ny + depth * depth))
    direct = 1.35 * (1 - how.ambient)
    flat = how.ambient + direct * lz
    shade: Array = flat + canvas.solid.astype(np.float32) * (direct / 255) * (lambert - lz)
    angle, offset, deep = how.shadow
    if deep > 0:
        shade *= 1 - deep * np.clip(0.5 + 4 * (x * math.cos(angle) + y * math.sin(angle) - offset), 0, 1)
    return shade


def _photograph(canvas: Canvas, shade: Array, channels: int, rng: np.random.Generator) -> Array:
    """Exposure, colour of the light, blur, gamma and sensor noise."""
    how = canvas.placed.conditions
    lit: Array = canvas.colour
    if channels == 1:
        lit = cv2.cvtColor(canvas.colour, cv2.COLOR_RGB2GRAY) * (shade * how.exposure)
    else:
        lit = canvas.colour * (shade[..., None] * (how.exposure * how.tint).astype(np.float32))
    if how.blur * canvas.side > 0.2:
        lit = cv2.GaussianBlur(lit, (0, 0), how.blur * canvas.side)
    levels = (255 * (np.arange(256) / 255) ** how.gamma).astype(np.float32)
    toned: Array = cv2.LUT(np.minimum(lit, 255).astype(np.uint8), levels)
    toned += rng.standard_normal(toned.shape, np.float32) * how.noise
    image: Array = np.clip(toned + 0.5, 0, 255).astype(np.uint8)
    return image
