"""One run from a composed config to a complete run folder: pre-flight, data, training, one test, results."""

import gc
import logging
import math
import os
import statistics
import sys
import time
import traceback
import uuid
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import get_class, instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from fer.callbacks import Predictions, Randomness, Recorder, WandbPictures, measure_flops, stamps_of
from fer.config import argument_problems, several_devices, unsafe_entries
from fer.data.base import ExpressionDataModule
from fer.data.manifest import PARTS
from fer.detections import Detections, RegionPicture
from fer.errors import UserError
from fer.loggers import Wandb
from fer.models.averaging import WeightAverage
from fer.models.base import ExpressionModule
from fer.models.detection import FaceDetector
from fer.models.multiscale_region import MultiscaleRegion
from fer.runs import RunFolder, code_version, git_commit, job_key, read_json, versions, write_json
from fer.trainer import Trainer, choose_threads, load_checkpoint

log = logging.getLogger(__name__)
INTERRUPTED = 130  # exit code after Ctrl-C or SIGTERM; Lightning's own would be 0
REASONS_SHOWN = 5  # reasons for leaving items out, the commonest first; split.json has all
RUN_KEYS = ("data", "model", "mix", "trainer")  # instantiated by this file; `loss` ... reach them by interpolation


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
    _quieten()
    data = preflight(config)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    # Lightning starts a process for each further device of a run; the first one keeps the books.
    follower = several_devices(config.trainer) and rank_zero_only.rank > 0  # type: ignore[attr-defined]
    if not follower:
        _console().print(f"run folder: {folder.path}", soft_wrap=True, highlight=False)
    data.open()
    facts = data.facts()
    if config.data.class_names is None:
        config.data.class_names = data.class_names
    architecture = get_class(config.model._target_)
    if issubclass(architecture, ExpressionModule):
        for option, value in architecture.from_data(config.model, data).items():
            config.model[option] = value
    if not follower:
        print_data(facts)
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    plain["data"]["root"] = str(Path(config.data.root).absolute()) if config.data.root else ""
    plain["data"]["cache"] = str(Path(config.data.cache).absolute())
    key = job_key(plain, data.fingerprint())
    if follower:
        config.logger = None
        return _train_and_test(config, plain, folder, data, facts, folder.last.exists(), "", [])
    if resumed:
        key = folder.status()["job_key"]
    state = folder.begin(OmegaConf.create(plain), key, bool(config.fresh) and not resumed)
    if state == "done":
        log.info("this run is done already (fresh=true starts it anew): %s", folder.results)
        results = read_json(folder.results)
        return float(results["metrics"]["val"][results["monitor"]])
    if resumed and folder.status().get("code") != code_version():
        log.warning("the code has changed since this run was started; the results say so")
    run_id = folder.status().get("wandb_id") or uuid.uuid4().hex[:8]
    command = folder.status().get("command") or command
    folder.set_status("running", job_key=key, wandb_id=run_id, command=command, code=code_version())
    write_json(
        folder.path / "split.json",
        {**facts, "protocol": plain["protocol"], **{part: rows.tolist() for part, rows in data.split.parts()}},
    )
    loggers: list[Wandb] = []
    exit_code = 1
    try:
        result = _train_and_test(config, plain, folder, data, facts, state == "unfinished", run_id, loggers)
        exit_code = 0
        return result
    except (KeyboardInterrupt, SystemExit):  # Lightning turns an interrupt or SIGTERM into an exit
        folder.set_status("interrupted")
        log.warning(
            "interrupted; the same command with hydra.run.dir=%s, or resume=%s, goes on", folder.path, folder.path
        )
        raise SystemExit(INTERRUPTED) from None
    except BaseException as error:
        folder.set_status("failed", error="".join(traceback.format_exception_only(error)).strip())
        raise
    finally:
        for logger in loggers:
            # Unless finished with its code, W&B shows a failed run as finished, and the next job logs into this run.
            logger.experiment.finish(exit_code=exit_code)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _quieten() -> None:
    """Lightning's tips and hardware lines are not results."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*recommended to use.*sync_dist.*")  # each device knows all scores


def preflight(config: DictConfig) -> ExpressionDataModule:
    """Find every problem of a config before anything costs time.

    Returns:
        The data module, whose root exists.

    Raises:
        UserError: all problems, a line each.
    """
    problems = unsafe_entries(config)
    if problems:
        raise UserError("\n".join(problems))
    try:
        plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(f"the config does not resolve: {error}") from None
    problems = [p for key in RUN_KEYS for p in argument_problems({key: plain[key]})]
    if problems:
        raise UserError("\n".join(problems))
    data = instantiate(config.data)
    if not isinstance(data, ExpressionDataModule):
        raise UserError(f"data._target_={config.data._target_} is no data set: expected an ExpressionDataModule")
    data.check_root()
    return data


def _train_and_test(
    config: DictConfig,
    plain: dict[str, Any],
    folder: RunFolder,
    data: ExpressionDataModule,
    facts: dict[str, Any],
    unfinished: bool,
    run_id: str,
    loggers: list[Wandb],
) -> float:
    module = instantiate(config.model)
    if not isinstance(module, ExpressionModule):
        raise UserError(f"model._target_={config.model._target_} is no model: expected an ExpressionModule")
    for node in (config.logger or {}).values():
        loggers.append(instantiate(node, run_id=run_id, save_dir=str(folder.path)))
    average = WeightAverage(config.trainer.weight_ema) if config.trainer.weight_ema is not None else None
    recorder = Recorder(folder, config.trainer.checkpoint_minutes, config.trainer.checkpoint_steps, average)
    predictions = Predictions(folder)
    # Randomness comes before what draws from it.
    callbacks = [Randomness(config.seed), instantiate(config.mix), *([average] if average else [])]
    callbacks += [recorder, predictions, WandbPictures(folder, predictions, recorder)]
    detections = Detections(folder) if isinstance(module, FaceDetector) and module.detection else None
    if detections is not None:
        callbacks.append(detections)
    if isinstance(module, MultiscaleRegion) and module.rois != "none":
        callbacks.append(RegionPicture(folder))
    if config.trainer.patience is not None:
        callbacks.append(
            lightning.pytorch.callbacks.EarlyStopping(module.monitor, patience=config.trainer.patience, mode="max")
        )
    if config.trainer.enable_progress_bar:
        callbacks.append(lightning.pytorch.callbacks.RichProgressBar(refresh_rate=20))
    trainer = instantiate(
        config.trainer,
        callbacks=callbacks,
        logger=loggers,
        default_root_dir=str(folder.path),
    )
    assert isinstance(trainer, Trainer)
    stamps = stamps_of(data, module)
    for logger in loggers:
        if not unfinished:
            split = {key: facts[key] for key in ("split", "fold", "selected_on")}
            logger.experiment.config.update({**plain, **split, "stamps": stamps})
    if trainer.channels_last:
        module = module.to(memory_format=torch.channels_last)
    threads = _set_threads(trainer, module, data)
    flops = measure_flops(module)
    parameters = sum(p.numel() for p in module.parameters())

    trainer.fit(module, datamodule=data, ckpt_path=str(folder.last) if unfinished else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
    tester = trainer
    if trainer.world_size > 1:  # the test reads each image once, on one device
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        if not trainer.is_global_zero:
            return recorder.best
        tester = instantiate(
            config.trainer, devices=1, strategy="auto", num_nodes=1, callbacks=callbacks, logger=loggers
        )
    if not folder.best.exists():
        raise UserError(
            f"no epoch was finished, so there is no best checkpoint: trainer.max_epochs={trainer.max_epochs}"
        )
    module.load_state_dict(load_checkpoint(folder.best)["state_dict"])
    started = time.monotonic()
    tester.test(module, datamodule=data, verbose=False)
    test_seconds = time.monotonic() - started
    recorder.count_time()

    best = recorder.history[[int(row["epoch"]) for row in recorder.history].index(recorder.best_epoch)]
    metrics = {
        "val": {k.removeprefix("val/"): v for k, v in best.items() if k.startswith("val/")},
        "test": module.scores("test"),
    }
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
        "confusion": {part: read_json(folder.path / f"confusion_{part}.json")["counts"] for part in ("val", "test")},
        "tta": plain["data"]["tta"],
        "stamps": stamps,
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
        "precision": str(trainer.precision),
        "threads": threads,
        "resident": data.is_resident(),
        "resumed_from_step": recorder.resumed_from_step,
        "steps": trainer.global_step,
        "command": folder.status()["command"],
    }
    write_json(folder.results, results)
    folder.set_status("done")
    print_summary(results, folder)
    return recorder.best if math.isfinite(recorder.best) else float("nan")


def _set_threads(trainer: Trainer, module: ExpressionModule, data: ExpressionDataModule) -> int:
    """Apply ``trainer.threads``; on an accelerator the CPU's threads are left as they are."""
    if trainer.strategy.root_device.type == "cpu":
        threads = trainer.threads
        if threads == "auto":
            image = torch.rand(data.batch_size, 3, data.image_size, data.image_size)
            if trainer.channels_last:
                image = image.contiguous(memory_format=torch.channels_last)
            threads = choose_threads(module, image, data.cache, bf16="bf16" in str(trainer.precision))
        torch.set_num_threads(int(threads))
    return torch.get_num_threads()


