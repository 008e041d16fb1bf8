"""The recipe in a worker process: one sampling for whatever moves an image, albumentations for the rest.

What moves an image is drawn by the recipe's batched form, so both ways to the network crop, mirror, turn and zoom an
image alike; OpenCV then reads the network's input straight from the store, once, instead of once per change.
"""

import random
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from fer.data.batched import BatchAugment
from fer.data.manifest import Array
from fer.data.places import inverse
from fer.data.store import fit
from fer.data.transforms import Augment, central
from fer.errors import UserError


class PerImage:
    """An albumentations pipeline seeded anew for every image from (seed, epoch, row).

    Seeding once per worker, the library's own way, repeats augmentations between workers and epochs in 2.0.8. Its
    ``set_random_seed`` also gives every transform a generator of its own with the same seed, so that all images that
    are mirrored with probability 0.5 would be those that are erased with probability 0.5; here they share one.

    Args:
        transforms: albumentations transforms.
        seed: the run's seed.
        track: tell where each image's places went, for boxes and landmarks.
    """

    def __init__(self, transforms: list[Any], seed: int, track: bool) -> None:
        import albumentations

        self.seed, self.track = seed, track and any(map(_moves, transforms))
        points = albumentations.KeypointParams("xy", remove_invisible=False) if self.track else None
        self.pipeline = albumentations.Compose(transforms, keypoint_params=points)

    def __call__(self, image: Array, epoch: int, row: int) -> tuple[Array, Array | None]:
        """Augment one (H, W, C) uint8 image.

        Returns:
            The image, and where the pipeline may move it and ``track`` is set the (2, 3) affine map from the image as
            it came to the augmented one, both from -1 to 1.

        Raises:
            UserError: boxes or landmarks have to follow and the pipeline bends the image.
        """
        state = np.random.SeedSequence((self.seed, epoch, row)).generate_state(1)[0]
        self.pipeline.set_random_state(np.random.default_rng(state), random.Random(int(state)))
        if not self.track:
            return self.pipeline(image=image)["image"], None
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
        return out["image"], np.column_stack([linear, middle])


def _moves(transform: Any) -> bool:
    """Whether a transform may move what an image shows."""
    import albumentations
    from albumentations.augmentations.dropout.transforms import BaseDropout
    from albumentations.core.composition import BaseCompose

    if isinstance(transform, BaseCompose):
        return any(map(_moves, transform.transforms))
    return not isinstance(transform, albumentations.ImageOnlyTransform | BaseDropout | albumentations.NoOp)


class WorkerAugment:
    """One recipe as a worker process applies it.

    Args:
        augment: the recipe; what moves the image is taken from its batched form, albumentations come after it.
        size: side of the network's input.
        seed: the run's seed.
        track: tell where each image's places went, for boxes and landmarks.
    """

    def __init__(self, augment: Augment, size: int, seed: int, track: bool) -> None:
        self.augment, self.size, self.seed, self.track = augment, size, seed, track
        self.pipeline = PerImage(augment.per_image, seed, track) if augment.per_image else None

    def __call__(self, images: Array, epoch: int, rows: Array) -> dict[str, Any]:
        """Augment B of the stored images.

        Args:
            images: (N, S, S, C) uint8.
            epoch: the epoch.
            rows: (B,) which of them.

        Returns:
            ``image``: B arrays (size, size, C) uint8, and with ``track`` ``matrix``: (B, 2, 3) float32, the affine maps
            from the stored to the augmented images, both from -1 to 1.

        Raises:
            UserError: boxes or landmarks have to follow and the pipeline bends the image.
        """
        side = images.shape[1]
        source = self._source(torch.from_numpy(rows), epoch, side)
        factor = self.augment.crop_side(side) // self.size
        seen = [
            read(images[row], where, self.size, factor)
            for row, where in zip(rows, _pixels(source, side, self.size), strict=True)
        ]
        matrix = inverse(source) if self.track else None
        if self.pipeline is not None:
            for place, row in enumerate(rows.tolist()):
                seen[place], moved = self.pipeline(seen[place], epoch, row)
                if matrix is not None and moved is not None:
                    matrix[place] = torch.from_numpy(_after(moved, matrix[place].numpy()))
        return {"image": seen} if matrix is None else {"image": seen, "matrix": matrix}

    def _source(self, index: Tensor, epoch: int, side: int) -> Tensor:
        """(B, 2, 3) where in the stored image each place of the result is read."""
        crop = self.augment.crop_side(side)
        batched: BatchAugment | None = self.augment.batched
        if batched is None:
            return inverse(central(side, crop)[None]).expand(len(index), 2, 3)
        return batched.source(index, epoch, self.seed, crop, side)


def _after(second: Array, first: Array) -> Array:
    """Two (2, 3) affine maps, one after the other."""
    return np.column_stack([second[:, :2] @ first[:, :2], second[:, :2] @ first[:, 2] + second[:, 2]])


def _pixels(source: Tensor, side: int, size: int) -> Array:
    """(B, 2, 3) maps from -1 to 1 as maps from pixels of the result to pixels of an image of ``side``."""
    matrix = source.double().numpy()
    linear = matrix[:, :, :2] * (side / size)
    corner = matrix[:, :, :2].sum(2) * (1 / size - 1) + matrix[:, :, 2]  # where the first pixel's centre is read
    return np.concatenate([linear, ((corner + 1) * side - 1)[:, :, None] / 2], axis=2)


def read(image: Array, where: Array, size: int, factor: int = 1) -> Array:
    """One (S, S, C) image read where a map says: copied where that suffices, else bilinearly, edges repeated.

    Args:
        image: uint8.
        where: (2, 3) map from pixels of the result to pixels of the image.
        size: side of the result.
        factor: by which the image is shrunk first, averaging areas, where it is to be read bilinearly; see
            `fer.data.batched.shrunk`.

    Returns:
        (size, size, C) uint8, an array of its own.
    """
    channels = image.shape[2]
    (across, aside, x), (askew, down, y) = where.tolist()
    if aside == 0 == askew:
        # The window's borders, counted from the image's; a mirrored one begins at its right.
        ends = np.array([(x - across / 2, x - across / 2 + across * size), (y - down / 2, y - down / 2 + down * size)])
        borders = np.sort(ends + 0.5)
        whole = np.rint(borders).astype(int)
        if np.abs(borders - whole).max() < 1e-3 and whole.min() >= 0 and whole.max() <= image.shape[0]:
            (left, right), (top, bottom) = whole.tolist()
            window = image[top:bottom, left:right]
            out = fit(window[..., 0] if channels == 1 else window, size, channels)
            return (cv2.flip(out, 1) if across < 0 else out.copy()).reshape(size, size, channels)
    if factor > 1:
        side = image.shape[0] // factor
        ratio = side / image.shape[0]
        image = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
        where = where * ratio + np.array([0, 0, (ratio - 1) / 2])  # pixels count from their centres
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, where, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE).reshape(
        size, size, channels
    )
