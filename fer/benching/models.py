"""Our training step beside timm's own, and the measurements behind the defaults.

Precision, memory format, fused optimisers and threads are compared in the hand-written loop, where nothing else
differs; torch.compile likewise, in `fer.benching.compiling`.
"""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from hydra.utils import get_class
from timm.optim._optim_factory import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.metrics import AverageMeter
from torch import nn

from fer.benching.overhead import ours
from fer.benching.training import ENDLESS, Batch, Prepared, by_hand, composed, prepared, steps_for, twin
from fer.benching.windows import Bench, Row, Times, compare, interleave, timed
from fer.models.base import ExpressionModule
from fer.trainer import quieten

Window = Any  # steps -> Times


def measure(bench: Bench) -> list[Row]:
    """Rows of each comparison."""
    quieten()
    return [*_beside_timm(bench), *_settings(bench), *_fused(bench)]


def words(bench: Bench, model: str) -> list[str]:
    """The command line of a network's small training."""
    place = f"data.cache={bench.folder}/store"
    return [f"experiment=small/{model}", *bench.options["words"], f"trainer.threads={bench.threads}", place]


def _beside_timm(bench: Bench) -> Iterator[Row]:
    for model in bench.options["beside_timm"]:
        config = composed(*words(bench, model))
        module, data = prepared(config)
        with ours(config, module, data, bench.folder / model) as fit:
            loop = fit.aside(partial(timms_step, twin(module), data, "bf16" in str(module.trainer.precision)))
            steps, _ = fit.aside(partial(steps_for, bench.options["window_seconds"], loop))
            variants = {"ours": partial(fit.window, steps), "timm": partial(fit.aside, partial(loop, steps))}
            windows = interleave(variants, bench.windows * bench.options["times_windows"])
        yield compare(
            f"`{model}`, our step beside timm's", windows, "ours", "timm", at_most=bench.options["at_most_ratio"]
        )


def timms_step(module: ExpressionModule, data: Prepared, bf16: bool) -> Window:
    """Windows of the loop of timm's ``train.py``: its optimiser, schedule, gradient and loss bookkeeping."""
    network, recipe = module.network.train(), module.optim
    options = recipe.optimizer.keywords  # type: ignore[attr-defined]
    optimizer = create_optimizer_v2(network, opt="adamw", lr=options["lr"], weight_decay=options["weight_decay"])
    scheduler = CosineLRScheduler(optimizer, t_initial=ENDLESS, t_in_epochs=False)
    loss_function = nn.CrossEntropyLoss()
    losses: Any = AverageMeter()  # type: ignore[no-untyped-call]
    batches, updates = iter(data), 0

    def step(batch: Batch) -> None:
        nonlocal updates
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_function(network(batch["image"]), batch["label"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.update(loss.item(), len(batch["label"]))
        updates += 1
        scheduler.step_update(num_updates=updates, metric=losses.avg)

    def window(steps: int) -> Times:
        with timed(steps) as times:
            for _ in range(steps):
                step(next(batches))
        return times

    window(1)
    return window


def _settings(bench: Bench) -> Iterator[Row]:
    options = bench.options
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for model in options["settings"]:
        module, data = prepared(composed(*words(bench, model), "trainer.channels_last=true"))
        plain = twin(module).to(memory_format=torch.contiguous_format)
        default = by_hand(twin(module), data, bf16=True)
        variants: dict[str, Window] = {
            "bf16, channels-last": default,
            "fp32, channels-last": by_hand(twin(module), data, bf16=False),
            "bf16, contiguous": by_hand(plain, data, bf16=True),
            f"{threads} threads": partial(
                _with_threads, threads, bench.threads, by_hand(twin(module), data, bf16=True)
            ),
        }
        steps, _ = steps_for(options["window_seconds"], default)
        windows = interleave({name: partial(window, steps) for name, window in variants.items()}, bench.windows)
        for other in ("fp32, channels-last", "bf16, contiguous"):
            yield compare(f"`{model}`, bf16 and channels-last", windows, "bf16, channels-last", other)
        yield compare(
            f"`{model}`, {threads} threads",
            windows,
            f"{threads} threads",
            "bf16, channels-last",
            clock="wall",
            note="wall time; the baseline has one thread",
        )


def _with_threads(threads: int, otherwise: int, window: Window, steps: int) -> Times:
    torch.set_num_threads(threads)
    try:
        times: Times = window(steps)
    finally:
        torch.set_num_threads(otherwise)
    return times


def _fused(bench: Bench) -> Iterator[Row]:
    module, _ = prepared(composed(*words(bench, bench.options["optimisers_of"])), batches=1)
    for name in bench.options["optimisers"]:
        recipe = composed(f"optim={name}").optim.optimizer
        arguments = {key: value for key, value in recipe.items() if key not in ("_target_", "_partial_", "fused")}
        variants = {}
        for kind, how in (("fused", {"fused": True}), ("foreach", {"foreach": True}), ("a loop", {"foreach": False})):
            copied = [p for p in twin(module).parameters() if p.requires_grad]
            for parameter in copied:
                parameter.grad = torch.randn_like(parameter)
            optimizer = get_class(recipe._target_)(copied, **arguments, **how)
            variants[kind] = partial(_descend, optimizer)
        steps, _ = steps_for(bench.options["window_seconds"] / 4, variants["foreach"])
        windows = interleave({kind: partial(window, steps) for kind, window in variants.items()}, bench.windows)
        for other in ("foreach", "a loop"):
            yield compare(f"`optim={name}`, fused, the optimiser alone", windows, "fused", other)


def _descend(optimizer: torch.optim.Optimizer, steps: int) -> Times:
    with timed(steps) as times:
        for _ in range(steps):
            optimizer.step()
    return times
