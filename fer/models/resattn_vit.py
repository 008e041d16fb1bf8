"""Residual-attention vision transformer.

Y. Lin, "Research on Vision Transformer Facial Expression Recognition Algorithm Based on Residual Attention Network",
Academic Journal of Computing and Information Science 8(6), 2025, 13-18. In the paper's order: ResNet-50, residual
attention on its last two maps, deconvolution and fusion, efficient multi-scale attention, convolution with dropout,
transformer. What the paper leaves open follows TransFER (arXiv 2108.11116). 83,509,367 parameters at 7 classes.
"""

from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from fer.errors import UserError
from fer.layers.ema_attention import EMAttention
from fer.layers.local_attention import ResidualAttention
from fer.layers.score_attention import ResidualScoreEncoder
from fer.models.base import ExpressionModule, ModuleOptions
from fer.models.pretrained import timm_network

VIT = "vit_base_patch16_224.augreg_in1k"
VIT_BLOCKS, VIT_DIM = 8, 768


class ResAttnViTNetwork(nn.Module):
    """The whole network.

    Args:
        backbone: A timm network giving its last two maps, (B, C4, H/16, W/16) and (B, C5, H/32, W/32).
        encoder: (B, 1 + N, dim) -> (B, 1 + N, dim).
        num_classes: Size of the output.
        grid: Side of the map at a 16th of the image: 14 at 224 pixels.
        branches: Local attention maps per level.
        residual: X * (1 + M) instead of X * M.
        mad_p: Multi-attention dropping, see `LocalAttention`.
        width: Channels of the fused map.
        dim: Of the tokens.
        hidden: Of the head.
        dropout: After the convolution, and before the classifier.
    """

    def __init__(
        self,
        backbone: Any,
        encoder: nn.Module,
        num_classes: int,
        grid: int,
        branches: int,
        residual: bool,
        mad_p: float,
        width: int,
        dim: int,
        hidden: int,
        dropout: tuple[float, float],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        fine, coarse = backbone.feature_info.channels()
        self.fine_attention = ResidualAttention(fine, branches, residual, mad_p)
        self.coarse_attention = ResidualAttention(coarse, branches, residual, mad_p)
        self.lateral = nn.Conv2d(fine, width, 1)
        self.deconvolution = nn.Sequential(
            nn.Conv2d(coarse, width, 1), nn.ConvTranspose2d(width, width, kernel_size=4, stride=2, padding=1)
        )
        self.ema = EMAttention(width)
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(dropout[0])
        )
        self.tokens = nn.Conv2d(width, dim, 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.empty(1, 1 + grid * grid, dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.encoder = encoder
        self.head = nn.Sequential(nn.Linear(dim, hidden), nn.GELU())
        self.classifier = nn.Sequential(nn.Dropout(dropout[1]), nn.Linear(hidden, num_classes))

    def forward_map(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> the fused local map (B, width, H/16, W/16)."""
        fine, coarse = self.backbone(image)
        fused = self.lateral(self.fine_attention(fine)) + self.deconvolution(self.coarse_attention(coarse))
        result: Tensor = self.conv(self.ema(fused))
        return result

    def forward_tokens(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> encoded tokens (B, 1 + N, dim), the class token first."""
        tokens = self.tokens(self.forward_map(image)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        encoded: Tensor = self.encoder(tokens + self.position)
        return encoded

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, hidden)."""
        features: Tensor = self.head(self.forward_tokens(image)[:, 0])
        return features

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        logits: Tensor = self.classifier(self.forward_features(image))
        return logits


class ResAttnViT(ExpressionModule):
    """`ResAttnViTNetwork` on the bench.

    Args:
        backbone: Any timm network with maps at a 16th and a 32nd of the image.
        pretrained: Start from published weights where there are any.
        encoder: ``residual``: ``depth`` layers with carried scores, random weights; ``vit_b8``: the first eight blocks
            of timm's ViT-Base, whose own shape and weights replace ``dim``, ``depth``, ``heads`` and ``mlp_ratio``.
        branches: As in `ResAttnViTNetwork`, and so are the next five.
        residual: Form of the local attention.
        mad_p: Multi-attention dropping.
        width: Channels of the fused map.
        dim: Of the tokens.
        hidden: Of the head.
        depth: Layers of the encoder.
        heads: Of its attention.
        mlp_ratio: Hidden over token width in its perceptrons.
        conv_dropout: After the convolution.
        dropout: Before the classifier.
        backbone_lr: Learning rate of the backbone over the recipe's.

    Raises:
        UserError: The image is not a multiple of 32 pixels.
    """

    network: ResAttnViTNetwork

    def __init__(
        self,
        backbone: str,
        pretrained: bool,
        encoder: Literal["residual", "vit_b8"],
        branches: int,
        residual: bool,
        mad_p: float,
        width: int,
        dim: int,
        hidden: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        conv_dropout: float,
        dropout: float,
        backbone_lr: float,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(**options)
        if self.image_size % 32:
            raise UserError(f"model=resattn_vit needs model.image_size to be a multiple of 32, got {self.image_size}")
        local, self.weights = timm_network(backbone, pretrained, {"features_only": True, "out_indices": (-2, -1)})
        if encoder == "vit_b8":
            vit, source = timm_network(VIT, pretrained, {"num_classes": 0})
            layers: nn.Module = nn.Sequential(*vit.blocks[:VIT_BLOCKS], nn.LayerNorm(VIT_DIM, eps=1e-6))
            self.weights, dim = f"{self.weights} + {source}", VIT_DIM
        else:
            layers = ResidualScoreEncoder(dim, depth, heads, mlp_ratio)
        self.network = ResAttnViTNetwork(
            local,
            layers,
            self.num_classes,
            grid=self.image_size // 16,
            branches=branches,
            residual=residual,
            mad_p=mad_p,
            width=width,
            dim=dim,
            hidden=hidden,
            dropout=(conv_dropout, dropout),
        )
        self.backbone_lr = backbone_lr

    @property
    def cam_layer(self) -> nn.Module:
        """The fused map the transformer reads."""
        return self.network.conv

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The backbone at its own learning rate, the rest at the recipe's."""
        rest = [p for name, p in self.network.named_parameters() if not name.startswith("backbone.")]
        return [{"params": list(self.network.backbone.parameters()), "lr_scale": self.backbone_lr}, {"params": rest}]
