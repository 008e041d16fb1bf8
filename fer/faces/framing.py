"""How faces lie in the images of a data set, so that prediction can cut a face out of a photograph the same way.

Data sets were aligned by different hands. What tells them apart are the two numbers of `fer.faces.align` beside the
face: the margin around it and how far the crop's centre lies from where ours would.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from fer.faces.align import BELOW_EYES, SIDE, Array, Crop, align, pose
from fer.faces.detect import FoundFace

SAMPLE = 2000  # images looked at, at least, of larger sets


@dataclass(frozen=True)
class Framing:
    """How faces lie in a data set's images.

    Attributes:
        size: side of the images as they came, in pixels, before the store made them all alike.
        margin: added on each side, as a share of the face square's side, see `fer.faces.align`.
        shift: of the image's centre towards the mouth, in units of the face, likewise.
    """

    size: int
    margin: float
    shift: float

    @classmethod
    def measured(cls, landmarks: Array, sides: Array) -> Self | None:
        """The median over a data set's faces.

        Args:
            landmarks: (N, 5, 2) or (N, 68, 2), as shares of the image's width and height; NaN where unknown.
            sides: (N,) of the images in pixels.

        Returns:
            None where no face's landmarks are known.
        """
        step = max(len(landmarks) // SAMPLE, 1)
        faces = [face for points in landmarks[::step] if (face := pose(points)) is not None]
        if not faces:
            return None
        margin = np.median([(1 / (SIDE * face.unit) - 1) / 2 for face in faces])
        shift = np.median([(0.5 - face.eyes) @ face.down / face.unit - BELOW_EYES for face in faces])
        return cls(round(float(np.median(sides))), round(float(margin), 3), round(float(shift), 3))

    def crop(self, image: Array, face: FoundFace) -> Crop | None:
        """Cut a face out of a photograph, (size, size) or (size, size, 3); None where its box is empty."""
        return align(image, self.size, self.margin, face.landmarks, face.box, self.shift)

    def as_json(self) -> dict[str, Any]:
        """Plain values, from which ``Framing(**values)`` is the same again."""
        return {"size": self.size, "margin": self.margin, "shift": self.shift}
