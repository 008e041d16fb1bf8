"""Local attention branches of TransFER (Xue et al., ICCV 2021, arXiv 2108.11116), in the residual form of Lin 2025."""

import torch
from torch import Tensor, nn

from fer.layers.cbam import ChannelGate


class LocalAttention(nn.Module):
    """Several spatial attention maps, joined by their maximum.

    Each branch is 1x1 C -> C / reduction, BN, ReLU, 1x1 -> 1, BN, sigmoid. All branches run as one convolution and one
    grouped convolution.

    Args:
        channels: Channels C of the input.
        branches: Number of maps.
        reduction: Of the channels within a branch.
        drop: In training, the probability with which one random map of an image is zeroed before the maximum
            (TransFER's multi-attention dropping).
    """

    def __init__(self, channels: int, branches: int, reduction: int, drop: float) -> None:
        super().__init__()
        hidden = branches * (channels // reduction)
        self.maps = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, branches, 1, groups=branches),
            nn.BatchNorm2d(branches),
            nn.Sigmoid(),
        )
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the maximum map (B, 1, H, W), in (0, 1)."""
        maps: Tensor = self.maps(x)
        if self.training and self.drop > 0:
            batch, branches = maps.shape[:2]
            victim = torch.randint(branches, (batch, 1), device=x.device)
            dropped = (torch.arange(branches, device=x.device) == victim) & (
                torch.rand(batch, 1, device=x.device) < self.drop
            )
            maps = maps.masked_fill(dropped[:, :, None, None], 0)
        return maps.amax(1, keepdim=True)


class ResidualAttention(nn.Module):
    """Channel gate, then local attention: X * (1 + M) with ``residual``, else X * M as in TransFER."""

    def __init__(self, channels: int, branches: int, residual: bool, drop: float, reduction: int = 16) -> None:
        super().__init__()
        self.channel = ChannelGate(channels, reduction)
        self.local = LocalAttention(channels, branches, reduction, drop)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.channel(x)
        attention: Tensor = self.local(x)
        return x * (1 + attention) if self.residual else x * attention
