"""Scenes: one to four drawn, labelled faces on a generated background, with exact boxes, for detection heads.

Scene ``part/number`` is a pure function of ``image_seed``, the part and the number. Each part shows its own people.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Unpack

import cv2
import numpy as np

from fer.data.base import DataOptions, ExpressionDataModule, Image
from fer.data.drawing import annotations, paint
from fer.data.identities import BACKDROP, SCENE, stream
from fer.data.manifest import PARTS, Array, Manifest
from fer.data.posing import Geometry, geometry
from fer.data.synthetic import CLASSES, GENERATOR, LAST_DIGITS, PART_SIZE, check_drawing
from fer.errors import UserError

VERSION = 2  # raise when the same options give other scenes
SIDE = 224  # the side that face sizes are given for
MOST = 4  # faces of a scene
_OVERLAP = 0.1  # of two face boxes, as a share of the smaller one; bounds their IoU too
_TRIES = 30  # places looked at before a face is left out


@dataclass(frozen=True, eq=False)
class _Pasted:
    """One face of a scene.

    Attributes:
        placed: the drawing it is cut from.
        index: number of that drawing.
        size: side in pixels of that drawing.
        corner: (2,) where its upper left corner lies in the scene, whole pixels.
        box: (4,) x, y, width, height of the face in the scene.
        label: index of the expression.
    """

    placed: Geometry
    index: int
    size: int
    corner: Array
    box: Array
    label: int


class Scenes(ExpressionDataModule):
    """Drawn faces pasted on generated backgrounds.

    A scene's label, box, landmarks and organ boxes are those of its largest face; ``face_boxes``, ``face_labels`` and
    ``face_organ_boxes`` hold those of all, the largest first. No face box covers more than a tenth of another one.

    Args:
        classes: 7 (the basic ones) or 8 (with contempt).
        train, val, test: scenes per part.
        subjects: people, 7 of 10 for train, 1 for val, 2 for test.
        image_seed: the world: people, pictures and scenes.
        faces: fewest and most faces per scene, 1 to 4; fewer where no place is found for one.
        face_size: smallest and largest longer side of a face box, in pixels of a scene of 224 pixels.
        intensity: lowest and highest strength of the expressions, 0 to 1; neutral faces have 0.
        pose, light: spread of head pose, of light and camera: 0 none, 1 usual.
        occlusion: probability of a hand, a mask or an object before a face.
        options: see `DataOptions`.
    """

    title = "scenes of synthetic faces"
    expected_tree = "(nothing: the scenes are drawn)"
    request = "nowhere: the scenes are drawn"
    on_disk = False

    def __init__(
        self,
        *,
        classes: int,
        train: int,
        val: int,
        test: int,
        subjects: int,
        image_seed: int,
        faces: list[int],
        face_size: list[int],
        intensity: list[float],
        pose: float,
        light: float,
        occlusion: float,
        **options: Unpack[DataOptions],
    ) -> None:
        super().__init__(**options)
        self.manifest_options = {
            "classes": classes,
            "train": train,
            "val": val,
            "test": test,
            "subjects": subjects,
            "image_seed": image_seed,
            "faces": list(faces),
            "face_size": list(face_size),
            "intensity": list(intensity),
            "pose": pose,
            "light": light,
            "occlusion": occlusion,
        }
        check_drawing(self.manifest_options, self.store_size)
        for key, (low, high) in {"faces": (1, MOST), "face_size": (32, 160)}.items():
            own = self.manifest_options[key]
            if len(own) != 2 or not low <= own[0] <= own[1] <= high:
                raise UserError(f"data.{key}={own}: expected [lowest, highest] within {low} and {high}")
        self.expressions = CLASSES[classes]
        self.sizes = dict(zip(PARTS, (train, val, test), strict=True))
        self.subjects, self.image_seed = subjects, image_seed
        self.faces, self.face_size, self.intensity = list(faces), list(face_size), list(intensity)
        self.conditions = {"pose": pose, "light": light, "occlusion": occlusion}

    def source_fingerprint(self) -> str:
        """The generators' versions: there is no source on disk."""
        return f"scenes {VERSION} of synthetic faces, generator {GENERATOR}"

    def manifest(self) -> Manifest:
        """Decide who shows what where on every scene, without drawing."""
        item = [f"{part}/{number:06d}" for part in PARTS for number in range(self.sizes[part])]
        n = len(item)
        boxes = np.full((n, MOST, 4), np.nan, dtype=np.float32)
        labels = np.full((n, MOST), -1, dtype=np.int64)
        landmarks = np.empty((n, 5, 2), dtype=np.float32)
        organs = np.full((n, MOST, 4, 4), np.nan, dtype=np.float32)
        count = np.empty(n, dtype=np.int64)
        for row, name in enumerate(item):
            scene = self._scene(name)
            count[row] = len(scene)
            for f, face in enumerate(scene):
                _, five, _, parts = annotations(face.placed, face.size)
                boxes[row, f], labels[row, f] = face.box, face.label
                organs[row, f] = parts + _shift(face.corner)
                if f == 0:
                    landmarks[row] = five + face.corner
        return Manifest(
            item=np.array(item, dtype=str),
            label=labels[:, 0],
            class_names=self.expressions,
            split=np.array([name.partition("/")[0] for name in item], dtype=str),
            form="drawn",
            box=boxes[:, 0],
            landmarks=landmarks,
            organ_boxes=organs[:, 0],
            face_boxes=boxes,
            face_labels=labels,
            face_organ_boxes=organs,
            attributes={"faces": count.astype(str)},
            warnings=("a scene shows several people: only the official parts (protocol=official) keep people apart",),
        )

    def images(self, manifest: Manifest, rows: Array) -> Iterator[Image]:
        """Draw the scene of each row."""
        for name in manifest.item[rows].tolist():
            canvas = backdrop(stream(self.image_seed, BACKDROP, self._number(name)), self.store_size)
            for face in self._scene(name):
                self._paste(canvas, face)
            grey: Image = cv2.cvtColor(canvas, cv2.COLOR_RGB2GRAY)  # type: ignore[assignment]
            yield grey if self.channels == 1 else canvas

    def _number(self, name: str) -> int:
        part, _, number = name.partition("/")
        return [*PARTS].index(part) * PART_SIZE // MOST + int(number)  # type: ignore[arg-type]

    def _scene(self, name: str) -> list[_Pasted]:
        """The faces of a scene, largest first; the first always finds a place."""
        part, number = name.partition("/")[0], self._number(name)
        rng = stream(self.image_seed, SCENE, number)
        people = [s for s in range(self.subjects) if s % 10 in LAST_DIGITS[part]]
        (low, high), (weakest, strongest) = self.face_size, self.intensity
        sides = np.sort(rng.uniform(low, high, rng.integers(self.faces[0], self.faces[1] + 1)))[::-1]
        out: list[_Pasted] = []
        for f, side in enumerate(sides * (self.store_size / SIDE)):
            index, label = MOST * number + f, int(rng.integers(len(self.expressions)))
            placed = geometry(
                self.image_seed,
                index,
                expression=self.expressions[label],
                subject=people[int(rng.integers(len(people)))],
                intensity=0.0 if self.expressions[label] == "neutral" else float(rng.uniform(weakest, strongest)),
                **self.conditions,
            )
            size = round(side / placed.box[2:].max())
            box = annotations(placed, size)[2]
            # All random numbers of a face are drawn whether or not it finds a place: the next one is the same.
            for corner in np.rint(rng.random((_TRIES, 2)) * (self.store_size - box[2:]) - box[:2]):
                here = box + _shift(corner)
                if all(_shared(here, other.box) < _OVERLAP for other in out):
                    out.append(_Pasted(placed, index, size, corner.astype(int), here, label))
                    break
        # A face cut by its drawing's border is a little smaller than it was meant to be.
        return sorted(out, key=lambda face: -face.box[2:].max())

    def _paste(self, canvas: Image, face: _Pasted) -> None:
        """Cut the head out of its drawing and lay it over the scene."""
        picture = paint(face.placed, self.image_seed, face.index, face.size, 3)
        outline = np.concatenate([face.placed.skull, face.placed.skin])
        head = cv2.convexHull((outline * face.size - 0.5).astype(np.float32))
        mask = np.zeros(picture.shape[:2], np.float32)
        cv2.fillConvexPoly(mask, np.rint(head * 16).astype(np.int32), 1.0, cv2.LINE_8, 4)
        mask = cv2.GaussianBlur(mask, (0, 0), 0.8)[..., None]
        x, y = face.corner.tolist()
        left, top = max(0, -x), max(0, -y)
        right, bottom = (min(face.size, side - at) for side, at in zip(canvas.shape[1::-1], (x, y), strict=True))
        under = canvas[y + top : y + bottom, x + left : x + right]
        part = (slice(top, bottom), slice(left, right))
        under[:] = np.rint(under + mask[part] * (picture[part].astype(np.float32) - under))


