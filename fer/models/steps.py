"""What a training step does beside its forward and backward pass: clipping, the guard, a batch cut to fit in memory."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from fer.errors import UserError
from fer.models.guard import StepGuard, StepLeftOut, buffers_of, put_back
from fer.models.optim import Recipe
from fer.models.sam import SAM

log = logging.getLogger(__name__)
Batch = dict[str, Tensor]


class Portions:
    """A batch cut into as many parts as memory asks for, whose gradients add up to the batch's.

    A step that runs out of memory begins again with twice as many parts, which later steps keep. A part's mean loss
    counts by its share of the images, so the gradient is the batch's own as far as the loss is a mean over images;
    batch norm sees the statistics of each part.

    Attributes:
        parts: how many.
        part: the one at hand, from 0.
        images: of a batch.
    """

    def __init__(self) -> None:
        self.parts, self.part, self.images = 1, 0, 0

    @property
    def micro_batch(self) -> int | None:
        """Images of the largest part; None where the batch is whole."""
        return math.ceil(self.images / self.parts) if self.parts > 1 else None

    def portion(self, batch: Batch) -> tuple[Batch, float]:
        """The part at hand and its share of the batch."""
        self.images = len(batch["label"])
        if self.parts == 1:
            return batch, 1.0
        part = {key: values.tensor_split(self.parts)[self.part] for key, values in batch.items()}
        return part, len(part["label"]) / self.images

    def whole(self, module: LightningModule, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, once for each part, and anew with more parts whenever memory runs out.

        Args:
            module: whose buffers and random numbers begin anew as well.
            optimizer: whose gradients are dropped.
            closure: forward and backward pass of the part at hand; it clears the gradients at the first.

        Raises:
            UserError: a single image does not fit.
        """

        def step() -> Any:
            while True:
                buffers, random = buffers_of(module), _random(module.device)
                try:
                    for part in range(self.parts):
                        self.part = part
                        result = closure()
                    return result
                except torch.OutOfMemoryError:
                    pass  # retried outside, where the exception no longer holds the failed pass's tensors
                finally:
                    self.part = 0
                put_back(module, buffers)
                _draw_again(module.device, random)
                optimizer.zero_grad(set_to_none=True)
                if module.device.type == "cuda":
                    torch.cuda.empty_cache()
                self._halve()

        return step

    def _halve(self) -> None:
        if self.parts >= self.images:
            raise UserError(
                "out of memory with a single image: take a smaller model or image size, or another accelerator"
            )
        self.parts = min(2 * self.parts, self.images)
        log.warning(
            "out of memory: batches of %d go on in %d parts of up to %s images, whose gradients add up; batch norm "
            "sees each part's statistics",
            self.images,
            self.parts,
            self.micro_batch,
        )


def _random(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _draw_again(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


class SteppedModule(LightningModule):
    """What all modules trained here share: the recipe's clipping, and `StepGuard` and `Portions` where a run has them.

    Attributes:
        optim: optimiser and schedule.
        guard: watches for numbers that are not finite.
        portions: cuts batches that do not fit in memory.
        counts: whether a training step's predictions are counted: not so at the weights uphill, where SAM looks at a
            batch again.
        splits: whether a batch's loss is the mean of its parts' losses, each weighted by its images.
    """

    optim: Recipe
    guard: StepGuard | None = None
    portions: Portions | None = None
    counts: bool = True

    @property
    def splits(self) -> bool:
        """False unless a subclass knows better."""
        return False

    def on_train_start(self) -> None:
        """Tell the guard what it watches.

        Raises:
            UserError: an optimiser that looks at each batch twice would add up batches it has left already.
        """
        if self.trainer.accumulate_grad_batches > 1 and any(isinstance(o, SAM) for o in self.trainer.optimizers):
            raise UserError(
                "optim=sam looks at each batch twice, at two points; trainer.accumulate_grad_batches must be 1 with it"
            )
        if self.guard is not None:
            self.guard.start(self, clips=self.optim.clip_norm is not None)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Tell the guard which batch comes."""
        if self.guard is not None:
            self.guard.begin(batch["index"], batch_idx)

    def on_before_backward(self, loss: Tensor) -> None:
        """Show the guard the loss."""
        if self.guard is not None:
            self.guard.see(loss)

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Show the guard the gradient, then clip as the recipe says; the paper's value belongs with its optimiser."""
        # The optimiser's lists: walking the modules again costs more than clipping does.
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = self.optim.norm(parameters)
        if self.guard is not None:
            self.guard.judge(optimizer, parameters, norm)
        self.optim.clip(parameters, norm)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Lightning's, of a batch in as many parts as it takes, unless the guard leaves it out.

        Raises:
            UserError: a batch does not fit in memory and may not be cut.
        """
        assert optimizer_closure is not None
        first = not optimizer.optimizer.state
        if self.portions is not None:
            optimizer_closure = self.portions.whole(self, optimizer, optimizer_closure)
        try:
            super().optimizer_step(epoch, batch_idx, optimizer, self._counted_once(optimizer_closure))
        except StepLeftOut:
            return
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"out of memory in a training step ({reason}): cut its batches by trainer.auto_batch=true, or take a "
                "smaller data.batch_size"
            ) from None
        finally:
            self.counts = True
        if self.guard is not None:
            self.guard.acted(optimizer.optimizer, first)

    def _counted_once(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            try:
                return closure()
            finally:
                self.counts = False

        return call

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Lightning's, but not between the parts of a batch."""
        if self.portions is None or self.portions.part == 0:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Let the guard read what it must not read in a step."""
        if self.guard is not None:
            self.guard.end()

    def safety_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of guard and parts; nothing is saved that is not finite."""
        state: dict[str, Any] = {"parts": self.portions.parts if self.portions is not None else 1}
        if self.guard is not None:
            self.guard.read()
            self.guard.check_weights()
            state["guard"] = self.guard.state()
        return state

    def load_safety_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's."""
        if self.portions is not None:
            self.portions.parts = state["parts"]
        if self.guard is not None and "guard" in state:
            self.guard.load(state["guard"])
