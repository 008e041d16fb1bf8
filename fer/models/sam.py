"""Sharpness-aware minimisation: Foret et al., ICLR 2021, arXiv 2010.01412."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


class SAM(Optimizer):
    """Descends along the gradient found ``rho`` uphill; two passes a step, so twice the cost.

    w_adv = w + rho g / |g|, then one step of ``base`` from w with the gradient at w_adv.

    Args:
        params: Parameters or groups of them.
        lr: The base optimiser's learning rate.
        rho: Radius of the neighbourhood.
        base: Partial of the optimiser that makes the step.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        rho: float,
        base: Callable[..., Optimizer],
    ) -> None:
        self.base = base(params, lr=lr)
        self.rho = rho
        super().__init__(self.base.param_groups, self.base.defaults)
        self._share()

    def _share(self) -> None:
        """Let the base optimiser work on this one's groups and state, which schedules and checkpoints see."""
        self.base.param_groups, self.base.state = self.param_groups, self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state; the base optimiser's are the same objects."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Clears the gradients, computes the loss, backpropagates and returns the loss; called twice.

        Raises:
            ValueError: There is no closure.
        """
        if closure is None:
            raise ValueError("SAM needs a closure, since it evaluates the loss twice")
        with torch.enable_grad():
            loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        scale = self.rho / (get_total_norm([p.grad for p in parameters]) + 1e-12)
        origins = [p.clone() for p in parameters]
        for p in parameters:
            p.add_(p.grad * scale.to(p.device))
        try:
            with torch.enable_grad():
                closure()
        finally:  # a second pass that fails leaves the weights as they were, too
            for p, origin in zip(parameters, origins, strict=True):
                p.copy_(origin)
        self.base.step()
        return loss
