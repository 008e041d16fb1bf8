"""Convolutional block attention (CBAM): Woo et al., ECCV 2018, arXiv 1807.06521, equations 1 to 3."""

import torch
from torch import Tensor, nn


class ChannelGate(nn.Module):
    """Gate of each channel from its mean and its maximum, through one shared two-layer perceptron.

    M_c(F) = sigmoid(MLP(mean F) + MLP(max F)), MLP: C -> C / reduction -> C with ReLU.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))

    def gate(self, x: Tensor) -> Tensor:
        """The channel gate M_c: (B, C, H, W) -> (B, C, 1, 1), in (0, 1)."""
        scores: Tensor = self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))
        return scores.sigmoid()[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Scale (B, C, H, W) by its channel gate."""
        return x * self.gate(x)


class SpatialGate(nn.Module):
    """Gate of each position from the maximum and the mean over its channels.

    M_s(F) = sigmoid(BN(conv7x7[max F; mean F])). The norm's weight starts at 0, so the gate starts at 0.5 everywhere.
    """

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(1)
        nn.init.zeros_(self.norm.weight)

    def gate(self, x: Tensor) -> Tensor:
        """The spatial gate M_s: (B, C, H, W) -> (B, 1, H, W), in (0, 1)."""
        summary = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], dim=1)
        scores: Tensor = self.norm(self.conv(summary))
        return scores.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Scale (B, C, H, W) by its spatial gate."""
        return x * self.gate(x)


class CBAM(nn.Sequential):
    """Channel gate, then spatial gate: F' = M_c(F) * F, F'' = M_s(F') * F'."""

    def __init__(self, channels: int, reduction: int = 16, kernel: int = 7) -> None:
        super().__init__()
        self.channel = ChannelGate(channels, reduction)
        self.spatial = SpatialGate(kernel)
