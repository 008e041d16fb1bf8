"""Anchors on one grid: shapes by k-means, the code of a box, and which prediction answers for which known box.

The same shapes stand in every cell of a square grid over the image. Boxes are corners x1, y1, x2, y2 in pixels of the
network's input.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

LARGEST_GROWTH = 4.0  # of a decoded side over its anchor's, as a logarithm
CLOSE = 0.5  # overlap of shapes or boxes from which on a prediction beside the responsible one is no background
_EDGE = 1e-6  # of a cell: a centre on the very border still has a finite code
_RESTARTS, _ROUNDS = 8, 100


def shape_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes laid over each other at one corner: (..., 2) with (..., 2) widths and heights, broadcast."""
    shared = torch.minimum(a, b).prod(-1)
    return shared / (a.prod(-1) + b.prod(-1) - shared)


def anchor_shapes(sizes: Tensor, count: int) -> Tensor:
    """Typical widths and heights: k-means with the distance 1 - IoU (YOLOv2, arXiv 1612.08242, section 2).

    The best of several k-means++ starts; a pure function of its arguments.

    Args:
        sizes: (N, 2) widths and heights of the known boxes.
        count: Shapes wanted.

    Returns:
        (count, 2) in the order of their area.

    Raises:
        ValueError: Fewer than ``count`` different sizes.
    """
    sizes = sizes.double()
    if len(torch.unique(sizes, dim=0)) < count:
        raise ValueError(f"{count} anchor shapes need as many boxes of different size")
    generator = torch.Generator().manual_seed(0)
    best, best_distance = sizes[:count], float("inf")
    for _ in range(_RESTARTS):
        shapes, owner = _spread(sizes, count, generator), torch.full((len(sizes),), -1)
        for _ in range(_ROUNDS):
            nearest = shape_iou(sizes[:, None], shapes).argmax(1)
            if torch.equal(nearest, owner):
                break
            owner = nearest
            members = torch.bincount(owner, minlength=count)[:, None]
            means = torch.zeros_like(shapes).index_add_(0, owner, sizes) / members.clamp(min=1)
            shapes = torch.where(members > 0, means, shapes)
        distance = (1 - shape_iou(sizes[:, None], shapes).amax(1)).mean().item()
        if distance < best_distance:
            best, best_distance = shapes, distance
    return best[best.prod(1).argsort()].float()


def _spread(sizes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each start is drawn with the probability of its squared distance to those before."""
    chosen = [int(torch.randint(len(sizes), (1,), generator=generator))]
    distance = torch.full((len(sizes),), 1.0, dtype=sizes.dtype)
    while len(chosen) < count:
        distance = torch.minimum(distance, 1 - shape_iou(sizes, sizes[chosen[-1]]))
        weight = distance.clamp(min=0).square()
        weight[chosen] = 0
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
    return sizes[chosen]


class Responsible(NamedTuple):
    """Which of N predictions of an image answers for which of its F boxes.

    Attributes:
        owner: (B, N) index of the box, -1 for none.
        close: (B, N) no box's own prediction, yet too near to one to be background.
    """

    owner: Tensor
    close: Tensor


class AnchorGrid(nn.Module):
    """``cells`` x ``cells`` cells with A anchors each: N = cells * cells * A predictions, row by row, cell by cell.

    Args:
        anchors: A pairs of width and height in pixels, part of the weights so that a checkpoint is understood alone.
        cells: Of a side.
        image_size: Side of the image in pixels.
    """

    anchors: Tensor
    corner: Tensor

    def __init__(self, anchors: list[list[float]], cells: int, image_size: int) -> None:
        super().__init__()
        self.cells, self.image_size = cells, image_size
        self.register_buffer("anchors", torch.tensor(anchors, dtype=torch.float32))
        y, x = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
        corner = torch.stack([x, y], dim=-1).view(-1, 1, 2).expand(-1, len(anchors), 2).reshape(-1, 2)
        self.register_buffer("corner", corner.float(), persistent=False)  # (N, 2) of each prediction's cell, in cells

    @property
    def _shapes(self) -> Tensor:
        """(N, 2) the anchor of each prediction."""
        return self.anchors.repeat(self.cells * self.cells, 1)

    def decode(self, code: Tensor) -> Tensor:
        """(B, N, 4) code -> boxes.

        Centre = (cell + sigmoid(t_xy)) / cells of the image, size = anchor * exp(t_wh), the exponent at most 4.
        """
        centre = (self.corner + code[..., :2].sigmoid()) * (self.image_size / self.cells)
        half = self._shapes * code[..., 2:].clamp(max=LARGEST_GROWTH).exp() / 2
        return torch.cat([centre - half, centre + half], dim=-1)

    def place(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, N, 4) seen from the predictions: centre from the cell's corner, in cells, and log of the growth."""
        centre = (boxes[..., :2] + boxes[..., 2:]) / 2 * (self.cells / self.image_size)
        return centre - self.corner, ((boxes[..., 2:] - boxes[..., :2]) / self._shapes).log()

    def encode(self, boxes: Tensor) -> Tensor:
        """Undo `decode` for boxes (B, N, 4) whose centres lie in the cells of their predictions."""
        centre, growth = self.place(boxes)
        return torch.cat([centre.logit(_EDGE), growth], dim=-1)

    def responsible(self, boxes: Tensor, present: Tensor) -> Responsible:
        """The anchor of best shape in the cell of a box's centre; where two boxes want it, the first gets it.

        Args:
            boxes: (B, F, 4) known boxes, arbitrary finite ones where not ``present``.
            present: (B, F).
        """
        batch, faces = present.shape
        count = len(self.anchors)
        centre = (boxes[..., :2] + boxes[..., 2:]) / 2 * (self.cells / self.image_size)
        column, row = centre.floor().long().clamp(0, self.cells - 1).unbind(-1)
        first = (row * self.cells + column) * count
        iou = shape_iou((boxes[..., 2:] - boxes[..., :2])[:, :, None], self.anchors)
        best = first + iou.argmax(-1)
        owner = torch.full((batch, len(self.corner)), -1, device=boxes.device)
        close = torch.zeros_like(owner, dtype=torch.bool)
        for f in reversed(range(faces)):
            here, own = present[:, f, None], best[:, f, None]
            owner.scatter_(1, own, torch.where(here, f, owner.gather(1, own)))
            cell = first[:, f, None] + torch.arange(count, device=boxes.device)
            close.scatter_(1, cell, close.gather(1, cell) | (here & (iou[:, f] >= CLOSE)))
        return Responsible(owner, close & (owner < 0))
