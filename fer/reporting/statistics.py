"""Statistics over runs and over images: plain numpy and scipy, no files.

Every comparison is of a with b: a positive difference says a is better. All tests are two-sided.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from fer.metrics import Array

CONFIDENCE = 0.95
RESAMPLES = 20_000  # of an interval: the second decimal of a percentage is then no chance
AT_ONCE = 10_000_000  # counts drawn at a time
PRIOR = 0.25  # images by which the bootstrap has each model ahead in each class before it sees any


class Comparison(NamedTuple):
    """Outcome of one test.

    Attributes:
        difference: a minus b.
        low, high: 95 % interval of the difference, NaN where the test has none.
        p: two-sided p value.
    """

    difference: float
    low: float
    high: float
    p: float


def mean_interval(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean, sample standard deviation and Student's t interval of independent figures.

    Args:
        values: the figures, see `repetitions`.

    Returns:
        (mean, std with n - 1, low, high), the 95 % interval of the mean; NaN where the number of figures does not give
        it: everything without one, all but the mean with one.
    """
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    mean = float(x.mean()) if n else math.nan
    if n < 2:
        return mean, math.nan, math.nan, math.nan
    std = float(x.std(ddof=1))
    half = float(stats.t.isf((1 - CONFIDENCE) / 2, n - 1)) * std / math.sqrt(n)
    return mean, std, mean - half, mean + half


def prediction_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's t interval, 95 %, of one more figure of the kind; NaN below two.

    Source: Hahn and Meeker, Statistical Intervals (1991), section 4.7.
    """
    mean, std, *_ = mean_interval(values)
    n = len(values)
    half = float(stats.t.isf((1 - CONFIDENCE) / 2, n - 1)) * std * math.sqrt(1 + 1 / n) if n > 1 else math.nan
    return mean - half, mean + half


def repetitions(values: Mapping[tuple[int | None, int | None], float | None]) -> list[float]:
    """The figures that `mean_interval` may take for independent: of several folds one each, averaged over its seeds.

    The runs of a fold share its images and most of what else makes them differ from those of another fold; counted as
    independent they would make the interval too narrow, and narrower with every seed.

    Args:
        values: figures by seed and fold, None where a run has none (a fold may lack a class).

    Returns:
        One per fold where there are several, else one per seed.
    """
    folds: dict[int | None, list[float]] = {fold: [] for _, fold in values}
    for (_, fold), value in values.items():
        if value is not None:
            folds[fold].append(value)
    if len(folds) < 2:
        return [value for of_fold in folds.values() for value in of_fold]
    return [float(np.mean(of_fold)) for of_fold in folds.values() if of_fold]


def repeated_over(values: Iterable[tuple[int | None, int | None]]) -> str:
    """``folds`` or ``seeds``: what `repetitions` of runs, by seed and fold, repeat."""
    return "folds" if len({fold for _, fold in values}) > 1 else "seeds"


def effective_images(right: Array, person: Array) -> float:
    """How many images of as many people would tell the accuracy as well as these do: n over Kish's design effect.

    Images of one person are alike, and frames of one video nearly the same picture, so a network tends to be right
    about all of them or about none.

    Args:
        right: (n,) whether each image was named right, 0 or 1, or the mean of that over seeds.
        person: (n,) who it shows; of its own where nobody is known.

    Returns:
        n over the ratio of the accuracy's variance, as estimated between people, to that of independent images; at most
        n, and less where people are so few that this ratio is uncertain. Where all are right, or none, or there is one
        person, nothing can be estimated: then what is left if a person's answers were all the same.

    Source: Kish, Survey Sampling (1965), sections 5.4 and 8.2; for a proportion Rao and Scott, Biometrics 48 (1992),
    577-585; for few people Korn and Graubard, Survey Methodology 24 (1998), 193-201.
    """
    people, place = np.unique(person, return_inverse=True)
    n, count = len(right), len(people)
    if count == n:
        return float(n)
    off = np.asarray(right, dtype=np.float64) - np.mean(right)
    if count == 1 or not off.any():
        return float(n**2 / (np.bincount(place) ** 2).sum())
    alone = n / (n - 1) * (off**2).sum()
    together = count / (count - 1) * (np.bincount(place, off) ** 2).sum()
    few = stats.t.isf((1 - CONFIDENCE) / 2, [n - 1, count - 1])
    return float(n / max(together / alone, 1.0) * (few[0] / few[1]) ** 2)


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n images: the sampling error of a test part; NaN without images.

    n is `effective_images` where several images are of one person.

    Source: Wilson, JASA 22 (1927), 209-212.
    """
    if not n:
        return math.nan, math.nan
    z = float(stats.norm.isf((1 - CONFIDENCE) / 2))
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((share + z * z / (2 * n) + side) / (1 + z * z / n) for side in (-half, half))
    return max(low, 0.0), min(high, 1.0)


