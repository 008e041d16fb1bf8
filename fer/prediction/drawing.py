"""Faces drawn into their picture: box, expression, and a bar for every probability, legible at any size."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fer.recognizer import Face

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Rectangle = tuple[float, float, float, float]  # left, top, right, bottom

# Told apart by people of any colour vision: Okabe and Ito (2008), then lighter and darker ones.
COLOURS = (
    *("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2", "#BBBBBB"),
    *("#8C564B", "#BCBD22", "#17BECF", "#9467BD"),
)
SMALLEST = 11  # px, of letters
SHARE = 48  # letters in the picture's shorter side
GROUND = (20, 20, 20)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which has letters of most languages; it comes with matplotlib."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


class Canvas:
    """Draws the faces of one picture.

    A picture too small for letters gets a dark margin at its right, which holds the bars; nothing is enlarged. Its
    width depends on the picture's size and the class names alone, so that all frames of a video stay alike.

    Args:
        image: (H, W) or (H, W, 3) RGB uint8.
        class_names: all expressions, in a fixed order.
    """

    def __init__(self, image: Pixels, class_names: Sequence[str]) -> None:
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        height, self.width = image.shape[:2]
        self.names = list(class_names)
        self.letter = max(SMALLEST, round(min(height, self.width) / SHARE))
        wide, high = self._bars_size(self.letter)
        self.small = self.width < 2.5 * wide or height < high
        self.full_width = self.width + (wide if self.small else 0)
        self.height = max(height, high) if self.small else height
        full = np.full((self.height, self.full_width, 3), GROUND, np.uint8)
        full[:height, : self.width] = image
        self.picture = Image.fromarray(full)
        self.draw = ImageDraw.Draw(self.picture, "RGBA")

    def faces(self, faces: Sequence[Face]) -> Pixels:
        """Draw all faces and give the picture back, (H, W, 3) uint8."""
        boxes = [_corners(face.box) for face in faces]
        for face, box in zip(faces, boxes, strict=True):
            self.draw.rectangle(box, outline=self._colour(face.expression), width=max(1, self.letter // 6))
        taken = list(boxes)
        for face, box in zip(faces, boxes, strict=True):
            if not self.small:
                taken.append(self._tag(face, box, taken))
        for face, box in zip(faces, boxes, strict=True):
            found = self._room(box, taken)
            if found is not None:
                self._bars(face, *found)
                taken.append(found[0])
            elif self.small:
                self._tag(face, box, taken)
        return np.asarray(self.picture)

    def _colour(self, name: str) -> str:
        return COLOURS[self.names.index(name) % len(COLOURS)]

    def _tag(self, face: Face, box: Rectangle, taken: Sequence[Rectangle]) -> Rectangle:
        """Expression and probability above the box or below it, inside the picture."""
        font, text = _font(self.letter), _words(face)
        width, height = font.getlength(text) + 2 * (self.letter // 3), 1.4 * self.letter
        left = min(max(box[0], 0), max(self.width - width, 0))
        tops = [top for top in (box[1] - height, box[3]) if 0 <= top <= self.height - height]
        tops.append(min(max(box[1], 0), self.height - height))
        places = [(left, top, left + width, top + height) for top in tops]
        # One that covers nothing, else the first.
        place = next((one for one in places if not _covers(one, taken)), places[0])
        colour = self._colour(face.expression)
        self.draw.rectangle(place, fill=colour)
        middle = (place[0] + self.letter // 3, place[1] + height / 2)
        self.draw.text(middle, text, _ink(colour), font, anchor="lm")
        return place

    def _bars_size(self, letter: int) -> tuple[int, int]:
        """Width and height of a face's bars."""
        names = max(_font(letter).getlength(name) for name in self.names)
        return round(names + 11 * letter), round(1.3 * letter * (len(self.names) + 1.5))

    def _room(self, box: Rectangle, taken: Sequence[Rectangle]) -> tuple[Rectangle, int] | None:
        """Where a face's bars cover no face and no letters, and their own letters, smaller if it must be."""
        left, top, right, bottom = box
        for letter in sorted({self.letter, max(SMALLEST, round(0.7 * self.letter)), SMALLEST}, reverse=True):
            width, height = self._bars_size(letter)
            gap, tag = letter // 3, 1.4 * self.letter
            y, x = min(max(top, 0), self.height - height), min(max(left, 0), self.width - width)
            corners = [(right + gap, y), (left - gap - width, y)]
            corners += [
                (x, bottom + gap),
                (x, bottom + gap + tag),
                (x, top - gap - height),
                (x, top - gap - tag - height),
            ]
            if self.small:
                steps = range(0, self.height - height + 1, letter)
                corners = [(self.width, step) for step in steps]
            for x, y in corners:
                place = (x, y, x + width, y + height)
                inside = x >= 0 and y >= 0 and place[2] <= self.full_width and place[3] <= self.height
                if inside and not _covers(place, taken):
                    return place, letter
        return None

    def _bars(self, face: Face, place: Rectangle, letter: int) -> None:
        """A bar for every probability, headed by the expression."""
        font, gap, step = _font(letter), letter // 3, 1.3 * letter
        left, top = place[0] + 2 * gap, place[1] + gap
        self.draw.rectangle(place, fill=(*GROUND, 190))
        self.draw.text((left, top + step / 2), _words(face), "white", font, anchor="lm")
        start = left + max(font.getlength(name) for name in self.names) + 2 * gap
        full = place[2] - 2 * gap - 3.5 * letter - start
        for row, (name, probability) in enumerate(face.probabilities.items(), start=1):
            middle, half = top + (row + 0.5) * step, 0.35 * letter
            self.draw.text((left, middle), name, "white", font, anchor="lm")
            self.draw.rectangle((start, middle - half, start + full, middle + half), fill=(255, 255, 255, 50))
            if probability * full >= 1:
                end = start + probability * full
                self.draw.rectangle((start, middle - half, end, middle + half), fill=self._colour(name))
            self.draw.text((place[2] - 2 * gap, middle), _percent(probability), "white", font, anchor="rm")


def annotate(image: Pixels, faces: Sequence[Face], class_names: Sequence[str]) -> Pixels:
    """(H, W, 3) uint8: the picture with its faces, see `Canvas`."""
    return Canvas(image, class_names).faces(faces)


def _words(face: Face) -> str:
    return f"{face.expression} {_percent(face.probability)}"


def _percent(probability: float) -> str:
    return f"{100 * probability:.0f} %"


def _corners(box: tuple[float, ...]) -> Rectangle:
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


def _covers(place: Rectangle, taken: Sequence[Rectangle]) -> bool:
    """Whether a place lies over one of those taken."""
    left, top, right, bottom = place
    return any(left < b[2] and b[0] < right and top < b[3] and b[1] < bottom for b in taken)


def _ink(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "white"
