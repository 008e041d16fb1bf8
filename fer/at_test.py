"""What the test part leaves: predictions, confusion matrices, W&B's pictures."""

from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from fer.data.base import ExpressionDataModule
from fer.data.manifest import Manifest
from fer.loggers import Wandb
from fer.metrics import Array, sequence_counts, sequence_scores
from fer.models.base import ExpressionModule
from fer.reporting.figures import confusion_figure
from fer.runs import RunFolder, read_json, write_json, write_text

if TYPE_CHECKING:
    from fer.callbacks import Recorder

WORST_IMAGES = 32  # confidently wrong images shown on W&B


def data_of(trainer: lightning.Trainer) -> ExpressionDataModule:
    """The data module a trainer works on."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, ExpressionDataModule)
    return data


def stamps_of(data: ExpressionDataModule, module: ExpressionModule) -> list[str]:
    """Sentences every table and picture of a run must carry."""
    return [*data.split.stamps, *module.stamps]


def save_confusion(
    folder: RunFolder, part: str, counts: Array, class_names: list[str], title: str | None, stamps: list[str]
) -> None:
    """Write ``confusion_<part>.json``, and ``.png`` unless its title is None."""
    record = {"part": part, "class_names": class_names, "counts": counts.tolist(), "rows": "labels", "stamps": stamps}
    write_json(folder.path / f"confusion_{part}.json", record)
    if title is not None:
        figure = confusion_figure(counts, class_names, title, stamps)
        figure.savefig(folder.path / f"confusion_{part}.png", dpi=120)


def save_predictions(
    folder: RunFolder, manifest: Manifest, class_names: list[str], rows: Array, label: Array, probabilities: Array
) -> None:
    """Write ``predictions.csv``.

    Args:
        folder: the run folder.
        manifest: N images.
        class_names: K names.
        rows: (n,) rows of the manifest.
        label: (n,) true classes.
        probabilities: (n, K) float32.
    """
    names = np.array(class_names)
    table = pd.DataFrame({"index": rows, "item": manifest.item[rows]})
    table["subject"] = manifest.subject[rows] if manifest.subject is not None else ""
    table["label"], table["predicted"] = names[label], names[probabilities.argmax(1)]
    for k, name in enumerate(class_names):
        table[name] = probabilities[:, k]
    # Nine significant digits bring every float32 back exactly.
    write_text(folder.predictions, table.to_csv(index=False, float_format="%.9g"))


class Predictions(Callback):
    """Collects the test part's probabilities, checks that each image came once, writes ``predictions.csv``.

    Attributes:
        label: (n,) true classes; known after the test.
        probabilities: (n, K) float32.
        rows: (n,) rows of the manifest, ascending.
        sequences: (K, K) confusion counts of the videos the images are frames of, None where there are none.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._outputs: list[dict[str, Tensor]] = []
        self.label: Array = np.empty(0)
        self.probabilities: Array = np.empty(0)
        self.rows: Array = np.empty(0)
        self.sequences: Array | None = None

    def on_test_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Keep one batch."""
        self._outputs.append(outputs)

    def on_test_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Write the table and the confusion matrix.

        Raises:
            RuntimeError: the test did not see each test image exactly once.
        """
        data = data_of(trainer)
        assert isinstance(module, ExpressionModule)
        rows, label, probabilities = (
            torch.cat([o[key] for o in self._outputs]).cpu().numpy() for key in ("index", "label", "probabilities")
        )
        self._outputs.clear()
        order = np.argsort(rows)
        self.rows, self.label, self.probabilities = rows[order], label[order], probabilities[order]
        if not np.array_equal(self.rows, np.sort(data.split.test)):
            raise RuntimeError(f"the test saw {len(rows)} images, the test part has {len(data.split.test)}")
        manifest = data.store.manifest
        if manifest.sequence is not None:
            self.sequences = sequence_counts(manifest.sequence[self.rows], self.label, self.probabilities)
        save_predictions(self.folder, manifest, data.class_names, self.rows, self.label, self.probabilities)
        counts = module.tally("test").confusion_matrix()
        accuracy = 100 * counts.trace() / max(counts.sum(), 1)
        title = f"test: accuracy {accuracy:.2f} %, n = {counts.sum()}"
        save_confusion(self.folder, "test", counts, data.class_names, title, stamps_of(data, module))


class WandbPictures(Callback):
    """After the test: both confusion matrices, as image and as W&B's chart, and the most confidently wrong images."""

    def __init__(self, folder: RunFolder, predictions: Predictions, recorder: "Recorder") -> None:
        self.folder, self.predictions, self.recorder = folder, predictions, recorder

    def on_test_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Log everything in one call, on no step of its own."""
        logger = trainer.logger
        if not isinstance(logger, Wandb):
            return
        assert isinstance(module, ExpressionModule)
        import wandb

        data = data_of(trainer)
        content: dict[str, Any] = {}
        for part in ("val", "test"):
            counts = np.array(read_json(self.folder.path / f"confusion_{part}.json")["counts"])
            label, predicted = np.nonzero(counts)
            repeats = counts[label, predicted]
            content[f"{part}/confusion_image"] = wandb.Image(str(self.folder.path / f"confusion_{part}.png"))
            content[f"{part}/confusion"] = wandb.plot.confusion_matrix(
                y_true=np.repeat(label, repeats).tolist(),
                preds=np.repeat(predicted, repeats).tolist(),
                class_names=data.class_names,
                title=f"{part} confusion matrix",
            )
        if self.predictions.sequences is not None:
            found = sequence_scores(self.predictions.sequences, data.class_names)
            content |= {f"test/{name}": value for name, value in found.items()}
        content["test/most_confidently_wrong"] = self._wrong(data, wandb)
        best = {"best_epoch": self.recorder.best_epoch, f"best/{module.monitor}": self.recorder.best}
        logger.attempt(lambda run: run.log(content))
        logger.attempt(lambda run: run.summary.update(best))

    def _wrong(self, data: ExpressionDataModule, wandb: Any) -> Any:
        label, probabilities = self.predictions.label, self.predictions.probabilities
        predicted, confidence = probabilities.argmax(1), probabilities.max(1)
        wrong = np.flatnonzero(predicted != label)
        table = wandb.Table(columns=["image", "item", "label", "predicted", "confidence"])
        for i in wrong[np.argsort(-confidence[wrong])][:WORST_IMAGES]:
            row = self.predictions.rows[i]
            image = np.asarray(data.store.images[row])
            names = data.class_names
            table.add_data(
                wandb.Image(image[..., 0] if image.shape[-1] == 1 else image),
                str(data.store.manifest.item[row]),
                names[label[i]],
                names[predicted[i]],
                float(confidence[i]),
            )
        return table
