"""Protocols: which images train, which choose the epoch, which are read once at the end.

A protocol turns a manifest into a `Split`. It never looks at pixels or models, draws only from its own
``split_seed`` (so that another training seed keeps the split), and keeps the frames of a person, the frames of a
sequence and the copies of an image on one side. The checks in `Split.check` run on every split, the default's included.
"""

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from fer.data.manifest import PARTS, Array, Manifest, Part
from fer.errors import UserError

PAIRS: tuple[tuple[Part, Part], ...] = (("train", "val"), ("train", "test"), ("val", "test"))


@dataclass(frozen=True)
class Split:
    """Rows of the manifest in each part.

    Attributes:
        train, val, test: sorted int64 rows.
        selected_on: the part that chooses the epoch; anything but ``val`` is stamped on every result.
        stamps: sentences every table must carry beside a figure made with this split.
    """

    train: Array
    val: Array
    test: Array
    selected_on: str = "val"
    stamps: tuple[str, ...] = ()

    def part(self, name: Part) -> Array:
        """Rows of one part by name."""
        rows: Array = {"train": self.train, "val": self.val, "test": self.test}[name]
        return rows

    def parts(self) -> Iterator[tuple[Part, Array]]:
        """Name and rows of each part."""
        return ((name, self.part(name)) for name in PARTS)

    def fingerprint(self, manifest: Manifest) -> str:
        """Hash of which items are in which part, independent of the manifest's row order."""
        digest = hashlib.sha256()
        for name, rows in self.parts():
            digest.update(f"{name}:".encode() + "\n".join(sorted(map(str, manifest.item[rows]))).encode())
        return digest.hexdigest()[:16]

    def check(self, manifest: Manifest) -> None:
        """Refuse a split in which parts share an image, or in which one is empty.

        Raises:
            UserError: naming the parts and one shared row.
        """
        for name, rows in self.parts():
            if not len(rows):
                raise UserError(f"the {name} part is empty: choose another protocol (protocol=holdout cuts all parts)")
        for a, b in PAIRS:
            shared = np.intersect1d(self.part(a), self.part(b))
            if len(shared) and not (self.selected_on == "test" and (a, b) == ("val", "test")):
                raise UserError(f"{manifest.item[shared[0]]} and {len(shared) - 1} more stand in both {a} and {b}")

    def shared_people(self, manifest: Manifest) -> dict[str, int]:
        """Subjects that occur in two parts, ``{"train/test": 3}``; empty when disjoint or unknown."""
        out = {}
        if manifest.subject is not None:
            for a, b in PAIRS:
                n = len(np.intersect1d(manifest.subject[self.part(a)], manifest.subject[self.part(b)]))
                if n:
                    out[f"{a}/{b}"] = n
        return out


def groups_of(manifest: Manifest, copies: Array) -> tuple[Array, bool]:
    """What must stay on one side: people where known, else sequences, else copies of an image.

    Args:
        manifest: N images.
        copies: (N,) id of each image's pixels; equal ids are pixel-identical images.

    Returns:
        (N,) integer group ids, and whether they are people or sequences (large, mixed groups).
    """
    names = manifest.subject if manifest.subject is not None else manifest.sequence
    if names is not None:
        return np.unique(names, return_inverse=True)[1], True
    return np.unique(copies, return_inverse=True)[1], False


