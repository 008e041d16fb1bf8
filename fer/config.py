"""Configs are data: what they may name, and what is checked before any of it acts.

Hydra instantiates whatever a ``_target_`` names, under ``hydra.*`` already before a command's own code runs. So every
command first composes the config itself, the way Hydra will, and holds each target against an allow-list, by name,
without importing it. Nothing here imports torch: help and mistyped options answer at once.
"""

import errno
import importlib
import importlib.util
import inspect
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fer.errors import UserError
from fer.safety import read_config, refuse_unsafe, walk

CONF = Path(__file__).resolve().parent.parent / "conf"
USER_MISTAKE = 2
_ROOM = "make room, and the same command goes on: what was saved before is whole"
_PLACE = "choose another folder, or let this user write to that one"
_DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _ROOM),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR), _PLACE),
    errno.EIO: "the disk reports an error; what was saved before is whole, copy it elsewhere and go on there",
}


def folder_name(swept: str) -> str:
    """What a sweep varies as one folder that a command line can hold: no brackets, ``_`` for what parts values."""
    return re.sub(r"[^\w.+-]", "_", re.sub(r"[][{}()'\" ]", "", swept))


# Where a launcher's process imports this, it knows the word of conf/train.yaml too.
OmegaConf.register_new_resolver("job_folder", lambda: folder_name(HydraConfig.get().job.override_dirname), replace=True)


def _use_our_launchers() -> None:
    """Let ``conf/hydra/launcher/ray.yaml`` and the like stand for what the plugins registered under the same names.

    Hydra would otherwise take a plugin's entry for the schema of ours, which it warns about and for some refuses.
    """
    Plugins.instance()  # imports the plugins, which register themselves
    # There is one store, which hands out copies, yet --help would copy it for each of 140 groups: two seconds.
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    registered = ConfigStore.instance().repo["hydra"]
    for path in CONF.glob("hydra/*/*.yaml"):
        registered[path.parent.name].pop(path.name, None)


def compose_like_hydra(config_name: str, argv: list[str]) -> DictConfig:
    """The config Hydra will compose from this command line, ``hydra`` node included, sweeps left open.

    Raises:
        HydraException or OmegaConfBaseException: a mistyped option, as Hydra words it.
        UserError: an option by which Hydra would read or run something else, or a file under conf/ that is no YAML.
    """
    args = get_args_parser().parse_args(argv)
    if args.config_path or args.config_dir or args.config_name:
        # They would let Hydra read other YAML than what is checked here.
        raise UserError(
            "--config-path, --config-dir and --config-name are not used here; add files under conf/ or use overrides"
        )
    if args.experimental_rerun:
        raise UserError("--experimental-rerun is refused: it unpickles its file; resume=<run folder> continues a run")
    if any(word.lstrip("+~").startswith("hydra.searchpath") for word in args.overrides):
        # Refused here already: composing imports the packages it names.
        raise UserError("hydra.searchpath is refused: configs come from conf/ alone; put the files there")
    _use_our_launchers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        try:
            return loader.load_configuration(
                config_name=config_name,
                overrides=args.overrides,
                run_mode=RunMode.MULTIRUN,
                from_shell=True,
            )
        except yaml.YAMLError as error:
            raise UserError(f"a file under conf/ is no YAML: {' '.join(str(error).split())}") from None


def resolved(config: DictConfig) -> dict[str, Any]:
    """The config as plain values, its targets found on the allow-list first.

    Raises:
        UserError: a refused entry, or a value that does not resolve.
    """
    refuse_unsafe(config)
    try:
        plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(f"the config does not resolve: {error}") from None
    return plain


def user_mistake(error: Exception) -> UserError | None:
    """The mistake of the user's behind an exception, if that is what it is and ``FER_DEBUG=1`` is not set."""
    # Hydra wraps what a constructor raises.
    mistake = error.__cause__ if isinstance(error, InstantiationException) else error
    if isinstance(mistake, TypeError | ValueError | RuntimeError | OmegaConfBaseException) and mistake is not error:
        mistake = UserError(f"{' '.join(str(error).split())} (a value its class cannot use; FER_DEBUG=1 shows where)")
    if isinstance(mistake, OSError) and mistake.errno in _DISK:
        mistake = UserError(f"{mistake.filename or 'a file'}: {mistake.strerror}; {_DISK[mistake.errno]}")
    return mistake if isinstance(mistake, UserError) and os.environ.get("FER_DEBUG") != "1" else None


def check_run_folder(config: DictConfig) -> None:
    """Refuse a run folder that nothing can be written to, before Hydra does so with a traceback.

    Args:
        config: the command line's composition.

    Raises:
        OSError: as the system words it, which `guarded` makes a sentence of.
    """
    HydraConfig.instance().set_config(config)
    place = Path(config.hydra.run.dir).absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(place)) from error


