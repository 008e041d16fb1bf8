"""Images that stand in a data set twice: exactly, with other labels, or nearly."""

from typing import Any

import numpy as np

from fer.data.manifest import PARTS, Array, Manifest
from fer.data.near_duplicates import near_groups
from fer.data.splits import PAIRS

Report = dict[str, Any]


def copies(manifest: Manifest, rows: Array, pixels: Array, thumbnails: Array) -> Report:
    """What stands in a data set more than once.

    Args:
        manifest: N images.
        rows: (M,) the readable ones.
        pixels: (N,) uint64, equal for pixel-identical images.
        thumbnails: (N, SIDE, SIDE) uint8.

    Returns:
        - ``duplicates``, pixel-identical images: ``within`` {part: images too many}, ``across`` [{parts: [a, b],
          images of b that also stand in a}], ``groups``, ``excess`` (images too many in all), ``members``;
        - ``conflicts``, those of them with different labels: ``groups``, ``images``, ``members``;
        - ``near_duplicates``: groups of images that are not all pixel-identical; frames of one video do not count;
        - ``near_across``: as ``across``, only of images without a pixel-identical one there.

        A group, and each of ``members``, is {items, parts, classes}, its images in the manifest's order.
    """
    part = part_names(manifest)[rows]
    first, image = np.unique(pixels[rows], return_index=True, return_inverse=True)[1:]
    parts = [name for name in (*PARTS, "all") if (part == name).any()]
    pairs = [(a, b) for a, b in PAIRS if a in parts and b in parts]
    exact = _groups(image)
    labels = manifest.label[rows]
    conflicts = [group for group in exact if len(np.unique(labels[group])) > 1]

    # One of each set of copies is compared, and the others join its group.
    once = rows[first]
    sequence = None if manifest.sequence is None else np.unique(manifest.sequence, return_inverse=True)[1][once]
    near = near_groups(thumbnails[once], sequence)[image]
    similar = [group for group in _groups(near) if len(np.unique(image[group])) > 1]

    def describe(groups: list[Array]) -> list[Report]:
        return [
            {
                "items": manifest.item[rows[group]].tolist(),
                "parts": part[group].tolist(),
                "classes": [manifest.class_names[label] for label in labels[group]],
            }
            for group in groups
        ]

    def across(ids: Array, but: Array | None = None) -> list[Report]:
        """Images of b that also stand in a, by ``ids``; those that do by ``but`` too not counted."""
        out = []
        for a, b in pairs:
            also = np.isin(ids[part == b], ids[part == a])
            if but is not None:
                also &= ~np.isin(but[part == b], but[part == a])
            out.append({"parts": [a, b], "images": int(also.sum())})
        return out

    return {
        "duplicates": {
            "within": {name: int((part == name).sum() - len(np.unique(image[part == name]))) for name in parts},
            "across": across(image),
            "groups": len(exact),
            "excess": len(rows) - len(first),
            "members": describe(exact),
        },
        "conflicts": {
            "groups": len(conflicts),
            "images": sum(map(len, conflicts)),
            "members": describe(conflicts),
        },
        "near_duplicates": describe(similar),
        "near_across": across(near, but=image),
    }


def _groups(ids: Array) -> list[Array]:
    """Positions of equal ids, for each id that occurs twice or more, in the order of their first positions."""
    order = np.argsort(ids, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(ids[order])) + 1)
    return sorted((group for group in groups if len(group) > 1), key=lambda group: int(group[0]))


def part_names(manifest: Manifest) -> Array:
    """(N,) name of the official part, ``all`` where there is none."""
    return np.where(manifest.split == "", "all", manifest.split)
