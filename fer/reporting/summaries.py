"""What trainings measured, as docs/results/measured/<data>.json has it: a row per setting, a repeat per seed and fold.

Of each test a row keeps the confusion matrix and which images were named right: all that figures, intervals and paired
differences need.
"""

import base64
import math
import zlib
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fer.config import CONF
from fer.errors import UserError
from fer.metrics import Array, scores
from fer.reporting.statistics import mean_interval, prediction_interval, repeated_over, repetitions
from fer.runs import read_json, write_json

TRAIN = "python -m fer.train"
RECORDS = CONF.parent / "docs" / "results" / "measured"
VIEWS = ("none", "flip", "five_crop", "ten_crop")


def packed(values: Array) -> str:
    """The bytes of an array, compressed, as text."""
    return base64.b85encode(zlib.compress(values.tobytes(), 9)).decode()


def _unpacked(text: str, kind: type[np.generic]) -> Array:
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype=kind)


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """One training.

    Attributes:
        seed: of everything but the split.
        fold: the fold held out, None without folds.
        job_key: of its run folder; evaluations are matched by it.
        commit: of the code, with ``+`` where files had changed.
        hardware: what it ran on.
        core_minutes: CPU time of training and test.
        epochs: how many were trained.
        val_acc, val_mean_acc: scores of the chosen epoch where it was chosen.
        tests: by views, the test's confusion matrix, a row of counts per label.
        images: digest of the images tested.
        people: where several show one person, of each image a hash of who, else None; packed as `packed` does.
        hits: by views, of each image whether it was named right; packed.
    """

    seed: int
    fold: int | None
    job_key: str
    commit: str
    hardware: str
    core_minutes: float
    epochs: int
    val_acc: float
    val_mean_acc: float
    tests: dict[str, list[str]]
    images: str
    people: str | None
    hits: dict[str, str]

    def confusion(self, views: str) -> Array:
        """(K, K) counts, rows are labels."""
        return np.array([row.split() for row in self.tests[views]], dtype=np.int64)

    def right(self, views: str) -> Array:
        """(n,) bool, whether each image was named right; runs with the same `images` have them in the same order."""
        n = int(self.confusion(views).sum())
        return np.unpackbits(_unpacked(self.hits[views], np.uint8), count=n).astype(bool)

    @property
    def person(self) -> Array | None:
        """(n,) hashes of who each image shows; None: nobody comes twice."""
        return None if self.people is None else _unpacked(self.people, np.uint32)


@dataclass(frozen=True, kw_only=True)
class Result:
    """A row: trainings that differ in seed and fold alone.

    Attributes:
        setting: the command's words that made the figures, `TRAIN` before them.
        settings: digest of all values of its config but seed and fold, and of the weights it began with.
        model, data: public names.
        classes: K names.
        n: images of each part, of the first repeat.
        selected_on: ``val`` or ``test``.
        stamps: what must stand beside every figure.
        rotating: whether every fold tests the same images (``protocol.held_out=val``), not a part of its own.
        weights: where the initial ones came from.
        parameters: how many there are.
        repeats: by seed and fold.
    """

    setting: str
    settings: str
    model: str
    data: str
    classes: list[str]
    n: dict[str, int]
    selected_on: str
    stamps: list[str]
    rotating: bool
    weights: str
    parameters: int
    repeats: list[Repeat]

    @property
    def views(self) -> list[str]:
        """The choices of views every repeat was tested with."""
        return [views for views in VIEWS if all(views in one.tests for one in self.repeats)]

    @property
    def folds(self) -> list[int | None]:
        """The folds held out, ``[None]`` without folds."""
        return sorted({one.fold for one in self.repeats}, key=lambda fold: -1 if fold is None else fold)

    @property
    def disjoint(self) -> bool:
        """Whether there are several folds, each with a test part of its own."""
        return len(self.folds) > 1 and not self.rotating

    @property
    def over(self) -> str:
        """``folds`` or ``seeds``: what `interval` is over."""
        return repeated_over((one.seed, one.fold) for one in self.repeats)

    @property
    def uneven(self) -> str:
        """A sentence where not every seed has every fold, which moves the mean; empty otherwise."""
        seeds = {one.seed: {other.fold for other in self.repeats if other.seed == one.seed} for one in self.repeats}
        lacking = {seed: [str(fold) for fold in self.folds if fold not in have] for seed, have in seeds.items()}
        short = [f"seed {seed} lacks fold {', '.join(folds)}" for seed, folds in sorted(lacking.items()) if folds]
        return f"the seeds have different folds: {'; '.join(short)}" if short else ""

    def confusion(self, views: str) -> Array:
        """(K, K) counts of every test image once: mean over a fold's seeds, summed over folds or, if rotating, mean."""
        counts = [
            np.mean([one.confusion(views) for one in self.repeats if one.fold == fold], axis=0) for fold in self.folds
        ]
        total: Array = np.mean(counts, axis=0) if self.rotating else np.sum(counts, axis=0)
        return total

    def hits(self, views: str, seeds: Collection[tuple[int, int | None]] | None = None) -> tuple[Array, Array]:
        """What every test image once, as `confusion` counts them, was named.

        Args:
            views: of the test.
            seeds: the repeats that count, by seed and fold; None: all.

        Returns:
            (n,) how often each image was named right, mean over the repeats that tested it, and (n,) who it shows.
        """
        parts: dict[str, list[Repeat]] = defaultdict(list)
        for one in self.repeats:
            if seeds is None or (one.seed, one.fold) in seeds:
                parts[one.images].append(one)
        right = [np.mean([one.right(views) for one in part], axis=0) for part in parts.values()]
        known = [part[0].person for part in parts.values()]
        count = sum(map(len, right))
        alone = iter(np.split(np.arange(count) + 2**32, np.cumsum([len(one) for one in right])[:-1]))
        person = [own if found is None else found.astype(np.int64) for found, own in zip(known, alone, strict=True)]
        return np.concatenate(right), np.concatenate(person)

    def values(self, views: str, metric: str) -> dict[tuple[int | None, int | None], float]:
        """``acc`` or ``mean_acc`` of the test of every repeat, by seed and fold."""
        return {(one.seed, one.fold): scores(one.confusion(views), self.classes)[metric] for one in self.repeats}

    def interval(self, views: str, metric: str) -> tuple[float, float, float, float]:
        """Mean, standard deviation and 95 % interval over folds, the seeds of each averaged, or else over seeds."""
        return mean_interval(repetitions(self.values(views, metric)))

    def next_run(self, views: str, metric: str) -> tuple[float, float]:
        """95 % interval of one more seed; NaN of folds, each of which has images of its own."""
        if len(self.folds) > 1:
            return math.nan, math.nan
        return prediction_interval(list(self.values(views, metric).values()))


