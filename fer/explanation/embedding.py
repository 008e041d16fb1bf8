"""How a network sees the test part: features, predictions, and t-SNE of the features in the plane."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from fer.data.base import ExpressionDataModule
from fer.explanation.crops import inputs
from fer.metrics import Array
from fer.trained import TrainedRun

BATCH = 64
PCA_DIM = 50  # of the features before t-SNE, as its authors do
PERPLEXITY = 30.0


@dataclass(frozen=True)
class Seen:
    """What a run makes of n images of its test part.

    Attributes:
        rows: (n,) of the manifest, ascending.
        label, predicted: (n,) classes.
        features: (n, D) what the classifier sees.
    """

    rows: Array
    label: Array
    predicted: Array
    features: Array


def look(run: TrainedRun, data: ExpressionDataModule, points: int, seed: int) -> Seen:
    """Show the test part, or ``points`` of it drawn by ``seed``, to a run's network.

    Args:
        run: the run.
        data: its data, opened.
        points: images at most.
        seed: of the drawing.
    """
    test = np.sort(data.split.test)
    rows = test if len(test) <= points else np.sort(np.random.default_rng(seed).choice(test, points, replace=False))
    features, predicted = [], []
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH):
            seen = run.module.features(inputs(run, data, rows[start : start + BATCH]))
            features.append(seen.float().cpu().numpy())
            predicted.append(run.module.classify(seen).argmax(1).cpu().numpy())
    return Seen(rows, data.label[rows], np.concatenate(predicted), np.concatenate(features))


def plane(features: Array, seed: int) -> Array:
    """t-SNE (van der Maaten and Hinton, JMLR 9, 2008): (n, D) -> (n, 2), a pure function of its arguments.

    Started from the first two principal components, which keeps what is far apart apart (Kobak and Linderman 2021).
    """
    scaled = (features - features.mean(0)) / max(float(features.std()), 1e-12)
    if min(scaled.shape) > PCA_DIM:
        scaled = PCA(PCA_DIM, svd_solver="full").fit_transform(scaled)
    method = TSNE(perplexity=perplexity(len(features)), init="pca", random_state=seed)
    return np.asarray(method.fit_transform(scaled), dtype=np.float64)


def perplexity(n: int) -> float:
    """t-SNE's effective number of neighbours for n points: 30, less where there are few."""
    return min(PERPLEXITY, (n - 1) / 3)


def pick(seen: Seen, right: bool, count: int, seed: int) -> Array:
    """Places in ``seen`` of up to ``count`` images named right or wrong, drawn by ``seed``, classes taking turns."""
    order = np.random.default_rng(seed).permutation(np.flatnonzero((seen.label == seen.predicted) == right))
    turn: dict[int, int] = {}
    ranked = []
    for place in order:
        label = int(seen.label[place])
        turn[label] = turn.get(label, 0) + 1
        ranked.append((turn[label], place))
    chosen = [place for _, place in sorted(ranked, key=lambda pair: pair[0])[:count]]
    return np.array(chosen, dtype=np.int64)
