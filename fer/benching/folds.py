"""Folds of one small model by ``python -m fer.train sweep=cv5`` beside a serial script written by hand.

The script is charged what it trains and ``import torch``: it borrows our networks and data sets, whose imports a script
of one's own would not have.
"""

import json
import shutil
import subprocess
import sys

from fer.benching.windows import Bench, Row, Times, alone, compare, interleave, timed
from fer.errors import UserError

FOLDS = 5


def measure(bench: Bench) -> list[Row]:
    """The whole sweep beside the whole script, and what of it does not grow with the training."""
    options = bench.options
    words = [*options["words"], f"trainer.threads={bench.threads}", f"data.cache={bench.folder}/store"]
    imports = _run([sys.executable, "-c", "import torch"])[1].cpu

    def sweep() -> Times:
        place = bench.folder / "sweep"
        times = _run([sys.executable, "-m", "fer.train", "sweep=cv5", *words, f"hydra.sweep.dir='{place}'"])[1]
        shutil.rmtree(place)
        return times

    def serial() -> Times:
        said, _ = _run([sys.executable, "-m", "fer.benching.serial", str(bench.folder), str(FOLDS), *words])
        done = json.loads(said.splitlines()[-1])
        return Times(cpu=done["cpu"] + imports, wall=done["wall"])

    # Decodes the images, for both.
    _run([sys.executable, "-m", "fer.benching.serial", str(bench.folder), "1", *words, "trainer.max_epochs=1"])
    windows = interleave({"sweep=cv5": sweep, "by hand": serial}, options["rounds"], warm_up=False)
    whole = compare(
        f"five folds, {' '.join(f'`{word}`' for word in options['words'])}",
        windows,
        "sweep=cv5",
        "by hand",
        unit="s",
        at_most=options["at_most_ratio"],
    )
    more = [ours.cpu - theirs.cpu for ours, theirs in zip(windows["sweep=cv5"], windows["by hand"], strict=True)]
    return [whole, alone("what the sweep takes more, in all", more, "s")]


def _run(command: list[str]) -> tuple[str, Times]:
    with timed() as times:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout, times
