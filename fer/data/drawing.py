"""Paint a synthetic face as a clay figure: colours and heights first, then light on the relief, then the camera.

`render` is a pure function of its arguments: picture ``index`` of the world ``seed`` never depends on what was drawn
before it. Everything that has a place in the picture is decided by `fer.data.posing.geometry`.
"""

import copy
from dataclasses import dataclass

import cv2
import numpy as np

from fer.data.identities import AUS, MIRROR_68, Array, Colour, mix, stream
from fer.data.posing import Geometry, geometry, spline

cv2.setNumThreads(0)  # pictures this small are slower with threads, and loaders run their own processes

_SUBPIXEL = 4  # bits of sub-pixel precision of cv2's polygons
_DARK: Colour = (46, 26, 24)
_WHITE: Colour = (255, 255, 255)
_TURN = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)
_BOX = np.sign(_CIRCLE) * np.abs(_CIRCLE) ** 0.4  # a square with round corners
_CURVE = {n: spline(n, 4 * n - 3) for n in (3, 4, 5, 7)}
_TAPER = np.sin(np.linspace(0.25, np.pi - 0.12, 17))[:, None] / 2


class _Path:
    """Places given as ``(landmark, right, down)`` or ``(landmark, landmark, share, right, down)``, face units.

    Numbers from 68 to 84 are the hairline; ``mirrored`` gives the same path on the other half of the face.
    """

    def __init__(self, *places: tuple[float, ...]) -> None:
        full = np.array([p if len(p) == 5 else (p[0], p[0], 0, p[1], p[2]) for p in places], np.float64)
        self.first, self.second = full[:, 0].astype(int), full[:, 1].astype(int)
        self.share, self.offset = full[:, 2:3], full[:, 3:]

    def mirrored(self) -> "_Path":
        mirror = np.concatenate([MIRROR_68, np.arange(84, 67, -1)])
        other = copy.copy(self)
        other.first, other.second, other.offset = mirror[self.first], mirror[self.second], self.offset * (-1, 1)
        return other


