"""One training, run a window at a time: Lightning's by `Fit`, a hand-written loop's by `by_hand`.

Both train a copy of the same network on the same batches, made beforehand, with the same optimiser, schedule, clipping
and precision. A window is so many whole steps in the middle of a training; neither start-up nor the end of an epoch is
in it.
"""

import contextlib
import copy
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, flag_override
from torch import Tensor, nn

from fer.benching.windows import Times, timed
from fer.config import compose_like_hydra
from fer.data.base import ExpressionDataModule
from fer.models.base import ExpressionModule

Batch = dict[str, Tensor]
ENDLESS = 1_000_000  # steps of the one epoch that the windows are cut from


def composed(*words: str) -> DictConfig:
    """The config of ``python -m fer.train WORDS``."""
    GlobalHydra.instance().clear()
    config = compose_like_hydra("train", list(words))
    HydraConfig.instance().set_config(config)
    with flag_override(config, "struct", False):
        del config.hydra
    return config


class Prepared(lightning.LightningDataModule):
    """A few batches of a data set, made beforehand and handed out over and over."""

    def __init__(self, data: ExpressionDataModule, count: int) -> None:
        super().__init__()
        data.open()
        self.data = data
        self.batches = list(itertools.islice(data.train_dataloader(), count))

    def class_counts(self, part: Any) -> Any:
        """The data set's."""
        return self.data.class_counts(part)

    def train_batches(self) -> int:
        """Batches of the one epoch."""
        return ENDLESS

    def train_dataloader(self) -> "Prepared":
        """Itself."""
        return self

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Batch]:
        # A shallow copy: what is mixed in place is not mixed again.
        return (dict(batch) for batch in itertools.islice(itertools.cycle(self.batches), ENDLESS))


def prepared(config: DictConfig, batches: int = 4) -> tuple[ExpressionModule, Prepared]:
    """The network and the batches of a config.

    Args:
        config: composed, as `composed` returns it.
        batches: how many to make.
    """
    data = instantiate(config.data)
    made = Prepared(data, batches)
    config.data.class_names = data.class_names
    for option, value in get_class(config.model._target_).from_data(config.model, data).items():  # type: ignore[attr-defined]
        config.model[option] = value
    torch.manual_seed(config.seed)
    module = instantiate(config.model)
    assert isinstance(module, ExpressionModule)
    return (module.to(memory_format=torch.channels_last) if config.trainer.channels_last else module), made


class _Finished(Exception):
    """Ends a fit after its last window."""


class _Windows(Callback):
    """Lets a fit go on for so many steps at a time; must be the last callback."""

    def __init__(self) -> None:
        self.steps = self.left = 1
        self.asked, self.answered = threading.Semaphore(0), threading.Semaphore(0)
        self.finished = False
        self.aside: Callable[[], Any] | None = None
        self._clock: Any = contextlib.nullcontext(Times())
        self.times: Any = Times()

    def on_train_batch_end(self, *_: Any) -> None:
        """End a window when its steps are done, and wait for the next one."""
        self.left -= 1
        if self.left:
            return
        self._clock.__exit__(None, None, None)
        while True:
            self.answered.release()
            self.asked.acquire()
            if self.aside is None:
                break
            self.times = self.aside()
        if self.finished:
            raise _Finished
        self.left = self.steps
        self._clock = timed(self.steps)
        self.times = self._clock.__enter__()


class Fit:
    """A fit of Lightning's in a thread of its own, which runs only while a window is asked for.

    Args:
        trainer: makes the trainer from the callbacks given beside its own.
        module: what it trains.
        data: the batches.
    """

    def __init__(
        self, trainer: Callable[[list[Callback]], lightning.Trainer], module: ExpressionModule, data: Prepared
    ) -> None:
        self._windows = _Windows()
        self._make, self._module, self._data = trainer, module, data
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self._make([self._windows]).fit(self._module, datamodule=self._data)
        except _Finished:
            pass
        except BaseException as error:  # raised again where the window was asked for
            self._error = error
        finally:
            self._windows.answered.release()

    def __enter__(self) -> "Fit":
        """Start, and run the first step, which costs what no other does."""
        self._thread.start()
        self._wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._windows.finished, self._windows.aside = True, None
        self._windows.asked.release()
        self._thread.join()

    def _wait(self) -> None:
        self._windows.answered.acquire()
        if self._error is not None:
            raise self._error

    def window(self, steps: int) -> Times:
        """Run so many steps."""
        self._windows.steps = steps
        times: Times = self._ask(None)
        return times

    def aside(self, work: Callable[[], Any]) -> Any:
        """Run something else between two steps and return what it does.

        It runs in the fit's thread: every thread has a part of the heap to itself and mostly a core, so steps of two
        threads do not compare to a few per cent.
        """
        return self._ask(work)

    def _ask(self, work: Callable[[], Any] | None) -> Any:
        self._windows.aside = work
        self._windows.asked.release()
        self._wait()
        return self._windows.times


class Loop:
    """The hand-written loop a careful person would write, with nothing but the training in it.

    Args:
        module: its network, its loss and its optimiser are used, nothing of Lightning's.
        class_counts: images per class, for the loss.
        bf16: run the forward pass under bf16 autocast.
        steps_per_epoch: of the schedule.
        epochs: of the schedule.
    """

    def __init__(
        self, module: ExpressionModule, class_counts: Any, bf16: bool, steps_per_epoch: int, epochs: int
    ) -> None:
        module.loss_function.setup(torch.as_tensor(class_counts))
        module.loss_function.attach(module)
        groups = [*module.parameter_groups(), {"params": list(module.loss_function.parameters())}]
        made = module.optim.configure(groups, steps_per_epoch=steps_per_epoch, max_epochs=epochs)
        self.optimizer, self.scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
        self.module, self.bf16 = module.train(), bf16
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def run(self, batches: Iterable[Batch]) -> None:
        """A step on each batch."""
        module, optimizer, scheduler, recipe = self.module, self.optimizer, self.scheduler, self.module.optim
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss, _ = module.loss(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters, recipe.clip_norm)
            if recipe.clip_value is not None:
                nn.utils.clip_grad_value_(self.parameters, recipe.clip_value)
            optimizer.step()
            scheduler.step()


def by_hand(module: ExpressionModule, data: Prepared, bf16: bool) -> Callable[[int], Times]:
    """Windows of a hand-written loop, its first step, which costs what no other does, behind it."""
    loop = Loop(module, data.class_counts("train"), bf16, ENDLESS, epochs=1)
    batches = iter(data)
    loop.run(itertools.islice(batches, 1))

    def window(steps: int) -> Times:
        with timed(steps) as times:
            loop.run(itertools.islice(batches, steps))
        return times

    return window


def twin(module: ExpressionModule) -> ExpressionModule:
    """A copy with the same weights."""
    return copy.deepcopy(module)


def steps_for(seconds: float, window: Callable[[int], Times]) -> tuple[int, float]:
    """How many steps fill so much CPU time, and what one takes in seconds, from a window of three."""
    once = window(3)
    return max(1, round(seconds * 3 / once.cpu)), once.cpu / 3
