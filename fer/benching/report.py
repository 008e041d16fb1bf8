"""What the report costs on some runs and on ten times as many: copies of one real run, each with a seed of its own."""

import contextlib
import io
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from fer.benching.windows import Bench, Row, Times, compare, interleave, timed
from fer.report import report_on
from fer.runs import read_json, write_json, write_text

KEPT = ("*.json", "*.csv", "*.yaml", "*.md")  # of a run folder; the report reads no checkpoint


def measure(bench: Bench) -> list[Row]:
    """One row: runs per second, many beside few."""
    options = bench.options
    few, many = options["few"], options["many"]
    run = bench.folder / "run"
    words = [*options["words"], f"data.cache={bench.folder}/store", f"hydra.run.dir='{run}'"]
    subprocess.run([sys.executable, "-m", "fer.train", *words], check=True, capture_output=True)
    folders = {}
    for count in (few, many):
        folders[count] = bench.folder / str(count)
        for seed in range(count):
            copy_of(run, folders[count] / f"seed{seed}", seed)
    variants = {f"{count:,} runs": partial(_report, folder, count) for count, folder in folders.items()}
    windows = interleave(variants, min(bench.windows, options["most_rounds"]))
    return [
        compare(
            f"report, CPU time per run, {many:,} runs",
            windows,
            f"{many:,} runs",
            f"{few:,} runs",
            at_most=options["at_most_ratio"],
        )
    ]


def copy_of(run: Path, folder: Path, seed: int) -> None:
    """A finished run's folder as another seed would have left it, its figures the same."""
    folder.mkdir(parents=True)
    for path in (found for pattern in KEPT for found in run.glob(pattern)):
        shutil.copy(path, folder)
    results: dict[str, Any] = read_json(folder / "results.json")
    key = f"{seed:016x}"
    write_json(folder / "results.json", {**results, "seed": seed, "job_key": key})
    write_json(folder / "status.json", {**read_json(folder / "status.json"), "job_key": key})
    config = (folder / "config.yaml").read_text()
    write_text(folder / "config.yaml", re.sub(rf"(?m)^( *)seed: {results['seed']}$", rf"\g<1>seed: {seed}", config))


def _report(folder: Path, count: int) -> Times:
    with timed(count) as times, contextlib.redirect_stdout(io.StringIO()):
        report_on(folder)
    shutil.rmtree(folder / "report")
    return times
