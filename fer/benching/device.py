"""One device: what it can do at best, and whole training steps on it, timed by the device's own clock.

Nothing here waits for the device within a window: marks are events on its queue, read when all is done. On a CPU, where
this runs only as a rehearsal, they are the wall clock's.
"""

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fer.benching.noise import Noise, on_noise
from fer.benching.training import composed
from fer.callbacks import Randomness, measure_flops
from fer.models.base import ExpressionModule
from fer.runs import RunFolder
from fer.session import compile_parts, protect
from fer.trainer import Trainer, quieten

AS_IT_IS = ("eager", "benchmark")  # modes without the compiler
ENDLESS = 1_000_000  # epochs; the steps end a training here


def device() -> torch.device:
    """The accelerator, or the CPU for a rehearsal."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Marks:
    """Moments on the device's queue."""

    def __init__(self) -> None:
        self.on_gpu = device().type == "cuda"
        self.moments: list[Any] = []

    def __call__(self) -> None:
        """Mark this moment."""
        if not self.on_gpu:
            self.moments.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self.moments.append(event)

    def gaps(self) -> list[float]:
        """Seconds between each mark and the next."""
        if not self.on_gpu:
            return [b - a for a, b in pairwise(self.moments)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairwise(self.moments)]


def matmul_ceiling(size: int, windows: int, products: int) -> list[float]:
    """TFLOP/s of square bf16 products of random matrices, ``products`` a window."""
    a, b = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    marks = Marks()
    for window in range(-1, windows):
        if window >= 0:
            marks()
        for _ in range(products):
            a @ b
    marks()
    return [2 * size**3 * products / seconds / 1e12 for seconds in marks.gaps()]


def copy_ceiling(megabytes: int, windows: int, copies: int) -> list[float]:
    """TB/s of copies on the device, bytes read and written both counted."""
    source = torch.randint(256, (megabytes * 2**20,), dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    marks = Marks()
    for window in range(-1, windows):
        if window >= 0:
            marks()
        for _ in range(copies):
            target.copy_(source)
    marks()
    return [2 * source.numel() * copies / seconds / 1e12 for seconds in marks.gaps()]


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        words: of ``python -m fer.train``.
        images: of the training part.
        side, channels: of the stored images.
        batch: images of a step.
        mode: ``eager``; ``benchmark``, with cuDNN's search for the fastest convolutions; or what ``trainer.compile``
            takes, with that search too.
    """

    words: tuple[str, ...]
    images: int
    side: int
    channels: int
    batch: int
    mode: str = "eager"


class _Clock(Callback):
    """Marks the start of every window of so many steps, the first after a warm-up."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.warm_up, self.steps = warm_up, steps
        self.marks = Marks()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        done = trainer.global_step - self.warm_up
        if done >= 0 and done % self.steps == 0:
            self.marks()


class _Strict(Callback):
    """Lets the device's library refuse whatever waits for the device, in steps ``first`` to ``last``."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.steps = 0

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        on_gpu, step = device().type == "cuda", trainer.global_step
        if on_gpu and step in (self.first, self.last):
            torch.cuda.set_sync_debug_mode("error" if step == self.first else "default")
        self.steps += self.first < step <= self.last


def prepared(work: Workload, folder: Path) -> tuple[DictConfig, ExpressionModule, Noise]:
    """Config, network and data of a workload."""
    quieten()
    config = composed(*work.words, f"data.batch_size={work.batch}", f"data.cache={folder / 'store'}")
    data = instantiate(on_noise(config, work.images, work.side, work.channels).data)
    data.open()
    config.data.class_names = data.class_names
    torch.manual_seed(config.seed)
    return config, instantiate(config.model), data


def train(
    config: DictConfig, module: ExpressionModule, data: Noise, mode: str, steps: int, *callbacks: Callback
) -> None:
    """Take so many steps as a run does, without validation, checkpoints and loggers."""
    trainer: Trainer = instantiate(
        config.trainer,
        callbacks=[Randomness(config.seed), instantiate(config.mix), *callbacks],
        **{"max_epochs": ENDLESS, "max_steps": steps, "limit_val_batches": 0, "num_sanity_val_steps": 0},
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
        benchmark=mode != "eager",
        compile=None if mode in AS_IT_IS else mode,
    )
    if trainer.channels_last:
        module = module.to(memory_format=torch.channels_last)
    protect(module, trainer, RunFolder(data.cache))
    compile_parts(module, trainer.compile)
    trainer.fit(module, datamodule=data)


def windows_of(work: Workload, folder: Path, windows: int, steps: int, warm_up: int) -> dict[str, Any]:
    """Time windows of whole steps.

    Returns:
        ``rates``, images/s of each window; ``data_share``, of the time, spent in making batches, of each window;
        ``flops``, of training on one image; ``gigabytes``, at most in use on the device.
    """
    config, module, data = prepared(work, folder)
    flops = training_flops(module)
    clock, data.marks = _Clock(warm_up, steps), Marks()
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train(config, module, data, work.mode, warm_up + windows * steps, clock)
    gaps = clock.marks.gaps()
    making = data.marks.gaps()[::2]  # every other gap is the step between two batches
    made = [making[warm_up + w * steps : warm_up + (w + 1) * steps] for w in range(windows)]
    return {
        "rates": [steps * work.batch / seconds for seconds in gaps],
        "data_share": [sum(part) / seconds for part, seconds in zip(made, gaps, strict=True)],
        "flops": flops,
        "gigabytes": torch.cuda.max_memory_allocated() / 1e9 if device().type == "cuda" else None,
    }


def steps_without_waiting(work: Workload, folder: Path, first: int, steps: int) -> int:
    """Train with the device's library refusing every wait for the device.

    Returns:
        How many steps were taken so.
    """
    config, module, data = prepared(work, folder)
    strict = _Strict(first, first + steps)
    train(config, module, data, work.mode, first + steps + 1, strict)
    return strict.steps


def training_flops(module: ExpressionModule) -> int:
    """FLOPs of training on one image: three times the forward pass, once where no weight learns."""
    still = [part for part in module.network.modules() if _is_frozen(part)]
    frozen = 0
    if still:  # the outermost comes first
        image = torch.zeros(1, 3, module.image_size, module.image_size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            still[0](image)
        frozen = int(counter.get_total_flops())
    return 3 * measure_flops(module) - 2 * frozen


def _is_frozen(part: nn.Module) -> bool:
    parameters = list(part.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)
