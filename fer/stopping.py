"""How a run ends before its time: when it learns no more, by a signal, or with a process it cannot do without."""

import logging
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from fer.models.base import ExpressionModule
from fer.runs import RunFolder

log = logging.getLogger(__name__)
INTERRUPTED = 130  # exit code after Ctrl-C or SIGTERM; Lightning's own would be 0 or 1
FAILED = 1
LOOK_SECONDS = 0.5  # between looks at the other processes of a data-parallel run
GRACE_SECONDS = 3.0  # for a run to end by the error that ended another of its processes
IN_TRAINING = b"ending after this step, with a checkpoint; the same signal again ends at once\n"


class Stopped(SystemExit):
    """A signal ended the run in order."""

    def __init__(self) -> None:
        super().__init__(INTERRUPTED)


class Stop:
    """What signals do to a run within the block: the first ends it in order, a second one at once.

    In training the first signal only sets ``asked``; `fer.callbacks.Curves` saves a checkpoint after the step and
    raises `Stopped`. Elsewhere there is nothing to save and `Stopped` comes immediately. submitit's notice that its job
    is about to be pre-empted ends the run in the same order, after which submitit's own handler queues the job again.

    Attributes:
        asked: a signal has come.
        training: whether steps are being made, so that there is something to save.
    """

    def __init__(self) -> None:
        self.asked = self.training = False
        self._ended = False  # by SIGINT or SIGTERM, whose second one ends at once
        self._before: dict[int, Any] = {}
        self._requeue: int | None = None

    def __enter__(self) -> "Stop":
        self.take()
        return self

    def take(self) -> None:
        """Take the signals over, also from who took them since."""
        if threading.current_thread() is not threading.main_thread():
            return
        notice = getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"))
        signals = {signal.SIGINT: self._end, signal.SIGTERM: self._end, notice: self._notice}
        for number, handler in signals.items():
            if number == notice and not callable(signal.getsignal(notice)):  # no job of submitit's
                continue
            before = signal.signal(number, handler)
            self._before.setdefault(number, before)

    def __exit__(self, kind: Any, *_: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self._requeue is not None and kind is Stopped:
            self._before[self._requeue](self._requeue, None)  # ends the process with the exit code submitit waits for

    def _end(self, number: int, _: FrameType | None) -> None:
        if self._ended:
            os._exit(INTERRUPTED)
        self._ended = True
        self._ask(number)

    def _notice(self, number: int, _: FrameType | None) -> None:
        self._requeue = number
        self._ask(number)

    def _ask(self, number: int) -> None:
        first, self.asked = not self.asked, True
        if not first:
            return
        if not self.training:
            raise Stopped
        os.write(2, signal.Signals(number).name.encode() + b": " + IN_TRAINING)  # no lock, unlike logging


class Patience(EarlyStopping):
    """Lightning's early stopping, on the scores that say something; a training it has ended is not gone on with."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """End a resumed training where it had ended."""
        trainer.should_stop = trainer.should_stop or self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Look at the epoch's score."""
        assert isinstance(pl_module, ExpressionModule)
        if trainer.current_epoch >= pl_module.scored_from:
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Look at the score, where there are several validations in an epoch."""
        assert isinstance(pl_module, ExpressionModule)
        if trainer.current_epoch >= pl_module.scored_from:
            super().on_validation_end(trainer, pl_module)


class Ranks(Callback):
    """Ends a data-parallel run whose other processes have died, with the reason, instead of waiting for them.

    The first process watches those it has started, each of those watches who started it.

    Args:
        folder: the run folder, where the reason is kept.
        stop: whether the processes are asked to end, which is no death.
    """

    def __init__(self, folder: RunFolder, stop: Stop) -> None:
        self.folder, self.stop = folder, stop

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Begin to watch."""
        if stage != "fit" or trainer.world_size == 1:
            return
        processes = getattr(trainer.strategy.launcher, "procs", [])
        for thread in threading.enumerate():
            if thread.name == "child-process-observer":  # Lightning's own kills the run without a word
                thread._child_processes = []  # type: ignore[attr-defined]
        watch, about = (self._watch_others, processes) if processes else (self._watch_first, os.getppid())
        threading.Thread(target=watch, args=(about,), daemon=True).start()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Leave the last word to the watch, which knows the reason, where a dead process broke a collective."""
        if trainer.world_size > 1 and isinstance(exception, RuntimeError):
            time.sleep(2 * LOOK_SECONDS)

    def _watch_first(self, parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        os._exit(FAILED)

    def _watch_others(self, processes: list[Any]) -> None:
        while not (ended := {rank: p.returncode for rank, p in enumerate(processes, 1) if p.poll()}):
            time.sleep(LOOK_SECONDS)
        rank, code = min(ended.items())
        if code > 0:  # it said why; this process may be about to end by the same error
            time.sleep(GRACE_SECONDS)
        if self.stop.asked:
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = "; the system does so when memory runs out" if code == -signal.SIGKILL else ""
        reason = f"process {rank} of the data-parallel run {how}{hint}; the same command goes on"
        print(f"error: {reason}", file=sys.stderr, flush=True)
        for process in processes:
            process.kill()
        self.folder.set_status("failed", error=reason)
        os._exit(FAILED)
