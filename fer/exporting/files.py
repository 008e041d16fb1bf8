"""Exports of a run: which files they are, and what was measured on the way."""

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from fer.data.base import ExpressionDataModule
from fer.data.manifest import Part
from fer.errors import UserError
from fer.evaluation.calibration import fit_temperature, kept_calibration
from fer.explanation.crops import inputs, opened
from fer.exporting.graph import (
    TOLERANCE,
    Answering,
    Answers,
    answers_of,
    describe,
    export_graph,
    largest_difference,
    session_of,
)
from fer.machine import machine
from fer.metrics import Array
from fer.runs import write_json, write_text
from fer.trained import TrainedRun

RECORD, TABLE = "export.json", "export.md"


@dataclass(frozen=True)
class Options:
    """The values of ``conf/export.yaml``, where they are explained."""

    answers: Answers
    int8: bool
    licence: str | None
    crops: int
    calibration: int
    repeats: int
    seed: int
    root: str | None


def temperature_of(run: TrainedRun) -> float | None:
    """The temperature for one view of an image, where ``python -m fer.evaluate`` has calibrated this checkpoint.

    One that was fitted to the mean of several views does not fit a single one; the validation part is then read again.
    """
    kept = kept_calibration(run)
    if kept is not None and kept.tta != "none":
        kept = fit_temperature(run, "none")
    return None if kept is None else kept.temperature


def preprocessing_of(run: TrainedRun) -> dict[str, Any]:
    """What stands between an aligned uint8 crop and the network."""
    data = run.config.data
    return {
        "image_size": run.module.image_size,
        "store_size": int(data.store_size),
        "channels": int(data.channels),
        "crop_pct": float(data.augment.crop_pct),
        "mean": run.module.mean,
        "std": run.module.std,
    }


def facts_of(run: TrainedRun, licence: str | None) -> dict[str, Any]:
    """Where the weights come from."""
    results = run.results
    names = ("model", "data", "protocol", "selected_on", "stamps", "weights", "seed", "code_version", "git_commit")
    metrics = {key: results["metrics"]["test"][key] for key in ("acc", "mean_acc", "macro_f1", "ece")}
    return {name: results[name] for name in names} | {
        "test": {"n": results["n"]["test"], **metrics},
        "license": licence,
    }


# -- ONNX -------------------------------------------------------------------------------------------------------------


def export_onnx(run: TrainedRun, output: Path, options: Options) -> list[Path]:
    """Write ``model.onnx``, with ``int8`` also ``model.int8.onnx`` and its costs, and what was measured.

    Raises:
        UserError: the data is not where it was, or the graph does not answer as PyTorch does.
    """
    data = opened(run, options.root)
    path = output / "model.onnx"
    temperature = temperature_of(run)
    network: torch.nn.Module = run.module.network
    if options.answers == "probabilities":
        network = Answering(network, temperature or 1.0).eval()
    export_graph(network, run.module.image_size, path, options.answers)
    facts = _onnx_facts(run, options, temperature)
    describe(path, facts)
    test = _some(data.split.test, options.crops, options.seed)
    difference = largest_difference(network, session_of(path), inputs(run, data, test))
    record = {
        "run": run.results["name"],
        **facts,
        "format": "onnx",
        "file": path.name,
        "bytes": path.stat().st_size,
        "check": {"crops": len(test), "part": "test", "largest_difference": difference, "tolerance": TOLERANCE},
    }
    if not difference < TOLERANCE:
        write_json(output / RECORD, record)
        raise UserError(
            f"{path} differs from PyTorch by {difference:.2g} on {len(test)} test crops, {TOLERANCE} at most was "
            "expected: do not use it"
        )
    written = [path]
    (output / "model.int8.onnx").unlink(missing_ok=True)  # of an earlier export
    if options.int8:
        written.append(output / "model.int8.onnx")
        record["int8"] = _quantised(run, data, network, path, written[-1], facts, options)
        write_text(output / TABLE, int8_table(record))
        written.append(output / TABLE)
    write_json(output / RECORD, record | _cost())
    return [*written, output / RECORD]


def _onnx_facts(run: TrainedRun, options: Options, temperature: float | None) -> dict[str, Any]:
    own = preprocessing_of(run)
    crop = round(own["store_size"] * own["crop_pct"])
    before = (
        f"image: float32 (batch, 3, {own['image_size']}, {own['image_size']}), RGB. A face aligned as in training, "
        f"{own['store_size']}x{own['store_size']} pixels with {own['channels']} channel(s); its central {crop}x{crop} "
        "pixels, resized (bilinear, antialiased) where that is another size; grey repeated as R, G and B; divided by "
        "255; minus mean, divided by std"
    )
    after = {
        "logits": "logits (batch, classes): divide by temperature where it is not null, then softmax",
        "probabilities": "probabilities (batch, classes), softmax done, calibrated where temperature is not null",
    }[options.answers]
    return {
        "preprocessing": before,
        "postprocessing": after,
        "answers": options.answers,
        **own,
        "class_names": run.module.class_names,
        "temperature": temperature,
        **facts_of(run, options.licence),
    }


