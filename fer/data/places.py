"""Boxes and landmarks that follow their image: one affine map per image, from the stored image to the network's input.

Between the manifest's pixels and the input's, places are measured as `torch.nn.functional.affine_grid` measures them:
-1 and 1 are an image's borders, whatever its size. A box is then centre x, y and half its width and height.
"""

from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fer.data.manifest import MIRROR, Array, Manifest

BOXES = ("box", "organ_boxes", "face_boxes", "face_organ_boxes")
PLACES = (*BOXES, "landmarks")
_ORGANS_MIRRORED = (1, 0, 2, 3)  # left eye and right eye change places


def relative(manifest: Manifest, windows: Array) -> dict[str, Array]:
    """The places a manifest has, relative to the stored images.

    Args:
        manifest: N images.
        windows: (N, 4) x, y, width, height of the part of its source each stored image shows, in source pixels.

    Returns:
        By key, boxes as (N, ..., 4) centre and half sides, landmarks as (N, L, 2), float32.
    """
    out = {}
    for key in PLACES:
        values = getattr(manifest, key)
        if values is None:
            continue
        values = values.astype(np.float64)
        corner, side = np.split(windows.reshape(-1, *(1,) * (values.ndim - 2), 4), 2, axis=-1)
        # A landmark counts from the centre of the first pixel, a box from the image's corner.
        point = values + 0.5 if key == "landmarks" else values[..., :2] + values[..., 2:] / 2
        place = (point - corner) / side * 2 - 1
        half = [] if key == "landmarks" else [values[..., 2:] / side]
        out[key] = np.concatenate([place, *half], axis=-1).astype(np.float32)
    return out


def inverse(matrix: Tensor) -> Tensor:
    """The inverses of (B, 2, 3) affine maps."""
    (a, b, x), (c, d, y) = (row.unbind(-1) for row in matrix.unbind(-2))
    det = a * d - b * c
    rows = [d, -b, b * y - d * x, -c, a, c * x - a * y]
    return torch.stack([value / det for value in rows], dim=-1).view(-1, 2, 3)


def follow(batch: Mapping[str, Tensor], matrix: Tensor, size: int) -> dict[str, Tensor]:
    """Places as they lie in the network's input.

    Args:
        batch: places of B images as `relative` gives them, among other things.
        matrix: (B, 2, 3) affine maps from the stored image to the input, both from -1 to 1.
        size: side of the input in pixels.

    Returns:
        By key, in pixels of the input and float32: boxes (B, ..., 4) x, y, width, height, upright around the moved
        box and cut at the image's border; landmarks (B, L, 2). NaN where missing or outside. Where the map mirrors,
        left and right eye, and the landmarks of both halves of the face, have changed places.
    """
    out = {}
    mirrored = matrix[:, 0, 0] * matrix[:, 1, 1] < matrix[:, 0, 1] * matrix[:, 1, 0]
    for key in PLACES:
        if key not in batch:
            continue
        values = batch[key]
        if key in ("organ_boxes", "face_organ_boxes", "landmarks"):
            order = MIRROR[values.shape[1]] if key == "landmarks" else _ORGANS_MIRRORED
            swapped = values.index_select(-2, _indices(tuple(order), values.device))
            values = torch.where(mirrored.view(-1, *(1,) * (values.ndim - 1)), swapped, values)
        centre = _turned(matrix[:, :, :2], values[..., :2]) + matrix[:, :, 2].view(-1, *(1,) * (values.ndim - 2), 2)
        if key == "landmarks":
            inside = (centre.abs() <= 1).all(-1, keepdim=True)
            out[key] = torch.where(inside, (centre + 1) * (size / 2) - 0.5, torch.nan)
        else:
            half = _turned(matrix[:, :, :2].abs(), values[..., 2:])
            low, high = (centre - half).clamp(-1, 1), (centre + half).clamp(-1, 1)
            box = torch.cat([low + 1, high - low], dim=-1) * (size / 2)
            out[key] = torch.where((high > low).all(-1, keepdim=True), box, torch.nan)
    return out


@cache
def _indices(order: tuple[int, ...], device: torch.device) -> Tensor:
    """An order on the device, copied there once: a copy in every step would wait for the device."""
    return torch.tensor(order, device=device)


def _turned(matrix: Tensor, points: Tensor) -> Tensor:
    """(B, ..., 2) points times (B, 2, 2) matrices, written out: a batched product rounds by the batch size."""
    m = matrix.view(-1, 2, 2, *(1,) * (points.ndim - 2))
    x, y = points.unbind(-1)
    return torch.stack([m[:, i, 0] * x + m[:, i, 1] * y for i in range(2)], dim=-1)
