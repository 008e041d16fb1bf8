"""One run from a composed config to a complete run folder: pre-flight, data, training, one test, results."""

import contextlib
import math
import statistics
import time
from pathlib import Path
from typing import Any

# Before torch: W&B's start needs it, and pydantic (Python < 3.13) looks through every loaded module for its classes.
import wandb.apis.public  # noqa: F401 - 0.3 s here, 1.7 s after torch

# isort: split
import lightning
import torch
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from rich.table import Table

from fer.at_test import Predictions, WandbPictures, stamps_of
from fer.callbacks import Randomness, Recorder, measure_flops
from fer.checkpoints import load_best, resume_point
from fer.config import several_devices
from fer.data.base import ExpressionDataModule
from fer.detections import Detections, RegionPicture
from fer.errors import UserError
from fer.loggers import Wandb
from fer.machine import accelerators, machine
from fer.metrics import sequence_scores
from fer.models.averaging import WeightAverage
from fer.models.base import ExpressionModule
from fer.models.detection import FaceDetector
from fer.models.multiscale_region import MultiscaleRegion
from fer.progress import progress
from fer.runs import RunFolder, code_version, git_commit, read_json, versions, write_json
from fer.session import (
    claim,
    compile_parts,
    console,
    preflight,
    print_data,
    protect,
    record_of,
    set_threads,
    status_kept,
)
from fer.starting import begin_with, options_with, pinned
from fer.stopping import Patience, Ranks, Stop, Stopped
from fer.trainer import Trainer, quieten


def run_experiment(config: DictConfig, folder_path: Path, *, command: str = "", resumed: bool = False) -> float:
    """Train, test once on the validation-best checkpoint, and write everything into the run folder.

    Args:
        config: composed config (``conf/train.yaml``).
        folder_path: the run folder; an unfinished run of the same job key in it is continued.
        command: what starts this run again, for the record; a resumed run has it.
        resumed: the config is the folder's own, so the folder's run is continued whatever the code version.

    Returns:
        The best value of the validation monitor; never a test value.

    Raises:
        UserError: anything the user can mend, all problems of the config at once.
    """
    folder = RunFolder(folder_path.absolute())
    quieten()
    data = preflight(config)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    # Lightning starts a process for each further device of a run; the first one keeps the books.
    follower = several_devices(config.trainer) and rank_zero_only.rank > 0  # type: ignore[attr-defined]
    if not follower:
        console().print(f"run folder: {folder.path}", soft_wrap=True, highlight=False)
    data.open()
    facts = data.facts()
    config.data.class_names = data.class_names  # all of them where none was named, in the data's spelling
    architecture = get_class(config.model._target_)
    if config.start_from is not None:
        config.start_from = pinned(config.start_from)
    if issubclass(architecture, ExpressionModule):
        found = architecture.from_data(config.model, data)
        if config.start_from is not None and found:
            found = options_with(config.start_from, found)
        for option, value in found.items():
            config.model[option] = value
    if not follower:
        print_data(facts)
    plain = record_of(config)
    if follower:
        config.logger = None
        with contextlib.suppress(Stopped), Stop() as stop:  # the first process ends with its exit code
            return _train_and_test(config, plain, folder, data, facts, folder.has_checkpoint(), "", [], stop)
        return math.nan
    state, run_id = claim(folder, config, plain, data, facts, command, resumed)
    if state == "done":
        results = read_json(folder.results)
        return float(results["metrics"]["val"][results["monitor"]])
    loggers: list[Wandb] = []
    with status_kept(folder, loggers) as stop:
        return _train_and_test(config, plain, folder, data, facts, state == "unfinished", run_id, loggers, stop)


def watchers(config: DictConfig, folder: RunFolder, module: ExpressionModule, stop: Stop) -> list[Callback]:
    """The callbacks of a training, in the order in which they act; each costs every step some, whatever it does."""
    average = WeightAverage(config.trainer.weight_ema) if config.trainer.weight_ema is not None else None
    recorder = Recorder(folder, config.trainer.checkpoint_minutes, config.trainer.checkpoint_steps, stop, average)
    mixing = instantiate(config.mix)
    # Randomness comes before what draws from it.
    callbacks = [Randomness(config.seed), *([mixing] if mixing.transforms else []), *([average] if average else [])]
    callbacks += [recorder, *([Ranks(folder, stop)] if several_devices(config.trainer) else [])]
    if config.trainer.patience is not None:
        callbacks.append(Patience(module.monitor, patience=config.trainer.patience, mode="max"))
    if config.trainer.enable_progress_bar:
        callbacks.append(progress())
    return callbacks


