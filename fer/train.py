"""``python -m fer.train``: one honest run, or a sweep of them.

python -m fer.train                                  synthetic faces, no download
python -m fer.train model=convcut data=rafdb         one network on one data set
python -m fer.train resume=outputs/rafdb-convcut/... go on where a run was stopped
"""

import logging
import math
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fer.config import CONF, check_command_line, guarded, refuse_unsafe
from fer.errors import UserError

CONFIG = "train"
log = logging.getLogger(__name__)
_failed: list[str] = []  # folders of this sweep's failed jobs


def run(config: DictConfig) -> float:
    """One job: train, test, write the run folder; returns the validation monitor."""
    from fer.experiment import run_experiment

    return run_experiment(config, Path(HydraConfig.get().runtime.output_dir))


@hydra.main(config_path=str(CONF), config_name=CONFIG, version_base="1.3")
def _job(config: DictConfig) -> float:
    if HydraConfig.get().mode is not RunMode.MULTIRUN:
        return float(guarded(lambda: run(config)))
    try:
        return run(config)
    except Exception:
        # One failing job must not stop the others; its folder's status.json keeps the error.
        log.exception("job %s failed: %s", HydraConfig.get().job.num, HydraConfig.get().job.override_dirname)
        _failed.append(HydraConfig.get().runtime.output_dir)
        return math.nan


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
    if not folders:
        check_command_line(CONFIG, words)
        _job()
        if _failed:
            print(f"error: {len(_failed)} jobs failed: {', '.join(_failed)}", file=sys.stderr)
            sys.exit(1)
    elif len(words) > 1:
        guarded(lambda: _only_resume(words))
    else:
        guarded(lambda: resume(Path(folders[0])))


def _only_resume(words: list[str]) -> None:
    others = [word for word in words if not word.startswith("resume=")]
    raise UserError(
        f"resume= continues a run with the config it was started with, so {' '.join(others)} cannot be given beside it"
    )


if __name__ == "__main__":
    main()
