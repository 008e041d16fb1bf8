"""Lightning's Trainer with what a run here adds: precision and threads chosen by measurement, safe checkpoints."""

import contextlib
import hashlib
import json
import logging
import os
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.profilers import PassThroughProfiler
from torch import nn

from fer.checkpoints import CheckpointFiles
from fer.config import require_counts
from fer.errors import UserError
from fer.runs import write_json

log = logging.getLogger(__name__)
COMPILE = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # modes of torch.compile


def quieten() -> None:
    """Lightning's tips and hardware lines are not results."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # frozen streams, teachers
    warnings.filterwarnings("ignore", message=".*recommended to use.*sync_dist.*")  # each device knows all scores


def auto_precision() -> str:
    """bf16 autocast where the hardware computes in it, else single precision."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    capabilities = torch.cpu.get_capabilities()
    return "bf16-mixed" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "32-true"


class Unprofiled(PassThroughProfiler):
    """Profiles nothing, at no cost: Lightning's own enters a generator around every hook, 60 times in a step."""

    _nothing: contextlib.AbstractContextManager[None] = contextlib.nullcontext()

    def profile(self, action_name: str) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """The same empty block each time."""
        return self._nothing


class Trainer(lightning.Trainer):
    """`lightning.Trainer` with more arguments; all others are Lightning's own.

    Args:
        max_epochs: epochs of the whole training, where its schedule ends; Lightning would also take no end.
        threads: CPU threads, a number or ``auto``; see `choose_threads`.
        channels_last: keep images and weights channels-last, which convolutions prefer.
        weight_ema: decay of the moving average of the weights that is validated, tested and kept, such as 0.9998; None
            does so with the weights themselves.
        patience: stop when the validation monitor has not improved for so many epochs; None trains to the end.
        checkpoint_minutes: minutes between checkpoints within an epoch.
        checkpoint_steps: steps between checkpoints within an epoch, on top; None leaves it to the minutes.
        on_nan: what a loss or gradient that is not finite does: ``stop`` or ``skip``, see `fer.models.guard.StepGuard`.
        auto_batch: cut a batch that does not fit in memory into parts, see `fer.models.steps.Portions`.
        compile: a mode of `torch.compile` for the network, such as ``default`` or ``reduce-overhead``; None runs it
            as it is.
        precision: Lightning's, or ``auto``.
        devices: Lightning's.
        lightning_options: Lightning's other arguments, by their own names.

    Raises:
        UserError: a number or word that this run could not use.
    """

    def __init__(
        self,
        *,
        max_epochs: int,
        threads: int | str,
        channels_last: bool,
        weight_ema: float | None,
        patience: int | None,
        checkpoint_minutes: float,
        checkpoint_steps: int | None,
        on_nan: str,
        auto_batch: bool,
        compile: str | None,
        precision: str,
        devices: Any,
        **lightning_options: Any,
    ) -> None:
        if isinstance(max_epochs, bool) or not isinstance(max_epochs, int) or max_epochs < 1:
            raise UserError(
                f"trainer.max_epochs={max_epochs}: the learning rate's schedule ends with the last epoch, so give a "
                "number from 1 on; trainer.patience may end it sooner"
            )
        counts = {"trainer.patience": patience, "trainer.checkpoint_steps": checkpoint_steps}
        given = {key: value for key, value in counts.items() if value is not None}
        require_counts(given, dict.fromkeys(given, 1))
        if on_nan not in ("stop", "skip"):
            raise UserError(f"trainer.on_nan={on_nan} is not one of stop, skip")
        if not (threads == "auto" or (isinstance(threads, int) and threads >= 1)):
            raise UserError(f"trainer.threads={threads} is neither a positive number nor auto")
        self.threads, self.channels_last, self.patience = threads, channels_last, patience
        self.weight_ema = weight_ema
        self.checkpoint_minutes, self.checkpoint_steps = checkpoint_minutes, checkpoint_steps
        if compile not in COMPILE:
            raise UserError(f"trainer.compile={compile} is not one of {', '.join(map(str, COMPILE))}")
        self.on_nan, self.auto_batch, self.compile = on_nan, auto_batch, compile
        chosen: Any = auto_precision() if precision == "auto" else precision
        plugins: list[Any] = [CheckpointFiles()]
        if devices == 1:
            # One device needs nothing of SLURM's, and Lightning's part for it would install signal handlers of its own.
            plugins.append(LightningEnvironment())
        elif SLURMEnvironment.detect():
            plugins.append(SLURMEnvironment(auto_requeue=False))  # it would save in the middle of a step
        super().__init__(
            max_epochs=max_epochs,
            precision=chosen,
            devices=devices,
            plugins=plugins,
            use_distributed_sampler=False,  # our loaders know their rank; Lightning's sampler would repeat test images
            **{"profiler": Unprofiled(), **lightning_options},
        )


def choose_threads(network: nn.Module, image: torch.Tensor, cache: Path, bf16: bool) -> int:
    """One CPU thread or all of them: whichever runs a few forward and backward passes sooner.

    Several threads can be ten times slower than one on a machine that others use too, so this is measured, not
    assumed. The choice is kept in the cache folder by machine and workload: another choice in a second run could
    change the last bits of its sums. What is drawn at random afterwards does not depend on whether it was measured.

    Args:
        network: the model; its parameters' gradients are cleared afterwards, its buffers restored.
        image: (B, 3, H, W), one training batch.
        cache: folder for the remembered choice.
        bf16: run under bf16 autocast.
    """
    everything = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if everything == 1:
        return 1
    size = sum(p.numel() for p in network.parameters())
    facts = [platform.node(), platform.processor(), everything, torch.__version__, type(network).__name__, size, bf16]
    key = hashlib.sha256(json.dumps([*facts, list(image.shape)]).encode()).hexdigest()[:16]
    remembered = cache / "threads" / f"{key}.json"
    if remembered.exists():
        return int(json.loads(remembered.read_text())["threads"])
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    seconds: dict[int, list[float]] = {1: [], everything: []}
    with torch.random.fork_rng(devices=[]):
        for _ in range(4):  # interleaved, so that a passing load on the machine meets both; the first round warms up
            for threads, times in seconds.items():
                torch.set_num_threads(threads)
                start = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    network(image).float().logsumexp(1).sum().backward()
                times.append(time.perf_counter() - start)
    network.zero_grad(set_to_none=True)
    for name, value in network.named_buffers():
        value.copy_(buffers[name])
    median = {threads: statistics.median(times[1:]) for threads, times in seconds.items()}
    best = min(median, key=lambda threads: median[threads])
    remembered.parent.mkdir(parents=True, exist_ok=True)
    write_json(remembered, {"threads": best, "seconds": median})
    log.info("threads: %d (a step took %s s)", best, {k: round(v, 3) for k, v in median.items()})
    return best
