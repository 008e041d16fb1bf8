"""Figures for print: embedding, attention, confusion matrix, class distribution.

They fit a column or a page of a paper, with embedded fonts and colours that people with any colour vision tell apart,
each with a title, n and the data, and are saved as PDF and as PNG of 300 dpi.
"""

import io
import logging
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fer.labels import EXPRESSIONS
from fer.metrics import Array
from fer.runs import write_bytes

COLUMN, PAGE = 3.5, 7.16  # inches, of a two-column paper
DPI = 300
INK, GREY, RED = "#222222", "#8a8a8a", "#b03a2e"
# Okabe and Ito, "Color Universal Design" (2008); shapes too, for more classes than colours and for grey prints.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#b3a600")
SHAPES = "os^Dv*PX<>hp"
PARTS = {"train": "#0072b2", "val": "#e69f00", "test": "#009e73"}
_STYLE = {
    "pdf.fonttype": 42,  # whole letters, which every printer's check accepts
    "font.size": 7,
    "text.parse_math": False,  # a name with a dollar sign is a name
    "text.color": INK,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
}


class Panel(NamedTuple):
    """One network's features in the plane.

    Attributes:
        title: above it.
        points: (n, 2).
        label: (n,) classes.
        class_names: K names.
    """

    title: str
    points: Array
    label: Array
    class_names: Sequence[str]


class Shown(NamedTuple):
    """One picture beside what a network attends to in it.

    Attributes:
        image: (S, S, 3) in [0, 1].
        label, predicted: names.
        maps: by title, (H, W) of any range; each is shown from its least to its greatest value.
    """

    image: Array
    label: str
    predicted: str
    maps: Mapping[str, Array]


def save(figure: Figure, path: Path, stamps: Sequence[str] = ()) -> list[Path]:
    """Write ``<path>.pdf`` and ``<path>.png``, the same bytes each time.

    Args:
        figure: the figure.
        path: without suffix.
        stamps: sentences the figure must carry, written at its foot.
    """
    if stamps:
        lines = textwrap.wrap("; ".join(stamps), round(20 * figure.get_size_inches()[0]))
        figure.supxlabel("\n".join(lines), fontsize=6, color=RED)
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells every table it cuts from a font
    written = []
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        content = io.BytesIO()
        with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
            figure.savefig(content, format=suffix[1:], dpi=DPI, metadata=metadata)
        written.append(path.with_name(path.name + suffix))
        write_bytes(written[-1], content.getvalue())
    return written


def embedding_figure(panels: Sequence[Panel], title: str) -> Figure:
    """Features in the plane, a panel for each network side by side, coloured and shaped by class."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    width = COLUMN if columns == 1 else PAGE
    looks = _looks(list(dict.fromkeys(name for panel in panels for name in panel.class_names)))
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, 0.35 + 0.3 + rows * (width / columns + 0.12)), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for axes, panel in zip(grid, panels, strict=False):
            for k, name in enumerate(panel.class_names):
                x, y = panel.points[panel.label == k].T
                colour, shape = looks[name]
                axes.scatter(x, y, color=colour, marker=shape, s=5 if len(panel.points) > 500 else 12, linewidths=0)
            axes.set_title(panel.title)
            axes.set(xticks=(), yticks=())
            axes.set_box_aspect(1)
        handles = [
            Line2D([], [], linestyle="", markersize=4, markeredgewidth=0, label=name, color=colour, marker=shape)
            for name, (colour, shape) in looks.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4 if columns == 1 else 8, handletextpad=0.1)
        figure.suptitle(title, fontsize=7.5)
    return figure


def _looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and shape of each class: an expression has its own in every figure, other classes have what is left."""
    others = [name for name in names if name not in EXPRESSIONS]
    order = {name: place for place, name in enumerate((*EXPRESSIONS, *others))}
    return {name: (COLOURS[order[name] % len(COLOURS)], SHAPES[order[name] % len(SHAPES)]) for name in names}


