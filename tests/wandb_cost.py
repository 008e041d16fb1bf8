"""What W&B costs a run while its server does its worst: python tests/wandb_cost.py

The same tiny run with `logger=csv`, without credentials, and against servers that are well, silent, slow, or fail in
the run's middle or at its end; each in a forked child. Figures go into docs/results/wandb.json.
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

import pandas as pd
import torch
from conftest import TINY, composed
from fake_wandb import FakeWandb, wandb_records
from soak import RESULTS

from fer.callbacks import Curves, WandbPictures
from fer.experiment import run_experiment
from fer.loggers import Wandb

REPEATS = 3
LIMIT = 2.0  # seconds that W&B may cost
FLUSHED = 18.0  # seconds after which W&B's record of a run has reached its file, and the server some of its rows
CASES: dict[str, dict[str, str] | None] = {
    "logger=csv": None,
    "no credentials": None,
    "server well": {},
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
        if manner and "middle" in manner and len(self.history) == 1:
            time.sleep(FLUSHED)
            paused += FLUSHED

    Curves.on_train_epoch_end = pausing  # type: ignore[method-assign]
    words = [*TINY, "trainer.max_epochs=4"] + ["logger=csv"] * (case == "logger=csv")
    began = time.monotonic()
    run_experiment(composed(*words), folder / "run")
    seconds = time.monotonic() - began - paused
    figures = {"seconds": seconds, "inside": inside.seconds, **kept(folder / "run", case)}
    if server is not None:
        figures["reached"] = len([row for row in server.history if "val/acc" in row])
    os.write(said, json.dumps(figures).encode())


def kept(run: Path, case: str) -> dict[str, int]:
    """How many metrics the curves hold, and how many of them W&B's record holds too."""
    table = pd.read_csv(run / "metrics.csv")
    values = {(key, float(v)) for key in table if "/" in key for v in table[key].dropna()}
    if case == "logger=csv":
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
        forked("logger=csv", Path(cache))  # draws the faces
        for _ in range(repeats):
            for case, figures in found.items():
                figures.append(forked(case, Path(cache)))
    middle = {case: sorted(f["seconds"] for f in figures)[len(figures) // 2] for case, figures in found.items()}
    table = {}
    for case, figures in found.items():
        extra = middle[case] - middle["logger=csv"]
        inside = max(f["inside"] for f in figures)
        table[case] = {
            **figures[-1],
            "seconds": round(middle[case], 2),
            "extra": round(extra, 2),
            "inside": round(inside, 2),
        }
        print(case, table[case], flush=True)
    if repeats == REPEATS:
        figures = {"repeats": repeats, "cases": table}
        (RESULTS / "wandb.json").write_text(json.dumps(figures, indent=1) + "\n")
    lost = [case for case, f in table.items() if f.get("recorded", f["metrics"]) != f["metrics"]]
    dear = [case for case, f in table.items() if f["inside"] > LIMIT]
    print(f"metrics lost: {lost or 'none'}; over {LIMIT:g} s: {dear or 'none'}")
    sys.exit(bool(lost or dear))


if __name__ == "__main__":
    main()
