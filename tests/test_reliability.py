"""Nothing is lost: kills, faults of the disk while something is saved, signals, processes that die."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import kills
import numpy as np
import pytest
import torch
from commands import call
from kills import STEPS, WORDS, Watch, checkpoint, forked, logged, save, saved_step, weights

import fer.runs
import fer.train
from fer.checkpoints import COMMENT, load_best, load_checkpoint, resume_point
from fer.config import check_run_folder, compose_like_hydra, guarded
from fer.data import workers
from fer.data.loaders import EpochSampler, StoreDataset, WorkerLoader
from fer.data.manifest import Manifest
from fer.data.store import open_store
from fer.data.workers import WorkerDied
from fer.errors import UserError
from fer.models.base import ExpressionModule
from fer.runs import RunFolder, remove_leftovers

pytestmark = pytest.mark.reliability

ENDED = 130


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a whole run of the tiny training lies, and the store of all of them; this process is warm."""
    folder = tmp_path_factory.mktemp("kills")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FER_CACHE", str(folder / "store"))
        kills.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def reference(place: Path) -> str:
    return weights(place / "reference")


# -- kills -----------------------------------------------------------------------------------------------------------


def test_killed_trainings_go_on_to_the_same_weights(place: Path, reference: str) -> None:
    """The short form; `make reliability-long` has 200 kills, of which docs/reliability.md tells."""
    found = kills.kill_trainings(15, 7, place)
    assert found["kills"] == 15
    assert found["identical"] == found["trainings"] > 0
    assert found["sha256"] == reference
    assert len(found["phases"]) >= 4
    assert max(map(int, found["steps_lost"])) <= found["steps_between_checkpoints"]


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="resume on a GPU, bitwise: there is none here")
def test_a_command_killed_on_a_gpu_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    found = kills.kill_commands(4, 0, tmp_path, kills.ON_GPU)
    assert found["kills"] == 4
    assert found["identical"] == found["trainings"] > 0


def test_a_killed_command_goes_on_to_the_same_weights(place: Path, reference: str) -> None:
    folder = place / "command"
    words = [sys.executable, "-m", "fer.train", *WORDS, f"hydra.run.dir={folder}"]
    process = subprocess.Popen(words, env={**os.environ, "FER_CACHE": str(place / "store")}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 1200
    while len(logged(folder)) < 11:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    step, made = saved_step(folder), len(logged(folder))
    done = call("train", f"resume={folder}", cwd=place, FER_CACHE=str(place / "store"))
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "results.json").read_text())
    assert (results["resumed_from_step"], results["steps"]) == (step, STEPS)
    assert logged(folder)[made:] == list(range(step + 1, STEPS + 1))  # no step before the checkpoint is made again
    assert weights(folder) == reference


# -- the disk --------------------------------------------------------------------------------------------------------


