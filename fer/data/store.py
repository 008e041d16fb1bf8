"""The store: every image of a data set decoded once into one uint8 memory map, shared by all folds and jobs.

A store is a folder ``<cache>/<name>-<key>/`` with ``manifest.npz``, ``images.npy`` (N, S, S, C), ``windows.npy`` (the
part of its source each image shows), ``pixels.npy`` (a hash of each image's pixels) and ``bad.json`` (images that could
not be read). The key covers the source's stat
fingerprint, the reader's options and the size, so a changed source gets a new store. It is built under another name
and renamed when complete: a folder of the final name is always whole, and two jobs that start together build once.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from filelock import FileLock
from rich.progress import Progress

from fer.data.images import BadImage, window
from fer.data.manifest import Array, Manifest
from fer.errors import UserError
from fer.runs import sync

VERSION = 3  # raise when decoding, resizing or the files of a store change
CHUNK = 256
Reader = Callable[[Manifest, Array], Iterator[Array | BadImage]]

cv2.setNumThreads(0)


@dataclass(frozen=True)
class Store:
    """An opened store.

    Attributes:
        path: its folder.
        manifest: N images.
        images: (N, S, S, C) uint8 memory map, C = 1 or 3 (RGB).
        windows: (N, 4) int32 x, y, width, height of the part of the source image that was kept, in its pixels.
        copies: (N,) uint64 pixel hash; equal values are pixel-identical images.
        bad: unreadable images as (row, reason); their pixels are zero.
    """

    path: Path
    manifest: Manifest
    images: Array
    windows: Array
    copies: Array
    bad: tuple[tuple[int, str], ...]

    @property
    def usable(self) -> Array:
        """(N,) bool, False for unreadable images."""
        mask = np.ones(len(self.manifest), dtype=bool)
        mask[[row for row, _ in self.bad]] = False
        return mask


def stat_fingerprint(root: Path) -> str:
    """Hash of name, size and modification time of every file under ``root``; reads no content.

    Content hashes would cost minutes at every start; this is enough to notice a changed source.
    """
    digest = hashlib.sha256()
    folders, seen = [str(root)], set()
    while folders:
        folder = folders.pop()
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:  # a link back to a folder above
            continue
        seen.add((place.st_dev, place.st_ino))
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.path)
                    continue
                stat = entry.stat(follow_symlinks=entry.is_file())  # a broken link counts as itself
                name = os.fsencode(entry.path[len(str(root)) :])
                digest.update(name + f"|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def fit(image: Array, size: int, channels: int) -> Array:
    """(H, W) or (H, W, 3) uint8 of any size -> (size, size, channels) uint8.

    Shrinking averages areas, enlarging interpolates bilinearly; grey becomes three equal channels or colour becomes
    luma as ``channels`` asks.
    """
    if image.ndim == 3 and channels == 1:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    elif image.ndim == 2 and channels == 3:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    if image.shape[:2] != (size, size):
        shrinks = image.shape[0] > size or image.shape[1] > size
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return image.reshape(size, size, channels)


def pixel_hash(image: Array) -> int:
    """64-bit hash of an image's pixels and shape."""
    digest = hashlib.blake2b(
        np.ascontiguousarray(image).tobytes(), digest_size=8, person=str(image.shape).encode()[:16]
    )
    return int.from_bytes(digest.digest(), "little")


def open_store(
    cache: Path,
    name: str,
    key_parts: dict[str, Any],
    manifest: Callable[[], Manifest],
    read: Reader,
    sequential: bool,
    crop_to_box: bool = False,
) -> Store:
    """Open the store of a data set, building it when it is not there yet.

    Args:
        cache: folder of all stores.
        name: readable first part of the folder's name.
        key_parts: plain values that determine the content; ``size`` and ``channels`` among them.
        manifest: reads the data set's manifest.
        read: yields, for the given rows in order, each image at its own size, or the `BadImage` that explains why not.
        sequential: the source can only be read front to back, in one go.
        crop_to_box: keep only what lies in the manifest's face box, where an image has one.
    """
    key_parts = {**key_parts, "crop_to_box": crop_to_box, "version": VERSION}
    key = hashlib.sha256(json.dumps(key_parts, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"{name}-{key}"
    if not path.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}-{key}.lock"):
            if not path.is_dir():
                _build(path, manifest(), read, key_parts["size"], key_parts["channels"], sequential, crop_to_box)
    try:
        return Store(
            path=path,
            manifest=Manifest.load(path / "manifest.npz"),
            # Copy-on-write, so that torch gets a writable array and the file still never changes.
            images=np.load(path / "images.npy", mmap_mode="c", allow_pickle=False),
            windows=np.load(path / "windows.npy", allow_pickle=False),
            copies=np.load(path / "pixels.npy", allow_pickle=False),
            bad=tuple((int(row), str(why)) for row, why in json.loads((path / "bad.json").read_text())),
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the decoded images in {path} are damaged ({why}): remove that folder, it is made anew"
        ) from None


def _build(
    path: Path, manifest: Manifest, read: Reader, size: int, channels: int, sequential: bool, crop_to_box: bool
) -> None:
    """Decode everything into a folder beside ``path`` and rename it; the caller holds the lock."""
    unfinished = path.with_name(path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        _fill(unfinished, manifest, read, size, channels, sequential, crop_to_box)
        for file in (*unfinished.iterdir(), unfinished):
            sync(file)
        unfinished.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)  # it may be what fills the disk
        raise


def _fill(
    folder: Path, manifest: Manifest, read: Reader, size: int, channels: int, sequential: bool, crop_to_box: bool
) -> None:
    n = len(manifest)
    if not n:
        why = f", the first: {' '.join(manifest.skipped[0])}" if manifest.skipped else ""
        raise UserError(f"{manifest.form}: no image can be used{why}; check data.root and the lists in it")
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (n, size, size, channels))
    with (folder / "images.npy").open("rb+") as file:
        # Else, where the disk is full, a page of the map without a place on it would kill the process without a word.
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    windows = np.ones((n, 4), dtype=np.int32)
    copies = np.zeros(n, dtype=np.uint64)
    boxes = manifest.box if crop_to_box and manifest.box is not None else np.full((n, 4), np.nan)
    bad: list[tuple[int, str]] = []

    def decode(rows: Array) -> None:
        for row, image in zip(rows, read(manifest, rows), strict=True):
            if isinstance(image, BadImage):
                bad.append((int(row), image.reason))
                # No pixels to compare: every unreadable image is its own group.
                copies[row] = row
            else:
                x, y, width, height = windows[row] = window(image.shape[0], image.shape[1], boxes[row])
                image = image[y : y + height, x : x + width]
                copies[row] = pixel_hash(image)
                images[row] = fit(image, size, channels)
            progress.advance(task)

    step = max(n, 1) if sequential else CHUNK
    chunks = [np.arange(start, min(start + step, n)) for start in range(0, n, step)]
    # Threads suffice: Pillow and OpenCV release the interpreter lock while they decode and resize.
    with Progress(transient=True) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        task = progress.add_task(f"decoding {n:,} images once", total=n)
        list(pool.map(decode, chunks))
    images.flush()
    np.save(folder / "windows.npy", windows)
    np.save(folder / "pixels.npy", copies)
    (folder / "manifest.npz").write_bytes(manifest.to_bytes())
    (folder / "bad.json").write_text(json.dumps(sorted(bad)))