@dataclass(frozen=True, eq=False)
class Face:
    """A picture and all that is known of it; coordinates in pixels, (0, 0) the centre of the first pixel.

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
        size: side in pixels, 32 to 448.
        channels: 1 (grey) or 3 (RGB).
        expression: canonical name.
        subject: number of the person; any picture may show any person.
        intensity: strength of the expression, 0 to 1.
        pose, light, occlusion: see `fer.data.posing.draw_conditions`.
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
    low = np.clip(boxes[:, :2], 0, 1) * size - 0.5
    high = np.clip(boxes[:, :2] + boxes[:, 2:], 0, 1) * size - 0.5
    clipped = np.concatenate([low, high - low], axis=1)
    return points, five, clipped[0], clipped[1:]


def paint(placed: Geometry, seed: int, index: int, size: int, channels: int) -> Array:
    """Paint a placed picture: (size, size) or (size, size, 3) uint8."""
    finer = 3 if size <= 32 else 2 if size <= 64 else 1
    rng = stream(seed, 2, index)
    canvas = _Canvas(size * finer, placed)
    _background(canvas, rng)
    _head(canvas)
    _relief(canvas)
    _wrinkles(canvas)
    _beard(canvas)
    _nose(canvas)
    _mouth(canvas)
    _eyes(canvas)
    for brow in (placed.landmarks[21:16:-1], placed.landmarks[22:27]):
        canvas.fill(canvas.stroke(brow, 1.4 * placed.person.brow), placed.person.brow_colour)
    _fringe(canvas)
    if placed.person.glasses:
        _glasses(canvas)
    _occluder(canvas, rng)
    if finer > 1:
        canvas.reduce(size)
    return _photograph(canvas, _light(canvas), channels, stream(seed, 3, index))


class _Canvas:
    """Colours (S, S, 3) and heights (S, S), face units, painted together; ``solid`` is what has a relief."""

    def __init__(self, side: int, placed: Geometry) -> None:
        self.side, self.placed, self.person = side, placed, placed.person
        self.colour = np.empty((side, side, 3), np.uint8)
        self.height = np.zeros((side, side), np.float32)
        self.solid = np.zeros((side, side), np.uint8)
        self.unit = placed.conditions.scale * side  # pixels per face unit
        self.marks = np.concatenate([placed.landmarks, placed.hairline])
        self.skin = cv2.convexHull(placed.skin.astype(np.float32))[:, 0]

    def reduce(self, side: int) -> None:
        """Shrink to a smaller side, averaging."""
        self.colour, self.height, self.solid = (
            cv2.resize(plane, (side, side), interpolation=cv2.INTER_AREA)
            for plane in (self.colour, self.height, self.solid)
        )
        self.unit, self.side = self.unit * side / self.side, side

    def fixed(self, points: Array) -> Array:
        """Image units to cv2's fixed-point pixels."""
        one = 1 << _SUBPIXEL
        return (points * (self.side * one) + (0.5 - 0.5 * one)).astype(np.int32)

    def along(self, path: _Path) -> Array:
        """(n, 2) image places of a path."""
        first = self.marks[path.first]
        places: Array = first + path.share * (self.marks[path.second] - first) + path.offset @ self.placed.axes
        return places

    def ellipse(self, centre: Array, right: float, down: float) -> Array:
        """Outline of an ellipse with half axes in face units, in the plane of the face."""
        outline: Array = centre + (_CIRCLE * (right, down)) @ self.placed.axes
        return outline

    def stroke(self, points: Array, thickness: float) -> Array:
        """Outline of a brush stroke through five points, ``thickness`` face units, tapered at its ends."""
        middle, half = _CURVE[5] @ points, _TAPER * (thickness * self.placed.axes[1])
        return np.concatenate([middle - half, (middle + half)[::-1]])

    def fill(self, points: Array, colour: Colour, height: float | None = None, solid: bool = False) -> None:
        """Fill a polygon with a colour and, where given, a height."""
        fixed = [self.fixed(points)]
        cv2.fillPoly(self.colour, fixed, colour, cv2.LINE_AA, _SUBPIXEL)
        if height is not None:
            cv2.fillPoly(self.height, fixed, height, cv2.LINE_8, _SUBPIXEL)
        if solid:
            cv2.fillPoly(self.solid, fixed, 255, cv2.LINE_AA, _SUBPIXEL)

    def raise_to(self, points: Array, height: float) -> None:
        """Set the height inside a polygon, leaving its colour."""
        cv2.fillPoly(self.height, [self.fixed(points)], height, cv2.LINE_8, _SUBPIXEL)

    def line(self, points: Array, colour: Colour, width: float, depth: float | None = None) -> None:
        """Draw one (n, 2) or several (m, n, 2) polylines, ``width`` face units or at least one pixel, and a groove."""
        fixed, thick = self.fixed(points.reshape(-1, *points.shape[-2:])), max(1, round(width * self.unit))
        cv2.polylines(self.colour, fixed, False, colour, thick, cv2.LINE_AA, _SUBPIXEL)
        if depth is not None:
            cv2.polylines(self.height, fixed, False, depth, 2 * thick, cv2.LINE_8, _SUBPIXEL)


def _paint(rng: np.random.Generator) -> Colour:
    """A colour for things: any brightness, moderately saturated."""
    return mix(255 * rng.random(3), [255 * rng.random()] * 3, 0.6)