class Faults:
    """Counts the calls by which a file is written, and makes one of them fail or the last this process does."""

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how, self.calls = at, how, 0

    def __call__(self, work: Callable[..., Any], *args: Any) -> Any:
        self.calls += 1
        if self.calls != self.at:
            return work(*args)
        if self.how == "killed after":
            work(*args)
        if self.how.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(getattr(errno, self.how), os.strerror(getattr(errno, self.how)))

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        def opened(path: Path, mode: str) -> Any:
            file = self(open, path, mode)
            write, flush = file.write, file.flush

            class Torn:
                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: Any) -> None:
                    file.close()

                def fileno(self) -> int:
                    return int(file.fileno())

            def halves(content: Any) -> None:  # a file is not written in one go
                faults(write, content[: len(content) // 2])
                faults(write, content[len(content) // 2 :])

            faults, torn = self, Torn()
            torn.write, torn.flush = halves, lambda: faults(flush)  # type: ignore[attr-defined]
            return torn

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fer.runs, "open", opened, raising=False)
            for name in ("fsync", "replace"):
                work = getattr(os, name)
                patch.setattr(os, name, lambda *args, work=work: self(work, *args))
            yield


@pytest.mark.parametrize("how", ["ENOSPC", "EDQUOT", "EIO", "EROFS", "killed before", "killed after"])
def test_no_fault_while_saving_leaves_nothing_usable(tmp_path: Path, how: str) -> None:
    """Every open, write, flush, fsync and rename of saving a checkpoint fails once, or is the last."""
    folder = RunFolder(tmp_path)
    counted = Faults(0, how)
    save(folder, 1)
    with counted.installed():
        save(folder, 2)
    assert counted.calls == 8  # open, two halves, flush, fsync, two renames, fsync of the folder
    for at in range(1, counted.calls + 1):
        save(folder, 1)
        save(folder, 2)
        with Faults(at, how).installed():
            if how.startswith("killed"):
                assert os.WIFSIGNALED(forked(lambda: save(folder, 3)))
            else:
                with pytest.raises(OSError, match=r"last\.ckpt") as found:
                    save(folder, 3)
                assert found.value.errno == getattr(errno, how)
                assert list(folder.last.parent.glob(".*")) == []
        assert load_checkpoint(resume_point(folder))["global_step"] in (2, 3), at
        remove_leftovers(folder.last.parent)
        assert sorted(path.name for path in folder.last.parent.iterdir()) in (
            ["last.ckpt", "previous.ckpt"],
            ["previous.ckpt"],
        )
        save(folder, 4)
        assert load_checkpoint(resume_point(folder))["global_step"] == 4


def test_the_kernels_own_refusal_leaves_the_checkpoint_usable(tmp_path: Path) -> None:
    """The same with a limit on the size of files, which the kernel keeps like a quota."""
    folder = RunFolder(tmp_path)
    save(folder, 1)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(OSError, match="File too large"):
            save(folder, 2)

    assert forked(limited) == 0
    assert load_checkpoint(resume_point(folder))["global_step"] == 1


def test_any_damage_is_recognised_and_the_one_before_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 1)
    save(folder, 2)
    whole = folder.last.read_bytes()
    draw = random.Random(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.load", lambda *_, **__: checkpoint(2))  # what torch notices by itself does not count
        for _ in range(200):
            broken = bytearray(whole)
            broken[draw.randrange(len(broken) - COMMENT - 2)] ^= 1 << draw.randrange(8)
            folder.last.write_bytes(broken)
            with pytest.raises(UserError, match="SHA-256"):
                load_checkpoint(folder.last)
    for length in (0, 1, 100, len(whole) // 2, len(whole) - COMMENT - 9):
        folder.last.write_bytes(whole[:length])
        caplog.clear()
        assert resume_point(folder) == folder.previous
        assert f"{folder.last} cannot be loaded" in caplog.text or f"{folder.last} is damaged" in caplog.text
        assert f"going on from {folder.previous}, of step 1" in caplog.text
    folder.previous.write_bytes(b"")
    with pytest.raises(UserError, match="fresh=true starts the run anew"):
        resume_point(folder)


def test_a_checkpoint_is_a_zip_file_like_torchs_own(tmp_path: Path) -> None:
    save(RunFolder(tmp_path), 5)
    path = RunFolder(tmp_path).last
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        assert file.comment.startswith(b"sha256:")
    assert torch.load(path, weights_only=True)["global_step"] == 5


def test_a_damaged_best_checkpoint_says_what_mends_it(place: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.best.parent.mkdir()
    content = bytearray((place / "reference" / "checkpoints" / "best.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    folder.best.write_bytes(content)
    folder.set_status("done", command="python -m fer.train model=dan")
    with pytest.raises(UserError) as found:
        load_best(folder)
    assert f"python -m fer.train model=dan hydra.run.dir={tmp_path} fresh=true" in str(found.value)
    assert "best.ckpt is damaged" in str(found.value)


def full_disk(name: str, number: int) -> Callable[..., Any]:
    """`open` that finds the disk full for the n-th file of a name."""
    seen = 0

    def opened(path: Path, mode: str) -> Any:
        nonlocal seen
        seen += path.name.startswith(f".{name}.")
        if seen >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, mode)

    return opened


def test_a_full_disk_ends_a_training_with_a_sentence_and_loses_nothing(place: Path, reference: str) -> None:
    """It fills up again and again, at another file each time, and stays full until the process has ended."""
    folder = place / "full"
    files = [("last.ckpt", 2), ("best.ckpt", 1), ("metrics.csv", 1), ("predictions.csv", 1), ("results.json", 1)]
    for name, number in files:
        said = place / "said"

        def fill(name: str = name, number: int = number, said: Path = said) -> None:
            sys.stderr = said.open("w")
            fer.runs.open = full_disk(name, number)  # type: ignore[attr-defined]
            guarded(lambda: kills.train(folder, place / "store", resumed=False))

        assert os.waitstatus_to_exitcode(forked(fill)) == 2
        error = [line for line in said.read_text().splitlines() if line.startswith("error: ")]
        assert len(error) == 1
        assert name in error[0]
        assert "No space left on device; make room" in error[0]
        assert "Traceback" not in said.read_text()
        assert list(folder.rglob(".*.[0-9]*")) == []
    assert forked(lambda: kills.train(folder, place / "store", resumed=False)) == 0
    assert weights(folder) == reference


def test_leftovers_of_dead_processes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".last.ckpt.123", ".status.json.9", ".hydra", ".lock", ".a.b", "last.ckpt", ".5"):
        (tmp_path / name).write_bytes(b"x")
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".5", ".a.b", ".hydra", ".lock", "last.ckpt"]


def test_a_run_folder_that_cannot_be_written_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for place, words in (("/sys/fer/run", "error: /sys: "), (tmp_path / "file" / "run", "Not a directory")):
        config = compose_like_hydra("train", [f"hydra.run.dir={place}"])
        with pytest.raises(SystemExit) as left:
            guarded(lambda config=config: check_run_folder(config))
        assert left.value.code == 2
        assert words in capsys.readouterr().err
    guarded(lambda: check_run_folder(compose_like_hydra("train", [f"hydra.run.dir={tmp_path}/a/b"])))
    assert not (tmp_path / "a").exists()


def test_a_full_disk_leaves_no_half_store(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.load(next((place / "store").glob("*/manifest.npz")))
    image = np.zeros((8, 8), np.uint8)

    def build() -> Any:
        read = lambda manifest, rows: (image for _ in rows)  # noqa: E731
        return open_store(tmp_path, "x", {"size": 8, "channels": 1}, lambda: manifest, read, sequential=False)

    for name in ("fsync", "posix_fallocate"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: Faults(1, "ENOSPC")(None))
            with pytest.raises(OSError, match="No space left"):
                build()
        assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert len(build().images) == len(manifest)


# -- signals ---------------------------------------------------------------------------------------------------------


def signalled(watch: Watch, work: Callable[[], Any], wanted: tuple[str, int], *signals: int) -> tuple[int, float]:
    """Send signals where a session comes to the wanted phase; its exit code, and the seconds it took to end."""
    pipe, back, sent = os.pipe(), os.pipe(), []
    watch.visits.clear()
    watch.place[0], watch.wanted, watch.pipe, watch.hold = 0, wanted, pipe[1], back[0]

    def send(pid: int, end: int) -> None:
        assert os.read(end, 1)
        for number in signals:
            sent.append(time.monotonic())
            os.kill(pid, number)
            time.sleep(0.2)
        os.write(back[1], b"x")

    status = forked(work, send, pipe)
    for handle in (pipe[0], *back):
        os.close(handle)
    return os.waitstatus_to_exitcode(status), time.monotonic() - sent[0]


def test_a_signal_ends_a_run_within_a_step_and_loses_none(place: Path, reference: str) -> None:
    """In a step, the last step of an epoch, a validation, a test; each session goes on where the one before ended."""
    folder, watch, step = place / "signalled", Watch(), 0
    session = lambda: kills.train(folder, place / "store", resumed=False)  # noqa: E731
    with watch.installed():
        for wanted, number, expected in (
            (("step", 3), signal.SIGTERM, 3),
            (("step", 4), signal.SIGINT, 7),
            (("step", 1), signal.SIGTERM, 8),  # the epoch's last: the validation's first batch ends it
            (("validation", 2), signal.SIGINT, 8),  # in a validation that was begun anew
            (("step", 7), signal.SIGTERM, 15),
            (("validation", 1), signal.SIGTERM, 16),
            (("test", 2), signal.SIGTERM, STEPS),
        ):
            code, _ = signalled(watch, session, wanted, number)
            assert code == ENDED, wanted
            made = logged(folder)
            assert made == list(range(1, expected + 1)), wanted
            assert saved_step(folder) == expected, wanted
            step = expected
            assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    assert step == STEPS
    assert forked(session) == 0
    assert weights(folder) == reference
    assert json.loads((folder / "results.json").read_text())["resumed_from_step"] == STEPS


def test_a_second_signal_ends_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: Any) -> None:
        time.sleep(300)

    monkeypatch.setattr(ExpressionModule, "training_step", endless)
    for number in (signal.SIGTERM, signal.SIGINT):
        watch = Watch()
        with watch.installed():
            session = lambda: kills.train(place / "twice", place / "store", resumed=False)  # noqa: E731
            code, seconds = signalled(watch, session, ("step", 1), number, number)
        assert code == ENDED
        assert seconds < 10


def test_the_commands_exit_code_after_a_signal(place: Path) -> None:
    folder, said, watch = place / "terminated", place / "terminated.log", Watch()

    def command() -> None:
        sys.stderr = said.open("w")
        os.dup2(sys.stderr.fileno(), 2)
        os.environ["FER_CACHE"] = str(place / "store")
        sys.argv = ["fer.train", *WORDS, "trainer.max_epochs=300", f"hydra.run.dir={folder}"]
        fer.train.main()

    with watch.installed():
        code, _ = signalled(watch, command, ("step", 5), signal.SIGTERM)
    assert code == ENDED
    assert "SIGTERM: ending after this step" in said.read_text()
    assert "Traceback" not in said.read_text()
    assert saved_step(folder) == logged(folder)[-1] == 5


# -- processes that die ----------------------------------------------------------------------------------------------


class Reading(StoreDataset):
    """Forty images, ten batches; from the fourth on something happens first, in the worker."""

    def __init__(self, then: Callable[[], Any]) -> None:
        super().__init__(np.zeros((40, 8, 8, 1), np.uint8), {"label": np.zeros(40, np.int64)}, None)
        self.then = then

    def __getitems__(self, place: tuple[int, Any]) -> dict[str, torch.Tensor]:
        if place[1][0] >= 12:
            self.then()
        return super().__getitems__(place)


def reading(then: Callable[[], Any] = lambda: None) -> WorkerLoader:
    sampler = EpochSampler(lambda epoch: np.arange(40), 4, drop_last=True)
    cpu = torch.device("cpu")
    loader = WorkerLoader(sampler, Reading(then), 2, cpu, lambda batch, epoch: batch, remember_position=True)
    KEPT.append(loader)
    return loader


KEPT: list[WorkerLoader] = []  # until the end of the test, as a run keeps its loaders


def crew(loader: WorkerLoader) -> list[Any]:
    return list(loader.loader._iterator._workers)  # type: ignore[union-attr]


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def alone() -> Iterator[None]:
    """No worker is left by a test, and no thread that spoke to one."""
    assert not multiprocessing.active_children()
    yield
    workers.dismiss()
    KEPT.clear()
    assert not multiprocessing.active_children()
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(5)
    assert threading.active_count() == 1


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("when", ["at its start", "between", "awaited", "holding a lock", "half-way", "in validation"])
def test_a_dead_data_worker_is_a_sentence(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it was about: nothing waits for it, and the others end too."""
    loader = reading({"awaited": lambda: time.sleep(60), "half-way": lambda: half.append(1)}.get(when, lambda: None))
    half: list[int] = []
    if when == "at its start":
        monkeypatch.setattr(workers, "init_worker", lambda number: kill_itself() if number else None)
    if when == "half-way":  # the pipe stays open, since the other worker has it too, and never has the rest
        whole = Connection._send

        def torn(self: Any, content: Any, *_: Any) -> None:
            if half and len(content) > 100:
                os.write(self.fileno(), content[: len(content) // 2])
                kill_itself()
            whole(self, content)

        monkeypatch.setattr(Connection, "_send", torn)
    batches = iter(loader)
    started = time.monotonic()
    if when not in ("at its start", "half-way"):
        next(batches)
        victim = crew(loader)[1]
        if when == "awaited":
            threading.Timer(0.3, victim.kill).start()
        elif when == "holding a lock":  # for which PyTorch's own end of the other workers waits for ever
            loader.loader._iterator._workers_done_event._cond.acquire()  # type: ignore[union-attr]
            victim.kill()
        elif when == "in validation":
            next(batches := iter(reading()))
            victim.kill()
            victim.join()
        else:
            victim.kill()
    with pytest.raises(WorkerDied) as found:
        for _ in batches:
            pass
    assert time.monotonic() - started < 20
    memory = "as the system does when memory runs out: lower data.num_workers"
    assert re.fullmatch(rf"data worker \d+ was killed by SIGKILL, {memory}", str(found.value))
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("alone")
def test_workers_that_give_nothing_are_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "HUNG_SECONDS", 0.6)
    with pytest.raises(WorkerDied, match=r"have given nothing for 0\.01 minutes.*data\.num_workers=0"):
        list(reading(lambda: time.sleep(60)))


@pytest.mark.usefixtures("alone")
def test_an_error_of_a_living_worker_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "NOTICE_SECONDS", 0.1)

    def fail() -> None:
        raise ConnectionResetError("by the file server")

    with pytest.raises(ConnectionResetError, match="by the file server"):
        list(reading(fail))


@pytest.mark.usefixtures("alone")
def test_a_signal_to_all_processes_of_a_job_ends_no_worker() -> None:
    """Ctrl-C in a terminal, SLURM's notice: the run still needs batches until it has saved."""
    loader = reading(lambda: time.sleep(0.1))
    batches = iter(loader)
    next(batches)
    for worker in crew(loader):
        subprocess.run(["sh", "-c", f"kill -INT {worker.pid}; kill -TERM {worker.pid}"], check=True)
    assert len(list(batches)) == 9
    for worker in (leaving := crew(loader)):
        worker.terminate()  # from the run itself
    for worker in leaving:
        worker.join(20)
        assert worker.exitcode == 0


def test_a_run_whose_data_workers_are_killed_says_so_and_goes_on(place: Path) -> None:
    """The short form, as above; in training, validation, while saving, at the start."""
    found = kills.kill_workers(4, 0, place)
    assert found["kills"] == 4
    assert found["identical"] == found["trainings"] > 0


TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=300"]


def two_ranks(place: Path, folder: Path) -> tuple[subprocess.Popen[str], int]:
    """A run over two CPU processes, in its steps; and the process id of the second one."""
    words = [sys.executable, "-m", "fer.train", *[w for w in WORDS if w != "trainer=cpu"], *TWO]
    environment = {**os.environ, "FER_CACHE": str(place / "store")}
    process = subprocess.Popen(
        [*words, f"hydra.run.dir={folder}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline, made = time.monotonic() + 1200, len(logged(folder))
    while len(logged(folder)) < made + 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (other,) = [c for c in children if b"train_ddp_process_1" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return process, int(other)


def ended(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_a_dead_rank_ends_the_run_with_its_reason(place: Path) -> None:
    folder = place / "ranks"
    process, other = two_ranks(place, folder)
    os.kill(other, signal.SIGKILL)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 1
    reason = "process 1 of the data-parallel run was killed by SIGKILL; the system does so when memory runs out"
    assert f"error: {reason}" in error
    status = json.loads((folder / "status.json").read_text())
    assert (status["status"], status["error"].startswith(reason)) == ("failed", True)
    process, other = two_ranks(place, folder)  # and goes on
    process.kill()
    assert ended(other, 20)
    process.communicate()
    process, other = two_ranks(place, folder)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == ENDED
    assert ended(other, 20)
    assert saved_step(folder) == logged(folder)[-1]


@pytest.mark.slow
def test_a_preempted_job_is_queued_again_and_goes_on(place: Path) -> None:
    """submitit's notice of a pre-emption, SIGUSR2, to a job of its local executor."""
    folder = place / "queued"
    words = [sys.executable, "-m", "fer.train", "-m", *WORDS, "trainer.max_epochs=40", "trainer.checkpoint_steps=1000"]
    words += ["hydra/launcher=submitit_local", "seed=0", f"hydra.sweep.dir={folder}"]
    environment = {**os.environ, "FER_CACHE": str(place / "store")}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    job, deadline = folder / "job", time.monotonic() + 1200
    while len(logged(job)) < 20:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (controller,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (worker,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    os.kill(int(worker), signal.SIGUSR2)
    printed = process.communicate(timeout=1200)[0]
    assert process.returncode == 0, printed
    assert "1 jobs: 0 skipped, 1 resumed, 0 run, 0 failed" in printed
    assert logged(job) == list(range(1, 8 * 40 + 1))  # not one step twice
    assert json.loads((job / "results.json").read_text())["resumed_from_step"] >= 20
