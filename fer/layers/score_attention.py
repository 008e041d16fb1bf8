"""Transformer encoder with attention scores carried between layers (RealFormer: He et al. 2020, arXiv 2012.11747)."""

from timm.layers.mlp import Mlp
from torch import Tensor, nn


class ResidualScoreAttention(nn.Module):
    """Multi-head self-attention on S_l = Q K^T / sqrt(d) + S_(l-1); no parameters beyond the usual ones."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attend and hand the scores on.

        Args:
            x: (B, N, D) tokens.
            scores: (B, heads, N, N) of the layer before, None in the first.

        Returns:
            (B, N, D) tokens and this layer's scores before the softmax.
        """
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        own = (q * self.scale) @ k.transpose(2, 3)
        scores = own if scores is None else own + scores
        attended = scores.softmax(3) @ v
        return self.proj(attended.transpose(1, 2).flatten(2)), scores


class ResidualScoreBlock(nn.Module):
    """Pre-norm transformer block around `ResidualScoreAttention`."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = ResidualScoreAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) and the scores of the layer before -> the same of this one."""
        attended, scores = self.attention(self.norm1(x), scores)
        x = x + attended
        return x + self.mlp(self.norm2(x)), scores


class ResidualScoreEncoder(nn.Module):
    """A stack of blocks and a last norm: (B, N, D) -> (B, N, D).

    Args:
        dim: D.
        depth: Blocks.
        heads: Of the attention.
        mlp_ratio: Hidden over token width of the perceptrons.
        carry: Hand the scores from block to block; without it a block is the plain transformer's.
    """

    def __init__(self, dim: int, depth: int, heads: int, mlp_ratio: float, carry: bool = True) -> None:
        super().__init__()
        self.carry = carry
        self.blocks = nn.ModuleList(ResidualScoreBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode (B, N, D) tokens."""
        scores = None
        for block in self.blocks:
            tokens, scores = block(tokens, scores if self.carry else None)
        result: Tensor = self.norm(tokens)
        return result