def _background(canvas: _Canvas, rng: np.random.Generator) -> None:
    """A gradient with a texture, clutter, and the person's neck and shoulders."""
    corners = 10 + 235 * rng.random((2, 2, 1)) + 25 * rng.standard_normal((2, 2, 3))
    coarse = cv2.resize(corners, (16, 16), interpolation=cv2.INTER_LINEAR)
    coarse += 40 * rng.random() * rng.standard_normal((16, 16, 1))
    side = (canvas.side, canvas.side)
    cv2.resize(np.clip(coarse, 0, 255).astype(np.uint8), side, canvas.colour, interpolation=cv2.INTER_CUBIC)
    for _ in range(int(7 * rng.random())):
        angle, centre, half = np.pi * rng.random(), rng.random(2), 0.02 + 0.28 * rng.random(2)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        canvas.fill(centre + ((_CIRCLE if rng.random() < 0.4 else _BOX) * half) @ turn, _paint(rng))
    person, how = canvas.person, canvas.placed.conditions
    sin, cos = how.scale * np.sin(0.4 * how.roll), how.scale * np.cos(0.4 * how.roll)
    upright = np.array([[cos, sin], [-sin, cos]])
    chin = how.centre + 0.75 * upright[1]
    canvas.fill(chin + _SHOULDERS @ upright, person.shirt)
    canvas.fill(chin + _NECK @ upright, mix(person.skin, _DARK, 0.28))


_SHOULDERS = np.array([[-0.42, 0.25], [-1.3, 0.55], [-1.5, 2.0], [1.5, 2.0], [1.3, 0.55], [0.42, 0.25]])
_NECK = np.array([[-0.45, -0.5], [-0.42, 0.4], [0.0, 0.62], [0.42, 0.4], [0.45, -0.5]])


def _head(canvas: _Canvas) -> None:
    """Hair, ears and the bare skin of the face."""
    person, placed = canvas.person, canvas.placed
    bald = person.hair == "bald"
    skull = cv2.convexHull(placed.skull.astype(np.float32))[:, 0]
    canvas.fill(skull, person.skin if bald else person.hair_colour, 0.0, solid=True)
    if not bald:
        canvas.line(placed.strands[::2], mix(person.hair_colour, _DARK, 0.18), 0.05)
        canvas.line(placed.strands[1::2], mix(person.hair_colour, (255, 240, 220), 0.14), 0.05)
    if person.hair != "long":
        for ear in placed.ears:
            canvas.fill(canvas.ellipse(ear, 0.1, 0.19), mix(person.skin, _DARK, 0.06), 0.0, solid=True)
            canvas.fill(canvas.ellipse(ear, 0.05, 0.11), mix(person.skin, _DARK, 0.25))
    canvas.fill(canvas.skin, person.skin, 0.0 if bald else -0.05, solid=True)
    for spot, (_, _, radius) in zip(placed.freckles, person.freckles, strict=True):
        canvas.fill(canvas.ellipse(spot, radius, radius), mix(person.skin, _DARK, 0.3))


_BRIDGE = _Path((27, -0.05, 0), (27, 0.05, 0), (30, 0.09, 0), (30, -0.09, 0))
_BUMPS = _Path((51, 57, 0.5, 0, 0), (8, 0, -0.15), (31, 0.05, -0.03), (35, -0.05, -0.03), (30, 0, 0.02))


def _relief(canvas: _Canvas) -> None:
    """Heights: broad ones first (sockets, cheeks, brow ridge, muzzle, chin), smoothed, then the nose."""
    face = canvas.placed.landmarks
    cheeks = 0.05 + 0.04 * _pull(canvas, 6, 12)
    muzzle, chin, left_wing, right_wing, tip = canvas.along(_BUMPS)
    for first, corner, outer, cheek in ((36, 48, 36, cheeks[0]), (42, 54, 45, cheeks[1])):
        canvas.raise_to(canvas.ellipse(0.5 * (face[first] + face[first + 3]), 0.25, 0.17), -0.13)
        canvas.raise_to(canvas.ellipse(0.45 * face[corner] + 0.55 * face[outer], 0.17, 0.17), float(cheek))
    canvas.raise_to(canvas.stroke(face[17:22], 0.1), 0.03)
    canvas.raise_to(canvas.stroke(face[22:27], 0.1), 0.03)
    canvas.raise_to(canvas.ellipse(muzzle, 0.3, 0.22), 0.02)
    canvas.raise_to(canvas.ellipse(chin, 0.17, 0.12), 0.04)
    cv2.GaussianBlur(canvas.height, (0, 0), 0.09 * canvas.unit, canvas.height)
    canvas.raise_to(canvas.along(_BRIDGE), 0.12)
    canvas.raise_to(canvas.ellipse(left_wing, 0.075, 0.07), 0.1)
    canvas.raise_to(canvas.ellipse(right_wing, 0.075, 0.07), 0.1)
    canvas.raise_to(canvas.ellipse(tip, 0.095, 0.09), 0.2)


