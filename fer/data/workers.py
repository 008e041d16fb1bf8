"""Worker processes of a DataLoader: one that dies or hangs ends the run at once, with a sentence.

PyTorch tells of a dead worker in a signal handler, whose exception comes up wherever the process is at work by then, in
the middle of saving a checkpoint too, or by any of the errors that a half-sent batch ends in; and its orderly end of
the other workers waits for a lock that the dead one may hold. Here a death interrupts nothing but the wait for a batch,
gives the same sentence however it shows itself, and the other workers are killed.
"""

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any
from weakref import WeakSet

from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from fer.errors import UserError

HUNG_SECONDS = 1800.0  # without a batch: the limit that torch has for processes of a data-parallel run
NOTICE_SECONDS = 5.0  # from a broken connection to the end of the process that broke it
_HINTS = {
    signal.SIGKILL: ", as the system does when memory runs out",
    signal.SIGBUS: ", which is what a full /dev/shm looks like",
}

_crews: WeakSet[Any] = WeakSet()  # the iterators of this process's DataLoaders, which hold the workers
_asking = False  # for a batch, and nothing is lost by an exception


class WorkerDied(UserError):
    """A data worker has ended before its time, or gives nothing."""


def init_worker(_: int) -> None:
    """Leave signals to the run, which still needs batches after Ctrl-C or a notice to all processes of a job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none: there a SIGTERM ends the worker, whoever sends it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()


def _end_by_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """One epoch of a loader.

    Raises:
        WorkerDied: a worker of any loader of this process has died, or none of this one's gives anything.
    """
    if not loader.num_workers:
        yield from loader
        return
    iterator = _ask(lambda: _begun(loader))
    while (batch := _ask(lambda: next(iterator, None))) is not None:
        yield batch


def _begun(loader: DataLoader[Any]) -> Iterator[Any]:
    if threading.current_thread() is threading.main_thread():
        signal_handling._set_SIGCHLD_handler()  # which PyTorch does once, and not again over ours
        signal.signal(signal.SIGCHLD, _notice)
    iterator = iter(loader)
    _crews.add(iterator)
    return iterator


class _Noticed(BaseException):
    """No `Exception`: PyTorch would catch it, and ask for the lock."""


def _notice(*_: Any) -> None:
    """Interrupt the wait for a batch that will not come; at any other time the next one asked for tells."""
    global _asking
    if _asking and _dead():
        _asking = False
        raise _Noticed


def _ask(work: Callable[[], Any]) -> Any:
    global _asking
    try:
        try:
            _asking = True
            if _dead():
                raise _Noticed
            return work()
        finally:
            _asking = False
    except (Exception, _Noticed) as error:  # the handler is quiet by now, so that this is not interrupted
        dead = _dead(NOTICE_SECONDS if isinstance(error, OSError | EOFError) else 0.0)
        if not dead and "DataLoader timed out" not in str(error):
            raise
        said = _sentence(dead)
        dismiss()
        raise WorkerDied(said) from None


def _dead(seconds: float = 0.0) -> list[BaseProcess]:
    """The workers that have ended, waited for so long."""
    crews = [iterator for iterator in _crews if not iterator._shutdown]
    workers = {worker.sentinel: worker for iterator in crews for worker in iterator._workers}
    # Not worker.is_alive(), which must not be interrupted by itself.
    return [workers[end] for end in wait(list(workers), seconds) if isinstance(end, int)]


def _sentence(dead: list[BaseProcess]) -> str:
    if not dead:
        return (
            f"the data workers have given nothing for {HUNG_SECONDS / 60:g} minutes, as when a disk does not answer: "
            "data.num_workers=0 reads without them"
        )
    worker = dead[0]
    worker.join(NOTICE_SECONDS)
    code = worker.exitcode
    if code is None or code >= 0:
        how = f"has ended with exit code {code}"
    else:
        number = signal.Signals(-code)
        how = f"was killed by {number.name}{_HINTS.get(number, '')}"
    return f"data worker {worker.pid} {how}: lower data.num_workers"


def dismiss() -> None:
    """Kill all workers of this process, whatever they are doing; nothing is theirs to lose.

    A run does so at its end. Left to PyTorch, they end when the loader is collected, and that may happen in one of the
    threads that speak to them, which then waits for itself.
    """
    for iterator in list(_crews):
        if not iterator._shutdown:
            iterator._shutdown = True  # PyTorch's orderly end may wait forever for what a dead worker held
            for queue in iterator._index_queues:
                queue.cancel_join_thread()
                queue.close()
            if hasattr(iterator, "_pin_memory_thread"):
                iterator._pin_memory_thread_done_event.set()
            for worker in iterator._workers:
                worker.kill()
            for worker in iterator._workers:
                worker.join(NOTICE_SECONDS)
            _remove_worker_pids(id(iterator))
    _crews.clear()


os.register_at_fork(after_in_child=_crews.clear)  # they are the parent's
atexit.register(dismiss)  # none is waited for at the end of the process
