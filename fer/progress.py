"""How far a training has come: a bar in a terminal, a line for each epoch elsewhere."""

import sys
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, Checkpoint, RichProgressBar

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


class Lines(Checkpoint):
    """A line for each epoch, for logs of schedulers and other files.

    Derives from Lightning's `Checkpoint` only to be called after the module has logged its epoch.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()  # a run that goes on within an epoch does not begin it

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Say what the epoch, validation included, came to."""
        if trainer.is_global_zero:
            metrics = trainer.callback_metrics
            names = [name for name in ("train/loss", pl_module.monitor, f"val/{pl_module.monitor}") if name in metrics]
            told = ", ".join(f"{name} {metrics[name]:.4f}" for name in names)
            seconds = time.monotonic() - self._began
            print(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {told}, {seconds:,.0f} s", flush=True)


def progress() -> Callback:
    """What fits where the output goes."""
    return Bar() if sys.stdout.isatty() else Lines()
