"""A trained run opened again: its network with the best weights, its preprocessing, its data.

Where evaluate, predict, explain and export begin.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fer.checkpoints import load_best
from fer.config import argument_problems, resolved
from fer.data.base import ExpressionDataModule
from fer.data.transforms import Finish
from fer.errors import UserError
from fer.models.base import ExpressionModule
from fer.runs import RunFolder, code_version, read_json
from fer.safety import read_config

log = logging.getLogger(__name__)
# Where initial weights come from; a checkpoint has its own, so nothing is fetched for them again.
INITIAL_WEIGHTS = {"pretrained": False, "backbone_ckpt": None, "landmark_ckpt": None}


@dataclass(frozen=True)
class TrainedRun:
    """A finished run.

    Attributes:
        folder: its files.
        config: as it was trained, resolved, classes and all.
        results: its ``results.json``.
        module: the network with the weights of the best validation epoch, in eval mode on the device asked for.
    """

    folder: RunFolder
    config: DictConfig
    results: dict[str, Any]
    module: ExpressionModule

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.module.device

    def data(self) -> ExpressionDataModule:
        """The data module the run was trained with, not opened yet."""
        data: ExpressionDataModule = instantiate(self.config.data)
        return data

    def finish(self, tta: str) -> Finish:
        """From (B, S, S, C) uint8 crops, S and C the run's ``data.store_size`` and ``data.channels``, to its input.

        Args:
            tta: views of each image, see `fer.data.transforms.TTA_VIEWS`.
        """
        module = self.module
        return Finish(
            size=module.image_size,
            mean=module.mean,
            std=module.std,
            augment=instantiate(self.config.data.augment),
            seed=self.config.seed,
            train=False,
            augmented=False,
            tta=tta,
        )


def open_run(path: Path, device: str | torch.device = "cpu") -> TrainedRun:
    """Open a finished run folder.

    Args:
        path: the folder.
        device: where the network shall be; ``auto``: an accelerator where there is one.

    Raises:
        UserError: no run folder, a run that was not finished, a config that names what may not run, or a checkpoint
            that is damaged, of other classes or of other code.
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise UserError(f"run={path}: {folder.config} is missing, expected a run folder written by python -m fer.train")
    config = read_config(folder.config, "python -m fer.train")
    if not all(OmegaConf.is_dict(OmegaConf.select(config, key)) for key in ("model", "data")):
        raise UserError(f"{folder.config} has no model and data: expected the file python -m fer.train wrote")
    if not folder.best.is_file() or not folder.results.is_file():
        raise UserError(
            f"run={path} was not finished ({folder.status().get('status', 'never started')}): go on with it by "
            f"python -m fer.train resume={path}"
        )
    results = read_json(folder.results)
    for key, value in INITIAL_WEIGHTS.items():
        if key in config.model:
            config.model[key] = value
    plain = {key: resolved(config[key]) for key in ("model", "data")}
    problems = argument_problems(plain)
    if problems:
        raise UserError(f"run={path} is of other code than this: " + "; ".join(problems))
    module = instantiate(config.model)
    if not isinstance(module, ExpressionModule):
        raise UserError(f"{folder.config}: model._target_={config.model._target_} is no model")
    _load(module, folder)
    if results["code_version"] != code_version():
        log.info("the code has changed since %s was trained", path)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return TrainedRun(folder, config, results, module.eval().to(place))


def _load(module: ExpressionModule, folder: RunFolder) -> None:
    checkpoint, path = load_best(folder), folder.best
    known = checkpoint.get("fer", {})
    if known.get("class_names") != module.class_names:
        raise UserError(
            f"{path} is of other classes than its run's config: it has {known.get('class_names')}, the config "
            f"{module.class_names}; take a whole run folder"
        )
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"{path} does not fit the model of its run's config ({str(error).splitlines()[-1].strip()}): it comes from "
            "another config or from other code"
        ) from None
    module.weights = known["weights"]
