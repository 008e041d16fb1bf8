"""Two-stream network: DINOv2 image features queried by facial landmark features.

G. Da Re, "Attention mechanism and Visual Transformer models for Facial Emotion Recognition in natural settings",
Politecnico di Milano, 2023 (executive summary). POSTER++ (Mao et al., arXiv 2301.12149) with its image network replaced
by DINOv2. The windows are 7x7 on every level, as the text says; POSTER++'s released code uses one window per level
(``windows: [28, 14, 7]``). 112,204,230 parameters at 8 classes.
"""

import abc
from typing import Any, Unpack

from torch import Tensor, nn

from fer.errors import UserError
from fer.layers.mobilefacenet import LandmarkStream, resized
from fer.layers.pyramid_fusion import PyramidFusion, level_channels, level_sides
from fer.models.base import ExpressionModule, ModuleOptions
from fer.models.optim import layer_decay_groups
from fer.models.pretrained import timm_network


class TransformerPyramid(nn.Module):
    """Levels of a timm vision transformer: the patches after each third of its blocks, resized to the level's grid.

    Args:
        backbone: The transformer.
        width: As in `PyramidFusion`.
        grid: Likewise.
    """

    def __init__(self, backbone: Any, width: int, grid: int) -> None:
        super().__init__()
        self.backbone = backbone
        blocks = len(backbone.blocks)
        self.taps = [blocks * third // 3 - 1 for third in (1, 2, 3)]
        levels, self.sides = level_channels(width), level_sides(grid)
        self.reduce = nn.ModuleList(nn.Conv2d(backbone.embed_dim, channels, 1) for channels in levels)
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for channels in levels)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> (B, 64, 28, 28), (B, 128, 14, 14), (B, 256, 7, 7)."""
        maps = self.backbone.forward_intermediates(image, indices=self.taps, norm=True, intermediates_only=True)
        levels = zip(maps, self.reduce, self.smooth, self.sides, strict=True)
        return [smooth(resized(reduce(x), side)) for x, reduce, smooth, side in levels]


class TwoStreamNetwork(nn.Module):
    """Image pyramid, landmark pyramid, fusion, classifier.

    Args:
        pyramid: (B, 3, H, W) -> (B, 64, 28, 28), (B, 128, 14, 14), (B, 256, 7, 7).
        landmarks: The landmark stream, or None to query the image with itself.
        num_classes: Size of the output.
        windows: As in `PyramidFusion`, and so are the next four.
        dim: Of the tokens.
        depth: Transformer layers.
        width: Of the pyramids.
        grid: Likewise.
    """

    def __init__(
        self,
        pyramid: nn.Module,
        landmarks: LandmarkStream | None,
        num_classes: int,
        windows: list[int],
        dim: int,
        depth: int,
        width: int,
        grid: int,
    ) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.landmarks = landmarks
        if landmarks is not None:
            self.landmark_last = nn.Conv2d(8 * width, 4 * width, 3, padding=1)
        self.fusion = PyramidFusion(windows, dim, depth, width, grid)
        self.classifier = nn.Linear(dim, num_classes)

    def landmark_pyramid(self, image: Tensor) -> list[Tensor] | None:
        """(B, 3, H, W) -> maps of the image pyramid's shapes, or None without a landmark stream."""
        if self.landmarks is None:
            return None
        fine, middle, coarse = self.landmarks(image)
        return [fine, middle, self.landmark_last(coarse)]

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, dim)."""
        features: Tensor = self.fusion(self.pyramid(image), self.landmark_pyramid(image))
        return features

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        logits: Tensor = self.classifier(self.forward_features(image))
        return logits


def check_windows(windows: list[int], grid: int) -> None:
    """Refuse windows that do not divide the maps.

    Raises:
        UserError: Not three windows, or one that does not divide its map.
    """
    sides = list(level_sides(grid))
    if len(windows) != len(sides) or any(side % window for side, window in zip(sides, windows, strict=True)):
        raise UserError(
            f"model.windows={windows} must be three sides dividing {sides}: use [{grid},{grid},{grid}] or {sides}"
        )


class PyramidModule(ExpressionModule):
    """A `TwoStreamNetwork` on the bench: where Grad-CAM looks, and the backbone's own learning rate."""

    network: TwoStreamNetwork

    @property
    def cam_layer(self) -> nn.Module:
        """The coarsest fused map, 7x7."""
        return self.network.fusion.cross[-1]

    @abc.abstractmethod
    def backbone_groups(self, backbone: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of the image stream's backbone."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The backbone's own groups, the rest at the recipe's learning rate."""
        rest = [p for name, p in self.network.named_parameters() if not name.startswith("pyramid.backbone.")]
        return [*self.backbone_groups(self.network.pyramid.get_submodule("backbone")), {"params": rest}]


class TwoStream(PyramidModule):
    """`TwoStreamNetwork` on the bench.

    Args:
        backbone: Any timm vision transformer; DINOv2 in the paper.
        pretrained: Start the backbone from timm's weights of that name, or from a file's, see `timm_network`.
        landmark: Query with landmark features; false queries the image with itself.
        landmark_ckpt: MobileFaceNet's checkpoint, see `LandmarkStream`; null trains the stream from random weights.
        landmark_blocks: Of `MobileFaceNet`.
        windows: As in `PyramidFusion`, and so are the next four.
        dim: Of the fusion's tokens.
        depth: Of the fusion's transformer.
        width: Of the pyramids and the landmark stream.
        grid: Of the pyramids; the landmark stream sees 16 times as many pixels a side.
        drop_path: Stochastic depth of the backbone.
        backbone_lr: Learning rate of the backbone's last layer over the recipe's; 0 freezes the backbone, which then
            costs no backward pass.
        layer_decay: Learning rate of a backbone layer over the next one's.

    Raises:
        UserError: Windows that do not divide the maps, or a wrong checkpoint.
    """

    def __init__(
        self,
        backbone: str,
        pretrained: bool | str,
        landmark: bool,
        landmark_ckpt: str | None,
        landmark_blocks: list[int],
        windows: list[int],
        dim: int,
        depth: int,
        width: int,
        grid: int,
        drop_path: float,
        backbone_lr: float,
        layer_decay: float,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(**options)
        check_windows(windows, grid)
        settings = {"num_classes": 0, "img_size": self.image_size, "drop_path_rate": drop_path}
        vit, self.weights = timm_network(backbone, pretrained, settings)
        vit.requires_grad_(backbone_lr != 0)
        stream = None
        if landmark:
            stream = LandmarkStream(self.mean, self.std, landmark_ckpt, width, landmark_blocks, 16 * grid)
            self.weights += f"; landmarks: {stream.weights}"
        pyramid = TransformerPyramid(vit, width, grid)
        self.network = TwoStreamNetwork(pyramid, stream, self.num_classes, windows, dim, depth, width, grid)
        self.backbone_lr, self.layer_decay = backbone_lr, layer_decay

    def backbone_groups(self, backbone: nn.Module) -> list[dict[str, Any]]:
        """Layer decay from the backbone's own learning rate."""
        return layer_decay_groups(backbone, self.layer_decay, self.backbone_lr)
