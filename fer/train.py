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
from omegaconf import DictConfig

from fer.config import CONF, check_command_line, check_run_folder, config_of_run, folder_to_resume, guarded, is_sweep
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
    """Continue the run in ``folder`` with the config it was started with."""
    config = config_of_run(folder, "python -m fer.train")
    from fer.experiment import run_experiment

    run_experiment(config, folder, resumed=True)


def main() -> None:
    """The command."""
    words = sys.argv[1:]
    folder = guarded(lambda: folder_to_resume(words))
    if folder is not None:
        guarded(lambda: resume(folder))
        return
    config = check_command_line(CONFIG, words)
    if is_sweep(config, words):
        from fer import sweep

        sys.exit(guarded(lambda: sweep.run(config, words, _job)))
    guarded(lambda: check_run_folder(config))
    _job()


if __name__ == "__main__":
    main()
