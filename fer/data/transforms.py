"""What an image looks like in an epoch: a pure function of (seed, epoch, row), on either way to the network.

`Augment` holds both forms of one recipe: `BatchAugment`, batched torch on the device for the resident path, and
`fer.data.per_image.WorkerAugment`, OpenCV and albumentations per image in worker processes. Neither depends on batch
size, worker count or resume. Both move an image alike but draw different numbers for light, colour and erasing, so a
run stays on one of them; which one is part of its results.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fer.config import require_counts
from fer.data.batched import BatchAugment, uniform
from fer.data.places import PLACES, follow, inverse
from fer.errors import UserError

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing must make no network call

TTA_VIEWS = {"none": 1, "flip": 2, "five_crop": 5, "ten_crop": 10}


@dataclass(frozen=True, kw_only=True)
class Augment:
    """One recipe in both forms, and the crop that evaluation shares with it.

    Attributes:
        crop_pct: side of the crop as a share of the stored image: random in training, central in evaluation; 44/48 is
            the 44-pixel crop of a 48-pixel image.
        crops_per_image: how often a training epoch passes every image, each time augmented differently.
        batched: the recipe on the device, whose crop, flip, rotation, zoom and shift worker processes apply too; None
            for the central crop.
        per_image: the rest of it in worker processes: albumentations transforms of the (size, size, C) uint8 input.
    """

    crop_pct: float
    crops_per_image: int
    batched: BatchAugment | None
    per_image: list[Any]

    def __post_init__(self) -> None:
        """Refuse a crop that is no part of the image, or no crop at all.

        Raises:
            UserError: naming the key.
        """
        if not 0 < self.crop_pct <= 1:
            raise UserError(f"augment.crop_pct={self.crop_pct} must lie above 0 and up to 1, the whole image")
        require_counts({"augment.crops_per_image": self.crops_per_image}, {"augment.crops_per_image": 1})

    def crop_side(self, side: int) -> int:
        """Crop in whole pixels of a stored image of this side."""
        return max(1, round(side * self.crop_pct))


def central(side: int, crop: int) -> Tensor:
    """(2, 3) the map, both from -1 to 1, from an image to its central crop."""
    scale, shift = side / crop, (side - crop - 2 * ((side - crop) // 2)) / crop
    return torch.tensor([[scale, 0, shift], [0, scale, shift]])


def drawn(cumulative: Tensor, index: Tensor, epoch: int, seed: int) -> Tensor:
    """(B,) classes drawn by their shares: a pure function of (seed, epoch, row), of numbers no augmentation uses.

    Args:
        cumulative: (B, K) shares of the classes, summed up to each of them.
        index: (B,) rows of the manifest.
        epoch: the epoch.
        seed: the run's seed, from 0 on.
    """
    return (cumulative <= uniform(-1 - seed, epoch, index, 1)).sum(1)


class Finish:
    """From stored uint8 images to the network's input, on the images' device: the last step of both paths.

    Args:
        size: side of the network's input.
        mean, std: per-channel normalisation in [0, 1] units.
        augment: the recipe.
        seed: the run's seed.
        train: augment (batched) or take the central crop.
        augmented: the images come from worker processes, augmented and of the input's size already.
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
        self._placed: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.plain = all(m == 0 for m in mean) and all(s == 1 for s in std)
        self.train, self.augmented, self.tta = train, augmented, tta

    def __call__(self, batch: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
        """Make ``image`` the network's input and let the places follow.

        Args:
            batch: ``image`` (B, S, S, C) uint8, ``index`` (B,) rows of the manifest, places as `fer.data.places` has
                them, ``matrix`` (B, 2, 3) of images that come augmented and have places, ``cumulative`` (B, K) where
                training draws the label, see `drawn`, and whatever else.
            epoch: the epoch.

        Returns:
            The same with ``image`` (B, 3, size, size) float32, or (B, V, 3, size, size) for V > 1 views, and places in
            its pixels (of several views, in those of the central one).
        """
        places = any(key in batch for key in PLACES)
        matrix = None
        if self.train and self.augmented:
            image = self._scaled(batch["image"])
            matrix = batch["matrix"] if places else None
        else:
            pixels = batch["image"].permute(0, 3, 1, 2).float().div_(255)
            side = pixels.shape[-1]
            crop = self.augment.crop_side(side)
            if self.train and self.augment.batched is not None:
                image, source = self.augment.batched(pixels, batch["index"], epoch, self.seed, crop, self.size)
                matrix = inverse(source) if places else None
            else:
                image = self._views(pixels)
                matrix = central(side, crop).to(pixels.device).expand(len(pixels), 2, 3) if places else None
            image = self._normalise(image)
        moved = {} if matrix is None else follow(batch, matrix, self.size)
        kept = {key: values for key, values in batch.items() if key not in ("matrix", "cumulative")}
        if self.train and "cumulative" in batch:
            kept["label"] = drawn(batch["cumulative"], batch["index"], epoch, self.seed)
        return {**kept, **moved, "image": image}

    def _scaled(self, pixels: Tensor) -> Tensor:
        """(B, H, W, C) uint8 -> (B, 3, H, W) float32 normalised; colour stays channels-last, as it came.

        Colour is scaled by rows of pixels, so that the innermost loop is over hundreds of values and not over three.
        """
        if pixels.shape[-1] == 1:
            return self._normalise(pixels.permute(0, 3, 1, 2).float().div_(255))
        mean, std = self._moments(pixels.device)
        factor, offset = ((1 / (255 * std)).flatten(), (-mean / std).flatten())
        factor, offset = (row.repeat(pixels.shape[2]) for row in (factor, offset))
        out = torch.empty(pixels.flatten(2).shape, device=pixels.device)
        # On a CPU image by image, which stays in the cache between the three passes.
        step = 1 if pixels.device.type == "cpu" else len(pixels)
        for made, values in zip(torch.split(out, step), torch.split(pixels.flatten(2), step), strict=True):
            made.copy_(values).mul_(factor).add_(offset)
        return out.view(pixels.shape).permute(0, 3, 1, 2)

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
        mean, std = self._moments(out.device)
        return (out - mean) / std

    def _moments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation on the device, copied there once: a copy in every step would wait for the device."""
        if device not in self._placed:
            self._placed[device] = (self.mean.to(device), self.std.to(device))
        return self._placed[device]
