"""Scores of detections: average precision at IoU 0.5 with 101 points, recall, and the expression of what was found.

The definitions are COCO's: detections of all images in the order of their scores, each taking the free known box it
overlaps most; precision made monotone and averaged over 101 recalls. Plain numpy; boxes are corners x1, y1, x2, y2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fer.metrics import Array

IOU = 0.5
RECALLS = np.linspace(0, 1, 101)


class Image(NamedTuple):
    """What was found and what is known in one image.

    Attributes:
        boxes: (n, 4) found.
        labels: (n,) their classes.
        scores: (n,) their confidence.
        true_boxes: (m, 4) known.
        true_labels: (m,) their classes.
    """

    boxes: Array
    labels: Array
    scores: Array
    true_boxes: Array
    true_labels: Array


def box_iou(a: Array, b: Array) -> Array:
    """(n, 4) and (m, 4) -> (n, m) intersection over union; 0 for boxes without area."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=2)
    area_a, area_b = (np.prod(x[:, 2:] - x[:, :2], axis=1) for x in (a, b))
    result: Array = shared / np.maximum(area_a[:, None] + area_b[None] - shared, 1e-12)
    return result


def match(found: Array, known: Array) -> Array:
    """(n,) index of the known box each found one takes, -1 for none; ``found`` (n, 4) comes best first."""
    taken = np.full(len(found), -1)
    if not len(known):
        return taken
    overlap = box_iou(found, known)
    free = np.ones(len(known), dtype=bool)
    for i in np.flatnonzero(overlap.max(1, initial=0) >= IOU):
        k = int(np.where(free, overlap[i], -1).argmax())
        if free[k] and overlap[i, k] >= IOU:
            taken[i], free[k] = k, False
    return taken


def average_precision(scores: Array, hits: Array, known: int) -> float:
    """Area under the precision-recall curve by 101 points.

    Args:
        scores: (n,) of all detections.
        hits: (n,) bool, whether each took a known box.
        known: number of known boxes; NaN is returned for 0.
    """
    if not known:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(hits[order])
    recall, precision = right / known, right / np.arange(1, len(order) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(recall, RECALLS, side="left")
    return float(np.append(envelope, 0.0)[place].mean())


def detection_scores(images: Sequence[Image], class_names: Sequence[str], drawn: float) -> dict[str, float]:
    """All scores of a part.

    Args:
        images: its images.
        class_names: K names.
        drawn: confidence from which on a detection is shown to people.

    Returns:
        ``map50``, the mean over classes that occur; ``ap50_<class>``; ``face_ap50``, whatever the class; ``recall``,
        known faces found by any detection; ``drawn_recall`` and ``drawn_precision``, by those shown; ``matched_acc``,
        accuracy of the expression on faces found. NaN where there is nothing to count.
    """
    empty: Array = np.empty(0)
    scores, hits, true, said = [empty], [empty.astype(bool)], [empty.astype(int)], [empty.astype(int)]
    per_class: list[tuple[list[Array], list[Array]]] = [([empty], [empty.astype(bool)]) for _ in class_names]
    for image in images:
        order = np.argsort(-image.scores, kind="stable")
        boxes, labels, score = image.boxes[order], image.labels[order], image.scores[order]
        taken = match(boxes, image.true_boxes)
        scores.append(score)
        hits.append(taken >= 0)
        true.append(image.true_labels[taken[taken >= 0]])
        said.append(labels[taken >= 0])
        for k, (own_scores, own_hits) in enumerate(per_class):
            mine = labels == k
            own_scores.append(score[mine])
            own_hits.append(match(boxes[mine], image.true_boxes[image.true_labels == k]) >= 0)
    score, hit = np.concatenate(scores), np.concatenate(hits)
    known = np.concatenate([empty.astype(int), *(image.true_labels for image in images)])
    count = np.bincount(known, minlength=len(class_names))
    ap = {
        name: average_precision(np.concatenate(s), np.concatenate(h), int(count[k]))
        for k, (name, (s, h)) in enumerate(zip(class_names, per_class, strict=True))
        if count[k]
    }
    shown = score >= drawn
    return {
        "map50": _share(sum(ap.values()), len(ap)),
        "face_ap50": average_precision(score, hit, len(known)),
        "recall": _share(hit.sum(), len(known)),
        "drawn_recall": _share((hit & shown).sum(), len(known)),
        "drawn_precision": _share((hit & shown).sum(), shown.sum()),
        "matched_acc": _share((np.concatenate(true) == np.concatenate(said)).sum(), hit.sum()),
        **{f"ap50_{name}": value for name, value in ap.items()},
    }


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")
