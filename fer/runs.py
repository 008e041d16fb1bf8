"""The run folder: what is in it, written so that a reader never sees half a file, and when it may be continued."""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from fer.errors import UserError

PACKAGE = Path(__file__).parent
State = Literal["new", "unfinished", "done"]
# What does not change a run's figures: where things lie, how they are shown, whether to start over.
NOT_IN_KEY = (
    *("data.root", "data.cache", "data.num_workers", "logger", "group", "job_type", "run_name", "tags"),
    *("resume", "fresh", "trainer.enable_progress_bar", "report", "allow_search_on_test"),
)
# Stamps that say how a figure came about without flattering it: what the one ends with, and the other begins with.
DROPPED = "leaked copies left out of train"
AGAIN = "evaluated again"  # of an evaluation on a network's own test part
RECORDED_PACKAGES = ("torch", "torchvision", "lightning", "timm", "albumentations", "numpy", "opencv-python-headless")


def write_bytes(path: Path, content: bytes | memoryview, previous: Path | None = None) -> None:
    """Write a file so that a reader, or a restart after a kill, finds either the old content or all of the new.

    Args:
        path: the file.
        content: all of it.
        previous: what becomes of the file that ``path`` was, once the new one is whole; None drops it.

    Raises:
        OSError: with the name of the file; ``path`` and ``previous`` are then what they were, or ``path`` has become
            ``previous``.
    """
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Flush a file to the disk, or a folder, without which a name given in it may be lost when the machine dies."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing
            raise
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed in `write_bytes` left behind; nobody else may be at work in the folder."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.\d+", path.name) and path.is_file():
            path.unlink()


def write_text(path: Path, content: str) -> None:
    """`write_bytes` for text."""
    write_bytes(path, content.encode())


def _plain(value: Any) -> Any:
    """NaN and infinity are no JSON; an unknown figure is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for JSON, NaN as null."""
    write_text(path, json.dumps(_plain(value), indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of a run folder.

    Raises:
        UserError: the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: expected a run folder written by python -m fer.train") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}): the run folder is damaged") from None


@cache
def code_version() -> str:
    """Hash of the package's Python sources: changes when, and only when, the code does."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def git_commit() -> str | None:
    """The checkout's commit, with ``+`` when it has changes; None outside a git checkout."""
    git = ("git", "-C", str(PACKAGE.parent))
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def versions() -> dict[str, str]:
    """Versions of Python and the packages that can move a figure."""
    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        found[name] = importlib.metadata.version(name)
    return found


def without_paths(config: dict[str, Any]) -> str:
    """A config as JSON without what `NOT_IN_KEY` names."""
    node = OmegaConf.create(config)
    for name in NOT_IN_KEY:
        parent, _, leaf = name.rpartition(".")
        holder = OmegaConf.select(node, parent) if parent else node
        if holder is not None and leaf in holder:
            del holder[leaf]
    return json.dumps(OmegaConf.to_container(node), sort_keys=True)


def job_key(config: dict[str, Any], data_fingerprint: str) -> str:
    """Hash of everything that determines a run's figures: resolved config without paths, data, code."""
    text = without_paths(config) + data_fingerprint + code_version()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class RunFolder:
    """One run's folder. Every file of the run is inside it."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def status_file(self) -> Path:
        """Status, job key and W&B id."""
        return self.path / "status.json"

    @property
    def results(self) -> Path:
        """Everything a report needs, present only in a finished run."""
        return self.path / "results.json"

    @property
    def predictions(self) -> Path:
        """A row per test image."""
        return self.path / "predictions.csv"

    @property
    def outcome(self) -> Path:
        """What the last session of a sweep made of this job; only in sweeps."""
        return self.path / "outcome.json"

    @property
    def best(self) -> Path:
        """Checkpoint of the best validation epoch."""
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def last(self) -> Path:
        """Checkpoint a resume continues from."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def previous(self) -> Path:
        """The checkpoint before the last one, for when that is unusable."""
        return self.path / "checkpoints" / "previous.ckpt"

    @property
    def steps(self) -> Path:
        """The number of every optimiser step that was made, a line each, in order; it goes back where a kill did."""
        return self.path / "steps.log"

    def has_checkpoint(self) -> bool:
        """Whether a resume has something to go on from."""
        return self.last.exists() or self.previous.exists()

    def status(self) -> dict[str, Any]:
        """The status record, empty before the first start."""
        return dict(read_json(self.status_file)) if self.status_file.exists() else {}

    def set_status(self, status: str, **more: Any) -> None:
        """Record ``running``, ``done``, ``failed`` or ``interrupted``, keeping what else was recorded."""
        write_json(self.status_file, {**self.status(), "error": None, **more, "status": status})

    def begin(self, config: DictConfig, key: str, fresh: bool) -> State:
        """Claim the folder for a run: new, a continuation of the same run, or a run already done.

        Raises:
            UserError: the folder holds a run with another config, data or code; nothing in it is touched.
        """
        status = self.status()
        if status and not fresh:
            if status["job_key"] != key:
                raise UserError(
                    f"{self.path} holds a run with another config, data or code version; choose another hydra.run.dir, "
                    f"continue that run by resume={self.path}, or replace it by fresh=true"
                )
            if status["status"] == "done" and self.results.exists():
                return "done"
            return "unfinished" if self.has_checkpoint() else "new"
        if fresh:
            saved = (self.previous, self.last, self.best)
            for old in (*saved, self.results, self.predictions, self.steps, self.status_file):
                old.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config, "# The resolved config of this run.\n" + OmegaConf.to_yaml(config, resolve=True))
        return "new"
