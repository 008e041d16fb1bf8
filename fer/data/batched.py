"""Batched augmentation on the device: a pure function of (seed, epoch, row) for every image of a batch.

Nothing here depends on which images share a batch: random numbers are counted rather than drawn in turn, and sums that
a batched product would round by the batch's size are written out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fer.data.rand_augment import RandAugment, blended, luma

_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as a signed 64-bit integer
_MIX_1, _MIX_2 = -4658895280553007687, -7723592293110705685
_DRAWS = 21  # random numbers per image, besides RandAugment's


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection of 64-bit integers whose outputs pass for random."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _mix_number(x: int) -> int:
    """`_mix` of one number, as a signed 64-bit integer; on the host, so that no step copies one to the device."""
    low = (1 << 64) - 1
    x &= low
    x = ((x ^ (x >> 30)) * _MIX_1) & low
    x = ((x ^ (x >> 27)) * _MIX_2) & low
    x ^= x >> 31
    return x - (1 << 64) if x >> 63 else x


def uniform(seed: int, epoch: int, index: Tensor, draws: int) -> Tensor:
    """(B, draws) float32 in [0, 1), a pure function of (seed, epoch, index) and the draw's number.

    A counter-based generator rather than `torch.Generator`, because each image's numbers must not depend on which
    images share its batch.
    """
    key = _mix_number((seed * 1_000_003 + epoch) * _GOLDEN)
    state = _mix(index[:, None] * _GOLDEN + key) + torch.arange(1, draws + 1, device=index.device) * _GOLDEN
    return ((_mix(state) >> 40) & 0xFFFFFF).float() / (1 << 24)


def uniform_pair(u: Tensor) -> tuple[Tensor, Tensor]:
    """Two 12-bit uniforms from one 24-bit uniform."""
    first = (u * 4096).floor()
    return first / 4096, u * 4096 - first


def shrunk(image: Tensor, factor: int) -> Tensor:
    """(B, C, S, S) -> (B, C, S // factor, S // factor) by averaging areas; what shows where stays.

    A sampling that passes over pixels would show as detail what is none, and evaluation's antialiased one does not.
    """
    return image if factor < 2 else functional.adaptive_avg_pool2d(image, image.shape[-1] // factor)


def sample(image: Tensor, source: Tensor, size: int) -> Tensor:
    """(B, C, S, S) -> (B, C, size, size), read bilinearly where the (B, 2, 3) maps ``source`` say, edges repeated."""
    # Written out instead of affine_grid's batched product, whose rounding depends on the batch size.
    axis = (torch.arange(size, device=image.device, dtype=image.dtype) * 2 + 1) / size - 1
    x, y = axis[None, None, :], axis[None, :, None]
    m = source[:, :, :, None, None]
    grid = torch.stack([m[:, i, 0] * x + m[:, i, 1] * y + m[:, i, 2] for i in range(2)], dim=-1)
    return functional.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)


@dataclass(frozen=True, kw_only=True)
class BatchAugment:
    """One batched recipe: geometry in a single bilinear sampling, then light and colour, then erasing.

    Images whose crop is at least twice the result's side are shrunk by the whole factor first.

    What is switched off costs nothing; ``conf/augment/_off.yaml`` has the values that switch everything off.

    Attributes:
        flip: probability of a mirror image.
        rotate: largest rotation in degrees, either way.
        rotate_p: probability of a rotation.
        scale: smallest and largest zoom; 1.1 enlarges by a tenth.
        shift: largest shift as a share of the image side, either way, besides the random crop's own.
        resized_crop: smallest and largest share of the crop's area that a square within it keeps.
        brightness: largest change of brightness, as a share of full scale.
        contrast: largest relative change of contrast around the image's mean.
        saturation: largest relative change of the colours' distance from grey.
        hue: largest turn of the colours, as a share of the circle.
        jitter_p: probability that these four change at all.
        grey: probability of a grey picture.
        rand_augment: RandAugment, or None.
        erase: probability of one erased rectangle, filled with the image's mean.
        erase_area: smallest and largest erased share of the image.
    """

    flip: float
    rotate: float
    rotate_p: float
    scale: tuple[float, float]
    shift: float
    resized_crop: tuple[float, float]
    brightness: float
    contrast: float
    saturation: float
    hue: float
    jitter_p: float
    grey: float
    rand_augment: RandAugment | None
    erase: float
    erase_area: tuple[float, float]

    def __call__(
        self, image: Tensor, index: Tensor, epoch: int, seed: int, crop: int, size: int
    ) -> tuple[Tensor, Tensor]:
        """Augment a random ``crop`` window of each image.

        Args:
            image: (B, C, S, S) float in [0, 1].
            index: (B,) rows of the manifest.
            epoch: the epoch.
            seed: the run's seed.
            crop: side of the window in pixels of S.
            size: side of the result.

        Returns:
            (B, C, size, size), and (B, 2, 3) where in the image each of its places was read, both from -1 to 1.
        """
        more = self.rand_augment.draws if self.rand_augment else 0
        u = uniform(seed, epoch, index, _DRAWS + more)
        source = self._source(u, crop, image.shape[-1])
        if self.rand_augment:
            source = self.rand_augment.bend(source, u[:, _DRAWS:])
        image = sample(shrunk(image, crop // size), source, size)
        image = self._colour(self._light(image, u), u)
        if self.rand_augment:
            image = self.rand_augment.paint(image, u[:, _DRAWS:])
        return (self._erase(image, u) if self.erase else image), source

    def source(self, index: Tensor, epoch: int, seed: int, crop: int, side: int) -> Tensor:
        """(B, 2, 3) where in images of ``side`` each place of the result is read, but for RandAugment's changes."""
        return self._source(uniform(seed, epoch, index, _DRAWS), crop, side)

    def _source(self, u: Tensor, crop: int, side: int) -> Tensor:
        """(B, 2, 3) maps from the result to the image."""
        flip = torch.where(u[:, 0] < self.flip, -1.0, 1.0)
        angle = (u[:, 1] * 2 - 1) * (self.rotate * torch.pi / 180)
        if self.rotate_p < 1:
            angle = torch.where(u[:, 13] < self.rotate_p, angle, 0)
        low, high = self.scale
        zoom = low + u[:, 2] * (high - low)
        # A random crop moves by whole pixels, so that without rotation and zoom it copies pixels exactly.
        room = side - crop
        offset = (u[:, 3:5] * (room + 1)).floor().clamp_max(room) - room / 2
        shift = offset * (2 / side) + (u[:, 5:7] * 2 - 1) * (2 * self.shift)
        reach = crop / side / zoom
        least, most = self.resized_crop
        if least < 1:
            part = (least + u[:, 14] * (most - least)).sqrt()
            shift = shift + (u[:, 15:17] * 2 - 1) * (1 - part[:, None]) * (crop / side)
            reach = reach * part
        cos, sin = angle.cos() * reach, angle.sin() * reach
        turn = torch.stack([cos * flip, -sin, sin * flip, cos], dim=-1).view(-1, 2, 2)
        return torch.cat([turn, shift[:, :, None]], dim=-1)

    def _light(self, image: Tensor, u: Tensor) -> Tensor:
        if not (self.brightness or self.contrast):
            return image
        mean = image.mean(dim=(1, 2, 3), keepdim=True)
        gain = (1 + (u[:, 7] * 2 - 1) * self.contrast)[:, None, None, None]
        lift = ((u[:, 8] * 2 - 1) * self.brightness)[:, None, None, None]
        changed = ((image - mean) * gain + mean + lift).clamp(0, 1)
        return changed if self.jitter_p >= 1 else torch.where(self._jittered(u), changed, image)

    def _jittered(self, u: Tensor) -> Tensor:
        """(B, 1, 1, 1) whether light and colour change."""
        return (u[:, 17] < self.jitter_p)[:, None, None, None]

    def _colour(self, image: Tensor, u: Tensor) -> Tensor:
        """Saturation, hue and grey: chroma stretched and turned about the luma (BT.601), which stays."""
        if image.shape[1] == 1 or not (self.saturation or self.hue or self.grey):
            return image
        jittered = self._jittered(u)
        stretch = 1 + (u[:, 18] * 2 - 1)[:, None, None, None] * self.saturation
        stretch = torch.where(jittered, stretch, 1)
        grey = luma(image)
        if self.hue:
            turn = (u[:, 19] * 2 - 1)[:, None, None, None] * (2 * torch.pi * self.hue)
            image = torch.where(jittered, _turned(image, grey, turn), image)
        stretch = torch.where((u[:, 20] < self.grey)[:, None, None, None], 0, stretch)
        return blended(grey, image, stretch)

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


def _turned(image: Tensor, grey: Tensor, angle: Tensor) -> Tensor:
    """(B, 3, H, W) with the colours turned by (B, 1, 1, 1) radians in the plane of BT.601's U and V."""
    red, blue = image[:, :1], image[:, 2:]
    u, v = 0.492 * (blue - grey), 0.877 * (red - grey)
    cos, sin = angle.cos(), angle.sin()
    u, v = cos * u - sin * v, sin * u + cos * v
    red, blue = grey + v / 0.877, grey + u / 0.492
    green = (grey - 0.299 * red - 0.114 * blue) / 0.587
    return torch.cat([red, green, blue], dim=1)
