"""Conv-cut: a truncated ConvNeXt, a detail extraction block and self-attention.

B. Nan, F. Liu, X. Qian, W. Song, "A Visual Self-attention Mechanism Facial Expression Recognition Network beyond
ConvNeXt", 2025, arXiv 2504.09077. The trunk is cut after a number of whole blocks of stage 3. The attention runs among
the tokens of one image, as in the paper's Figure 2; the released code lets the images of a batch attend to each other
(``attention: batch``), which voids its scores. 54,219,719 parameters at 7 classes.
"""

from typing import Any, Literal, Unpack

from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from fer.errors import UserError
from fer.layers.detail import BatchAttention, TokenAttention, separable_conv
from fer.models.base import ExpressionModule, ModuleOptions
from fer.models.optim import layer_decay_groups
from fer.models.pretrained import timm_network

Attention = Literal["spatial", "none", "batch"]
DETAIL_CHANNELS = 256
HIDDEN = 32
LEAKY = "LEAKY: predictions depend on the batch"


class ConvCutNetwork(nn.Module):
    """Trunk, detail extraction, attention, classifier.

    Args:
        trunk: What `cut_convnext` returns, (B, 3, H, W) -> (B, C, H/16, W/16).
        num_classes: Size of the output.
        detail: Extract details: 14x14 -> 4x4 -> 2x2 tokens of 256 channels; else all trunk positions are tokens.
        attention: Among the tokens of an image (``spatial``), of a batch's images (``batch``, leaks), or none.
        attention_at: The attention stands after the second detail convolution (``det2``) or between them (``det1``).
        dropout: Probability before both layers of the classifier.
    """

    def __init__(
        self,
        trunk: nn.Module,
        num_classes: int,
        detail: bool,
        attention: Attention,
        attention_at: Literal["det1", "det2"],
        dropout: float,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        channels: int = trunk.num_features  # type: ignore[assignment]
        dim = DETAIL_CHANNELS if detail else channels
        self.detail1 = separable_conv(channels, dim, kernel=4, padding=1) if detail else nn.Identity()
        self.detail2 = separable_conv(dim, dim, kernel=2, padding=0) if detail else nn.Identity()
        self.norm = nn.LayerNorm(dim)
        self.attention = TokenAttention(dim) if attention == "spatial" else nn.Identity()
        self.attention_at = attention_at
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(dim, HIDDEN),
            nn.ReLU(),
            nn.BatchNorm1d(HIDDEN),
            BatchAttention() if attention == "batch" else nn.Identity(),
            nn.Dropout(dropout),
            nn.Linear(HIDDEN, num_classes),
        )

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> mean token (B, 256)."""
        x = self.detail1(self.trunk.forward_features(image))  # type: ignore[operator]
        if self.attention_at == "det1":
            x = self._attend(x)
        x = self.detail2(x)
        if self.attention_at == "det2":
            x = self._attend(x)
        features: Tensor = x.mean((2, 3))
        return features

    def _attend(self, x: Tensor) -> Tensor:
        """Norm and attention over the positions of (B, C, H, W)."""
        tokens = self.attention(self.norm(x.flatten(2).transpose(1, 2)))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])  # type: ignore[no-any-return]

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        logits: Tensor = self.classifier(self.forward_features(image))
        return logits


class _DepthwiseHalf(nn.Module):
    """The depthwise convolution and norm of a ConvNeXt block, without its perceptron and its residual."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv_dw, self.norm = block.conv_dw, block.norm
        self.channels_first = block.use_conv_mlp  # timm's small variants normalise (B, C, H, W) instead of (B, H, W, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_dw(x)
        result: Tensor = self.norm(x) if self.channels_first else self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return result


def cut_convnext(network: Any, truncate: int | Literal["released"]) -> nn.Module:
    """Cut a timm ConvNeXt, in place, within its third stage.

    Args:
        network: The whole timm network.
        truncate: Blocks of stage 3 that stay; ``released`` is 23 and a half: where the authors' code cuts.

    Raises:
        UserError: Stage 3 has fewer blocks.
    """
    whole, half = (23, 1) if truncate == "released" else (truncate, 0)
    stages, blocks = network.stages[:3], network.stages[2].blocks
    if not 1 <= whole + half <= len(blocks):
        raise UserError(
            f"model.truncate={truncate} does not fit this backbone: its third stage has {len(blocks)} blocks, "
            f"set model.truncate to 1..{len(blocks)}"
        )
    stages[2].blocks = nn.Sequential(*blocks[:whole], *(_DepthwiseHalf(b) for b in blocks[whole : whole + half]))
    network.stages = stages
    network.num_features = network.feature_info[2]["num_chs"]
    network.norm_pre, network.head = nn.Identity(), nn.Identity()
    trunk: nn.Module = network
    return trunk


class ConvCut(ExpressionModule):
    """`ConvCutNetwork` on the bench.

    Args:
        backbone: Any timm ConvNeXt.
        pretrained: Start the trunk from timm's weights of that name, or from a file's, see `timm_network`.
        truncate: As in `cut_convnext`.
        detail: As in `ConvCutNetwork`, and so are the next four.
        attention: ``batch`` is refused unless ``allow_batch_attention``.
        attention_at: ``det2`` or ``det1``.
        dropout: Of the classifier.
        drop_path: Stochastic depth of the trunk.
        layer_decay: Learning rate of a trunk layer over the next one's.
        allow_batch_attention: Permit the leaking attention; every result is then stamped.

    Raises:
        UserError: The leaking attention without permission, a backbone of another family, or an image too small for
            the detail block.
    """

    network: ConvCutNetwork

    def __init__(
        self,
        backbone: str,
        pretrained: bool | str,
        truncate: int | Literal["released"],
        detail: bool,
        attention: Attention,
        attention_at: Literal["det1", "det2"],
        dropout: float,
        drop_path: float,
        layer_decay: float,
        allow_batch_attention: bool,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(**options)
        if attention == "batch":
            if not allow_batch_attention:
                raise UserError(
                    "model.attention=batch lets the images of a batch see each other, so its scores are void: "
                    "use model.attention=spatial, or model.allow_batch_attention=true to measure the leak"
                )
            self.leaky = LEAKY
        if detail and self.image_size < 96:
            raise UserError(
                f"model=convcut needs images of 96 pixels or more for its detail block, got {self.image_size}: "
                "set model.image_size=96, or model.detail=false"
            )
        network, self.weights = timm_network(backbone, pretrained, {"num_classes": 0, "drop_path_rate": drop_path})
        if not isinstance(network, ConvNeXt):
            raise UserError(
                f"model.backbone={backbone} is no ConvNeXt of timm: use convnext_base or another of its family"
            )
        trunk = cut_convnext(network, truncate)
        self.network = ConvCutNetwork(trunk, self.num_classes, detail, attention, attention_at, dropout)
        self.layer_decay = layer_decay

    @property
    def cam_layer(self) -> nn.Module:
        """The trunk's last map, 14x14 at 224 pixels; the detail block's 2x2 would be too coarse to look at."""
        return self.network.trunk.stages  # type: ignore[return-value]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trunk with layer decay, the rest at the full learning rate."""
        rest = [p for name, p in self.network.named_parameters() if not name.startswith("trunk.")]
        return [*layer_decay_groups(self.network.trunk, self.layer_decay), {"params": rest}]
