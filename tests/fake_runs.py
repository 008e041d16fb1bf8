"""Run folders without training: the files fer/experiment.py, callbacks.py and at_test.py write, as they do.

Left out are checkpoints, pictures and W&B's record. `test_report.py` compares a fake folder with a real one key by key.
"""

import copy
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from conftest import TINY, composed
from omegaconf import OmegaConf

from fer.labels import BASIC_7
from fer.metrics import calibration_bins, confusion_counts, expected_calibration_error, scores
from fer.runs import write_json, write_text

PARTS = ("train", "val", "test")


@lru_cache
def _config(words: tuple[str, ...]) -> dict[str, Any]:
    plain = OmegaConf.to_container(composed(*words), resolve=True)
    assert isinstance(plain, dict)
    return plain


def set_at(node: dict[str, Any], name: str, value: Any) -> None:
    """Set one dotted name."""
    *parents, leaf = name.split(".")
    for parent in parents:
        node = node[parent]
    node[leaf] = value


def labels_of(n: int, classes: int, data: str) -> np.ndarray:
    """The same n labels for every run on a data set; common classes first."""
    rng = np.random.default_rng(int(hashlib.sha256(data.encode()).hexdigest()[:8], 16))
    share = np.linspace(2, 1, classes)
    return rng.choice(classes, n, p=share / share.sum())


def answer(label: np.ndarray, classes: int, accuracy: float, rng: np.random.Generator) -> np.ndarray:
    """(n, K) float32 probabilities of a model that is right in a share `accuracy` of the images."""
    other = (label + rng.integers(1, classes, len(label))) % classes
    top = np.where(rng.random(len(label)) < accuracy, label, other)
    logits = rng.normal(0, 0.5, (len(label), classes))
    logits[np.arange(len(label)), top] = logits.max(1) + rng.gamma(2.0, 0.8, len(label))
    odds = np.exp(logits)
    return (odds / odds.sum(1, keepdims=True)).astype(np.float32)