# -- files --------------------------------------------------------------------------------------------------------


def load_results(folder: Path = RECORDS) -> list[Result]:
    """Every row of a folder of summaries.

    Raises:
        UserError: one lacks a field, has one too many, or a test that does not count its images.
    """
    return [row for path in sorted(folder.glob("*.json")) for row in _load(path)]


def _load(path: Path) -> list[Result]:
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise UserError(f"{path} has no list of rows: expected what python -m fer.reporting.results writes")
    return [_result(row, f"{path}, row {place}") for place, row in enumerate(rows, 1)]


def _result(entry: Any, where: str) -> Result:
    check_fields(Result, entry, where)
    repeats = []
    for place, one in enumerate(entry["repeats"], 1):
        inside = f"{where}, repeat {place}"
        check_fields(Repeat, one, inside)
        repeats.append(Repeat(**one))
        _check_hits(repeats[-1], inside)
        for views in repeats[-1].tests:
            counted = int(repeats[-1].confusion(views).sum())
            if (one["fold"] is None or entry["rotating"]) and counted != entry["n"]["test"]:
                raise UserError(f"{inside}: its test with views {views} counts {counted} images, not n.test")
    if not repeats:
        raise UserError(f"{where} has no repeats: a row stands for at least one training")
    result = Result(**{**entry, "repeats": repeats})
    for fold in [None] if result.rotating else result.folds:
        if len({one.images for one in repeats if result.rotating or one.fold == fold}) > 1:
            raise UserError(f"{where}: its repeats tested other images, though the fold is the same")
    return result


def _check_hits(one: Repeat, where: str) -> None:
    """Refuse a repeat whose hits are not those of its confusion matrices."""
    if one.hits.keys() != one.tests.keys():
        raise UserError(f"{where}: its tests have the views {', '.join(one.tests)}, its hits {', '.join(one.hits)}")
    for views in one.tests:
        counts = one.confusion(views)
        try:
            right, person = one.right(views), one.person
        except (ValueError, zlib.error) as error:
            raise UserError(f"{where}: its hits cannot be unpacked ({error})") from None
        if right.sum() != counts.trace() or (person is not None and len(person) != counts.sum()):
            raise UserError(f"{where}: its hits with views {views} are not those of its confusion matrix")


def check_fields(kind: type, entry: Any, where: str) -> None:
    """Refuse an entry that has not all fields of a dataclass and no other, by a UserError.

    Args:
        kind: the dataclass.
        entry: of a JSON file.
        where: words for the message.
    """
    known = [field.name for field in fields(kind)]
    if not isinstance(entry, dict) or (lacking := [name for name in known if name not in entry]):
        lacks = lacking[0] if isinstance(entry, dict) else "everything"
        raise UserError(f"{where} lacks {lacks}: expected all of {', '.join(known)}")
    if unknown := [name for name in entry if name not in known]:
        raise UserError(f"{where} has {unknown[0]}, expected nothing but {', '.join(known)}")


def save_results(results: Sequence[Result], folder: Path = RECORDS) -> None:
    """Write rows to ``<data>.json``, in the order of their settings."""
    folder.mkdir(parents=True, exist_ok=True)
    for data in sorted({row.data for row in results}):
        rows = sorted((row for row in results if row.data == data), key=lambda row: (row.model, row.setting))
        write_json(folder / f"{data}.json", {"rows": [asdict(row) for row in rows]})
