"""Parts of the multi-scale region network: feature pyramid, region proposals, region head (Zhang et al. 2022)."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align  # type: ignore[import-untyped]

from fer.layers.boxes import best_boxes, decode, grid_anchors

STRIDES = [8, 16, 32, 64, 128]  # of P3 to P7
ANCHORS = 9  # a position


class ResidualBlock(nn.Module):
    """ReLU(x + BN(conv(ReLU(BN(conv(x)))))), 3x3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        result: Tensor = (x + self.branch(x)).relu()
        return result


class FeaturePyramid(nn.Module):
    """P3 to P5 top-down from C3 to C5, P6 from C5, P7 from P6 (Lin et al. 2017, arXiv 1708.02002).

    Args:
        in_channels: Of C3, C4, C5.
        channels: Of all levels.
        finest_only: Build P3 alone.
    """

    def __init__(self, in_channels: list[int], channels: int, finest_only: bool) -> None:
        super().__init__()
        self.finest_only = finest_only
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        outputs = 1 if finest_only else len(in_channels)
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(outputs))
        if not finest_only:
            self.p6 = nn.Conv2d(in_channels[-1], channels, 3, stride=2, padding=1)
            self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """C3, C4, C5 -> P3 to P7, or P3 alone, each (B, channels, S, S)."""
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], scale_factor=2.0, mode="nearest")
        smoothed = [smooth(x) for smooth, x in zip(self.smooth, levels, strict=False)]
        if self.finest_only:
            return smoothed
        p6 = self.p6(maps[-1])
        # In bf16 a CPU with AMX leaves the gradient of a 3x3 convolution of a single cell unset: arbitrary numbers.
        with torch.autocast("cpu", enabled=False):
            p7 = self.p7(p6.relu().to(self.p7.weight.dtype))
        return [*smoothed, p6, p7]


class RegionProposals(nn.Module):
    """Where there may be something: objectness and a box for each anchor.

    Args:
        channels: Of the pyramid.
        image_size: Side of the image, a multiple of 32.
        anchor: Side of the smallest square anchor on P3, doubled from level to level.
        proposals: Boxes handed on.
    """

    anchors: Tensor

    def __init__(self, channels: int, image_size: int, anchor: float, proposals: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, ANCHORS, 1)
        self.boxes = nn.Conv2d(channels, 4 * ANCHORS, 1)
        for layer in (self.conv, self.objectness, self.boxes):
            nn.init.normal_(layer.weight, std=0.01)
        # All anchors begin as background with probability 0.99, or their number drowns the few objects.
        nn.init.constant_(self.objectness.bias, -math.log(99))  # type: ignore[arg-type]
        sides = [image_size // stride for stride in STRIDES[:3]]
        sides += [(sides[-1] + 1) // 2, (sides[-1] + 3) // 4]
        bases = [anchor * 2**level for level in range(len(STRIDES))]
        self.register_buffer("anchors", grid_anchors(sides, STRIDES, bases), persistent=False)
        self.image_size, self.proposals = image_size, proposals

    def forward(self, pyramid: list[Tensor]) -> tuple[Tensor, Tensor]:
        """P3 to P7 -> objectness logits (B, A) and box codes (B, A, 4), in the anchors' order."""
        hidden = [self.conv(x).relu() for x in pyramid]
        logits = torch.cat([self.objectness(x).permute(0, 2, 3, 1).flatten(1) for x in hidden], dim=1)
        codes = [self.boxes(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4) for x in hidden]
        return logits.float(), torch.cat(codes, dim=1).float()

    @torch.no_grad()
    def propose(self, logits: Tensor, codes: Tensor) -> Tensor:
        """The best boxes, (B, proposals, 4)."""
        boxes = decode(codes, self.anchors, self.image_size)
        return best_boxes(boxes, logits, candidates=5 * self.proposals, keep=self.proposals, iou=0.7)


class RegionHead(nn.Module):
    """What is in a box and how the box should be: RoIAlign 7x7, residual block, mean, two linear layers.

    Args:
        channels: Of the pyramid.
        classes: Kinds of regions, without the background.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.block = ResidualBlock(channels)
        self.kind = nn.Linear(channels, 1 + classes)
        self.boxes = nn.Linear(channels, 4 * classes)
        nn.init.normal_(self.kind.weight, std=0.01)
        nn.init.normal_(self.boxes.weight, std=0.001)

    def forward(self, pyramid: list[Tensor], rois: Tensor) -> tuple[Tensor, Tensor]:
        """Judge boxes.

        Args:
            pyramid: P3 to P7; the first three are read.
            rois: (B, R, 4).

        Returns:
            Logits (B, R, 1 + classes), background first, and codes (B, R, classes, 4) against the boxes.
        """
        side = (rois[..., 2:] - rois[..., :2]).prod(-1).sqrt()
        level = (4 + (side / 224).log2()).floor().clamp(3, 5).long() - 3
        maps, left = side_by_side(pyramid[:3])
        # Sums, since a table of numbers would be copied to the device in every step, which waits for the copy.
        here = [(level == place).to(side.dtype) for place in range(3)]
        edge: Any = sum(a * b for a, b in zip(here, left, strict=True))
        stride: Any = sum(a * b for a, b in zip(here, STRIDES[:3], strict=True))
        corner = torch.stack([edge, torch.ones_like(side)], dim=-1).repeat(1, 1, 2)
        boxes = rois / stride[..., None] + corner
        chosen = crop(maps, boxes, stride=1, size=7).to(pyramid[0].dtype)
        pooled = self.block(chosen).mean((2, 3)).unflatten(0, rois.shape[:2])
        return self.kind(pooled).float(), self.boxes(pooled).float().unflatten(2, (-1, 4))


def side_by_side(maps: list[Tensor]) -> tuple[Tensor, list[float]]:
    """Maps (B, C, S, S), the largest first, in one, so that boxes of all levels are cropped at once.

    The border of each is repeated around it: a crop is what it would be of the map alone.

    Returns:
        (B, C, S + 2, ...), and the x at which each map begins; all begin at y = 1.
    """
    rows = maps[0].shape[-1] + 2
    wide = [F.pad(x if x.dtype == torch.float64 else x.float(), (1, 1, 1, 1), mode="replicate") for x in maps]
    starts = [1.0 + sum(x.shape[-1] for x in wide[:i]) for i in range(len(wide))]
    return torch.cat([F.pad(x, (0, 0, 0, rows - x.shape[-1])) for x in wide], dim=3), starts


def crop(x: Tensor, rois: Tensor, stride: int, size: int, image: Tensor | None = None) -> Tensor:
    """RoIAlign of (B, C, H, W) under boxes (N, R, 4) in pixels of the image -> (N * R, C, size, size).

    ``image`` (N,) says whose boxes they are; without it N is B and they come in order.
    """
    row = torch.arange(rois.shape[0], device=rois.device) if image is None else image
    batch = row.to(rois.dtype)[:, None, None].expand(-1, rois.shape[1], 1)
    boxes = torch.cat([batch, rois], dim=2).flatten(0, 1)
    wide = x if x.dtype == torch.float64 else x.float()
    aligned = roi_align(wide, boxes.to(wide.dtype), size, 1 / stride, sampling_ratio=2, aligned=True)
    result: Tensor = aligned.to(x.dtype)
    return result
