"""The way from files to the network's input, beside torchvision's ImageFolder, a DataLoader and albumentations.

Ours reads the same JPEG files once, into its store; what is compared is every epoch after that. Both end in batches of
the network's input, normalised, in the main process. Further: the time from a live process to the first batch, and what
ten times the images cost.
"""

import abc
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import albumentations
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from hydra.utils import instantiate
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]

from fer.benching.large import first_batch, large, memory_of
from fer.benching.training import composed
from fer.benching.windows import Bench, Row, Times, alone, compare, cpu_now, interleave
from fer.data.base import ExpressionDataModule
from fer.data.loaders import ResidentLoader, WorkerLoader
from fer.data.transforms import Augment

MOMENT = 0.5  # mean and deviation of every channel
QUALITY = 95  # of the JPEG files


def measure(bench: Bench) -> list[Row]:
    """Rows of each size, then of large sets."""
    cores = len(os.sched_getaffinity(0))
    rows = [row for size in bench.options["sizes"] for row in _beside_image_folder(bench, size, cores)]
    return [*rows, *_warm_start(bench, cores), *_ten_times(bench, cores)]


# -- beside ImageFolder -----------------------------------------------------------------------------------------------


def _beside_image_folder(bench: Bench, size: dict[str, Any], cores: int) -> Iterator[Row]:
    stored, channels = size["stored"], size["channels"]
    folder = bench.folder / f"jpeg-{stored}"
    draw(folder, size, bench.folder / "store")
    words = [
        *("data=folder", f"data.root={folder}", f"data.cache={bench.folder}/store", f"data.store_size={stored}"),
        *(f"data.channels={channels}", f"data.image_size={size['input']}", f"augment={bench.options['augment']}"),
        *(f"data.{key}=[{MOMENT},{MOMENT},{MOMENT}]" for key in ("mean", "std")),
        *(f"data.batch_size={bench.options['batch_size']}", f"data.num_workers={cores}"),
    ]
    read = Epochs(opened(*words, "data.resident=no").train_dataloader())
    held = Epochs(opened(*words, "data.resident=yes").train_dataloader())
    recipe = instantiate(composed(*words).augment)
    folders = ImageFolders(folder / "train", recipe, size, bench.options["batch_size"], cores)
    variants = {"worker processes": read, "ImageFolder": folders, "resident": held}
    if stored > bench.options["resident_up_to"]:
        del variants["resident"]
    windows = interleave({name: variant.window for name, variant in variants.items()}, bench.windows)
    what = f"{stored} px {'grey' if channels == 1 else 'colour'}"
    best = "resident" if "resident" in variants else "worker processes"  # what data.resident=auto takes on a CPU
    for name in variants:
        if name != "ImageFolder":
            goal = size["at_least"] if name == best else None
            versus = partial(compare, windows=windows, variant=name, baseline="ImageFolder", unit="1/s")
            yield versus(f"{what}, {name}: images per core-second", at_least=goal)
            used = bench.threads if name == "resident" else cores
            yield versus(f"{what}, {name}: images per second", clock="wall", note=f"{used} of {cores} cores")
    read.stop()
    folders.stop()


