"""What every run does around its training: problems found first, status kept, threads chosen, the data shown."""

import contextlib
import gc
import logging
import os
import sys
import traceback
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn

from fer.config import argument_problems, resolved
from fer.data.base import ExpressionDataModule
from fer.data.manifest import PARTS
from fer.data.workers import WorkerDied, dismiss
from fer.errors import UserError
from fer.loggers import Wandb
from fer.models.base import ExpressionModule
from fer.models.feature_losses import AuxiliaryLoss
from fer.models.guard import StepGuard
from fer.models.steps import Portions, SteppedModule
from fer.runs import RunFolder, State, code_version, job_key, remove_leftovers, write_json
from fer.stopping import Stop, Stopped
from fer.trainer import Trainer, choose_threads

log = logging.getLogger(__name__)
TRAINED = ("data", "model", "mix", "trainer")  # nodes of conf/train.yaml that a run instantiates; the rest reach these
REASONS_SHOWN = 5  # reasons for leaving items out, the commonest first; split.json has all


def preflight(config: DictConfig, keys: Sequence[str] = TRAINED) -> ExpressionDataModule:
    """Find every problem of a config before anything costs time.

    Args:
        config: the composed config.
        keys: its nodes that the run instantiates.

    Returns:
        The data module, whose root exists.

    Raises:
        UserError: all problems, a line each.
    """
    plain = resolved(config)
    problems = [p for key in keys for p in argument_problems({key: plain[key]})]
    if problems:
        raise UserError("\n".join(problems))
    data = instantiate(config.data)
    if not isinstance(data, ExpressionDataModule):
        raise UserError(f"data._target_={config.data._target_} is no data set: expected an ExpressionDataModule")
    data.check_root()
    return data


def record_of(config: DictConfig) -> dict[str, Any]:
    """The resolved config as a run keeps it: the data's folders absolute, so that it goes on from anywhere."""
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    plain["data"]["root"] = str(Path(config.data.root).absolute()) if config.data.root else ""
    plain["data"]["cache"] = str(Path(config.data.cache).absolute())
    return plain


def claim(
    folder: RunFolder,
    config: DictConfig,
    plain: dict[str, Any],
    data: ExpressionDataModule,
    facts: dict[str, Any],
    command: str,
    resumed: bool,
) -> tuple[State, str]:
    """Make the folder this run's, or find it to be already, and write down what the run is.

    Args:
        folder: the run folder.
        config: the composed config.
        plain: the same resolved, with absolute paths.
        data: the opened data.
        facts: its facts.
        command: what starts this run again.
        resumed: the folder's run is continued whatever the code version.

    Returns:
        What was found in the folder, and the run's id on W&B.

    Raises:
        UserError: the folder holds another run.
    """
    key = folder.status()["job_key"] if resumed else job_key(plain, data.fingerprint())
    state = folder.begin(OmegaConf.create(plain), key, bool(config.fresh) and not resumed)
    for place in (folder.path, folder.last.parent):
        remove_leftovers(place)
    status = folder.status()
    run_id = status.get("wandb_id") or uuid.uuid4().hex[:8]
    if state == "done":
        log.info("this run is done already (fresh=true starts it anew): %s", folder.results)
        return state, run_id
    if resumed and status.get("code") != code_version():
        log.warning("the code has changed since this run was started; the results say so")
    command = status.get("command") or command
    folder.set_status("running", job_key=key, wandb_id=run_id, command=command, code=code_version())
    write_json(
        folder.path / "split.json",
        {**facts, "protocol": plain["protocol"], **{part: rows.tolist() for part, rows in data.split.parts()}},
    )
    return state, run_id


@contextlib.contextmanager
def status_kept(folder: RunFolder, loggers: list[Wandb]) -> Iterator[Stop]:
    """Whatever ends the block stands in the folder's status, and W&B's runs end with it.

    Yields:
        What a signal has asked for.

    Raises:
        Stopped: the run was interrupted.
    """
    with Stop() as stop:
        exit_code = 1
        try:
            yield stop
            exit_code = 0
        except (KeyboardInterrupt, SystemExit):
            _note(folder, "interrupted")
            log.warning(
                "interrupted; the same command with hydra.run.dir=%s, or resume=%s, goes on", folder.path, folder.path
            )
            raise Stopped from None
        except WorkerDied as death:
            said = f"{death}; the same command with hydra.run.dir={folder.path}, or resume={folder.path}, goes on"
            _note(folder, "failed", error=said)
            raise UserError(said) from None
        except BaseException as error:
            _note(folder, "failed", error="".join(traceback.format_exception_only(error)).strip())
            raise
        finally:
            for logger in loggers:
                # Unless finished with its code, W&B shows a failed run as finished, and the next job logs into this.
                logger.finish(exit_code)
            dismiss()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _note(folder: RunFolder, status: str, **more: Any) -> None:
    """Set the status of a run that ends early; the disk may be full, which must not hide why it ends."""
    try:
        folder.set_status(status, **more)
    except (OSError, UserError) as error:
        log.warning("the status of the run could not be noted: %s", error)


