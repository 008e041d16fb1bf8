"""A data set of random pixels, for measuring what does not depend on what is on the images."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Unpack

import numpy as np
from omegaconf import DictConfig, OmegaConf, flag_override

from fer.data.base import DataOptions, ExpressionDataModule, Image
from fer.data.manifest import Array, Manifest
from fer.labels import BASIC_7


class Noise(ExpressionDataModule):
    """Images of noise with labels in turn: as many to train on as asked, and a class's worth for each other part.

    Args:
        images: in the training part.
        options: see `DataOptions`.

    Attributes:
        marks: called before and after each training batch is made; None for nothing.
    """

    title = "random pixels"
    expected_tree = "(nothing: the pixels are drawn)"
    request = "nowhere: the pixels are drawn"
    on_disk = False

    def __init__(self, *, images: int, **options: Unpack[DataOptions]) -> None:
        super().__init__(**options)
        self.amount = images
        self.marks: Callable[[], None] | None = None
        self.manifest_options = {"images": images}

    def source_fingerprint(self) -> str:
        """There is no source."""
        return "random pixels, 1"

    def manifest(self) -> Manifest:
        """The training part, then validation and test of 70 images each."""
        few = 10 * len(BASIC_7)
        split = np.repeat(["train", "val", "test"], [self.amount, few, few])
        number = np.arange(len(split))
        return Manifest(
            item=np.char.add("image/", number.astype(str)),
            label=number % len(BASIC_7),
            class_names=BASIC_7,
            split=split,
            form="random pixels",
            benchmark=False,
        )

    def images(self, manifest: Manifest, rows: Array) -> Iterator[Image]:
        """Draw the image of each row."""
        for row in rows.tolist():
            pixels = np.random.default_rng(row).bytes(self.store_size**2 * self.channels)
            image = np.frombuffer(pixels, np.uint8).reshape(self.store_size, self.store_size, self.channels)
            yield image[..., 0] if self.channels == 1 else image

    def train_dataloader(self) -> Any:
        """The base's, its batches marked."""
        loader: Any = super().train_dataloader()
        if self.marks is not None:
            loader._batches = partial(_marked, loader._batches, self.marks)
        return loader


def _marked(batches: Callable[[], Iterator[Any]], mark: Callable[[], None]) -> Iterator[Any]:
    source = batches()
    while True:
        mark()
        batch = next(source, None)
        mark()
        if batch is None:
            return
        yield batch


def on_noise(config: DictConfig, images: int, side: int, channels: int) -> DictConfig:
    """A composed config of ``fer.train`` with its data set replaced by `Noise`.

    Args:
        config: changed in place.
        images: of the training part.
        side: of the stored images in pixels.
        channels: 1 or 3.
    """
    common = {key: config.data._get_node(key) for key in DataOptions.__annotations__}
    with flag_override(config, "struct", False):
        config.data = OmegaConf.create({"_target_": f"{Noise.__module__}.{Noise.__name__}", "images": images})
        for key, node in common.items():
            config.data[key] = node
        config.data.store_size, config.data.channels = side, channels
    return config
