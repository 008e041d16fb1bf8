"""An exponential moving average of the weights, which is what is validated, tested and kept.

timm's `ModelEmaV3` does the averaging. Lightning's own callback is not used: it averages integer buffers too (Swin's
tables of relative positions would rot), swaps the counts of the validation away with the weights, and leaves the
average out of checkpoints saved without the optimiser.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from timm.utils.model_ema import ModelEmaV3

from fer.errors import UserError
from fer.models.base import ExpressionModule


class WeightAverage(Callback):
    """Keeps an average of ``module.network`` and puts it in its place while the network is validated.

    After step t the average is d * average + (1 - d) * weights with d = min(decay, (t - 1) / (t + 9)): a young average
    forgets its first weights quickly, as `tf.train.ExponentialMovingAverage` has it. Batch norm statistics are averaged
    with the weights they belong to.

    Args:
        decay: d of a long training, such as 0.9998.

    Raises:
        UserError: the decay is not between 0 and 1.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise UserError(f"trainer.weight_ema={decay} must lie between 0 and 1, such as 0.9998, or be null")
        self.decay = decay
        self.average: Any = None
        self.step = 0

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Begin with a copy of the network."""
        if stage == "fit":
            self.average = ModelEmaV3(
                pl_module.network, decay=self.decay, use_warmup=True, warmup_gamma=10.0, warmup_power=1.0
            )

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Follow the network to its device."""
        self.average.to(pl_module.device)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """Average after each optimiser step; several batches may make one."""
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.average.update(pl_module.network, step=self.step)

    @contextlib.contextmanager
    def in_place(self, module: ExpressionModule) -> Iterator[None]:
        """The average stands in the module within the block."""
        self._exchange(module)
        try:
            yield
        finally:
            self._exchange(module)

    def _exchange(self, module: lightning.LightningModule) -> None:
        module.network, self.average.module = self.average.module, module.network

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the average in place."""
        self._exchange(pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the weights in training back."""
        self._exchange(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The average and the step it was taken at, for a resume; the checkpoint's weights are those in training."""
        return {"step": self.step, "average": self.average.module.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the checkpoint's average."""
        self.step = state_dict["step"]
        self.average.module.load_state_dict(state_dict["average"])
