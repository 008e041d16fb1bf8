"""From a command to its first training step, and what ``--help`` and a mistyped option cost."""

import os
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from fer.benching.windows import Bench, Row, Times, alone, compare, interleave, timed
from fer.errors import UserError
from fer.runs import RunFolder

POLL_SECONDS = 0.02  # between looks whether the first step is done
PATIENCE_SECONDS = 600.0


def measure(bench: Bench) -> list[Row]:
    """A row for each command."""
    options = bench.options
    rounds = min(bench.windows, options["most_rounds"])
    words = [*options["words"], f"trainer.threads={bench.threads}", f"data.cache={bench.folder}/store"]
    first_step(words, bench.folder / "before")  # builds the store of decoded images
    first = [first_step(words, bench.folder / f"run{number}").cpu for number in range(rounds)]
    answers = {
        "help": partial(_answer, ["-m", "fer.train", "--help"]),
        "mistyped": partial(_answer, ["-m", "fer.train", "modle=vit"]),
        "hydra": partial(_answer, ["-c", "import hydra"]),
        "torch": partial(_answer, ["-c", "import torch"]),
    }
    windows = interleave(answers, rounds)
    return [
        alone(
            f"`python -m fer.train {shlex.join(options['words'])}` up to its first training step",
            first,
            "s",
            at_most=options["at_most_s"],
            note="the images are decoded already",
        ),
        compare("`python -m fer.train --help`", windows, "help", "hydra", figure="difference", unit="s"),
        compare("a mistyped option, `modle=vit`", windows, "mistyped", "hydra", figure="difference", unit="s"),
        compare("`--help` beside `import torch` alone", windows, "help", "torch", unit="s"),
    ]


def first_step(words: list[str], folder: Path) -> Times:
    """What ``python -m fer.train WORDS`` has used when its first step is in the log of steps; it is killed then.

    Raises:
        UserError: the command ended before.
    """
    command = [sys.executable, "-m", "fer.train", *words, f"hydra.run.dir='{folder}'"]
    steps = RunFolder(folder).steps
    with timed() as times, Path(os.devnull).open("w") as nowhere:
        process = subprocess.Popen(command, stdout=nowhere, stderr=nowhere)
        began = time.monotonic()
        try:
            while not (steps.exists() and steps.stat().st_size):
                if process.poll() is not None or time.monotonic() - began > PATIENCE_SECONDS:
                    raise UserError(f"{shlex.join(command)} made no training step")
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
    return times


def _answer(words: list[str]) -> Times:
    with timed() as times:
        subprocess.run([sys.executable, *words], capture_output=True, check=False)
    return times
