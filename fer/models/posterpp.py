"""POSTER++: face-recognition image features queried by facial landmark features.

Mao et al., "POSTER++: A simpler and stronger facial expression recognition network", 2023, arXiv 2301.12149. Weights of
IR-50 from face recognition (MS-Celeb-1M, since withdrawn) make most of its published score; none are shipped here.
43,754,710 parameters at 8 classes.
"""

from pathlib import Path
from typing import Any, Unpack

from torch import Tensor, nn

from fer.layers.ir50 import INPUT_SIZE, IR50, load_ir50
from fer.layers.mobilefacenet import LandmarkStream, resized
from fer.layers.pyramid_fusion import LEVELS
from fer.models.base import ModuleOptions
from fer.models.two_stream import PyramidModule, TwoStreamNetwork, check_windows


class FacePyramid(nn.Module):
    """The three stages of IR-50 at 112 pixels, each halved by a convolution."""

    def __init__(self, backbone: IR50) -> None:
        super().__init__()
        self.backbone = backbone
        self.halve = nn.ModuleList(nn.Conv2d(channels, channels, 3, stride=2, padding=1) for channels in LEVELS)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> (B, 64, 28, 28), (B, 128, 14, 14), (B, 256, 7, 7)."""
        maps = self.backbone(resized(image, INPUT_SIZE))
        return [halve(x) for halve, x in zip(self.halve, maps, strict=True)]


class PosterPP(PyramidModule):
    """`TwoStreamNetwork` over `FacePyramid` on the bench.

    Args:
        blocks: Of each stage of IR-50.
        backbone_ckpt: A public IR-50 checkpoint; null starts from random weights.
        landmark_ckpt: MobileFaceNet's checkpoint, see `LandmarkStream`; null trains the stream from random weights.
        windows: As in `PyramidFusion`, and so are the next two.
        dim: Of the fusion's tokens.
        depth: Of the fusion's transformer.
        backbone_lr: Learning rate of the backbone over the recipe's.

    Raises:
        UserError: Windows that do not divide the maps, or a wrong checkpoint.
    """

    def __init__(
        self,
        blocks: list[int],
        backbone_ckpt: str | None,
        landmark_ckpt: str | None,
        windows: list[int],
        dim: int,
        depth: int,
        backbone_lr: float,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(**options)
        check_windows(windows)
        backbone = IR50(blocks)
        if backbone_ckpt is not None:
            load_ir50(backbone, Path(backbone_ckpt))
            self.weights = Path(backbone_ckpt).name
        stream = LandmarkStream(self.mean, self.std, landmark_ckpt)
        self.weights += f"; landmarks: {stream.weights}"
        self.network = TwoStreamNetwork(FacePyramid(backbone), stream, self.num_classes, windows, dim, depth)
        self.backbone_lr = backbone_lr

    def backbone_groups(self, backbone: nn.Module) -> list[dict[str, Any]]:
        """One learning rate for the whole backbone."""
        return [{"params": list(backbone.parameters()), "lr_scale": self.backbone_lr}]