def draw(folder: Path, size: dict[str, Any], cache: Path) -> None:
    """Write drawn faces as JPEG files, ``folder/<part>/<class>/<number>.jpg``.

    Args:
        folder: where.
        size: ``stored`` pixels a side, ``channels``, ``images`` to train on, and how many are ``drawn`` for them.
        cache: where the drawn faces are kept.
    """
    words = [f"data.store_size={size['stored']}", f"data.channels={size['channels']}", f"data.train={size['drawn']}"]
    faces = opened(*words, "data.val=14", "data.test=14", f"data.cache={cache}")
    for part, rows in faces.split.parts():
        for number in range(size["images"] if part == "train" else len(rows)):
            row = rows[number % len(rows)]
            place = folder / part / faces.class_names[faces.label[row]]
            place.mkdir(parents=True, exist_ok=True)
            image = np.ascontiguousarray(faces.store.images[row][..., ::-1])
            cv2.imwrite(str(place / f"{number:06d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


def opened(*words: str) -> ExpressionDataModule:
    """The opened data set of a command line."""
    data = instantiate(composed(*words).data)
    assert isinstance(data, ExpressionDataModule)
    data.open()
    return data


def cpu_with(workers: list[int]) -> float:
    """`cpu_now`, and the CPU seconds of worker processes that still run."""
    used = cpu_now()
    for pid in workers:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


class _Epochs(abc.ABC):
    """Whole epochs as windows: at the end of each no worker has anything left to do."""

    def workers(self) -> list[int]:
        """Process ids."""
        return []

    @abc.abstractmethod
    def epoch(self) -> Iterator[Tensor]:
        """The (B, 3, S, S) batches of the next epoch."""

    def window(self) -> Times:
        """Run an epoch; a step is an image."""
        workers = self.workers()
        cpu, wall, images = cpu_with(workers), time.perf_counter(), 0
        for batch in self.epoch():
            images += len(batch)
        # The first epoch starts the workers, whose time is not counted; it warms up.
        return Times(cpu=cpu_with(workers) - cpu, wall=time.perf_counter() - wall, steps=images)


class Epochs(_Epochs):
    """Epochs of one of our loaders."""

    def __init__(self, loader: ResidentLoader | WorkerLoader) -> None:
        self.loader = loader

    def workers(self) -> list[int]:
        """Process ids, none where the loader has no workers or has not started them."""
        return _workers(self.loader.loader) if isinstance(self.loader, WorkerLoader) else []

    def epoch(self) -> Iterator[Tensor]:
        """See `_Epochs.epoch`."""
        self.loader.sampler.set_epoch(self.loader.sampler.epoch + 1)
        return (batch["image"] for batch in self.loader)

    def stop(self) -> None:
        """End the workers."""
        if isinstance(self.loader, WorkerLoader):
            _stop(self.loader.loader)


def _workers(loader: DataLoader[Any]) -> list[int]:
    return [worker.pid for worker in loader._iterator._workers] if loader._iterator else []  # type: ignore[attr-defined]


def _stop(loader: DataLoader[Any]) -> None:
    loader._iterator._shutdown_workers()  # type: ignore[union-attr]
    loader._iterator = None


class ImageFolders(_Epochs):
    """The rival: ImageFolder read by OpenCV, albumentations, a DataLoader with a persistent worker for each core.

    Tuned: OpenCV decodes faster than Pillow; its own threads are off; workers hand over uint8, a quarter of the bytes,
    and batches are normalised in place; four batches are prefetched by each worker.
    """

    def __init__(self, folder: Path, recipe: Augment, size: dict[str, Any], batch_size: int, cores: int) -> None:
        pipeline = albumentations.Compose([*alike(recipe, size["stored"], size["input"]), ToTensorV2()])
        self.loader = DataLoader(
            ImageFolder(str(folder), transform=_OnImage(pipeline), loader=_grey if size["channels"] == 1 else _colour),
            batch_size=batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=cores,
            persistent_workers=True,
            prefetch_factor=4,
            worker_init_fn=_seed,
        )

    def workers(self) -> list[int]:
        """Process ids."""
        return _workers(self.loader)

    def epoch(self) -> Iterator[Tensor]:
        """See `_Epochs.epoch`."""
        for images, _ in self.loader:
            yield images.float().sub_(255 * MOMENT).div_(255 * MOMENT).expand(-1, 3, -1, -1)

    def stop(self) -> None:
        """End the workers."""
        _stop(self.loader)


@dataclass
class _OnImage:
    pipeline: Callable[..., dict[str, Tensor]]

    def __call__(self, image: Any) -> Tensor:
        return self.pipeline(image=image)["image"]


def _grey(path: str) -> Any:
    return cv2.imread(path, cv2.IMREAD_GRAYSCALE)[..., None]  # type: ignore[index]


def _colour(path: str) -> Any:
    return cv2.imread(path, cv2.IMREAD_COLOR_RGB)


def _seed(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    get_worker_info().dataset.transform.pipeline.set_random_seed(torch.initial_seed() % 2**32)  # type: ignore[union-attr]


def alike(recipe: Augment, stored: int, size: int) -> list[Any]:
    """A recipe as albumentations alone would have it.

    Args:
        recipe: ours.
        stored: side of the images.
        size: side of the network's input.
    """
    moves, crop = recipe.batched, recipe.crop_side(stored)
    assert moves is not None
    out: list[Any] = []
    side = crop
    if tuple(moves.resized_crop) != (1, 1):
        out.append(albumentations.RandomResizedCrop((size, size), scale=tuple(moves.resized_crop), ratio=(1.0, 1.0)))
        side = size
    elif crop < stored:
        out.append(albumentations.RandomCrop(crop, crop))
    if moves.flip:
        out.append(albumentations.HorizontalFlip(p=moves.flip))
    if moves.rotate or moves.shift or tuple(moves.scale) != (1, 1):
        affine = partial(albumentations.Affine, scale=tuple(moves.scale), border_mode=cv2.BORDER_REPLICATE)
        shift = (-moves.shift, moves.shift)
        out.append(affine(rotate=(-moves.rotate, moves.rotate), translate_percent=shift, p=moves.rotate_p))
    if side != size:
        out.append(albumentations.Resize(size, size))
    return out + recipe.per_image


# -- large sets -------------------------------------------------------------------------------------------------------


def _warm_start(bench: Bench, cores: int) -> Iterator[Row]:
    for goal in bench.options["warm_start"]:
        first_batch(bench.folder, goal["images"], cores, resident=True)  # builds the store
        for resident in (True, False):
            taken = [
                first_batch(bench.folder, goal["images"], cores, resident)
                for _ in range(min(bench.windows, bench.options["most_rounds"]))
            ]
            row = alone(
                f"first batch of {goal['images']:,} images, {'resident' if resident else 'worker processes'}",
                [times.wall for times in taken],
                "s",
                at_most=goal["at_most_s"],
            )
            row["details"] = {"cpu_seconds": [times.cpu for times in taken]}
            yield row


def _ten_times(bench: Bench, cores: int) -> Iterator[Row]:
    few, many = bench.options["linear"]
    words = [f"augment={bench.options['augment']}", f"data.num_workers={cores}", "data.batch_size=256"]
    loaders = {}
    memory: dict[str, list[float]] = {}
    for name, images in (("few", few), ("many", many)):
        held, read_by_workers = (large(bench.folder, images, *words, f"data.resident={r}") for r in ("yes", "no"))
        held.open()
        read_by_workers.open()
        loaders[name] = Epochs(held.train_dataloader())
        read = read_by_workers.train_dataloader()
        assert isinstance(read, WorkerLoader)
        memory[name] = memory_of(read, bench.options["read"] // 256)
        _stop(read.loader)
    rounds = min(bench.windows, bench.options["most_rounds"])
    windows = interleave({name: loader.window for name, loader in loaders.items()}, rounds)
    times = f"{many // few} times the images, {many:,} and {few:,}"
    yield compare(f"an image of {times}", windows, "many", "few", unit="us", at_most=1.1)
    ratio = [a / b for a, b in zip(memory["many"], memory["few"], strict=True)]
    row = alone(f"a worker's own memory with {times}", ratio, "x", at_most=1.1)
    row["details"] = {"megabytes": memory}
    yield row
