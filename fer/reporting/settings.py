"""What of a command line made a run's figures."""

import functools
import shlex
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fer.config import CONF, compose_like_hydra
from fer.errors import UserError

# Words of a command that say which repetition it is, or where it ran, but not what was measured.
REPETITION = (
    *("seed=", "protocol.fold=", "logger=", "hydra.", "hydra/", "data.root=", "data.cache=", "fresh=", "report="),
    *("trainer.threads=", "trainer.enable_progress_bar=", "trainer.checkpoint_", "data.num_workers="),
)


def setting_of(command: str) -> str:
    """A command's words without those that say which repetition it is, and those that change nothing.

    A word changes nothing whose value its groups (``experiment=...``) give already; of ``sweep=...`` that is so where
    its file holds axes alone, whose values the command has too. Of a path nothing is kept but that there was one.

    Raises:
        UserError: the command is none of ``conf/`` as it is now.
    """
    typed = [word for word in shlex.split(command) if "=" in word and not word.startswith(REPETITION)]
    groups = [word for word in typed if (CONF / word.partition("=")[0]).is_dir()]
    values = sorted(word for word in typed if word not in groups)
    groups = sorted((word for word in groups if not _axes_alone(word)), key=_experiment_first)
    plain = _composed(tuple(groups))
    return shlex.join([*groups, *(_without_path(word) for word in values if not _said(plain, word))])


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


def _without_path(word: str) -> str:
    key, _, value = word.partition("=")
    return f"{key}=..." if key == "start_from" or value.startswith(("/", "~", ".")) else word


def _axes_alone(word: str) -> bool:
    group, _, name = word.partition("=")
    path = CONF / group / f"{name}.yaml"
    return group == "sweep" and path.is_file() and set(yaml.safe_load(path.read_text())) <= {"hydra", "report"}


def _said(plain: Any, word: str) -> bool:
    key = word.partition("=")[0].lstrip("+")
    given = OmegaConf.select(OmegaConf.from_dotlist([word.lstrip("+")]), key)
    return bool(OmegaConf.select(plain, key) == given)
