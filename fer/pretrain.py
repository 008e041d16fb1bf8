"""``python -m fer.pretrain``: weights for a backbone from faces without labels, or for a landmark network.

python -m fer.pretrain task=distill data=folder data.root=celeba/img_align_celeba protocol=holdout
python -m fer.train model=two_stream model.pretrained=outputs/pretrain/.../backbone.safetensors
"""

import shlex
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fer.config import CONF, check_command_line, check_run_folder, config_of_run, folder_to_resume, guarded, is_sweep
from fer.errors import UserError

CONFIG = "pretrain"


def run(config: DictConfig) -> None:
    """One pre-training."""
    from fer.pretraining.run import run_pretraining

    command = shlex.join(["python", "-m", "fer.pretrain", *sys.argv[1:]])
    run_pretraining(config, Path(HydraConfig.get().runtime.output_dir), command=command)


@hydra.main(config_path=str(CONF), config_name=CONFIG, version_base="1.3")
def _job(config: DictConfig) -> None:
    guarded(lambda: run(config))


def resume(folder: Path) -> None:
    """Continue the pre-training in ``folder`` with the config it was started with."""
    config = config_of_run(folder, "python -m fer.pretrain")
    from fer.pretraining.run import run_pretraining

    run_pretraining(config, folder, resumed=True)


def _no_sweep() -> None:
    raise UserError("python -m fer.pretrain makes one run at a time: leave -m out")


def main() -> None:
    """The command."""
    words = sys.argv[1:]
    folder = guarded(lambda: folder_to_resume(words))
    if folder is not None:
        guarded(lambda: resume(folder))
        return
    config = check_command_line(CONFIG, words)
    if is_sweep(config, words):
        guarded(_no_sweep)
    guarded(lambda: check_run_folder(config))
    _job()


if __name__ == "__main__":
    main()
