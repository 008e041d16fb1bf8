"""The statistics: published worked examples, and how often they are wrong where nothing is to be found."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from fer.reporting.statistics import (
    bootstrap_scores,
    corrected_t,
    effective_images,
    holm,
    mcnemar,
    mean_interval,
    newcombe,
    paired_bootstrap,
    prediction_interval,
    repeated_over,
    repetitions,
    wilcoxon,
    wilson,
    wilson_half_width,
)

SIMULATIONS = 2000
LEVEL = 0.05
# More rejections than this among 2,000 happen by chance once in a hundred where the level is kept.
MOST = int(stats.binom.isf(0.01, SIMULATIONS, LEVEL))

# -- published worked examples ------------------------------------------------------------------------------------


def test_mean_interval_of_students_sleep_data() -> None:
    # Student, The probable error of a mean, Biometrika 6 (1908), hours of sleep gained; the interval is the one R's
    # manual prints for t.test on these data: 0.7001142 to 2.4598858 around 1.58.
    gained = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    mean, std, low, high = mean_interval(gained)
    assert (mean, low, high) == pytest.approx((1.58, 0.7001142, 2.4598858), abs=1e-7)
    assert std == pytest.approx(1.23, abs=0.005)


@pytest.mark.parametrize(("values", "known"), [([], 0), ([0.5], 1), ([0.5, 0.5], 4)])
def test_mean_interval_says_only_what_the_runs_can(values: list[float], known: int) -> None:
    assert [math.isfinite(value) for value in mean_interval(values)] == [True] * known + [False] * (4 - known)


def test_seeds_of_a_fold_are_averaged_before_anything_else() -> None:
    runs = {(0, 0): 0.5, (1, 0): 0.7, (0, 1): 0.9, (0, 2): None}
    assert (repetitions(runs), repeated_over(runs)) == ([pytest.approx(0.6), 0.9], "folds")
    assert (repetitions({(0, None): 0.5, (1, None): 0.7}), repeated_over({(0, None), (1, None)})) == (
        [0.5, 0.7],
        "seeds",
    )
    assert repetitions({(0, 4): 0.5, (1, 4): 0.7}) == [0.5, 0.7]  # one fold of several: what varies are the seeds
    assert repetitions({(0, 0): 0.5, (1, 0): 0.7, (0, 1): None}) == [pytest.approx(0.6)]  # a class that one fold has


def test_wilson_interval_of_newcombe() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I: 81 of 263, score interval 0.2553 to 0.3662.
    assert wilson_half_width(81 / 263, 263) == pytest.approx((0.3662 - 0.2553) / 2, abs=1e-4)
    assert math.isnan(wilson_half_width(0.5, 0))


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [((56, 70, 48, 80), 0.0524, 0.3339), ((9, 10, 3, 10), 0.1705, 0.8090), ((5, 56, 0, 29), -0.0381, 0.1926)],
)
def test_difference_of_shares_of_newcombe(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    # Newcombe, Statistics in Medicine 17 (1998), 873-890, table II, method 10.
    assert newcombe(*counts) == pytest.approx((low, high), abs=5e-5)


def test_mcnemar_of_fay() -> None:
    # Fay, Two-sided exact tests and matching confidence intervals for discrete data, R Journal 2 (2010), 53-58, and
    # exact2x2's vignette: the table 21, 9, 2, 12 gives p = 0.06543.
    a = np.repeat([True, True, False, False], [21, 9, 2, 12])
    b = np.repeat([True, False, True, False], [21, 9, 2, 12])
    assert mcnemar(a, b).p == pytest.approx(0.06543, abs=5e-6)
    assert mcnemar(a, b).difference == pytest.approx(7 / 44)
    assert mcnemar(a, a).p == 1.0


def test_bootstrap_of_efron_and_tibshirani() -> None:
    # Efron and Tibshirani, An Introduction to the Bootstrap (1993), table 2.2: the mean survival of the seven treated
    # mice has a bootstrap standard error of 23.36 with infinitely many samples.
    mice = np.array([94, 197, 16, 38, 99, 141, 23])
    result = paired_bootstrap(mice, 0 * mice, 0 * mice, resamples=40_000, seed=0, prior=0)
    assert result.difference == pytest.approx(86.86, abs=0.005)
    assert (result.high - result.low) / (2 * 1.96) == pytest.approx(23.36, rel=0.02)


def test_bootstrap_of_mean_class_accuracy_equals_one_written_out() -> None:
    rng = np.random.default_rng(3)
    label = np.repeat([0, 1, 2], [50, 20, 8])
    a, b = rng.random(len(label)) < 0.8, rng.random(len(label)) < 0.7
    result = paired_bootstrap(a, b, label, resamples=20_000, seed=1, prior=0)
    drawn = []
    for rows in rng.integers(0, len(label), (20_000, len(label))):
        d, y = a[rows].astype(int) - b[rows], label[rows]
        drawn.append(np.mean([d[y == k].mean() for k in np.unique(y)]))
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)
    assert result.difference == pytest.approx(
        np.mean([(a[label == k].mean() - b[label == k].mean()) for k in range(3)])
    )


def test_bootstrap_is_repeatable_and_takes_means_over_seeds() -> None:
    label = np.arange(60) % 3
    a, b = np.linspace(0, 1, 60), np.full(60, 0.4)
    assert paired_bootstrap(a, b, label, 500, seed=4) == paired_bootstrap(a, b, label, 500, seed=4)
    assert paired_bootstrap(a, b, label, 500, seed=4) != paired_bootstrap(a, b, label, 500, seed=5)


def test_corrected_t_of_scikit_learns_example() -> None:
    # scikit-learn, "Statistical comparison of models using grid search": 10 times 10-fold cross-validation of two
    # kernels on 100 points prints a corrected t of 0.750 and a one-sided p of 0.227 (uncorrected 2.611 and 0.005).
    # These are its 100 differences in ROC AUC, by value.
    d = np.repeat([-0.12, -0.08, -0.04, 0.0, 0.04, 0.08, 0.2], [1, 2, 10, 53, 29, 4, 1])
    assert d.mean() / (d.std(ddof=1) / 10) == pytest.approx(2.611, abs=5e-4)
    result = corrected_t(d, 10 / 90)
    assert result.p / 2 == pytest.approx(0.227, abs=5e-4)
    half = (result.high - result.low) / 2
    assert result.difference / (half / stats.t.isf(0.025, 99)) == pytest.approx(0.750, abs=5e-4)


def test_corrected_t_without_spread() -> None:
    assert corrected_t([0.0, 0.0], 0.25).p == 1.0
    assert corrected_t([0.1, 0.1], 0.25).p == 0.0


def test_wilcoxon_of_darwins_maize() -> None:
    # Darwin's fifteen pairs of maize plants, Fisher, The Design of Experiments (1935), section 17; scipy's manual gives
    # p = 0.041259765625 for them.
    pairs = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert wilcoxon(pairs).p == pytest.approx(0.041259765625, rel=1e-12)


def test_wilcoxon_of_demsar() -> None:
    # Demsar, JMLR 7 (2006), table 2: C4.5+m minus C4.5 on 14 data sets, with ties and two zeros, R+ = 93 and R- = 12,
    # below the critical value of 21, so significant at 5 %. The exact p value is counted here sign by sign.
    d = np.array([5, -8, 17, 33, 6, -5, 7, 0, 63, 0, 22, 47, 9, 21]) / 1000
    ranks = stats.rankdata(np.abs(np.round(d, 6)))
    against = ranks[d < 0].sum() + ranks[d == 0].sum() / 2
    assert (against, ranks.sum() - against) == (12, 93)
    other = ranks[d != 0]
    sums = np.array(list(itertools.product([0, 1], repeat=len(other)))) @ other
    assert wilcoxon(d).p == pytest.approx(2 * np.mean(sums <= ranks[d < 0].sum()))
    assert wilcoxon(d).p < LEVEL
    assert wilcoxon(d).difference == pytest.approx(np.median(d))
    assert wilcoxon([0.0, 0.0]).p == 1.0


def test_five_data_sets_are_too_few_for_wilcoxon() -> None:
    assert wilcoxon([1, 2, 3, 4, 5]).p > LEVEL
    assert wilcoxon([1, 2, 3, 4, 5, 6]).p < LEVEL


def test_holm_of_pingouin() -> None:
    # The example of pingouin's manual for multiple comparisons by Holm's method.
    assert holm([0.50, 0.003, 0.32, 0.054, 0.0003]) == pytest.approx([0.64, 0.012, 0.64, 0.162, 0.0015])
    assert holm([]) == []


# -- nominal level and power --------------------------------------------------------------------------------------

SHARES = np.array([0.04, 0.05, 0.06, 0.4, 0.2, 0.15, 0.1])  # classes about as uneven as RAF-DB's
EASE = np.array([0.65, 0.55, 0.75, 0.92, 0.85, 0.82, 0.85])


def images(rng: np.random.Generator, n: int, gain: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, and where a and b are right: b as likely in each class as a less ``gain``, often on the same images."""
    label = rng.choice(7, n, p=SHARES)
    together = rng.random(n) < 0.6
    luck = rng.random(n)
    a = np.where(together, luck, rng.random(n)) < EASE[label]
    b = np.where(together, luck, rng.random(n)) < EASE[label] - gain
    return label, a, b


