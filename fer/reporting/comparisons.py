"""Comparing groups or runs on the same test images.

Runs are paired fold by fold and, within a fold, by their seeds, or in order where they share none. Both sides carry the
same stamps but for two, which are what is asked about: a training without leaked copies, a network's second reading.
What each test then answers:

- McNemar, once per round of runs in which no image is tested twice (so once per seed): do these two trained networks
  differ on these images?
- paired bootstrap, correctness averaged over seeds: would other test images of the same kind tell them apart?
  Both take a person's images together where the data set knows its people.
- corrected resampled t-test over the folds of a cross-validation: would other training parts?
- Wilcoxon over data sets: is one model better across data sets?

Holm's correction is over all p values of one test and metric in the report.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fer.errors import UserError
from fer.metrics import Array
from fer.reporting.collect import Answers, Run
from fer.reporting.groups import Group
from fer.reporting.statistics import Comparison, corrected_t, holm, mcnemar, paired_bootstrap, wilcoxon
from fer.runs import AGAIN, DROPPED

METRICS = {"acc": "accuracy", "mean_acc": "mean class accuracy"}


@dataclass(frozen=True)
class Verdict:
    """One test of a against b.

    Attributes:
        a, b: ids of the groups or paths of the runs.
        data: data set and protocol, or ``n data sets``.
        test: name of the test.
        metric: key of `METRICS`.
        n: what it counts, in words.
        outcome: difference, interval and p value.
        p_holm: p value after Holm's correction.
        stamps: what stands beside the figures of either.
    """

    a: str
    b: str
    data: str
    test: str
    metric: str
    n: str
    outcome: Comparison
    p_holm: float = float("nan")
    stamps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Side:
    """One side of a comparison on one data set: a group, or one run of it."""

    name: str
    group: Group
    runs: tuple[Run, ...]


def compare(groups: Sequence[Group], selectors: Sequence[str], resamples: int, seed: int) -> list[Verdict]:
    """Every test of every pair of selectors.

    Args:
        groups: all groups of the report.
        selectors: at least two; each a group's id, a model's name (all its groups, data set by data set), or the path
            of one run.
        resamples: bootstrap samples.
        seed: seed of the bootstrap.

    Raises:
        UserError: a selector names nothing or several groups of one data set and protocol, the two sides hold the same
            run, were tested on different images, or carry different stamps.
    """
    if len(selectors) < 2:
        raise UserError(f"compare=[{','.join(selectors)}]: expected at least two groups, models or run folders")
    if len(set(selectors)) < len(selectors):
        raise UserError(f"compare=[{','.join(selectors)}]: expected different groups, models or run folders, each once")
    sides = {selector: _sides(groups, selector) for selector in selectors}
    verdicts: list[Verdict] = []
    for a, b in itertools.combinations(sides, 2):
        pairs = _pairs(sides[a], sides[b])
        if not pairs:
            raise UserError(f"compare=[{a},{b}]: no data set and protocol on which both finished")
        for x, y in pairs:
            verdicts += _on_one_part(x, y, resamples, seed)
        verdicts += _over_data_sets(a, b, pairs)
    return _corrected(verdicts)


def _sides(groups: Sequence[Group], selector: str) -> list[Side]:
    finished = [group for group in groups if group.runs]
    path = Path(selector).resolve()
    for group in finished:
        for run in (*group.runs, *group.repeated):
            if run.path == path:
                return [Side(selector, group, (run,))]
    found = [g for g in finished if g.id == selector] or [g for g in finished if g.model == selector]
    if not found:
        known = ", ".join(group.id for group in finished)
        raise UserError(
            f"compare={selector}: no finished group, model or run folder of that name; expected one of {known}"
        )
    return [Side(group.id, group, tuple(group.runs)) for group in found]


def _pairs(a: Sequence[Side], b: Sequence[Side]) -> list[tuple[Side, Side]]:
    """Sides to test against each other: the only two there are, or those of one data set and protocol."""
    if len(a) == len(b) == 1:
        return [(a[0], b[0])]
    pairs = []
    places = dict.fromkeys((side.group.data, side.group.protocol) for side in a)
    for place in places:
        here = [[side for side in sides if (side.group.data, side.group.protocol) == place] for sides in (a, b)]
        if not all(here):
            continue
        for sides in here:
            if len(sides) > 1:
                raise UserError(
                    f"compare: {', '.join(side.name for side in sides)} are all {sides[0].group.model} on "
                    f"{', '.join(place)}; name one of them by its id"
                )
        pairs.append((here[0][0], here[1][0]))
    return pairs


def _paired_runs(a: Side, b: Side) -> list[tuple[Run, Run]]:
    if len(a.runs) == len(b.runs) == 1:
        return [(a.runs[0], b.runs[0])]
    folds: dict[int | None, tuple[list[Run], list[Run]]] = defaultdict(lambda: ([], []))
    for place, side in enumerate((a, b)):
        for run in side.runs:
            folds[run.fold][place].append(run)
    return [pair for runs in folds.values() for pair in _partners(*runs)]


def _partners(a: Sequence[Run], b: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Runs of one fold by their seed; where no seed is shared, in order, and one more on a side has no partner."""
    same = [(x, y) for x in a for y in b if x.seed == y.seed]
    return same or list(zip(a, b, strict=False))


