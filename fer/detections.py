"""What a run that finds faces or regions writes after its test: pictures beside the truth, ``detections.json``."""

import statistics
import time
from itertools import chain, cycle, islice
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from fer.data.base import ExpressionDataModule
from fer.detection_metrics import Image
from fer.layers.regions import KINDS
from fer.loggers import Wandb
from fer.metrics import Array
from fer.models.detection import FaceDetector
from fer.models.multiscale_region import MultiscaleRegion
from fer.reporting.detections import detections_figure
from fer.runs import RunFolder, write_json

WARM_UPS = 20
REGION_IMAGES = 6  # drawn with their regions


class Detections(Callback):
    """Collects the test part's detections, times the detection, draws one image of each expression.

    Attributes:
        seconds_per_image: the timing as it is recorded; None before the test.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.seconds_per_image: dict[str, Any] | None = None
        self._rows: list[int] = []
        self._drawn: dict[int, tuple[int, Array]] = {}

    def on_test_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Note the batch's rows, and keep the first image that shows each expression."""
        first = len(self._rows)
        self._rows += batch["index"].tolist()
        images: list[Image] = module.seen["test"][first : len(self._rows)]
        for i, image in enumerate(images):
            new = [k for k in image.true_labels.tolist() if k not in self._drawn]
            if new:
                self._drawn[new[0]] = (first + i, visible(batch["image"][i], module.mean, module.std))

    def on_test_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Write everything; W&B gets the picture too."""
        assert isinstance(module, FaceDetector)
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ExpressionDataModule)
        self.seconds_per_image = time_detection(trainer, module, data)
        images = module.seen["test"]
        names, items = data.class_names, data.store.manifest.item
        record = {
            "model": type(module).__name__,
            "image_size": module.image_size,
            "class_names": names,
            "box": "x1, y1, x2, y2 in pixels of the network's input",
            "iou": 0.5,
            "metrics": module.scores("test"),
            "seconds_per_image": self.seconds_per_image,
            "draw_score": module.draw_score,
            "images": [
                {
                    "index": row,
                    "item": str(items[row]),
                    "found": _listed(image.boxes, image.labels, names, image.scores, module.draw_score),
                    "known": _listed(image.true_boxes, image.true_labels, names),
                }
                for row, image in zip(self._rows, images, strict=True)
            ],
        }
        write_json(self.folder.path / "detections.json", record)
        chosen = [self._drawn[k] for k in sorted(self._drawn)]
        if not chosen:
            return
        figure = detections_figure(
            [pixels for _, pixels in chosen], [images[place] for place, _ in chosen], names, module.draw_score
        )
        picture = self.folder.path / "detections.png"
        figure.savefig(picture, dpi=120)
        if isinstance(trainer.logger, Wandb):
            trainer.logger.log_image("test/detections", [str(picture)])


class RegionPicture(Callback):
    """Draws the face and organs found in the first images of the test part beside the known ones: ``regions.png``."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._pixels: list[Array] = []

    def on_test_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Keep the images."""
        room = REGION_IMAGES - len(self._pixels)
        self._pixels += [visible(image, module.mean, module.std) for image in batch["image"][:room]]

    def on_test_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Write the picture; W&B gets it too."""
        assert isinstance(module, MultiscaleRegion)
        images = module.regions["test"][: len(self._pixels)]
        if not images:
            return
        figure = detections_figure(self._pixels, images, KINDS, module.network.score)
        picture = self.folder.path / "regions.png"
        figure.savefig(picture, dpi=120)
        if isinstance(trainer.logger, Wandb):
            trainer.logger.log_image("test/regions", [str(picture)])


def _listed(
    boxes: Array, labels: Array, names: list[str], scores: Array | None = None, least: float = 0.0
) -> list[dict[str, Any]]:
    """Boxes as plain records, those found from the least score on."""
    rows = [
        {"box": [round(side, 2) for side in box], "label": names[label]}
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True)
    ]
    if scores is None:
        return rows
    scored = zip(rows, scores.tolist(), strict=True)
    return [{**row, "score": round(score, 4)} for row, score in scored if score >= least]


def visible(image: Tensor, mean: list[float], std: list[float]) -> Array:
    """(3, H, W) normalised -> (H, W, 3) uint8 as people see it."""
    plain = image.detach().float().cpu().permute(1, 2, 0).numpy() * np.array(std) + np.array(mean)
    pixels: Array = np.rint(plain.clip(0, 1) * 255).astype(np.uint8)
    return pixels


def time_detection(trainer: lightning.Trainer, module: FaceDetector, data: ExpressionDataModule) -> dict[str, Any]:
    """Seconds from one normalised image on the device to its faces on the CPU, duplicates dropped; no decoding.

    Batch 1, after some warm-ups, over ``module.timed_images`` images of the test part (several times where it is
    smaller).
    """
    device, wanted = module.device, module.timed_images
    loaded = chain.from_iterable(batch["image"].to(device) for batch in data.test_dataloader())
    images = list(islice(loaded, wanted))
    seconds = []
    module.eval()
    with torch.inference_mode(), trainer.precision_plugin.forward_context():
        for image in islice(cycle(images), WARM_UPS + wanted):
            _wait(device)
            start = time.perf_counter()
            _, (faces,) = module.find(image[None])
            for values in faces:
                values.cpu()
            _wait(device)
            seconds.append(time.perf_counter() - start)
    timed = seconds[WARM_UPS:]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "median": statistics.median(timed),
        "p95": float(np.percentile(timed, 95)),
        "images": len(timed),
        "different_images": len(images),
        "warm_ups": WARM_UPS,
        "batch": 1,
        "includes": "network, box decoding, removal of duplicates, copy to the CPU; not image decoding",
        "device": where,
        "precision": str(trainer.precision),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
