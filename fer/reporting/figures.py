"""Pictures made from counts: drawn without a display, saved by the caller."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from fer.metrics import Array


def confusion_figure(counts: Array, class_names: Sequence[str], title: str, stamps: Sequence[str] = ()) -> Figure:
    """Confusion matrix with counts and row percentages; rows are labels, columns predictions.

    Args:
        counts: (K, K) counts.
        class_names: K names.
        title: line above the picture.
        stamps: sentences the picture must carry, below it.
    """
    counts = np.asarray(counts)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    k = len(class_names)
    figure = Figure(figsize=(1.6 + 0.85 * k, 1.1 + 0.75 * k), layout="compressed")
    axes = figure.subplots()
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i in range(k):
        for j in range(k):
            colour = "white" if share[i, j] > 0.55 else "black"
            text = f"{100 * share[i, j]:.1f} %\n{counts[i, j]}"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(k), class_names, rotation=35, ha="right")
    axes.set_yticks(range(k), [f"{name} ({n})" for name, n in zip(class_names, counts.sum(1), strict=True)])
    axes.set(xlabel="predicted", ylabel="label (images)", title=title)
    figure.colorbar(picture, ax=axes, label="share of the row", shrink=0.8)
    if stamps:
        lines = textwrap.wrap("; ".join(stamps), width=16 * k)  # characters that fit below K columns
        figure.supxlabel("\n".join(lines), fontsize=8, color="firebrick")
    return figure
