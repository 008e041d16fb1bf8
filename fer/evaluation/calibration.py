"""Calibration: one temperature, fitted on the validation part only, never on the test part.

Temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017) divides logits by T. Dividing
logits by T is raising probabilities to 1/T and renormalising, which is also defined for the mean over views or
networks; that form is used throughout.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from fer.evaluation.answers import LEAST, Answers, Reader, probability_scores
from fer.metrics import Array
from fer.runs import read_json, write_json
from fer.trained import TrainedRun

BOUNDS = (0.05, 20.0)
FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature.

    Attributes:
        temperature: T; above 1 the network was too sure of itself.
        fitted_on: the part of the run's data it was fitted on.
        n: images of that part.
        tta: views of each image.
        fingerprint: of the checkpoint it belongs to, see `checkpoint_fingerprint`.
        before, after: ``ece``, ``nll`` and ``brier`` on that part.
    """

    temperature: float
    fitted_on: str
    n: int
    tta: str
    fingerprint: str
    before: dict[str, float]
    after: dict[str, float]


def tempered(probabilities: Array, temperature: float) -> Array:
    """(n, K) probabilities at a temperature, float64; the same as dividing the logits by it."""
    logs = np.log(np.maximum(np.asarray(probabilities, dtype=np.float64), LEAST)) / temperature
    odds = np.exp(logs - logs.max(1, keepdims=True))
    scaled: Array = odds / odds.sum(1, keepdims=True)
    return scaled


def best_temperature(probabilities: Array, label: Array) -> float:
    """The T within `BOUNDS` of the smallest negative log-likelihood, which has one minimum in 1/T."""

    def nll(log_temperature: float) -> float:
        p = tempered(probabilities, float(np.exp(log_temperature)))
        return float(-np.log(np.maximum(p[np.arange(len(p)), label], LEAST)).mean())

    found = minimize_scalar(nll, bounds=tuple(np.log(BOUNDS)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def calibrate(validation: Answers, tta: str, fingerprint: str) -> Calibration:
    """Fit the temperature to answers on a validation part."""
    temperature = best_temperature(validation.probabilities, validation.label)
    return Calibration(
        temperature=temperature,
        fitted_on="val",
        n=len(validation.label),
        tta=tta,
        fingerprint=fingerprint,
        before=probability_scores(validation.probabilities, validation.label),
        after=probability_scores(tempered(validation.probabilities, temperature), validation.label),
    )


def can_be_calibrated(run: TrainedRun) -> bool:
    """Whether a run has a validation part that is not its test part."""
    return bool(run.results["selected_on"] == "val")


def fit_temperature(run: TrainedRun, tta: str | None = None) -> Calibration:
    """Fit a run's temperature on its own validation part; the test part is not read.

    Args:
        run: a run whose validation part is not its test part, see `can_be_calibrated`.
        tta: views of each image; None: those of the run's own test.

    Raises:
        UserError: the run's data is not where it was.
    """
    if not can_be_calibrated(run):
        raise ValueError("no validation part of its own")
    data = run.data()
    data.open()
    views = tta or str(run.results["tta"])
    return calibrate(Reader(run).read(data, "val", views), views, checkpoint_fingerprint(run))


def calibration_of(run: TrainedRun) -> Calibration | None:
    """The temperature kept in the run folder (``calibration.json``), fitted and written there the first time.

    Returns:
        None for a run whose epoch was chosen on the test part: there is nothing it could be fitted on.

    Raises:
        UserError: it has to be fitted and the run's data is not where it was.
    """
    if not can_be_calibrated(run):
        return None
    kept = kept_calibration(run)
    if kept is not None:
        return kept
    fitted = fit_temperature(run)
    write_json(run.folder.path / FILE, dataclasses.asdict(fitted))
    return fitted


def kept_calibration(run: TrainedRun) -> Calibration | None:
    """The temperature kept in the run folder; None where there is none, or one of another checkpoint."""
    path = run.folder.path / FILE
    if not path.is_file():
        return None
    record = read_json(path)
    return Calibration(**record) if record["fingerprint"] == checkpoint_fingerprint(run) else None


def checkpoint_fingerprint(run: TrainedRun) -> str:
    """Hash of the run's best checkpoint."""
    with run.folder.best.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def on_test(answers: Answers, calibration: Calibration) -> dict[str, Any]:
    """Scores of a test part before and after calibration."""
    after = tempered(answers.probabilities, calibration.temperature)
    return {
        "n": len(answers.label),
        "before": probability_scores(answers.probabilities, answers.label),
        "after": probability_scores(after, answers.label),
    }
