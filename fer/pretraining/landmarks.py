"""A landmark network: MobileFaceNet learns to find 5 or 68 points of a face, for `fer.layers.mobilefacenet`'s stream.

Errors are measured in interocular distances: between the outer eye corners of 68 points, the eyes' centres of 5. The
wing loss is that of Feng et al., "Wing Loss for Robust Facial Landmark Localisation", CVPR 2018, arXiv 1711.06753.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fer.data.base import ExpressionDataModule
from fer.data.places import relative
from fer.errors import UserError
from fer.layers.mobilefacenet import BLOCKS, INPUT_SIZE, WIDTH, LandmarkNetwork
from fer.pretraining.base import Batch, Pretraining, TaskOptions
from fer.pretraining.pictures import landmark_figure

EYES = {5: (0, 1), 68: (36, 45)}  # the two points whose distance is the unit of error
SHOWN = 12  # images of the picture


def wing(error: Tensor, width: float, curvature: float) -> Tensor:
    """Feng et al., eq. 5: w ln(1 + |x| / e) for |x| < w, |x| - C beyond, joined by C = w - w ln(1 + w / e)."""
    size = error.abs()
    joint = width - width * math.log(1 + width / curvature)
    return torch.where(size < width, width * torch.log1p(size / curvature), size - joint)


class Landmarks(Pretraining):
    """`LandmarkNetwork` on the bench. Keeps the weights of the lowest validation error.

    Args:
        points: Landmarks of a face, 5 or 68; the config leaves it to the data.
        width: Channels of MobileFaceNet's first map, 64 as published.
        blocks: Its bottlenecks of each map, 4, 6 and 2 as published.
        loss: ``l1``, or ``wing``.
        wing_width: w, in hundredths of the interocular distance.
        wing_curvature: e, likewise.
        options: See `TaskOptions`.

    Raises:
        UserError: An unknown loss, or an image size that is no multiple of 16 pixels.
    """

    file = "landmarks.safetensors"
    picture = "landmarks.png"
    monitor = "nme"
    architecture = "mobilefacenet"
    mean_shape: Tensor

    def __init__(
        self,
        points: int,
        width: int,
        blocks: Sequence[int],
        loss: str,
        wing_width: float,
        wing_curvature: float,
        **options: Unpack[TaskOptions],
    ) -> None:
        super().__init__(**options)
        if loss not in ("l1", "wing"):
            raise UserError(f"task.loss={loss} is not one of l1, wing")
        if self.image_size % 16:
            raise UserError(
                f"task.image_size={self.image_size}: MobileFaceNet takes multiples of 16 pixels, usually 112"
            )
        self.network = LandmarkNetwork(points, width, blocks, self.image_size)
        self.register_buffer("mean_shape", torch.zeros(points, 2))
        self.points, self.width, self.blocks = points, width, tuple(blocks)
        self.loss, self.wing = loss, (wing_width, wing_curvature)

    @classmethod
    def from_data(cls, options: Mapping[str, Any], data: ExpressionDataModule) -> dict[str, Any]:
        """The number of points."""
        landmarks = data.store.manifest.landmarks
        if landmarks is None:
            raise UserError(f"task=landmarks: {data.title} has no landmarks; data=synthetic has, at no cost")
        return {"points": landmarks.shape[1]}

    def setup(self, stage: str) -> None:
        """Start from the mean shape of the training part, which the error is compared with as well."""
        if stage == "fit":
            data: ExpressionDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
            places = relative(data.store.manifest, data.store.windows)["landmarks"][data.split.train]
            shares = (torch.from_numpy(places) / data.augment.crop_pct + 1) / 2
            self.mean_shape.copy_(shares.nanmean(0))
            spread = (shares - self.mean_shape).square().nanmean(0).sqrt()
            norm = self.network.output_layer.get_submodule("bn")
            assert isinstance(norm, nn.BatchNorm1d)
            with torch.no_grad():
                norm.bias.copy_(self.mean_shape.flatten())
                norm.weight.copy_(spread.flatten())

    def kept(self) -> nn.Module:
        """The whole network, head included."""
        return self.network

    def usage(self, path: str) -> list[str]:
        """As a landmark stream, which is then frozen."""
        small = [f"model.width={self.width}"] if self.width != WIDTH else []
        if self.blocks != BLOCKS:
            small.append(f"model.landmark_blocks=[{','.join(map(str, self.blocks))}]")
        if self.image_size != INPUT_SIZE:
            small.append(f"model.grid={self.image_size // 16}")
        return ["model=two_stream", *small, f"model.landmark_ckpt={path}"]

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2 L)."""
        return self.network.locate(image).flatten(1)

    def measures(self, batch: Batch, train: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        """Loss, mean error of the visible points, and that of the mean shape; faces need both eyes in the image."""
        # A landmark counts from the centre of the first pixel.
        truth = (batch["landmarks"] + 0.5) / self.image_size
        left, right = EYES[self.points]
        unit = (truth[:, left] - truth[:, right]).norm(dim=1)
        counts = unit > 0  # not so where an eye is unknown
        visible = truth.isfinite().all(2) & counts[:, None]
        number = visible.sum(1).clamp_min(1)
        unit = torch.where(counts, unit, 1)[:, None, None]

        def error(found: Tensor) -> Tensor:
            return torch.where(visible[..., None], found.float() - truth, 0) / unit

        missed = error(self.network.locate(batch["image"]))
        loss = missed.abs() if self.loss == "l1" else wing(100 * missed, *self.wing) / 100
        measures = {"loss": loss.sum((1, 2)) / (2 * number), "nme": missed.norm(dim=2).sum(1) / number}
        if not train:
            measures["mean_shape_nme"] = error(self.mean_shape).norm(dim=2).sum(1) / number
        return measures, counts

    def draw(self, batch: Batch) -> Figure:
        """True and found points."""
        image, truth = batch["image"][:SHOWN], batch["landmarks"][:SHOWN]
        found = self.network.locate(image) * self.image_size - 0.5
        scores = self.scores("test")
        title = f"test: error {100 * scores['nme']:.1f} % of the interocular distance, mean shape "
        return landmark_figure(image, truth, found, f"{title}{100 * scores['mean_shape_nme']:.1f} %")
