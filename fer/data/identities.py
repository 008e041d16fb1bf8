"""Who the synthetic faces are and what they do: identities as 3-D landmark models, action units as their blendshapes.

Face units: x to the right of the image, y down, z towards the viewer; the head is about 1.5 wide, the chin at y = 1.
Landmarks are numbered as in iBUG 300-W (Sagonas et al. 2016), "left" is left as seen in the image. Action units are
those of Ekman & Friesen's Facial Action Coding System (1978), their combinations follow EMFACS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fer.data.manifest import MIRROR

Array = np.ndarray[Any, Any]
Colour = tuple[int, int, int]

PERSON, PICTURE, PAINT, SENSOR, PLAN, SCENE, BACKDROP = range(7)  # kinds of random streams

MIRROR_68 = np.array(MIRROR[68])
_RIGHT = (*range(9, 17), *range(22, 27), 34, 35, *range(42, 48), *range(52, 57), *range(63, 66))
SIDE = np.zeros(68)  # -1 left, +1 right, 0 on the midline
SIDE[[*_RIGHT]] = 1
SIDE[MIRROR_68[[*_RIGHT]]] = -1

# What each action unit at full strength moves, on the right half and the midline; the left half mirrors it:
# (landmarks, outwards, down) in face units.
_Moves = tuple[tuple[tuple[int, ...], float, float], ...]
_ACTION_UNITS: dict[int, _Moves] = {
    1: (((22,), 0.01, -0.16), ((23,), 0.01, -0.12), ((24,), 0, -0.05), ((43,), 0, -0.01)),
    2: (((23,), 0, -0.07), ((24,), 0, -0.13), ((25,), 0, -0.15), ((26,), 0, -0.11)),
    4: (((22,), -0.06, 0.12), ((23,), -0.05, 0.09), ((24,), -0.03, 0.05), ((25,), -0.01, 0.02), ((43,), 0, 0.015)),
    5: (((43, 44), 0, -0.055), ((46, 47), 0, 0.012)),
    6: (((46, 47), 0, -0.04), ((45,), 0.01, 0.01), ((44,), 0, 0.015), ((25, 26), 0, 0.015)),
    7: (((46, 47), 0, -0.035), ((43, 44), 0, 0.03)),
    9: (
        *(((22, 23), -0.02, 0.05), ((35,), 0.03, -0.05), ((34,), 0.01, -0.04), ((33, 30), 0, -0.03)),
        *(((51, 52, 62, 63), 0, -0.05), ((46, 47), 0, -0.025), ((43, 44), 0, 0.015)),
    ),
    10: (((51, 52), 0, -0.08), ((53,), 0.01, -0.08), ((62, 63), 0, -0.06), ((35,), 0.02, -0.025), ((54,), 0, -0.02)),
    12: (
        *(((54, 64), 0.12, -0.12), ((53,), 0.07, -0.06), ((55,), 0.07, -0.045), ((63,), 0.04, -0.03)),
        *(((65,), 0.04, -0.015), ((52,), 0.01, 0.01), ((56,), 0.02, 0.0), ((35,), 0.02, -0.01)),
    ),
    14: (((54, 64), 0.06, -0.04), ((53, 55), 0.03, -0.02)),
    15: (
        *(((54, 64), 0.0, 0.13), ((53,), 0.0, 0.05), ((55,), 0.0, 0.08), ((63,), 0, 0.03)),
        *(((65,), 0, 0.04), ((52,), 0, 0.01), ((56,), 0, 0.02)),
    ),
    17: (((55, 56, 57, 65, 66), 0, -0.045), ((51, 52, 62, 63), 0, -0.025), ((8, 9), 0, -0.03)),
    20: (
        *(((54, 64), 0.12, 0.035), ((53,), 0.07, 0.015), ((55,), 0.07, 0.025), ((63, 65), 0.04, 0.01)),
        *(((52, 56), 0.02, 0.0), ((51,), 0, 0.01), ((57,), 0, -0.005)),
    ),
    23: (
        *(((54, 64), -0.045, 0.0), ((53, 55, 63, 65), -0.02, 0.0)),
        *(((51, 52), 0, 0.03), ((53,), 0, 0.02), ((56, 57), 0, -0.035), ((55,), 0, -0.02)),
    ),
    24: (((51, 52), 0, 0.03), ((53,), 0, 0.02), ((56, 57), 0, -0.03), ((55,), 0, -0.02), ((8,), 0, -0.015)),
    25: (
        *(((62, 63), 0, -0.03), ((51, 52), 0, -0.025), ((53,), 0, -0.015)),
        *(((65, 66), 0, 0.06), ((56, 57), 0, 0.05), ((55,), 0, 0.035)),
    ),
    26: (
        *(((65, 66), 0, 0.12), ((56, 57), 0, 0.12), ((55,), -0.01, 0.09), ((54, 64), -0.015, 0.05)),
        *(((53,), -0.01, 0.01), ((8,), 0, 0.13), ((9,), 0, 0.12), ((10,), 0, 0.1), ((11,), 0, 0.06), ((12,), 0, 0.03)),
    ),
    27: (
        *(((65, 66), 0, 0.27), ((56, 57), 0, 0.27), ((55,), -0.05, 0.21), ((54, 64), -0.07, 0.11)),
        *(((53,), -0.04, 0.01), ((51, 52, 62, 63), 0, -0.02)),
        *(((8,), 0, 0.24), ((9,), 0, 0.23), ((10,), 0, 0.19), ((11,), 0, 0.12), ((12,), 0, 0.06)),
    ),
}
AUS = tuple(_ACTION_UNITS)

# EMFACS-like variants of each expression, one drawn at random: action unit -> strength at full intensity.
PROTOTYPES: dict[str, tuple[dict[int, float], ...]] = {
    "anger": ({4: 1.0, 5: 0.5, 7: 0.5, 23: 0.8, 24: 0.6}, {4: 1.0, 5: 0.6, 7: 0.4, 10: 0.5, 23: 0.8, 25: 0.9, 26: 0.2}),
    "contempt": ({12: 0.6, 14: 1.0}, {12: 0.8, 14: 0.7, 7: 0.3}),
    "disgust": ({4: 0.4, 9: 1.0, 10: 0.8, 15: 0.4, 17: 0.7}, {4: 0.3, 7: 0.3, 9: 1.0, 10: 1.1, 25: 0.5}),
    "fear": (
        {1: 1.0, 2: 0.5, 4: 0.6, 5: 1.0, 20: 1.0, 25: 0.9},
        {1: 1.0, 2: 0.4, 4: 0.7, 5: 0.9, 20: 1.1, 25: 0.7, 26: 0.5},
    ),
    "happiness": ({6: 0.8, 12: 1.0}, {6: 0.8, 12: 1.0, 25: 0.9}, {6: 1.0, 12: 1.1, 25: 0.9, 26: 0.6}),
    "neutral": ({},),
    "sadness": ({1: 1.0, 4: 0.5, 7: 0.4, 15: 1.0, 17: 0.6}, {1: 1.1, 4: 0.4, 7: 0.6, 15: 1.1}),
    "surprise": ({1: 1.0, 2: 1.0, 5: 0.8, 25: 0.4, 26: 1.0}, {1: 1.0, 2: 1.0, 5: 0.7, 27: 0.9}),
}


def stream(seed: int, kind: int, number: int) -> np.random.Generator:
    """A random stream that is a pure function of its key: neither order nor process matters.

    Philox (Salmon et al. 2011) is counter-based; streams of different keys are independent by construction.
    """
    return np.random.Generator(np.random.Philox(key=(seed << 64) | (number << 3) | kind))


def _blendshapes() -> Array:
    """(A, 68, 3) displacement of every landmark by every action unit at strength 1."""
    shapes = np.zeros((len(AUS), 68, 3))
    for a, moves in enumerate(_ACTION_UNITS.values()):
        for points, outwards, down in moves:
            for p in points:
                shapes[a, p, :2] += outwards * SIDE[p], down
                if SIDE[p]:
                    shapes[a, MIRROR_68[p], :2] += -outwards * SIDE[p], down
    return shapes


_STRENGTHS = {
    name: [np.array([(a in v) and v[a] for a in AUS], np.float64) for v in variants]
    for name, variants in PROTOTYPES.items()
}
_BLENDSHAPES = _blendshapes()
_ON_SIDE = np.stack([(1 - SIDE) / 2, (1 + SIDE) / 2])  # share of the left and the right activation in each landmark


@dataclass(frozen=True, eq=False)
class Identity:
    """One person.

    Attributes:
        neutral: (68, 3) landmarks of the resting face, face units.
        style: (A,) how strongly this person shows each action unit.
        iris: radius, face units.
        width: half width of the head; the cranium, hairline and ears follow it.
        hairline: y of the hairline at the midline.
        hair: ``bald``, ``short``, ``fringe``, ``side``, ``long`` or ``volume``.
        beard: ``none``, ``stubble``, ``moustache``, ``goatee`` or ``full``.
        brow: thickness of the brows, face units.
        age: 0 (smooth) to 1 (wrinkled).
        glasses: wears glasses on every picture.
        skin, hair_colour, brow_colour, beard_colour, lips, iris_colour, shirt: RGB.
        freckles: (F, 3) x, y and radius of spots on the skin, face units.
        locks: (17,) in [0, 1], irregularity of the hair's edge and of small accessories.
    """

    neutral: Array
    style: Array
    iris: float
    width: float
    hairline: float
    hair: str
    beard: str
    brow: float
    age: float
    glasses: bool
    skin: Colour
    hair_colour: Colour
    brow_colour: Colour
    beard_colour: Colour
    lips: Colour
    iris_colour: Colour
    shirt: Colour
    freckles: Array
    locks: Array


_SKIN = np.array([[250, 220, 196], [240, 196, 160], [222, 170, 124], [190, 130, 88], [140, 88, 58], [88, 56, 42]])
_HAIR = np.array(
    [[28, 24, 24], [62, 42, 30], [104, 70, 44], [134, 66, 40], [206, 170, 104], [150, 148, 146], [222, 220, 214]]
)
_IRIS = np.array([[60, 38, 24], [96, 64, 36], [84, 106, 70], [86, 122, 160], [110, 116, 122]])


def mix(a: Sequence[float] | Array, b: Sequence[float] | Array, share: float) -> Colour:
    """The colour ``share`` of the way from ``a`` to ``b``."""
    rest = 1 - share
    return int(a[0] * rest + b[0] * share), int(a[1] * rest + b[1] * share), int(a[2] * rest + b[2] * share)


def _neutral(width: float, vary: Any) -> Array:
    """(68, 3) landmarks of a resting face; ``vary(mean, spread)`` draws each measure."""
    p = np.zeros((68, 3))
    chin, angle = vary(1.0, 0.06), np.linspace(0, np.pi, 17)
    cos, sin = np.cos(angle), np.sin(angle)
    p[:17, 0] = -width * np.sign(cos) * np.abs(cos) ** vary(0.85, 0.12)
    p[:17, 1] = -0.1 + (chin + 0.1) * sin ** vary(0.95, 0.08)
    p[:17, 2] = -0.2 + 0.5 * sin**1.5

    eye_x, eye_y, eye, slant = vary(0.335, 0.018), vary(-0.13, 0.02), vary(0.175, 0.014), vary(0.012, 0.014)
    upper, lower = vary(0.075, 0.009), vary(0.05, 0.006)
    along = np.array([-1, -0.4, 0.4, 1, 0.4, -0.4])
    p[42:48, 0] = eye_x + eye * along
    p[42:48, 1] = (
        eye_y - slant * along + upper * np.array([0.1, -1, -1, 0, 0, 0]) + lower * np.array([0, 0, 0, 0, 1, 1])
    )
    p[42:48, 2] = 0.44 - 0.07 * along

    t = np.linspace(0, 1, 5)
    p[22:27, 0] = eye_x + vary(0.46, 0.03) * (t - 0.48)
    p[22:27, 1] = (
        eye_y - vary(0.24, 0.022) - vary(0.05, 0.02) * np.sin(np.pi * (0.1 + 0.8 * t)) + vary(0.0, 0.02) * (t - 0.5)
    )
    p[22:27, 2] = 0.56 - 0.22 * t

    nose_y, nose, tip = vary(0.31, 0.03), vary(0.15, 0.02), vary(0.80, 0.05)
    p[27:31, 1] = np.linspace(eye_y, nose_y - 0.08, 4)
    p[27:31, 2] = np.linspace(0.54, tip, 4)
    p[31:36, 0] = nose * np.array([-1, -0.5, 0, 0.5, 1])
    p[31:36, 1] = nose_y + np.array([-0.02, 0.01, 0.02, 0.01, -0.02])
    p[31:36, 2] = np.array([0.5, 0.58, 0.64, 0.58, 0.5])

    mouth_y, mouth, rest = vary(0.58, 0.025), vary(0.27, 0.022), vary(0.0, 0.014)
    top, bottom = vary(0.052, 0.012), vary(0.066, 0.013)
    p[48:55, 0] = mouth * np.array([-1, -0.62, -0.24, 0, 0.24, 0.62, 1])
    p[48:55, 1] = mouth_y - top * np.array([0, 0.66, 1, 0.86, 1, 0.66, 0])
    p[55:60, 0] = mouth * np.array([0.66, 0.32, 0, -0.32, -0.66])
    p[55:60, 1] = mouth_y + bottom * np.array([0.66, 0.96, 1, 0.96, 0.66])
    p[60:65, 0] = mouth * np.array([-0.92, -0.36, 0, 0.36, 0.92])
    p[65:68, 0] = mouth * np.array([0.36, 0, -0.36])
    p[60:68, 1] = mouth_y
    p[48:68, 1] -= rest * ((p[48:68, 0] / mouth) ** 2 - 0.4)
    p[48:68, 2] = 0.56 - 0.16 * (p[48:68, 0] / mouth) ** 2

    left = SIDE < 0
    left[:17] = False
    p[left] = p[MIRROR_68[left]] * (-1, 1, 1)
    return p


@lru_cache(maxsize=4096)
def identity(seed: int, subject: int) -> Identity:
    """The person ``subject`` of the world ``seed``: a pure function of both."""
    rng = stream(seed, PERSON, subject)

    def vary(mean: float, spread: float) -> float:
        return mean + spread * float(np.clip(rng.standard_normal(), -2, 2))

    def choose(names: tuple[str, ...], weights: tuple[float, ...]) -> str:
        return str(rng.choice(names, p=weights))

    width, tone = vary(0.73, 0.045), rng.random() * (len(_SKIN) - 1)
    pale = _SKIN[int(tone)] + (_SKIN[int(tone) + 1] - _SKIN[int(tone)]) * (tone % 1)
    skin = mix(np.clip(pale + rng.normal(0, 6, 3), 0, 255), pale, 0.3)
    natural = _HAIR if tone < 2.5 else _HAIR[[0, 0, 0, 1, 1, 2, 5]]
    hair = mix(natural[rng.integers(len(natural))], natural[rng.integers(len(natural))], 0.2)
    bearded = rng.random() < 0.3
    beard = choose(("stubble", "moustache", "goatee", "full"), (0.4, 0.2, 0.2, 0.2)) if bearded else "none"
    lips = mix(skin, (172, 58, 66), float(rng.uniform(0.25, 0.55 if bearded else 0.85)))
    freckles = rng.uniform((-0.55, -0.6, 0.004), (0.55, 0.85, 0.018), (int(rng.integers(0, 14)), 3))
    return Identity(
        neutral=_neutral(width, vary),
        style=np.exp(0.12 * np.clip(rng.standard_normal(len(AUS)), -2, 2)),
        iris=vary(0.088, 0.006),
        width=width,
        hairline=vary(-0.72, 0.06),
        hair=choose(("bald", "short", "fringe", "side", "long", "volume"), (0.08, 0.27, 0.15, 0.15, 0.22, 0.13)),
        beard=beard,
        brow=vary(0.055, 0.014),
        age=float(rng.random() ** 1.5),
        glasses=bool(rng.random() < 0.15),
        skin=skin,
        hair_colour=hair,
        brow_colour=mix(mix(hair, (30, 22, 20), 0.45), skin, 0.1),
        beard_colour=mix(hair, (40, 30, 26), 0.25),
        lips=lips,
        iris_colour=mix(_IRIS[rng.integers(len(_IRIS))], (70, 60, 50), 0.2),
        shirt=mix(rng.integers(20, 235, 3), (128, 128, 128), 0.15),
        freckles=freckles,
        locks=rng.random(17),
    )


def activations(person: Identity, expression: str, intensity: float, rng: np.random.Generator) -> Array:
    """Draw (2, A) activations of the left and the right half of the face.

    A variant of the expression's prototype, its strengths varied by the person's style, by the picture (12 %) and
    between the halves (6 %). Contempt shows on one half only.

    Args:
        person: who shows it.
        expression: canonical name.
        intensity: 0 (nothing) to 1 (full).
        rng: where the variation comes from.
    """
    variants = _STRENGTHS[expression]
    strength = variants[int(len(variants) * rng.random())]
    varied = person.style * np.exp(0.12 * rng.standard_normal(len(AUS)).clip(-2, 2))
    halves = 1 + 0.06 * rng.standard_normal((2, len(AUS))).clip(-2, 2)
    calm_half = int(2 * rng.random())
    if expression == "contempt":
        halves[calm_half] *= 0.08
    unrelated = 0.06 * np.abs(rng.standard_normal(len(AUS)))  # faces are never quite still
    unrelated[AUS.index(27)] = 0
    both: Array = intensity * strength * varied * halves + unrelated
    return both


def _pairs(*groups: tuple[tuple[int, ...], tuple[int, ...], float, float]) -> tuple[Array, Array, Array, Array]:
    """Join groups of (upper landmarks, lower landmarks, least distance, share of the upper in mending it)."""
    upper, lower, least, share = zip(*groups, strict=True)
    counts = [len(u) for u in upper]
    return np.concatenate(upper), np.concatenate(lower), np.repeat(least, counts), np.repeat(share, counts)


_KEEP_APART = (
    _pairs(((37, 38, 43, 44), (41, 40, 47, 46), 0.02, 0.5), ((61, 62, 63), (67, 66, 65), 0.0, 0.5)),  # lids, lips
    _pairs(
        ((49, 50, 51, 52, 53), (60, 61, 62, 63, 64), 0.02, 0.8),  # thickness of the upper lip
        ((67, 66, 65), (58, 57, 56), 0.025, 0.2),  # thickness of the lower lip
        ((20, 19, 23, 24), (38, 37, 43, 44), 0.07, 1.0),  # brows above lids
    ),
)


def deform(person: Identity, activation: Array) -> Array:
    """(68, 3) landmarks of a person with (2, A) activations; lids and lips touch but never cross."""
    per_point = activation.T @ _ON_SIDE  # (A, 68)
    p: Array = person.neutral + (per_point[..., None] * _BLENDSHAPES).sum(0)
    for upper, lower, least, share in _KEEP_APART:
        lack = np.maximum(0, least - (p[lower, 1] - p[upper, 1]))
        p[upper, 1] -= share * lack
        p[lower, 1] += (1 - share) * lack
    return p