def _pull(canvas: _Canvas, *units: int) -> Array:
    """(2,) summed activation of action units on the left and the right half."""
    total: Array = canvas.placed.activation[:, [AUS.index(u) for u in units]].sum(1)
    return total


# Folds of the right half: path, strength from age, from action units, and bias. Drawn on both halves.
_FOLDS: tuple[tuple[_Path, float, dict[int, float], float], ...] = (
    *(  # across the forehead
        (_Path((22, 76, t, 0, 0), (23, 75, t, 0, 0), (25, 72, t, 0, 0)), 0.3, {1: 0.35, 2: 0.35}, 0.2 - 0.4 * t)
        for t in (0.35, 0.55, 0.75)
    ),
    (_Path((22, -0.05, -0.06), (22, -0.06, 0.02), (22, -0.045, 0.09)), 0.2, {4: 0.9, 9: 0.3}, -0.15),  # frown
    *((_Path((27, 0, y), (27, 0.05, y), (27, 0.08, y + 0.02)), 0.0, {9: 0.9}, 0.0) for y in (0.0, 0.06)),  # nose root
    (_Path((35, 0.04, -0.03), (35, 54, 0.5, 0.11, -0.025), (54, 0.08, 0.02)), 0.35, {9: 0.5, 10: 0.5, 12: 0.55}, 0.0),
    *(  # crow's feet
        (_Path((45, 0.04, y), (45, 0.09, 2 * y), (45, 0.14, 4 * y)), 0.3, {6: 0.7}, -0.2) for y in (-0.02, 0.0, 0.02)
    ),
    (_Path((46, 0.09, 0.05), (46, 0, 0.075), (46, -0.1, 0.065)), 0.4, {6: 0.4}, -0.1),  # bag under the eye
    (_Path((54, 0.03, -0.05), (54, 0.055, 0), (54, 0.03, 0.05)), 0.0, {14: 0.8}, 0.0),  # dimple
    (_Path((54, 0.03, 0.03), (54, 0.05, 0.09), (54, 0.04, 0.15)), 0.3, {15: 0.6}, -0.1),  # below the mouth corner
    (_Path((57, 0, 0.075), (57, 0.06, 0.08), (57, 0.1, 0.1)), 0.0, {17: 0.5}, 0.2),  # above the chin
)
_FOLD_PATHS = [[path.mirrored() for path, *_ in _FOLDS], [path for path, *_ in _FOLDS]]
_FOLD_AGE, _FOLD_BIAS = (np.array([fold[i] for fold in _FOLDS]) for i in (1, 3))
_FOLD_UNITS = np.array([[units[a] if a in units else 0.0 for _, _, units, _ in _FOLDS] for a in AUS])


def _wrinkles(canvas: _Canvas) -> None:
    """Folds that come with age and with the action units."""
    skin, outline = canvas.person.skin, canvas.skin
    strengths = canvas.person.age * _FOLD_AGE + canvas.placed.activation @ _FOLD_UNITS + _FOLD_BIAS
    for half, fold in np.argwhere(strengths > 0.12):
        curve, strength = _CURVE[3] @ canvas.along(_FOLD_PATHS[half][fold]), min(1.2, float(strengths[half, fold]))
        if cv2.pointPolygonTest(outline, curve[0].tolist(), False) > 0 < cv2.pointPolygonTest(outline, curve[-1].tolist(), False):
            canvas.line(curve, mix(skin, _DARK, 0.45 * strength), 0.024, -0.07 * strength)


