"""A sweep: many jobs started by one command, each in its own folder, and what they amount to together.

    command line -> plan (folder, jobs) -> Hydra's launcher runs `job` for each -> aggregate.json, aggregate.md, W&B

The sweep's folder carries a hash of the sweep's config, so the same command finds its own jobs again: finished ones are
skipped, unfinished ones continued. `run` lives in the process that was started; `job` runs wherever the launcher puts
it and tells the rest only through files. Nothing here imports torch.
"""

import hashlib
import json
import logging
import math
import os
import shlex
import socket
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from fer.config import CONF, folder_name, user_mistake
from fer.errors import UserError
from fer.runs import RunFolder, job_key, read_json, without_paths, write_json, write_text
from fer.sweep_checks import GRID, check_choices, check_devices, check_launcher, check_search, is_search

log = logging.getLogger(__name__)
FAILED, INTERRUPTED = 1, 130  # exit codes
ONLY_JOB = "job"  # folder of the job of a sweep that sweeps nothing


# -- before: where the sweep lives and which jobs it has ------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What one sweep command will do.

    Attributes:
        folder: the sweep's folder.
        jobs: overrides of each job by its folder's name; None for a search, which draws them as it goes.
        words: the command line for Hydra.
        command: the command as it was typed.
    """

    folder: Path
    jobs: dict[str, list[str]] | None
    words: list[str]
    command: str

    def folders(self) -> list[RunFolder]:
        """The jobs' folders; those that exist, for a search."""
        if self.jobs is None:
            return [RunFolder(path.parent.parent) for path in self.folder.rglob(".hydra/overrides.yaml")]
        return [RunFolder(self.folder / name) for name in self.jobs]


def plan(config: DictConfig, words: list[str]) -> Plan:
    """Lay out a sweep without doing anything yet.

    Args:
        config: the command line's composition, ``hydra`` included, sweeps left open (`fer.config.compose_like_hydra`).
        words: the command line.

    Raises:
        UserError: a launcher or sweeper that is not installed, several devices per job, a search on the test part.
    """
    HydraConfig.instance().set_config(config)
    check_launcher(config)
    check_devices(config)
    if is_search(config.hydra):
        check_search(config)
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=ConfigLoaderImpl(create_config_search_path(str(CONF))))
    parsed = {o.get_key_element(): o for o in parser.parse_overrides([*params, *config.hydra.overrides.task])}
    swept = [override for override in parsed.values() if override.is_sweep_override()]
    check_choices("train", words, swept)
    fixed = ["group", *(override.key_or_group for override in parsed.values() if override not in swept)]
    folder = _folder(config, sorted(str(override.input_line) for override in swept))
    jobs: dict[str, list[str]] | None = None
    if config.hydra.sweeper._target_ == GRID:
        jobs = {}
        style = config.hydra.job.config.override_dirname
        for overrides in BasicSweeper.split_arguments(list(parsed.values()), None)[0]:
            swept_here = get_overrides_dirname(parser.parse_overrides(overrides), fixed, style.item_sep, style.kv_sep)
            name = folder_name(swept_here) or ONLY_JOB
            if jobs.setdefault(name, overrides) != overrides:
                raise UserError(
                    f"{' '.join(overrides)} and {' '.join(jobs[name])} would share the folder {name}: values of a "
                    "sweep must differ in more than brackets and punctuation"
                )
    typed = get_args_parser().parse_args(words).overrides
    flags = words[: len(words) - len(typed)]
    place = str(folder).replace("'", r"\'")
    ours = [f"hydra.sweep.dir='{place}'", f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]"]
    ours += [] if swept else [f"hydra.sweep.subdir={ONLY_JOB}"]
    return Plan(
        folder=folder,
        jobs=jobs,
        # The group comes first, so that one that was typed beats it.
        words=[*flags, f"group={folder.name}", *typed, *ours],
        command=shlex.join(["python", "-m", "fer.train", *words]),
    )


