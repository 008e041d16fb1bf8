"""The focal loss of one class: Lin et al. 2017, arXiv 1708.02002."""

import torch
from torch import Tensor


def focal(log_p: Tensor, gamma: float) -> Tensor:
    """-(1 - p)^gamma log p of each element.

    Args:
        log_p: logarithms of the true class's probabilities, of any shape.
        gamma: 0 is cross-entropy.
    """
    # 1 - p through expm1, so that confident images keep a gradient that is exact; off 0, where that of a power below 1
    # has no end and would make NaN of them.
    rest = (-log_p.expm1()).clamp_min(torch.finfo(log_p.dtype).tiny)
    return -(rest.pow(gamma) * log_p)
