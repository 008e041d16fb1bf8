"""Whole runs in processes of their own: several at once on one device, the same twice, and one killed in its middle."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from fer.benching.device import Workload
from fer.benching.noise import on_noise
from fer.benching.training import composed
from fer.experiment import run_experiment
from fer.runs import RunFolder
from fer.trainer import quieten

# A fork has the libraries loaded already; whoever forks must not have touched the device.
FORK = multiprocessing.get_context("fork")
POLL = 0.02  # seconds between looks at whether a run is far enough to be killed
PATIENCE = 120  # seconds until it must be


def run(work: Workload, folder: Path, name: str, *words: str) -> None:
    """A run of ``fer.train`` on random pixels, in this process."""
    quieten()
    more = (f"data.batch_size={work.batch}", f"data.cache={folder / 'store'}", "logger=csv")
    config = on_noise(composed(*work.words, *more, *words), work.images, work.side, work.channels)
    config.trainer.enable_progress_bar = False
    with (folder / f"{name}.log").open("a") as out, redirect_stdout(out):
        run_experiment(config, folder / name)


def started(function: Callable[..., Any], *arguments: Any) -> Any:
    """A process that has begun with it."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


def ended(processes: Sequence[Any]) -> None:
    """Wait for all.

    Raises:
        RuntimeError: one of them failed.
    """
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"exit codes of the runs: {[process.exitcode for process in processes]}")


def serial_and_at_once(work: Workload, folder: Path, jobs: int) -> tuple[float, float]:
    """Seconds that the folds of a cross-validation take one after the other, and all at once."""
    words = ("protocol=kfold", f"protocol.folds={jobs}")
    ended([started(run, work, folder, "warm-up", *words, "protocol.fold=0", "trainer.max_epochs=1")])  # makes the store
    begun = time.perf_counter()
    for fold in range(jobs):
        ended([started(run, work, folder, f"serial-{fold}", *words, f"protocol.fold={fold}")])
    serial = time.perf_counter() - begun
    begun = time.perf_counter()
    ended([started(run, work, folder, f"at-once-{fold}", *words, f"protocol.fold={fold}") for fold in range(jobs)])
    return serial, time.perf_counter() - begun


def repeated(work: Workload, folder: Path) -> dict[str, int]:
    """Tensors of the last checkpoint that differ from those of a first run.

    Returns:
        ``again``: in a second run; ``killed``: in one that was killed after its first epoch and went on.
    """
    exact = ("trainer.deterministic=true", "trainer.checkpoint_steps=2")
    for name in ("first", "again"):
        ended([started(run, work, folder, name, *exact)])
    process = started(run, work, folder, "killed", *exact)
    sign, begun = folder / "killed" / "metrics.csv", time.monotonic()
    while not sign.exists() and process.is_alive() and time.monotonic() - begun < PATIENCE:
        time.sleep(POLL)
    if not process.is_alive():
        raise RuntimeError("the run that was to be killed ended before")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    ended([started(run, work, folder, "killed", *exact)])
    first, again, killed = (_weights(folder / name) for name in ("first", "again", "killed"))
    return {
        name: sum(not torch.equal(first[key], other[key]) for key in first)
        for name, other in (("again", again), ("killed", killed))
    }


def _weights(run_folder: Path) -> dict[str, Any]:
    content = torch.load(RunFolder(run_folder).last, map_location="cpu", weights_only=True)
    return dict(content["state_dict"])