_LIP = ((35, 0.03, 0.1), (33, 0, 0.07), (31, -0.03, 0.1))
_BEARDS = {
    "full": _Path(*((i, 0, 0) for i in range(1, 16)), (54, 0.2, -0.1), *_LIP, (48, -0.2, -0.1)),
    "goatee": _Path(*((i, 0, 0) for i in range(6, 11)), (54, 0.07, 0.02), *_LIP, (48, -0.07, 0.02)),
    "moustache": _Path(*_LIP, (48, -0.03, 0.05), (51, 0, 0), (54, 0.03, 0.05)),
}
_BEARDS["stubble"] = _BEARDS["full"]


def _beard(canvas: _Canvas) -> None:
    """Beard and moustache, under the mouth."""
    person = canvas.person
    if person.beard != "none":
        share = 0.22 if person.beard == "stubble" else 0.9
        canvas.fill(canvas.along(_BEARDS[person.beard]), mix(person.skin, person.beard_colour, share))


_NOSE_BASE = _Path(*((i, 0, 0.012) for i in range(31, 36)))
_WING = _Path((35, 0, -0.09), (35, 0.035, -0.04), (35, 0.005, 0.01))
_NOSTRILS = _Path((32, -0.012, -0.012), (34, 0.012, -0.012))


def _nose(canvas: _Canvas) -> None:
    """Nostrils and the wings' lower edge; the rest of the nose is relief."""
    shade = mix(canvas.person.skin, _DARK, 0.3)
    canvas.line(_CURVE[5] @ canvas.along(_NOSE_BASE), shade, 0.025)
    for wing in (_WING, _WING_LEFT):
        canvas.line(_CURVE[3] @ canvas.along(wing), shade, 0.02)
    for nostril in canvas.along(_NOSTRILS):
        canvas.fill(canvas.ellipse(nostril, 0.042, 0.022), mix(canvas.person.skin, _DARK, 0.72))


_WING_LEFT = _WING.mirrored()


def _mouth(canvas: _Canvas) -> None:
    """Lips, and between them the cavity with teeth and tongue."""
    face, person, depth = canvas.placed.landmarks, canvas.person, canvas.placed.depth
    top, bottom = _CURVE[7] @ face[48:55], _CURVE[7] @ face[[48, 59, 58, 57, 56, 55, 54]]
    upper, lower = _CURVE[5] @ face[60:65], _CURVE[5] @ face[[60, 67, 66, 65, 64]]
    canvas.fill(np.concatenate([top, bottom[::-1]]), person.lips, 0.06)
    canvas.fill(np.concatenate([top, upper[::-1]]), mix(person.lips, _DARK, 0.2))
    gap = depth[66, 1] - depth[62, 1]
    if gap > 0.03:
        canvas.fill(np.concatenate([upper, lower[::-1]]), (58, 18, 22), -0.03)
        shown = float(np.clip((person.neutral[62, 1] + 0.035 - depth[62, 1]) / gap, 0, 0.85))
        canvas.fill(np.concatenate([upper, (upper + shown * (lower - upper))[::-1]]), (236, 230, 220))
        if gap > 0.14:
            tongue = (upper + 0.72 * (lower - upper))[3:-3]
            canvas.fill(np.concatenate([tongue, lower[3:-3][::-1]]), (186, 86, 92))
    else:
        canvas.line(np.concatenate([top[:1], upper, top[-1:]]), mix(person.lips, _DARK, 0.75), 0.02)


_CREASE = _Path((42, 0, 0), (43, 0, -0.065), (44, 0, -0.065), (45, 0, 0))
_CREASE_LEFT = _Path((36, 0, 0), (37, 0, -0.065), (38, 0, -0.065), (39, 0, 0))


