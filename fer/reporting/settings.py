"""What of a command line made a run's figures."""

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fer.config import CONF, compose_like_hydra
from fer.errors import UserError
from fer.reporting.collect import CHECKSUM, PATHS, short_checksums

# Words of a command that say which repetition it is, or where it ran, but not what was measured.
REPETITION = (
    *("seed=", "protocol.fold=", "logger=", "hydra.", "hydra/", "data.root=", "data.cache=", "fresh=", "report="),
    *("trainer.threads=", "trainer.enable_progress_bar=", "trainer.checkpoint_", "data.num_workers="),
)


def setting_of(command: str, weights: str) -> str:
    """A command's words without those that say which repetition it is, and those that change nothing.

    A word changes nothing whose value its groups (``experiment=...``) give already; of ``sweep=...`` that is so where
    its file holds axes alone, whose values the command has too. Of a path the name of the file is kept, of weights
    with the beginning of their checksum, and of ``start_from`` the name of the run: ``rafdb-vit@sha256:0c06849be107``.

    Args:
        command: of a run.
        weights: what it began with, as its results say.

    Raises:
        UserError: the command is none of ``conf/`` as it is now.
    """
    typed = [word for word in shlex.split(command) if "=" in word and not word.startswith(REPETITION)]
    groups = [word for word in typed if (CONF / word.partition("=")[0]).is_dir()]
    values = sorted(word for word in typed if word not in groups)
    groups = sorted((word for word in groups if not _axes_alone(word)), key=_experiment_first)
    plain = _composed(tuple(groups))
    return shlex.join([*groups, *(_named(word, weights) for word in values if not _said(plain, word))])


def _experiment_first(word: str) -> tuple[bool, str]:
    return not word.startswith("experiment="), word


@functools.cache
def _composed(groups: tuple[str, ...]) -> Any:
    try:
        return compose_like_hydra("train", list(groups))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(
            f"{' '.join(groups)} is no setting of conf/ as it is now: {' '.join(str(error).split())}"
        ) from None


def _named(word: str, weights: str) -> str:
    """A word that names a file or a run by its name and the checksum of the weights in it, never by its folder."""
    key, _, value = word.partition("=")
    if key == "start_from" and value != "null":
        began = re.fullmatch(rf"run (\S+) .*({CHECKSUM}[0-9a-f]+)", weights)
        return f"{key}={began[1]}@{short_checksums(began[2])}" if began else f"{key}=..."
    path = value.strip("'\"").partition(f"@{CHECKSUM}")[0]
    name = Path(path).name
    read = re.search(rf"(?<![^\s(]){re.escape(name)} ({CHECKSUM}[0-9a-f]+)", weights) if name else None
    if read:
        return f"{key}={name}@{short_checksums(read[1])}"
    return f"{key}={name}" if path.startswith(PATHS) else word


def _axes_alone(word: str) -> bool:
    group, _, name = word.partition("=")
    path = CONF / group / f"{name}.yaml"
    return group == "sweep" and path.is_file() and set(yaml.safe_load(path.read_text())) <= {"hydra", "report"}


def _said(plain: Any, word: str) -> bool:
    key = word.partition("=")[0].lstrip("+")
    given = OmegaConf.select(OmegaConf.from_dotlist([word.lstrip("+")]), key)
    return bool(OmegaConf.select(plain, key) == given)