def by_mcnemar(rng: np.random.Generator, gain: float) -> float:
    _, a, b = images(rng, 300, gain)
    return mcnemar(a, b).p


def by_bootstrap(rng: np.random.Generator, gain: float) -> float:
    label, a, b = images(rng, 300, gain)
    return paired_bootstrap(a, b, 0 * label, 199, int(rng.integers(1 << 30))).p


def by_class_bootstrap(rng: np.random.Generator, gain: float) -> float:
    label, a, b = images(rng, 300, gain)
    return paired_bootstrap(a, b, label, 199, int(rng.integers(1 << 30))).p


PEOPLE = np.arange(110).repeat(3)  # three frames of each, nearly the same picture


def frames(rng: np.random.Generator, gain: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three frames of each of 110 people; on one in thirty a network's answer is another than on most."""
    label, *right = images(rng, 110, gain)
    other = [rng.random(len(PEOPLE)) < 1 / 30 for _ in right]
    return label[PEOPLE], *(one[PEOPLE] ^ moved for one, moved in zip(right, other, strict=True))


def by_mcnemar_of_people(rng: np.random.Generator, gain: float) -> float:
    _, a, b = frames(rng, gain)
    return mcnemar(a, b, PEOPLE).p


def by_class_bootstrap_of_people(rng: np.random.Generator, gain: float) -> float:
    label, a, b = frames(rng, gain)
    return paired_bootstrap(a, b, label, 199, int(rng.integers(1 << 30)), person=PEOPLE).p


def by_corrected_t(rng: np.random.Generator, gain: float) -> float:
    """Two nearest-mean classifiers in 10-fold cross-validation, each with a feature of its own."""
    label = np.arange(200) % 2
    x = rng.normal(size=(200, 2)) + (2 * label[:, None] - 1) * np.array([0.6 + 5 * gain, 0.6])
    fold = rng.permutation(200) % 10
    inside = np.array([[((fold != k) & (label == c)) for c in (0, 1)] for k in range(10)])  # (10, 2, 200)
    means = inside @ x / inside.sum(2, keepdims=True)  # (10, 2, 2)
    nearer = np.abs(x[None] - means[:, 1, None]) < np.abs(x[None] - means[:, 0, None])
    right = nearer[fold, np.arange(200)] == label[:, None].astype(bool)
    score = np.array([right[fold == k].mean(0) for k in range(10)])
    return corrected_t(score[:, 0] - score[:, 1], 20 / 180).p


def by_wilcoxon(rng: np.random.Generator, gain: float) -> float:
    """Ten data sets of different sizes; differences rounded to a tenth of a point, so that some tie."""
    return wilcoxon(np.round(gain + rng.normal(0, rng.uniform(0.01, 0.05, 10)), 3)).p


def by_holm(rng: np.random.Generator, gain: float) -> float:
    """The smallest of four adjusted p values: any rejection is a false alarm."""
    return min(holm([by_wilcoxon(rng, gain) for _ in range(4)]))


def by_interval(rng: np.random.Generator, gain: float) -> float:
    """Not a test, but its interval misses zero as often as one: 5 seeds."""
    _, _, low, high = mean_interval(rng.normal(gain, 0.02, 5))
    return float(low <= 0 <= high)


def by_folds(rng: np.random.Generator, gain: float) -> float:
    """The same of 5 folds of 3 seeds each, where folds differ more than seeds: 15 runs are 5 figures."""
    figures = gain + rng.normal(0, 0.02, (5, 1)) + rng.normal(0, 0.01, (5, 3))
    runs = {(seed, fold): figures[fold, seed] for fold in range(5) for seed in range(3)}
    _, _, low, high = mean_interval(repetitions(runs))
    return float(low <= 0 <= high)


@pytest.mark.parametrize(
    ("test", "gain", "power"),
    [
        (by_mcnemar, 0.08, 0.6),
        (by_bootstrap, 0.08, 0.6),
        (by_class_bootstrap, 0.08, 0.3),
        (by_mcnemar_of_people, 0.16, 0.6),
        (by_class_bootstrap_of_people, 0.16, 0.3),
        (by_corrected_t, 0.08, 0.15),
        (by_wilcoxon, 0.03, 0.6),
        (by_holm, 0.03, 0.6),
        (by_interval, 0.03, 0.6),
        (by_folds, 0.04, 0.6),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_equal_models_are_not_told_apart_too_often(
    test: Callable[[np.random.Generator, float], float],
    gain: float,
    power: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = np.random.default_rng(2006)
    false_alarms = sum(test(rng, 0.0) <= LEVEL for _ in range(SIMULATIONS))
    found = np.mean([test(rng, gain) <= LEVEL for _ in range(SIMULATIONS // 10)])
    with capsys.disabled():
        print(f"\n{test.__name__}: {100 * false_alarms / SIMULATIONS:.2f} % false alarms, power {found:.2f} at {gain}")
    assert false_alarms <= MOST
    assert found > power


def test_people_whose_images_are_taken_for_others_make_false_alarms() -> None:
    """What the tests of people are for: on the same frames McNemar's own finds a difference twice as often and more."""
    rng = np.random.default_rng(2006)
    found = [frames(rng, 0.0) for _ in range(400)]
    plain, ours = (np.mean([mcnemar(a, b, who).p <= LEVEL for _, a, b in found]) for who in (None, PEOPLE))
    assert plain > 0.1 > ours


def test_an_image_a_person_is_mcnemars_test_and_the_bootstrap_over_images() -> None:
    rng = np.random.default_rng(5)
    label, a, b = images(rng, 300, 0.05)
    for right in (a, b), (b, a), (a, a):
        only = [int((right[i] & ~right[1 - i]).sum()) for i in (0, 1)]
        expected = stats.binomtest(only[0], sum(only)).pvalue if sum(only) else 1.0
        assert mcnemar(*right).p == pytest.approx(expected)
        assert mcnemar(*right, rng.permutation(300)).p == pytest.approx(expected)
    assert paired_bootstrap(a, b, label, 99, 0, person=rng.permutation(300)) == paired_bootstrap(a, b, label, 99, 0)


def test_a_persons_images_fall_to_one_side_together() -> None:
    """Three people: a wins 2 of one's images and 1 of another's, b 1 of the third's. Of the 8 ways of giving each
    person's balance to either side, 4 have a at +2 or above or at -2 or below."""
    a = np.array([1, 1, 1, 0, 1], dtype=bool)
    b = np.array([0, 0, 0, 1, 1], dtype=bool)
    person = np.array(["x", "x", "y", "z", "z"])
    balances = np.array(list(itertools.product((-2, 2), (-1, 1), (-1, 1)))).sum(1)
    expected = 2 * min(np.mean(balances >= 2), np.mean(balances <= 2))
    found = mcnemar(a, b, person)
    assert found.p == pytest.approx(expected)
    assert found.difference == pytest.approx(2 / 5)


def test_one_more_figure_falls_into_its_interval() -> None:
    rng = np.random.default_rng(4)
    drawn = rng.normal(0.6, 0.01, (4000, 4))
    found = [low <= last <= high for *three, last in drawn for low, high in [prediction_interval(three)]]
    assert np.mean(found) == pytest.approx(0.95, abs=0.012)
    assert np.isnan(prediction_interval([0.6])).all()


def test_copies_of_images_are_worth_one_image() -> None:
    """Each image three times: as many independent ones as there are different ones, whatever the accuracy."""
    rng = np.random.default_rng(1)
    right, person = rng.random(900) < 0.8, np.arange(900)
    assert effective_images(right, person) == 900
    assert effective_images(right.repeat(3), person.repeat(3)) == pytest.approx(900, rel=0.01)
    assert effective_images(right, rng.permutation(900) // 3) == pytest.approx(900, rel=0.1)  # people do not matter
    assert effective_images(right, 0 * person) == 1


def test_where_nothing_varies_a_persons_images_are_taken_for_one_answer() -> None:
    assert effective_images(np.ones(900), np.arange(900) // 3) == pytest.approx(300)
    person = np.r_[np.zeros(901), np.arange(1, 100)]  # one person has nearly all
    assert effective_images(np.ones(1000), person) == pytest.approx(1000**2 / (901**2 + 99))
    assert effective_images(np.empty(0), np.empty(0)) == 0


def test_nothing_right_has_an_interval_that_begins_at_nothing() -> None:
    for n in (1, 21, 37, 39.5):
        assert wilson(0.0, n)[0] == 0.0
        assert wilson(1.0, n)[1] == pytest.approx(1.0)
        assert wilson(1.0, n)[1] <= 1.0
    assert wilson(0.0, 21)[1] == pytest.approx(stats.binomtest(0, 21).proportion_ci(method="wilson").high)


def test_fewer_images_leave_more_open() -> None:
    counts = np.array([[40, 10], [20, 30]])
    (low, high), _ = bootstrap_scores(counts, 0)
    (wider_low, wider_high), _ = bootstrap_scores(counts, 0, 25)
    assert (wider_high - wider_low) / (high - low) == pytest.approx(2, rel=0.05)


def test_many_people_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    a, b, label = rng.random(300) < 0.7, rng.random(300) < 0.6, rng.integers(0, 3, 300)
    person = rng.integers(0, 60, 300)
    whole = paired_bootstrap(a, b, label, 500, 1, person=person)
    monkeypatch.setattr("fer.reporting.statistics.AT_ONCE", 1000)
    assert paired_bootstrap(a, b, label, 500, 1, person=person) == whole


def test_the_effective_number_of_images_tells_how_accuracy_scatters() -> None:
    """Accuracy of 60 people of 1 to 12 images each, drawn anew 2,000 times, beside p (1 - p) / effective number."""
    rng = np.random.default_rng(9)
    drawn, guessed = [], []
    for _ in range(2000):
        person = np.arange(60).repeat(rng.integers(1, 13, 60))
        right = rng.random(len(person)) < rng.beta(4, 1, 60)[person]
        drawn.append(right.mean())
        guessed.append(right.mean() * (1 - right.mean()) / effective_images(right, person))
    assert np.mean(guessed) == pytest.approx(np.var(drawn), rel=0.1)