def guarded(command: Callable[[], Any]) -> Any:
    """Run a command; a user's mistake becomes its sentence and exit code 2, without a traceback.

    ``FER_DEBUG=1`` shows the traceback.
    """
    try:
        return command()
    except (UserError, InstantiationException, OSError) as error:
        mistake = user_mistake(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(USER_MISTAKE)


def count_problems(plain: dict[str, Any], least: dict[str, int]) -> list[str]:
    """A sentence for each of these values that is no whole number, or under its least one."""
    return [
        f"{key}={plain[key]}: expected a whole number from {low} on"
        for key, low in least.items()
        if isinstance(plain[key], bool) or not isinstance(plain[key], int) or plain[key] < low
    ]


def require_counts(plain: dict[str, Any], least: dict[str, int]) -> None:
    """Refuse values that are no whole numbers, or under their least ones.

    Raises:
        UserError: naming each of them, see `count_problems`.
    """
    problems = count_problems(plain, least)
    if problems:
        raise UserError("; ".join(problems))


def several_devices(trainer: DictConfig) -> bool:
    """Whether ``trainer.devices`` and ``trainer.num_nodes`` ask for more than one device, or for all there are."""
    devices = trainer.devices
    if isinstance(devices, str):  # as Lightning reads it: "2" is two devices, "2," is the one numbered 2
        devices = [part for part in devices.split(",") if part] if "," in devices else devices
        devices = int(devices) if isinstance(devices, str) and devices.lstrip("-").isdigit() else devices
    one = devices == 1 or (not isinstance(devices, int | str) and len(devices) == 1)
    return not one or OmegaConf.select(trainer, "num_nodes", default=1) != 1


def is_sweep(config: DictConfig, argv: list[str]) -> bool:
    """Whether Hydra will take this command line for a multirun: ``-m``, or a group that says so, as ``sweep=`` does."""
    args = get_args_parser().parse_args(argv)
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        return False
    return bool(args.multirun or config.hydra.mode is RunMode.MULTIRUN)


def folder_to_resume(words: list[str]) -> Path | None:
    """The run folder of a command line ``resume=<folder>``, None where it asks for a new run.

    Raises:
        UserError: other options beside it.
    """
    asked = [word for word in words if word.startswith("resume=") and word != "resume=null"]
    others = [word for word in words if word not in asked[:1]]
    if asked and others:
        raise UserError(
            f"resume= continues a run with the config it was started with, so {' '.join(others)} cannot be given "
            "beside it"
        )
    return Path(asked[0].partition("=")[2]) if asked else None


def config_of_run(folder: Path, command: str) -> DictConfig:
    """The config a run was started with, its targets found on the allow-list.

    Args:
        folder: the run folder.
        command: what writes such folders, for messages.

    Raises:
        UserError: no run folder, or its config names something that may not run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"resume={folder}: {path} is missing, expected a run folder written by {command}")
    return read_config(path, command)


def check_command_line(config_name: str, argv: list[str]) -> DictConfig:
    """Compose and check before Hydra acts: exit 1 with Hydra's words for a mistyped option, 2 for a refused target.

    Returns:
        The composition (see `compose_like_hydra`).
    """
    if any(flag in argv for flag in ("--help", "-h", "--hydra-help", "--version")):
        argv = [word for word in argv if not word.startswith("-")]
    try:
        config: DictConfig = guarded(lambda: compose_like_hydra(config_name, argv))
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    guarded(lambda: refuse_unsafe(config))
    return config


def start(config_name: str, run: Callable[[DictConfig], Any]) -> None:
    """A command whose one job is ``run``: checked, composed by Hydra, its mistakes sentences, 130 after Ctrl-C.

    Args:
        config_name: the file under ``conf/``.
        run: gets the config of the command line.
    """
    check_command_line(config_name, sys.argv[1:])

    @hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")
    def job(config: DictConfig) -> None:
        guarded(lambda: run(config))

    try:
        job()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def argument_problems(config: dict[str, Any]) -> list[str]:
    """Targets that cannot be imported or do not take the arguments given: names only, values are theirs to check.

    Args:
        config: resolved plain config, its targets already found on the allow-list.
    """
    problems = []
    nodes = [("", config), *((f"{p}.{k}".strip("."), v) for p, k, v in walk(config) if isinstance(v, dict))]
    for path, node in nodes:
        if "_target_" not in node:
            continue
        module, _, name = str(node["_target_"]).rpartition(".")
        try:
            target = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            problems.append(f"{path}._target_={node['_target_']} cannot be imported: {error}")
            continue
        known, required, takes_any = accepted_arguments(target)
        given = {key for key in node if not (key.startswith("_") and key.endswith("_"))}
        problems += [
            f"{path}.{key}: {name} takes no such argument ({', '.join(sorted(known))})"
            for key in sorted(given - known)
            if not takes_any
        ]
        if not node.get("_partial_", False):
            problems += [f"{path}.{key} is missing: {name} needs it" for key in sorted(required - given)]
    return problems


def accepted_arguments(target: type) -> tuple[set[str], set[str], bool]:
    """Names a class takes, those it needs, and whether it takes anything.

    A constructor that hands ``**options`` on to its base takes what the base takes.
    """
    known: set[str] = set()
    required: set[str] = set()
    for owner in inspect.getmro(target):
        if "__init__" not in vars(owner):
            continue
        parameters = inspect.signature(owner).parameters.values()
        known |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        named = (p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        required |= {p.name for p in named if p.default is p.empty}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return known, required, False
    return known, required, True
