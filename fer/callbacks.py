"""What a run writes while it trains: curves, checkpoints, the log of steps, the validation's confusion matrix."""

import contextlib
import math
import os
import resource
import time
from typing import Any

import lightning
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint

from fer.at_test import data_of, save_confusion, stamps_of
from fer.models.averaging import WeightAverage
from fer.models.base import ExpressionModule
from fer.runs import RunFolder, read_json, write_text
from fer.stopping import Stop, Stopped

CLOCK_STEPS = 50  # steps between looks at the clock when several devices train


def cpu_seconds() -> float:
    """User and system time of this process and of its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


class Randomness(Callback):
    """Seeds torch before every batch from (seed, step, place), so that dropout draws the same after a resume.

    The place is that among the batches whose gradients one step accumulates.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Reseed; the multipliers keep the streams of neighbouring seeds, places and processes apart."""
        place = batch_idx % trainer.accumulate_grad_batches
        # No shifts: a CPU's generator looks at the lower 32 bits alone.
        own = self.seed * 1_000_000_007 + place * 2_654_435_761 + trainer.global_rank * 805_306_457
        seed = own + trainer.global_step
        # Not torch.manual_seed: for each kind of device the machine lacks, that notes the call with its stack, forever.
        torch.default_generator.manual_seed(seed)
        device = trainer.strategy.root_device
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)


class Curves(Checkpoint):
    """Curves, checkpoints and the log of steps of a module with a ``score``; its own state is in the checkpoint.

    A signal is answered here: after the training step or validation batch at hand the run is saved and ends. No
    checkpoint is made between batches whose gradients are accumulated: it would not have those.

    Derives from Lightning's `Checkpoint` only to be called after the module has logged its epoch.

    Attributes:
        history: one row of metrics per finished epoch.
        best: best score so far.
        best_epoch: its epoch, counted from 0.
        seconds, cpu: wall and CPU time of all sessions of this run up to the last checkpoint.
        resumed_from_step: optimiser step this session began at, None for an uninterrupted run.
    """

    def __init__(
        self, folder: RunFolder, minutes: float, steps: int | None, stop: Stop, average: WeightAverage | None = None
    ) -> None:
        self.folder, self.minutes, self.steps, self.stop, self.average = folder, minutes, steps, stop, average
        self.history: list[dict[str, float]] = []
        self.best = -math.inf
        self.best_epoch = -1
        self.seconds = self.cpu = 0.0
        self.rates: list[float] = []
        self.resumed_from_step: int | None = None
        self._mark = (time.monotonic(), cpu_seconds())
        self._saved = time.monotonic()
        self._epoch_began: float | None = None
        self._log: int | None = None  # file descriptor of the log of steps
        self._logged = 0  # the last step that was made
        self._accumulating = False

    def state_dict(self) -> dict[str, Any]:
        """Plain values only."""
        self.count_time()
        return {
            "history": self.history,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
            "cpu": self.cpu,
            "rates": self.rates,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the curves and clocks of the checkpoint."""
        for key, value in state_dict.items():
            setattr(self, key, value)

    def count_time(self) -> None:
        """Add the time since the last call to the run's clocks."""
        now = (time.monotonic(), cpu_seconds())
        self.seconds += now[0] - self._mark[0]
        self.cpu += now[1] - self._mark[1]
        self._mark = now

    def _save_last(self, trainer: lightning.Trainer) -> None:
        trainer.save_checkpoint(self.folder.last, storage_options={"previous": self.folder.previous})
        self._saved = time.monotonic()

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """A checkpoint made within a validation begins it again: Lightning sees its first batch at work."""
        if trainer.validating:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts.update(ready=1, started=1, processed=0, completed=0)
            progress["is_last_batch"] = False

    def on_load_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Note where a resumed session begins."""
        self.resumed_from_step = self._logged = checkpoint["global_step"]

    def on_train_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Open the log of steps; from here on signals wait for the end of a step."""
        if trainer.is_global_zero:
            self._log = os.open(self.folder.steps, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.stop.take()
        self.stop.training = True

    def _leave(self) -> None:
        self.stop.training = False
        if self._log is not None:
            os.close(self._log)
            self._log = None

    def on_exception(self, *_: Any) -> None:
        """Signals end the run at once again."""
        self._leave()

    def on_train_end(self, *_: Any) -> None:
        """Signals end the run at once again."""
        self._leave()
        if self.stop.asked:
            raise Stopped

    def _asked(self, trainer: lightning.Trainer) -> bool:
        """Whether any device's process was asked to stop."""
        if trainer.world_size > 1:
            self.stop.asked = trainer.strategy.reduce_boolean_decision(self.stop.asked, all=False)
        return self.stop.asked

    def on_train_epoch_start(self, *_: Any) -> None:
        """Start the epoch's clock."""
        self._epoch_began = time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save within an epoch when it is time; the epoch's end has its own checkpoint."""
        step = trainer.global_step  # asked for once: Lightning walks through five objects for it
        self._accumulating = step == self._logged
        if self._accumulating:
            return
        self._logged = step
        if self._log is not None:
            os.write(self._log, b"%d\n" % step)
        asked = self._asked(trainer)
        if batch_idx + 1 == trainer.num_training_batches:
            if self._epoch_began is not None:
                images = trainer.num_training_batches * len(batch["label"]) * trainer.world_size
                self.rates.append(images / (time.monotonic() - self._epoch_began))
            return
        due = time.monotonic() - self._saved > 60 * self.minutes
        if trainer.world_size > 1:  # saving takes all devices, so they agree now and then
            looked = step % CLOCK_STEPS == 0
            due = looked and trainer.strategy.reduce_boolean_decision(due, all=False)
        if asked or due or (self.steps is not None and step % self.steps == 0):
            self._save_last(trainer)
        if asked:
            raise Stopped

    def on_validation_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        """Save the state in which the validation began, and end, when the run is asked to."""
        if self.stop.training and not self._accumulating and self._asked(trainer):
            with self.average.in_place(module) if self.average else contextlib.nullcontext():
                self._save_last(trainer)
            raise Stopped

    def score(self, trainer: lightning.Trainer, module: Any, metrics: dict[str, float]) -> float:
        """What the best epoch has most of: the module's monitor."""
        return metrics.get(module.monitor, math.nan)

    def on_best(self, trainer: lightning.Trainer, module: Any, metrics: dict[str, float]) -> None:
        """Further files of the best epoch so far; called on the first device."""

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        """One row of the curves; best and last checkpoint."""
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        row["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        self.history.append(row | metrics)
        value = trainer.strategy.broadcast(self.score(trainer, module, metrics))
        if value > self.best:
            self.best, self.best_epoch = value, trainer.current_epoch
            # What was validated is kept.
            with self.average.in_place(module) if self.average else contextlib.nullcontext():
                trainer.save_checkpoint(self.folder.best, weights_only=True)
            if trainer.is_global_zero:
                self.on_best(trainer, module, metrics)
        if trainer.is_global_zero:
            write_text(self.folder.path / "metrics.csv", pd.DataFrame(self.history).to_csv(index=False))
        self._save_last(trainer)
        if self._asked(trainer):
            raise Stopped


class Recorder(Curves):
    """`Curves` of an `ExpressionModule`, and the confusion matrix of its best validation epoch.

    Its counts are written with that epoch, its picture once, before the test: drawing takes longer than many an epoch.
    """

    def score(self, trainer: lightning.Trainer, module: Any, metrics: dict[str, float]) -> float:
        """The module's monitor, not a number while that says nothing."""
        early = trainer.current_epoch < module.scored_from
        return math.nan if early else super().score(trainer, module, metrics)

    def on_best(self, trainer: lightning.Trainer, module: Any, metrics: dict[str, float]) -> None:
        """The confusion matrix's counts."""
        assert isinstance(module, ExpressionModule)
        stamps = stamps_of(data_of(trainer), module)
        save_confusion(self.folder, "val", module.tally("val").confusion_matrix(), module.class_names, None, stamps)

    def on_test_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """The confusion matrix's picture."""
        data = data_of(trainer)
        assert isinstance(module, ExpressionModule)
        part = "validation" if data.split.selected_on == "val" else "test part, where the epoch is chosen"
        score = next(row["val/mean_acc"] for row in self.history if row["epoch"] == self.best_epoch)
        title = f"{part}, epoch {self.best_epoch + 1}: mean class accuracy {100 * score:.2f} %"
        counts = np.array(read_json(self.folder.path / "confusion_val.json")["counts"])
        save_confusion(self.folder, "val", counts, module.class_names, title, stamps_of(data, module))


def measure_flops(module: ExpressionModule) -> int:
    """Forward FLOPs of one image, counting a multiply-add as two."""
    from torch.utils.flop_counter import FlopCounterMode

    parameter = next(module.parameters())
    image = torch.zeros(1, 3, module.image_size, module.image_size, device=parameter.device)
    was_training = module.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(image)
    module.train(was_training)
    return int(counter.get_total_flops())
