"""What an image looks like in an epoch: a pure function of (seed, epoch, row), on either way to the network.

`Augment` holds both forms of one recipe: `BatchAugment`, batched torch on the device for the resident path, and an
albumentations pipeline per image for worker processes. Neither depends on batch size, worker count or resume. The two
forms draw different numbers, so a run stays on one of them; which one is part of its results.
"""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fer.data.manifest import Array

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing must make no network call

_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as a signed 64-bit integer
_MIX_1, _MIX_2 = -4658895280553007687, -7723592293110705685
TTA_VIEWS = {"none": 1, "flip": 2, "five_crop": 5, "ten_crop": 10}


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection of 64-bit integers whose outputs pass for random."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(seed: int, epoch: int, index: Tensor, draws: int) -> Tensor:
    """(B, draws) float32 in [0, 1), a pure function of (seed, epoch, index) and the draw's number.

    A counter-based generator rather than `torch.Generator`, because each image's numbers must not depend on which
    images share its batch.
    """
    key = _mix(torch.tensor(seed * 1_000_003 + epoch, dtype=torch.long, device=index.device) * _GOLDEN)
    state = _mix(index[:, None] * _GOLDEN + key) + torch.arange(1, draws + 1, device=index.device) * _GOLDEN
    return ((_mix(state) >> 40) & 0xFFFFFF).float() / (1 << 24)


@dataclass(frozen=True, kw_only=True)
class BatchAugment:
    """One batched recipe: geometry in a single bilinear sampling, then light, then erasing.

    Attributes:
        flip: probability of a mirror image.
        rotate: largest rotation in degrees, either way.
        scale: smallest and largest zoom; 1.1 enlarges by a tenth.
        shift: largest shift as a share of the image side, either way, besides the random crop's own.
        brightness: largest change of brightness, as a share of full scale.
        contrast: largest relative change of contrast around the image's mean.
        erase: probability of one erased rectangle, filled with the image's mean.
        erase_area: smallest and largest erased share of the image.
    """

    flip: float
    rotate: float
    scale: tuple[float, float]
    shift: float
    brightness: float
    contrast: float
    erase: float
    erase_area: tuple[float, float]

    def __call__(self, image: Tensor, index: Tensor, epoch: int, seed: int, crop: int, size: int) -> Tensor:
        """(B, C, S, S) float in [0, 1] -> (B, C, size, size): a random ``crop`` window of S, augmented."""
        u = uniform(seed, epoch, index, 13)
        image = self._geometry(image, u, crop, size)
        image = self._light(image, u)
        return self._erase(image, u) if self.erase else image

    def _geometry(self, image: Tensor, u: Tensor, crop: int, size: int) -> Tensor:
        side = image.shape[-1]
        flip = torch.where(u[:, 0] < self.flip, -1.0, 1.0)
        angle = (u[:, 1] * 2 - 1) * (self.rotate * torch.pi / 180)
        low, high = self.scale
        zoom = low + u[:, 2] * (high - low)
        # A random crop moves by whole pixels, so that without rotation and zoom it copies pixels exactly.
        room = side - crop
        offset = (u[:, 3:5] * (room + 1)).floor().clamp_max(room) - room / 2
        shift = offset * (2 / side) + (u[:, 5:7] * 2 - 1) * (2 * self.shift)
        reach = crop / side / zoom
        cos, sin = angle.cos() * reach, angle.sin() * reach
        # Written out instead of affine_grid's batched product, whose rounding depends on the batch size.
        axis = (torch.arange(size, device=image.device, dtype=image.dtype) * 2 + 1) / size - 1
        x, y = axis[None, None, :], axis[None, :, None]
        c, s, f = cos[:, None, None], sin[:, None, None], flip[:, None, None]
        grid_x = c * f * x - s * y + shift[:, 0, None, None]
        grid_y = s * f * x + c * y + shift[:, 1, None, None]
        grid = torch.stack([grid_x, grid_y], dim=-1)
        return functional.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def _light(self, image: Tensor, u: Tensor) -> Tensor:
        if not (self.brightness or self.contrast):
            return image
        mean = image.mean(dim=(1, 2, 3), keepdim=True)
        gain = (1 + (u[:, 7] * 2 - 1) * self.contrast)[:, None, None, None]
        lift = ((u[:, 8] * 2 - 1) * self.brightness)[:, None, None, None]
        return ((image - mean) * gain + mean + lift).clamp(0, 1)

    def _erase(self, image: Tensor, u: Tensor) -> Tensor:
        low, high = self.erase_area
        area = low + u[:, 10] * (high - low)
        ratio = (0.3 * (1 / 0.3**2) ** u[:, 11]).sqrt()  # aspect ratio log-uniform in [0.3, 1/0.3]
        half_h, half_w = (area.sqrt() * ratio).clamp_max(1), (area.sqrt() / ratio).clamp_max(1)
        v = uniform_pair(u[:, 12])
        axis = (torch.arange(image.shape[-1], device=image.device) * 2 + 1) / image.shape[-1] - 1
        centre_y, centre_x = (v[0] * 2 - 1) * (1 - half_h), (v[1] * 2 - 1) * (1 - half_w)
        inside_y = (axis - centre_y[:, None]).abs() < half_h[:, None]
        inside_x = (axis - centre_x[:, None]).abs() < half_w[:, None]
        mask = inside_y[:, :, None] & inside_x[:, None, :] & (u[:, 9] < self.erase)[:, None, None]
        return torch.where(mask[:, None], image.mean(dim=(1, 2, 3), keepdim=True), image)


