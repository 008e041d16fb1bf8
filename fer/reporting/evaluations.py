"""Pictures of an evaluation: calibration before and after, accuracy by coverage, accuracy under corruption. PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fer.metrics import Array, expected_calibration_error
from fer.reporting.charts import BLUE, GREY, INK, PALE, STYLE, empty_figure, margins

DPI = 150


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def calibration_picture(
    path: Path, before: Array, after: Array | None, temperature: float, stamps: Sequence[str]
) -> None:
    """Accuracy by confidence before and after calibration, with the share of images in each bin below.

    Args:
        path: PNG to write.
        before: (B, 3) calibration bins, see `fer.metrics.calibration_bins`.
        after: the same at the fitted temperature; None where none was fitted.
        temperature: that temperature.
        stamps: what must stand beside the figure.
    """
    series = [("as predicted", before, GREY)]
    series += [(f"at temperature {temperature:.2f}", after, BLUE)] if after is not None else []
    edges = np.linspace(0, 1, len(before) + 1)
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure, foot = empty_figure(3.6, 3.3, stamps)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        upper.plot([0, 1], [0, 1], color=PALE, linewidth=1)
        for name, bins, colour in series:
            count, confidence, correct = bins.T
            used = count > 0
            label = f"{name}, ECE {100 * expected_calibration_error(bins):.1f} %"
            x, y = confidence[used] / count[used], correct[used] / count[used]
            upper.plot(x, y, "o-", color=colour, markersize=3, linewidth=1, label=label)
            lower.stairs(count / max(count.sum(), 1), edges, color=colour, linewidth=1)
        upper.legend(frameon=False, fontsize=7, loc="upper left", handlelength=1.2)
        upper.set_title(f"accuracy by confidence, n = {before[:, 0].sum():,.0f}")
        upper.set(ylim=(0, 1), xlim=(0, 1), yticks=(0, 0.5, 1))
        lower.set(xlabel="confidence", yticks=())
        lower.spines["left"].set_visible(False)
        figure.subplots_adjust(hspace=0.12)
        margins(figure, left=0.36, right=0.1, top=0.24, bottom=0.44 + foot)
        _save(figure, path)


def coverage_picture(path: Path, accuracy: Array, record: dict[str, Any], stamps: Sequence[str]) -> None:
    """Accuracy among the surest images, by their share.

    Args:
        path: PNG to write.
        accuracy: (n,) accuracy among the 1 ... n surest.
        record: see `fer.evaluation.coverage.coverage_record`.
        stamps: what must stand beside the figure.
    """
    n = len(accuracy)
    share = np.arange(1, n + 1) / n
    shown = share >= min(0.02, 1)  # a handful of images says nothing
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure, foot = empty_figure(3.6, 2.6, stamps)
        axes = figure.subplots()
        axes.plot(share[shown], 100 * accuracy[shown], color=BLUE, linewidth=1.3)
        axes.axhline(100 * accuracy[-1], color=PALE, linewidth=1)
        axes.set_title(f"accuracy by coverage, AURC {record['aurc']:.3f}, n = {n:,}")
        axes.set(xlabel="share of images answered, the surest first", ylabel="accuracy, %", xlim=(0, 1))
        margins(figure, left=0.5, right=0.1, top=0.24, bottom=0.46 + foot)
        _save(figure, path)


def robustness_picture(path: Path, record: dict[str, Any], stamps: Sequence[str]) -> None:
    """Accuracy of each corruption at each severity, the hardest corruption at the bottom.

    Args:
        path: PNG to write.
        record: see `fer.evaluation.robustness.robustness_record`.
        stamps: what must stand beside the figure.
    """
    names = sorted(record["corruptions"], key=lambda name: float(record["corruptions"][name]["drop"]))
    values = 100 * np.array([record["corruptions"][name]["acc"] for name in names])
    clean = 100 * record["clean"]["acc"]
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure, foot = empty_figure(4.6, 0.9 + 0.26 * len(names), stamps)
        axes = figure.subplots()
        axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value > 60 else INK)
        axes.set_xticks(range(values.shape[1]), [str(one) for one in record["severities"]])
        labels = [f"{name.replace('_', ' ')} (-{100 * record['corruptions'][name]['drop']:.1f})" for name in names]
        axes.set_yticks(range(len(names)), labels)
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_xlabel("severity; in brackets, mean points lost")
        axes.set_title(f"accuracy, %; untouched {clean:.1f}, n = {record['n']:,}", x=0)
        margins(figure, left=1.55, right=0.1, top=0.26, bottom=0.46 + foot)
        _save(figure, path)