def write_run(
    folder: Path,
    *,
    words: Sequence[str] = TINY,
    settings: dict[str, Any] | None = None,
    model: str = "cbam_resnet",
    data: str = "synthetic",
    seed: int = 0,
    fold: int | None = None,
    images: int = 210,
    accuracy: float = 0.7,
    right: np.ndarray | None = None,
    classes: Sequence[str] | None = None,
    items: str = "test",
    stamps: Sequence[str] = (),
    selected_on: str = "val",
    status: str = "done",
    error: str | None = None,
    epochs: int = 4,
    split: str = "",
    store: str = "",
    images_per_person: int | None = None,
    more: dict[str, Any] | None = None,
) -> Path:
    """Write one run folder.

    Args:
        folder: where.
        words: overrides of the command line that the config is composed from.
        settings: dotted names of the config set afterwards.
        model, data: public names written into config and results.
        seed, fold: the run's.
        images: test images, or with a fold those of the pool.
        images_per_person: how many in a row show one; None: nobody is known.
        accuracy: share of right answers.
        right: (n,) which answers are right, instead of `accuracy`.
        classes: class names, the config's by default.
        items: first part of the items' names.
        stamps, selected_on, status, error: as recorded.
        epochs: rows of ``metrics.csv``.
        split: another word makes another split of the same protocol.
        store: name of the folder of decoded images.
        more: keys of ``results.json`` to replace.
    """
    plain = copy.deepcopy(_config(tuple(words)))
    plain |= {"seed": seed, "model_name": model, "data_name": data, "name": f"{data}-{model}"}
    plain["data"]["seed"] = seed
    names = list(classes or plain["data"]["class_names"] or BASIC_7)
    plain["data"]["class_names"] = plain["model"]["class_names"] = names
    folds = 1
    if fold is not None:
        for protocol in (plain["protocol"], plain["data"]["protocol"]):
            protocol["fold"] = fold
        folds = plain["protocol"]["folds"]
    for name, value in (settings or {}).items():
        set_at(plain, name, value)
    folder.mkdir(parents=True)
    write_text(folder / "config.yaml", "# The resolved config of this run.\n" + yaml.safe_dump(plain, sort_keys=False))
    identity = {"job_key": hashlib.sha256(str(plain).encode()).hexdigest()[:16], "wandb_id": "0" * 8}
    record = {"error": error, **identity, "command": "python -m fer.train", "code": "c" * 12, "status": status}
    write_json(folder / "status.json", record)

    rows = np.arange(images)[np.arange(images) % folds == (fold or 0)]
    label = labels_of(images, len(names), data)[rows]
    rng = np.random.default_rng([seed, fold or 0, int(hashlib.sha256(model.encode()).hexdigest()[:6], 16)])
    probabilities = answer(label, len(names), accuracy, rng)
    if right is not None:
        wrong = answer(label, len(names), 0.0, rng)
        probabilities = np.where(right[rows, None], answer(label, len(names), 1.0, rng), wrong)
    n = {"train": (images - len(rows) if folds > 1 else 3 * images), "val": images // 5, "test": len(rows)}
    parts = {"train": n["train"], "val": n["val"], "test": len(rows)}
    counts = {
        part: dict(
            zip(names, np.bincount(labels_of(size, len(names), data), minlength=len(names)).tolist(), strict=True)
        )
        for part, size in parts.items()
    }
    fingerprint = hashlib.sha256(f"{items}{images}{fold}{split}".encode()).hexdigest()[:16]
    before = {f"{b} images also in {a}": 0 for a, b in (("train", "val"), ("train", "test"), ("val", "test"))}
    facts = {
        "data": data,
        "form": "fake",
        "store": store,
        "counts": counts,
        "n": n,
        "count_differences": [],
        "skipped": {},
        "split": "official parts" if fold is None else f"fold {fold} of {folds} over all {images} images",
        "fold": fold,
        "drop_leaks": False,
        "copies_before_drop_leaks": before,
        "copies": before,
        "shared_subjects": {},
        "shared_sequences": {},
        "subjects": None,
        "warnings": [],
        "selected_on": selected_on,
        "stamps": list(stamps),
        "fingerprint": fingerprint,
    }
    lists = {"train": list(range(images, images + n["train"])), "val": [], "test": rows.tolist()}
    write_json(folder / "split.json", {**facts, "protocol": plain["protocol"], **lists})
    history = _history(names, epochs, accuracy, rng)
    write_text(folder / "metrics.csv", history.to_csv(index=False))
    if status != "done":
        return folder

    predicted = probabilities.argmax(1)
    table = pd.DataFrame({"index": rows, "item": [f"{items}/{row:06d}" for row in rows]})
    table["subject"] = "" if images_per_person is None else [f"S{row // images_per_person:03d}" for row in rows]
    table["label"], table["predicted"] = np.array(names)[label], np.array(names)[predicted]
    for place, name in enumerate(names):
        table[name] = probabilities[:, place]
    write_text(folder / "predictions.csv", table.to_csv(index=False, float_format="%.9g"))
    confusion = {part: confusion_counts(label, predicted, len(names)) for part in ("val", "test")}
    for part, matrix in confusion.items():
        content = {"part": part, "class_names": names, "counts": matrix.tolist(), "rows": "labels", "stamps": [*stamps]}
        write_json(folder / f"confusion_{part}.json", content)
    test = scores(confusion["test"], names)
    nll = float(-np.log(probabilities[np.arange(len(label)), label].astype(np.float64)).mean())
    test |= {"loss": nll, "nll": nll, "ece": expected_calibration_error(calibration_bins(probabilities, label, 15))}
    best = int(history["val/mean_acc"].argmax())
    val = {
        name.removeprefix("val/"): value for name, value in history.iloc[best].items() if str(name).startswith("val/")
    }
    results = {
        "name": plain["name"],
        "model": model,
        "data": data,
        "protocol": plain["protocol"],
        "fold": fold,
        "seed": seed,
        "classes": names,
        "n": n,
        "selected_on": selected_on,
        "best_epoch": best,
        "epochs": epochs,
        "metrics": {"val": val, "test": test},
        "confusion": {part: matrix.tolist() for part, matrix in confusion.items()},
        "tta": plain["data"]["tta"],
        "stamps": list(stamps),
        "weights": "random",
        "data_facts": facts,
        "split_fingerprint": fingerprint,
        "job_key": identity["job_key"],
        "code_version": "c" * 12,
        "git_commit": None,
        "versions": {"python": "3.11.0"},
        "parameters": 78612,
        "forward_flops": 16753808,
        "images_per_second": {"train": 90.0 + seed, "test": 300.0},
        "detection_seconds_per_image": None,
        "seconds": 60.0 + seed,
        "cpu_seconds": 55.0 + seed,
        "device": "cpu",
        "machine": {"cpu": "a processor", "cores": 2, "system": "Linux", "accelerators": []},
        "precision": "32-true",
        "threads": 1,
        "resident": True,
        "resumed_from_step": None,
        "steps": 10 * epochs,
        "command": "python -m fer.train",
    }
    write_json(folder / "results.json", results | (more or {}))
    return folder


def _history(names: Sequence[str], epochs: int, accuracy: float, rng: np.random.Generator) -> pd.DataFrame:
    """Curves that climb to about the accuracy."""
    epoch = np.arange(epochs)
    climb = 1 - 0.8 * np.exp(-3 * (epoch + 1) / epochs)
    table = pd.DataFrame({"epoch": epoch, "step": 10 * (epoch + 1), "lr": 0.1 * (1 - epoch / epochs)})
    table["val/acc"] = accuracy * climb + rng.normal(0, 0.01, epochs)
    for name in ("macro_f1", *(f"acc_{name}" for name in names)):
        table[f"val/{name}"] = table["val/acc"] - 0.02
    table["val/loss"] = 2 - 1.4 * climb + rng.normal(0, 0.02, epochs)
    table["val/nll"] = table["val/loss"]
    table["val/ece"] = 0.05
    table["val/mean_acc"] = table["val/acc"] - 0.02
    table["train/acc"] = table["val/acc"] + 0.06 * climb
    table["train/loss"] = table["val/loss"] - 0.3 * climb
    return table