def stratified_folds(label: Array, group: Array, large_groups: bool, folds: int, seed: int) -> Array:
    """Fold number of each image: stratified by label, a group never divided.

    Args:
        label: (N,) class indices.
        group: (N,) group ids.
        large_groups: groups are people or sequences (each holds several classes) rather than copies of one image.
        folds: number of folds, at least 2.
        seed: the split seed.

    Raises:
        UserError: fewer groups than folds, or a class with fewer images than folds.
    """
    unique, first = np.unique(group, return_index=True)
    if len(unique) < folds:
        raise UserError(
            f"{folds} folds need at least {folds} people or images, found {len(unique)}: lower protocol.folds"
        )
    fold = np.empty(len(label), dtype=np.int64)
    splitter: Any
    if large_groups:
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        for k, (_, held) in enumerate(splitter.split(label, label, group)):
            fold[held] = k
        return fold
    # Copies of an image nearly always share a label, so stratifying the groups by their first label is exact enough
    # and, unlike StratifiedGroupKFold, quick on hundreds of thousands of images.
    if np.bincount(label[first]).max() < folds:
        raise UserError(f"no class has {folds} different images: lower protocol.folds or protocol.val_fraction")
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    fold_of_group = np.empty(len(unique), dtype=np.int64)
    for k, (_, held) in enumerate(splitter.split(unique, label[first])):
        fold_of_group[held] = k
    return fold_of_group[np.searchsorted(unique, group)]


@dataclass(frozen=True, kw_only=True)
class Protocol(ABC):
    """Base of all protocols.

    Attributes:
        split_seed: seed of every random choice of the split.
        drop_leaks: remove training images that are pixel-identical to a validation or test image.
    """

    split_seed: int
    drop_leaks: bool

    @abstractmethod
    def parts(self, manifest: Manifest, copies: Array, usable: Array) -> Split:
        """Cut the ``usable`` rows; ``copies`` as in `groups_of`."""

    def split(self, manifest: Manifest, copies: Array, usable: Array) -> Split:
        """The checked split of a manifest.

        Args:
            manifest: N images.
            copies: (N,) id of each image's pixels.
            usable: (N,) bool, False for images that cannot be read.
        """
        split = self.parts(manifest, copies, np.flatnonzero(usable))
        if self.drop_leaks:
            leaks = np.isin(copies[split.train], copies[np.concatenate([split.val, split.test])])
            split = dataclasses.replace(
                split,
                train=split.train[~leaks],
                stamps=(*split.stamps, f"{leaks.sum()} leaked copies left out of train"),
            )
        split.check(manifest)
        return split

    def _cut(self, manifest: Manifest, copies: Array, rows: Array, fraction: float) -> tuple[Array, Array]:
        """Cut about ``fraction`` of ``rows`` off: (kept, cut), both sorted."""
        if not 0 < fraction <= 0.5:
            raise UserError(f"protocol fractions lie in (0, 0.5], got {fraction}")
        group, large = groups_of(manifest, copies)
        fold = stratified_folds(manifest.label[rows], group[rows], large, round(1 / fraction), self.split_seed)
        return rows[fold != 0], rows[fold == 0]


@dataclass(frozen=True, kw_only=True)
class Official(Protocol):
    """The data set's own parts; a missing validation part is cut from train.

    Attributes:
        val_fraction: share of train that becomes the validation part where the data set has none.
    """

    val_fraction: float

    def parts(self, manifest: Manifest, copies: Array, usable: Array) -> Split:
        """Official parts. Raises UserError where the data set has no official test part."""
        train, val, test = (usable[manifest.split[usable] == part] for part in PARTS)
        if not len(test):
            raise UserError(f"{manifest.form} has no official test part: use protocol=holdout or protocol=kfold")
        if not len(val):
            train, val = self._cut(manifest, copies, train, self.val_fraction)
        return Split(train, val, test)


@dataclass(frozen=True, kw_only=True)
class Holdout(Protocol):
    """Validation and test cut from all images, whatever the official parts are; people never shared.

    Attributes:
        val_fraction: share of what remains after the test part.
        test_fraction: share of all images.
    """

    val_fraction: float
    test_fraction: float

    def parts(self, manifest: Manifest, copies: Array, usable: Array) -> Split:
        """A fresh three-way cut, stamped where it replaces an official one."""
        rest, test = self._cut(manifest, copies, usable, self.test_fraction)
        train, val = self._cut(manifest, copies, rest, self.val_fraction)
        official = bool((manifest.split[usable] == "test").any())
        stamps = ("own hold-out split, not comparable with the official one",) if official else ()
        return Split(train, val, test, stamps=stamps)
