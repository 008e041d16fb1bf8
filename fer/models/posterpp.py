"""POSTER++: face-recognition image features queried by facial landmark features.

Mao et al., "POSTER++: A simpler and stronger facial expression recognition network", 2023, arXiv 2301.12149. Weights of
IR-50 from face recognition (MS-Celeb-1M, since withdrawn) make most of its published score; none are shipped here.
43,754,710 parameters at 8 classes.
"""

from typing import Any, Unpack

from torch import Tensor, nn

from fer.errors import UserError
from fer.layers import ir50
from fer.layers.ir50 import IR50, load_ir50
from fer.layers.mobilefacenet import LandmarkStream, resized
from fer.layers.pyramid_fusion import level_channels
from fer.models.base import ModuleOptions
from fer.models.two_stream import PyramidModule, TwoStreamNetwork, check_windows


class FacePyramid(nn.Module):
    """The three stages of IR-50, each halved by a convolution.

    Args:
        backbone: The network.
        width: As in `PyramidFusion`.
        size: Pixels a side it sees the image at: 112, 16 times the grid of `PyramidFusion`.
    """

    def __init__(self, backbone: IR50, width: int, size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.halve = nn.ModuleList(nn.Conv2d(c, c, 3, stride=2, padding=1) for c in level_channels(width))
        self.size = size

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> (B, 64, 28, 28), (B, 128, 14, 14), (B, 256, 7, 7)."""
        maps = self.backbone(resized(image, self.size))
        return [halve(x) for halve, x in zip(self.halve, maps, strict=True)]


class PosterPP(PyramidModule):
    """`TwoStreamNetwork` over `FacePyramid` on the bench.

    Args:
        blocks: Of each stage of IR-50.
        landmark: Query with landmark features; false queries the image with itself.
        backbone_ckpt: A public IR-50 checkpoint, see `load_ir50`; null starts from random weights.
        landmark_ckpt: MobileFaceNet's file, see `LandmarkStream`; null trains the stream from random weights.
        landmark_blocks: Of `MobileFaceNet`.
        windows: As in `PyramidFusion`, and so are the next four.
        dim: Of the fusion's tokens.
        depth: Of the fusion's transformer.
        width: Of the pyramids, IR-50 and the landmark stream.
        grid: Of the pyramids; IR-50 and the landmark stream see 16 times as many pixels a side.
        backbone_lr: Learning rate of the backbone over the recipe's.

    Raises:
        UserError: Windows that do not divide the maps, or a wrong checkpoint or width for one.
    """

    def __init__(
        self,
        blocks: list[int],
        landmark: bool,
        backbone_ckpt: str | None,
        landmark_ckpt: str | None,
        landmark_blocks: list[int],
        windows: list[int],
        dim: int,
        depth: int,
        width: int,
        grid: int,
        backbone_lr: float,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(**options)
        check_windows(windows, grid)
        backbone = IR50(blocks, width)
        if backbone_ckpt is not None:
            if width != ir50.WIDTH:
                raise UserError(f"model.backbone_ckpt is an IR-50 of width {ir50.WIDTH}: drop model.width={width}")
            self.weights = load_ir50(backbone, backbone_ckpt)
        stream = None
        if landmark:
            stream = LandmarkStream(self.mean, self.std, landmark_ckpt, width, landmark_blocks, 16 * grid)
            self.weights += f"; landmarks: {stream.weights}"
        pyramid = FacePyramid(backbone, width, 16 * grid)
        self.network = TwoStreamNetwork(pyramid, stream, self.num_classes, windows, dim, depth, width, grid)
        self.backbone_lr = backbone_lr

    def backbone_groups(self, backbone: nn.Module) -> list[dict[str, Any]]:
        """One learning rate for the whole backbone."""
        return [{"params": list(backbone.parameters()), "lr_scale": self.backbone_lr}]
