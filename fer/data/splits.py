"""Splits: which images train, which choose the epoch, which are read once at the end; and how images are divided.

A `Split` is what a protocol (`fer.data.protocols`) makes of a manifest. Dividing never looks at pixels, models, the
order of rows or the order of classes: `groups_of` says what must stay on one side, `stratified_folds` deals it out.
"""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from fer.data.manifest import PARTS, Array, Manifest, Part
from fer.errors import UserError

PAIRS: tuple[tuple[Part, Part], ...] = (("train", "val"), ("train", "test"), ("val", "test"))
_UNITS = {"subject": "people", "sequence": "sequences", "image": "different images"}


@dataclass(frozen=True)
class Split:
    """Rows of the manifest in each part.

    Attributes:
        train, val, test: sorted int64 rows; ``val`` is ``test`` where the epoch is chosen on the test part.
        rule: in words, what made this split; printed and recorded.
        fold: number of the fold held out, None where there are no folds.
        selected_on: the part that chooses the epoch; anything but ``val`` is stamped on every result.
        stamps: sentences every table must carry beside a figure made with this split.
        copies_before: `copied` before leaks were dropped from train.
    """

    train: Array
    val: Array
    test: Array
    rule: str
    fold: int | None = None
    selected_on: str = "val"
    stamps: tuple[str, ...] = ()
    copies_before: dict[str, int] = field(default_factory=dict)

    def part(self, name: Part) -> Array:
        """Rows of one part by name."""
        rows: Array = {"train": self.train, "val": self.val, "test": self.test}[name]
        return rows

    def parts(self) -> Iterator[tuple[Part, Array]]:
        """Name and rows of each part."""
        return ((name, self.part(name)) for name in PARTS)

    @property
    def pairs(self) -> tuple[tuple[Part, Part], ...]:
        """Pairs of different parts; val is no part of its own where the epoch is chosen on test."""
        return PAIRS if self.selected_on == "val" else (("train", "test"),)

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
        for a, b in self.pairs:
            shared = np.intersect1d(self.part(a), self.part(b))
            if len(shared):
                raise UserError(f"{manifest.item[shared[0]]} and {len(shared) - 1} more stand in both {a} and {b}")

    def shared(self, values: Array | None) -> dict[str, int]:
        """How many of the (N,) values, people or sequences, occur in two parts: ``{"train/test": 3}``.

        Empty when there are none, or when they are not known.
        """
        if values is None:
            return {}
        counts = {f"{a}/{b}": len(np.intersect1d(values[self.part(a)], values[self.part(b)])) for a, b in self.pairs}
        return {pair: n for pair, n in counts.items() if n}

    def copied(self, copies: Array) -> dict[str, int]:
        """How many images of a part are pixel-identical to one of an earlier part.

        Args:
            copies: (N,) id of each image's pixels.

        Returns:
            ``{"test images also in train": 288}`` for every pair of parts.
        """
        return {
            f"{b} images also in {a}": int(np.isin(copies[self.part(b)], copies[self.part(a)]).sum())
            for a, b in self.pairs
        }


def groups_of(manifest: Manifest, copies: Array, by: str) -> tuple[Array, str]:
    """What must stay on one side: people and sequences where known, else copies of an image.

    Args:
        manifest: N images.
        copies: (N,) id of each image's pixels; equal ids are pixel-identical images.
        by: ``auto``, or ``image`` to disregard people and sequences.

    Returns:
        (N,) group ids, numbered by item name so that neither row order nor pixel values decide them, and what a group
        is: ``subject``, ``sequence`` or ``image``.
    """
    known = [values for values in (manifest.subject, manifest.sequence) if values is not None and by == "auto"]
    order = np.argsort(manifest.item, kind="stable")
    ids = [pd.factorize(values[order])[0] for values in known or [copies]]
    if len(ids) == 2:
        # A video of two people ties them together, so groups are what people and sequences connect.
        n = int(ids[0].max(initial=-1)) + 1
        size = n + int(ids[1].max(initial=-1)) + 1
        edges = coo_array((np.ones(len(order)), (ids[0], n + ids[1])), shape=(size, size))
        ids = [connected_components(edges, directed=False)[1][ids[0]]]
    group = np.empty(len(order), dtype=np.int64)
    group[order] = ids[0]
    return group, "image" if not known else "sequence" if manifest.subject is None else "subject"


def stratified_folds(manifest: Manifest, rows: Array, group: Array, kind: str, folds: int, seed: int) -> Array:
    """Fold of each of ``rows``: stratified by class name, a group never divided.

    A pure function of the rows' items, class names and groups and of the seed. A fold may lack a class.

    Args:
        manifest: N images.
        rows: (M,) the images to deal out.
        group: (N,) group ids of `groups_of`.
        kind: what a group is; people and sequences are large and hold several classes, copies of an image are not.
        folds: number of folds, at least 2.
        seed: the split seed.

    Returns:
        (M,) int64 from 0 to ``folds - 1``.

    Raises:
        UserError: fewer groups than folds, or no class with an image for each fold.
    """
    # The position of a class's name in the alphabet: its index means nothing.
    label = np.unique(manifest.class_names, return_inverse=True)[1][manifest.label[rows]]
    by_group = np.lexsort((label, group[rows]))
    unique, first, inverse = np.unique(group[rows][by_group], return_index=True, return_inverse=True)
    if len(unique) < folds:
        raise UserError(
            f"{folds} folds need at least {folds} {_UNITS[kind]}, found {len(unique)}: lower protocol.folds, or cut "
            "larger parts (protocol.val_fraction, protocol.test_fraction)"
        )
    # Copies of an image nearly always share a label, so stratifying them by the first one's is exact enough and, unlike
    # StratifiedGroupKFold, quick on hundreds of thousands of images.
    copies = kind == "image"
    units = label[by_group][first] if copies else label[by_group]
    if np.bincount(units).max() < folds:
        raise UserError(
            f"no class has an image for each of {folds} folds: lower protocol.folds, or cut larger parts "
            "(protocol.val_fraction, protocol.test_fraction)"
        )
    splitter: Any = StratifiedKFold if copies else StratifiedGroupKFold
    dealt = np.empty(len(units), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # the table of counts shows it
        divided = splitter(folds, shuffle=True, random_state=seed).split(units, units, None if copies else inverse)
        for k, (_, held) in enumerate(divided):
            dealt[held] = k
    fold = np.empty(len(rows), dtype=np.int64)
    fold[by_group] = dealt[inverse] if copies else dealt
    return fold
