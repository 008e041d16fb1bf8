"""Paint a synthetic person part by part: colours and, for the clay look, heights.

Everything is placed relative to the posed landmarks (iBUG numbers), in face units along the face's own axes.
"""

import copy

import cv2
import numpy as np

from fer.data.identities import AUS, MIRROR_68, Array, Colour, mix
from fer.data.posing import Geometry, spline

_SUBPIXEL = 4  # bits of sub-pixel precision of cv2's polygons
DARK: Colour = (46, 26, 24)
WHITE: Colour = (255, 255, 255)
_TURN = np.linspace(0, 2 * np.pi, 24, endpoint=False)
CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)
BOX = np.sign(CIRCLE) * np.abs(CIRCLE) ** 0.4  # a square with round corners
CURVE = {n: spline(n, 4 * n - 3) for n in (3, 4, 5, 7)}
_TAPER = np.sin(np.linspace(0.25, np.pi - 0.12, 17))[:, None] / 2


class Path:
    """Places given as ``(landmark, right, down)`` or ``(landmark, landmark, share, right, down)``, face units.

    Numbers from 68 to 84 are the hairline.
    """

    def __init__(self, *places: tuple[float, ...]) -> None:
        full = np.array([p if len(p) == 5 else (p[0], p[0], 0, p[1], p[2]) for p in places], np.float64)
        self.first, self.second = full[:, 0].astype(int), full[:, 1].astype(int)
        self.share, self.offset = full[:, 2:3], full[:, 3:]

    def mirrored(self) -> "Path":
        """The same path on the other half of the face."""
        mirror = np.concatenate([MIRROR_68, np.arange(84, 67, -1)])
        other = copy.copy(self)
        other.first, other.second, other.offset = mirror[self.first], mirror[self.second], self.offset * (-1, 1)
        return other


class Canvas:
    """Colours (S, S, 3) and heights (S, S), face units, painted together; ``solid`` is what has a relief."""

    def __init__(self, side: int, placed: Geometry) -> None:
        self.side, self.placed, self.person = side, placed, placed.person
        self.colour: Array = np.empty((side, side, 3), np.uint8)
        self.height: Array = np.zeros((side, side), np.float32)
        self.solid: Array = np.zeros((side, side), np.uint8)
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

    def along(self, path: Path) -> Array:
        """(n, 2) image places of a path."""
        first = self.marks[path.first]
        places: Array = first + path.share * (self.marks[path.second] - first) + path.offset @ self.placed.axes
        return places

    def ellipse(self, centre: Array, right: float, down: float) -> Array:
        """Outline of an ellipse with half axes in face units, in the plane of the face."""
        outline: Array = centre + (CIRCLE * (right, down)) @ self.placed.axes
        return outline

    def stroke(self, points: Array, thickness: float) -> Array:
        """Outline of a brush stroke through five points, ``thickness`` face units, tapered at its ends."""
        middle, half = CURVE[5] @ points, _TAPER * (thickness * self.placed.axes[1])
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
        fixed = list(self.fixed(points.reshape(-1, *points.shape[-2:])))
        thick = max(1, round(width * self.unit))
        cv2.polylines(self.colour, fixed, False, colour, thick, cv2.LINE_AA, _SUBPIXEL)
        if depth is not None:
            cv2.polylines(self.height, fixed, False, depth, 2 * thick, cv2.LINE_8, _SUBPIXEL)


def paint_person(canvas: Canvas) -> None:
    """Paint head, face, hair and glasses onto the background."""
    _head(canvas)
    _relief(canvas)
    _wrinkles(canvas)
    _beard(canvas)
    _nose(canvas)
    _mouth(canvas)
    _eyes(canvas)
    for brow in (canvas.placed.landmarks[21:16:-1], canvas.placed.landmarks[22:27]):
        canvas.fill(canvas.stroke(brow, 1.4 * canvas.person.brow), canvas.person.brow_colour)
    _fringe(canvas)
    if canvas.person.glasses:
        _glasses(canvas)


def _head(canvas: Canvas) -> None:
    """Hair, ears and the bare skin of the face."""
    person, placed = canvas.person, canvas.placed
    bald = person.hair == "bald"
    skull = cv2.convexHull(placed.skull.astype(np.float32))[:, 0]
    canvas.fill(skull, person.skin if bald else person.hair_colour, 0.0, solid=True)
    if not bald:
        canvas.line(placed.strands[::2], mix(person.hair_colour, DARK, 0.18), 0.05)
        canvas.line(placed.strands[1::2], mix(person.hair_colour, (255, 240, 220), 0.14), 0.05)
    if person.hair != "long":
        for ear in placed.ears:
            canvas.fill(canvas.ellipse(ear, 0.1, 0.19), mix(person.skin, DARK, 0.06), 0.0, solid=True)
            canvas.fill(canvas.ellipse(ear, 0.05, 0.11), mix(person.skin, DARK, 0.25))
    canvas.fill(canvas.skin, person.skin, 0.0 if bald else -0.05, solid=True)
    for spot, (_, _, radius) in zip(placed.freckles, person.freckles, strict=True):
        if radius * canvas.unit > 0.4:
            canvas.fill(canvas.ellipse(spot, radius, radius), mix(person.skin, DARK, 0.3))


