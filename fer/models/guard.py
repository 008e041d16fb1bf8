"""Steps whose loss or gradient is not finite: found before the optimiser acts, and the run's end or left out of it.

A CPU's numbers are read at once. An accelerator's stay there until the next logging point, since reading one waits for
all work queued before it; meanwhile the optimiser is handed the verdict as a tensor, as torch's gradient scaler hands
it to fused optimisers, and does nothing where it is bad.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from fer.errors import UserError
from fer.runs import write_json

log = logging.getLogger(__name__)
FILE = "nan_batch.json"
AT_ONCE = ("cpu",)  # devices whose numbers cost nothing to read
MOST_IN_A_ROW = 100  # steps left out one after the other, after which the weights are beyond help
Buffers = dict[str, Tensor]


class StepLeftOut(Exception):
    """Raised inside an optimiser's closure: the step ends here, its weights as they were."""


@dataclass
class Step:
    """One training batch: what a record of it needs, and whether its numbers are bad, on the device until read."""

    number: int
    epoch: int
    batch: int
    lr: float
    rows: Tensor
    bad: Tensor | bool = False
    loss: Tensor | None = None
    norm: Tensor | None = None


def buffers_of(module: nn.Module) -> Buffers:
    """Copies of everything a forward pass may change: statistics of batch norms, centres, counts."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@torch.no_grad()
def put_back(module: nn.Module, before: Buffers, where: Tensor | None = None) -> None:
    """Undo a forward pass, or on the device only ``where`` says so; a buffer first made by it becomes zero."""
    for name, buffer in module.named_buffers():
        old = before[name] if name in before and before[name].shape == buffer.shape else torch.zeros_like(buffer)
        buffer.copy_(old if where is None else torch.where(where, old, buffer))


def first_bad(named: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """Name of the first tensor with a value that is not finite; one read from the device for all of them."""
    present = [(name, values) for name, values in named if values is not None]
    if not present:
        return None
    fine = torch.stack([values.detach().isfinite().all() for _, values in present]).tolist()
    return next((name for (name, _), ok in zip(present, fine, strict=True) if not ok), None)


class StepGuard:
    """Watches the steps of one training for numbers that are not finite.

    The loss of every batch is looked at; the norm of the gradient where it is there anyway for clipping, where several
    devices have to agree, and where steps are left out. Weights are looked at before they are saved.

    Args:
        folder: where ``nan_batch.json`` is written.
        on_nan: ``stop`` ends the run, its last checkpoint being older than the bad step; ``skip`` leaves the step out:
            weights, optimiser and buffers stay, the count of steps and the schedule go on.

    Attributes:
        skipped: steps left out since the run began.
    """

    def __init__(self, folder: Path, on_nan: str) -> None:
        self.folder, self.skips = folder, on_nan == "skip"
        self.skipped = self.in_a_row = 0
        self.steps: list[Step] = []  # not read yet
        self.last: Step | None = None  # the one before them
        self.window: list[Step] = []  # batches of the coming optimiser step
        self.before: Buffers = {}
        self.ended: Tensor | bool = False

    @property
    def stamps(self) -> list[str]:
        """A sentence for the results where steps were left out."""
        return [f"{self.skipped:,} training steps left out: loss or gradient not finite"] if self.skipped else []

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, int]) -> None:
        """Count on from a checkpoint."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def start(self, module: LightningModule, clips: bool) -> None:
        """Before the first step.

        Args:
            module: what is trained.
            clips: whether the norm of the gradient is computed anyway.

        Raises:
            UserError: steps cannot be left out without waiting for the device.
        """
        self.module = module
        self.at_once = module.device.type in AT_ONCE
        self.alone = module.trainer.world_size == 1
        # The gradient scaler of fp16 meets infinite gradients as a matter of course and leaves those steps out itself.
        scaled = getattr(module.trainer.precision_plugin, "scaler", None) is not None
        self.looks = (self.skips or clips or not self.alone) and not scaled
        self.fused = all(_does_nothing_if_told(o) for o in module.trainer.optimizers) and not scaled
        if self.skips and scaled:
            raise UserError(
                "trainer.on_nan=skip: with trainer.precision=16-mixed such steps are left out anyway; "
                "set trainer.on_nan=stop, or trainer.precision=bf16-mixed"
            )
        if self.skips and not self.at_once and not self.fused:
            raise UserError(
                "trainer.on_nan=skip: this optimiser cannot leave out a step on an accelerator; "
                "choose one with fused: true (those of conf/optim are), or trainer.on_nan=stop"
            )
        if not self.at_once:
            self.ended = torch.zeros((), dtype=torch.bool, device=module.device)

    def begin(self, rows: Tensor, batch: int) -> None:
        """A batch comes: rows (B,) of the manifest, its number in the epoch."""
        trainer = self.module.trainer
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        step = Step(trainer.global_step, trainer.current_epoch, batch, lr, rows)
        if not self.window or self.window[0].number != step.number:
            self.window = []
            if self.skips:
                self.before = buffers_of(self.module)
        if self.at_once and self.steps:
            self.last = self.steps.pop()
        self.window.append(step)
        self.steps.append(step)

    def see(self, loss: Tensor) -> None:
        """A loss, before its backward pass."""
        step, step.loss = self.window[-1], loss.detach()
        if not self.alone:  # the gradient tells all devices the same; a loss is one device's own
            return
        if self.at_once:
            step.bad = step.bad or not math.isfinite(loss.item())
            if step.bad and not self.skips:
                self._stop(step, self.last)
        else:
            step.bad = ~step.loss.isfinite() | step.bad

    def judge(self, optimizer: Optimizer, parameters: list[nn.Parameter], norm: Tensor | None) -> None:
        """The gradient is complete and the optimiser about to act.

        Args:
            optimizer: the optimiser.
            parameters: those with a gradient.
            norm: the gradient's, where it was computed.

        Raises:
            StepLeftOut: the step is bad and left out, on a device whose numbers are read at once.
            UserError: the step is bad and ends the run, likewise.
        """
        step = self.window[-1]
        if self.looks:
            step.norm = norm if norm is not None else get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not self.at_once:
            self._hand_over(optimizer, step)
            return
        if step.norm is not None and not math.isfinite(step.norm.item()):
            step.bad = True
        worst = next((s for s in self.window if s.bad), None)
        if worst is None:
            self.in_a_row = 0
            return
        if not self.skips:
            self._stop(worst, self.last)
        put_back(self.module, self.before)
        self._count(worst)
        raise StepLeftOut

    def _hand_over(self, optimizer: Optimizer, step: Step) -> None:
        if step.norm is not None:
            step.bad = ~step.norm.isfinite() | step.bad
        found = torch.stack([torch.as_tensor(s.bad, device=self.module.device) for s in self.window]).any()
        if self.skips:
            put_back(self.module, self.before, found)
        else:  # once bad, nothing is learned any more: the weights stay those before the bad step until it is read
            found = self.ended = found | self.ended
        if self.fused:
            target = _acting(optimizer)
            target.grad_scale, target.found_inf = None, found.float()

    def acted(self, optimizer: Optimizer, first: bool) -> None:
        """The optimiser's first step leaves a momentum behind that was never written, if it was told to do nothing."""
        if first and self.skips and not self.at_once and self.window and bool(_acting(optimizer).found_inf):
            optimizer.state.clear()

    def end(self) -> None:
        """The batch is done; read what is on the device at logging points and at the epoch's end."""
        trainer, step = self.module.trainer, self.window[-1]
        last = step.batch + 1 == trainer.num_training_batches
        if not self.at_once:
            every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
            done = trainer.global_step
            if last or (done > step.number and done % every == 0):
                self.read()
        if last:
            self.check_weights()

    def read(self) -> None:
        """Count, or stop at, the bad steps that were taken since the last reading.

        Raises:
            UserError: there is one and it ends the run.
        """
        if self.at_once:
            return
        taken = [step for step in self.steps if step.number < self.module.trainer.global_step]
        if not taken:
            return
        self.steps = self.steps[len(taken) :]
        flags = torch.stack([torch.as_tensor(step.bad, device=self.module.device) for step in taken]).tolist()
        bad: dict[int, Step] = {}
        for previous, step, flag in zip([self.last, *taken], taken, flags, strict=False):
            if flag and not self.skips:
                self._stop(step, previous)
            if flag:
                bad.setdefault(step.number, step)
        for number in sorted({step.number for step in taken}):
            if number in bad:
                self._count(bad[number])
            else:
                self.in_a_row = 0
        self.last = taken[-1]

    def check_weights(self) -> None:
        """Weights that are not finite are not saved.

        Raises:
            UserError: some are not.
        """
        weight = first_bad(self.module.named_parameters())
        if weight is not None:
            self._end(f"{weight} is not finite after", self.steps[-1] if self.steps else self.last, weight=weight)

    def _count(self, step: Step) -> None:
        self.skipped += 1
        self.in_a_row += 1
        path = self._write(step, weight=None, gradient=None)
        log.warning("step %d is left out, its loss or gradient is not finite: see %s", step.number, path)
        if self.in_a_row >= MOST_IN_A_ROW:
            self._end(f"loss or gradient was not finite for {self.in_a_row} steps in a row, up to", step)

    def _stop(self, step: Step, previous: Step | None) -> None:
        """End the run at a step; where weights are bad already, the step before it made them so."""
        held = self.at_once or self.fused  # the bad step itself changed nothing
        weight = first_bad(self.module.named_parameters()) if held else None
        if weight is not None:
            self._end(f"{weight} is not finite after", previous or step, weight=weight)
        gradient = first_bad((name, p.grad) for name, p in self.module.named_parameters()) if self.at_once else None
        loss = float(step.loss) if step.loss is not None else math.nan
        if not math.isfinite(loss):
            self._end(f"the loss is {loss} in", step, gradient=gradient)
        self._end(f"the gradient{f' of {gradient}' if gradient else ''} is not finite in", step, gradient=gradient)

    def _end(self, what: str, step: Step | None, weight: str | None = None, gradient: str | None = None) -> None:
        where, listed = "the first step", ""
        if step is not None:
            path = self._write(step, weight, gradient)
            where, listed = f"step {step.number} (epoch {step.epoch})", f", whose images are listed in {path}"
        raise UserError(
            f"{what} {where}{listed}: the run ends and its last checkpoint is from before; lower optim.optimizer.lr, "
            "clip by optim.clip_norm, compute in trainer.precision=32-true, or leave such steps out by "
            "trainer.on_nan=skip"
        )

    def _write(self, step: Step, weight: str | None, gradient: str | None) -> Path:
        data: Any = self.module.trainer.datamodule  # type: ignore[attr-defined]
        rows = step.rows.tolist()
        rank = self.module.trainer.global_rank
        path = self.folder / (FILE if rank == 0 else f"{rank}_{FILE}")
        record = {
            "step": step.number,
            "epoch": step.epoch,
            "batch": step.batch,
            "lr": step.lr,
            # Words, since JSON has no number for them.
            "loss": None if step.loss is None else str(float(step.loss)),
            "gradient_norm": None if step.norm is None else str(float(step.norm)),
            "weight": weight,
            "gradient": gradient,
            "left_out": self.skips,
            "rows": rows,
            "items": [str(data.store.manifest.item[row]) for row in rows],
        }
        write_json(path, record)
        return path


def _acting(optimizer: Optimizer) -> Any:
    """The optimiser that changes the weights: SAM's base."""
    return getattr(optimizer, "base", optimizer)


def _does_nothing_if_told(optimizer: Optimizer) -> bool:
    """Whether it heeds ``found_inf``; torch's mark of fused optimisers, which its gradient scaler reads too."""
    return bool(getattr(_acting(optimizer), "_step_supports_amp_scaling", False))