def wilson_half_width(share: float, n: float) -> float:
    """Half the width of `wilson`'s interval."""
    low, high = wilson(share, n)
    return (high - low) / 2


def newcombe(right_a: int, n_a: int, right_b: int, n_b: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares, a minus b, each of its own sample.

    Args:
        right_a: how many of a's sample are right.
        n_a: size of a's sample.
        right_b: the same for b.
        n_b: the same for b.

    Source: Newcombe, Statistics in Medicine 17 (1998), 873-890, method 10: Wilson's intervals, without continuity
    correction, put together.
    """
    a, b = right_a / n_a, right_b / n_b
    (low_a, high_a), (low_b, high_b) = (
        stats.binomtest(right, n).proportion_ci(CONFIDENCE, method="wilson")
        for right, n in ((right_a, n_a), (right_b, n_b))
    )
    return a - b - math.hypot(a - low_a, high_b - b), a - b + math.hypot(high_a - a, b - low_b)


def bootstrap_scores(
    counts: Array, seed: int, images: float | None = None
) -> tuple[tuple[float, float], tuple[float, float]]:
    """95 % percentile intervals of mean class accuracy and macro F1 over images drawn with replacement.

    Both depend on the confusion counts alone, and drawing images is drawing their cells. Where several are of one
    person, drawing fewer is an approximation: it takes people to matter in each class as they do in all together.

    Args:
        counts: (K, K), rows are labels; means over several runs need not be whole.
        seed: of the drawing.
        images: how many are drawn, `effective_images` where several are of one person; None: all.
    """
    k, total = len(counts), counts.sum()
    n = max(round(total if images is None else images), 1)
    drawn = np.random.default_rng(seed).multinomial(n, (counts / total).ravel(), size=RESAMPLES).reshape(-1, k, k)
    hits = drawn.diagonal(axis1=1, axis2=2)
    support, predicted = drawn.sum(2), drawn.sum(1)
    with np.errstate(invalid="ignore"):
        recall, f1 = hits / support, 2 * hits / (support + predicted)
    # A class that does not come in a sample is left out of its mean, as in `fer.metrics.scores`.
    spread = [np.quantile(np.nanmean(values, axis=1), [0.025, 0.975]) for values in (recall, f1)]
    (low, high), (f1_low, f1_high) = ((float(a), float(b)) for a, b in spread)
    return (low, high), (f1_low, f1_high)


def _sums(weights: Array) -> Array:
    """(sum + 1,) chance of every sum of whole numbers of which each counts with probability one half."""
    chance = np.ones(1)
    for weight, times in zip(*np.unique(weights, return_counts=True), strict=True):
        alike = np.zeros(weight * times + 1)
        # scipy takes longer for one coin than for all the rest.
        alike[::weight] = stats.binom.pmf(np.arange(times + 1), times, 0.5) if times > 1 else 0.5
        chance = np.convolve(chance, alike)
    return chance


def _people(person: Array | None, n: int) -> tuple[int, Array]:
    """How many there are, and (n,) their numbers; None: each image is of another one."""
    if person is None:
        return n, np.arange(n)
    names, place = np.unique(person, return_inverse=True)
    return len(names), place


def mcnemar(right_a: Array, right_b: Array, person: Array | None = None) -> Comparison:
    """McNemar's test on the same images, exact whatever their number; a person's images fall to one side together.

    Were the two alike, what a person's images say for a they would as likely say for b. With one image a person that
    is McNemar's test by the binomial distribution. With several, whose answers hang together, McNemar's own takes them
    for independent and rejects too often (measured in tests/test_statistics.py).

    Args:
        right_a: (n,) bool, whether a classified each image correctly.
        right_b: (n,) bool, the same for b.
        person: (n,) who each image shows; None: someone else each time.

    Source: McNemar, Psychometrika 12 (1947), 153-157; the randomisation test of paired differences, here of people's
    sums: Fisher, The Design of Experiments (1935), section 21.
    """
    a, b = np.asarray(right_a, dtype=bool), np.asarray(right_b, dtype=bool)
    count, place = _people(person, len(a))
    balance = np.rint(np.bincount(place, a.astype(float) - b.astype(float), minlength=count)).astype(np.int64)
    chance, for_a = _sums(np.abs(balance[balance != 0])), int(balance[balance > 0].sum())
    tail = min(chance[: for_a + 1].sum(), chance[for_a:].sum())
    return Comparison(float(balance.sum() / len(a)), math.nan, math.nan, min(1.0, 2 * float(tail)))


def paired_bootstrap(
    right_a: Array,
    right_b: Array,
    label: Array,
    resamples: int,
    seed: int,
    prior: float = PRIOR,
    person: Array | None = None,
) -> Comparison:
    """Bootstrap over people of the difference in mean class accuracy; with one label for all, in accuracy.

    People are drawn with replacement and bring all their images, both models always the same ones, so a class may come
    rarer or more often; one that does not come is left out of the mean, as in `fer.metrics.scores`. Where few images of
    a class were seen, and the models agree on all of them, the plain bootstrap takes their difference there for certain
    and rejects too often; ``prior`` images either way in each class, each of a person of its own, mend that (measured
    in tests/test_statistics.py).

    Args:
        right_a: (n,) whether a is right on each image, 0 or 1, or the mean of that over its seeds.
        right_b: (n,) the same for b.
        label: (n,) class of each image.
        resamples: bootstrap samples.
        seed: seed of the drawing.
        prior: images added to each class in which only a is right, and the same for b.
        person: (n,) who each image shows; None: someone else each time, so that images are drawn.

    Returns:
        The difference with its percentile interval; p is twice the smaller share of samples on one side of zero.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8, 13 and 15.
    """
    d = np.asarray(right_a, dtype=np.float64) - np.asarray(right_b, dtype=np.float64)
    names, place = np.unique(label, return_inverse=True)
    (people, who), classes = _people(person, len(d)), len(names)
    # Whose images have the same classes and differences are alike: how many of each kind come is drawn.
    if people == len(d):
        kinds, count = np.unique(np.stack([place, np.round(d, 9)], axis=1), axis=0, return_counts=True)
        support = np.eye(classes)[kinds[:, 0].astype(int)]
        gain = support * kinds[:, 1:]
    else:
        cell, size = who * classes + place, people * classes
        tables = [np.bincount(cell, weight, minlength=size).reshape(people, -1) for weight in (np.ones(len(d)), d)]
        kinds, count = np.unique(np.round(np.hstack(tables), 9), axis=0, return_counts=True)
        support, gain = np.hsplit(kinds, 2)
    one = np.eye(classes).repeat(2, axis=0)
    support, gain = np.vstack([support, one]), np.vstack([gain, one * np.tile([-1.0, 1.0], classes)[:, None]])
    weight = np.concatenate([count, np.full(len(one), prior)])
    generator, parts = np.random.default_rng(seed), []
    for start in range(0, resamples, chunk := max(AT_ONCE // len(weight), 1)):
        size = min(chunk, resamples - start)
        drawn = generator.multinomial(people, weight / weight.sum(), size=size)
        came, gained = drawn @ support, drawn @ gain
        per_class = np.divide(gained, came, out=np.zeros_like(gained), where=came > 0)
        parts.append(np.round(per_class.sum(1) / (came > 0).sum(1), 12))  # a tie is zero, whatever the order of the sum
    sampled = np.concatenate(parts)
    low, high = np.quantile(sampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    tail = min((sampled <= 0).sum(), (sampled >= 0).sum())
    seen = float(np.mean(np.bincount(place, d) / np.bincount(place)))
    return Comparison(seen, float(low), float(high), min(1.0, 2 * float(tail + 1) / (resamples + 1)))


def corrected_t(differences: Sequence[float], test_to_train: float) -> Comparison:
    """Corrected resampled t-test over the folds of a cross-validation, whose training parts overlap.

    Args:
        differences: a minus b, one per fold, at least 2.
        test_to_train: images of a fold's test part over images of its training part.

    Source: Nadeau and Bengio, Machine Learning 52 (2003), 239-281, eq. 6 and 8.
    """
    d = np.asarray(differences, dtype=np.float64)
    mean, spread = float(d.mean()), float(d.std(ddof=1)) * math.sqrt(1 / len(d) + test_to_train)
    half = float(stats.t.isf((1 - CONFIDENCE) / 2, len(d) - 1)) * spread
    if spread == 0:
        return Comparison(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    return Comparison(mean, mean - half, mean + half, 2 * float(stats.t.sf(abs(mean) / spread, len(d) - 1)))


def wilcoxon(differences: Sequence[float]) -> Comparison:
    """Wilcoxon's signed-rank test over data sets; the ranks of equal results are divided between the two.

    Args:
        differences: a minus b, one per data set. Below 6 data sets no outcome is significant at 5 %.

    Returns:
        The median difference and the exact p value, ties or not (scipy's is approximate with ties).

    Source: Demsar, JMLR 7 (2006), section 3.1.3.
    """
    d = np.asarray(differences, dtype=np.float64)
    d = np.round(d, 12)  # differences that are equal but for rounding are ties
    # Ties make ranks of halves; twice a rank is whole. Zeros are shared out, so they do not move the balance.
    ranks = np.round(2 * stats.rankdata(np.abs(d))).astype(int)
    for_a, chance = int(ranks[d > 0].sum()), _sums(ranks[d != 0])  # each rank falls to either side
    tail = min(chance[: for_a + 1].sum(), chance[for_a:].sum())
    return Comparison(float(np.median(d)), math.nan, math.nan, min(1.0, 2 * float(tail)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: compared with 5 %, they keep the chance of any false alarm in the family at 5 %.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979), 65-70.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1.0)
    return [float(value) for value in adjusted]
