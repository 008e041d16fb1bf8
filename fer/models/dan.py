"""DAN, "Distract Your Attention": several cross-attention heads on a ResNet-18.

Wen, Lin, Wang, Xu, "Distract your attention: multi-head cross attention network for facial expression recognition",
Biomimetics 2023, arXiv 2109.07270. With its two auxiliary losses: affinity pulls features to their class centre,
partition keeps the heads apart. 19,723,733 parameters at 7 classes, the centres of the affinity loss excluded.
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from fer.models.base import ExpressionModule, ModuleOptions
from fer.models.pretrained import timm_network


class CrossAttentionHead(nn.Module):
    """Spatial attention from 3x3, 1x3 and 3x1 convolutions, pooling, then channel attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.reduce = _normed(nn.Conv2d(channels, half, 1))
        self.square = _normed(nn.Conv2d(half, channels, 3, padding=1))
        self.row = _normed(nn.Conv2d(half, channels, (1, 3), padding=(0, 1)))
        self.column = _normed(nn.Conv2d(half, channels, (3, 1), padding=(1, 0)))
        self.channel = nn.Sequential(
            nn.Linear(channels, channels // 16),
            nn.BatchNorm1d(channels // 16),
            nn.ReLU(),
            nn.Linear(channels // 16, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C)."""
        y = self.reduce(x)
        y = (self.square(y) + self.row(y) + self.column(y)).relu()
        pooled = (x * y.sum(1, keepdim=True)).mean((2, 3))
        result: Tensor = pooled * self.channel(pooled)
        return result


def _normed(convolution: nn.Conv2d) -> nn.Sequential:
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels))


class DANNetwork(nn.Module):
    """Backbone, heads, classifier.

    Args:
        backbone: A timm network giving its last map.
        num_classes: Size of the output.
        heads: Number of attention heads.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, heads: int) -> None:
        super().__init__()
        self.backbone = backbone
        channels: int = backbone.feature_info.channels()[-1]  # type: ignore[operator, union-attr]
        self.channels = channels
        self.heads = nn.ModuleList(CrossAttentionHead(channels) for _ in range(heads))
        self.classifier = nn.Sequential(nn.Linear(channels, num_classes), nn.BatchNorm1d(num_classes))

    def forward_heads(self, x: Tensor) -> Tensor:
        """The backbone's map (B, C, H, W) -> each head's features, log-softmax across heads: (B, heads, C)."""
        heads = torch.stack([head(x) for head in self.heads], dim=1)
        return heads.log_softmax(1) if len(self.heads) > 1 else heads

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C), the sum of the heads."""
        return self.forward_heads(self.backbone(image)[-1]).sum(1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        logits: Tensor = self.classifier(self.forward_features(image))
        return logits


def affinity_loss(features: Tensor, label: Tensor, centres: Tensor) -> Tensor:
    """Mean squared distance of (B, D) features to their class's centre, over the variance of the (K, D) centres."""
    squared = (features.float() - centres[label]).square().sum(1)
    return squared.mean() / centres.var(dim=0).sum()


def partition_loss(heads: Tensor) -> Tensor:
    """log(1 + heads / mean variance across the heads) of (B, heads, C): small when the heads differ."""
    return (1 + heads.shape[1] / heads.float().var(dim=1).mean()).log()


class DAN(ExpressionModule):
    """`DANNetwork` on the bench, with its auxiliary losses in training.

    Args:
        backbone: Any timm network; ResNet-18 in the paper.
        pretrained: Start the backbone from timm's weights of that name, or from a file's, see `timm_network`.
        heads: Number of attention heads.
        affinity: Weight of the affinity loss.
        partition: Weight of the partition loss; without effect on a single head.
    """

    network: DANNetwork
    takes_mixed = False  # the affinity loss pulls towards one class
    splits = False  # the partition loss is a logarithm of a mean over the batch
    compiled_parts = ("network.backbone",)  # a step wants its map, which the network as a whole keeps to itself

    def __init__(
        self,
        backbone: str,
        pretrained: bool | str,
        heads: int,
        affinity: float,
        partition: float,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(**options)
        body, self.weights = timm_network(backbone, pretrained, {"features_only": True, "out_indices": (-1,)})
        self.network = DANNetwork(body, self.num_classes, heads)
        self.centres = nn.Parameter(torch.randn(self.num_classes, self.network.channels))
        self.affinity, self.partition = affinity, partition

    @property
    def cam_layer(self) -> nn.Module:
        """The backbone's last stage."""
        return list(self.network.backbone.children())[-1]

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The injected loss plus the weighted auxiliary ones."""
        x = self.network.backbone(batch["image"])[-1]
        heads = self.network.forward_heads(x)
        logits = self.network.classifier(heads.sum(1))
        loss: Tensor = self.loss_function(logits, batch)
        loss = loss + self.affinity * affinity_loss(x.mean((2, 3)), batch["label"], self.centres)
        if heads.shape[1] > 1:
            loss = loss + self.partition * partition_loss(heads)
        return loss, logits
