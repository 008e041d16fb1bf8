"""Window-based cross-attention between two maps: POSTER++ (Mao et al. 2023, arXiv 2301.12149)."""

import math

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.pos_embed_rel import RelPosBias
from torch import Tensor, nn
from torch.nn import functional as F


def to_windows(x: Tensor, window: int) -> Tensor:
    """Cut (B, H, W, C) into windows: (B * H/window * W/window, window**2, C)."""
    x = x.reshape(x.shape[0], x.shape[1] // window, window, x.shape[2] // window, window, x.shape[3])
    return x.transpose(2, 3).reshape(-1, window * window, x.shape[-1])


def from_windows(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """Undo `to_windows`: -> (B, H, W, C)."""
    x = windows.reshape(-1, height // window, width // window, window, window, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


class WindowCrossAttention(nn.Module):
    """Multi-head attention within a window, the queries coming from elsewhere unprojected.

    softmax(q k^T / sqrt(d) + relative position bias) v.
    """

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.kv = nn.Linear(dim, 2 * dim)
        self.bias = RelPosBias((window, window), heads)
        self.proj = nn.Linear(dim, dim)

    def weights(self, query: Tensor, context: Tensor) -> Tensor:
        """Who attends to whom: two (N, window**2, dim) -> (N, heads, window**2, window**2), to look at."""
        count, area = query.shape[:2]
        k = self.kv(context).reshape(count, area, 2, self.heads, -1)[:, :, 0].transpose(1, 2)
        q = query.reshape(count, area, self.heads, -1).transpose(1, 2)
        scores: Tensor = q @ k.transpose(2, 3) / math.sqrt(q.shape[3]) + self.bias.get_bias()
        return scores.softmax(3)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        """Two (N, window**2, dim), cut identically -> (N, window**2, dim)."""
        count, area = query.shape[:2]
        k, v = self.kv(context).reshape(count, area, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q = query.reshape(count, area, self.heads, -1).transpose(1, 2).to(k.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.get_bias().to(k.dtype))
        # Joined by cat: how the heads lie in memory depends on the kernel, and an exported view would not hold.
        result: Tensor = self.proj(torch.cat(attended.unbind(1), dim=2))
        return result


class WindowCrossBlock(nn.Module):
    """Window cross-attention of a map with a query map, then a perceptron; both scaled by a small learned gain.

    x = LN(map) + g1 attention(query, LN(map)); x = x + g2 MLP(LN(x)).

    Args:
        dim: Channels of both maps.
        heads: Attention heads.
        window: Side of a window; it divides the side of the maps. The whole side makes the attention global.
        drop_path: Stochastic depth of both branches.
        gain: First value of g1 and g2.
    """

    def __init__(self, dim: int, heads: int, window: int, drop_path: float, gain: float = 1e-5) -> None:
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = WindowCrossAttention(dim, heads, window)
        self.mlp = Mlp(dim, 4 * dim)
        self.gain1, self.gain2 = nn.Parameter(gain * torch.ones(dim)), nn.Parameter(gain * torch.ones(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, image: Tensor, query: Tensor | None) -> Tensor:
        """(B, dim, H, W) and a query of the same shape, None for the normed map itself -> (B, dim, H, W)."""
        height, width = image.shape[2:]
        x = self.norm1(image.permute(0, 2, 3, 1))
        asked = x if query is None else query.permute(0, 2, 3, 1)
        attended = self.attention(to_windows(asked, self.window), to_windows(x, self.window))
        x = x + self.drop_path(self.gain1 * from_windows(attended, self.window, height, width))
        x = x + self.drop_path(self.gain2 * self.mlp(self.norm2(x)))
        result: Tensor = x.permute(0, 3, 1, 2)
        return result
