"""Counts of one stage, kept on the device so that a training step never waits for the accelerator."""

from typing import Any

import torch
from torch import Tensor, distributed, nn

from fer.metrics import expected_calibration_error, scores

CALIBRATION_BINS = 15


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


class Tally(nn.Module):
    """Confusion counts, calibration bins and summed losses since the last `reset`.

    Buffers are not part of the weights; `counts` and `restore` carry them through a checkpoint, so that the training
    scores of an epoch survive a resume in its middle.
    """

    confusion: Tensor
    calibration: Tensor
    sums: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("confusion", torch.zeros(num_classes * num_classes, dtype=torch.long), persistent=False)
        self.register_buffer("calibration", torch.zeros(CALIBRATION_BINS, 3, dtype=torch.float64), persistent=False)
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def add(self, predicted: Tensor, label: Tensor, loss: Tensor) -> None:
        """Count (B,) predictions, and the batch's mean loss weighted by its size."""
        cell = label * self.num_classes + predicted
        self.confusion.scatter_add_(0, cell, torch.ones_like(cell))
        self.sums[0] += len(label)
        self.sums[1] += loss.detach().double() * len(label)

    @torch.no_grad()
    def add_probabilities(self, probabilities: Tensor, label: Tensor, loss: Tensor) -> None:
        """Count (B, K) probabilities: `add`, negative log-likelihood and calibration bins."""
        confidence, predicted = probabilities.double().max(1)
        self.add(predicted, label, loss)
        nll = -probabilities.double().gather(1, label[:, None]).clamp_min(1e-12).log()
        self.sums[2] += nll.sum()
        place = (confidence * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
        values = torch.stack([torch.ones_like(confidence), confidence, (predicted == label).double()], 1)
        self.calibration.scatter_add_(0, place[:, None].expand_as(values), values)

    def reset(self) -> None:
        """Forget everything counted."""
        for buffer in self.buffers():
            buffer.zero_()

    def counts(self) -> dict[str, Tensor]:
        """Copies of the buffers by name, summed over the devices of a data-parallel run: what a checkpoint keeps."""
        copies = {name: buffer.detach().clone() for name, buffer in self.named_buffers()}
        if _several():
            for copy in copies.values():
                distributed.all_reduce(copy)
        return {name: copy.cpu() for name, copy in copies.items()}

    def restore(self, counts: dict[str, Tensor]) -> None:
        """Put back what `counts` returned: on the first device, so that the sum over all of them is right again."""
        first = not _several() or distributed.get_rank() == 0
        for name, buffer in self.named_buffers():
            buffer.copy_(counts[name] if first else torch.zeros_like(buffer))

    def confusion_matrix(self) -> Any:
        """(K, K) int64 numpy counts, rows are labels."""
        return self.confusion.cpu().numpy().reshape(self.num_classes, self.num_classes)

    def scores(self, class_names: list[str]) -> dict[str, float]:
        """What `fer.metrics.scores` gives, with ``loss``; ``nll`` and ``ece`` where probabilities were counted."""
        n, loss, nll = self.sums.cpu().tolist()
        out = scores(self.confusion_matrix(), class_names)
        out["loss"] = loss / n if n else float("nan")
        bins = self.calibration.cpu().numpy()
        if bins[:, 0].sum():
            out |= {"nll": nll / n, "ece": expected_calibration_error(bins)}
        return out
