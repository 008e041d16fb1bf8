"""Accuracy by what the data set says of each image: gender, age, head pose ..."""

from typing import Any

import numpy as np

from fer.evaluation.answers import Answers
from fer.metrics import Array, confusion_counts, scores
from fer.reporting.statistics import effective_images, wilson

UNKNOWN = "unknown"


def subgroup_record(answers: Answers, person: Array, attributes: dict[str, Any], most: int) -> dict[str, Any]:
    """Accuracy of each value of each attribute, with Wilson's 95 % interval for as many images of different people.

    Args:
        answers: n images.
        person: (n,) who each shows.
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
        groups[name] = {str(value) or UNKNOWN: _of(answers, person, here == value) for value in different}
    return {"groups": groups, "left_out": left_out}


def _of(answers: Answers, person: Array, chosen: Any) -> dict[str, Any]:
    label, predicted = answers.label[chosen], answers.predicted[chosen]
    hits = label == predicted
    n, right = len(label), int(hits.sum())
    low, high = wilson(right / n, effective_images(hits, person[chosen]))
    counts = confusion_counts(label, predicted, len(answers.class_names))
    return {
        "n": n,
        "right": right,
        "acc": right / n,
        "low": low,
        "high": high,
        "mean_acc": scores(counts, answers.class_names)["mean_acc"],
    }