def _eyes(canvas: _Canvas) -> None:
    """Lids, whites, irises and lashes."""
    skin, face = canvas.person.skin, canvas.placed.landmarks
    rings = (canvas.person.iris, canvas.person.iris_colour), (0.45 * canvas.person.iris, (14, 12, 12))
    for first, iris, path in zip((36, 42), canvas.placed.irises, (_CREASE_LEFT, _CREASE), strict=True):
        upper = _CURVE[4] @ face[first : first + 4]
        lower = _CURVE[4] @ face[[first, first + 5, first + 4, first + 3]]
        crease = _CURVE[4] @ canvas.along(path)
        outline = np.concatenate([upper, lower[::-1]])
        canvas.fill(np.concatenate([crease, lower[::-1]]), mix(skin, _DARK, 0.16), -0.06)
        canvas.fill(outline, (238, 236, 232))
        opening = cv2.convexHull((outline * canvas.side).astype(np.float32))
        for radius, colour in rings:
            disc = (canvas.ellipse(iris, radius, radius) * canvas.side).astype(np.float32)
            _, seen = cv2.intersectConvexConvex(opening, disc)
            if seen is not None:
                canvas.fill(seen[:, 0] / canvas.side, colour)
        canvas.fill(canvas.ellipse(iris - 0.03 * canvas.placed.axes.sum(0), 0.022, 0.022), _WHITE)
        canvas.line(lower, mix(skin, _DARK, 0.45), 0.014)
        canvas.line(crease, mix(skin, _DARK, 0.35), 0.012)
        canvas.line(upper, mix(skin, _DARK, 0.95), 0.034)


_T = np.linspace(0, 1, 17)


def _fringe(canvas: _Canvas) -> None:
    """Hair that falls over the forehead."""
    locks, hair = canvas.person.locks, canvas.person.hair
    if hair == "fringe":
        fall = 0.26 * np.sin(np.pi * _T) ** 0.4 * (0.8 + 0.4 * locks)
    elif hair == "side":
        fall = 0.36 * np.sin(np.pi * _T) ** 0.6 * (_T if locks[0] < 0.5 else 1 - _T) * (0.9 + 0.2 * locks)
    elif hair == "long":
        fall = 0.12 * np.abs(np.cos(np.pi * _T)) ** 0.5 * np.sin(np.pi * _T) ** 0.3
    else:
        return
    edge = canvas.placed.hairline + np.outer(fall, canvas.placed.axes[1])
    canvas.fill(np.concatenate([canvas.placed.hairline, edge[::-1]]), canvas.person.hair_colour, 0.03)


_NOSE_PIECE = _Path((39, 0.06, -0.02), (42, -0.06, -0.02))
_TEMPLES = _Path((36, -0.07, -0.03), (45, 0.07, -0.03))


def _glasses(canvas: _Canvas) -> None:
    face, locks = canvas.placed.landmarks, canvas.person.locks
    colour = mix((24, 24, 28), (150, 60, 50), float(locks[1]) if locks[2] < 0.4 else 0.0)
    lens = (_CIRCLE if locks[3] < 0.5 else _BOX) * (0.245, 0.2) + (0, 0.02)
    for first in (36, 42):
        outline = 0.5 * (face[first] + face[first + 3]) + lens @ canvas.placed.axes
        canvas.line(np.concatenate([outline, outline[:1]]), colour, 0.035)
    canvas.line(canvas.along(_NOSE_PIECE), colour, 0.035)
    for temple in zip(canvas.along(_TEMPLES), canvas.placed.ears, strict=True):
        canvas.line(np.stack(temple), colour, 0.03)


_MASK = _Path(
    *((i, 0, 0) for i in range(2, 15)),
    *((14, -0.02, -0.12), (28, 0.12, 0.06), (28, 0, 0), (28, -0.12, 0.06), (2, 0.02, -0.12)),
)
_PLEATS = [_Path((3, 0.1, y - 0.1), (33, 0, y), (13, -0.1, y - 0.1)) for y in (0.12, 0.3)]
_FINGERS = [np.array([-0.25 + 0.165 * i, n / 2]) + _CIRCLE * (0.088, n / 2) for i, n in enumerate((0.5, 0.6, 0.57, 0.42))]


