"""Synthetic faces: the bench's embedded data set, drawn on first use; nothing to download.

Image ``part/number`` is a pure function of ``image_seed``, the part and the number: asking for more images, or for
another size, changes none of those there were.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any, Unpack

import numpy as np

from fer.data.base import DataOptions, ExpressionDataModule, Image
from fer.data.drawing import annotations, paint
from fer.data.identities import PLAN, stream
from fer.data.manifest import PARTS, Array, Manifest
from fer.data.posing import Geometry, geometry
from fer.errors import UserError
from fer.labels import BASIC_7, EXPRESSIONS

GENERATOR = 1  # raise when the same options give other pictures
LAST_DIGITS = {"train": range(7), "val": range(7, 8), "test": range(8, 10)}  # of each part's subjects
PART_SIZE = 1 << 32  # numbers of one part
_GOLDEN = (5**0.5 - 1) / 2
CLASSES = {7: BASIC_7, 8: EXPRESSIONS}
_RANGE = "[lowest, highest] with 0 <= lowest <= highest <= 1"
# Images per class of RAF-DB's training part (Li et al., CVPR 2017); contempt, which it lacks, as rare as fear.
RAF_DB = {
    "anger": 705,
    "contempt": 281,
    "disgust": 717,
    "fear": 281,
    "happiness": 4772,
    "neutral": 2524,
    "sadness": 1982,
    "surprise": 1290,
}


class Synthetic(ExpressionDataModule):
    """Drawn faces with subjects, landmarks, face and organ boxes known exactly.

    The official parts have no subject in common. Labels are spread evenly over the expressions, or in RAF-DB's
    proportions, to within two or three images per class for any number of images.

    Args:
        classes: 7 (the basic ones) or 8 (with contempt).
        train, val, test: images per part.
        subjects: people, 7 of 10 for train, 1 for val, 2 for test.
        image_seed: the world: people and pictures.
        imbalance: classes as frequent as in RAF-DB.
        label_noise: share of the train part's labels replaced by another class; ``attributes["true_expression"]``
            keeps what was drawn.
        intensity: lowest and highest strength of the expressions, 0 to 1; neutral faces have 0.
        pose, light: spread of head pose and place, of light and camera: 0 none, 1 usual.
        occlusion: probability of a hand, a mask or an object before the face.
        landmarks: 5, or 68 in iBUG's order.
        options: see `DataOptions`.
    """

    title = "synthetic faces"
    expected_tree = "(nothing: the faces are drawn)"
    request = "nowhere: the faces are drawn"
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
        imbalance: bool,
        label_noise: float,
        intensity: list[float],
        pose: float,
        light: float,
        occlusion: float,
        landmarks: int,
        **options: Unpack[DataOptions],
    ) -> None:
        super().__init__(**options)
        self.sizes = {"train": train, "val": val, "test": test}
        self.subjects, self.image_seed = subjects, image_seed
        self.imbalance, self.label_noise, self.intensity = imbalance, label_noise, list(intensity)
        self.pose, self.light, self.occlusion, self.landmarks = pose, light, occlusion, landmarks
        self.manifest_options = {
            "classes": classes,
            **self.sizes,
            "subjects": subjects,
            "image_seed": image_seed,
            "imbalance": imbalance,
            "label_noise": label_noise,
            "intensity": self.intensity,
            "pose": pose,
            "light": light,
            "occlusion": occlusion,
            "landmarks": landmarks,
        }
        check_drawing(self.manifest_options, store_size=self.store_size)
        self.expressions = CLASSES[classes]

    def source_fingerprint(self) -> str:
        """The generator's version: there is no source on disk."""
        return f"synthetic faces, generator {GENERATOR}"

    def manifest(self) -> Manifest:
        """Decide who shows what on every image and where it lies, without drawing."""
        plan = self._plan
        placed = [self._place(row) for row in range(len(plan.item))]
        places = zip(*(annotations(p, self.store_size) for p in placed), strict=True)
        middle = sum(self.intensity) / 2
        all_points, five, box, organs = (np.stack(column).astype(np.float32) for column in places)
        return Manifest(
            item=plan.item,
            label=plan.label,
            class_names=self.expressions,
            split=plan.part,
            form="drawn",
            benchmark=False,
            subject=np.array([f"s{s:04d}" for s in plan.subject]),
            landmarks=all_points if self.landmarks == 68 else five,
            box=box,
            organ_boxes=organs,
            attributes={
                "true_expression": np.array(self.expressions)[plan.drawn],
                "intensity": np.select([plan.intensity == 0, plan.intensity < middle], ["none", "weak"], "strong"),
                "head": np.array(["frontal" if abs(p.conditions.yaw) < 0.26 else "turned" for p in placed]),
                "occluder": np.array([p.conditions.occluder for p in placed]),
            },
        )

    def images(self, manifest: Manifest, rows: Array) -> Iterator[Image]:
        """Draw the image of each row."""
        row_of = {item: row for row, item in enumerate(self._plan.item.tolist())}
        for item in manifest.item[rows].tolist():
            row = row_of[item]
            index = int(self._plan.index[row])
            yield paint(self._place(row), self.image_seed, index, self.store_size, self.channels)

    def _place(self, row: int) -> Geometry:
        plan = self._plan
        return geometry(
            self.image_seed,
            int(plan.index[row]),
            expression=self.expressions[plan.drawn[row]],
            subject=int(plan.subject[row]),
            intensity=float(plan.intensity[row]),
            pose=self.pose,
            light=self.light,
            occlusion=self.occlusion,
        )

    @cached_property
    def _plan(self) -> "_Plan":
        """Who shows what on every image."""
        frequency = np.array([RAF_DB[e] if self.imbalance else 1 for e in self.expressions], dtype=np.float64)
        edges = np.cumsum(frequency / frequency.sum())[:-1]
        parts = []
        for p, part in enumerate(PARTS):
            number = np.arange(self.sizes[part])
            rng = stream(self.image_seed, PLAN, p)
            # Multiples of the golden ratio fill [0, 1) evenly: any stretch of images has the right proportions.
            drawn = np.searchsorted(edges, (rng.random() + number * _GOLDEN) % 1, side="right")
            # A longer table begins with the rows of a shorter one.
            who, strength, noise, other = rng.random((len(number), 4)).T
            people = np.array([s for s in range(self.subjects) if s % 10 in LAST_DIGITS[part]])
            intensity = self.intensity[0] + (self.intensity[1] - self.intensity[0]) * strength
            wrong = drawn + 1 + (other * (len(self.expressions) - 1)).astype(int)
            replaced = (noise < self.label_noise) & (part == "train")
            parts.append(
                _Plan(
                    item=np.array([f"{part}/{n:06d}" for n in number], dtype=str),
                    part=np.full(len(number), part),
                    index=p * PART_SIZE + number,
                    drawn=drawn,
                    label=np.where(replaced, wrong % len(self.expressions), drawn),
                    subject=people[(who * len(people)).astype(int)],
                    intensity=np.where(drawn == self.expressions.index("neutral"), 0.0, intensity),
                )
            )
        return _Plan(*(np.concatenate(columns) for columns in zip(*map(astuple, parts), strict=True)))