def set_threads(trainer: Trainer, network: nn.Module, data: ExpressionDataModule) -> int:
    """Apply ``trainer.threads``; on an accelerator the CPU's threads are left as they are."""
    if trainer.strategy.root_device.type == "cpu":
        threads = trainer.threads
        if threads == "auto":
            with torch.random.fork_rng(devices=[]):
                image = torch.rand(data.batch_size, 3, data.image_size, data.image_size)
            if trainer.channels_last:
                image = image.contiguous(memory_format=torch.channels_last)
            threads = choose_threads(network, image, data.cache, bf16="bf16" in str(trainer.precision))
        torch.set_num_threads(int(threads))
    return torch.get_num_threads()


def protect(module: SteppedModule, trainer: Trainer, folder: RunFolder) -> StepGuard:
    """Guard a training against numbers that are not finite; cut its batches to fit in memory where that is asked.

    Raises:
        UserError: batches of this training cannot be cut.
    """
    module.guard = StepGuard(folder.path, trainer.on_nan)
    if trainer.auto_batch:
        for refused, reason in (
            (not module.splits, f"the loss of {type(module).__name__} as configured is no plain mean over images"),
            (trainer.accumulate_grad_batches > 1, "trainer.accumulate_grad_batches joins what it would cut"),
            (trainer.world_size > 1, "several devices would have to cut alike"),
        ):
            if refused:
                raise UserError(f"trainer.auto_batch=true cannot be had here, since {reason}: set it to false")
        module.portions = Portions()
    return module.guard


def compile_parts(module: ExpressionModule, mode: str | None) -> None:
    """Compile a network in its place, its parameters' names unchanged; ``trainer.compile``: None leaves it as it is.

    Raises:
        UserError: the training would run none of what is compiled.
    """
    if mode is None:
        return
    if isinstance(module.loss_function, AuxiliaryLoss):
        raise UserError(
            f"trainer.compile={mode} would leave the training as it is, since {type(module.loss_function).__name__} "
            "looks into the network instead of calling it: set trainer.compile=null, or take another loss"
        )
    for part in module.compiled_parts:
        module.get_submodule(part).compile(mode=mode)


def console() -> Console:
    """A console of the terminal's width, or of COLUMNS in a log file."""
    # In a log file there is no terminal to ask for its width.
    return Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "120")))


def print_data(facts: dict[str, Any]) -> None:
    """The parts, their counts per class, and everything about them a reader must know."""
    out = console()
    out.print(
        f"{facts['data']}: {facts['form']}; " + " / ".join(f"{p} {facts['n'][p]:,}" for p in PARTS), highlight=False
    )
    table = Table(box=None, header_style="bold", padding=(0, 1))
    classes = list(facts["counts"]["train"])
    for heading in ("part", *classes, "all"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part in PARTS:
        counts = facts["counts"][part]
        table.add_row(part, *(f"{counts[c]:,}" for c in classes), f"{facts['n'][part]:,}")
    out.print(table)
    out.print(f"  split: {facts['split']}", highlight=False)
    notes = [f"differs from the official counts: {line}" for line in facts["count_differences"]]
    before, after = facts["copies_before_drop_leaks"], facts["copies"]
    notes += [
        f"pixel-identical before -> after protocol.drop_leaks={str(facts['drop_leaks']).lower()}: "
        + ", ".join(f"{what} {before[what]:,} -> {after[what]:,}" for what in before)
    ]
    notes += [f"left out: {n:,} ({why})" for why, n in list(facts["skipped"].items())[:REASONS_SHOWN]]
    for note in (*notes, *facts["warnings"], *facts["stamps"]):
        out.print(f"  note: {note}", highlight=False)
