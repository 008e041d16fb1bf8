"""Statistics over runs: plain numpy and scipy, no files."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


def mean_interval(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean, sample standard deviation and Student's t interval of a group of runs.

    Args:
        values: one figure per run.

    Returns:
        (mean, std with n - 1, low, high), the 95 % interval of the mean; NaN where the number of runs does not give
        it: everything without a run, all but the mean with one.
    """
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    mean = float(x.mean()) if n else math.nan
    if n < 2:
        return mean, math.nan, math.nan, math.nan
    std = float(x.std(ddof=1))
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * std / math.sqrt(n)
    return mean, std, mean - half, mean + half
