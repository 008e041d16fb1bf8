"""Pictures of what pre-training learned, drawn without a display."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from fer.metrics import Array


def pixels(image: Tensor) -> Array:
    """(..., 3, H, W) in [0, 1] -> (..., H, W, 3) for drawing."""
    return np.moveaxis(image.detach().float().clamp(0, 1).cpu().numpy(), -3, -1)


def image_grid(rows: Sequence[Tensor], names: Sequence[str], title: str) -> Figure:
    """Rows of images under each other.

    Args:
        rows: R times (N, 3, H, W) in [0, 1].
        names: R names.
        title: line above.
    """
    figure = Figure(figsize=(0.9 + 1.25 * len(rows[0]), 0.5 + 1.25 * len(rows)), layout="compressed")
    places = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for row, name, line in zip(rows, names, places, strict=True):
        for image, axes in zip(pixels(row), line, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    figure.suptitle(title, fontsize=10)
    return figure


def landmark_figure(image: Tensor, truth: Tensor, found: Tensor, title: str) -> Figure:
    """Faces with true and found landmarks.

    Args:
        image: (N, 3, H, W) in [0, 1].
        truth: (N, L, 2) in pixels, NaN where unknown.
        found: (N, L, 2) in pixels.
        title: line above.
    """
    columns = min(4, len(image))
    lines = -(-len(image) // columns)
    figure = Figure(figsize=(2.2 * columns, 0.7 + 2.2 * lines), layout="compressed")
    places = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in places:
        axes.set_axis_off()
    points = zip(truth.cpu().numpy(), found.detach().float().cpu().numpy(), strict=True)
    for axes, picture, (true, guess) in zip(places, pixels(image), points, strict=False):
        axes.imshow(picture)
        axes.scatter(*true.T, s=14, facecolors="none", edgecolors="#00e05a", linewidths=0.9, label="true")
        axes.scatter(*guess.T, s=5, color="#ff3b30", label="found")
        axes.set(xlim=(-0.5, picture.shape[1] - 0.5), ylim=(picture.shape[0] - 0.5, -0.5))
    figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure
