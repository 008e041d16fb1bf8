"""What W&B costs a run while its server does its worst: python tests/wandb_cost.py

The same tiny run with `logger=csv`, without credentials, and against servers that are well, silent, slow, or fail in
the run's middle or at its end; each in a forked child, one of each in turn, several times (an argument; 5). A case is
compared with the run with `logger=csv`, and with that whose server is well, of the same turn. Figures of 5 turns or
more go into docs/results/wandb.json.
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from conftest import TINY, composed
from fake_wandb import FakeWandb, wandb_records
from soak import RESULTS

from fer.at_test import WandbPictures
from fer.callbacks import Curves, cpu_seconds
from fer.experiment import run_experiment
from fer.loggers import Wandb

REPEATS = 5
LIMIT = 2.0  # seconds that W&B may cost
ARRIVED = 90.0  # seconds in which the server has some of the rows, or the middle of the run is not where it fails
PLAIN, WELL = "logger=csv", "server well"
CASES: dict[str, dict[str, str] | None] = {
    PLAIN: None,
    "no credentials": None,
    WELL: {},
    "server silent": {"manner": "silent"},
    "server slow, 3 s per answer": {"manner": "slow"},
    "answers 500 from the middle on": {"middle": "error"},
    "cuts connections from the middle on": {"middle": "cut"},
    "silent from the middle on": {"middle": "silent"},
    "cuts connections at the end": {"end": "cut"},
}


class Clock:
    """Wall time inside some functions, calls within calls counted once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def around(self, owner: Any, name: str) -> None:
        """Count a method's time from now on."""
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            self._depth += 1
            began = time.monotonic()
            try:
                return method(*arguments, **options)
            finally:
                self._depth -= 1
                self.seconds += (time.monotonic() - began) * (self._depth == 0)

        setattr(owner, name, timed)


def one(case: str, folder: Path, said: int) -> None:
    """The run of one case, in a process of its own; writes its figures as JSON into a descriptor."""
    manner = CASES[case]
    server = None if manner is None else FakeWandb(**manner)
    if server is not None:
        os.environ.update(WANDB_BASE_URL=server.url, WANDB_API_KEY="k" * 40)
    paused, inside = 0.0, Clock()
    for owner, name in ((Wandb, "__init__"), (Wandb, "attempt"), (Wandb, "finish"), (WandbPictures, "on_test_end")):
        inside.around(owner, name)
    end = Curves.on_train_epoch_end

    def pausing(self: Curves, *arguments: Any) -> None:
        nonlocal paused
        end(self, *arguments)
        if server is not None and server.middle and len(self.history) == 1:
            began = time.monotonic()
            while server.middle:  # until the first rows have come
                assert time.monotonic() < began + ARRIVED
                time.sleep(0.05)
            paused += time.monotonic() - began

    Curves.on_train_epoch_end = pausing  # type: ignore[method-assign]
    words = [*TINY, "trainer.max_epochs=4"] + ["logger=csv"] * (case == PLAIN)
    began, before = time.monotonic(), cpu_seconds()
    run_experiment(composed(*words), folder / "run")
    figures: dict[str, Any] = {"seconds": time.monotonic() - began - paused, "cpu": cpu_seconds() - before}
    figures |= {"inside": inside.seconds, **kept(folder / "run", case)}
    os.write(said, json.dumps(figures).encode())


def kept(run: Path, case: str) -> dict[str, int]:
    """How many metrics the curves hold, and how many of them W&B's record holds too."""
    table = pd.read_csv(run / "metrics.csv")
    values = {(key, float(v)) for key in table if "/" in key for v in table[key].dropna()}
    if case == PLAIN:
        return {"metrics": len(values)}
    deadline = time.monotonic() + 60  # its local process closes the file on its own time
    while not any(r.WhichOneof("record_type") == "exit" for r in wandb_records(run)) and time.monotonic() < deadline:
        time.sleep(0.1)
    rows = [r.history.item for r in wandb_records(run) if r.WhichOneof("record_type") == "history"]
    items = [(i.key or "/".join(i.nested_key), json.loads(i.value_json)) for row in rows for i in row]
    recorded = {(key, float(value)) for key, value in items if isinstance(value, int | float)}
    near = sum(any(k == key and abs(v - value) < 1e-6 for k, v in recorded) for key, value in values)
    return {"metrics": len(values), "recorded": near}


def forked(case: str, cache: Path) -> dict[str, Any]:
    """One case in a child, with everything it has started ended after it."""
    listen, said = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                sys.stdout = sys.stderr = (Path(place) / "log").open("w")
                os.environ.update(FER_CACHE=str(cache), NETRC=os.devnull)
                one(case, Path(place), said)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)
        os.close(said)
        answer = os.read(listen, 1 << 16)
        os.waitpid(child, 0)
        os.close(listen)
        for entry in Path("/proc").glob("[0-9]*/cmdline"):  # the uploads this run has left, found by its folder
            try:
                if place.encode() in entry.read_bytes():
                    os.kill(int(entry.parent.name), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                continue
        if not answer:
            raise RuntimeError((Path(place) / "log").read_text()[-3000:])
        return dict(json.loads(answer))


def main() -> None:
    """The command."""
    torch.set_num_threads(1)
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else REPEATS
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as cache:
        forked(PLAIN, Path(cache))  # draws the faces
        for turn in range(repeats):
            names = list(CASES)
            for case in names[turn % len(names) :] + names[: turn % len(names)]:
                found[case].append(forked(case, Path(cache)))
                print(turn, case, found[case][-1], flush=True)
    table: dict[str, dict[str, Any]] = {}
    for case, runs in found.items():
        table[case] = {
            **{what: quartiles([run[what] for run in runs]) for what in ("seconds", "cpu", "inside")},
            "extra": quartiles(more(runs, found[PLAIN], "seconds")),
            "extra_cpu": quartiles(more(runs, found[PLAIN], "cpu")),
            "added": quartiles(more(runs, found[WELL], "seconds")),
            "metrics": min(run["metrics"] for run in runs),
            "recorded": min(run.get("recorded", run["metrics"]) for run in runs),
        }
        print(case, table[case], flush=True)
    if repeats >= REPEATS:
        (RESULTS / "wandb.json").write_text(json.dumps({"repeats": repeats, "cases": table}, indent=1) + "\n")
    lost = [case for case, figures in table.items() if figures["recorded"] != figures["metrics"]]
    dear = [case for case, figures in table.items() if max(figures["extra"][1], figures["added"][1]) > LIMIT]
    print(f"metrics lost: {lost or 'none'}; over {LIMIT:g} s: {dear or 'none'}")
    sys.exit(bool(lost or dear))


def more(runs: list[dict[str, Any]], others: list[dict[str, Any]], what: str) -> list[float]:
    """Of a figure, turn by turn."""
    return [run[what] - other[what] for run, other in zip(runs, others, strict=True)]


def quartiles(values: list[float]) -> list[float]:
    """The first quartile, the median and the third."""
    return [round(float(value), 2) for value in np.percentile(values, (25, 50, 75))]


if __name__ == "__main__":
    main()
