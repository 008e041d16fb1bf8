"""RandAugment for a batch on the device, each image with operations of its own.

E. Cubuk, B. Zoph, J. Shlens, Q. Le, "RandAugment: Practical automated data augmentation with a reduced search space",
NeurIPS 2020. Every image passes ``number`` operations drawn from a list, with replacement. Libraries apply one choice
to a whole batch, or draw from global generators; here an image's choice follows from its own random numbers.

Differences from the paper: an operation's strength is uniform up to the magnitude's (the paper found this as good as a
fixed strength); changes of place come before changes of light, in one sampling of the image; equalize is left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Largest change of place, from -1 to 1 over the image: a shift by 0.9 is one by 0.45 of the side.
BENDS = {"shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.9, "translate_y": 0.9, "rotate": torch.pi / 6}
PAINTS = ("brightness", "colour", "contrast", "sharpness", "posterize", "solarize", "autocontrast")
OPERATIONS = ("identity", *BENDS, *PAINTS)


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """Which operations, and how strong.

    Attributes:
        number: operations per image (the paper's N).
        magnitude: 0 to 30 (the paper's M): at 30, shear by 0.3, shift by 0.45 of the side, rotation by 30 degrees,
            brightness, colour, contrast and sharpness by 90 %, 4 bits left, everything solarized.
    """

    number: int
    magnitude: float

    @property
    def draws(self) -> int:
        """Random numbers per image."""
        return 2 * self.number

    def _chosen(self, u: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """(B,) number of the operation in `OPERATIONS`, and its strength from -1 to 1 as a share of the range."""
        operation = (u[:, 2 * slot] * len(OPERATIONS)).floor()
        return operation, (u[:, 2 * slot + 1] * 2 - 1) * (self.magnitude / 30)

    def bend(self, source: Tensor, u: Tensor) -> Tensor:
        """Let (B, 2, 3) maps from the result to the image begin with this one's changes of place."""
        for slot in range(self.number):
            operation, strength = self._chosen(u, slot)
            amount = {
                name: torch.where(operation == OPERATIONS.index(name), strength * most, 0)
                for name, most in BENDS.items()
            }
            cos, sin = amount["rotate"].cos(), amount["rotate"].sin()
            rows = [cos, amount["shear_x"] - sin, amount["translate_x"]]
            rows += [amount["shear_y"] + sin, cos, amount["translate_y"]]
            first = torch.stack(rows, dim=-1).view(-1, 2, 3)
            # Their product, written out: a batched one rounds by the batch size.
            turned = (source[:, :, :2, None] * first[:, None]).sum(2)
            source = torch.cat([turned[:, :, :2], turned[:, :, 2:] + source[:, :, 2:]], dim=2)
        return source

    def paint(self, image: Tensor, u: Tensor) -> Tensor:
        """Change light and colour of (B, C, H, W) images in [0, 1]."""
        for slot in range(self.number):
            operation, strength = self._chosen(u, slot)
            by = strength[:, None, None, None]
            before = image
            for name in PAINTS:
                here = (operation == OPERATIONS.index(name))[:, None, None, None]
                image = torch.where(here, _painted(name, before, by), image)
        return image


def _painted(name: str, image: Tensor, by: Tensor) -> Tensor:
    """Every image changed by one operation of `PAINTS`, (B, 1, 1, 1) strong."""
    if name == "brightness":
        return (image * (1 + 0.9 * by)).clamp(0, 1)
    if name == "colour":
        return blended(luma(image), image, 1 + 0.9 * by)
    if name == "contrast":
        return blended(luma(image).mean(dim=(1, 2, 3), keepdim=True), image, 1 + 0.9 * by)
    if name == "sharpness":
        return blended(_smooth(image), image, 1 + 0.9 * by)
    if name == "posterize":
        levels = 2 ** (8 - (4 * by.abs()).round())
        return ((image * 255 / (256 / levels)).floor() * (256 / levels) / 255).clamp(0, 1)
    if name == "solarize":
        return torch.where(image >= 1 - by.abs(), 1 - image, image)
    low, high = image.amin(dim=(2, 3), keepdim=True), image.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (image - low) / (high - low).clamp_min(1e-6), image)  # autocontrast


def luma(image: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W): BT.601 luma of three channels, a single channel itself."""
    if image.shape[1] == 1:
        return image
    grey: Tensor = 0.299 * image[:, :1] + 0.587 * image[:, 1:2] + 0.114 * image[:, 2:]
    return grey


def blended(other: Tensor, image: Tensor, share: Tensor) -> Tensor:
    """``share`` of the image and the rest of the other, a share above 1 leading away from it; in [0, 1]."""
    return (other + (image - other) * share).clamp(0, 1)


def _smooth(image: Tensor) -> Tensor:
    """Each inner pixel the mean of its neighbourhood with itself five times, as Pillow's SMOOTH."""
    height, width = image.shape[-2:]
    total = 4 * image[..., 1:-1, 1:-1]
    for y in range(3):
        for x in range(3):
            total = total + image[..., y : height - 2 + y, x : width - 2 + x]
    out = image.clone()
    out[..., 1:-1, 1:-1] = total / 13
    return out
