"""One pre-training from a composed config to a folder with weights, figures and a picture."""

import math
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from fer.callbacks import Curves, Randomness
from fer.checkpoints import load_best, resume_point
from fer.config import several_devices
from fer.data.base import ExpressionDataModule
from fer.errors import UserError
from fer.loggers import Wandb
from fer.pretraining.base import Pretraining
from fer.progress import progress
from fer.runs import RunFolder, code_version, git_commit, read_json, versions, write_json
from fer.session import claim, console, preflight, print_data, protect, record_of, set_threads, status_kept
from fer.stopping import Stop
from fer.trainer import Trainer, quieten
from fer.weights import write_weights

KEYS = ("data", "task", "trainer")  # nodes of conf/pretrain.yaml that a run instantiates; the rest reach these


@dataclass(frozen=True)
class PretrainingFolder(RunFolder):
    """A run folder that the report on classifiers passes over."""

    @property
    def status_file(self) -> Path:
        """Status, job key and W&B id."""
        return self.path / "pretraining.json"


class LowestKept(Curves):
    """`Curves` of a pre-training: the best epoch has the lowest monitor, or is the last where there is none."""

    def score(self, trainer: lightning.Trainer, module: Any, metrics: dict[str, float]) -> float:
        """The monitor's opposite, or the epoch."""
        if module.monitor is None:
            return float(trainer.current_epoch)
        return -metrics.get(f"val/{module.monitor}", math.nan)


def run_pretraining(config: DictConfig, folder_path: Path, *, command: str = "", resumed: bool = False) -> None:
    """Train without labels, or on landmarks, and write the weights.

    Args:
        config: composed config (``conf/pretrain.yaml``).
        folder_path: the run folder; an unfinished run of the same job key in it is continued.
        command: what starts this run again, for the record; a resumed run has it.
        resumed: the config is the folder's own, so the folder's run is continued whatever the code version.

    Raises:
        UserError: anything the user can mend, all problems of the config at once.
    """
    folder = PretrainingFolder(folder_path.absolute())
    quieten()
    if several_devices(config.trainer):
        raise UserError(f"trainer.devices={config.trainer.devices}: pre-training runs on one device")
    for option in ("weight_ema", "patience", "compile"):
        if config.trainer[option] is not None:
            raise UserError(f"trainer.{option} belongs to python -m fer.train; leave it null here")
    data = preflight(config, KEYS)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    console().print(f"run folder: {folder.path}", soft_wrap=True, highlight=False)
    data.open()
    task = get_class(config.task._target_)
    if not issubclass(task, Pretraining):
        raise UserError(f"task._target_={config.task._target_} is no task of pre-training")
    for option, value in task.from_data(config.task, data).items():
        config.task[option] = value
    facts = data.facts()
    print_data(facts)
    plain = record_of(config)
    state, run_id = claim(folder, config, plain, data, facts, command, resumed)
    if state == "done":
        print_summary(read_json(folder.results), folder)
        return
    loggers: list[Wandb] = []
    with status_kept(folder, loggers) as stop:
        results = _train(config, plain, folder, data, facts, state == "unfinished", run_id, loggers, stop)
        print_summary(results, folder)


