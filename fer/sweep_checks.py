"""What a sweep is refused for, before it costs time. Nothing here imports torch unless Ray is asked for GPUs."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from fer.config import CONF, compose_like_hydra, several_devices
from fer.errors import UserError
from fer.safety import refuse_unsafe

GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
RAY = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
SEARCHED_ON_TEST = "SEARCHED ON TEST: test figures chose the settings, so no figure of this search is a result"


def is_search(hydra: Any) -> bool:
    """Whether the sweep's jobs depend on the figures of earlier ones."""
    return hydra.sweeper._target_ != GRID or driven_by_wandb()


def check_launcher(config: DictConfig) -> None:
    """Refuse a launcher or sweeper that cannot work here.

    Raises:
        UserError: it is not installed, or wants GPUs where there are none.
    """
    for what in ("launcher", "sweeper"):
        target = str(config.hydra[what]._target_)
        package = ".".join(target.split(".")[:2])
        if target.startswith("hydra_plugins.") and importlib.util.find_spec(package) is None:
            raise UserError(f"hydra/{what}: {package} is not installed; pip install 'fer-bench[sweeps]' brings it")
    launcher = config.hydra.launcher
    if launcher._target_ == RAY and launcher.ray.init.address is None and launcher.ray.remote.num_gpus:
        import torch

        if not torch.cuda.is_available():
            # Ray would wait for one for ever.
            raise UserError(
                f"hydra.launcher.ray.remote.num_gpus={launcher.ray.remote.num_gpus}, but this machine has no GPU: "
                "hydra.launcher.ray.remote.num_gpus=0 runs on its CPU"
            )


def check_choices(config_name: str, words: Sequence[str], swept: Sequence[Override]) -> None:
    """Check the files a sweep chooses among: Hydra acts on a job's own ``hydra`` node before the job's code runs.

    Args:
        config_name: the command's config.
        words: the command line.
        swept: what is swept.

    Raises:
        UserError: one of them names something that may not run.
    """
    for override in swept:
        if override.is_discrete_sweep() and (CONF / override.key_or_group).is_dir():
            others = [word for word in words if word != override.input_line]
            for choice in override.sweep_string_iterator():
                refuse_unsafe(compose_like_hydra(config_name, [*others, f"{override.get_key_element()}={choice}"]))


def check_devices(config: DictConfig) -> None:
    """Refuse jobs over several devices: Hydra would start every rank as a sweep of its own.

    Raises:
        UserError: ``trainer.devices`` or ``trainer.num_nodes`` asks for more than one.
    """
    if several_devices(config.trainer):
        raise UserError(
            f"trainer.devices={config.trainer.devices} in a sweep: a sweep's job has one device, and several GPUs run "
            "several jobs (hydra/launcher=ray); for one run over several devices leave -m and sweep= out"
        )


def driven_by_wandb() -> bool:
    """Whether this process was started by W&B's sweep agent."""
    return "WANDB_SWEEP_ID" in os.environ


def check_search(config: DictConfig) -> None:
    """Refuse a search whose runs choose on the test part; stamp the runs of one that is allowed to.

    What a search maximises is what a run returns, so it must not be a test figure.

    Args:
        config: composed config of one run; ``protocol.stamp`` is set where the search is allowed.

    Raises:
        UserError: ``protocol.select_on=test`` without ``allow_search_on_test=true``.
    """
    if config.protocol.select_on != "test":
        return
    if not config.allow_search_on_test:
        raise UserError(
            "protocol.select_on=test in a search would choose the settings by their test figures: search with "
            "protocol.select_on=val, or set allow_search_on_test=true, which stamps every result"
        )
    config.protocol.stamp = "; ".join(filter(None, [config.protocol.stamp, SEARCHED_ON_TEST]))
