"""Corruptions of stored crops: what each one does at severities 1 to 5, weakest first.

An image's corruption is a pure function of (seed, name of the corruption, severity, row): which images are read, in
which order and batch, changes nothing. The draw does not depend on the severity, so that an image turned to the left is
turned further to the left. Lengths are shares of the image's side, so that a set of 48 and one of 224 pixels suffer
alike. Every value stands in ``conf/evaluate.yaml``; what albumentations has is taken from there.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np

from fer.data.manifest import Array, Manifest
from fer.data.per_image import PerImage
from fer.data.places import relative
from fer.data.regions import organ_boxes
from fer.errors import UserError
from fer.faces.align import BELOW_EYES, SIDE

SEVERITIES = (1, 2, 3, 4, 5)
MARGIN = 0.1  # of a face aligned by fer.faces.align, where the data does not say where its organs are
EYES_TO_MOUTH = 1.1  # eye distances, see fer.faces.align
REGIONS = ("eyes", "mouth", "half")
Corrupt = Callable[[Array, Array, int], Array]  # (S, S, C) image, (5, 4) places, row -> image


class Corruption(Protocol):
    """A corruption at five severities."""

    def at(self, severity: int, side: int, seed: int) -> Corrupt:
        """The corruption at a severity, for images of a side; ``seed`` is its own."""


def _five(name: str, values: Sequence[Any]) -> None:
    if len(values) != len(SEVERITIES):
        raise UserError(f"corruptions: {name} has {len(values)} values, expected one for each severity, 1 to 5")


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Albumentations transforms, one for each severity."""

    levels: list[Any]

    def __post_init__(self) -> None:
        """Refuse another number of severities."""
        _five("levels", self.levels)

    def at(self, severity: int, side: int, seed: int) -> Corrupt:
        """See `Corruption.at`."""
        pipeline = PerImage([self.levels[severity - 1]], seed, track=False)
        return lambda image, places, row: pipeline(image, 0, row)[0]


@dataclass(frozen=True, kw_only=True)
class Blur:
    """Gaussian blur; albumentations measures it in pixels, here it is a share of the image's side."""

    sigma: list[float]

    def __post_init__(self) -> None:
        """Refuse another number of severities."""
        _five("sigma", self.sigma)

    def at(self, severity: int, side: int, seed: int) -> Corrupt:
        """See `Corruption.at`."""
        sigma = self.sigma[severity - 1] * side

        def blur(image: Array, places: Array, row: int) -> Array:
            return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE).reshape(image.shape)

        return blur


@dataclass(frozen=True, kw_only=True)
class Occlusion:
    """A flat rectangle over a part of the face.

    Attributes:
        region: ``eyes`` (both and what is between), ``mouth``, or ``half`` (left or right, drawn).
        cover: sides of the rectangle as shares of the region's: about its middle, or from the face's edge inwards.
        fill: grey value, 0 to 255.
    """

    region: str
    cover: list[float]
    fill: int

    def __post_init__(self) -> None:
        """Refuse another number of severities, and unknown regions."""
        _five("cover", self.cover)
        if self.region not in REGIONS:
            raise UserError(f"corruptions: region={self.region} is not one of {', '.join(REGIONS)}")

    def at(self, severity: int, side: int, seed: int) -> Corrupt:
        """See `Corruption.at`."""
        cover = self.cover[severity - 1]

        def occlude(image: Array, places: Array, row: int) -> Array:
            left = bool(np.random.SeedSequence((seed, row)).generate_state(1)[0] & 1)
            low, high = _rectangle(places, self.region, cover, left)
            x1, y1 = np.clip(np.rint((low + 1) / 2 * side), 0, side).astype(int)
            x2, y2 = np.clip(np.rint((high + 1) / 2 * side), 0, side).astype(int)
            out = image.copy()
            out[y1:y2, x1:x2] = self.fill
            return out

        return occlude


def _rectangle(places: Array, region: str, cover: float, left: bool) -> tuple[Array, Array]:
    """Upper left and lower right corner, -1 and 1 the image's borders."""
    low, high = places[:, :2] - places[:, 2:], places[:, :2] + places[:, 2:]
    if region == "half":
        middle = places[1:3, 0].mean()
        edge = low[0, 0] if left else high[0, 0]
        reached = edge + cover * (middle - edge)
        return np.array([min(edge, reached), low[0, 1]]), np.array([max(edge, reached), high[0, 1]])
    chosen = slice(1, 3) if region == "eyes" else slice(4, 5)
    corner, opposite = low[chosen].min(0), high[chosen].max(0)
    centre, half = (corner + opposite) / 2, (opposite - corner) / 2
    return centre - cover * half, centre + cover * half


def aligned_places() -> Array:
    """(5, 4) face, left eye, right eye, nose, mouth of a crop as `fer.faces.align` cuts it: centre and half sides."""
    unit = 1 / (SIDE * (1 + 2 * MARGIN))
    eyes = 0.5 - BELOW_EYES * unit
    below = EYES_TO_MOUTH * unit
    points = [(0.5 - unit / 2, eyes), (0.5 + unit / 2, eyes), (0.5, eyes + 0.6 * below)]
    points += [(0.5 - 0.4 * unit, eyes + below), (0.5 + 0.4 * unit, eyes + below)]
    # A landmark counts from the centre of a pixel, of which this image has one.
    boxes = organ_boxes(np.array([points]) - 0.5, np.array([SIDE * unit]))[0]
    organs = np.hstack([2 * (boxes[:, :2] + boxes[:, 2:] / 2) - 1, boxes[:, 2:]])
    return np.vstack([(0, 0, 1, 1), organs])


def places_of(manifest: Manifest, windows: Array) -> tuple[Array, Array]:
    """Where face and organs lie in the stored images.

    Returns:
        (N, 5, 4) face, left eye, right eye, nose, mouth as centre and half sides, -1 and 1 the image's borders; and
        (N,) bool, whether the data says so. Elsewhere the whole image is the face, aligned as `aligned_places` has it.
    """
    known = relative(manifest, windows)
    out = np.tile(aligned_places(), (len(manifest), 1, 1))
    if "organ_boxes" not in known:
        return out, np.zeros(len(manifest), dtype=bool)
    there: Array = np.asarray(np.isfinite(known["organ_boxes"]).all(axis=(1, 2)))
    out[there, 1:] = known["organ_boxes"][there]
    if "box" in known:
        boxed = np.isfinite(known["box"]).all(axis=1)
        out[boxed, 0] = known["box"][boxed]
    return out, there


def own_seed(seed: int, name: str) -> int:
    """A corruption's seed, from the suite's seed and its name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")


class CorruptedImages:
    """A store's images, each corrupted when it is read.

    Args:
        images: (N, S, S, C) uint8.
        places: (N, 5, 4), see `places_of`.
        corrupt: the corruption.
    """

    def __init__(self, images: Array, places: Array, corrupt: Corrupt) -> None:
        self.images, self.places, self.corrupt = images, places, corrupt

    def __getitem__(self, row: int) -> Array:
        """(S, S, C) uint8."""
        return self.corrupt(np.array(self.images[row]), self.places[row], int(row))
