"""What an image looks like in an epoch: a pure function of (seed, epoch, row), on either way to the network.

`Augment` holds both forms of one recipe: `BatchAugment`, batched torch on the device for the resident path, and an
albumentations pipeline per image for worker processes. Neither depends on batch size, worker count or resume. The two
forms draw different numbers, so a run stays on one of them; which one is part of its results.
"""

import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fer.data.batched import BatchAugment
from fer.data.manifest import Array
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
        batched: the recipe on the device, or None for no augmentation.
        per_image: albumentations transforms for worker processes, applied to the (S, S, C) uint8 image after the crop.
    """

    crop_pct: float
    crops_per_image: int
    batched: BatchAugment | None
    per_image: list[Any]

    def crop_side(self, side: int) -> int:
        """Crop in whole pixels of a stored image of this side."""
        return round(side * self.crop_pct)


class PerImage:
    """An albumentations pipeline seeded anew for every image from (seed, epoch, row).

    Seeding once per worker, the library's own way, repeats augmentations between workers and epochs in 2.0.8. Its
    ``set_random_seed`` also gives every transform a generator of its own with the same seed, so that all images that
    are mirrored with probability 0.5 would be those that are erased with probability 0.5; here they share one.

    Args:
        augment: the recipe.
        stored_side: side of the stored images.
        seed: the run's seed.
        track: tell where each image's places went, for boxes and landmarks.
    """

    def __init__(self, augment: Augment, stored_side: int, seed: int, track: bool) -> None:
        import albumentations

        crop = augment.crop_side(stored_side)
        crops = [albumentations.RandomCrop(crop, crop)] if crop < stored_side else []
        transforms = [*crops, *augment.per_image]
        points = albumentations.KeypointParams("xy", remove_invisible=False) if track and transforms else None
        self.pipeline = albumentations.Compose(transforms, keypoint_params=points)
        self.seed, self.track = seed, track

    def __call__(self, image: Array, epoch: int, row: int) -> dict[str, Array]:
        """Augment one (S, S, C) uint8 image.

        Returns:
            ``image`` (H, W, C) uint8, and with ``track`` its ``matrix`` (2, 3) float32, the affine map from the stored
            to the augmented image, both from -1 to 1.

        Raises:
            UserError: boxes or landmarks have to follow and the pipeline bends the image.
        """
        state = np.random.SeedSequence((self.seed, epoch, row)).generate_state(1)[0]
        self.pipeline.set_random_state(np.random.default_rng(state), random.Random(int(state)))
        if not self.track:
            return {"image": self.pipeline(image=image)["image"]}
        far = image.shape[0] - 1
        corners = np.array([(0, 0), (far, 0), (0, far), (far, far)], dtype=np.float64)
        out = self.pipeline(image=image, keypoints=corners)
        moved = (np.asarray(out["keypoints"], dtype=np.float64) * 2 + 1) / out["image"].shape[1::-1] - 1
        if len(moved) < 4 or np.abs(moved[1] + moved[2] - moved[0] - moved[3]).max() > 0.01:
            raise UserError(
                "augment.per_image: a transform bends the image, which boxes and landmarks cannot follow; use affine "
                "ones only (flips, crops, rotation, zoom, shift, shear)"
            )
        corner, right, down, _ = moved
        # The outermost pixels' centres lie at -far / (far + 1) and its opposite.
        reach = far / (far + 1)
        linear = np.stack([right - corner, down - corner], axis=1) / (2 * reach)
        middle = (right + down) / 2
        return {"image": out["image"], "matrix": np.column_stack([linear, middle]).astype(np.float32)}


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

    def __call__(self, batch: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
        """Make ``image`` the network's input and let the places follow.

        Args:
            batch: ``image`` (B, S, S, C) uint8, ``index`` (B,) rows of the manifest, places as `fer.data.places` has
                them, ``matrix`` (B, 2, 3) of images that come augmented and have places, and whatever else.
            epoch: the epoch.

        Returns:
            The same with ``image`` (B, 3, size, size) float32, or (B, V, 3, size, size) for V > 1 views, and places in
            its pixels (of several views, in those of the central one).
        """
        pixels = batch["image"].permute(0, 3, 1, 2).float().div_(255)
        places = any(key in batch for key in PLACES)
        matrix = None
        if self.train and not self.augmented and self.augment.batched is not None:
            crop = self.augment.crop_side(pixels.shape[-1])
            image, source = self.augment.batched(pixels, batch["index"], epoch, self.seed, crop, self.size)
            matrix = inverse(source) if places else None
        elif self.train and self.augmented:
            image = self._resize(pixels)
            matrix = batch["matrix"] if places else None
        else:
            image = self._views(pixels)
            matrix = self._central(pixels) if places else None
        moved = {} if matrix is None else follow(batch, matrix, self.size)
        kept = {key: values for key, values in batch.items() if key != "matrix"}
        return {**kept, **moved, "image": self._normalise(image)}

    def _central(self, pixels: Tensor) -> Tensor:
        """(B, 2, 3) the map of the central crop."""
        side = pixels.shape[-1]
        crop = self.augment.crop_side(side)
        scale, shift = side / crop, (side - crop - 2 * ((side - crop) // 2)) / crop
        return pixels.new_tensor([[scale, 0, shift], [0, scale, shift]]).expand(len(pixels), 2, 3)

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