def examiners(folder: RunFolder, module: ExpressionModule, recorder: Recorder) -> list[Callback]:
    """The callbacks that the test has besides."""
    predictions = Predictions(folder)
    callbacks: list[Callback] = [predictions, WandbPictures(folder, predictions, recorder)]
    if isinstance(module, FaceDetector) and module.detection:
        callbacks.append(Detections(folder))
    if isinstance(module, MultiscaleRegion) and module.rois != "none":
        callbacks.append(RegionPicture(folder))
    return callbacks


def _train_and_test(
    config: DictConfig,
    plain: dict[str, Any],
    folder: RunFolder,
    data: ExpressionDataModule,
    facts: dict[str, Any],
    unfinished: bool,
    run_id: str,
    loggers: list[Wandb],
    stop: Stop,
) -> float:
    module = instantiate(config.model)
    if not isinstance(module, ExpressionModule):
        raise UserError(f"model._target_={config.model._target_} is no model: expected an ExpressionModule")
    if config.start_from is not None:
        begin_with(module, config.start_from, data)
    for node in (config.logger or {}).values():
        loggers.append(instantiate(node, run_id=run_id, save_dir=str(folder.path)))
    callbacks = watchers(config, folder, module, stop)
    recorder = next(c for c in callbacks if isinstance(c, Recorder))
    at_test = examiners(folder, module, recorder)
    predictions = next(c for c in at_test if isinstance(c, Predictions))
    detections = next((c for c in at_test if isinstance(c, Detections)), None)
    trainer = instantiate(
        config.trainer,
        callbacks=callbacks,
        logger=loggers,
        default_root_dir=str(folder.path),
    )
    assert isinstance(trainer, Trainer)
    guard = protect(module, trainer, folder)
    stamps = stamps_of(data, module)
    split = {key: facts[key] for key in ("split", "fold", "selected_on")}
    for logger in loggers:
        if not unfinished:
            logger.attempt(lambda run: run.config.update({**plain, **split, "stamps": stamps}))
    if trainer.channels_last:
        module = module.to(memory_format=torch.channels_last)
    threads = set_threads(trainer, module, data)
    flops = measure_flops(module)
    parameters = sum(p.numel() for p in module.parameters())
    compile_parts(module, trainer.compile)

    trainer.fit(module, datamodule=data, ckpt_path=str(resume_point(folder)) if unfinished else None)
    tester = trainer
    if trainer.world_size > 1:  # the test reads each image once, on one device
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        if not trainer.is_global_zero:
            return recorder.best
        tester = instantiate(
            config.trainer, devices=1, strategy="auto", num_nodes=1, callbacks=callbacks, logger=loggers
        )
    tester.callbacks += at_test  # type: ignore[attr-defined]
    if not folder.best.exists():
        raise UserError(
            f"no epoch was finished, so there is no best checkpoint: trainer.max_epochs={trainer.max_epochs}"
        )
    kept = load_best(folder)
    if kept["epoch"] != recorder.best_epoch:
        raise UserError(
            f"{folder.best} is of epoch {kept['epoch'] + 1}, the best is {recorder.best_epoch + 1}: the run was killed "
            "and did not repeat itself to the bit, as on a GPU without trainer.deterministic=true; fresh=true starts "
            "it anew"
        )
    module.load_state_dict(kept["state_dict"])
    started = time.monotonic()
    tester.test(module, datamodule=data, verbose=False)
    test_seconds = time.monotonic() - started
    recorder.count_time()

    best = recorder.history[[int(row["epoch"]) for row in recorder.history].index(recorder.best_epoch)]
    metrics = {
        "val": {k.removeprefix("val/"): v for k, v in best.items() if k.startswith("val/")},
        "test": module.scores("test"),
    }
    confusion = {part: read_json(folder.path / f"confusion_{part}.json")["counts"] for part in ("val", "test")}
    if predictions.sequences is not None:
        metrics["test"] |= sequence_scores(predictions.sequences, data.class_names)
        confusion["test_sequences"] = predictions.sequences.tolist()
    results = {
        "name": plain["name"],
        "model": plain["model_name"],
        "data": plain["data_name"],
        "protocol": plain["protocol"],
        "protocol_name": plain["protocol_name"],
        "fold": facts["fold"],
        "seed": plain["seed"],
        "classes": data.class_names,
        "n": facts["n"],
        "selected_on": facts["selected_on"],
        "monitor": module.monitor.removeprefix("val/"),
        "best_epoch": recorder.best_epoch,
        "epochs": len(recorder.history),
        "metrics": metrics,
        "confusion": confusion,
        "tta": plain["data"]["tta"],
        "stamps": [*stamps, *guard.stamps],
        "weights": module.weights,
        "data_facts": facts,
        "split_fingerprint": facts["fingerprint"],
        "job_key": folder.status()["job_key"],
        "code_version": code_version(),
        "git_commit": git_commit(),
        "versions": versions(),
        "parameters": parameters,
        "forward_flops": flops,
        "images_per_second": {
            "train": statistics.median(recorder.rates) if recorder.rates else None,
            "test": facts["n"]["test"] / test_seconds,
        },
        "detection_seconds_per_image": detections.seconds_per_image if detections is not None else None,
        "seconds": recorder.seconds,
        "cpu_seconds": recorder.cpu,
        "device": str(trainer.strategy.root_device),
        "devices": trainer.world_size,
        "machine": machine() | {"accelerators": accelerators(trainer.strategy.root_device, trainer.world_size)},
        "precision": str(trainer.precision),
        "threads": threads,
        "resident": data.is_resident(),
        "resumed_from_step": recorder.resumed_from_step,
        "steps": trainer.global_step,
        "skipped_steps": guard.skipped,
        "micro_batch": module.portions.micro_batch if module.portions is not None else None,
        "command": folder.status()["command"],
    }
    write_json(folder.results, results)
    folder.set_status("done")
    print_summary(results, folder)
    return recorder.best if math.isfinite(recorder.best) else float("nan")