def _answers(run: Run) -> Answers:
    assert run.answers is not None, "only finished runs are compared"
    return run.answers


def _stamps(a: Side, b: Side) -> tuple[str, ...]:
    """The stamps of both sides, with the side that alone carries one named before it.

    Raises:
        UserError: one side alone has a stamp that is about more than copies dropped or a second reading, or the
            predictions of both depend on the batch.
    """
    of_a, of_b = (dict.fromkeys(stamp for run in side.runs for stamp in run.stamps) for side in (a, b))
    everything = [*of_a, *(stamp for stamp in of_b if stamp not in of_a)]
    alone = [stamp for stamp in everything if (stamp in of_a) != (stamp in of_b)]
    for stamp in alone:
        if not (stamp.endswith(DROPPED) or stamp.startswith(AGAIN)):
            raise UserError(
                f"compare=[{a.name},{b.name}]: only one of them is stamped «{stamp}»; stamped runs are compared with "
                "their like only"
            )
    for stamp in everything:
        if stamp.startswith("LEAKY"):
            raise UserError(f"compare=[{a.name},{b.name}]: both are stamped «{stamp}», so no test applies")
    return tuple(f"{'a' if stamp in of_a else 'b'} alone: {stamp}" if stamp in alone else stamp for stamp in everything)


def _check(a: Side, b: Side, pairs: Sequence[tuple[Run, Run]]) -> None:
    """Refuse pairs that cannot be tested against each other.

    Raises:
        UserError: there is none, a run is its own partner, or other images or classes.
    """
    if not pairs:
        raise UserError(f"compare=[{a.name},{b.name}]: they share no fold")
    for x, y in pairs:
        if x is y:
            raise UserError(f"compare=[{a.name},{b.name}]: both hold {x.path}; expected different runs on each side")
        if x.results["classes"] != y.results["classes"]:
            raise UserError(f"compare=[{a.name},{b.name}]: {x.path} and {y.path} have other classes or another order")
        images = _answers(x).image, _answers(y).image
        if not np.array_equal(*images) or not np.array_equal(_answers(x).label, _answers(y).label):
            shared = len(np.intersect1d(*images))
            raise UserError(
                f"compare=[{a.name},{b.name}]: {x.path} was tested on {len(images[0])} images and {y.path} on "
                f"{len(images[1])}, {shared} of them the same; a comparison needs the same images and labels"
            )


def _rounds(pairs: Sequence[tuple[Run, Run]]) -> list[list[tuple[Run, Run]]]:
    """Divide pairs into rounds in which no image is tested twice."""
    rounds: list[tuple[Array, list[tuple[Run, Run]]]] = []
    for pair in pairs:
        images = _answers(pair[0]).image
        for place, (seen, members) in enumerate(rounds):
            if not np.isin(images, seen).any():
                rounds[place] = (np.concatenate([seen, images]), [*members, pair])
                break
        else:
            rounds.append((images, [pair]))
    return [members for _, members in rounds]