# -- what people read ---------------------------------------------------------------------------------------------


def _console() -> Console:
    # In a log file there is no terminal to ask for its width.
    return Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "120")))


def print_data(facts: dict[str, Any]) -> None:
    """The parts, their counts per class, and everything about them a reader must know."""
    console = _console()
    console.print(
        f"{facts['data']}: {facts['form']}; " + " / ".join(f"{p} {facts['n'][p]:,}" for p in PARTS), highlight=False
    )
    table = Table(box=None, header_style="bold", padding=(0, 1))
    classes = list(facts["counts"]["train"])
    for heading in ("part", *classes, "all"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part in PARTS:
        counts = facts["counts"][part]
        table.add_row(part, *(f"{counts[c]:,}" for c in classes), f"{facts['n'][part]:,}")
    console.print(table)
    console.print(f"  split: {facts['split']}", highlight=False)
    notes = [f"differs from the official counts: {line}" for line in facts["count_differences"]]
    before, after = facts["copies_before_drop_leaks"], facts["copies"]
    notes += [
        f"pixel-identical before -> after protocol.drop_leaks={str(facts['drop_leaks']).lower()}: "
        + ", ".join(f"{what} {before[what]:,} -> {after[what]:,}" for what in before)
    ]
    notes += [f"left out: {n:,} ({why})" for why, n in list(facts["skipped"].items())[:REASONS_SHOWN]]
    for note in (*notes, *facts["warnings"], *facts["stamps"]):
        console.print(f"  note: {note}", highlight=False)


def print_summary(results: dict[str, Any], folder: RunFolder) -> None:
    """The table at the end of a run."""
    console = _console()
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
        ("ECE", "ece"),
        ("NLL", "nll"),
        ("mAP@0.5", "map50"),
        ("face AP@0.5", "face_ap50"),
        ("mAP@0.5 of face, eyes, nose, mouth", "region_map50"),
    ]
    for text, key in rows:
        if key in test:
            table.add_row(text, f"{test[key]:.4f}", f"{val[key]:.4f}")
    for name in results["classes"]:
        cells = [f"{m[f'acc_{name}']:.4f}" if f"acc_{name}" in m else "none" for m in (test, val)]
        table.add_row(f"  {name}", *cells)
    console.print(table)
    rate = results["images_per_second"]["train"]
    speed = f"{rate:,.0f} images/s in training, " if rate else ""
    console.print(
        f"{results['parameters']:,} parameters, {results['forward_flops'] / 1e9:.2f} GFLOP forward, {speed}"
        f"{results['images_per_second']['test']:,.0f} images/s in the test; {results['seconds']:,.0f} s, "
        f"{results['cpu_seconds'] / 60:.1f} core-minutes, {results['device']}, {results['precision']}, "
        f"{results['threads']} CPU threads",
        highlight=False,
    )
    for stamp in results["stamps"]:
        console.print(f"[bold red]{stamp}[/]")
    console.print(f"files: {folder.path}", soft_wrap=True, highlight=False)
    console.print(f"again: {results['command']}", soft_wrap=True, highlight=False)
