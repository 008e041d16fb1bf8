"""``python -m fer.train``: one honest run, or a sweep of them.

python -m fer.train                                  synthetic faces, no download
python -m fer.train model=convcut data=rafdb         one network on one data set
python -m fer.train sweep=cv5 model=convcut,dan      5 folds of each, and what they amount to
python -m fer.train resume=outputs/rafdb-convcut/... go on where a run was stopped
"""

import shlex
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fer.config import CONF, check_command_line, guarded, is_sweep, refuse_unsafe
from fer.errors import UserError
from fer.sweep_checks import check_search, driven_by_wandb

CONFIG = "train"


def run(config: DictConfig) -> float:
    """One run: train, test, write the run folder; returns the validation monitor."""
    if driven_by_wandb():
        check_search(config)
    from fer.experiment import run_experiment

    command = shlex.join(["python", "-m", "fer.train", *sys.argv[1:]])
    return run_experiment(config, Path(HydraConfig.get().runtime.output_dir), command=command)


@hydra.main(config_path=str(CONF), config_name=CONFIG, version_base="1.3")
def _job(config: DictConfig) -> float | None:
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        from fer import sweep

        return sweep.job(config)
    return float(guarded(lambda: run(config)))


def resume(folder: Path) -> None:
    """Continue the run in ``folder`` with the config it was started with.

    Raises:
        UserError: no run folder, or its config names something that may not run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"resume={folder}: {path} is missing, expected a run folder written by python -m fer.train")
    config = OmegaConf.load(path)
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} is no config: expected the file python -m fer.train wrote")
    refuse_unsafe(config)
    from fer.experiment import run_experiment

    run_experiment(config, folder, resumed=True)


def main() -> None:
    """The command."""
    words = sys.argv[1:]
    folders = [word.partition("=")[2] for word in words if word.startswith("resume=") and word != "resume=null"]
    if len(folders) == 1 == len(words):
        guarded(lambda: resume(Path(folders[0])))
    elif folders:
        guarded(lambda: _only_resume(words))
    else:
        config = check_command_line(CONFIG, words)
        if is_sweep(config, words):
            from fer import sweep

            sys.exit(guarded(lambda: sweep.run(config, words, _job)))
        _job()


def _only_resume(words: list[str]) -> None:
    others = [word for word in words if not word.startswith("resume=")]
    raise UserError(
        f"resume= continues a run with the config it was started with, so {' '.join(others)} cannot be given beside it"
    )


if __name__ == "__main__":
    main()
