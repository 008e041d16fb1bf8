"""The first three stages of IR-50, the improved residual network of ArcFace (Deng et al. 2019, arXiv 1801.07698).

POSTER and POSTER++ take it, pre-trained on faces, as their image network. Module names follow the public InsightFace
ports, so that their checkpoints fit.
"""

from torch import Tensor, nn

from fer.errors import UserError
from fer.weights import read_weights

WIDTH = 64  # channels of the first stage; each further stage doubles them


class _Unit(nn.Module):
    """BN, 3x3, PReLU, 3x3 with stride, BN, plus the shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer = (
            nn.MaxPool2d(1, stride)
            if in_channels == channels
            else nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.res_layer(x) + self.shortcut_layer(x)
        return result


class IR50(nn.Module):
    """(B, 3, 112, 112) -> maps (B, 64, 56, 56), (B, 128, 28, 28), (B, 256, 14, 14).

    Args:
        blocks: Of each stage; 3, 4 and 14 make IR-50, 17,611,968 parameters.
        width: Channels of the first stage.
    """

    def __init__(self, blocks: list[int], width: int = WIDTH) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width)
        )
        stages = (width, 2 * width, 4 * width)
        inputs = (width, *stages)
        self.body1, self.body2, self.body3 = (
            nn.Sequential(_Unit(inputs[i], channels, 2), *(_Unit(channels, channels, 1) for _ in range(count - 1)))
            for i, (channels, count) in enumerate(zip(stages, blocks, strict=True))
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """The maps of the three stages, fine to coarse."""
        fine = self.body1(self.input_layer(image))
        middle = self.body2(fine)
        return [fine, middle, self.body3(middle)]


def load_ir50(network: IR50, checkpoint: str) -> str:
    """Load a public IR-50 checkpoint; its later stages and its head are not needed.

    Args:
        network: What to load it into.
        checkpoint: The file, see `fer.weights.read_weights`.

    Returns:
        The file's name and checksum.

    Raises:
        UserError: The file is missing, damaged, or holds another network.
    """
    instead = "model.backbone_ckpt=null starts from random weights"
    weights = read_weights(checkpoint, "model.backbone_ckpt", instead)
    missing = [name for name in network.state_dict() if name not in weights.tensors]
    if missing:
        raise UserError(
            f"model.backbone_ckpt: {weights.path} is no IR-50, it lacks {missing[0]} and {len(missing) - 1} more; "
            f"{instead}"
        )
    network.load_state_dict({name: weights.tensors[name] for name in network.state_dict()})
    return weights.source