# -- what people read ---------------------------------------------------------------------------------------------


def print_summary(results: dict[str, Any], folder: RunFolder) -> None:
    """The table at the end of a run."""
    out = console()
    test, val = results["metrics"]["test"], results["metrics"]["val"]
    fold = "" if results["fold"] is None else f", fold {results['fold']}"
    title = f"{results['model']} on {results['data']}{fold}, seed {results['seed']}"
    chosen = "validation" if results["selected_on"] == "val" else "chosen on test"
    table = Table(
        title=title, title_justify="left", show_header=True, header_style="bold", box=None, padding=(0, 2, 0, 0)
    )
    table.add_column("")
    table.add_column(f"test, n = {results['n']['test']:,}", justify="right")
    table.add_column(f"{chosen}, epoch {results['best_epoch'] + 1}", justify="right")
    rows = [
        ("accuracy", "acc"),
        ("mean class accuracy", "mean_acc"),
        ("macro F1", "macro_f1"),
        ("accuracy of sequences", "sequence_acc"),
        ("mean class accuracy of sequences", "sequence_mean_acc"),
        ("ECE", "ece"),
        ("NLL", "nll"),
        ("mAP@0.5", "map50"),
        ("face AP@0.5", "face_ap50"),
        ("mAP@0.5 of face, eyes, nose, mouth", "region_map50"),
    ]
    for text, key in rows:
        if key in test:
            table.add_row(text, f"{test[key]:.4f}", f"{val[key]:.4f}" if key in val else "")
    for name in results["classes"]:
        cells = [f"{m[f'acc_{name}']:.4f}" if f"acc_{name}" in m else "none" for m in (test, val)]
        table.add_row(f"  {name}", *cells)
    out.print(table)
    rate = results["images_per_second"]["train"]
    speed = f"{rate:,.0f} images/s in training, " if rate else ""
    out.print(
        f"{results['parameters']:,} parameters, {results['forward_flops'] / 1e9:.2f} GFLOP forward, {speed}"
        f"{results['images_per_second']['test']:,.0f} images/s in the test; {results['seconds']:,.0f} s, "
        f"{results['cpu_seconds'] / 60:.1f} core-minutes, {results['device']}, {results['precision']}, "
        f"{results['threads']} CPU threads",
        highlight=False,
    )
    for stamp in results["stamps"]:
        out.print(f"[bold red]{stamp}[/]")
    out.print(f"files: {folder.path}", soft_wrap=True, highlight=False)
    out.print(f"again: {results['command']}", soft_wrap=True, highlight=False)
