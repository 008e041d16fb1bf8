"""Long runs watched from outside: memory, file descriptors, threads and processes of every epoch and every job.

python tests/soak.py                    10,000 steps and a sweep of 10 jobs; figures into docs/results/soak.json
python tests/soak.py steps=600 jobs=3   shorter

A run whose figures grow ends the command with 1.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from conftest import TINY

RESULTS = Path(__file__).parents[1] / "docs" / "results"
STEPS_PER_EPOCH = 100
COUNT_SECONDS = 0.05  # between looks at all but memory: batches on their way hold descriptors, the least is soon over
MEMORY_EVERY = 10  # of those looks, since memory takes 20 ms
WARM_UP = 0.2  # part of the samples before which memory pools and caches may still fill
MEMORY = 4.0  # MiB that a process tree may grow by from warm-up to the end: half a MiB per 1,000 steps of 10,000
RUN = [
    *TINY,
    "logger=csv",
    f"data.train={4 * STEPS_PER_EPOCH}",
    "data.batch_size=4",
    "data.resident=no",
    "data.num_workers=2",
    "trainer.checkpoint_steps=25",
]


class Sample(NamedTuple):
    """One look at a process and its descendants."""

    memory: float  # MiB, without pages of files, which any process of the machine shares; forked ones count in each
    descriptors: int
    threads: int
    processes: int


def sample(pid: int, alone: bool = False, memory_too: bool = True) -> Sample:
    """Look at a process and its descendants now.

    Args:
        pid: the process.
        alone: memory of this process alone, where its descendants come and go; else of all of them. What a worker
            got by the fork counts in both: written to, it is shared no longer, and that is no growth.
        memory_too: else memory is infinite.
    """
    memory = descriptors = threads = 0
    tree = family(pid)
    for member in tree:
        try:
            if memory_too and not (alone and member != pid):
                rollup = Path(f"/proc/{member}/smaps_rollup").read_text()
                kinds = ("Anonymous",) if alone else ("Anonymous", "Pss_Shmem")
                memory += sum(int(rollup.split(f"\n{kind}:")[1].split()[0]) for kind in kinds)
            descriptors += len(os.listdir(f"/proc/{member}/fd"))
            threads += len(os.listdir(f"/proc/{member}/task"))
        except (FileNotFoundError, ProcessLookupError, IndexError):  # it has just ended
            continue
    return Sample(memory / 1024 if memory_too else math.inf, descriptors, threads, len(tree))


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for member in found:
        for thread in Path(f"/proc/{member}/task").glob("*/children"):
            found += [int(child) for child in thread.read_text().split()]
    return found


def growth(samples: list[Sample]) -> dict[str, float]:
    """What grew after the warm-up.

    Args:
        samples: equally far apart.

    Returns:
        What each figure grew by from the first quarter after the warm-up to the last quarter: memory's median; of the
        others the least, since what is left behind is in every sample, and what is open for a moment is not. For memory
        also (``memory_slope``) the slope of a fitted line times the time between those quarters. MiB or counts.
    """
    steady = np.array(samples[int(WARM_UP * len(samples)) :], float)
    quarter = max(len(steady) // 4, 1)
    grown = steady[-quarter:].min(0) - steady[:quarter].min(0)
    grown[0] = np.median(steady[-quarter:, 0]) - np.median(steady[:quarter, 0])
    slope = np.polyfit(np.arange(len(steady)), steady[:, 0], 1)[0] * (len(steady) - quarter)
    return {**dict(zip(Sample._fields, grown.tolist(), strict=True)), "memory_slope": float(slope)}


def problems(grown: dict[str, float]) -> list[str]:
    """Sentences about what grew although it must not."""
    found = [f"{name} grew by {grown[name]:g}" for name in Sample._fields[1:] if grown[name] > 0]
    if min(grown["memory"], grown["memory_slope"]) > MEMORY:
        found.append(f"memory grew by {grown['memory']:.1f} MiB")
    return found


def watch(words: list[str], folder: Path, done: Callable[[], int], alone: bool) -> tuple[list[Sample], float]:
    """Run a command and look at it all the time.

    Args:
        words: the command line after ``python -m fer.train``.
        folder: where it runs.
        done: how many epochs or jobs are done.
        alone: as `sample` takes it.

    Returns:
        The least of each figure in each epoch or job but the last, since data workers and W&B come and go, and the
        command's CPU seconds.
    """
    samples: list[Sample] = []
    looks: list[Sample] = []
    before = os.times()
    command = [sys.executable, "-m", "fer.train", *words]
    environment = {**os.environ, "FER_CACHE": str(folder / "store"), "OMP_NUM_THREADS": "1", "NETRC": os.devnull}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            looks.append(sample(process.pid, alone, memory_too=len(looks) % MEMORY_EVERY == 0))
            if len(looks) % MEMORY_EVERY == 0 and done() > len(samples):
                samples.append(Sample(*map(min, zip(*looks, strict=True))))
                looks.clear()
            time.sleep(COUNT_SECONDS)
    assert process.returncode == 0, (folder / "log").read_text()[-2000:]
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return samples[:-1], cpu  # in the last one the command ends, and its workers with it


def report(samples: list[Sample], cpu: float) -> dict[str, Any]:
    """The figures of one watched command."""
    grown = growth(samples)
    warm = samples[int(WARM_UP * len(samples))]
    return {
        "samples": len(samples),
        "warm": warm._asdict(),
        "end": samples[-1]._asdict(),
        "growth": grown,
        "cpu_seconds": round(cpu, 1),
        "problems": problems(grown),
    }


def training(steps: int) -> dict[str, Any]:
    """One run of so many steps with workers, validation, and checkpoints within its epochs."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        curves = folder / "run" / "metrics.csv"

        def epochs() -> int:
            return curves.read_text().count("\n") - 1 if curves.exists() else 0

        words = [*RUN, f"trainer.max_epochs={steps // STEPS_PER_EPOCH}", "hydra.run.dir=run"]
        return {"steps": steps, **report(*watch(words, folder, epochs, alone=False))}


def sweep(jobs: int) -> dict[str, Any]:
    """So many jobs in one process, each with W&B's offline logger and workers of its own."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        words = ["-m", *TINY, "data.resident=no", "trainer.max_epochs=1", f"seed={','.join(map(str, range(jobs)))}"]
        words += ["hydra.sweep.dir=sweeps"]

        def ended() -> int:
            return len(list(folder.glob("sweeps/*/outcome.json")))

        return {"jobs": jobs, **report(*watch(words, folder, ended, alone=True))}


def main() -> None:
    """The command."""
    asked = dict(word.split("=") for word in sys.argv[1:])
    figures = {}
    for part, measure, count in (
        ("sweep", sweep, asked.get("jobs", 10)),
        ("training", training, asked.get("steps", 10_000)),
    ):
        figures[part] = measure(int(count))
        print(part, json.dumps(figures[part], indent=1), flush=True)
    if not asked:
        (RESULTS / "soak.json").write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(any(part["problems"] for part in figures.values()))


if __name__ == "__main__":
    main()
