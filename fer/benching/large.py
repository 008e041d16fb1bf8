"""Sets of hundreds of thousands of images, made in seconds: empty files on disk, noise in the store."""

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from hydra.utils import instantiate

from fer.benching.training import composed
from fer.benching.windows import Times, cpu_now
from fer.data.base import DataOptions, ExpressionDataModule
from fer.data.loaders import WorkerLoader
from fer.data.manifest import Array, Manifest
from fer.labels import EXPRESSIONS

PER_FOLDER = 1000
SIDE = 48


class Noise(ExpressionDataModule):
    """As many grey images as there are files under the root, with what AffectNet says of each."""

    title = "noise"
    expected_tree = "(written by fer.benching.large)"
    request = "nowhere"

    def __init__(self, *, images: int, **options: Unpack[DataOptions]) -> None:
        super().__init__(**options)
        self.count = images

    def manifest(self) -> Manifest:
        """Noise for annotations too."""
        rng, n = np.random.default_rng(0), self.count
        corner, points = rng.uniform(0, 4, (n, 2)), rng.uniform(-3, 3, (n, 5, 2))
        face = np.array([[16, 19], [32, 19], [24, 28], [18, 36], [30, 36]])
        return Manifest(
            item=np.array([f"{row // PER_FOLDER:04d}/{row:06d}.jpg" for row in range(n)]),
            label=rng.integers(0, 7, n),
            class_names=EXPRESSIONS[:7],
            split=np.where(np.arange(n) % 10 == 0, np.where(np.arange(n) % 20 == 0, "val", "test"), "train"),
            form="noise",
            box=np.concatenate([corner, np.full((n, 2), 44.0)], axis=1).astype(np.float32),
            landmarks=(face + points).astype(np.float32),
            valence_arousal=rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        )

    def images(self, manifest: Manifest, rows: Array) -> Iterator[Any]:
        """Noise; each image another one."""
        yield from np.random.default_rng(int(rows[0])).integers(0, 256, (len(rows), SIDE, SIDE), np.uint8)


def large(folder: Path, images: int, *words: str) -> ExpressionDataModule:
    """A set of so many images, its files written if need be, not opened yet.

    Args:
        folder: where all of it goes.
        images: how many.
        words: overrides, as on a command line.
    """
    root = folder / f"files-{images}"
    if not root.exists():
        for start in range(0, images, PER_FOLDER):
            place = root / f"{start // PER_FOLDER:04d}"
            place.mkdir(parents=True)
            for row in range(start, min(start + PER_FOLDER, images)):
                (place / f"{row:06d}.jpg").touch()
    config = composed("data=folder", f"data.root={root}", f"data.cache={folder}/store", "data.channels=1", *words)
    given = {**config.data, "store_size": SIDE, "class_names": None, "images": images}
    options = {key: value for key, value in given.items() if key not in ("_target_", "form")}
    for node in ("augment", "protocol"):
        options[node] = instantiate(options[node])
    return Noise(**options)


def first_batch(folder: Path, images: int, cores: int, resident: bool) -> Times:
    """Time a set from its folder to the first batch of training.

    Args:
        folder: see `large`.
        images: how many.
        cores: workers, where the set is not resident.
        resident: hold it in memory.
    """
    words = [f"data.resident={'yes' if resident else 'no'}", f"data.num_workers={cores}"]
    data = large(folder, images, *words)
    cpu, wall = cpu_now(), time.perf_counter()
    data.open()
    next(iter(data.train_dataloader()))
    return Times(cpu=cpu_now() - cpu, wall=time.perf_counter() - wall)


def memory_of(loader: WorkerLoader, batches: int) -> list[float]:
    """Megabytes that each worker shares with nobody and no file backs, after so many batches."""
    for _ in islice(loader, batches):
        pass
    sizes = []
    for worker in loader.loader._iterator._workers:  # type: ignore[union-attr]
        lines = Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()
        sizes += [int(line.split()[1]) / 1024 for line in lines if line.startswith("Private_Dirty:")]
    return sizes