def _train(
    config: DictConfig,
    plain: dict[str, Any],
    folder: RunFolder,
    data: ExpressionDataModule,
    facts: dict[str, Any],
    unfinished: bool,
    run_id: str,
    loggers: list[Wandb],
    stop: Stop,
) -> dict[str, Any]:
    module: Pretraining = instantiate(config.task)
    for node in (config.logger or {}).values():
        loggers.append(instantiate(node, run_id=run_id, save_dir=str(folder.path)))
        if not unfinished:
            loggers[-1].attempt(lambda run: run.config.update(plain))
    curves = LowestKept(folder, config.trainer.checkpoint_minutes, config.trainer.checkpoint_steps, stop)
    callbacks: list[Any] = [Randomness(config.seed), curves]
    if config.trainer.enable_progress_bar:
        callbacks.append(progress())
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers, default_root_dir=str(folder.path))
    assert isinstance(trainer, Trainer)
    guard = protect(module, trainer, folder)
    if trainer.channels_last:
        module = module.to(memory_format=torch.channels_last)
    threads = set_threads(trainer, module, data)
    trainer.fit(module, datamodule=data, ckpt_path=str(resume_point(folder)) if unfinished else None)
    if not folder.best.exists():
        raise UserError(
            f"no epoch was finished, so there are no weights to keep: trainer.max_epochs={trainer.max_epochs}"
        )
    module.load_state_dict(load_best(folder)["state_dict"])
    trainer.test(module, datamodule=data, verbose=False)
    curves.count_time()
    _picture(module, data, folder)

    best = curves.history[[int(row["epoch"]) for row in curves.history].index(curves.best_epoch)]
    record = {
        "task": plain["task_name"],
        "architecture": module.architecture,
        "initial_weights": module.weights,
        "data": facts["data"],
        "train_images": str(facts["n"]["train"]),
        "commit": str(git_commit()),
        "code_version": code_version(),
    }
    path = folder.path / module.file
    results = {
        **record,
        "file": module.file,
        "sha256": write_weights(path, module.kept().state_dict(), record),
        "model_parameters": sum(p.numel() for p in module.kept().parameters()),
        "protocol_name": plain["protocol_name"],
        "seed": plain["seed"],
        "n": facts["n"],
        "best_epoch": curves.best_epoch,
        "epochs": len(curves.history),
        "monitor": module.monitor,
        "metrics": {
            "val": {k.removeprefix("val/"): v for k, v in best.items() if k.startswith("val/")},
            "test": module.scores("test"),
        },
        "stamps": [*facts["stamps"], *guard.stamps],
        "data_facts": facts,
        "split_fingerprint": facts["fingerprint"],
        "job_key": folder.status()["job_key"],
        "versions": versions(),
        "images_per_second": statistics.median(curves.rates) if curves.rates else None,
        "seconds": curves.seconds,
        "cpu_seconds": curves.cpu,
        "device": str(trainer.strategy.root_device),
        "precision": str(trainer.precision),
        "threads": threads,
        "resident": data.is_resident(),
        "resumed_from_step": curves.resumed_from_step,
        "steps": trainer.global_step,
        "skipped_steps": guard.skipped,
        "command": folder.status()["command"],
        "next": shlex.join(["python", "-m", "fer.train", *module.usage(str(path))]),
    }
    write_json(folder.results, results)
    folder.set_status("done")
    return results


@torch.inference_mode()
def _picture(module: Pretraining, data: ExpressionDataModule, folder: RunFolder) -> None:
    batch = next(iter(data.test_dataloader()))
    module = module.eval().to(data.device)
    figure = module.draw({key: values.to(data.device) for key, values in batch.items()})
    figure.savefig(folder.path / module.picture, dpi=120)


def print_summary(results: dict[str, Any], folder: RunFolder) -> None:
    """What was measured, the file in the form of ``sha256sum``, and how to train on it."""
    out = console()
    test, n = results["metrics"]["test"], results["n"]
    words = ", ".join(f"{name} {value:.4f}" for name, value in test.items())
    chosen = f"best validation {results['monitor']}" if results["monitor"] else "the last"
    out.print(
        f"{results['task']}, {results['architecture']} from {results['initial_weights']}: {n['train']:,} images, epoch "
        f"{results['best_epoch'] + 1} ({chosen}); test, n = {n['test']:,}: {words}; "
        f"{results['cpu_seconds'] / 60:.1f} core-minutes",
        highlight=False,
        soft_wrap=True,
    )
    path = folder.path / results["file"]
    out.print(f"{results['sha256']}  {path}", soft_wrap=True, highlight=False)
    out.print(f"next: {results['next']}", soft_wrap=True, highlight=False)