def uniform_pair(u: Tensor) -> tuple[Tensor, Tensor]:
    """Two 12-bit uniforms from one 24-bit uniform."""
    first = (u * 4096).floor()
    return first / 4096, u * 4096 - first


@dataclass(frozen=True, kw_only=True)
class Augment:
    """One recipe in both forms, and the crop that evaluation shares with it.

    Attributes:
        crop_pct: side of the crop as a share of the stored image: random in training, central in evaluation; 44/48 is
            the 44-pixel crop of a 48-pixel image.
        batched: the recipe on the device, or None for no augmentation.
        per_image: albumentations transforms for worker processes, applied to the (S, S, C) uint8 image after the crop.
    """

    crop_pct: float
    batched: BatchAugment | None
    per_image: list[Any]

    def crop_side(self, side: int) -> int:
        """Crop in whole pixels of a stored image of this side."""
        return round(side * self.crop_pct)


class PerImage:
    """An albumentations pipeline seeded anew for every image from (seed, epoch, row).

    Seeding once per worker, the library's own way, repeats augmentations between workers and epochs in 2.0.8.
    """

    def __init__(self, augment: Augment, stored_side: int, seed: int) -> None:
        import albumentations

        crop = augment.crop_side(stored_side)
        crops = [albumentations.RandomCrop(crop, crop)] if crop < stored_side else []
        self.pipeline = albumentations.Compose([*crops, *augment.per_image])
        self.seed = seed

    def __call__(self, image: Array, epoch: int, row: int) -> Array:
        """(S, S, C) uint8 -> (crop, crop, C) uint8."""
        state = np.random.SeedSequence((self.seed, epoch, row)).generate_state(1)[0]
        self.pipeline.set_random_seed(int(state))
        out: Array = self.pipeline(image=image)["image"]
        return out


class Finish:
    """From stored uint8 images to the network's input, on the images' device: the last step of both paths.

    Args:
        size: side of the network's input.
        mean, std: per-channel normalisation in [0, 1] units.
        augment: the recipe.
        seed: the run's seed.
        train: augment (batched) or take the central crop.
        augmented: the images come from worker processes, cropped and augmented already.
        tta: views per image, see `TTA_VIEWS`; evaluation only.
    """

    def __init__(
        self,
        *,
        size: int,
        mean: list[float],
        std: list[float],
        augment: Augment,
        seed: int,
        train: bool,
        augmented: bool,
        tta: str,
    ) -> None:
        self.size, self.augment, self.seed = size, augment, seed
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self.plain = all(m == 0 for m in mean) and all(s == 1 for s in std)
        self.train, self.augmented, self.tta = train, augmented, tta

    def __call__(self, image: Tensor, index: Tensor, epoch: int) -> Tensor:
        """(B, S, S, C) uint8 -> (B, 3, size, size) float32, or (B, V, 3, size, size) for V > 1 views."""
        pixels = image.permute(0, 3, 1, 2).float().div_(255)
        if self.train and not self.augmented and self.augment.batched is not None:
            crop = self.augment.crop_side(pixels.shape[-1])
            out = self.augment.batched(pixels, index, epoch, self.seed, crop, self.size)
        elif self.train and self.augmented:
            out = self._resize(pixels)
        else:
            out = self._views(pixels)
        return self._normalise(out)

    def _resize(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-2:] == (self.size, self.size):
            return pixels
        return functional.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)

    def _views(self, pixels: Tensor) -> Tensor:
        """Centre crop, or the views of test-time augmentation stacked along dimension 1."""
        side = pixels.shape[-1]
        crop = self.augment.crop_side(side)
        far, mid = side - crop, (side - crop) // 2
        corners = [(0, 0), (0, far), (far, 0), (far, far)] if self.tta in ("five_crop", "ten_crop") else []
        places = [*corners, (mid, mid)]
        views = [self._resize(pixels[..., y : y + crop, x : x + crop]) for y, x in places]
        if self.tta in ("flip", "ten_crop"):
            views += [view.flip(-1) for view in views]
        return views[0] if len(views) == 1 else torch.stack(views, dim=1)

    def _normalise(self, out: Tensor) -> Tensor:
        if out.shape[-3] == 1:
            out = out.expand(*out.shape[:-3], 3, *out.shape[-2:])
        if self.plain:
            return out
        return (out - self.mean.to(out.device)) / self.std.to(out.device)
