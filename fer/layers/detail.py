"""Conv-cut's blocks: detail extraction, and two readings of its self-attention (Nan et al. 2025, arXiv 2504.09077)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def separable_conv(in_channels: int, out_channels: int, kernel: int, padding: int) -> nn.Sequential:
    """Depthwise convolution of stride ``kernel``, pointwise convolution, ReLU: (B, C, H, W) -> (B, C', H', W')."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, kernel, kernel, padding, groups=in_channels, bias=False),
        nn.Conv2d(in_channels, out_channels, 1),
        nn.ReLU(),
    )


class TokenAttention(nn.Module):
    """One head of self-attention among the tokens of an image, residual, norm: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def weights(self, tokens: Tensor) -> Tensor:
        """Who attends to whom: (B, N, D) -> softmax(Q K^T / sqrt(D)), (B, N, N), to look at."""
        q, k = self.query(tokens), self.key(tokens)
        scores: Tensor = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
        return scores.softmax(2)

    def forward(self, tokens: Tensor) -> Tensor:
        """LN(x + W_O softmax(Q K^T / sqrt(D)) V)."""
        q, k, v = (part(tokens)[:, None] for part in (self.query, self.key, self.value))  # ONNX wants a head dimension
        result: Tensor = self.norm(tokens + self.out(F.scaled_dot_product_attention(q, k, v)[:, 0]))
        return result


class BatchAttention(nn.Module):
    """Attention among the *images of a batch*: softmax(s Z Z^T) Z over (B, D).

    What the released Conv-cut code computes, Keras' ``Attention(use_scale=True)`` being fed a rank-2 tensor. An
    image's prediction then depends on its neighbours, so scores on a test set sorted by class are void. It exists to
    measure that leak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        return (self.scale * z @ z.T).softmax(1) @ z
