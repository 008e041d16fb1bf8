"""Protocols: from a manifest to a `Split`.

A protocol draws only from its own ``split_seed``, so that another training seed keeps the split. People, the frames of
a sequence and, where neither is known, the copies of an image stay on one side; a division that parts them is refused
unless it is forced, and then every result is stamped. So is whatever else makes a figure incomparable.
"""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from fer.config import require_counts
from fer.data.manifest import PARTS, Array, Manifest
from fer.data.splits import Split, groups_of, stratified_folds
from fer.errors import UserError
from fer.runs import DROPPED

SELECTED_ON_TEST = "selected_on: test, the epoch was chosen on the part it is reported on, which flatters it"
NOT_OFFICIAL = "not the official test part, so not comparable with figures on it"


@dataclass(frozen=True, kw_only=True)
class Protocol(ABC):
    """Base of all protocols.

    Attributes:
        split_seed: seed of every random choice of the split.
        val_fraction: about this share becomes the validation part where one has to be cut, in (0, 0.5].
        select_on: ``val``, or ``test`` to choose the epoch on the test part as many papers do; stamped.
        by: what stays on one side: ``auto``, people and sequences where known and else copies of an image, or
            ``image``, copies alone.
        allow_shared_people: cut even where that puts people or sequences on both sides; stamped.
        drop_leaks: remove training images that are pixel-identical to a validation or test image.
        stamp: a sentence of its own for every result, or None.
    """

    split_seed: int
    val_fraction: float
    select_on: str
    by: str
    allow_shared_people: bool
    drop_leaks: bool
    stamp: str | None

    def __post_init__(self) -> None:
        """Refuse unknown words and a seed that no generator takes.

        Raises:
            UserError: naming the key and what it may be.
        """
        require_counts({"split_seed": self.split_seed}, {"split_seed": 0})
        self._one_of("select_on", "val", "test")
        self._one_of("by", "auto", "image")

    def _one_of(self, key: str, *allowed: Any) -> None:
        if getattr(self, key) not in allowed:
            raise UserError(f"protocol.{key}={getattr(self, key)} is not one of {', '.join(allowed)}")

    @abstractmethod
    def parts(self, manifest: Manifest, copies: Array, usable: Array) -> Split:
        """Cut the ``usable`` rows; ``copies`` as in `groups_of`."""

    def split(self, manifest: Manifest, copies: Array, usable: Array) -> Split:
        """The checked and stamped split of a manifest.

        Args:
            manifest: N images.
            copies: (N,) id of each image's pixels.
            usable: (N,) bool, False for images that cannot be read or are of no class in use.

        Raises:
            UserError: an impossible split, or one that puts people on both sides unasked.
        """
        split = self.parts(manifest, copies, np.flatnonzero(usable))
        leaks = np.isin(copies[split.train], copies[np.concatenate([split.val, split.test])]) & self.drop_leaks
        stamps = [*manifest.stamps, *([self.stamp] if self.stamp else [])]
        official = np.flatnonzero(usable & (manifest.split == "test"))
        if manifest.benchmark and len(official) and not np.array_equal(split.test, official):
            stamps.append(NOT_OFFICIAL)
        if split.selected_on == "test":
            stamps.append(SELECTED_ON_TEST)
        shared = [
            f"{n} {what} in {pair}" for what, names in _people(manifest) for pair, n in split.shared(names).items()
        ]
        if shared:
            stamps.append(f"parts share people: {', '.join(shared)}")
        if self.drop_leaks:
            stamps.append(f"{leaks.sum()} {DROPPED}")
        done = dataclasses.replace(
            split, train=split.train[~leaks], stamps=tuple(stamps), copies_before=split.copied(copies)
        )
        done.check(manifest)
        return done

    def _cut(self, manifest: Manifest, copies: Array, rows: Array, fraction: float) -> tuple[Array, Array]:
        """Cut about ``fraction`` of ``rows`` off: (kept, cut), both sorted."""
        if not 0 < fraction <= 0.5:
            raise UserError(f"protocol fractions lie in (0, 0.5], got {fraction}")
        share = Fraction(fraction).limit_denominator(max(5, round(1 / fraction)))
        group, kind = groups_of(manifest, copies, self.by)
        fold = stratified_folds(manifest, rows, group, kind, share.denominator, self.split_seed)
        return self._divide(manifest, rows, fold < share.numerator)

    def _divide(self, manifest: Manifest, rows: Array, held: Array) -> tuple[Array, Array]:
        """(rows not held, rows held), refused where a person or sequence would stand in both."""
        rest, out = rows[~held], rows[held]
        for what, names in _people(manifest) if not self.allow_shared_people else ():
            shared = np.intersect1d(names[rest], names[out])
            if len(shared):
                mend = "protocol.by=auto keeps them together, " if self.by != "auto" else ""
                raise UserError(
                    f"this split would put {len(shared)} {what} (the first is {shared[0]}) on both sides: {mend}"
                    "protocol.allow_shared_people=true forces it and stamps every result"
                )
        return rest, out

    def _with_val(
        self, manifest: Manifest, copies: Array, rest: Array, test: Array, rule: str, fold: int | None = None
    ) -> Split:
        """The split of which only the validation part is missing: cut from ``rest``, or the test part itself."""
        if self.select_on == "test":
            return Split(rest, test, test, rule, fold, selected_on="test")
        train, val = self._cut(manifest, copies, rest, self.val_fraction)
        return Split(train, val, test, f"{rule}; validation cut from the rest", fold)


def _people(manifest: Manifest) -> list[tuple[str, Array]]:
    """What is known of who is seen, with its name."""
    known = (("subjects", manifest.subject), ("sequences", manifest.sequence))
    return [(what, names) for what, names in known if names is not None]