def _cost() -> dict[str, Any]:
    """The command of this process, and what it took and where so far."""
    return {
        "command": shlex.join(["python", "-m", "fer.export", *sys.argv[1:]]),
        "cpu_seconds": time.process_time(),
        "machine": machine() | {"accelerators": []},
        "threads": torch.get_num_threads(),
    }


def _quantised(
    run: TrainedRun,
    data: ExpressionDataModule,
    network: torch.nn.Module,
    path: Path,
    target: Path,
    facts: dict[str, Any],
    options: Options,
) -> dict[str, Any]:
    from fer.exporting.int8 import cost, interleaved, quantise

    part: Part = "val" if run.results["selected_on"] == "val" else "train"
    shown = _some(data.split.part(part), options.calibration, options.seed)
    method = quantise(path, target, inputs(run, data, shown).numpy())
    describe(target, {**facts, "quantisation": f"{method}, int8"})
    whole, small = session_of(path), session_of(target)
    rows = np.sort(data.split.test)
    before, after = (_answers(run, data, rows, session) for session in (whole, small))
    image = inputs(run, data, rows[:1])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        times = interleaved(
            {
                "PyTorch float32": lambda: network(image),
                "ONNX float32": lambda: answers_of(whole, image.numpy()),
                "ONNX int8": lambda: answers_of(small, image.numpy()),
            },
            options.repeats,
        )
    torch.set_num_threads(threads)
    return {
        "file": target.name,
        "bytes": target.stat().st_size,
        "method": method,
        "calibration": {"part": part, "crops": len(shown)} if method == "static" else None,
        "test": cost(
            before,
            after,
            data.label[rows],
            data.store.manifest.person[rows],
            run.module.class_names,
            options.seed,
        ),
        "milliseconds": {"batch": 1, "threads": 1, "repeats": options.repeats, **times},
    }


def int8_table(record: dict[str, Any]) -> str:
    """Size, accuracy and speed side by side, as Markdown."""
    own, test, times = record["int8"], record["int8"]["test"], record["int8"]["milliseconds"]

    def line(name: str, size: int | None, scores: dict[str, float] | None) -> str:
        median, low, high = (times[name][key] for key in ("median", "low", "high"))
        acc = (f"{100 * scores['acc']:.2f} %", f"{100 * scores['mean_acc']:.2f} %") if scores else ("", "")
        spread = f"{median:.2f} ({low:.2f} to {high:.2f})"
        return f"| {name} | {f'{size / 1e6:.2f} MB' if size else ''} | {acc[0]} | {acc[1]} | {spread} |"

    low, high = (100 * value for value in test["interval"])
    how = f"{own['method']} quantisation"
    if own["calibration"]:
        how += f", ranges from {own['calibration']['crops']} crops of the {own['calibration']['part']} part"
    return "\n".join(
        [
            "| | file | accuracy | mean class | ms per image |",
            "|---|---|---|---|---|",
            line("PyTorch float32", None, None),
            line("ONNX float32", record["bytes"], test["before"]),
            line("ONNX int8", own["bytes"], test["after"]),
            "",
            f"{record['model']} on {record['data']}, n = {test['n']:,} test images, one view each; {how}. int8 minus "
            f"float32: {100 * test['difference']:+.2f} points of accuracy (95 % interval {low:+.2f} to {high:+.2f}, "
            f"paired bootstrap; McNemar p = {test['p']:.2g}); {100 * test['same']:.1f} % of the images are named "
            f"alike. Milliseconds of one processor thread, batch of one: median (quartiles) of {times['repeats']} "
            "turns, interleaved.",
            "",
        ]
    )


# -- safetensors ------------------------------------------------------------------------------------------------------


def export_safetensors(run: TrainedRun, output: Path, options: Options) -> list[Path]:
    """Write ``model.safetensors``, ``config.json`` and the model card ``README.md``.

    Raises:
        UserError: the run's predictions are not at hand for the card.
    """
    from fer.exporting.card import model_card
    from fer.hub import ExportedModel

    assert options.licence is not None
    if options.root is not None:
        run.config.data.root = options.root
    preprocessing, temperature = preprocessing_of(run), temperature_of(run)
    card = model_card(run, preprocessing, temperature, options.licence)
    model = OmegaConf.to_container(run.config.model, resolve=True)
    about = facts_of(run, options.licence)
    exported = ExportedModel(model=model, preprocessing=preprocessing, temperature=temperature, about=about)  # type: ignore[arg-type]
    exported.network.load_state_dict(run.module.network.state_dict())
    write_text(output / "README.md", str(card))
    exported.save_pretrained(output)
    names = ("model.safetensors", "config.json", "README.md")
    written = [output / name for name in names]
    record = {"run": run.results["name"], "format": "safetensors", **about, "bytes": written[0].stat().st_size}
    write_json(output / RECORD, record)
    return [*written, output / RECORD]


# -- crops ------------------------------------------------------------------------------------------------------------


def _some(rows: Array, count: int, seed: int) -> Array:
    chosen = np.random.default_rng(seed).choice(rows, min(count, len(rows)), replace=False)
    return np.sort(chosen)


def _answers(run: TrainedRun, data: ExpressionDataModule, rows: Array, session: Any) -> Array:
    batches = (rows[start : start + 256] for start in range(0, len(rows), 256))
    return np.concatenate([answers_of(session, inputs(run, data, batch).numpy()) for batch in batches])
