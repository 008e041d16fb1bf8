"""Masked-image modelling: a transformer sees part of the patches and paints the others.

SimMIM: Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", CVPR 2022, arXiv 2111.09886: masked squares
become one learned token before the transformer, a linear layer predicts raw pixels, L1 on the masked ones alone.
Positions are added after masking, so the token knows where it stands.
"""

from typing import Any, Unpack

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fer.data.batched import uniform
from fer.errors import UserError
from fer.models.pretrained import timm_network
from fer.pretraining.base import (
    Batch,
    Normalise,
    Pretraining,
    TaskOptions,
    backbone_groups,
    backbone_usage,
    image_options,
)
from fer.pretraining.pictures import image_grid

SHOWN = 8  # images of the picture


class MaskedNetwork(nn.Module):
    """A timm vision transformer or Swin, a mask token, a linear decoder.

    Args:
        backbone: with ``patch_embed`` and without classifier.
        stride: pixels a side of an output token.
    """

    def __init__(self, backbone: Any, stride: int) -> None:
        super().__init__()
        self.backbone = backbone
        width = backbone.patch_embed.proj.out_channels
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
        self.decoder = nn.Sequential(nn.Conv2d(backbone.num_features, 3 * stride**2, 1), nn.PixelShuffle(stride))

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Paint.

        Args:
            image: (B, 3, S, S).
            mask: (B, S / P, S / P) bool, patches that the backbone does not see.

        Returns:
            (B, 3, S, S).
        """
        hidden = mask.flatten(1)[..., None]

        def hide(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
            flat = tokens.flatten(1, -2)  # some backbones keep rows and columns apart
            return torch.where(hidden, self.mask_token.to(flat.dtype), flat).view_as(tokens)

        hook = self.backbone.patch_embed.register_forward_hook(hide)
        try:
            tokens = self.backbone.forward_features(image)
        finally:
            hook.remove()
        if tokens.ndim == 3:
            tokens = tokens[:, self.backbone.num_prefix_tokens :].unflatten(1, self.backbone.patch_embed.grid_size)
        painted: Tensor = self.decoder(tokens.permute(0, 3, 1, 2))
        return painted


class MaskedImages(Pretraining):
    """`MaskedNetwork` on the bench. Keeps the backbone of the lowest validation loss.

    Args:
        backbone: Any timm vision transformer or Swin.
        pretrained: Where it starts, as in `timm_network`.
        mean: Normalisation of the backbone's input.
        std: The same.
        mask_ratio: Share of the squares that are masked.
        mask_patches: Side of a masked square in patches of the backbone; SimMIM's squares have 32 pixels.
        drop_path: Stochastic depth.
        layer_decay: Learning rate of a layer over the next one's.
        options: See `TaskOptions`.

    Raises:
        UserError: The backbone has no patches, or squares do not fill the image.
    """

    file = "backbone.safetensors"
    picture = "reconstructions.png"
    monitor = "loss"
    network: MaskedNetwork

    def __init__(
        self,
        backbone: str,
        pretrained: bool | str,
        mean: list[float],
        std: list[float],
        mask_ratio: float,
        mask_patches: int,
        drop_path: float,
        layer_decay: float,
        **options: Unpack[TaskOptions],
    ) -> None:
        super().__init__(**options)
        rates = {"drop_path_rate": drop_path} if drop_path > 0 else {}
        settings = {"num_classes": 0, **image_options(backbone, self.image_size), **rates}
        transformer, self.weights = timm_network(backbone, pretrained, settings, "task.pretrained")
        if not hasattr(transformer, "patch_embed"):
            raise UserError(
                f"task.backbone={backbone} has no patches to mask: use a vision transformer, or task=distill"
            )
        if not 0 < mask_ratio < 1:
            raise UserError(f"task.mask_ratio={mask_ratio} must lie between 0 and 1, such as 0.6")
        self.patches = transformer.patch_embed.grid_size[0]
        if self.patches % mask_patches:
            raise UserError(
                f"task.mask_patches={mask_patches} must divide the {self.patches} patches a side of {backbone} at "
                f"{self.image_size} px"
            )
        self.architecture, self.mask_patches, self.layer_decay = backbone.partition(".")[0], mask_patches, layer_decay
        self.squares = self.patches // mask_patches
        self.masked = min(max(round(mask_ratio * self.squares**2), 1), self.squares**2 - 1)
        self.normalise = Normalise(mean, std)
        self.network = MaskedNetwork(transformer, transformer.feature_info[-1]["reduction"])

    def kept(self) -> nn.Module:
        """The backbone."""
        network: nn.Module = self.network.backbone
        return network

    def usage(self, path: str) -> list[str]:
        """As a backbone."""
        return backbone_usage(self.kept(), self.architecture, path)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D), the backbone's features."""
        return super().forward(self.normalise(image))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The backbone with layer decay; token and decoder."""
        others = [self.network.mask_token, *self.network.decoder.parameters()]
        return backbone_groups(self.network.backbone, others, self.layer_decay)

    def mask(self, index: Tensor, epoch: int) -> Tensor:
        """(B, P, P) bool, patches to mask: a pure function of seed, epoch and image, the same number in each."""
        rank = uniform(self.seed, epoch, index, self.squares**2).argsort(1).argsort(1)
        squares: Tensor = (rank < self.masked).view(-1, self.squares, self.squares)
        return squares.repeat_interleave(self.mask_patches, 1).repeat_interleave(self.mask_patches, 2)

    def paint(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images, what is painted, both (B, 3, S, S), and which pixels were masked, (B, 1, S, S)."""
        mask = self.mask(batch["index"], epoch)
        image = self.normalise(batch["image"])
        side = self.image_size // self.patches
        pixels = mask.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]
        return image, self.network(image, mask).float(), pixels

    def measures(self, batch: Batch, train: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        """Mean absolute error over the masked pixels; evaluation masks each image as in epoch 0."""
        image, painted, masked = self.paint(batch, self.current_epoch if train else 0)
        error = ((painted - image).abs() * masked).sum((1, 2, 3))
        return {"loss": error / (3 * masked.sum((1, 2, 3)))}, None

    def draw(self, batch: Batch) -> Figure:
        """Originals, what the network saw, what it painted."""
        batch = {key: values[:SHOWN] for key, values in batch.items()}
        _, painted, masked = self.paint(batch, 0)
        pixels = painted * self.normalise.std + self.normalise.mean
        seen = torch.where(masked, 0.5, batch["image"])
        rows = [batch["image"], seen, torch.where(masked, pixels, batch["image"])]
        return image_grid(rows, ["original", "seen", "painted"], f"masked-image modelling with {self.architecture}")