def _on_one_part(a: Side, b: Side, resamples: int, seed: int) -> list[Verdict]:
    pairs = _paired_runs(a, b)
    stamps = _stamps(a, b)
    _check(a, b, pairs)
    place = f"{a.group.data}, {a.group.protocol}"

    def verdict(test: str, metric: str, n: str, outcome: Comparison) -> Verdict:
        return Verdict(a.name, b.name, place, test, metric, n, outcome, stamps=stamps)

    out = []
    for members in _rounds(pairs):
        right = [np.concatenate([_answers(pair[side]).right for pair in members]) for side in (0, 1)]
        person = np.concatenate([_answers(x).person for x, _ in members])
        only = [int((right[side] & ~right[1 - side]).sum()) for side in (0, 1)]
        seeds = " and ".join(dict.fromkeys(f"seed {run.seed}" for run in members[0]))
        n = f"{_count(person)}, {only[0]} right by a alone, {only[1]} by b alone; {seeds}"
        out.append(verdict("McNemar", "acc", n, mcnemar(right[0], right[1], person)))

    tested = np.concatenate([_answers(x).image for x, _ in pairs])
    images, first, place_of = np.unique(tested, return_index=True, return_inverse=True)
    person = np.concatenate([_answers(x).person for x, _ in pairs])[first]
    times = np.bincount(place_of)
    right = [np.concatenate([_answers(pair[side]).right for pair in pairs]) for side in (0, 1)]
    mean = [np.bincount(place_of, one) / times for one in right]
    label = np.zeros(len(images), dtype=np.int64)
    label[place_of] = np.concatenate([_answers(x).label for x, _ in pairs])
    n = _count(person) + (f", {len(pairs)} pairs of runs" if len(pairs) > 1 else "")
    for metric, by in (("acc", np.zeros_like(label)), ("mean_acc", label)):
        outcome = paired_bootstrap(mean[0], mean[1], by, resamples, seed, person=person)
        out.append(verdict("paired bootstrap", metric, n, outcome))

    folds = _by_fold(pairs)
    if len(folds) > 1 and len(_rounds([members[0] for members in folds.values()])) == 1:
        ratio = np.mean([x.results["n"]["test"] / x.results["n"]["train"] for x, _ in pairs])
        for metric in METRICS:
            d = [
                float(np.mean([_score(x, metric) - _score(y, metric) for x, y in members]))
                for members in folds.values()
            ]
            if not np.isnan(d).any():
                out.append(verdict("corrected resampled t", metric, f"{len(d)} folds", corrected_t(d, float(ratio))))
    return out


def _count(person: Array) -> str:
    """``981 images of 118 people``; the people only where one has several."""
    people = len(np.unique(person))
    return f"{len(person):,} images" + (f" of {people:,} people" if people < len(person) else "")


def _by_fold(pairs: Sequence[tuple[Run, Run]]) -> dict[int, list[tuple[Run, Run]]]:
    folds: dict[int, list[tuple[Run, Run]]] = defaultdict(list)
    for pair in pairs:
        if pair[0].fold is not None:
            folds[pair[0].fold].append(pair)
    return folds


def _score(run: Run, metric: str) -> float:
    """A test metric, NaN where the run has none."""
    value = run.results["metrics"]["test"].get(metric)
    return math.nan if value is None else float(value)


def _over_data_sets(a: str, b: str, pairs: Sequence[tuple[Side, Side]]) -> list[Verdict]:
    """Wilcoxon's test where both were run on several data sets; protocols of one data set are averaged first."""
    by_data: dict[str, list[tuple[Side, Side]]] = defaultdict(list)
    for x, y in pairs:
        by_data[x.group.data].append((x, y))
    if len(by_data) < 2:
        return []
    out = []
    stamps = tuple(dict.fromkeys(stamp for x, y in pairs for stamp in _stamps(x, y)))
    for metric in METRICS:
        d = [
            float(np.mean([x.group.interval(metric)[0] - y.group.interval(metric)[0] for x, y in members]))
            for members in by_data.values()
        ]
        if np.isnan(d).any():
            continue
        few = "" if len(d) > 5 else ", too few to be significant at 5 %"
        n = f"{len(d)} data sets"
        out.append(Verdict(a, b, n, "Wilcoxon", metric, f"{n}{few}", wilcoxon(d), stamps=stamps))
    return out


def _corrected(verdicts: Sequence[Verdict]) -> list[Verdict]:
    out = list(verdicts)
    families: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, verdict in enumerate(verdicts):
        families[verdict.test, verdict.metric].append(place)
    for places in families.values():
        for place, p in zip(places, holm([verdicts[place].outcome.p for place in places]), strict=True):
            out[place] = replace(verdicts[place], p_holm=p)
    return out