def _occluder(canvas: _Canvas, rng: np.random.Generator) -> None:
    """A mask, a hand or an object before the face."""
    face, kind, scale = canvas.placed.landmarks, canvas.placed.conditions.occluder, canvas.placed.conditions.scale
    if kind == "mask":
        colour = _paint(rng)
        canvas.fill(canvas.along(_MASK), colour, 0.08)
        for pleat in _PLEATS:
            canvas.line(_CURVE[3] @ canvas.along(pleat), mix(colour, _DARK, 0.3), 0.02)
    elif kind == "hand":
        skin = mix(canvas.person.skin, _DARK, 0.05)
        palm, goal = face[rng.choice([3, 5, 8, 11, 13])], face[rng.choice([30, 33, 36, 45, 48, 54])]
        along = (goal - palm) / np.linalg.norm(goal - palm)
        frame = np.array([[-along[1], along[0]], along]) * scale
        canvas.fill(palm + (_CIRCLE * (0.34, 0.4)) @ frame - 0.25 * frame[1], skin, 0.2, solid=True)
        for finger in _FINGERS:
            outline = palm + finger @ frame
            canvas.fill(outline, skin, 0.22, solid=True)
            canvas.line(np.concatenate([outline, outline[:1]]), mix(skin, _DARK, 0.35), 0.02)
    elif kind == "object":
        colour, angle, half = _paint(rng), np.pi * rng.random(), rng.uniform((0.08, 0.2), (0.24, 0.6))
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) * scale
        centre, outline = face[rng.integers(0, 68)], (_BOX * half) @ turn
        canvas.fill(centre + outline, colour, 0.2, solid=True)
        canvas.fill(centre + 0.6 * outline, mix(colour, _WHITE, 0.3))


def _light(canvas: _Canvas) -> Array:
    """(S, S) brightness: Lambert's law on an ellipsoid with the relief's slopes, and a cast shadow."""
    how, side = canvas.placed.conditions, canvas.side
    relief = cv2.GaussianBlur(canvas.height, (0, 0), max(0.5, 0.035 * canvas.unit))
    slope_x = cv2.Sobel(relief, cv2.CV_32F, 1, 0, scale=canvas.unit / 8)
    slope_y = cv2.Sobel(relief, cv2.CV_32F, 0, 1, scale=canvas.unit / 8)
    grid = (np.arange(side, dtype=np.float32) + 0.5) / side
    x, y = ((grid - c) / how.scale for c in how.centre.astype(np.float32))
    x, y = x[None, :], y[:, None]
    cos, sin = np.float32(np.cos(how.roll)), np.float32(np.sin(how.roll))
    u, v = (cos * x + sin * y) / 0.95, (cos * y - sin * x) / 1.3
    depth = np.sqrt(np.maximum(np.float32(0.1), 1 - u * u - v * v))
    nx, ny = u * cos - v * sin - slope_x, u * sin + v * cos - slope_y
    lx, ly, lz = (float(c) for c in how.light)
    lambert = np.maximum(np.float32(0), (nx * lx + ny * ly + depth * lz) / np.sqrt(nx * nx + ny * ny + depth * depth))
    direct = 1.35 * (1 - how.ambient)
    flat = how.ambient + direct * lz
    shade = flat + canvas.solid * (direct / 255) * (lambert - lz)
    angle, offset, deep = how.shadow
    if deep > 0:
        across = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)) - np.float32(offset)
        shade *= 1 - deep * np.clip(0.5 + 4 * across, 0, 1)
    out: Array = shade
    return out


def _photograph(canvas: _Canvas, shade: Array, channels: int, rng: np.random.Generator) -> Array:
    """Exposure, colour of the light, blur, gamma and sensor noise."""
    how = canvas.placed.conditions
    if channels == 1:
        lit = cv2.cvtColor(canvas.colour, cv2.COLOR_RGB2GRAY) * (shade * how.exposure)
    else:
        lit = canvas.colour * (shade[..., None] * (how.exposure * how.tint).astype(np.float32))
    if how.blur * canvas.side > 0.2:
        lit = cv2.GaussianBlur(lit, (0, 0), how.blur * canvas.side)
    levels = (255 * (np.arange(256) / 255) ** how.gamma).astype(np.float32)
    toned = cv2.LUT(np.minimum(lit, 255).astype(np.uint8), levels)
    toned += rng.standard_normal(toned.shape, np.float32) * np.float32(how.noise)
    image: Array = np.clip(toned + 0.5, 0, 255).astype(np.uint8)
    return image
