"""Reading a part of a data set with a trained network, exactly as its training read its test part."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback

from fer.data.base import ExpressionDataModule
from fer.errors import UserError
from fer.labels import index_map
from fer.metrics import Array, calibration_bins, confusion_counts, expected_calibration_error, scores
from fer.trained import TrainedRun

log = logging.getLogger(__name__)
BINS = 15  # of the calibration error, as in training
LEAST = 1e-12  # probability from which on the logarithm is taken, as in training


@dataclass(frozen=True)
class Answers:
    """Probabilities of n images, in ascending order of their rows.

    Attributes:
        class_names: K names.
        rows: (n,) rows of the manifest.
        item: (n,) their items.
        label: (n,) true classes.
        probabilities: (n, K) float32.
    """

    class_names: list[str]
    rows: Array
    item: Array
    label: Array
    probabilities: Array

    @property
    def predicted(self) -> Array:
        """(n,) classes with the highest probability."""
        predicted: Array = self.probabilities.argmax(1)
        return predicted

    @property
    def confusion(self) -> Array:
        """(K, K) counts, rows are labels."""
        return confusion_counts(self.label, self.predicted, len(self.class_names))

    def scores(self) -> dict[str, float]:
        """What a training run records of its test: `fer.metrics.scores`, ``loss``, ``nll``, ``ece``; and ``brier``."""
        out = scores(self.confusion, self.class_names) | probability_scores(self.probabilities, self.label)
        return out | {"loss": out["nll"]}


def probability_scores(probabilities: Array, label: Array) -> dict[str, float]:
    """``ece`` over 15 bins (Guo et al. 2017), ``nll``, ``brier`` (summed over the classes, 0 to 2; Brier 1950)."""
    p = np.asarray(probabilities, dtype=np.float64)
    hit = p[np.arange(len(p)), label]
    brier = (p**2).sum(1) - 2 * hit + 1
    return {
        "ece": expected_calibration_error(calibration_bins(p, label, BINS)),
        "nll": float(-np.log(np.maximum(hit, LEAST)).mean()),
        "brier": float(brier.mean()),
    }


class _Keep(Callback):
    """Holds what `test_step` returns."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, torch.Tensor]] = []

    def on_test_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Keep one batch."""
        self.outputs.append({key: values.cpu() for key, values in outputs.items()})


class Reader:
    """A run's network with the precision, threads and memory layout of its training.

    Args:
        run: the run, on the device to compute on.
        progress: show a bar.
    """

    def __init__(self, run: TrainedRun, progress: bool = False) -> None:
        self.run = run
        on_cpu = run.device.type == "cpu"
        if on_cpu:
            torch.set_num_threads(int(run.results["threads"]))
        if str(run.results["device"]).partition(":")[0] != run.device.type:
            log.warning(
                "%s was tested on %s, now on %s: the same answers only to within rounding",
                run.folder.path,
                run.results["device"],
                run.device,
            )
        if run.config.trainer.channels_last:
            run.module.to(memory_format=torch.channels_last)
        self.keep = _Keep()
        self.trainer = lightning.Trainer(
            accelerator="cpu" if on_cpu else "gpu",
            devices=1,
            precision=run.results["precision"],
            deterministic=run.config.trainer.deterministic,
            callbacks=[self.keep],
            plugins=[LightningEnvironment()],
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
        )

    def read(self, data: ExpressionDataModule, part: Literal["val", "test"], tta: str) -> Answers:
        """The network's answers on one part.

        Args:
            data: an opened data module whose classes are the network's.
            part: which part.
            tta: views of each image, see `fer.data.transforms.TTA_VIEWS`.
        """
        data.trainer = self.trainer  # tells it the device
        self.keep.outputs.clear()
        self.trainer.test(self.run.module, dataloaders=data.evaluation_loader(part, tta), verbose=False)
        self.run.module.eval().to(self.run.device)  # Lightning leaves it on the CPU
        found = (torch.cat([o[key] for o in self.keep.outputs]) for key in ("index", "label", "probabilities"))
        rows, label, probabilities = (values.numpy() for values in found)
        order = np.argsort(rows)
        rows = rows[order]
        if not np.array_equal(rows, np.sort(data.split.part(part))):
            raise RuntimeError(f"{len(rows)} images were read, the {part} part has {len(data.split.part(part))}")
        return Answers(data.class_names, rows, data.store.manifest.item[rows], label[order], probabilities[order])


def mean_answers(members: Sequence[Answers]) -> Answers:
    """The ensemble of several networks: the mean of their probabilities, classes and images matched by name.

    Raises:
        UserError: they have other classes, other images, or other labels for them.
    """
    first, *others = members
    if not others:
        return first
    total = first.probabilities.astype(np.float64)
    order = np.argsort(first.item)
    for place, other in enumerate(others, 2):
        if set(other.class_names) != set(first.class_names):
            raise UserError(
                f"run: an ensemble needs the same classes, run 1 has {', '.join(first.class_names)}, "
                f"run {place} {', '.join(other.class_names)}"
            )
        theirs = np.argsort(other.item)
        if not np.array_equal(first.item[order], other.item[theirs]):
            raise UserError(
                f"run: run 1 and run {place} were tested on different images, which one of them may have been trained "
                "on; an ensemble needs runs of one test part, or another data set by data="
            )
        columns = index_map(first.class_names, other.class_names)
        back = np.array(index_map(other.class_names, first.class_names))
        if not np.array_equal(first.label[order], back[other.label[theirs]]):
            raise UserError(f"run: run 1 and run {place} were tested with different labels of the same images")
        total[order] += other.probabilities[theirs][:, columns]
    mean = (total / len(members)).astype(np.float32)
    return Answers(first.class_names, first.rows, first.item, first.label, mean)
