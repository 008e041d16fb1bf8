"""MobileFaceNet (Chen et al. 2018, arXiv 1804.07573) as a landmark network's trunk, 911,232 parameters.

Its modules carry the names of cunjian/pytorch_face_landmark, so that a checkpoint of that project fits.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fer.errors import UserError
from fer.weights import read_weights

INPUT_SIZE = 112
WIDTH = 64  # channels of the map at 28x28
BLOCKS = (4, 6, 2)  # bottlenecks that keep the shape, of each map


def _conv(
    in_channels: int,
    out_channels: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    prelu: bool = True,
    pad: bool = True,
) -> nn.Sequential:
    padding = kernel // 2 if pad else 0
    layers: dict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False),
        bn=nn.BatchNorm2d(out_channels),
    )
    if prelu:
        layers["prelu"] = nn.PReLU(out_channels)
    return nn.Sequential(OrderedDict(layers))


class _Bottleneck(nn.Module):
    """Expand, depthwise, project; residual where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, hidden: int, stride: int) -> None:
        super().__init__()
        self.conv = _conv(in_channels, hidden)
        self.conv_dw = _conv(hidden, hidden, kernel=3, stride=stride, groups=hidden)
        self.project = _conv(hidden, out_channels, prelu=False)
        self.residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.conv_dw(self.conv(x)))
        return x + y if self.residual else y


def _residuals(channels: int, hidden: int, count: int) -> nn.Sequential:
    blocks = nn.Sequential(*(_Bottleneck(channels, channels, hidden, stride=1) for _ in range(count)))
    return nn.Sequential(OrderedDict(model=blocks))


class MobileFaceNet(nn.Module):
    """The trunk: (B, 3, 112, 112) in [0, 1] -> maps (B, 64, 28, 28), (B, 128, 14, 14), (B, 512, 7, 7).

    Args:
        width: Channels of the first map; all others are multiples of them.
        blocks: Bottlenecks that keep the shape, of each map.
    """

    def __init__(self, width: int = WIDTH, blocks: Sequence[int] = BLOCKS) -> None:
        super().__init__()
        w = width
        self.conv1 = _conv(3, w, kernel=3, stride=2)
        self.conv2_dw = _conv(w, w, kernel=3, groups=w)
        self.conv_23 = _Bottleneck(w, w, hidden=2 * w, stride=2)
        self.conv_3 = _residuals(w, hidden=2 * w, count=blocks[0])
        self.conv_34 = _Bottleneck(w, 2 * w, hidden=4 * w, stride=2)
        self.conv_4 = _residuals(2 * w, hidden=4 * w, count=blocks[1])
        self.conv_45 = _Bottleneck(2 * w, 2 * w, hidden=8 * w, stride=2)
        self.conv_5 = _residuals(2 * w, hidden=4 * w, count=blocks[2])
        self.conv_6_sep = _conv(2 * w, 8 * w)

    def forward(self, image: Tensor) -> list[Tensor]:
        """The three maps, fine to coarse."""
        fine = self.conv_3(self.conv_23(self.conv2_dw(self.conv1(image))))
        middle = self.conv_4(self.conv_34(fine))
        coarse = self.conv_6_sep(self.conv_5(self.conv_45(middle)))
        return [fine, middle, coarse]


class LandmarkNetwork(MobileFaceNet):
    """The trunk with the head of cunjian/pytorch_face_landmark, for ``points`` landmarks.

    The head: a depthwise convolution over the whole map (7x7 of 112 pixels), a linear layer, a batch norm.

    Args:
        points: L.
        width: Of `MobileFaceNet`.
        blocks: Likewise.
        size: Side of the images in pixels, a multiple of 16.
    """

    def __init__(self, points: int, width: int = WIDTH, blocks: Sequence[int] = BLOCKS, size: int = INPUT_SIZE) -> None:
        super().__init__(width, blocks)
        self.points = points
        layers: dict[str, nn.Module] = OrderedDict(
            conv_6_dw=_conv(8 * width, 8 * width, kernel=size // 16, groups=8 * width, prelu=False, pad=False),
            flatten=nn.Flatten(),
            linear=nn.Linear(8 * width, 2 * points, bias=False),
            bn=nn.BatchNorm1d(2 * points),
        )
        self.output_layer = nn.Sequential(OrderedDict(layers))

    def locate(self, image: Tensor) -> Tensor:
        """(B, 3, size, size) in [0, 1] -> (B, points, 2) x, y as shares of the image's side, 0 and 1 its borders."""
        coarse = self(image)[-1]
        with torch.autocast(coarse.device.type, enabled=False):  # bf16 knows places to a third of a pixel only
            places: Tensor = self.output_layer(coarse.float())
        return places.view(-1, self.points, 2)


def resized(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) at another side, bilinear and antialiased; never in bf16, which not every device has for this."""
    wide = x if x.dtype == torch.float64 else x.float()
    return F.interpolate(wide, size=size, mode="bilinear", antialias=True).to(x.dtype)


class LandmarkStream(nn.Module):
    """MobileFaceNet fed as it was trained: the image's normalisation undone, 112 pixels unless told otherwise.

    Args:
        mean: Normalisation of the images that will arrive.
        std: The same.
        checkpoint: A file of `fer.weights.read_weights`: of ``python -m fer.pretrain task=landmarks``, or of
            cunjian/pytorch_face_landmark's MobileFaceNet. With it the stream is frozen, its batch norms included;
            without it the stream starts from random weights and is trained.
        width: Of `MobileFaceNet`; a checkpoint has the usual one.
        blocks: Likewise.
        size: Pixels a side it sees the image at; its maps are a 4th, an 8th and a 16th of that.

    Raises:
        UserError: The checkpoint is missing or of another network.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: list[float],
        std: list[float],
        checkpoint: str | None,
        width: int = WIDTH,
        blocks: Sequence[int] = BLOCKS,
        size: int = INPUT_SIZE,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.network, self.size = MobileFaceNet(width, blocks), size
        self.frozen = checkpoint is not None
        self.weights = "random, trained"
        if checkpoint is not None:
            self.weights = f"{_load(self.network, checkpoint)}, frozen"
            self.network.requires_grad_(False)

    def train(self, mode: bool = True) -> "LandmarkStream":
        """A frozen stream stays in eval mode, or training would move its batch-norm statistics."""
        return super().train(mode and not self.frozen)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised -> the three maps of `MobileFaceNet`."""
        maps: list[Tensor] = self.network(resized(image * self.std + self.mean, self.size))
        return maps


def _load(network: MobileFaceNet, checkpoint: str) -> str:
    """Load the trunk and tell the file's name and checksum."""
    instead = "model.landmark_ckpt=null trains the stream instead"
    weights = read_weights(checkpoint, "model.landmark_ckpt", instead)
    trunk = {name: value for name, value in weights.tensors.items() if not name.startswith("output_layer")}
    try:
        network.load_state_dict(trunk)
    except RuntimeError as error:
        raise UserError(
            f"model.landmark_ckpt: {weights.path} does not hold the MobileFaceNet of cunjian/pytorch_face_landmark "
            f"({str(error).splitlines()[-1].strip()}); {instead}"
        ) from None
    return weights.source
