"""Training a region detector from the known boxes of images: matching and losses, batched (Zhang et al. 2022)."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou  # type: ignore[import-untyped]

from fer.layers.boxes import encode
from fer.layers.focal import focal

SMOOTH_L1_BETA = 1 / 9  # RetinaNet's


def focal_binary(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """-(1 - s)^gamma log s for each element, s = p p* + (1 - p)(1 - p*); gamma 0 is binary cross-entropy."""
    signed = torch.where(target, logits, -logits)
    return (gamma * F.logsigmoid(-signed)).exp() * -F.logsigmoid(signed)


def focal_softmax(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """-(1 - p_y)^gamma log p_y for each row of (..., K) logits."""
    return focal(logits.log_softmax(-1).gather(-1, target[..., None]).squeeze(-1), gamma)


def overlaps(boxes: Tensor, truth: Tensor, present: Tensor) -> Tensor:
    """IoU of boxes (B, N, 4) or (N, 4) with known boxes (B, T, 4), 0 with those not present (B, T): (B, N, T)."""
    iou: Tensor = box_iou(boxes.expand(len(truth), -1, -1), truth)
    return iou * present[:, None]


def proposal_loss(
    logits: Tensor, codes: Tensor, anchors: Tensor, truth: Tensor, present: Tensor, complete: Tensor, gamma: float
) -> Tensor:
    """Focal objectness and smooth-L1 boxes, both over the number of positive anchors.

    An anchor is positive with IoU of at least 0.5 or as the best of a box, negative under 0.4, else ignored.

    Args:
        logits: (B, A) objectness.
        codes: (B, A, 4).
        anchors: (A, 4).
        truth: (B, T, 4) known boxes; arbitrary finite ones where not present.
        present: (B, T).
        complete: (B,) images of which all regions are known; the others do not count.
        gamma: Of the focal loss.
    """
    iou = overlaps(anchors, truth, present)
    best, owner = iou.max(2)
    of_a_box = (iou == iou.amax(1, keepdim=True)) & (iou > 0)
    positive = ((best >= 0.5) | of_a_box.any(2)) & complete[:, None]
    owner = torch.where(of_a_box.any(2), of_a_box.long().argmax(2), owner)
    counted = positive | ((best < 0.4) & complete[:, None])
    objectness = (focal_binary(logits, positive, gamma) * counted).sum()
    target = encode(truth.gather(1, owner[..., None].expand(-1, -1, 4)), anchors)
    distance = F.smooth_l1_loss(codes, target, reduction="none", beta=SMOOTH_L1_BETA).sum(2)
    return (objectness + (distance * positive).sum()) / positive.sum().clamp(min=1)


def head_loss(
    logits: Tensor,
    codes: Tensor,
    rois: Tensor,
    counted: Tensor,
    truth: Tensor,
    present: Tensor,
    kinds: Tensor,
    gamma: float,
) -> Tensor:
    """Focal kind and smooth-L1 boxes of the region head, over the number of boxes that hold something (IoU 0.5).

    Args:
        logits: (B, R, 1 + classes), background first.
        codes: (B, R, classes, 4).
        rois: (B, R, 4).
        counted: (B, R) which of them count.
        truth: (B, T, 4) known boxes.
        present: (B, T).
        kinds: (T,) class of each known box, from 1.
        gamma: Of the focal loss.
    """
    best, owner = overlaps(rois, truth, present).max(2)
    positive = (best >= 0.5) & counted
    kind = torch.where(positive, kinds[owner], 0)
    target = encode(truth.gather(1, owner[..., None].expand(-1, -1, 4)), rois)
    own = (kinds[owner] - 1)[..., None, None].expand(-1, -1, 1, 4)
    distance = F.smooth_l1_loss(codes.gather(2, own).squeeze(2), target, reduction="none", beta=SMOOTH_L1_BETA).sum(2)
    total = (focal_softmax(logits, kind, gamma) * counted).sum() + (distance * positive).sum()
    return total / positive.sum().clamp(min=1)