@dataclass(frozen=True, kw_only=True)
class Official(Protocol):
    """The data set's own parts; a missing validation part is cut from train."""

    def parts(self, manifest: Manifest, copies: Array, usable: Array) -> Split:
        """Official parts. Raises UserError where the data set has no official test part."""
        train, val, test = (usable[manifest.split[usable] == part] for part in PARTS)
        if not len(test):
            raise UserError(f"{manifest.form} has no official test part: use protocol=holdout or protocol=kfold")
        if not len(val) or self.select_on == "test":
            return self._with_val(manifest, copies, train, test, "official parts")
        return Split(train, val, test, "official parts")


@dataclass(frozen=True, kw_only=True)
class Holdout(Protocol):
    """Validation and test cut from all images, whatever the official parts are.

    Attributes:
        test_fraction: about this share of all images is tested; ``val_fraction`` is of what remains.
    """

    test_fraction: float

    def parts(self, manifest: Manifest, copies: Array, usable: Array) -> Split:
        """A fresh three-way cut."""
        rest, test = self._cut(manifest, copies, usable, self.test_fraction)
        return self._with_val(manifest, copies, rest, test, f"{len(test):,} of all {len(usable):,} images held out")


@dataclass(frozen=True, kw_only=True)
class Folds(Protocol):
    """Base of cross-validation: one run holds one fold out; over all folds each image of the pool is held out once.

    Attributes:
        fold: the fold held out, from 0.
        pool: ``train``, the official training part, or ``all``; ``auto`` takes ``train`` where the data set's official
            test part is a benchmark, which then is neither trained on nor tested, and ``all`` otherwise.
        held_out: ``test``, the fold is tested and a validation part is cut from the rest; or ``val``, the fold
            chooses the epoch and the official test part is tested.
    """

    unit: ClassVar[str] = "folds"

    fold: int
    pool: str
    held_out: str

    def __post_init__(self) -> None:
        """Refuse unknown words and choices that exclude each other."""
        super().__post_init__()
        self._one_of("pool", "auto", "train", "all")
        self._one_of("held_out", "test", "val")
        if self.held_out == "val" and self.pool == "all":
            raise UserError("protocol.held_out=val tests the official test part, so it takes protocol.pool=train")
        if self.held_out == "val" and self.select_on == "test":
            raise UserError("protocol.held_out=val chooses the epoch on a fold, so it takes protocol.select_on=val")

    @abstractmethod
    def numbered(self, manifest: Manifest, copies: Array, rows: Array) -> tuple[Array, int, str]:
        """Fold of each of ``rows``, the number of folds, and the rule that made them in words."""

    def parts(self, manifest: Manifest, copies: Array, usable: Array) -> Split:
        """One fold held out.

        Raises:
            UserError: there is no such fold, or the data set lacks the official part asked for.
        """
        part = manifest.split[usable]
        test = usable[part == "test"]
        if self.held_out == "val" and not len(test):
            raise UserError(f"protocol.held_out=val: {manifest.form} has no official test part, use held_out=test")
        pool = self.pool
        if pool == "auto":
            pool = "train" if self.held_out == "val" or (manifest.benchmark and len(test)) else "all"
        rows = usable if pool == "all" else usable[part == "train"]
        if not len(rows):
            raise UserError(f"protocol.pool=train: {manifest.form} has no official training part, use pool=all")
        fold, count, made = self.numbered(manifest, copies, rows)
        if not 0 <= self.fold < count:
            raise UserError(f"protocol.fold={self.fold}: there are {count} {self.unit}, numbered 0 to {count - 1}")
        rest, held = self._divide(manifest, rows, fold == self.fold)
        where = f"all {len(rows):,} images" if pool == "all" else f"the {len(rows):,} images of the training part"
        rule = f"fold {self.fold} of {count} over {where}, {made}"
        if self.held_out == "val":
            return Split(rest, held, test, f"{rule}; it validates, the official test part is tested", self.fold)
        return self._with_val(manifest, copies, rest, held, rule, self.fold)


@dataclass(frozen=True, kw_only=True)
class KFold(Folds):
    """Stratified k-fold cross-validation, grouped as ``by`` says.

    Attributes:
        folds: number of folds.
        own_folds: take the data set's customary folds where it has them for this number (CK+: 10).
    """

    folds: int
    own_folds: bool

    def __post_init__(self) -> None:
        """Refuse a single fold."""
        super().__post_init__()
        if self.folds < 2:
            raise UserError(f"protocol.folds={self.folds}: expected at least 2")

    def numbered(self, manifest: Manifest, copies: Array, rows: Array) -> tuple[Array, int, str]:
        """The customary folds, or stratified ones."""
        own = manifest.fold
        if self.own_folds and self.by == "auto" and own is not None and own.max() + 1 == self.folds:
            return own[rows], self.folds, "the customary folds of the data set"
        group, kind = groups_of(manifest, copies, self.by)
        fold = stratified_folds(manifest, rows, group, kind, self.folds, self.split_seed)
        return fold, self.folds, f"stratified, grouped by {kind}"


@dataclass(frozen=True, kw_only=True)
class LeaveOneSubjectOut(Folds):
    """Each person is one fold, numbered in the order of their names as text."""

    unit: ClassVar[str] = "subjects"

    def numbered(self, manifest: Manifest, copies: Array, rows: Array) -> tuple[Array, int, str]:
        """One fold per person. Raises UserError where the data set names none."""
        if manifest.subject is None:
            raise UserError(f"protocol=loso leaves one person out, but {manifest.form} names none: use protocol=kfold")
        names, number = np.unique(manifest.subject[rows], return_inverse=True)
        return number, len(names), "a subject each"
