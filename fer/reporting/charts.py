"""Charts of the report: results beside claims, learning curves, reliability. Drawn as SVG, a few kilobytes each."""

import io
import textwrap
from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fer.metrics import Array, expected_calibration_error
from fer.reporting.benches import Bench
from fer.reporting.claims import Beside

INK, GREY, PALE, BLUE, RED = "#222222", "#8a8a8a", "#d9d9d9", "#2b5f9e", "#b03a2e"
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fer",  # the same chart gives the same bytes
    "font.size": 8.5,
    "text.parse_math": False,  # a name with a dollar sign is a name
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": INK,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


def svg(figure: Figure) -> str:
    """A figure as an SVG text that is the same each time."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def empty_figure(width: float, height: float, stamps: Sequence[str]) -> tuple[Figure, float]:
    """An empty figure, in inches, with stamps at its foot (it may be looked at alone) and the height they take."""
    lines = textwrap.wrap("; ".join(stamps), round(19 * width))
    foot = 0.13 * len(lines)
    figure = Figure(figsize=(width, height + foot))
    figure.text(0.01, 0.01, "\n".join(lines), color=RED, fontsize=6.5, va="bottom")
    return figure, foot


def margins(figure: Figure, left: float, right: float, top: float, bottom: float) -> None:
    """Set the margins around the axes, in inches."""
    width, height = figure.get_size_inches()
    figure.subplots_adjust(left=left / width, right=1 - right / width, top=1 - top / height, bottom=bottom / height)


def overview(bench: Bench, claims: Sequence[Beside]) -> str:
    """Accuracy of each group with its 95 % interval, and what papers claim for its model beside it."""
    groups = bench.ranked
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        apart = [f"{group.label}: {'; '.join(group.stamps)}" for group in groups if bench.apart(group)]
        figure, foot = empty_figure(7.6, 0.62 + 0.27 * len(groups), [*bench.shared_stamps, *apart])
        axes = figure.subplots()
        for place, group in enumerate(groups):
            mean, _, low, high = (100 * value for value in group.interval("acc"))
            colour = GREY if bench.apart(group) else BLUE
            axes.plot([low, high], [place, place], color=colour, linewidth=1.4, solid_capstyle="butt")
            each = [100 * value for value in group.values("acc")]
            axes.plot(each, [place] * len(each), "|", color=colour, markersize=5, alpha=0.5)
            axes.plot(mean, place, "o", color=colour, markersize=4.5)
            for one in claims:
                if one.group is group:
                    mark = "x" if one.claim.void else "D"
                    axes.plot(
                        one.claim.acc, place, mark, color=INK, markersize=4, fillstyle="none", markeredgewidth=0.8
                    )
        names = ["\n".join(textwrap.wrap(group.label, 44, max_lines=2, placeholder=" …")) for group in groups]
        axes.set_yticks(range(len(groups)), names, fontsize=7.5)
        for text, group in zip(axes.get_yticklabels(), groups, strict=True):
            text.set_color(GREY if bench.apart(group) else INK)
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=PALE, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.set_xlabel("accuracy, %")
        margins(figure, left=3.0, right=0.1, top=0.08, bottom=0.46 + foot)
    return svg(figure)


def curves(tables: Sequence[pd.DataFrame], best: Sequence[int], stamps: Sequence[str]) -> str:
    """Accuracy and loss by epoch: mean over the runs, smallest to largest as a band, chosen epochs as ticks.

    Args:
        tables: ``metrics.csv`` of each run.
        best: the chosen epoch of each run, from 0.
        stamps: what must stand beside the figure.
    """
    panels = (
        ("accuracy, %", 100.0, (("train/acc", "train", GREY), ("val/mean_acc", "validation, mean class", BLUE))),
        ("loss", 1.0, (("train/loss", "train", GREY), ("val/loss", "validation", BLUE))),
    )
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure, foot = empty_figure(6.4, 2.3, stamps)
        both: tuple[Axes, Axes] = figure.subplots(1, 2)
        for axes, (title, factor, lines) in zip(both, panels, strict=True):
            for column, name, colour in lines:
                found = [t.set_index("epoch")[column] for t in tables if column in t]
                if not found:
                    continue
                table = factor * pd.concat(found, axis=1).sort_index()
                epoch = table.index.to_numpy() + 1
                single = {"marker": "o", "markersize": 3} if len(epoch) == 1 else {}
                axes.plot(epoch, table.mean(axis=1), color=colour, linewidth=1.3, label=name, **single)  # type: ignore[arg-type]
                if len(found) > 1:
                    axes.fill_between(
                        epoch, table.min(axis=1), table.max(axis=1), color=colour, alpha=0.18, linewidth=0
                    )
            axes.set_title(title)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if axes.lines:
                for value in sorted(set(best)):
                    axes.axvline(value + 1, ymax=0.035, color=INK, linewidth=0.9)
                axes.legend(frameon=False, fontsize=7.5, handlelength=1.2, loc="best")
            else:
                axes.set_title(f"{title}: not trained here, only evaluated")
        figure.subplots_adjust(wspace=0.16)
        margins(figure, left=0.42, right=0.06, top=0.23, bottom=0.44 + foot)
    return svg(figure)


def reliability(bins: Array, stamps: Sequence[str]) -> str:
    """Accuracy by confidence, with the share of images in each bin below.

    Args:
        bins: (B, 3) calibration bins, see `fer.metrics.calibration_bins`.
        stamps: what must stand beside the figure.
    """
    count, confidence, correct = bins.T
    used = count > 0
    edges = np.linspace(0, 1, len(bins) + 1)
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure, foot = empty_figure(3.0, 2.9, stamps)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        upper.plot([0, 1], [0, 1], color=PALE, linewidth=1)
        x, y = confidence[used] / count[used], correct[used] / count[used]
        upper.plot(x, y, "o-", color=BLUE, markersize=3, linewidth=1)
        upper.set_title(f"accuracy by confidence, ECE {100 * expected_calibration_error(bins):.1f} %")
        upper.set(ylim=(0, 1), xlim=(0, 1), yticks=(0, 0.5, 1))
        lower.bar(edges[:-1], count / max(count.sum(), 1), 1 / len(bins), align="edge", color=PALE)
        lower.set(xlabel="confidence", yticks=())
        lower.spines["left"].set_visible(False)
        figure.subplots_adjust(hspace=0.12)
        margins(figure, left=0.33, right=0.09, top=0.23, bottom=0.44 + foot)
    return svg(figure)