def check_drawing(own: dict[str, Any], store_size: int) -> None:
    """Refuse options no drawn picture can have, by name.

    Raises:
        UserError: naming the first such option and what it may be.
    """
    checks: list[tuple[str, bool, str]] = [
        ("classes", own["classes"] in CLASSES, "7, or 8 with contempt"),
        ("subjects", own["subjects"] >= 10, "at least 10, so that every part has some"),
        ("image_seed", 0 <= own["image_seed"] < 1 << 63, "an integer from 0 on"),
        ("store_size", 32 <= store_size <= 448, "32 to 448 pixels"),
        ("intensity", len(own["intensity"]) == 2 and 0 <= min(own["intensity"]) <= max(own["intensity"]) <= 1, _RANGE),
        ("intensity", own["intensity"] == sorted(own["intensity"]), _RANGE),
        *((part, 0 <= own[part] < PART_SIZE, "a number of images, 0 or more") for part in PARTS),
        ("train", any(own[part] for part in PARTS), "some images in train, val or test"),
        *((key, own[key] in (5, 68), "5 or 68") for key in ("landmarks",) if key in own),
        *((key, 0 <= own[key] <= 1, "a share from 0 to 1") for key in ("label_noise", "occlusion") if key in own),
        *((key, 0 <= own[key] <= 1.5, "0 (none) to 1.5, usually 1") for key in ("pose", "light")),
    ]
    for key, good, expected in checks:
        if not good:
            value = store_size if key == "store_size" else own[key]
            raise UserError(f"data.{key}={value}: expected {expected}")


@dataclass(frozen=True)
class _Plan:
    """(N,) columns: item, part, index of the drawing, class drawn, class said, subject, intensity."""

    item: Array
    part: Array
    index: Array
    drawn: Array
    label: Array
    subject: Array
    intensity: Array
