"""Any timm network by name, with its own classifier: the baselines `timm`, `vit` and `swin`."""

from collections.abc import Mapping
from typing import Any, Unpack

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fer.models.base import ExpressionModule, ModuleOptions
from fer.models.optim import layer_decay_groups
from fer.models.pretrained import timm_network


class TimmBackbone(ExpressionModule):
    """A timm network on the bench.

    Args:
        backbone: timm's name, ``architecture`` or ``architecture.weights``.
        pretrained: Start from the published weights of that name, or from a file's, see `timm_network`.
        dropout: Before the classifier.
        drop_path: Stochastic depth.
        layer_decay: Learning rate of a layer over the next one's; 1 treats all alike.
        arguments: Further arguments of `timm.create_model`, such as ``img_size`` for a transformer.
    """

    network: Any

    def __init__(
        self,
        backbone: str,
        pretrained: bool | str,
        dropout: float,
        drop_path: float,
        layer_decay: float,
        arguments: Mapping[str, Any],
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(**options)
        # Not every timm network takes every rate, so a rate of 0 is not mentioned.
        rates = {name: rate for name, rate in (("drop_rate", dropout), ("drop_path_rate", drop_path)) if rate > 0}
        settings = {"num_classes": self.num_classes, **rates, **arguments}
        self.network, self.weights = timm_network(backbone, pretrained, settings)
        self.layer_decay = layer_decay

    @property
    def cam_layer(self) -> nn.Module:
        """The last feature layer: (B, C, H, W); a ViT's gives tokens (B, 1 + N, C), a Swin's (B, H, W, C)."""
        layer: nn.Module = self.network.get_submodule(self.network.feature_info[-1]["module"])
        # After a ViT's last attention only the class token reaches the logits, so the patches are looked at before it.
        return layer.norm1 if isinstance(layer, Block) else layer

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), what the classifier sees."""
        features: Tensor = self.network.forward_head(self.network.forward_features(image), pre_logits=True)
        return features

    def classify(self, features: Tensor) -> Tensor:
        """(B, D) -> logits (B, K)."""
        logits: Tensor = self.network.get_classifier()(features)
        return logits

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All parameters, with layer decay if asked."""
        return layer_decay_groups(self.network, self.layer_decay)
