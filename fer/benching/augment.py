"""Each recipe of ``conf/augment``: batched and per image, beside albumentations alone and torchvision's v2.

All begin with stored uint8 images in memory and end with a normalised float32 batch of the network's input.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import albumentations
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.utils.data import default_collate
from torchvision.transforms import v2  # type: ignore[import-untyped]

from fer.benching.data import MOMENT, alike
from fer.benching.training import composed
from fer.benching.windows import Bench, Row, Times, compare, interleave, timed
from fer.data.per_image import WorkerAugment
from fer.data.transforms import Augment, Finish

Batch = Callable[[], Tensor]  # makes one batch


def measure(bench: Bench) -> list[Row]:
    """Two rows for each recipe and size."""
    cv2.setNumThreads(0)
    return [
        row for size in bench.options["sizes"] for name in bench.options["recipes"] for row in _of(bench, name, size)
    ]


def _of(bench: Bench, name: str, size: dict[str, Any]) -> Iterator[Row]:
    stored, side = size["stored"], size["input"]
    recipe = instantiate(composed(f"augment={name}", f"data.store_size={stored}").augment)
    noise = np.random.default_rng(0).integers(0, 256, (size["batch"], 12, 12, size["channels"]), np.uint8)
    images = np.stack([cv2.resize(one, (stored, stored)).reshape(stored, stored, -1) for one in noise])
    makers = {
        "batched": batched(recipe, images, side),
        "per image": per_image(recipe, images, side),
        "albumentations": by_albumentations(recipe, images, side),
        "torchvision": by_torchvision(recipe, images, side),
    }
    repeats = size["repeats"]
    windows = interleave(
        {who: partial(_window, make, len(images), repeats) for who, make in makers.items()}, bench.windows
    )
    slower = np.median([t.cpu / t.steps for t in windows["torchvision"]]) * 1e6
    for who in ("batched", "per image"):
        yield compare(
            f"`{name}`, {stored} px {'grey' if size['channels'] == 1 else 'colour'}, {who}",
            windows,
            who,
            "albumentations",
            unit="us",
            note=f"torchvision v2: {slower:.0f} us",
        )


def _window(make: Batch, images: int, repeats: int) -> Times:
    with timed(images * repeats) as times:
        for _ in range(repeats):
            make()
    return times


def _finish(recipe: Augment, side: int, augmented: bool) -> Finish:
    moments = [MOMENT] * 3
    return Finish(
        size=side, mean=moments, std=moments, augment=recipe, seed=0, train=True, augmented=augmented, tta="none"
    )


def batched(recipe: Augment, images: Any, side: int) -> Batch:
    """The resident path's form."""
    batch = {"image": torch.from_numpy(images), "index": torch.arange(len(images))}
    finish = _finish(recipe, side, augmented=False)
    return lambda: finish(batch, 0)["image"]


def per_image(recipe: Augment, images: Any, side: int) -> Batch:
    """The worker processes' form."""
    augment, finish, rows = (
        WorkerAugment(recipe, side, 0, track=False),
        _finish(recipe, side, True),
        np.arange(len(images)),
    )
    return lambda: finish({"image": default_collate(augment(images, 0, rows)["image"])}, 0)["image"]


def by_albumentations(recipe: Augment, images: Any, side: int) -> Batch:
    """The same recipe from albumentations alone."""
    pipeline = albumentations.Compose([*alike(recipe, images.shape[1], side), ToTensorV2()])

    def make() -> Tensor:
        batch: Tensor = default_collate([pipeline(image=image)["image"] for image in images])
        return batch.float().sub_(255 * MOMENT).div_(255 * MOMENT).expand(-1, 3, -1, -1)

    return make


def by_torchvision(recipe: Augment, images: Any, side: int) -> Batch:
    """The same recipe from ``torchvision.transforms.v2``."""
    pipeline = nn.Sequential(*torchvisions(recipe, images.shape[1], side))
    stored = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def make() -> Tensor:
        batch = torch.stack([pipeline(image) for image in stored])
        return batch.float().sub_(255 * MOMENT).div_(255 * MOMENT).expand(-1, 3, -1, -1)

    return make


def torchvisions(recipe: Augment, stored: int, size: int) -> list[Any]:
    """A recipe's options in torchvision's transforms.

    Args:
        recipe: ours.
        stored: side of the images.
        size: side of the network's input.
    """
    b, crop, out = recipe.batched, recipe.crop_side(stored), []
    assert b is not None
    if tuple(b.resized_crop) != (1, 1):
        out.append(v2.RandomResizedCrop(size, scale=tuple(b.resized_crop), ratio=(1.0, 1.0), antialias=False))
        crop = size
    elif crop < stored:
        out.append(v2.RandomCrop(crop))
    if b.flip:
        out.append(v2.RandomHorizontalFlip(b.flip))
    if b.rotate or b.shift or tuple(b.scale) != (1, 1):
        bilinear = v2.InterpolationMode.BILINEAR
        out.append(v2.RandomAffine(b.rotate, (b.shift, b.shift), tuple(b.scale), interpolation=bilinear))
    if crop != size:
        out.append(v2.Resize(size, antialias=False))
    if b.brightness or b.contrast or b.saturation or b.hue:
        out.append(v2.RandomApply([v2.ColorJitter(b.brightness, b.contrast, b.saturation, b.hue)], b.jitter_p))
    if b.grey:
        out.append(v2.RandomGrayscale(b.grey))
    if b.rand_augment:
        out.append(v2.RandAugment(b.rand_augment.number, int(b.rand_augment.magnitude)))
    if b.erase:
        out.append(v2.RandomErasing(b.erase, tuple(b.erase_area)))
    return out