_BRIDGE = Path((27, -0.05, 0), (27, 0.05, 0), (30, 0.09, 0), (30, -0.09, 0))
_BUMPS = Path((51, 57, 0.5, 0, 0), (8, 0, -0.15), (31, 0.05, -0.03), (35, -0.05, -0.03), (30, 0, 0.02))


def _relief(canvas: Canvas) -> None:
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


def _pull(canvas: Canvas, *units: int) -> Array:
    """(2,) summed activation of action units on the left and the right half."""
    total: Array = canvas.placed.activation[:, [AUS.index(u) for u in units]].sum(1)
    return total


# Folds of the right half: path, strength from age, from action units, and bias. Drawn on both halves.
_FOLDS: tuple[tuple[Path, float, dict[int, float], float], ...] = (
    *(  # across the forehead
        (Path((22, 76, t, 0, 0), (23, 75, t, 0, 0), (25, 72, t, 0, 0)), 0.3, {1: 0.35, 2: 0.35}, 0.2 - 0.4 * t)
        for t in (0.35, 0.55, 0.75)
    ),
    (Path((22, -0.05, -0.06), (22, -0.06, 0.02), (22, -0.045, 0.09)), 0.2, {4: 0.9, 9: 0.3}, -0.15),  # frown
    *((Path((27, 0, y), (27, 0.05, y), (27, 0.08, y + 0.02)), 0.0, {9: 0.9}, 0.0) for y in (0.0, 0.06)),  # nose root
    (Path((35, 0.04, -0.03), (35, 54, 0.5, 0.11, -0.025), (54, 0.08, 0.02)), 0.35, {9: 0.5, 10: 0.5, 12: 0.55}, 0.0),
    *(  # crow's feet
        (Path((45, 0.04, y), (45, 0.09, 2 * y), (45, 0.14, 4 * y)), 0.3, {6: 0.7}, -0.2) for y in (-0.02, 0.0, 0.02)
    ),
    (Path((46, 0.09, 0.05), (46, 0, 0.075), (46, -0.1, 0.065)), 0.4, {6: 0.4}, -0.1),  # bag under the eye
    (Path((54, 0.03, -0.05), (54, 0.055, 0), (54, 0.03, 0.05)), 0.0, {14: 0.8}, 0.0),  # dimple
    (Path((54, 0.03, 0.03), (54, 0.05, 0.09), (54, 0.04, 0.15)), 0.3, {15: 0.6}, -0.1),  # below the mouth corner
    (Path((57, 0, 0.075), (57, 0.06, 0.08), (57, 0.1, 0.1)), 0.0, {17: 0.5}, 0.2),  # above the chin
)
_FOLD_PATHS = [[path.mirrored() for path, *_ in _FOLDS], [path for path, *_ in _FOLDS]]
_FOLD_AGE, _FOLD_BIAS = (np.array([fold[i] for fold in _FOLDS]) for i in (1, 3))
_FOLD_UNITS = np.array([[(a in units) and units[a] for _, _, units, _ in _FOLDS] for a in AUS], np.float64)


def _wrinkles(canvas: Canvas) -> None:
    """Folds that come with age and with the action units."""
    skin, outline = canvas.person.skin, canvas.skin
    strengths = canvas.person.age * _FOLD_AGE + canvas.placed.activation @ _FOLD_UNITS + _FOLD_BIAS
    for half, fold in np.argwhere(strengths > 0.12):
        curve, strength = CURVE[3] @ canvas.along(_FOLD_PATHS[half][fold]), min(1.2, float(strengths[half, fold]))
        if all(cv2.pointPolygonTest(outline, end, False) > 0 for end in curve[[0, -1]].tolist()):
            canvas.line(curve, mix(skin, DARK, 0.45 * strength), 0.024, -0.07 * strength)


_LIP = ((35, 0.03, 0.1), (33, 0, 0.07), (31, -0.03, 0.1))
_BEARDS = {
    "full": Path(*((i, 0, 0) for i in range(1, 16)), (54, 0.2, -0.1), *_LIP, (48, -0.2, -0.1)),
    "goatee": Path(*((i, 0, 0) for i in range(6, 11)), (54, 0.07, 0.02), *_LIP, (48, -0.07, 0.02)),
    "moustache": Path(*_LIP, (48, -0.03, 0.05), (51, 0, 0), (54, 0.03, 0.05)),
}
_BEARDS["stubble"] = _BEARDS["full"]


def _beard(canvas: Canvas) -> None:
    """Beard and moustache, under the mouth."""
    person = canvas.person
    if person.beard != "none":
        share = 0.22 if person.beard == "stubble" else 0.9
        canvas.fill(canvas.along(_BEARDS[person.beard]), mix(person.skin, person.beard_colour, share))


_NOSE_BASE = Path(*((i, 0, 0.012) for i in range(31, 36)))
_WING = Path((35, 0, -0.09), (35, 0.035, -0.04), (35, 0.005, 0.01))
_NOSTRILS = Path((32, -0.012, -0.012), (34, 0.012, -0.012))


