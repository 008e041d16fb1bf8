"""The manifest: what a data set says about its images, as plain numpy arrays.

A data set's reader turns an official form on disk into one `Manifest`; everything after it (split, store, loader)
works on manifests only. Labels are indices into ``class_names``, which holds canonical names (see `fer.labels`).
"""

import dataclasses
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fer.errors import UserError

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
Array = np.ndarray[Any, Any]
OPTIONAL = (
    *("subject", "sequence", "fold", "soft", "valence_arousal"),
    *("box", "landmarks", "organ_boxes", "face_boxes", "face_labels", "face_organ_boxes"),
)
# For 5 and for 68 landmarks: index of the landmark each one becomes when the image is mirrored.
MIRROR = {
    5: (1, 0, 2, 4, 3),
    68: (
        *(*range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1)),  # jaw, brows, nose
        *(*range(45, 41, -1), 47, 46, *range(39, 35, -1), 41, 40),  # eyes
        *(*range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), *range(67, 64, -1)),  # outer and inner lips
    ),
}


@dataclass(frozen=True)
class Manifest:
    """N images of one data set.

    Places are in pixels of the source image. A box is x, y, width, height with (0, 0) the image's upper left corner, so
    that a whole image is (0, 0, W, H); a landmark has (0, 0) at the centre of the first pixel.

    Attributes:
        item: (N,) str, what people look an image up by: a posix path relative to the root, or ``file.csv:row``
            (row counted from 0 after the header). Unique.
        label: (N,) int64, index into ``class_names``.
        class_names: canonical names; their order is the data set's own and means nothing downstream.
        split: (N,) str, the official part of each image: ``train``, ``val``, ``test``, or ``""`` where there is none.
        form: the on-disk form that was found, in words (``"fer2013.csv"``); printed and recorded.
        subject: (N,) str, the person, or None where unknown.
        sequence: (N,) str, the video an image was cut from, one name for one video of the whole data set, or None.
        fold: (N,) int64 from 0, the folds the field customarily uses on this data set, or None.
        soft: (N, K) float32, label distribution summing to 1, or None.
        box: (N, 4) float32, face box, NaN where missing, or None.
        landmarks: (N, L, 2) float32, L = 5 (left eye, right eye, nose, left mouth corner, right mouth corner, as seen
            in the image) or 68 (iBUG order), NaN where missing, or None.
        organ_boxes: (N, 4, 4) float32, boxes of left eye, right eye, nose, mouth as seen in the image, or None.
        face_boxes: (N, F, 4) float32, boxes of all labelled faces where an image has several, filled up with NaN, or
            None.
        face_labels: (N, F) int64, index into ``class_names`` of each of them, filled up with -1, or None.
        face_organ_boxes: (N, F, 4, 4) float32, organ boxes of each of them, filled up with NaN, or None.
        valence_arousal: (N, 2) float32 in [-1, 1], NaN where not annotated, or None.
        attributes: further per-image facts for subgroup results (``gender``, ``age`` ...), each (N,) str.
        skipped: (item, reason) of what the source lists but the manifest leaves out.
        warnings: sentences worth showing once (defects of the form, options that change the protocol).
        stamps: sentences every figure measured on this data must carry, whatever the split.
        official: official counts per part and class name for this form and these options, where known.
        benchmark: published figures are measured on the official test part, so cross-validation leaves it untouched
            unless told otherwise, and figures on other images are stamped.
    """

    item: Array
    label: Array
    class_names: tuple[str, ...]
    split: Array
    form: str
    subject: Array | None = None
    sequence: Array | None = None
    fold: Array | None = None
    soft: Array | None = None
    box: Array | None = None
    landmarks: Array | None = None
    organ_boxes: Array | None = None
    face_boxes: Array | None = None
    face_labels: Array | None = None
    face_organ_boxes: Array | None = None
    valence_arousal: Array | None = None
    attributes: dict[str, Array] = field(default_factory=dict)
    skipped: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    stamps: tuple[str, ...] = ()
    official: dict[str, dict[str, int]] | None = None
    benchmark: bool = True

    def __post_init__(self) -> None:
        """Check shapes and label range, the contract everything downstream relies on.

        Raises:
            UserError: an array has another length than ``item``, or a label is out of range.
        """
        n = len(self.item)
        arrays = {"label": self.label, "split": self.split}
        arrays |= {k: v for k in OPTIONAL if (v := getattr(self, k)) is not None} | self.attributes
        for name, values in arrays.items():
            if len(values) != n:
                raise UserError(f"manifest of {self.form}: {len(values)} values of '{name}' for {n} images")
        if self.landmarks is not None and self.landmarks.shape[1] not in MIRROR:
            raise UserError(f"manifest of {self.form}: {self.landmarks.shape[1]} landmarks per face, expected 5 or 68")
        bad = np.flatnonzero((self.label < 0) | (self.label >= len(self.class_names)))
        if len(bad):
            raise UserError(
                f"{self.item[bad[0]]}: label {self.label[bad[0]]} is outside the {len(self.class_names)} classes "
                f"({', '.join(self.class_names)})"
            )

    def __len__(self) -> int:
        return len(self.item)

    @property
    def person(self) -> Array:
        """(N,) str, who each image shows; where nobody is known someone of its own, by the name of the image."""
        return self.item if self.subject is None else np.where(self.subject == "", self.item, self.subject)

    def select(self, keep: Array) -> "Manifest":
        """The same manifest with only the rows in ``keep`` (indices or a boolean mask), in that order."""
        rows: dict[str, Any] = {k: getattr(self, k)[keep] for k in ("item", "label", "split")}
        rows |= {k: v[keep] for k in OPTIONAL if (v := getattr(self, k)) is not None}
        rows["attributes"] = {k: v[keep] for k, v in self.attributes.items()}
        return dataclasses.replace(self, **rows)

    def counts(self) -> dict[str, dict[str, int]]:
        """Images per official part (``all`` where there is none) and class name; parts without images left out."""
        out = {}
        for part in (*PARTS, ""):
            labels = self.label[self.split == part]
            if len(labels):
                per_class = np.bincount(labels, minlength=len(self.class_names))
                out[part or "all"] = {c: int(n) for c, n in zip(self.class_names, per_class, strict=True)}
        return out

    def count_differences(self) -> list[str]:
        """Where the counts differ from the official ones: ``"train/fear: 279, official 281, -2"``; empty when equal."""
        found, out = self.counts(), []
        for part, classes in (self.official or {}).items():
            for name, want in classes.items():
                have = found.get(part, {}).get(name, 0)
                if have != want:
                    out.append(f"{part}/{name}: {have}, official {want}, {have - want:+d}")
        return out

    def to_bytes(self) -> bytes:
        """Serialise as an npz archive without pickle."""
        arrays = {k: v for k in ("item", "label", "split", *OPTIONAL) if (v := getattr(self, k)) is not None}
        arrays |= {f"attribute.{k}": v for k, v in self.attributes.items()}
        text = {
            k: getattr(self, k)
            for k in ("class_names", "form", "skipped", "warnings", "stamps", "official", "benchmark")
        }
        buffer = io.BytesIO()
        np.savez(buffer, **arrays, text=np.frombuffer(json.dumps(text).encode(), dtype=np.uint8))
        return buffer.getvalue()

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read what `to_bytes` wrote."""
        with np.load(path, allow_pickle=False) as archive:
            arrays = {k: archive[k] for k in archive.files}
        text = json.loads(arrays.pop("text").tobytes())
        attributes = {k.removeprefix("attribute."): arrays.pop(k) for k in list(arrays) if k.startswith("attribute.")}
        return cls(
            **arrays,
            attributes=attributes,
            class_names=tuple(text["class_names"]),
            form=text["form"],
            skipped=tuple((str(a), str(b)) for a, b in text["skipped"]),
            warnings=tuple(text["warnings"]),
            stamps=tuple(text["stamps"]),
            official=text["official"],
            benchmark=text["benchmark"],
        )
