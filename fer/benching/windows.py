"""Interleaved windows: every variant is timed in every round, so that a load on the machine meets all of them.

    variants -> interleave -> Windows -> compare -> Row

Absolute times of a shared machine mean little; the ratio within a round, taken over many rounds, does. Its median comes
with its quartiles and a 95 % interval from order statistics (the binomial test of the median turned round), which
assumes nothing about how times are distributed.
"""

import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
from scipy.stats import quantile_test

Clock = Literal["cpu", "wall"]


@dataclass(frozen=True)
class Bench:
    """What a part is given.

    Attributes:
        windows: rounds to time, after one to warm up.
        threads: CPU threads; torch's are set already.
        folder: an empty folder for whatever the part writes.
        options: the part's node of ``conf/bench.yaml``.
    """

    windows: int
    threads: int
    folder: Path
    options: dict[str, Any]


@dataclass
class Times:
    """Seconds of one window: of this process and its finished children's processors, and on the clock on the wall.

    Attributes:
        steps: what the window did so often; times are compared per step.
    """

    cpu: float = 0.0
    wall: float = 0.0
    steps: int = 1


@contextmanager
def timed(steps: int = 1) -> Iterator[Times]:
    """Time a block; the times are known when it has ended."""
    times = Times(steps=steps)
    cpu, wall = cpu_now(), time.perf_counter()
    yield times
    times.cpu, times.wall = cpu_now() - cpu, time.perf_counter() - wall


def cpu_now() -> float:
    """Seconds of the processors this process and its finished children have used."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


Variant = Callable[[], Times]  # runs one window
Windows = dict[str, list[Times]]  # the times of each variant, round by round


def interleave(variants: Mapping[str, Variant], rounds: int, *, warm_up: bool = True) -> Windows:
    """Run one window of every variant in each round, beginning with another one each time.

    Args:
        variants: what runs one window, by name.
        rounds: windows of each that are kept.
        warm_up: run one round before them; processes of their own need none.
    """
    names = list(variants)
    windows: Windows = {name: [] for name in names}
    for number in range(-1 if warm_up else 0, rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            times = variants[name]()
            if number >= 0:
                windows[name].append(times)
    return windows


class Spread(TypedDict):
    """Where a figure lies over the rounds.

    Attributes:
        median: of the figure.
        q1: its lower quartile.
        q3: its upper quartile.
        lo: lower end of the median's 95 % interval, None where there are too few rounds for one.
        hi: the upper end likewise.
        n: rounds.
    """

    median: float
    q1: float
    q3: float
    lo: float | None
    hi: float | None
    n: int


class Verdict(TypedDict):
    """What was to be reached.

    Attributes:
        goal: ``at most 1.03``, ``at least 4``; None for a figure without one.
        holds: whether the median meets it.
    """

    goal: str | None
    holds: bool | None


class Row(Spread, Verdict):
    """One line of a part's table; JSON.

    Attributes:
        name: what was measured.
        unit: of ``value`` and ``baseline_value``, and of a difference.
        value: median over the rounds.
        baseline: what it is compared with; None for a figure that stands alone.
        baseline_value: its median.
        figure: what the spread is of: ``ratio`` (value / baseline), ``difference`` (value - baseline) or ``value``.
        note: what a reader must know besides.
        details: further plain values, not shown in the table.
    """

    name: str
    unit: str
    value: float
    baseline: str | None
    baseline_value: float | None
    figure: Literal["ratio", "difference", "value"]
    note: str
    details: dict[str, Any]


def compare(
    name: str,
    windows: Windows,
    variant: str,
    baseline: str,
    *,
    figure: Literal["ratio", "difference"] = "ratio",
    clock: Clock = "cpu",
    at_most: float | None = None,
    at_least: float | None = None,
    unit: str = "ms",
    note: str = "",
) -> Row:
    """One variant beside its baseline, compared round by round.

    Args:
        name: what was measured, for the table.
        windows: what `interleave` returned.
        variant: the name in it of what is judged.
        baseline: the name of what it is judged beside.
        figure: what is taken within each round.
        clock: seconds of the processors or of the wall clock.
        at_most: the goal for the figure's median, if it is an upper one.
        at_least: the goal, if it is a lower one.
        unit: ``s``, ``ms`` or ``us`` per step, or ``1/s`` for steps per second.
        note: what a reader must know besides.
    """
    ours, theirs = (_per_step(windows[who], clock, unit) for who in (variant, baseline))
    figures = ours / theirs if figure == "ratio" else ours - theirs
    spread = _spread(figures)
    return {
        "name": name,
        "unit": unit,
        "value": float(np.median(ours)),
        "baseline": baseline,
        "baseline_value": float(np.median(theirs)),
        "figure": figure,
        **spread,
        **_judged(spread["median"], "" if figure == "ratio" else f" {unit}", at_most, at_least),
        "note": note,
        "details": {},
    }


def alone(
    name: str,
    values: list[float],
    unit: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    note: str = "",
) -> Row:
    """A figure that is compared with nothing but its goal.

    Args:
        name: what was measured, for the table.
        values: one of each round.
        unit: of the values.
        at_most: the goal for their median, if it is an upper one.
        at_least: the goal, if it is a lower one.
        note: what a reader must know besides.
    """
    spread = _spread(np.asarray(values, dtype=float))
    return {
        "name": name,
        "unit": unit,
        "value": spread["median"],
        "baseline": None,
        "baseline_value": None,
        "figure": "value",
        **spread,
        **_judged(spread["median"], f" {unit}", at_most, at_least),
        "note": note,
        "details": {},
    }


_PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6}


def _per_step(times: list[Times], clock: Clock, unit: str) -> Any:
    seconds = np.array([(t.cpu if clock == "cpu" else t.wall) / t.steps for t in times])
    return 1 / seconds if unit == "1/s" else seconds * _PER_SECOND[unit]


def _spread(figures: Any) -> Spread:
    low, high = (float(end) for end in quantile_test(figures).confidence_interval())
    q1, middle, q3 = (float(q) for q in np.quantile(figures, [0.25, 0.5, 0.75]))
    return {
        "median": middle,
        "q1": q1,
        "q3": q3,
        "lo": low if math.isfinite(low) else None,
        "hi": high if math.isfinite(high) else None,
        "n": len(figures),
    }


def _judged(median: float, unit: str, at_most: float | None, at_least: float | None) -> Verdict:
    if at_most is not None:
        return {"goal": f"at most {at_most:g}{unit}", "holds": median <= at_most}
    if at_least is not None:
        return {"goal": f"at least {at_least:g}{unit}", "holds": median >= at_least}
    return {"goal": None, "holds": None}
