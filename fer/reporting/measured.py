"""Tables of what was measured, from the `fer.reporting.summaries`: for the pages and the report."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from fer.metrics import scores
from fer.reporting.statistics import (
    RESAMPLES,
    bootstrap_scores,
    effective_images,
    mean_interval,
    paired_bootstrap,
    repetitions,
    wilson_half_width,
)
from fer.reporting.summaries import RECORDS, Result, load_results
from fer.reporting.tables import ABOUT_POOLED, NONE, Cell, Row, Table, interval, mean_std, number, percent, words

METRICS = ("acc", "mean_acc")
CHOSEN = {"val": "validation", "test": "the test part"}
NOTE = (
    "Mean ± standard deviation over runs and Student's t interval of the mean, and of one more run. By images: half of "
    "the 95 % interval that this number of test images leaves open, Wilson's for accuracy, a bootstrap's for mean "
    "class accuracy; where several are of one person, for as many of different people as tell as much of accuracy."
)
ABOUT_FOLDS = "Of several folds each is one figure, its seeds averaged first."


def table(results: Sequence[Result], title: str) -> Table:
    """A line for each setting and choice of views, with scores of all folds together where there are; stamped last."""
    pooled, lines = any(row.disjoint for row in results), []
    for row in sorted(results, key=lambda row: bool(row.stamps)):
        lines += [_line(row, views, pooled) for views in reversed(row.views)]
    columns = ["setting", "views", "accuracy, %", _over(results), "one more run", "± by images"]
    columns += ["mean class, %", "mean class, 95 %", "± by images"]
    columns += ["pooled accuracy, %", "pooled mean class, %"] if pooled else []
    columns += ["n", "seeds", "epoch chosen on, its accuracy there", "core-minutes a run", "hardware", "commit"]
    notes = [NOTE, *([ABOUT_FOLDS] if "folds" in _over(results) else []), *([ABOUT_POOLED] if pooled else [])]
    return Table(title, columns, lines, " ".join(notes), left=2)


def _over(results: Sequence[Result]) -> str:
    return f"95 % over {' or '.join(sorted({row.over for row in results})) or 'seeds'}"


def _line(row: Result, views: str, pooled: bool) -> Row:
    acc, mean_acc = (row.interval(views, metric) for metric in METRICS)
    counts = row.confusion(views)
    images, together = round(counts.sum()), scores(counts, row.classes)
    effective = effective_images(*row.hits(views))
    half = wilson_half_width(together["acc"], effective)
    (low, high), _ = bootstrap_scores(counts, 0, effective)
    chosen = [one.val_acc for one in row.repeats]
    minutes = [one.core_minutes for one in row.repeats]
    cells = [words(row.setting), words(views), mean_std(*acc[:2]), interval(*acc[2:])]
    cells += [interval(*row.next_run(views, "acc")), _half(half)]
    cells += [mean_std(*mean_acc[:2]), interval(*mean_acc[2:]), _half((high - low) / 2)]
    cells += [percent(together[metric]) if row.disjoint else NONE for metric in METRICS] if pooled else []
    cells += [number(images, 0), _seeds(row)]
    cells += [words(f"{CHOSEN[row.selected_on]}, {percent(float(np.mean(chosen))).text} %")]
    cells += [number(float(np.mean(minutes)), 1)]
    cells += [
        words("; ".join(dict.fromkeys(getattr(one, name) for one in row.repeats))) for name in ("hardware", "commit")
    ]
    values = {"setting": row.setting, "model": row.model, "data": row.data, "views": views, "images": images}
    for metric, found in zip(METRICS, (acc, mean_acc), strict=True):
        values |= {f"{metric}_{name}": value for name, value in zip(("mean", "std", "low", "high"), found, strict=True)}
        values[f"{metric}_pooled"] = together[metric]
    stamps = [*row.stamps, *([row.uneven] if row.uneven else [])]
    return Row(cells, values | {"over": row.over}, stamps, apart=bool(row.stamps))


def _half(value: float) -> Cell:
    return Cell(f"± {percent(value).text}", value)


def _seeds(row: Result) -> Cell:
    seeds, folds = (sorted({getattr(one, name) for one in row.repeats} - {None}) for name in ("seed", "fold"))
    text = f"{len(seeds)} ({', '.join(map(str, seeds))})" + (f"; folds {', '.join(map(str, folds))}" if folds else "")
    return Cell(text, len(row.repeats))


def differences(results: Sequence[Result], title: str) -> Table:
    """What one word of a command, or more views at test, are worth: paired by seed, each against the same without."""
    lines = []
    for row in results:
        lines += [
            _difference(f"{row.setting}: {views} instead of {row.views[0]}", row, views, row, row.views[0])
            for views in row.views[1:]
        ]
    for a, b in combinations(results, 2):
        less, full = sorted((a, b), key=lambda row: len(row.setting.split()))
        extra = set(full.setting.split()) - set(less.setting.split())
        if a.data == b.data and len(extra) == 1 and set(less.setting.split()) < set(full.setting.split()):
            shared = [views for views in less.views if views in full.views]
            what = f"{less.setting}: with {extra.pop()}"
            lines += [_difference(f"{what}, views {views}", full, views, less, views) for views in shared]
    over = _over(results)
    columns = ["what", "accuracy, points", over, "95 % over images", "mean class, points", over, "pairs"]
    note = (
        "Test figures, with minus without, of the same seed. Over seeds: Student's t interval of the mean, wide for "
        "few. Over images: a paired bootstrap of the same test images, of people where they are known, each right as "
        "often as the trainings of the pairs are; it says nothing of other trainings."
    )
    note += f" {ABOUT_FOLDS}" if "folds" in over else ""
    return Table(title, columns, [line for line in lines if line is not None], note)


def _difference(what: str, a: Result, views_a: str, b: Result, views_b: str) -> Row | None:
    cells, pairs = [words(what)], 0
    for metric in METRICS:
        left, right = a.values(views_a, metric), b.values(views_b, metric)
        found = {key: left[key] - right[key] for key in left if key in right}
        mean, _, low, high = mean_interval(repetitions(found))
        cells += [percent(mean), interval(low, high)]
        cells += [_over_images(a, views_a, b, views_b)] if metric == "acc" else []
        pairs = len(found)
    return Row([*cells, number(pairs, 0)], {}, list(dict.fromkeys([*a.stamps, *b.stamps]))) if pairs else None


def _over_images(a: Result, views_a: str, b: Result, views_b: str) -> Cell:
    """95 % interval of the difference in accuracy for other images of the kind; empty where they were not the same."""
    tested = [{(one.seed, one.fold): one.images for one in row.repeats} for row in (a, b)]
    both = tested[0].keys() & tested[1].keys()
    if not both or any(tested[0][place] != tested[1][place] for place in both):
        return NONE
    (right, person), (other, _) = a.hits(views_a, both), b.hits(views_b, both)
    outcome = paired_bootstrap(right, other, np.zeros(len(right)), RESAMPLES, 0, person=person)
    return interval(outcome.low, outcome.high)


# -- pages --------------------------------------------------------------------------------------------------------


def section(name: str, folder: Path = RECORDS) -> str:
    """The rows of ``<data>`` or ``<data>/<model>`` as Markdown."""
    return _body(table(_chosen(name, folder), ""))


def differences_section(name: str, folder: Path = RECORDS) -> str:
    """`differences` of ``<data>`` or ``<data>/<model>`` as Markdown."""
    return _body(differences(_chosen(name, folder), ""))


def _chosen(name: str, folder: Path) -> list[Result]:
    data, _, model = name.partition("/")
    return [row for row in load_results(folder) if row.data == data and model in ("", row.model)]


def _body(one: Table) -> str:
    return one.body() if one.rows else "Not measured yet."
