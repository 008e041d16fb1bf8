"""Grad-CAM: which places of an image speak for a class (Selvaraju et al., ICCV 2017, arXiv 1610.02391, eq. 1 and 2).

The computation is the grad-cam package's. Ours is where each architecture's map is found (`ExpressionModule.cam_layer`)
and how a transformer's tokens become a map again.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fer.errors import UserError
from fer.metrics import Array
from fer.models.base import ExpressionModule

if TYPE_CHECKING:
    from fer.trained import TrainedRun


def cam(run: "TrainedRun", image: Tensor, target: Tensor | None = None) -> Array:
    """`grad_cam` of a trained run's network."""
    return grad_cam(run.module, image, target)


def grad_cam(module: ExpressionModule, image: Tensor, target: Tensor | None = None) -> Array:
    """Where the evidence for a class lies.

    Args:
        module: the network, in eval mode. It is left frozen: gradients are taken by the image alone.
        image: (B, 3, S, S), normalised as `TrainedRun.finish` leaves it.
        target: (B,) the classes asked about; None: those predicted.

    Returns:
        (B, S, S) float32 in [0, 1], each image's map scaled to its own maximum; all 0 where nothing speaks for the
        class.

    Raises:
        UserError: the grad-cam package is not installed.
        ValueError: a class that the network has not.
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise UserError(f"Grad-CAM needs the package grad-cam ({error}): pip install 'fer-bench[explain]'") from None
    classes = None if target is None else [int(one) for one in target]
    if classes is not None and not (len(classes) == len(image) and all(0 <= c < module.num_classes for c in classes)):
        raise ValueError(f"target {classes}: expected one class of 0..{module.num_classes - 1} for each image")
    module.requires_grad_(False)
    # The caller may be in inference mode, whose tensors never take gradients.
    with torch.inference_mode(False), torch.enable_grad():
        pixels = image.detach().clone().requires_grad_()
        method = GradCAM(module, [module.cam_layer], reshape_transform=as_map)
        try:
            maps = method(pixels, None if classes is None else [ClassifierOutputTarget(c) for c in classes])
        finally:
            method.activations_and_grads.release()
    return np.asarray(maps, dtype=np.float32)


def as_map(x: Tensor) -> Tensor:
    """A layer's output as (B, C, H, W).

    Args:
        x: (B, C, S, S) already; (B, S, S, C) with C other than S, as Swin has it; or (B, P + S * S, C) tokens, of which
            the first P < 2 S + 1 (class, registers) belong to no place.
    """
    if x.ndim == 3:
        side = math.isqrt(x.shape[1])
        return x[:, -side * side :].transpose(1, 2).reshape(len(x), -1, side, side)
    return x if x.shape[2] == x.shape[3] else x.permute(0, 3, 1, 2)
