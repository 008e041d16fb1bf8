"""What is wrong with a data set on disk, found in one pass that keeps a hash and a thumbnail of each image.

Pixels count as the store takes them, before resizing: whole images, or the face box of sets that are cut to it. Images
of classes that ``data.class_names`` leaves out are not looked at.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.progress import Progress

from fer.data.base import ExpressionDataModule
from fer.data.duplicates import Report, copies, part_names
from fer.data.images import NO_FILE, BadImage, subfolders, window
from fer.data.manifest import Array, Manifest
from fer.data.near_duplicates import SIDE, thumbnail
from fer.data.splits import PAIRS
from fer.data.store import CHUNK, pixel_hash
from fer.data.tables import plain_name
from fer.errors import UserError

FIXED = 0.9  # share of the images that makes a size or mode the form's own
SMALL = 16  # px; a shorter side shows no face
FLAT = 2.0  # grey levels; a smaller standard deviation shows none either
TABLES = (".csv", ".tsv", ".txt", ".json")  # hashed where they lie at most two folders below the root,
FEW = 20  # and not more in one folder, where each would be about one image


@dataclass(frozen=True)
class Seen:
    """What is kept of N images.

    Attributes:
        pixels: (N,) uint64, equal for pixel-identical images.
        thumbnails: (N, SIDE, SIDE) uint8.
        size: (N, 2) int32, width and height of the whole image; 0 where it cannot be read.
        colour: (N,) bool, three channels rather than one.
        spread: (N,) float32, largest standard deviation of a channel in grey levels; 0 exactly where constant.
        bad: row and reason of each image that cannot be read.
    """

    pixels: Array
    thumbnails: Array
    size: Array
    colour: Array
    spread: Array
    bad: dict[int, str]

    @property
    def readable(self) -> Array:
        """(N,) bool."""
        return self.size[:, 0] > 0


def inspect(data: ExpressionDataModule) -> Report:
    """Read a data set from end to end and report on it.

    Args:
        data: the data set; its store is neither read nor built.

    Returns:
        Plain values. Parts are ``train``, ``val``, ``test``, or ``all`` where there is no official split.

        - ``title``, ``form``, ``root`` (null where nothing is on disk), ``classes``;
        - ``counts`` and ``official`` {part: {class: images}}, ``count_differences``: of items whose file exists;
        - ``skipped``, ``unreadable``, ``unusual`` [{item, reason}], ``constant`` [{item}];
        - ``size`` [width, height] and ``mode``: those of nearly all images, or null;
        - ``duplicates``, ``conflicts``, ``near_duplicates``, ``near_across``: see `fer.data.duplicates.copies`;
        - ``subjects`` and ``folds``: how many, or null; ``shared`` {where: how many stand on both sides};
        - ``warnings``: sentences of the reader; ``findings``: what makes the set other than clean;
        - ``readable``: images; ``sha256`` {list: hash}; ``content_sha256``: of all items, labels and pixels.

    Raises:
        UserError: the data is missing, or the form that was found holds no image.
    """
    data.check_root()
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task("reading the lists", total=None)
        manifest, warnings = _wanted(data)
        progress.update(task, description=f"reading {len(manifest):,} images", total=len(manifest))
        seen = look(data, manifest, lambda: progress.advance(task))
        progress.update(task, description="comparing them", total=None, completed=0)
        missing = {row for row, reason in seen.bad.items() if reason == NO_FILE}
        there = np.array([row not in missing for row in range(len(manifest))], dtype=bool)
        counted = manifest.select(there) if missing else manifest
        counts = _counts(counted, data.wanted_classes or list(manifest.class_names))
        report = {
            "title": data.title,
            "form": manifest.form,
            "root": str(Path(data.root).absolute()) if data.on_disk else None,
            **counts,
            "skipped": _listed([*manifest.skipped, *((manifest.item[row], NO_FILE) for row in sorted(missing))]),
            "unreadable": _listed(
                (manifest.item[row], reason) for row, reason in sorted(seen.bad.items()) if row not in missing
            ),
            "constant": [{"item": str(item)} for item in manifest.item[seen.readable & (seen.spread == 0)]],
            **_unusual(manifest, seen),
            **copies(manifest, np.flatnonzero(seen.readable), seen.pixels, seen.thumbnails),
            **_people(counted),
            "warnings": [*manifest.warnings, *manifest.stamps, *warnings, *_empty_classes(counts["counts"])],
            "readable": int(seen.readable.sum()),
            "sha256": _table_hashes(Path(data.root)) if data.on_disk else {},
            "content_sha256": _content_hash(manifest, seen),
        }
    return report | {"findings": findings(report)}


def _wanted(data: ExpressionDataModule) -> tuple[Manifest, list[str]]:
    """The manifest without the classes that ``class_names`` leaves out, and a warning about each of them."""
    # Only what is reported on is kept: the landmarks of a large set are hundreds of megabytes.
    kept = ("subject", "sequence", "fold", "box", "official")
    needless: dict[str, Any] = {
        field.name: None for field in dataclasses.fields(Manifest) if field.default is None and field.name not in kept
    }
    manifest = dataclasses.replace(data.manifest(), attributes={}, **needless)
    wanted = data.wanted_classes or list(manifest.class_names)
    counts = np.bincount(manifest.label, minlength=len(manifest.class_names))
    left_out = [(name, n) for name, n in zip(manifest.class_names, counts, strict=True) if name not in wanted and n]
    warnings = [f"{name}: {n:,} images, not looked at since data.class_names leaves them out" for name, n in left_out]
    if left_out:
        manifest = manifest.select(np.isin(np.array(manifest.class_names)[manifest.label], wanted))
    if not len(manifest):
        first = f" ({', '.join(manifest.skipped[0])})" if manifest.skipped else ""
        raise UserError(
            f"{data.title}, {manifest.form}: no image of {', '.join(wanted)} among {sum(n for _, n in left_out):,} "
            f"images, and {len(manifest.skipped):,} items left out{first}; mend the files or set data.root"
        )
    return manifest, warnings


def look(data: ExpressionDataModule, manifest: Manifest, advance: Callable[[], None]) -> Seen:
    """Read every image once, by threads where the source allows; ``advance`` is called for each."""
    n = len(manifest)
    boxes = manifest.box if data.crop_to_box else None
    seen = Seen(
        pixels=np.zeros(n, dtype=np.uint64),
        thumbnails=np.zeros((n, SIDE, SIDE), dtype=np.uint8),
        size=np.zeros((n, 2), dtype=np.int32),
        colour=np.zeros(n, dtype=bool),
        spread=np.zeros(n, dtype=np.float32),
        bad={},
    )

    def read(rows: Array) -> None:
        for row, image in zip(rows.tolist(), data.images(manifest, rows), strict=True):
            if isinstance(image, BadImage):
                seen.bad[row] = image.reason
            else:
                seen.size[row] = image.shape[1::-1]
                seen.colour[row] = image.ndim == 3
                if boxes is not None:
                    x, y, width, height = window(image.shape[0], image.shape[1], boxes[row])
                    image = image[y : y + height, x : x + width]
                seen.pixels[row] = pixel_hash(image)
                seen.thumbnails[row] = thumbnail(image)
                seen.spread[row] = _spread(image)
            advance()

    step = n if data.sequential else CHUNK
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(read, (np.arange(start, min(start + step, n)) for start in range(0, n, step))))
    return seen


def _spread(image: Array) -> float:
    spread = float(cv2.meanStdDev(image)[1].max())
    # Rounding leaves a constant image a little spread, and only equal pixels are constant.
    return spread if spread > 1 else 0.0 if (image == image[0, 0]).all() else max(spread, 1e-3)


def _listed(entries: Any) -> list[dict[str, str]]:
    return [{"item": str(item), "reason": reason} for item, reason in entries]


def _counts(manifest: Manifest, classes: list[str]) -> Report:
    """Counts beside the official ones, both of the wanted classes only."""
    official = {
        part: {name: counts[name] for name in classes if name in counts}
        for part, counts in (manifest.official or {}).items()
    }
    found = manifest.counts()
    return {
        "classes": classes,
        "counts": {part: {name: counts.get(name, 0) for name in classes} for part, counts in found.items()},
        "official": official,
        "count_differences": dataclasses.replace(manifest, official=official).count_differences(),
    }


def _empty_classes(counts: dict[str, dict[str, int]]) -> list[str]:
    absent = {part: [name for name, n in classes.items() if not n] for part, classes in counts.items()}
    return [f"{part} has no image of {', '.join(names)}" for part, names in absent.items() if names]


def _unusual(manifest: Manifest, seen: Seen) -> Report:
    """Images whose size or mode differs from that of nearly all, and those too small or flat to show a face."""
    size = _common(seen.size[seen.readable])
    mode = _common(seen.colour[seen.readable, None])
    other_size = np.zeros(len(manifest), dtype=bool) if size is None else (seen.size != size).any(1)
    other_mode = np.zeros(len(manifest), dtype=bool) if mode is None else seen.colour != mode[0]
    flat = (seen.spread > 0) & (seen.spread < FLAT)
    words = {False: "grey", True: "colour"}
    unusual = []
    for row in np.flatnonzero(seen.readable & (other_size | other_mode | flat | (seen.size.min(1) < SMALL))).tolist():
        width, height = seen.size[row].tolist()
        reasons = []
        if other_size[row] or min(width, height) < SMALL:
            reasons.append(f"{width} x {height} pixels" + (f", the others {size[0]} x {size[1]}" if size else ""))
        if mode and other_mode[row]:
            reasons.append(f"{words[bool(seen.colour[row])]}, the others {words[mode[0]]}")
        if flat[row]:
            reasons.append(f"nearly constant, standard deviation {seen.spread[row]:.2f} grey levels")
        unusual.append((manifest.item[row], "; ".join(reasons)))
    return {"size": size, "mode": mode and words[mode[0]], "unusual": _listed(unusual)}


def _common(values: Array) -> list[Any] | None:
    """The row that at least `FIXED` of the (N, C) rows are equal to, if any."""
    if not len(values):
        return None
    unique, counts = np.unique(values, axis=0, return_counts=True)
    common: list[Any] = unique[counts.argmax()].tolist()
    return common if counts.max() >= FIXED * len(values) else None


def _people(manifest: Manifest) -> Report:
    """People and videos that stand on both sides of the official parts or of the customary folds."""
    shared = {}
    part = part_names(manifest)
    for what, names in (("subjects", manifest.subject), ("sequences", manifest.sequence)):
        if names is None:
            continue
        for a, b in PAIRS:
            shared[f"{what} in {a} and {b}"] = len(np.intersect1d(names[part == a], names[part == b]))
        if manifest.fold is not None:
            number = np.unique(names, return_inverse=True)[1]
            in_folds = np.unique(np.stack([number, manifest.fold], axis=1), axis=0)
            shared[f"{what} in several folds"] = int((np.bincount(in_folds[:, 0]) > 1).sum())
    return {
        "subjects": None if manifest.subject is None else len(np.unique(manifest.subject)),
        "folds": None if manifest.fold is None else len(np.unique(manifest.fold)),
        "shared": {where: n for where, n in shared.items() if n},
    }


def _table_hashes(root: Path) -> dict[str, str]:
    """SHA-256 of the lists the labels come from, by path relative to the root."""
    folders = [root, *subfolders(root)]
    folders += [below for folder in folders[1:] for below in subfolders(folder)]
    out = {}
    for folder in folders:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if plain_name(Path(e.name)).lower().endswith(TABLES) and e.is_file()]
        for path in (folder / name for name in sorted(names) if not name.startswith(".") and len(names) <= FEW):
            with path.open("rb") as file:
                out[path.relative_to(root).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return out


def _content_hash(manifest: Manifest, seen: Seen) -> str:
    """SHA-256 over item, part, class and pixels of every image, whatever their order: equal for equal copies."""
    digest = hashlib.sha256()
    for row in np.argsort(manifest.item).tolist():
        item, part, name = manifest.item[row], manifest.split[row], manifest.class_names[manifest.label[row]]
        digest.update(f"{item}\t{part}\t{name}\t{seen.pixels[row]:016x}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def findings(report: Report) -> list[str]:
    """What makes a data set other than clean, and how often."""
    duplicates, conflicts = report["duplicates"], report["conflicts"]
    counted = [
        ("counts that differ from the official ones", len(report["count_differences"])),
        ("items left out", len(report["skipped"])),
        ("unreadable images", len(report["unreadable"])),
        ("constant images", len(report["constant"])),
        ("images of unusual size, mode or contrast", len(report["unusual"])),
        ("exact duplicates", duplicates["excess"]),
        (f"identical images with different labels ({conflicts['groups']:,} groups)", conflicts["images"]),
        *report["shared"].items(),
    ]
    return [f"{what}: {n:,}" for what, n in counted if n]
