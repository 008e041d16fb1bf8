"""What a part leaves behind: its rows, and the machine and code they were measured on."""

import time
from pathlib import Path
from typing import Any

from fer.machine import machine
from fer.runs import git_commit, versions, write_json


def save(folder: Path, part: str, rows: list[Any], command: str, config: dict[str, Any], cpu_seconds: float) -> Path:
    """Write one part's ``<part>.json``.

    Args:
        folder: where.
        part: its name.
        rows: what it measured, see `fer.benching.windows.Row`.
        command: what repeats it.
        config: the bench's config.
        cpu_seconds: what measuring cost.
    """
    record = {
        "part": part,
        "command": command,
        "git_commit": git_commit(),
        "taken": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "versions": versions(),
        "windows": config["windows"],
        "threads": config["threads"],
        "options": config[part],
        "cpu_seconds": round(cpu_seconds, 1),
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{part}.json"
    write_json(path, record)
    return path