def _folder(config: DictConfig, axes: list[str]) -> Path:
    """The folder asked for, or one named after everything that determines the sweep's figures."""
    if any(word.startswith("hydra.sweep.dir=") for word in config.hydra.overrides.hydra):
        return Path(config.hydra.sweep.dir).absolute()
    plain: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    # More trials go on where fewer ended, and the parameters are among the axes.
    sweeper = {key: value for key, value in plain.pop("hydra")["sweeper"].items() if key not in ("params", "n_trials")}
    digest = hashlib.sha256((without_paths(plain) + json.dumps([axes, sweeper], sort_keys=True)).encode())
    name = f"{_kind(config.hydra)}-{digest.hexdigest()[:8]}"
    return Path(config.hydra.sweep.dir).absolute() / name


def _kind(hydra: Any) -> str:
    """``cv5``: the option of ``sweep=``, or ``sweep`` for one of the command line's own."""
    return str(hydra.runtime.choices.sweep or "sweep")


# -- one job ----------------------------------------------------------------------------------------------------------


@cache
def _source_state(root: str) -> str:
    from fer.data.store import stat_fingerprint

    return stat_fingerprint(Path(root)) if root and Path(root).is_dir() else root


def quick_key(config: DictConfig) -> str:
    """What tells, without opening the data or importing torch, that nothing has changed since a job was done.

    Hash of the config, the code, and name, size and time of every file under ``data.root``. When it differs, the job is
    opened in full and its job key decides: the same data under another time stamp is still a finished job, other data
    or code is refused.
    """
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return job_key(plain, _source_state(str(config.data.root)))


def job(config: DictConfig) -> float | None:
    """One job of a sweep, in whatever process the launcher runs it; what became of it is in its ``outcome.json``.

    Returns:
        The validation monitor; NaN for a failed job, so that the others go on, and None for a failed trial of a search,
        which is what its sweeper takes for one.
    """
    hydra: Any = HydraConfig.get()
    os.chdir(hydra.runtime.cwd)  # Ray's workers may start elsewhere
    folder = RunFolder(Path(hydra.runtime.output_dir))
    config.run_name = f"{config.name}-{folder.path.name}"[:128]  # W&B takes no longer one
    config.job_type = "fold" if "fold" in config.protocol else "run"
    config.tags = [*config.tags, _kind(hydra)]
    outcome, error, value = "failed", None, math.nan
    try:
        with alone(folder.path):
            outcome, value = _run(config, folder, hydra)
    except Exception as problem:
        mistake = user_mistake(problem)
        error = str(mistake or f"{type(problem).__name__}: {problem}")
        log.error("job %d, %s, failed: %s", hydra.job.num, folder.path.name, error, exc_info=mistake is None)
    except BaseException:  # Ctrl-C, or SIGTERM, which run_experiment turns into an exit
        outcome = "interrupted"
        raise
    finally:
        write_json(
            folder.outcome, {"outcome": outcome, "error": error, "host": socket.gethostname(), "pid": os.getpid()}
        )
    return value if error is None or hydra.sweeper._target_ == GRID else None