def backdrop(rng: np.random.Generator, size: int) -> Image:
    """(size, size, 3) uint8: a gradient, textures of three grains, and clutter of boxes and ellipses of any colour."""
    scene: Array = cv2.resize(rng.uniform(0, 255, (2, 2, 3)), (size, size), interpolation=cv2.INTER_LINEAR)
    for cells in (4, 12, 48):
        grain = rng.normal(0, rng.uniform(0, 30), (cells, cells, 3)) * rng.uniform(0, 1, 3)
        scene += cv2.resize(grain, (size, size), interpolation=cv2.INTER_CUBIC)
    canvas: Image = np.clip(scene, 0, 255).astype(np.uint8)
    for _ in range(int(rng.integers(4, 20))):
        centre, half, angle = rng.random(2) * size, (0.02 + 0.2 * rng.random(2)) * size, rng.uniform(0, 180)
        colour, spread = rng.uniform(0, 255, 3), (tuple(centre.tolist()), tuple((2 * half).tolist()), angle)
        if rng.random() < 0.5:
            cv2.ellipse(canvas, spread, colour.tolist(), -1, cv2.LINE_AA)
        else:
            cv2.fillPoly(canvas, [np.rint(cv2.boxPoints(spread)).astype(np.int32)], colour.tolist(), cv2.LINE_AA)
    return canvas


def _shift(corner: Array) -> Array:
    """(4,) what moves a box x, y, width, height by (2,) pixels."""
    return np.array([*corner, 0, 0])


def _shared(a: Array, b: Array) -> float:
    """What two boxes x, y, width, height share, as a part of the smaller one."""
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[:2] + a[2:], b[:2] + b[2:])
    return float(np.prod(np.maximum(high - low, 0)) / min(a[2] * a[3], b[2] * b[3]))
