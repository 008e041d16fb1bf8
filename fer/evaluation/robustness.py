"""Accuracy under corruption, each at five severities."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from rich.progress import track

from fer.data.base import ExpressionDataModule
from fer.evaluation.answers import Answers
from fer.evaluation.corruptions import SEVERITIES, CorruptedImages, Corruption, own_seed, places_of
from fer.metrics import Array, scores

Read = Callable[[Sequence[ExpressionDataModule], str], Answers]  # one opened data module per network, views -> answers


def robustness_record(
    read: Read,
    datas: Sequence[ExpressionDataModule],
    corruptions: Mapping[str, Corruption],
    seed: int,
    tta: str,
    images: int | None,
) -> dict[str, Any]:
    """Accuracy of every corruption at every severity.

    Args:
        read: answers of the network, or of an ensemble, on the test part.
        datas: opened data modules, one per network, of the same images.
        corruptions: by name.
        seed: of the suite, and of the choice of images.
        tta: views of each image.
        images: test so many of the test part's images, drawn; None: all.

    Returns:
        ``clean`` and, by corruption, ``acc`` and ``mean_acc`` at each severity and the mean ``drop`` in accuracy;
        ``mean_drop`` over all corruptions.
    """
    datas = [_fewer(data, seed, images) for data in datas]
    known = places_of(datas[0].store.manifest, datas[0].store.windows)[1][datas[0].split.test]
    clean = _scores(read(datas, tta))
    table: dict[str, Any] = {}
    jobs = [(name, severity) for name in corruptions for severity in SEVERITIES]
    for name, severity in track(jobs, description="corruptions", transient=True):
        corrupted = [_corrupted(data, corruptions[name], severity, own_seed(seed, name)) for data in datas]
        found = _scores(read(corrupted, tta))
        one = table.setdefault(name, {"acc": [], "mean_acc": []})
        one["acc"].append(found["acc"])
        one["mean_acc"].append(found["mean_acc"])
    for one in table.values():
        one["drop"] = clean["acc"] - float(np.mean(one["acc"]))
    return {
        "n": len(datas[0].split.test),
        "seed": seed,
        "tta": tta,
        "places": {"of_the_data": int(known.sum()), "aligned": int((~known).sum())},
        "severities": list(SEVERITIES),
        "clean": clean,
        "corruptions": table,
        "mean_drop": float(np.mean([one["drop"] for one in table.values()])),
    }


def _scores(answers: Answers) -> dict[str, float]:
    found = scores(answers.confusion, answers.class_names)
    return {key: found[key] for key in ("acc", "mean_acc")}


def _fewer(data: ExpressionDataModule, seed: int, images: int | None) -> ExpressionDataModule:
    """The data with at most so many test images, drawn by item so that every network gets the same."""
    test = data.split.test
    if images is None or images >= len(test):
        return data
    by_item = test[np.argsort(data.store.manifest.item[test], kind="stable")]
    drawn = np.random.default_rng(seed).permutation(by_item)[:images]
    out = copy.copy(data)
    out.split = dataclasses.replace(data.split, test=np.sort(drawn))
    return out


def _corrupted(data: ExpressionDataModule, corruption: Corruption, severity: int, seed: int) -> ExpressionDataModule:
    """The data with every image corrupted as it is read."""
    manifest, windows = data.store.manifest, data.store.windows
    corrupt = corruption.at(severity, data.store_size, seed)
    images = CorruptedImages(data.store.images, places_of(manifest, windows)[0], corrupt)
    out = copy.copy(data)
    out.store = dataclasses.replace(data.store, images=cast(Array, images))
    out.resident, out.num_workers = "no", 0  # read one by one, here
    return out