class Forgetting(Callback):
    """Drops both configs of each job that has ended: Hydra's launcher keeps them, a MiB, until the sweep has."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Nothing reads them any more; what a job returned stays."""
        job_return.cfg = job_return.hydra_cfg = None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is at work in a folder: a job may outlive the command that started it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")  # let go by the system when its process ends, however that ends
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("waiting for the process that is at work in %s", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _run(config: DictConfig, folder: RunFolder, hydra: Any) -> tuple[str, float]:
    check_devices(config)
    if is_search(hydra):
        check_search(config)
    before = {} if config.fresh else folder.status()
    key = quick_key(config)
    if before.get("quick_key") == key and before["status"] == "done" and folder.results.exists():
        log.info("done already: %s", folder.path)
        results = read_json(folder.results)
        return "skipped", float(results["metrics"]["val"][results["monitor"]])
    from fer.experiment import run_experiment

    words = [word for word in hydra.overrides.task if not word.startswith(("group=", "fresh="))]
    command = shlex.join(["python", "-m", "fer.train", "hydra.mode=RUN", *words])
    continued = folder.has_checkpoint()
    value = run_experiment(config, folder.path, command=command)
    folder.set_status("done", quick_key=key)
    if before.get("status") == "done":
        return "skipped", value
    return "resumed" if before and continued else "run", value


# -- after: what the jobs amount to -----------------------------------------------------------------------------------


def run(config: DictConfig, words: list[str], start: Callable[[], Any]) -> int:
    """A whole sweep: plan it, let Hydra run it, aggregate.

    Args:
        config: the command line's composition, as in `plan`.
        words: the command line.
        start: the function ``hydra.main`` made; reads ``sys.argv``.

    Returns:
        The exit code: 0, 1 when a job failed or a group could not be averaged, 130 after Ctrl-C.
    """
    sweep = plan(config, words)
    console = Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "160")))
    console.print(f"sweep folder: {sweep.folder}", soft_wrap=True, highlight=False)
    if "submitit_folder" in config.hydra.launcher:
        console.print(f"what the jobs print: {sweep.folder / '.submitit'}", soft_wrap=True, highlight=False)
    page = sweep.folder / "aggregate.json"
    before = page.read_text() if page.exists() else None
    page.unlink(missing_ok=True)  # it must not be taken for this session's
    for folder in sweep.folders():
        folder.outcome.unlink(missing_ok=True)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    note = sweep.folder / "sweep.json"
    wandb_id = read_json(note)["wandb_id"] if note.exists() else uuid.uuid4().hex[:8]
    write_json(note, {"command": sweep.command, "jobs": sweep.jobs, "wandb_id": wandb_id})
    sys.argv[1:] = sweep.words
    code = 0
    try:
        start()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else FAILED
    if "ray" in sys.modules:
        import ray

        ray.shutdown()  # its workers' last lines come before the table, and none is left behind
    outcomes = Counter(read_json(folder.outcome)["outcome"] for folder in sweep.folders() if folder.outcome.exists())
    if code == INTERRUPTED or outcomes["interrupted"]:
        console.print(f"interrupted; the same command goes on: {sweep.command}", soft_wrap=True, highlight=False)
        return INTERRUPTED
    if not outcomes:  # Hydra has said what is wrong with the command line
        return code
    return max(code, _conclude(sweep, config, outcomes, before, console))


def _conclude(sweep: Plan, config: DictConfig, outcomes: Counter[str], before: str | None, console: Console) -> int:
    from fer.reporting.aggregate import aggregate, failures, markdown, table

    record = aggregate(sweep.folder)
    write_text(sweep.folder / "aggregate.md", markdown(record, sweep.command))
    page = sweep.folder / "aggregate.json"
    write_json(page, record)
    console.print(table(record))
    missing = record["jobs"] - sum(outcomes.values())
    counts = ", ".join(f"{outcomes[what]} {what}" for what in ("skipped", "resumed", "run", "failed"))
    console.print(f"{record['jobs']} jobs: {counts}" + (f", {missing} missing" if missing else ""), highlight=False)
    console.print(f"files: {page.with_suffix('.md')}", soft_wrap=True, highlight=False)
    if page.read_text() != before:
        for node in (config.logger or {}).values():
            from fer.loggers import log_summary

            run_id = read_json(sweep.folder / "sweep.json")["wandb_id"]
            log_summary(node, sweep.folder, run_id, _kind(config.hydra), sweep.command, record)
    problems = failures(record)
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    if config.report and sum(outcomes.values()) > outcomes["failed"]:
        from fer.report import report_on

        report_on(sweep.folder)
    return FAILED if problems else 0
