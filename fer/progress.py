"""The progress bar of a training in a terminal."""

import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar

PERIOD = 1.0  # s between two looks of the bar; drawing it takes milliseconds, more than many a step


class Bar(RichProgressBar):
    """Rich's bar, moved and drawn once a second; Lightning's moves with every batch and draws as often as told."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)  # per second
        self._moved = 0.0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move, when it is time or the epoch is through."""
        now = time.monotonic()
        if now - self._moved >= PERIOD or batch_idx + 1 == self.total_train_batches:
            self._moved = now
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
