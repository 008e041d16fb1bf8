"""``python -m fer.bench``: what this checkout costs on this machine, each figure beside a baseline.

python -m fer.bench                                        every part but gpu, about a core-hour
python -m fer.bench parts=[overhead,startup] windows=5     some of it
python -m fer.bench out=docs/results/speed                 the figures of docs/speed.md, see fer/reporting/manual.py
"""

import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fer.config import count_problems, resolved, start
from fer.errors import UserError

CONFIG = "bench"
FRAME = ("parts", "windows", "threads", "out")  # every other key of conf/bench.yaml is a part


def run(config: DictConfig) -> None:
    """Measure the parts and write a JSON file of each.

    Raises:
        UserError: anything the user can mend.
    """
    plain = resolved(config)
    problems = _problems(plain)
    if problems:
        raise UserError("\n".join(problems))
    # Before the libraries that read them are imported, and for the processes that are started.
    os.environ |= {name: str(plain["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}

    import importlib

    import torch

    from fer.benching.records import save
    from fer.benching.windows import Bench, cpu_now
    from fer.reporting.speed import table

    torch.set_num_threads(plain["threads"])
    command = shlex.join(["python", "-m", "fer.bench", *sys.argv[1:]])
    for part in plain["parts"]:
        module = importlib.import_module(f"fer.benching.{part}")
        with tempfile.TemporaryDirectory() as folder:
            started = cpu_now()
            rows = module.measure(Bench(plain["windows"], plain["threads"], Path(folder), plain[part]))
        path = save(Path(plain["out"]), part, rows, command, plain, cpu_now() - started)
        print(f"{path}\n\n{table(rows)}\n", flush=True)


def _problems(plain: dict[str, Any]) -> list[str]:
    problems = []
    known = [key for key in plain if key not in FRAME]
    parts = plain["parts"]
    if not isinstance(parts, list) or not parts or [part for part in parts if part not in known]:
        problems.append(f"parts={parts}: expected a list of {', '.join(known)}")
    problems += count_problems(plain, {"windows": 1, "threads": 1})
    if not isinstance(plain["out"], str) or not plain["out"]:
        problems.append(f"out={plain['out']}: expected a folder to write to")
    return problems


def main() -> None:
    """The command."""
    start(CONFIG, run)


if __name__ == "__main__":
    main()
