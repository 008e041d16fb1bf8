"""Optimiser recipes: an optimiser, its schedule and its gradient clipping, injected into every module.

A schedule is a pure function of the optimiser step, so a resumed run follows the same curve as an uninterrupted one.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fer.config import require_counts

ParameterGroup = dict[str, Any]


class Schedule(Protocol):
    """What multiplies the learning rate at a step."""

    def factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """The multiplier at ``step`` (0 is the first), a pure function of its arguments."""


@dataclass(frozen=True)
class Constant:
    """The learning rate as given."""

    def factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """1 at every step."""
        return 1.0


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up over ``warmup_epochs``, then half a cosine down to ``floor`` at the last step."""

    warmup_epochs: float
    floor: float = 0.0

    def factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """Rises to 1 during warm-up, then falls to ``floor``."""
        warmup = min(round(self.warmup_epochs * steps_per_epoch), total_steps)
        if step < warmup:
            return (step + 1) / warmup
        progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class OneCycle:
    """Smith and Topin's one cycle, arXiv 1708.07120, the learning rate being its peak.

    Cosine from 1 / div to 1 over the first ``pct_start`` of the steps, then cosine down to 1 / (div * final_div):
    `torch.optim.lr_scheduler.OneCycleLR`'s curve.
    """

    pct_start: float
    div: float
    final_div: float

    def factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """Rises from 1 / div to 1, then falls to 1 / (div * final_div)."""
        peak, end = self.pct_start * total_steps - 1, total_steps - 1
        if step <= peak:
            return _cosine_between(1 / self.div, 1.0, step / max(peak, 1e-9))
        return _cosine_between(
            1.0,
            1 / (self.div * self.final_div),
            min((step - peak) / max(end - peak, 1e-9), 1.0),
        )


@dataclass(frozen=True)
class StepDecay:
    """Constant up to ``start_epoch``, then times ``gamma`` every ``every`` epochs, never under ``floor``.

    Epochs count from 0: with start 80 and every 5, epoch 84 still has factor 1 and epoch 85 has ``gamma``.
    """

    start_epoch: int
    every: int
    gamma: float
    floor: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a decay every 0 epochs.

        Raises:
            UserError: naming the key.
        """
        require_counts({"optim.schedule.every": self.every}, {"optim.schedule.every": 1})

    def factor(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """Piecewise constant over epochs."""
        decays = max(step // steps_per_epoch - self.start_epoch, 0) // self.every
        return float(max(self.gamma**decays, self.floor))


def _cosine_between(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Recipe:
    """Everything about the descent, from ``conf/optim``.

    Attributes:
        optimizer: A partial of an optimiser with its keyword arguments, ``lr`` among them.
        schedule: Multiplier of the learning rate at each step.
        no_decay_on_norm: Spare biases, norm weights and other vectors from weight decay.
        clip_norm: Largest global norm of the gradients; None leaves them.
        clip_value: Largest magnitude of a gradient's element; None leaves them.
    """

    optimizer: Callable[..., Optimizer]
    schedule: Schedule
    no_decay_on_norm: bool
    clip_norm: float | None
    clip_value: float | None

    def configure(
        self,
        groups: Sequence[Tensor] | Sequence[ParameterGroup],
        steps_per_epoch: int,
        max_epochs: int,
    ) -> dict[str, Any]:
        """Build what Lightning's ``configure_optimizers`` returns.

        Args:
            groups: Parameters, or groups of them; a group's ``lr_scale`` multiplies the recipe's learning rate.
            steps_per_epoch: Optimiser steps of an epoch.
            max_epochs: Epochs of the whole training; the schedule ends there.
        """
        optimizer = self.optimizer(self._groups(groups))
        schedule, total = self.schedule, steps_per_epoch * max_epochs

        # A plain function: LambdaLR then saves none of it, and the checkpoint holds numbers only.
        def factor(step: int) -> float:
            return schedule.factor(step, steps_per_epoch, total)

        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": LambdaLR(optimizer, factor),
                "interval": "step",
            },
        }

    def norm(self, parameters: Iterable[Tensor]) -> Tensor | None:
        """The gradients' global norm, which clipping by it needs; None where nothing does."""
        if self.clip_norm is None:
            return None
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def clip(self, parameters: Iterable[Tensor], norm: Tensor | None = None) -> None:
        """Clip gradients in place as the recipe says.

        Args:
            parameters: whose gradients.
            norm: what `norm` found, if it was asked already.
        """
        parameters = list(parameters)
        norm = self.norm(parameters) if norm is None else norm
        if self.clip_norm is not None and norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self.clip_value)

    def _groups(self, groups: Sequence[Tensor] | Sequence[ParameterGroup]) -> list[ParameterGroup]:
        """Groups as the optimiser wants them: trainable parameters, own ``lr``, vectors apart without decay."""
        learning_rate: float = self.optimizer.keywords["lr"]  # type: ignore[attr-defined]
        result: list[ParameterGroup] = []
        for group in _as_groups(groups):
            options = {key: value for key, value in group.items() if key not in ("params", "lr_scale")}
            if "lr_scale" in group:
                options["lr"] = learning_rate * group["lr_scale"]
            trainable = [p for p in group["params"] if p.requires_grad]
            if not self.no_decay_on_norm:
                result.append({"params": trainable, **options})
                continue
            result.append({"params": [p for p in trainable if p.ndim > 1], **options})
            result.append(
                {
                    "params": [p for p in trainable if p.ndim <= 1],
                    **options,
                    "weight_decay": 0.0,
                }
            )
        return [group for group in result if group["params"]]


def steps_per_epoch(trainer: Any) -> int:
    """Optimiser steps of an epoch of a Lightning trainer with one of our data modules.

    Counted here: ``trainer.estimated_stepping_batches`` would make the loaders before a checkpoint's loader state is
    read, and a resumed epoch would begin at its first batch again.
    """
    batches: int = trainer.datamodule.train_batches()
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps: int = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    return steps


def _as_groups(
    groups: Sequence[Tensor] | Sequence[ParameterGroup],
) -> list[ParameterGroup]:
    items: list[Any] = list(groups)
    return items if items and isinstance(items[0], dict) else [{"params": items}]


def layer_decay_groups(network: nn.Module, decay: float, lr_scale: float = 1.0) -> list[ParameterGroup]:
    """Groups of a timm network whose learning rate shrinks by ``decay`` a layer from the last to the first.

    Args:
        network: A timm model, whose ``group_matcher`` says which layer a parameter belongs to.
        decay: Ratio of a layer's learning rate to the next one's; 1 gives all layers the same.
        lr_scale: Multiplier of the last layer's learning rate.
    """
    if decay == 1:
        return [{"params": list(network.parameters()), "lr_scale": lr_scale}]
    groups = param_groups_layer_decay(network, layer_decay=decay)
    return [{"params": group["params"], "lr_scale": lr_scale * group["lr_scale"]} for group in groups]
