"""Time per image: the network alone and from the stored crop on, one image at a time and in batches."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fer.data.base import ExpressionDataModule
from fer.evaluation.answers import Reader

WARM_UPS = 3


def time_per_image(reader: Reader, data: ExpressionDataModule, repeats: int) -> dict[str, Any]:
    """Seconds per image in one view, each the median over the repeats; V views take V times as long.

    Args:
        reader: the network.
        data: opened; images of its test part are timed.
        repeats: timed passes of each batch.

    Returns:
        ``batches``: for one image and for ``eval_batch_size`` of them (or all there are) ``forward``, from the
        normalised input to probabilities, and ``with_preprocessing``, from the uint8 crop in memory on; with the
        device, its threads and precision.
    """
    module, device = reader.run.module, reader.run.device
    finish = reader.run.finish("none")
    rows = np.resize(data.split.test, min(data.eval_batch_size, len(data.split.test)))
    batches = []
    for batch in dict.fromkeys((1, len(rows))):
        index = torch.from_numpy(rows[:batch])
        crops = torch.from_numpy(np.array(data.store.images[rows[:batch]]))

        def prepare(crops: torch.Tensor = crops, index: torch.Tensor = index) -> torch.Tensor:
            return finish({"image": crops.to(device), "index": index.to(device)}, epoch=0)["image"]

        with torch.inference_mode(), reader.trainer.precision_plugin.forward_context():
            image = prepare()
            forward = _median(lambda image=image: module.probabilities(image).cpu(), repeats, device)  # type: ignore[misc]
            whole = _median(lambda prepare=prepare: module.probabilities(prepare()).cpu(), repeats, device)  # type: ignore[misc]
        batches.append({"batch": batch, "forward": forward / batch, "with_preprocessing": whole / batch})
    on_cpu = device.type == "cpu"
    return {
        "unit": "seconds per image in one view, median",
        "repeats": repeats,
        "batches": batches,
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads() if on_cpu else None,
        "precision": str(reader.trainer.precision),
    }


def _median(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    seconds = []
    for _ in range(WARM_UPS + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UPS:])
