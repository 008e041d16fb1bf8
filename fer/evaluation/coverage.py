"""Accuracy against coverage: how right a network is about the images it is surest of."""

from typing import Any

import numpy as np

from fer.metrics import Array

COVERAGES = np.round(np.arange(1, 21) / 20, 2)


def selective_accuracy(probabilities: Array, label: Array) -> Array:
    """(n,) accuracy among the 1, 2, ... n images with the highest probability of the predicted class.

    Images of equal confidence stand in the order they come in.
    """
    order = np.argsort(-probabilities.max(1), kind="stable")
    right = (probabilities.argmax(1) == label)[order]
    accuracy: Array = right.cumsum() / np.arange(1, len(label) + 1)
    return accuracy


def coverage_record(probabilities: Array, label: Array) -> dict[str, Any]:
    """Selective accuracy at round coverages, and the area under the risk-coverage curve.

    ``aurc`` is the mean of 1 - selective accuracy over all coverages 1/n ... 1 (Geifman and El-Yaniv 2017; smaller is
    better); ``excess_aurc`` is what it has above that of the best possible order of the same answers (Geifman et al.
    2019).
    """
    accuracy = selective_accuracy(probabilities, label)
    n, wrong = len(label), int((probabilities.argmax(1) != label).sum())
    aurc = float((1 - accuracy).mean())
    best = np.maximum(np.arange(1, n + 1) - (n - wrong), 0) / np.arange(1, n + 1)
    kept = np.maximum(np.ceil(COVERAGES * n - 1e-9).astype(int), 1)
    confidence = np.sort(probabilities.max(1))[::-1]
    return {
        "n": n,
        "aurc": aurc,
        "excess_aurc": aurc - float(best.mean()),
        "points": [
            {
                "coverage": float(c),
                "images": int(k),
                "accuracy": float(accuracy[k - 1]),
                "least": float(confidence[k - 1]),
            }
            for c, k in zip(COVERAGES, kept, strict=True)
        ],
    }