def attention_figure(right: Sequence[Shown], wrong: Sequence[Shown], title: str) -> Figure:
    """Pictures, one a row, beside their maps: those named right, then those named wrong, under or beside them."""
    banks = [(said, rows) for said, rows in (("named right", right), ("named wrong", wrong)) if rows]
    heads = ["image", *banks[0][1][0].maps]
    beside = len(heads) <= 4
    side = min(1.0, (PAGE / (len(banks) if beside else 1) - 0.85) / len(heads))
    lines = [len(rows) for _, rows in banks]
    width = (0.85 + side * len(heads)) * (len(banks) if beside else 1)
    height = 0.6 + side * (max(lines) if beside else sum(lines) + 0.4)
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(max(width, COLUMN), height), layout="constrained")
        shape = (1, len(banks)) if beside else (len(banks), 1)
        parts = figure.subfigures(*shape, squeeze=False, height_ratios=None if beside else lines).ravel()
        for part, (said, rows) in zip(parts, banks, strict=True):
            part.suptitle(said, fontsize=7, color=INK if said == "named right" else RED)
            grid = part.subplots(len(rows), len(heads), squeeze=False)
            for line, shown in zip(grid, rows, strict=True):
                _attention_row(line, shown, heads)
            for axes, head in zip(grid[0], heads, strict=True):
                axes.set_title(_broken(head), fontsize=6)
        figure.suptitle("\n".join(textwrap.wrap(title, round(19 * figure.get_size_inches()[0]))), fontsize=7.5)
    return figure


def _broken(name: str) -> str:
    """A module's name in short lines, broken behind dots and underscores."""
    words = textwrap.wrap(name.replace(".", ". ").replace("_", "_ "), 13)
    return "\n".join(words).replace(". ", ".").replace("_ ", "_")


def _attention_row(line: Sequence[Axes], shown: Shown, heads: Sequence[str]) -> None:
    far = shown.image.shape[0] - 0.5
    for axes, head in zip(line, heads, strict=True):
        axes.set(xticks=(), yticks=())
        if head == "image":
            axes.imshow(shown.image)
            continue
        axes.imshow(shown.image.mean(2), cmap="gray", vmin=0, vmax=1)
        axes.imshow(
            _stretched(shown.maps[head]),
            cmap="viridis",
            vmin=0,
            vmax=1,
            alpha=0.6,
            extent=(-0.5, far, far, -0.5),
            interpolation="bilinear",
        )
    said = shown.label if shown.label == shown.predicted else f"{shown.label}\nas {shown.predicted}"
    line[0].set_ylabel(said, rotation=0, ha="right", va="center", fontsize=6.5)


def _stretched(values: Array) -> Array:
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def confusion_figure(counts: Array, class_names: Sequence[str], title: str) -> Figure:
    """Confusion matrix in a column's width: percentages of the row, numbers of images beside the names.

    Args:
        counts: (K, K), rows are labels.
        class_names: K names.
        title: above it.
    """
    counts = np.asarray(counts)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    k = len(class_names)
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(COLUMN, COLUMN * 0.98), layout="constrained")
        axes = figure.subplots()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
        for i in range(k):
            for j in range(k):
                colour = "white" if share[i, j] > 55 else INK
                axes.text(
                    j, i, f"{share[i, j]:.1f}", ha="center", va="center", fontsize=6 if k < 10 else 4.5, color=colour
                )
        axes.set_xticks(range(k), class_names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(k), [f"{name} ({n:,})" for name, n in zip(class_names, counts.sum(1), strict=True)])
        axes.tick_params(length=0)
        axes.set(xlabel="predicted, % of the row", ylabel="label (images)")
        figure.suptitle("\n".join(textwrap.wrap(title, 66)), fontsize=7.5)
    return figure


def distribution_figure(counts: Mapping[str, Mapping[str, int]], title: str) -> Figure:
    """Images of each class in each part, as shares of the part, with their numbers.

    Args:
        counts: by part (train, val, test), by class.
        title: above it.
    """
    parts = [part for part in counts if sum(counts[part].values())]
    names = list(counts[parts[0]])
    thick = 0.8 / len(parts)
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(COLUMN, 0.8 + 0.36 * len(names)), layout="constrained")
        axes = figure.subplots()
        for i, part in enumerate(parts):
            total = sum(counts[part].values())
            share = [100 * counts[part][name] / total for name in names]
            place = np.arange(len(names)) + (i - (len(parts) - 1) / 2) * thick
            bars = axes.barh(place, share, thick, color=PARTS[part], label=f"{part}, n = {total:,}", linewidth=0)
            axes.bar_label(bars, [f"{counts[part][name]:,}" for name in names], padding=1.5, fontsize=5.5)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
        axes.set(xlabel="share of the part, % (numbers: images)")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=len(parts), handlelength=1)
        figure.suptitle(title, fontsize=7.5)
    return figure
