"""Pictures of detections: boxes with their label and confidence, above them the truth."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fer.detection_metrics import Image, match
from fer.metrics import Array

RIGHT, WRONG, TRUE = "#2ca02c", "#d62728", "#1f77b4"


def detections_figure(
    pixels: Sequence[Array], images: Sequence[Image], class_names: Sequence[str], least: float
) -> Figure:
    """Three rows, as in figure 3 of Lin 2025: the images, what is known, what was found.

    A found box is green where it lies on a known one of its class, else red.

    Args:
        pixels: (H, W, 3) uint8 images.
        images: what is known and was found in each.
        class_names: K names.
        least: confidence from which on a found box is drawn.
    """
    columns = len(pixels)
    figure = Figure(figsize=(2.4 * columns + 0.4, 7.6), layout="constrained")
    axes = figure.subplots(3, columns, squeeze=False)
    for column, (picture, image) in enumerate(zip(pixels, images, strict=True)):
        for row in axes[:, column]:
            row.imshow(picture)
            row.set(xticks=[], yticks=[])
        for box, label in zip(image.true_boxes, image.true_labels, strict=True):
            _draw(axes[1, column], box, class_names[label], TRUE)
        for box, label, score, good in zip(image.boxes, image.labels, image.scores, _right(image), strict=True):
            if score >= least:
                _draw(axes[2, column], box, f"{class_names[label]} {score:.2f}", RIGHT if good else WRONG)
    for row, title in zip(axes[:, 0], ("image", "truth", f"found, confidence from {least:g} on"), strict=True):
        row.set_ylabel(title, fontsize=9)
    return figure


def _right(image: Image) -> list[bool]:
    """For each found box, whether it takes a known one of its own class."""
    taken = match(image.boxes, image.true_boxes)
    return [t >= 0 and image.true_labels[t] == label for t, label in zip(taken, image.labels, strict=True)]


def _draw(axes: Any, box: Array, text: str, colour: str) -> None:
    x, y, right, bottom = box
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), right - x, bottom - y, fill=False, edgecolor=colour, linewidth=1.5))
    axes.text(
        x - 0.5,
        max(y - 1.5, 1),
        text,
        fontsize=7,
        color="white",
        va="bottom" if y > 8 else "top",
        clip_on=True,
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.9},
    )
