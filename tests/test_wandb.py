"""W&B's server and local process may fail as they like: a run neither waits for them nor loses a metric."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_wandb import FakeWandb, wandb_records

from fer.loggers import Wandb
from fer.wandb_server import choose_way

ROWS = 30


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    here = FakeWandb()
    monkeypatch.setenv("WANDB_BASE_URL", here.url)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    yield here
    here.close()


@pytest.fixture
def logger(tmp_path: Path) -> Iterator[Wandb]:
    names: dict[str, Any] = {"project": "fer", "entity": None, "group": None, "job_type": "train", "tags": []}
    made = Wandb(**names, mode="auto", upload_seconds=0.0, run_id="abc", name="run", save_dir=str(tmp_path))
    yield made
    if made.upload is not None and made.upload.process.poll() is None:
        os.killpg(made.upload.process.pid, signal.SIGKILL)  # the upload, what it started, and nothing else


def log_rows(logger: Wandb, first: int = 0) -> None:
    for i in range(first, ROWS):
        logger.log_metrics({"val/acc": i / ROWS, "epoch": i}, i)


def values(rows: list[dict[str, Any]]) -> list[float]:
    return [row["val/acc"] for row in rows if "val/acc" in row]


def recorded(folder: Path) -> list[float]:
    """What W&B's record of a finished run holds; its local process closes the file on its own time."""
    deadline = time.monotonic() + 120
    while not any(r.WhichOneof("record_type") == "exit" for r in wandb_records(folder)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    items = [r.history.item for r in wandb_records(folder) if r.WhichOneof("record_type") == "history"]
    return [float(i.value_json) for row in items for i in row if "val/acc" in (i.key, *i.nested_key)]


EVERY = [i / ROWS for i in range(ROWS)]


def test_a_run_is_uploaded_beside_itself(server: FakeWandb, logger: Wandb, tmp_path: Path) -> None:
    log_rows(logger)
    logger.upload_seconds = 120
    logger.finish(0)
    assert values(server.history) == recorded(tmp_path) == EVERY
    assert server.complete
    assert logger.upload is not None
    assert logger.upload.finish(0)
    assert list(tmp_path.glob("wandb/offline-run-*/*.synced"))


def test_a_silent_server_is_not_waited_for(
    server: FakeWandb, logger: Wandb, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from wandb.analytics.opentelemetry.opentelemetry_proxy import get_open_telemetry_proxy

    server.manner = "silent"
    log_rows(logger)
    assert get_open_telemetry_proxy() is None  # it would ask the server at the process' end, for up to half a minute
    logger.finish(0)
    assert logger.upload is not None
    assert logger.upload.process.poll() is None  # it waits, the run does not
    assert f"wandb sync {next(tmp_path.glob('wandb/offline-run-*'))}" in caplog.text
    assert recorded(tmp_path) == EVERY
    assert server.history == []


@pytest.mark.parametrize("refusal", ["no key", "no server"])
def test_nothing_is_started_where_nothing_can_be_uploaded(
    refusal: str, server: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refusal == "no key":
        monkeypatch.delenv("WANDB_API_KEY")
    else:
        server.close()
    way = choose_way("auto")
    assert (way.mode, way.upload) == ("offline", False)
    assert "`wandb sync` uploads the run later" in way.said


def test_the_way_a_person_or_an_agent_asks_for_is_taken(server: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_way("auto")[:2] == ("offline", True)
    assert choose_way("online")[:2] == ("online", False)
    assert choose_way("offline")[:2] == ("offline", False)
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert choose_way("auto")[:2] == ("online", False)  # the agent's sweep lives on the server
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_way("auto")[:2] == ("disabled", False)


def test_without_its_local_process_the_run_goes_on(logger: Wandb, caplog: pytest.LogCaptureFixture) -> None:
    import wandb

    log_rows(logger)
    listed = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,args="], capture_output=True, text=True)
    (pid,) = [int(line.split()[0]) for line in listed.stdout.splitlines() if "wandb-core" in line]
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            log_rows(logger)
        logger.attempt(lambda run: run.summary.update({"best": 1.0}))
        logger.finish(0)
    assert caplog.text.count("W&B's record ends here") == 1
    # The next job of the same process is recorded again.
    run = wandb.init(mode="offline", project="fer", dir=logger.save_dir)
    run.finish()
    assert not run.disabled


@pytest.mark.reliability
@pytest.mark.parametrize(("when", "manner"), [("middle", "error"), ("middle", "cut"), ("end", "cut")])
def test_a_server_that_fails_and_comes_back_gets_every_row_once(
    when: str, manner: str, server: FakeWandb, logger: Wandb, tmp_path: Path
) -> None:
    setattr(server, when, manner)
    half = ROWS // 2
    for i in range(half):
        logger.log_metrics({"val/acc": i / ROWS, "epoch": i}, i)
    deadline = time.monotonic() + 120
    while not server.history:  # W&B writes its record every 15 s
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert when == "end" or server.manner == manner
    log_rows(logger, half)
    logger.finish(0)
    assert recorded(tmp_path) == EVERY
    assert logger.upload is not None
    assert logger.upload.process.poll() is None
    while server.manner != manner:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    assert not server.complete
    server.manner, server.end = "healthy", None
    logger.upload.process.wait(120)
    assert server.complete
    assert sorted(values(server.history)) == EVERY


@pytest.mark.reliability
def test_what_an_upload_left_is_uploaded_by_the_command_it_names(
    server: FakeWandb, logger: Wandb, tmp_path: Path
) -> None:
    server.manner = "silent"
    log_rows(logger)
    logger.finish(0)
    assert logger.upload is not None
    os.killpg(logger.upload.process.pid, signal.SIGKILL)
    server.manner = "healthy"
    folder = next(tmp_path.glob("wandb/offline-run-*"))
    command = [sys.executable, "-m", "wandb", "sync", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert values(server.history) == EVERY


@pytest.mark.reliability
def test_a_killed_session_is_uploaded_before_the_one_that_goes_on(
    server: FakeWandb, logger: Wandb, tmp_path: Path
) -> None:
    """What a session left behind comes first, and an upload whose run was killed ends."""
    logger.uploads = False
    log_rows(logger)
    logger.finish(0)
    time.sleep(1.1)  # folders are named by the second
    names: dict[str, Any] = {"project": "fer", "entity": None, "group": None, "job_type": "train", "tags": []}
    again = Wandb(**names, mode="auto", upload_seconds=120, run_id="abc", name="run", save_dir=str(tmp_path))
    again.log_metrics({"val/acc": 1.0, "epoch": ROWS}, ROWS)
    again.finish(0)
    assert values(server.history) == [*EVERY, 1.0]
