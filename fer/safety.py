"""Configs are data: what they may name, refer to and start, decided by name alone; nothing judged here is imported.

A config builds objects (``_target_``), refers to values (``${...}``) and says how Hydra starts and logs jobs. Each of
the three could run a program, so each has an allow-list here. `docs/safety.md` tells what is refused and why.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fer.errors import UserError

PACKAGE = Path(__file__).resolve().parent

# A target is one class directly in one of these modules; never a function, never a module reached through another.
ALLOWED_MODULES = (
    r"fer\.(data|models|pretraining|evaluation|faces|benching)(\.[a-z][a-z0-9_]*)+",
    r"fer\.(loggers|sweep|trainer)",
    r"torch\.optim",
    r"torch\.optim\.lr_scheduler",
    r"lightning\.pytorch\.callbacks",
    r"albumentations",
    r"hydra\._internal\.core_plugins\.basic_(launcher|sweeper)",
    r"hydra_plugins\.hydra_(joblib|submitit|ray)_launcher\.(joblib|submitit|ray)_launcher",
    r"hydra_plugins\.hydra_optuna_sweeper\.optuna_sweeper",
    r"optuna\.samplers",
)
_ALLOWED = re.compile(rf"(?P<module>{'|'.join(ALLOWED_MODULES)})\.(?P<name>[A-Z][A-Za-z0-9]*)")

# A reference is to another value of the config, or to one of these resolvers with a literal argument. OmegaConf's other
# resolvers make objects out of text (oc.create, oc.decode), where no check of targets would see them.
_REFERENCES = re.compile(
    r"\$\{(?:[\w.\[\]/-]+"
    r"|oc\.env:(?:(?:FER|SLURM)_[A-Z0-9_]+|HOME|SCRATCH|TMPDIR)(?:,[^${}]*)?"
    r"|oc\.select:[\w.]+(?:,[\w. -]*)?"
    r"|now:[\w%:. -]*|job_folder:"
    r"|hydra:[\w.]+)\}"
)
_LOGGING = ("hydra.job_logging", "hydra.hydra_logging")
_LOG_CLASSES = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "logging.Formatter")
_LOG_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_LOG_FILE = re.compile(r"\$\{hydra\.runtime\.output_dir\}/(\$\{hydra\.job\.name\}|[\w-]+)\.log")
_STARTING = ("hydra.launcher", "hydra.sweeper")
# Options by which a launcher or sweeper would run commands or functions of its own.
_STARTERS = ("setup", "runtime_env", "custom_search_space", "srun_args")
_IN_STARTING = re.compile(r"\$\{hydra\.(sweep\.dir|run\.dir|job\.name)\}")
MAX_DEPTH = 100  # of a config's nodes in nodes
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def walk(node: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (path of the holder, key, value) of every key in a plain container."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield path, str(key), value
        yield from walk(value, f"{path}.{key}" if path else str(key))


def target_problem(target: Any) -> str | None:
    """Why a ``_target_`` may not be used, or None. Decided from its name alone, nothing is imported."""
    found = _ALLOWED.fullmatch(target) if isinstance(target, str) else None
    if found is None:
        return "it is not on the allow-list (a class of fer, torch.optim, albumentations or Lightning's callbacks)"
    if not found["module"].startswith("fer."):
        return None
    # A module of ours also holds what it imported; only a class written in it counts.
    source = PACKAGE.parent / (found["module"].replace(".", "/") + ".py")
    if not source.is_file() or not re.search(rf"^class {found['name']}\b", source.read_text(), re.MULTILINE):
        return f"{source.name} defines no such class"
    return None


def _value_problem(value: str, where: str) -> str | None:
    """Why a text may not stand in a config."""
    if value.count("${") != len(_REFERENCES.findall(value)):
        return (
            "a value may refer to other values, to ${now:...}, ${hydra:...}, and by ${oc.env:...} to FER_*, SLURM_*, "
            "HOME, SCRATCH and TMPDIR; write out what it stands for"
        )
    if ("\n" in value and not where.startswith(("hydra.help.", "hydra.hydra_help."))) or (
        "%n" in value and "${now:" in value
    ):
        return "a line break would end a line of what it is written into (a job's script, a log); write it in one line"
    return None


def _hydra_problem(path: str, key: str, value: Any) -> str | None:
    """Why Hydra's own part of a config may not have this: it acts before a command's code runs."""
    where = f"{path}.{key}"
    if where == "hydra.searchpath" and value:
        return "configs come from conf/ alone; put the files there"
    if path == "hydra.job.env_set":
        return "a job's environment decides which programs run; set variables before the command"
    if where.startswith(("hydra.sweeper.params.", "hydra.sweeper.search_space.")) and "hydra" in key:
        return "a job's own Hydra options are not checked; give them to the sweep"
    if where.startswith(_LOGGING):
        # These go to logging.config.dictConfig, which calls what "()" or "class" names and imports what ext:// does.
        file = key == "filename" and isinstance(value, str) and _LOG_FILE.fullmatch(value)
        text = isinstance(value, str) and ("${" in value or "://" in value)
        if key == "filename" and not file:
            return "a log lies in the run's folder, as ${hydra.runtime.output_dir}/name.log"
        if (key == "class" and value not in _LOG_CLASSES) or (text and not file and value not in _LOG_STREAMS):
            return f"logging may use {', '.join(_LOG_CLASSES)} only"
    if where.startswith(_STARTING):
        if key in _STARTERS and value:
            return "prepare what a job needs before the command, not in it"
        if key == "storage" and value is not None and not re.fullmatch(r"sqlite:///[\w./-]+", str(value)):
            return "studies are kept in memory or in a file, as sqlite:///studies.db"
        if isinstance(value, str) and value.count("${") != len(_IN_STARTING.findall(value)):
            return "write out what it stands for"
    return None


def unsafe_entries(config: DictConfig) -> list[str]:
    """Every entry of a config, ``hydra.*`` included, that would run something not on the allow-lists."""
    problems = []
    for path, key, value in walk(OmegaConf.to_container(config, resolve=False)):
        where = f"{path}.{key}".lstrip(".")
        why = target_problem(value) if key == "_target_" else None
        if why is None and key == "()":
            why = "logging would call what it names"
        if why is None and isinstance(value, str):
            why = _value_problem(value, where)
        if why is None and "\n" in key:
            why = "a line break would end a line of what it is written into"
        if why is None and where.startswith("hydra."):
            why = _hydra_problem(path, key, value)
        if why is not None:
            shown = value if len(str(value)) <= 80 else f"{str(value)[:80]} ..."
            problems.append(f"{where}={shown} is refused: {why}")
    return problems


def refuse_unsafe(config: DictConfig) -> None:
    """Raise UserError naming every refused entry."""
    problems = unsafe_entries(config)
    if problems:
        raise UserError("\n".join(problems))


def read_config(path: Path, writer: str) -> DictConfig:
    """Read the config a run left, as data, and find all its entries on the allow-lists.

    Args:
        path: the YAML file.
        writer: the command that writes such files, for messages.

    Raises:
        UserError: it cannot be read as a config, or names something that may not run.
    """
    wanted = f"expected the file {writer} wrote"
    try:
        text, depth = path.read_text(), 0
        for event in yaml.parse(text, Loader=_YAML):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            # Ten lines of aliases to aliases stand for billions of values, and brackets in brackets take for ever.
            if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
                raise UserError(f"{path} repeats itself by YAML aliases, or is nested too deeply: {wanted}")
        config = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is no config ({why[:200]}): {wanted}") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} is no config: {wanted}")
    refuse_unsafe(config)
    plain = OmegaConf.to_container(config, resolve=False)
    if left := [f"{holder}.{key}".lstrip(".") for holder, key, value in walk(plain) if value == "???"]:
        raise UserError(f"{path} leaves {', '.join(left)} open: {wanted}")
    return config
