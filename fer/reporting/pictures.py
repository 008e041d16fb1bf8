"""Photographs in the report: the most confidently wrong images of a group, and what its first run found in some."""

import base64
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from fer.metrics import Array
from fer.reporting.collect import Run
from fer.reporting.groups import Group

SIDE = 96  # px, the largest thumbnail
FOUND = ("detections", "regions")  # pictures a run draws of the faces and regions it finds; see fer/detections.py
WIDTH = 1200  # px, of those pictures in the page


@dataclass(frozen=True)
class Wrong:
    """One image that a group's runs are sure of and wrong about.

    Attributes:
        item: its path, or its row in a table.
        label: its class.
        predicted: what the most confident wrong run says.
        confidence: probability given to wrong classes, averaged over the runs that tested it (0 where right).
        wrong, tested: how many runs are wrong, and how many tested it.
        thumbnail: a PNG in base64, empty where no store gives it.
    """

    item: str
    label: str
    predicted: str
    confidence: float
    wrong: int
    tested: int
    thumbnail: str


def most_wrong(group: Group, count: int, stores: Sequence[Path], thumbnails: bool) -> list[Wrong]:
    """The images of a group with the highest mean confidence in a wrong class.

    Args:
        group: a group with finished runs.
        count: how many.
        stores: folders of decoded images to look in besides the one a run names.
        thumbnails: show the images too.
    """
    answers = [(run, run.answers) for run in group.runs if run.answers is not None]
    image, place = np.unique(np.concatenate([a.image for _, a in answers]), return_inverse=True)
    is_wrong = np.concatenate([a.label != a.predicted for _, a in answers])
    sure = np.concatenate([a.confidence for _, a in answers]) * is_wrong
    tested, wrong = np.bincount(place), np.bincount(place, is_wrong)
    score = np.bincount(place, sure) / tested
    # Of each run only its surest errors are at hand by name; an image high on average is among them in some run.
    named = pd.concat([a.wrong.assign(run=number) for number, (_, a) in enumerate(answers)], ignore_index=True)
    named = named.sort_values("confidence", ascending=False, kind="stable").drop_duplicates("image")
    at = np.searchsorted(image, named["image"].to_numpy())
    named = named.assign(score=score[at], wrong=wrong[at], tested=tested[at])
    out = []
    for row in named.sort_values(["score", "item"], ascending=[False, True]).head(count).to_dict("records"):
        picture = _thumbnail(answers[row["run"]][0], int(row["index"]), row["item"], stores) if thumbnails else ""
        whom = (str(row["item"]), str(row["label"]), str(row["predicted"]))
        out.append(Wrong(*whom, float(row["score"]), int(row["wrong"]), int(row["tested"]), picture))
    return out


def pictures_found(group: Group) -> dict[str, bytes]:
    """The pictures of faces and regions found by the first run of a group that drew some, as PNG by their name."""
    out = {}
    for name in FOUND:
        for run in group.runs:
            try:
                with Image.open(run.path / f"{name}.png", formats=["PNG"]) as picture:
                    picture.thumbnail((WIDTH, WIDTH))
                    content = io.BytesIO()
                    picture.convert("RGB").quantize(256).save(content, format="png", optimize=True)
            except (OSError, ValueError, Image.DecompressionBombError):  # missing or damaged
                continue
            out[name] = content.getvalue()
            break
    return out


def _thumbnail(run: Run, row: int, item: str, stores: Sequence[Path]) -> str:
    """The image in a store as PNG in base64; empty where no store has it under this row and name."""
    name = (run.results.get("data_facts") or {}).get("store")
    if not name:
        return ""
    for folder in (Path(str((run.config.get("data") or {}).get("cache") or ".")), *stores):
        images, items = _store(folder / Path(str(name)).name)
        if row < len(items) and items[row] == item:
            pixels = np.array(images[row])
            picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            picture.thumbnail((SIDE, SIDE))
            content = io.BytesIO()
            picture.save(content, format="png", optimize=True)
            return base64.b64encode(content.getvalue()).decode()
    return ""


@lru_cache(maxsize=4)
def _store(folder: Path) -> tuple[Array, Array]:
    """Images as a memory map and their items; empty where there is no such store."""
    try:
        with np.load(folder / "manifest.npz", allow_pickle=False) as manifest:
            items = manifest["item"]
        return np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False), items
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return np.empty(0), np.empty(0, dtype=str)
