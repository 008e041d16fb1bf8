"""Accuracy by what the data set says of each image: gender, age, head pose ..."""

from typing import Any

import numpy as np
from scipy.stats import binomtest

from fer.evaluation.answers import Answers
from fer.metrics import confusion_counts, scores

CONFIDENCE = 0.95
UNKNOWN = "unknown"


def subgroup_record(answers: Answers, attributes: dict[str, Any], most: int) -> dict[str, Any]:
    """Accuracy of each value of each attribute, with Wilson's 95 % interval (JASA 22, 1927).

    Args:
        answers: n images.
        attributes: (N,) str by name, of all images of the data set.
        most: attributes with more different values are left out.

    Returns:
        ``groups``: by attribute and value ``n``, ``right``, ``acc``, ``low``, ``high``, ``mean_acc``; and ``left_out``:
        how many values each attribute left out has.
    """
    groups: dict[str, dict[str, Any]] = {}
    left_out: dict[str, int] = {}
    for name, values in attributes.items():
        here = np.asarray(values)[answers.rows]
        different = np.unique(here)
        if len(different) > most:
            left_out[name] = len(different)
            continue
        groups[name] = {str(value) or UNKNOWN: _of(answers, here == value) for value in different}
    return {"groups": groups, "left_out": left_out}


def _of(answers: Answers, chosen: Any) -> dict[str, Any]:
    label, predicted = answers.label[chosen], answers.predicted[chosen]
    n, right = len(label), int((label == predicted).sum())
    interval = binomtest(right, n).proportion_ci(CONFIDENCE, method="wilson")
    counts = confusion_counts(label, predicted, len(answers.class_names))
    return {
        "n": n,
        "right": right,
        "acc": right / n,
        "low": float(interval.low),
        "high": float(interval.high),
        "mean_acc": scores(counts, answers.class_names)["mean_acc"],
    }
