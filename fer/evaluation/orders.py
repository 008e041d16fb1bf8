"""Accuracy by the order in which test images come: an answer must not depend on the images beside it in a batch.

It does where a network attends among the images of a batch (``model.attention=batch`` of Conv-cut). In a test part that
is read class by class the neighbours then give the class away.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fer.data.base import ExpressionDataModule
from fer.evaluation.answers import Answers
from fer.metrics import Array, scores
from fer.reporting.statistics import RESAMPLES, paired_bootstrap

Read = Callable[[Sequence[ExpressionDataModule], str], Answers]  # one opened data module per network, views -> answers


def orders_record(read: Read, datas: Sequence[ExpressionDataModule], tta: str, count: int, seed: int) -> dict[str, Any]:
    """The same test images with the same weights, sorted by class and in drawn orders.

    Args:
        read: answers of the network, or of an ensemble, on the test part.
        datas: opened data modules, one per network, of the same images.
        tta: views of each image.
        count: drawn orders.
        seed: of the drawing.

    Returns:
        ``by_class`` and a list ``drawn``, each with ``acc`` and ``mean_acc``; ``changed``, the images whose answer is
        not the same in all orders; and ``difference`` in accuracy, by class minus the mean of the drawn orders, with
        ``low`` and ``high``, its 95 % interval by a bootstrap over people, or images where those are not known.
    """
    label, test = datas[0].label, datas[0].split.test
    by_class = test[np.argsort(label[test], kind="stable")]
    generator = np.random.default_rng(seed)
    orders = [by_class, *(generator.permutation(test) for _ in range(count))]
    found = [read([_ordered(data, rows) for data in datas], tta) for rows in orders]
    first, *others = found
    right = [answers.predicted == answers.label for answers in found]
    alike = np.all([answers.predicted == first.predicted for answers in others], axis=0)
    nothing, person = np.zeros(len(first.label)), datas[0].store.manifest.person[first.rows]
    worth = paired_bootstrap(right[0], np.mean(right[1:], axis=0), nothing, RESAMPLES, seed, person=person)
    return {
        "n": len(first.label),
        "batch": datas[0].eval_batch_size,
        "tta": tta,
        "seed": seed,
        "by_class": _scores(first),
        "drawn": [_scores(answers) for answers in others],
        "changed": int((~alike).sum()),
        "difference": worth.difference,
        "low": worth.low,
        "high": worth.high,
    }


def _scores(answers: Answers) -> dict[str, float]:
    found = scores(answers.confusion, answers.class_names)
    return {key: found[key] for key in ("acc", "mean_acc")}


def _ordered(data: ExpressionDataModule, rows: Array) -> ExpressionDataModule:
    """The data with its test images in another order."""
    out = copy.copy(data)
    out.split = dataclasses.replace(data.split, test=rows)
    return out
