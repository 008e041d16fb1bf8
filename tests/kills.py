"""Trainings killed at random instants and gone on with: the weights must not show it.

    python tests/kills.py forked 200 kills.json 0      children of a process that has imported everything; a seed
    python tests/kills.py command 20 kills.json 0      `python -m fer.train` itself
    python tests/kills.py gpu 20 kills.json 0          the same on a GPU, by deterministic kernels
    python tests/kills.py workers 40 kills.json 0      data workers of such children
    python tests/kills.py syscalls 0 kills.json 0      strace lets each system call of a saving fail, or kills there

A child is killed at a random time, or where it enters a random phase for the n-th time, and a little later. It says
where it is in one byte of shared memory, which outlives it.
"""

import contextlib
import hashlib
import json
import mmap
import os
import random
import re
import resource
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conftest import TINY, composed
from omegaconf import OmegaConf

import fer.data.store
import fer.runs
from fer.checkpoints import CheckpointFiles, load_checkpoint, resume_point
from fer.config import guarded
from fer.experiment import run_experiment
from fer.models.base import ExpressionModule
from fer.runs import RunFolder

# Three epochs of eight steps, a checkpoint every second step.
WORDS = [*TINY, "logger=csv", "model.width=4", "data.train=84", "data.val=21", "data.test=21", "data.batch_size=10"]
WORDS += ["trainer.max_epochs=3", "trainer.checkpoint_steps=2", "trainer.precision=32-true", "data.eval_batch_size=7"]
WORDS += ["trainer.weight_ema=0.8"]  # validated and kept is an average, which is in the checkpoint too
ON_GPU = [word for word in WORDS if word != "trainer=cpu"] + ["trainer=gpu", "trainer.deterministic=true"]
STEPS = 24
PHASES = ("start", "step", "validation", "checkpoint", "other file", "test", "store")
KILLS_PER_TRAINING = 10


