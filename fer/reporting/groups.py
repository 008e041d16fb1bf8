"""Which runs belong together.

A **group** holds the runs that differ in nothing but fold and seed. Of them, those are averaged that began with the
same weights, have the same classes in the same order, the same number of images in all parts, for the same fold the
same split (by fingerprint), and for different folds test parts that share no image or are the same. What does not fit
starts a group of its own and the report says so. Of runs with the same fold and seed the newest counts.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fer.metrics import Array, scores
from fer.reporting.collect import BINS, Run, finished_at, short_checksums
from fer.reporting.statistics import effective_images, mean_interval, repeated_over, repetitions
from fer.runs import RunFolder

Key = tuple[Any, ...]
NAMED = 3  # settings named in a label; the page has the rest


@dataclass
class Group:
    """Runs that differ in nothing but fold and seed.

    Attributes:
        model, data: public names.
        settings: what all its runs share, see `fer.reporting.collect.settings_of`.
        runs: the finished ones, one per fold and seed, by fold and seed.
        unfinished: the others.
        repeated: finished ones left out because a newer one has their fold and seed.
        refused: why its runs are not averaged with those of another group of the same settings; empty otherwise.
        id: short name, unique in a report; also the anchor and the stem of file names.
        differs: the settings that set it apart from groups of the same model, data and protocol.
    """

    model: str
    data: str
    settings: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    unfinished: list[Run] = field(default_factory=list)
    repeated: list[Run] = field(default_factory=list)
    refused: str = ""
    id: str = ""
    differs: list[str] = field(default_factory=list)

    @property
    def protocol(self) -> str:
        """The protocol in a few words: ``kfold, 5 folds``."""
        return (self.runs or self.unfinished)[0].protocol

    @property
    def label(self) -> str:
        """Model and what sets it apart from its like."""
        shown = ", ".join(self.differs[:NAMED])
        more = f", and {len(self.differs) - NAMED} more" if len(self.differs) > NAMED else ""
        return f"{self.model} ({shown}{more})" if shown else self.model

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of the confusion matrix."""
        return list(self.runs[0].results["classes"])

    @property
    def facts(self) -> dict[str, Any]:
        """What its first run recorded about the data."""
        return dict(self.runs[0].results.get("data_facts") or {})

    @property
    def stamps(self) -> list[str]:
        """Every stamp of its runs, each once."""
        return list(dict.fromkeys(stamp for run in self.runs for stamp in run.stamps))

    @property
    def folds(self) -> list[int]:
        """The folds that finished."""
        return sorted({run.fold for run in self.runs if run.fold is not None})

    @property
    def seeds(self) -> list[int]:
        """The seeds that finished."""
        return sorted({run.seed for run in self.runs if run.seed is not None})

    def _by_place(self, metric: str) -> dict[tuple[int | None, int | None], float | None]:
        return {(run.seed, run.fold): run.results["metrics"]["test"].get(metric) for run in self.runs}

    def values(self, metric: str) -> list[float]:
        """A test metric of every run that has it (a fold may lack a class)."""
        return [float(value) for value in self._by_place(metric).values() if value is not None]

    def interval(self, metric: str) -> tuple[float, float, float, float]:
        """Mean, standard deviation and 95 % interval over folds, the seeds of each averaged, or else over seeds."""
        return mean_interval(repetitions(self._by_place(metric)))

    @property
    def over(self) -> str:
        """``folds`` or ``seeds``: what `interval` is over."""
        return repeated_over(self._by_place("acc"))

    @cached_property
    def confusion(self) -> Array:
        """(K, K) counts summed over all runs."""
        counts: Array = np.sum([run.results["confusion"]["test"] for run in self.runs], axis=0)
        return counts

    @cached_property
    def pooled(self) -> dict[str, float]:
        """Scores of the test predictions of all folds together, see `fer.metrics.scores`; each seed of a fold alike."""
        folds: dict[int | None, list[Any]] = defaultdict(list)
        for run in self.runs:
            folds[run.fold].append(run.results["confusion"]["test"])
        return scores(np.sum([np.mean(of_fold, axis=0) for of_fold in folds.values()], axis=0), self.classes)

    @cached_property
    def disjoint(self) -> bool:
        """Whether there are several folds and no image is tested in two of them."""
        sizes = {run.fold: run.results["n"]["test"] for run in self.runs}
        return len(sizes) > 1 and sum(sizes.values()) == self.images

    @cached_property
    def bins(self) -> Array:
        """(BINS, 3) calibration bins summed over all runs."""
        found = [run.answers.bins for run in self.runs if run.answers is not None]
        return np.sum(found, axis=0) if found else np.zeros((BINS, 3))

    @cached_property
    def images(self) -> int:
        """Different images tested."""
        return len(np.unique(np.concatenate([run.answers.image for run in self.runs if run.answers is not None])))

    @cached_property
    def effective_images(self) -> float:
        """`fer.reporting.statistics.effective_images` of `images`, each right as often as its runs are."""
        found = [run.answers for run in self.runs if run.answers is not None]
        image, person, right = (
            np.concatenate([getattr(one, name) for one in found]) for name in ("image", "person", "right")
        )
        _, first, place = np.unique(image, return_index=True, return_inverse=True)
        return effective_images(np.bincount(place, right) / np.bincount(place), person[first])

    @property
    def missing(self) -> list[str]:
        """Folds that were never started, for each seed that has some."""
        folds = self.settings.get("data.protocol.folds")
        started = defaultdict(set)
        for run in (*self.runs, *self.unfinished):
            if run.fold is not None:
                started[run.seed].add(run.fold)
        if not isinstance(folds, int):
            return []
        lacking = {seed: sorted(set(range(folds)) - have) for seed, have in started.items()}
        return [
            f"seed {seed}: fold {', '.join(map(str, gone))} never started" for seed, gone in lacking.items() if gone
        ]


