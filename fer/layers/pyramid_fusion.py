"""The fusion half of POSTER++ (Mao et al. 2023, arXiv 2301.12149): two pyramids -> one feature vector."""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fer.layers.window_attention import WindowCrossBlock

HEADS = (2, 4, 8)
DROP_PATHS = (0.0, 0.125, 0.25)


def level_channels(width: int) -> tuple[int, int, int]:
    """Channels of the maps, fine to coarse."""
    return width, 2 * width, 4 * width


def level_sides(grid: int) -> tuple[int, int, int]:
    """Their sides."""
    return 4 * grid, 2 * grid, grid


class SqueezeExcite(nn.Module):
    """x * sigmoid(perceptron(x)) on vectors (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Gate (B, D) by itself."""
        result: Tensor = x * self.gate(x)
        return result


def _halve(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)


class PyramidFusion(nn.Module):
    """Window cross-attention on each level, tokens of all levels, a small transformer, a gated class token.

    Args:
        windows: Side of the attention windows on each map.
        dim: Of the tokens.
        depth: Transformer layers.
        width: Channels of the finest maps, 64 in the paper; doubled from level to level.
        grid: Side of the coarsest maps, 7 in the paper; doubled from level to level.
    """

    def __init__(self, windows: list[int], dim: int, depth: int, width: int, grid: int) -> None:
        super().__init__()
        levels = level_channels(width)
        self.cross = nn.ModuleList(
            WindowCrossBlock(channels, heads, window, drop_path)
            for channels, heads, window, drop_path in zip(levels, HEADS, windows, DROP_PATHS, strict=True)
        )
        self.tokens = nn.ModuleList(
            [
                nn.Sequential(_halve(levels[0], dim), _halve(dim, dim)),
                _halve(levels[1], dim),
                nn.Conv2d(levels[2], dim, 1),
            ]
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.empty(1, 1 + len(levels) * grid**2, dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(Block(dim, num_heads=8, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.excite = SqueezeExcite(dim)

    def forward(self, image: list[Tensor], landmarks: list[Tensor] | None) -> Tensor:
        """Fuse two pyramids.

        Args:
            image: Maps (B, 64, 28, 28), (B, 128, 14, 14), (B, 256, 7, 7) at the paper's width and grid.
            landmarks: The queries, of the same shapes; None asks with the image itself.

        Returns:
            (B, dim) features.
        """
        queries = landmarks if landmarks is not None else [None] * len(image)
        maps = [cross(x, query) for cross, x, query in zip(self.cross, image, queries, strict=True)]
        tokens = [embed(x).flatten(2).transpose(1, 2) for embed, x in zip(self.tokens, maps, strict=True)]
        x = torch.cat([self.cls_token.expand(maps[0].shape[0], -1, -1), *tokens], dim=1) + self.position
        features: Tensor = self.excite(self.norm(self.blocks(x))[:, 0])
        return features