def _nose(canvas: Canvas) -> None:
    """Nostrils and the wings' lower edge; the rest of the nose is relief."""
    shade = mix(canvas.person.skin, DARK, 0.3)
    canvas.line(CURVE[5] @ canvas.along(_NOSE_BASE), shade, 0.025)
    for wing in (_WING, _WING_LEFT):
        canvas.line(CURVE[3] @ canvas.along(wing), shade, 0.02)
    for nostril in canvas.along(_NOSTRILS):
        canvas.fill(canvas.ellipse(nostril, 0.042, 0.022), mix(canvas.person.skin, DARK, 0.72))


_WING_LEFT = _WING.mirrored()


def _mouth(canvas: Canvas) -> None:
    """Lips, and between them the cavity with teeth and tongue."""
    face, person, depth = canvas.placed.landmarks, canvas.person, canvas.placed.depth
    top, bottom = CURVE[7] @ face[48:55], CURVE[7] @ face[[48, 59, 58, 57, 56, 55, 54]]
    upper, lower = CURVE[5] @ face[60:65], CURVE[5] @ face[[60, 67, 66, 65, 64]]
    canvas.fill(np.concatenate([top, bottom[::-1]]), person.lips, 0.06)
    canvas.fill(np.concatenate([top, upper[::-1]]), mix(person.lips, DARK, 0.2))
    gap = depth[66, 1] - depth[62, 1]
    if gap > 0.03:
        canvas.fill(np.concatenate([upper, lower[::-1]]), (58, 18, 22), -0.03)
        shown = float(np.clip((person.neutral[62, 1] + 0.035 - depth[62, 1]) / gap, 0, 0.85))
        canvas.fill(np.concatenate([upper, (upper + shown * (lower - upper))[::-1]]), (236, 230, 220))
        if gap > 0.14:
            tongue = (upper + 0.72 * (lower - upper))[3:-3]
            canvas.fill(np.concatenate([tongue, lower[3:-3][::-1]]), (186, 86, 92))
    else:
        canvas.line(np.concatenate([top[:1], upper, top[-1:]]), mix(person.lips, DARK, 0.75), 0.02)


_CREASE = Path((42, 0, 0), (43, 0, -0.065), (44, 0, -0.065), (45, 0, 0))
_CREASE_LEFT = Path((36, 0, 0), (37, 0, -0.065), (38, 0, -0.065), (39, 0, 0))


def _eyes(canvas: Canvas) -> None:
    """Lids, whites, irises and lashes."""
    skin, face = canvas.person.skin, canvas.placed.landmarks
    rings = (canvas.person.iris, canvas.person.iris_colour), (0.45 * canvas.person.iris, (14, 12, 12))
    for first, iris, path in zip((36, 42), canvas.placed.irises, (_CREASE_LEFT, _CREASE), strict=True):
        upper = CURVE[4] @ face[first : first + 4]
        lower = CURVE[4] @ face[[first, first + 5, first + 4, first + 3]]
        crease = CURVE[4] @ canvas.along(path)
        outline = np.concatenate([upper, lower[::-1]])
        canvas.fill(np.concatenate([crease, lower[::-1]]), mix(skin, DARK, 0.16), -0.06)
        canvas.fill(outline, (238, 236, 232))
        opening = cv2.convexHull((outline * canvas.side).astype(np.float32))
        for radius, colour in rings:
            disc = (canvas.ellipse(iris, radius, radius) * canvas.side).astype(np.float32)
            _, seen = cv2.intersectConvexConvex(opening, disc)
            if seen is not None:
                canvas.fill(seen[:, 0] / canvas.side, colour)
        canvas.fill(canvas.ellipse(iris - 0.03 * canvas.placed.axes.sum(0), 0.022, 0.022), WHITE)
        canvas.line(lower, mix(skin, DARK, 0.45), 0.014)
        canvas.line(crease, mix(skin, DARK, 0.35), 0.012)
        canvas.line(upper, mix(skin, DARK, 0.95), 0.034)


_T = np.linspace(0, 1, 17)


def _fringe(canvas: Canvas) -> None:
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


_NOSE_PIECE = Path((39, 0.06, -0.02), (42, -0.06, -0.02))
_TEMPLES = Path((36, -0.07, -0.03), (45, 0.07, -0.03))


def _glasses(canvas: Canvas) -> None:
    face, locks = canvas.placed.landmarks, canvas.person.locks
    colour = mix((24, 24, 28), (150, 60, 50), float(locks[1]) if locks[2] < 0.4 else 0.0)
    lens = (CIRCLE if locks[3] < 0.5 else BOX) * (0.245, 0.2) + (0, 0.02)
    for first in (36, 42):
        outline = 0.5 * (face[first] + face[first + 3]) + lens @ canvas.placed.axes
        canvas.line(np.concatenate([outline, outline[:1]]), colour, 0.035)
    canvas.line(canvas.along(_NOSE_PIECE), colour, 0.035)
    for temple in zip(canvas.along(_TEMPLES), canvas.placed.ears, strict=True):
        canvas.line(np.stack(temple), colour, 0.03)