class Watch:
    """Where a child is, and a word to its parent when it comes where it shall be killed."""

    def __init__(self) -> None:
        self.place = mmap.mmap(-1, 1)
        self.visits: Counter[str] = Counter()
        self.wanted: tuple[str, int] | None = None
        self.pipe = -1
        self.hold: int | None = None  # where a child waits for a word before it goes on

    @property
    def phase(self) -> str:
        return PHASES[self.place[0]]

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        before = self.place[0]
        if PHASES[before] != "checkpoint":  # a checkpoint is a file too
            self.place[0] = PHASES.index(phase)
            self.visits[phase] += 1
            if (phase, self.visits[phase]) == self.wanted:
                os.write(self.pipe, b"x")
                if self.hold is not None:
                    os.read(self.hold, 1)
        yield
        self.place[0] = before

    def around(self, phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            with self.within(phase):
                return work(*args, **options)

        return watched

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """The phases of every run within the block are known."""
        with contextlib.ExitStack() as stack:
            for owner, name, phase in (
                (ExpressionModule, "training_step", "step"),
                (ExpressionModule, "validation_step", "validation"),
                (ExpressionModule, "test_step", "test"),
                (CheckpointFiles, "save_checkpoint", "checkpoint"),
                (fer.data.store, "_build", "store"),
            ):
                stack.enter_context(mock.patch.object(owner, name, self.around(phase, getattr(owner, name))))
            write = self.around("other file", fer.runs.write_bytes)
            for name, module in list(sys.modules.items()):
                if name.startswith("fer.") and hasattr(module, "write_bytes"):
                    stack.enter_context(mock.patch.object(module, "write_bytes", write))
            yield


def weights(folder: Path) -> str:
    """SHA-256 of both checkpoints' weights, and of the curves and predictions."""
    digest = hashlib.sha256()
    for name in ("best", "last"):
        state = load_checkpoint(folder / "checkpoints" / f"{name}.ckpt")["state_dict"]
        for key in sorted(state):
            digest.update(key.encode() + state[key].numpy().tobytes())
    for name in ("metrics.csv", "predictions.csv"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def saved_step(folder: Path) -> int:
    """The step a resume will go on from."""
    run = RunFolder(folder)
    return int(load_checkpoint(resume_point(run))["global_step"]) if run.has_checkpoint() else 0


def logged(folder: Path) -> list[int]:
    path = RunFolder(folder).steps
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def train(folder: Path, cache: Path, resumed: bool, workers: int | None = None) -> None:
    """One session of the training, in this process; with images read by so many workers, if that is given."""
    torch.set_num_threads(1)
    if resumed and (folder / "config.yaml").exists() and RunFolder(folder).status():
        config = OmegaConf.load(folder / "config.yaml")
    else:
        config, resumed = CONFIG.copy(), False
        config.data.cache = str(cache)
        if workers is not None:
            config.data.resident, config.data.num_workers = "no", workers
    with mock.patch("fer.at_test.confusion_figure"):  # half a second each, and nothing goes on from a picture
        run_experiment(config, folder, command="python -m fer.train", resumed=resumed)


CONFIG: Any = None  # composed once, by `prepare`


@cache
def prepare(place: Path) -> tuple[str, float]:
    """Import and warm up everything by the uninterrupted run; its hash and its seconds."""
    global CONFIG
    CONFIG = composed(*WORDS)
    started = time.monotonic()
    with quiet():
        train(place / "reference", place / "store", resumed=False)
    assert logged(place / "reference") == list(range(1, STEPS + 1))
    return weights(place / "reference"), time.monotonic() - started


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What runs print goes nowhere."""
    nowhere, kept = os.open(os.devnull, os.O_WRONLY), (os.dup(1), os.dup(2))
    sys.stdout.flush()
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        for handle in (nowhere, *kept):
            os.close(handle)


def forked(
    work: Callable[[], Any], ready: Callable[[int, int], None] = lambda pid, pipe: None, pipe: Any = None
) -> int:
    """Run something in a child; its wait status. ``ready`` is called in the parent with the child's id."""
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would leave threads behind: OMP_NUM_THREADS=1"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            nowhere = os.open(os.environ.get("KILLS_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(nowhere, 1), os.dup2(nowhere, 2)
            sys.stdout, sys.stderr = (os.fdopen(handle, "w", closefd=False) for handle in (1, 2))  # not pytest's
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if pipe is not None:
        os.close(pipe[1])
    ready(pid, pipe[0] if pipe is not None else -1)
    return os.waitpid(pid, 0)[1]


def killed(watch: Watch, work: Callable[[], Any], wanted: tuple[str, int] | None, seconds: float) -> bool:
    """Run something and kill it ``seconds`` after its beginning or the ``wanted`` phase's; whether it died."""
    pipe = os.pipe()
    watch.visits.clear()
    watch.place[0], watch.wanted, watch.pipe = 0, wanted, pipe[1]

    def kill(pid: int, end: int) -> None:
        came = select.select([end], [], [], None if wanted else seconds)[0]
        if came and os.read(end, 1):
            time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    status = forked(work, kill, pipe)
    os.close(pipe[0])
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert status == 0, f"a session ended with exit code {os.waitstatus_to_exitcode(status)}"
    return False


def kill_trainings(kills: int, seed: int, place: Path) -> dict[str, Any]:
    """Kill trainings until ``kills`` children died, going on after each; what was seen."""
    draw, watch = random.Random(seed), Watch()
    reference, seconds = prepare(place)
    phases: Counter[str] = Counter()
    lost: list[int] = []
    trainings = fell_back = 0
    with watch.installed():
        while sum(phases.values()) < kills:
            folder, cache = place / f"run{trainings}", place / "store"
            if trainings % 4 == 0:  # with a store of its own, killed while that is built
                cache = place / f"store{trainings}"
            died = 0
            while True:
                before, step = len(logged(folder)), saved_step(folder)
                wanted: tuple[str, int] | None = None
                delay = draw.uniform(0, seconds)
                if cache != place / "store" and died < 2:
                    wanted, delay = ("store", 1), draw.uniform(0, 0.3)
                elif draw.random() < 0.7:
                    phase, most = draw.choice((("step", 8), ("validation", 4), ("checkpoint", 6), ("other file", 6)))
                    wanted, delay = (phase, draw.randint(1, most)), draw.choice((0.0, draw.uniform(0, 0.01)))
                ending = died == KILLS_PER_TRAINING or sum(phases.values()) == kills
                if ending:
                    wanted, delay = ("start", 0), 0.0  # where it never comes
                work = lambda resumed=bool(died % 2): train(folder, cache, resumed)  # noqa: B023, E731
                dead = killed(watch, work, wanted, delay)
                made = logged(folder)[before:]
                assert made == list(range(step + 1, step + 1 + len(made))), (step, made)
                if not dead:
                    break
                phases[watch.phase] += 1
                died += 1
                lost.append((made[-1] if made else step) - saved_step(folder))
                run = RunFolder(folder)
                fell_back += run.has_checkpoint() and resume_point(run) != run.last
                stores = [path for path in cache.glob("*") if path.is_dir() and not path.name.endswith(".unfinished")]
                assert all((path / "bad.json").exists() for path in stores)
            assert weights(folder) == reference, f"{folder} differs"
            trainings += 1
            shutil.rmtree(folder)
    return summary(phases, lost, trainings, reference) | {"previous_taken": fell_back}


WORKER_DIED = re.compile(
    r"error: data worker \d+ was killed by SIGKILL, .* memory .*: lower data\.num_workers; .* goes on"
)
SOON = 10.0  # seconds within which a run whose worker has died ends


def kill_workers(kills: int, seed: int, place: Path) -> dict[str, Any]:
    """Kill one or all data workers of a training at random instants; it must end soon, say so, and go on."""
    draw, watch = random.Random(seed), Watch()
    prepare(place)
    assert forked(lambda: train(place / "read", place / "store", resumed=False, workers=0)) == 0
    reference, said = weights(place / "read"), place / "said"
    os.environ["KILLS_LOG"] = str(said)
    phases: Counter[str] = Counter()
    lost: list[int] = []
    seconds: list[float] = []
    trainings = unneeded = 0

    def strike(pid: int, end: int) -> None:
        children = Path(f"/proc/{pid}/task/{pid}/children")
        if wanted is None:
            while not (found := children.read_text().split()):
                time.sleep(0.001)
        else:
            os.read(end, 1)
            time.sleep(delay)
            found = children.read_text().split()
        for worker in found if draw.random() < 0.3 else draw.sample(found, min(len(found), 1)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(worker), signal.SIGKILL)
        began = time.monotonic()
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            assert time.monotonic() - began < 6 * SOON, (
                f"a run whose worker has died hangs: {wanted}, {said.read_text()}"
            )
            time.sleep(0.01)
        seconds.append(time.monotonic() - began)

    with watch.installed():
        while sum(phases.values()) < kills:
            folder, died = place / f"run{trainings}", 0
            while True:
                before, step = len(logged(folder)), saved_step(folder)
                phase, most = draw.choice((("start", 0), ("step", 6), ("validation", 3), ("checkpoint", 4)))
                wanted, delay = (phase, draw.randint(1, most)) if most else None, draw.choice((0.0, draw.random() / 50))
                workers, resumed = draw.choice((1, 2)), bool(died % 2)
                work = lambda: guarded(lambda: train(folder, place / "store", resumed, workers))  # noqa: B023, E731
                ending = died == KILLS_PER_TRAINING or sum(phases.values()) == kills
                said.unlink(missing_ok=True)
                watch.visits.clear()
                pipe = os.pipe()
                watch.place[0], watch.wanted, watch.pipe = 0, None if ending else wanted, pipe[1]
                code = os.waitstatus_to_exitcode(forked(work, (lambda *_: None) if ending else strike, pipe))
                os.close(pipe[0])
                made = logged(folder)[before:]
                assert made == list(range(step + 1, step + 1 + len(made))), (step, made)
                unneeded += code == 0 and not ending
                if code == 0:
                    break
                errors = [line for line in said.read_text().splitlines() if line.startswith("error: ")]
                assert code == 2, (code, said.read_text())
                assert len(errors) == 1, errors
                assert WORKER_DIED.fullmatch(errors[0]), errors
                assert str(folder) in errors[0]
                status = json.loads((folder / "status.json").read_text())
                assert (status["status"], f"error: {status['error']}") == ("failed", errors[0])
                phases[phase] += 1
                died += 1
                lost.append((made[-1] if made else step) - saved_step(folder))
            assert weights(folder) == reference, f"{folder} differs"
            trainings += 1
            shutil.rmtree(folder)
    del os.environ["KILLS_LOG"]
    assert max(seconds) < SOON, seconds
    times = {"unneeded": unneeded, "seconds": [round(statistics.median(seconds), 2), round(max(seconds), 2)]}
    return summary(phases, lost, trainings, reference) | times


def kill_commands(kills: int, seed: int, place: Path, config: list[str] = WORDS) -> dict[str, Any]:
    """The same with `python -m fer.train` and this config, killed after a random number of steps."""
    draw = random.Random(seed)
    phases: Counter[str] = Counter()
    lost: list[int] = []
    trainings = 0
    environment = {**os.environ, "FER_CACHE": str(place / "store"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fer.train"]
    whole = [*command, *config, f"hydra.run.dir={place / 'uninterrupted'}"]
    subprocess.run(whole, env=environment, stdout=subprocess.DEVNULL, cwd=place, check=True)
    reference = weights(place / "uninterrupted")
    while sum(phases.values()) < kills:
        folder = place / f"run{trainings}"
        for death in range(5):
            before, step = len(logged(folder)), saved_step(folder)
            words = [f"resume={folder}"] if death % 2 and step else [*config, f"hydra.run.dir={folder}"]
            ending = death == 4 or sum(phases.values()) == kills
            target = STEPS + 1 if ending else before + draw.randint(1, 7)
            process = subprocess.Popen(
                [*command, *words],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=place,
            )
            while process.poll() is None and (ending or len(logged(folder)) < target):
                time.sleep(0.01)
            if not ending:
                time.sleep(draw.choice((0.0, draw.uniform(0, 0.5))))
                process.kill()
            code = process.wait()
            made = logged(folder)[before:]
            assert made == list(range(step + 1, step + 1 + len(made))), (step, made)
            if code == 0:
                break
            assert code == -signal.SIGKILL, code
            phases["command"] += 1
            lost.append((made[-1] if made else step) - saved_step(folder))
        assert weights(folder) == reference, f"{folder} differs"
        trainings += 1
    return summary(phases, lost, trainings, reference)


def checkpoint(step: int) -> dict[str, Any]:
    """A small checkpoint of a run, of two pages of the disk."""
    return {"global_step": step, "loops": {}, "state_dict": {"w": torch.full((2000,), float(step))}}


def save(folder: RunFolder, step: int) -> None:
    CheckpointFiles().save_checkpoint(checkpoint(step), folder.last, {"previous": folder.previous})


def inject_faults(_: int, seed: int, place: Path) -> dict[str, Any]:
    """Let strace make the n-th call of each kind fail, or kill there, while a checkpoint is saved over another."""
    found: Counter[str] = Counter()
    used: Counter[str] = Counter()
    for call in ("openat", "write", "fsync", "rename", "close"):
        for fault in ("error=ENOSPC", "error=EDQUOT", "error=EIO", "error=EROFS", "signal=SIGKILL"):
            for number in range(1, 20):
                folder = RunFolder(place / f"{call}-{fault[6:]}-{number}")
                save(folder, 1)
                save(folder, 2)
                log, pipe = folder.path / "strace", os.pipe()
                expression = f"inject={call}:{fault}:when={number}"

                def begin(pid: int, _: int, log: Path = log, expression: str = expression, end: int = pipe[1]) -> None:
                    words = ["strace", "-qq", "-p", str(pid), "-o", str(log), "-e", f"trace={call}", "-e", expression]  # noqa: B023
                    subprocess.Popen(words, stderr=subprocess.DEVNULL)
                    while "TracerPid:\t0" in Path(f"/proc/{pid}/status").read_text():
                        time.sleep(0.005)
                    os.write(end, b"x")

                def work(folder: RunFolder = folder, end: int = pipe[0]) -> None:
                    os.read(end, 1)
                    save(folder, 3)

                status = forked(work, begin)
                os.close(pipe[0]), os.close(pipe[1])
                time.sleep(0.01)
                trace = log.read_text()
                if "INJECTED" not in trace and not os.WIFSIGNALED(status):
                    assert status == 0
                    break
                point = resume_point(folder)
                step = load_checkpoint(point)["global_step"]
                assert step == 3 or (status != 0 and step == 2), (call, fault, number, step, status)
                found[f"{call} {fault.partition('=')[2]}"] += 1
                used[point.name] += 1
                fer.runs.remove_leftovers(folder.last.parent)
                save(folder, 4)
                assert load_checkpoint(resume_point(folder))["global_step"] == 4
    return {"faults": dict(found), "all": sum(found.values()), "usable": sum(used.values()), "taken": dict(used)}


def summary(phases: Counter[str], lost: list[int], trainings: int, reference: str) -> dict[str, Any]:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "kills": sum(phases.values()),
        "phases": {phase: phases[phase] for phase in (*PHASES, "command") if phases[phase]},
        "trainings": trainings,
        "identical": trainings,  # anything else has raised
        "sha256": reference,
        "steps_between_checkpoints": 2,
        "steps_lost": {str(steps): lost.count(steps) for steps in sorted(set(lost))},
        "core_minutes": round(sum(u.ru_utime + u.ru_stime for u in used) / 60, 2),
    }


def main() -> None:
    way, kills, output, seed = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    with tempfile.TemporaryDirectory() as place:
        os.environ["FER_CACHE"] = str(Path(place) / "store")
        ways = {
            "forked": kill_trainings,
            "command": kill_commands,
            "gpu": partial(kill_commands, config=ON_GPU),
            "workers": kill_workers,
            "syscalls": inject_faults,
        }
        found = ways[way](kills, seed, Path(place))
    record = json.loads(output.read_text()) if output.exists() else {}
    record.setdefault(way, []).append({"seed": seed, **found})  # a part of the whole, which may come in several
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
