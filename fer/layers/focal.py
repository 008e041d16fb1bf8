"""The focal loss of one class: Lin et al. 2017, arXiv 1708.02002."""

import torch
from torch import Tensor


def focal(log_p: Tensor, gamma: float) -> Tensor:
    """-(1 - p)^gamma log p of each element.

    Args:
        log_p: logarithms of the true class's probabilities, of any shape.
        gamma: 0 is cross-entropy.
    """
    rest = -log_p.expm1()  # 1 - p, with a gradient that is exact for confident images
    if 0 < gamma < 1:
        rest = rest.clamp_min(torch.finfo(log_p.dtype).tiny)  # at 0 the gradient of such a power has no end
    return -(rest.pow(gamma) * log_p)
