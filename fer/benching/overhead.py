"""What a training step costs above a hand-written loop, and a tiny network's above ``Trainer(barebones=True)``.

Ours is the Trainer, the callbacks and the loggers of ``python -m fer.train``, the progress bar drawn as on a terminal.
"""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from fer.benching.training import Fit, Prepared, by_hand, composed, prepared, steps_for, twin
from fer.benching.windows import Bench, Row, compare, interleave
from fer.experiment import watchers
from fer.models.base import ExpressionModule
from fer.runs import RunFolder
from fer.session import protect
from fer.stopping import Stop
from fer.trainer import quieten


def measure(bench: Bench) -> list[Row]:
    """A row for each model, then the tiny network."""
    quieten()
    return [*_models(bench), _tiny(bench)]


def _models(bench: Bench) -> Iterator[Row]:
    options = bench.options
    for model in options["models"]:
        config = composed(f"experiment=small/{model}", *_words(bench))
        module, data = prepared(config)
        with ours(config, module, data, bench.folder / model) as fit:
            loop = fit.aside(partial(by_hand, twin(module), data, bf16="bf16" in str(module.trainer.precision)))
            steps, seconds = fit.aside(partial(steps_for, options["window_seconds"], loop))
            variants = {"ours": partial(fit.window, steps), "by hand": partial(fit.aside, partial(loop, steps))}
            windows = interleave(variants, bench.windows * options["times_windows"])
        judged = 1000 * seconds > options["over_ms"]
        yield compare(
            f"`{model}`",
            windows,
            "ours",
            "by hand",
            at_most=options["at_most_ratio"] if judged else None,
            note="" if judged else f"under {options['over_ms']:g} ms, so no goal",
        )


def _tiny(bench: Bench) -> Row:
    options = bench.options
    config = composed(*options["tiny"], *_words(bench))
    module, data = prepared(config)
    bare = Fit(lambda windows: lightning.Trainer(barebones=True, **_like(config, windows)), twin(module), data)
    with ours(config, module, data, bench.folder / "tiny") as fit, bare:
        steps, _ = steps_for(options["window_seconds"], bare.window)
        variants = {"ours": partial(fit.window, steps), "barebones": partial(bare.window, steps)}
        windows = interleave(variants, bench.windows * options["times_windows_tiny"])
    return compare("a tiny network", windows, "ours", "barebones", figure="difference", at_most=options["at_most_ms"])


def _words(bench: Bench) -> list[str]:
    return [*bench.options["words"], f"trainer.threads={bench.threads}", f"data.cache={bench.folder}/store"]


def _like(config: DictConfig, callbacks: list[Callback]) -> dict[str, Any]:
    precision = instantiate(config.trainer).precision
    return {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "precision": precision, "callbacks": callbacks}


@contextlib.contextmanager
def ours(config: DictConfig, module: ExpressionModule, data: Prepared, folder: Path) -> Iterator[Fit]:
    """A fit with everything that ``python -m fer.train`` has in a terminal."""
    folder.mkdir()
    loggers = [instantiate(node, run_id=folder.name, save_dir=str(folder)) for node in (config.logger or {}).values()]

    def trainer(windows: list[Callback]) -> lightning.Trainer:
        callbacks = [*watchers(config, RunFolder(folder), module, Stop()), *windows]
        made = instantiate(config.trainer, callbacks=callbacks, logger=loggers, default_root_dir=str(folder))
        protect(module, made, RunFolder(folder))
        assert isinstance(made, lightning.Trainer)
        return made

    with drawn_on_a_terminal(), Fit(trainer, module, data) as fit:
        try:
            yield fit
        finally:
            for logger in loggers:
                logger.experiment.finish()


@contextlib.contextmanager
def drawn_on_a_terminal() -> Iterator[None]:
    """Rich draws for a terminal, and nobody sees it."""
    before = os.environ.get("FORCE_COLOR")
    os.environ["FORCE_COLOR"] = "1"  # what rich takes for being on a terminal
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        if before is None:
            del os.environ["FORCE_COLOR"]
        else:
            os.environ["FORCE_COLOR"] = before