def _classes(run: Run) -> Key:
    return tuple(run.results["classes"])


def _pool(run: Run) -> int | None:
    """Images in all parts; the number varies with the fold where leaked copies are dropped."""
    return None if run.settings.get("data.protocol.drop_leaks") else sum(run.results["n"].values())


def _clash(run: Run, others: Iterable[Run]) -> str:
    """Why a run does not belong to others of the same settings; empty when it does."""
    for other in others:
        where = "" if run.fold is None else f" of fold {run.fold}"
        if run.results["weights"] != other.results["weights"]:
            began = [short_checksums(str(one.results["weights"])) for one in (run, other)]
            return f"other initial weights ({began[0]}, not {began[1]})"
        if _classes(run) != _classes(other):
            return "other classes, or in another order"
        if _pool(run) != _pool(other):
            return f"{_pool(run)} images in all parts, not {_pool(other)}"
        if run.fold == other.fold and run.results["split_fingerprint"] != other.results["split_fingerprint"]:
            return (
                f"another split{where} ({run.results['split_fingerprint']}, not {other.results['split_fingerprint']})"
            )
        if run.fold != other.fold and run.answers is not None and other.answers is not None:
            a, b = run.answers.image, other.answers.image
            shared = len(np.intersect1d(a, b, assume_unique=True))
            if shared and not np.array_equal(a, b):
                return f"folds {other.fold} and {run.fold} share {shared} test images"
    return ""


class _Part:
    """A group in the making; its first run of a fold speaks for those of its other seeds, which have the same split.

    Asking every run about every other would make ten times the runs cost a hundred times as much.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.firsts: dict[int | None, Run] = {}
        self.taken: set[tuple[int | None, int | None]] = set()

    def add(self, run: Run) -> None:
        """A run that belongs to the group; one whose fold and seed it has already is a repeat."""
        place = run.fold, run.seed
        (self.group.repeated if place in self.taken else self.group.runs).append(run)
        self.taken.add(place)
        self.firsts.setdefault(run.fold, run)


def make_groups(runs: Iterable[Run]) -> list[Group]:
    """Group runs; see the top of this file for what belongs together."""
    alike: dict[Key, list[Run]] = defaultdict(list)
    for run in runs:
        alike[run.model, run.data, tuple(sorted((k, str(v)) for k, v in run.settings.items()))].append(run)
    groups = []
    for (model, data, _), members in alike.items():
        finished = [run for run in members if run.status == "done"]
        parts: list[_Part] = []
        for run in sorted(finished, key=lambda run: -finished_at(RunFolder(run.path))):
            reasons = []
            for part in parts:
                reason = _clash(run, part.firsts.values())
                if not reason:
                    break
                reasons.append(reason)
            else:
                part = _Part(Group(model, data, run.settings, refused=reasons[0] if reasons else ""))
                parts.append(part)
            part.add(run)
        made = [part.group for part in parts] or [Group(model, data, members[0].settings)]
        made[0].unfinished = [run for run in members if run.status != "done"]
        for group in made:
            group.runs.sort(key=lambda run: (_number(run.fold), _number(run.seed)))
        groups += made
    groups.sort(key=lambda g: (g.data, g.protocol, g.model, str(g.runs[0].path if g.runs else "")))
    _name(groups)
    return groups


def _number(value: int | None) -> int:
    return -1 if value is None else value


def differences(all_settings: list[dict[str, Any]]) -> list[list[str]]:
    """For each of several settings the ``key=value`` in which they are not all alike, classes chosen before values."""
    names = {name for settings in all_settings for name in settings}
    apart = [n for n in names if len({str(s.get(n)) for s in all_settings}) > 1 and not n.endswith("class_names")]
    apart.sort(key=lambda name: (not name.endswith("_target_"), name.count("."), name))
    return [[_short(name, settings[name]) for name in apart if name in settings] for settings in all_settings]


def _short(name: str, value: Any) -> str:
    name = re.sub(r"^(data|model)\.(?=(augment|protocol|loss|optim)\b)", "", name)  # as one types it
    if name.endswith("_target_"):
        return f"{name.rpartition('.')[0]}={str(value).rpartition('.')[2]}"
    return f"{name}={value}"


def _name(groups: list[Group]) -> None:
    """Give groups of one model, data and protocol the settings they differ in, and every group its id."""
    alike: dict[Key, list[Group]] = defaultdict(list)
    for group in groups:
        alike[group.model, group.data, group.protocol].append(group)
    for members in alike.values():
        for group, differs in zip(members, differences([g.settings for g in members]), strict=True):
            group.differs = differs + ([group.refused] if group.refused else [])
    for group in groups:
        name = f"{group.data}-{group.model}-{group.protocol.split(',')[0]}".lower()
        group.id = re.sub(r"[^a-z0-9_]+", "-", name)
    count = Counter(group.id for group in groups)
    for group in groups:
        if count[group.id] > 1:
            prints = [run.results["split_fingerprint"] for run in group.runs[:1]]
            mark = hashlib.sha256(json.dumps([group.settings, prints], sort_keys=True).encode()).hexdigest()
            group.id += f"-{mark[:4]}"
