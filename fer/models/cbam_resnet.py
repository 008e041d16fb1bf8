"""CBAM-ResNet34 for small grey faces.

X. Zhang, Z. Chen, Q. Wei, "Research and Application of Facial Expression Recognition Based on Attention Mechanism":
a ResNet34 with CBAM after the first convolution and after the last stage. The paper does not draw its stem; like the
public FER2013 recipes it resembles, ours keeps the resolution (3x3, stride 1, no pooling), so that a 44-pixel crop
reaches the pool as 6x6 positions. 21,314,675 parameters at 7 classes.
"""

from typing import Literal, Unpack

from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from fer.layers.cbam import CBAM
from fer.models.base import ExpressionModule, ModuleOptions

Placement = Literal["ends", "first", "last", "blocks", "none"]


class CBAMResNetwork(nn.Module):
    """ResNet of basic blocks with CBAM at chosen places.

    Args:
        num_classes: Size of the output.
        width: Channels of the first stage; each further stage doubles them.
        layers: Blocks of each stage.
        placement: Where CBAM stands: after the first convolution and the last stage (``ends``, the paper), only one of
            them (``first``, ``last``), inside every residual block as in Woo et al. (``blocks``), or nowhere.
        stem_stride: Stride of the first convolution.
        dropout: Probability before the classifier.
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        layers: list[int],
        placement: Placement,
        stem_stride: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        channels = [width * 2**i for i in range(len(layers))]
        self.stages = nn.Sequential(
            *(
                _stage(
                    channels[max(i - 1, 0)],
                    channels[i],
                    depth,
                    stride=1 if i == 0 else 2,
                    cbam=placement == "blocks",
                )
                for i, depth in enumerate(layers)
            )
        )
        self.first_attention = CBAM(width) if placement in ("ends", "first") else nn.Identity()
        self.last_attention = CBAM(channels[-1]) if placement in ("ends", "last") else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels[-1], num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> pooled features (B, width * 2**(stages - 1))."""
        x = self.last_attention(self.stages(self.first_attention(self.stem(image))))
        features: Tensor = self.pool(x).flatten(1)
        return features

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        logits: Tensor = self.classifier(self.forward_features(image))
        return logits


def _stage(in_channels: int, channels: int, depth: int, stride: int, cbam: bool) -> nn.Sequential:
    """A ResNet stage; with ``cbam`` each block's residual branch ends in CBAM, before the addition."""
    blocks = []
    for i in range(depth):
        shortcut = None
        if i == 0 and (stride != 1 or in_channels != channels):
            shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False),
                nn.BatchNorm2d(channels),
            )
        block = BasicBlock(
            in_channels if i == 0 else channels,
            channels,
            stride if i == 0 else 1,
            shortcut,
        )
        if cbam:
            block.se = CBAM(channels)
        blocks.append(block)
    return nn.Sequential(*blocks)


class CBAMResNet(ExpressionModule):
    """`CBAMResNetwork` on the bench; the arguments are the network's."""

    network: CBAMResNetwork

    def __init__(
        self,
        width: int,
        layers: list[int],
        placement: Placement,
        stem_stride: int,
        dropout: float,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(**options)
        self.network = CBAMResNetwork(self.num_classes, width, layers, placement, stem_stride, dropout)

    @property
    def cam_layer(self) -> nn.Module:
        """The last spatial map, after the last attention."""
        return self.network.last_attention
