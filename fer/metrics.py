"""Scores derived from one confusion matrix and one set of calibration bins: plain numpy, nothing framework-specific.

Accuracy, mean class accuracy, F1 and the per-class scores are exact functions of the counts, so counts are all that
training keeps on the device. Classes that do not occur among the labels have no accuracy and are left out of the
mean; averaging them as zero would punish folds that lack a class (CK+, leave-one-subject-out).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def confusion_counts(label: Array, predicted: Array, num_classes: int) -> Array:
    """(K, K) int64 counts, rows are labels and columns predictions."""
    flat = np.bincount(label * num_classes + predicted, minlength=num_classes * num_classes)
    return flat.reshape(num_classes, num_classes)


def scores(confusion: Array, class_names: Sequence[str]) -> dict[str, float]:
    """Accuracy, mean class accuracy, macro F1 and the accuracy of each class that occurs.

    Args:
        confusion: (K, K) counts, rows are labels.
        class_names: K names.

    Returns:
        ``acc``, ``mean_acc`` (mean recall over classes with support), ``macro_f1`` (over classes that occur as label
        or prediction, as scikit-learn does), ``acc_<class>``; all NaN when there is no image.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    support, predicted, hits = counts.sum(1), counts.sum(0), counts.diagonal()
    total, seen, used = counts.sum(), counts.sum(1) > 0, (support + predicted) > 0
    nan = float("nan")
    out = {
        "acc": float(hits.sum() / total) if total else nan,
        "mean_acc": float(np.mean(hits[seen] / support[seen])) if total else nan,
        "macro_f1": float(np.mean(2 * hits[used] / (support + predicted)[used])) if total else nan,
    }
    return out | {f"acc_{c}": float(hits[i] / support[i]) for i, c in enumerate(class_names) if seen[i]}


def sequence_counts(sequence: Array, label: Array, probabilities: Array) -> Array:
    """(K, K) confusion counts of videos, each named by the mean probability of its frames.

    Args:
        sequence: (n,) the video of each frame.
        label: (n,) classes; frames of one video with another label, such as its neutral first one, count on their own.
        probabilities: (n, K).
    """
    k = probabilities.shape[1]
    video, place = np.unique(np.unique(sequence, return_inverse=True)[1] * k + label, return_inverse=True)
    total = np.zeros((len(video), k))
    np.add.at(total, place, probabilities)  # the mean's order of classes is the sum's
    return confusion_counts(video % k, total.argmax(1), k)


def sequence_scores(confusion: Array, class_names: Sequence[str]) -> dict[str, float]:
    """``sequence_acc`` and ``sequence_mean_acc``: `scores` of `sequence_counts`."""
    found = scores(confusion, class_names)
    return {f"sequence_{name}": found[name] for name in ("acc", "mean_acc")}


def expected_calibration_error(bins: Array) -> float:
    """Expected calibration error over equal-width confidence bins (Guo et al., 2017, eq. 3).

    Args:
        bins: (B, 3): images, summed confidence, summed correctness per bin.
    """
    count, confidence, correct = np.asarray(bins, dtype=np.float64).T
    return float(np.abs(confidence - correct).sum() / count.sum()) if count.sum() else float("nan")


def calibration_bins(probabilities: Array, label: Array, bins: int) -> Array:
    """(bins, 3) images, summed confidence and summed correctness, from (N, K) probabilities."""
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    weights = (np.ones_like(confidence), confidence, (predicted == label).astype(np.float64))
    return np.stack([np.bincount(place, w, minlength=bins) for w in weights], axis=1)
