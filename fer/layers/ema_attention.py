"""Efficient multi-scale attention across space (EMA): Ouyang et al., ICASSP 2023, arXiv 2305.13563."""

import torch
from torch import Tensor, nn


class EMAttention(nn.Module):
    """Gates of each position from two branches that look at each other, within groups of channels.

    Per group of C / groups channels: row and column means pass one shared 1x1 convolution and become two sigmoid gates,
    x1 = GroupNorm(x * row gate * column gate); x2 = conv3x3(x);
    w = softmax(mean x1) . x2 + softmax(mean x2) . x1 over channels; result x * sigmoid(w).

    Args:
        channels: Channels C, a multiple of ``groups``.
        groups: Number of groups.

    Raises:
        ValueError: The channels do not divide into the groups.
    """

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__()
        if channels < groups or channels % groups:
            raise ValueError(f"EMA attention needs a multiple of {groups} channels, got {channels}")
        self.groups, width = groups, channels // groups
        self.conv1 = nn.Conv2d(width, width, 1)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(width, width)

    def gate(self, x: Tensor) -> Tensor:
        """sigmoid(w): (B, C, H, W) -> (B, groups, H, W)."""
        height, width = x.shape[2:]
        group = x.reshape(-1, x.shape[1] // self.groups, height, width)
        means = torch.cat([group.mean(3, keepdim=True), group.mean(2, keepdim=True).transpose(2, 3)], dim=2)
        rows, columns = self.conv1(means).split([height, width], dim=2)
        x1 = self.norm(group * rows.sigmoid() * columns.transpose(2, 3).sigmoid())
        x2 = self.conv3(group)
        weight = _matched(x1, x2) + _matched(x2, x1)
        return weight.sigmoid().view(-1, self.groups, height, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        grouped = x.reshape(x.shape[0], self.groups, -1, *x.shape[2:])
        return (grouped * self.gate(x)[:, :, None]).reshape(x.shape)


def _matched(query: Tensor, key: Tensor) -> Tensor:
    """Softmax of the query's channel means . the key's channels: two (N, C, H, W) -> (N, 1, H, W)."""
    return (query.mean((2, 3), keepdim=True).softmax(1) * key).sum(1, keepdim=True)
