"""Boxes, batched and of fixed shapes: anchors, their code, duplicates. Corners x1, y1, x2, y2 in pixels."""

import math

import torch
from torch import Tensor
from torchvision.ops import box_iou  # type: ignore[import-untyped]

LARGEST_GROWTH = math.log(1000 / 16)  # of a decoded side over its anchor's, as a logarithm


def grid_anchors(sides: list[int], strides: list[int], bases: list[float]) -> Tensor:
    """Nine anchors a position: three scales times the ratios (height over width) 1:1, 2:1, 1:2 (RetinaNet).

    Args:
        sides: Of each square map.
        strides: Pixels between its positions.
        bases: Side of its smallest square anchor.

    Returns:
        (A, 4), level by level, row by row, column by column.
    """
    levels = []
    for side, stride, base in zip(sides, strides, bases, strict=True):
        shapes = [
            (base * scale / math.sqrt(ratio), base * scale * math.sqrt(ratio))
            for ratio in (1.0, 2.0, 0.5)
            for scale in (2**0, 2 ** (1 / 3), 2 ** (2 / 3))
        ]
        half = torch.tensor(shapes) / 2
        centre = (torch.arange(side) + 0.5) * stride
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        centres = torch.stack([x, y], dim=-1)[:, :, None]
        levels.append(torch.cat([centres - half, centres + half], dim=-1).reshape(-1, 4))
    return torch.cat(levels)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes seen from anchors, (..., 4): shift of the centre over the anchor's side, logarithm of the growth."""
    size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    shift = (boxes[..., 2:] + boxes[..., :2] - anchors[..., 2:] - anchors[..., :2]) / (2 * anchor_size)
    return torch.cat([shift, (size / anchor_size).log()], dim=-1)


def decode(code: Tensor, anchors: Tensor, image_size: int) -> Tensor:
    """Undo `encode` and clip to the image; no side comes out under a pixel."""
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    centre = (anchors[..., 2:] + anchors[..., :2]) / 2 + code[..., :2] * anchor_size
    half = anchor_size * code[..., 2:].clamp(max=LARGEST_GROWTH).exp() / 2
    low = (centre - half).clamp(0, image_size - 1)
    high = torch.maximum((centre + half).clamp(0, image_size), low + 1)
    return torch.cat([low, high], dim=-1)


def best_boxes(boxes: Tensor, scores: Tensor, candidates: int, keep: int, iou: float) -> Tensor:
    """The best boxes without near-duplicates, always the same number.

    Fast NMS (YOLACT, arXiv 1904.02689): a candidate goes when a better one overlaps it by more than ``iou``. Where too
    few remain the duplicates fill up.

    Args:
        boxes: (B, N, 4).
        scores: (B, N).
        candidates: Best boxes looked at.
        keep: Boxes returned.
        iou: Overlap of duplicates.

    Returns:
        (B, keep, 4).
    """
    top = scores.topk(min(candidates, scores.shape[1]), dim=1)
    chosen = boxes.gather(1, top.indices[..., None].expand(-1, -1, 4))
    duplicate = box_iou(chosen, chosen).triu(diagonal=1).amax(1) > iou
    # Down by more than any difference of scores, so that duplicates keep their order among themselves.
    left = (top.values - duplicate * (top.values.amax(1, keepdim=True) - top.values.amin(1, keepdim=True) + 1)).topk(
        min(keep, chosen.shape[1]), dim=1
    )
    return chosen.gather(1, left.indices[..., None].expand(-1, -1, 4))
