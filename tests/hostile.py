"""Ways by which a config, a checkpoint or a data file runs a program: each first shown to work without our care.

A config's mechanism has the config, the words of the refusal, and ``plain``, which does with it what Hydra, OmegaConf
or `logging` do by themselves; a file's has its writer and the reader that executes it. The canary is a file that is
there when a mechanism has run.
"""

import importlib
import io
import logging.config
import pickle
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import pytest
import torch
import yaml
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import configure_log, env_override
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fer.config import CONF

TOUCH = "pathlib.Path.touch"


class Bird:
    """Unpickling it makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.canary), "w")


# -- configs -----------------------------------------------------------------------------------------------------------


class InConfig(NamedTuple):
    """A mechanism of a config.

    Attributes:
        config: made from the canary's path.
        plain: what runs it.
        named: what the refusal names.
    """

    config: Callable[[Path], dict[str, Any]]
    plain: Callable[[DictConfig], object]
    named: str


def touch(canary: Path) -> dict[str, Any]:
    """A node that makes the canary."""
    return {"_target_": TOUCH, "_args_": [str(canary)]}


def model(node: Callable[[Path], Any]) -> Callable[[Path], dict[str, Any]]:
    """A config with the node for its model."""
    return lambda canary: {"model": node(canary)}


def built(config: DictConfig) -> object:
    """What a command does with ``config.model``."""
    return instantiate(config.model)


def called(config: DictConfig) -> object:
    """What a class does with a function it is given."""
    made = instantiate(config.model)
    return made[0](made[1]) if isinstance(made, list) or OmegaConf.is_list(made) else made()


def pickle_file(canary: Path) -> str:
    """A pickle beside the canary."""
    path = canary.with_suffix(".pkl")
    path.write_bytes(pickle.dumps(Bird(canary)))
    return str(path)


def array_file(canary: Path) -> str:
    """An array of objects beside the canary."""
    path = canary.with_suffix(".npy")
    np.save(path, np.array([Bird(canary)], dtype=object), allow_pickle=True)
    return str(path)


def module_file(canary: Path, name: str) -> str:
    """A module beside the canary that makes it on import; pytest's path has the folder."""
    canary.with_name(f"{name}.py").write_text(f"open({str(canary)!r}, 'w')\nx = model = None\n")
    return str(canary.parent)


def logs(config: DictConfig) -> None:
    """What Hydra does before a job."""
    configure_log(config.hydra.job_logging, False)


def job_logging(**more: Any) -> dict[str, Any]:
    """Hydra's logging with these entries."""
    return {"hydra": {"job_logging": {"version": 1, "root": {"level": "INFO"}, **more}}}


def package(canary: Path) -> dict[str, Any]:
    """A package that makes the canary on import, in the search path."""
    folder = canary.with_name("nest")
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text(f"open({str(canary)!r}, 'w')\n")
    return {"hydra": {"searchpath": ["pkg://nest"]}}


def composed_plainly(*words: str) -> DictConfig:
    """What Hydra itself composes."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        return loader.load_configuration("train", list(words), RunMode.RUN)


def git(canary: Path) -> dict[str, Any]:
    """A program called git on a path of its own."""
    path = canary.with_name("git")
    path.write_text(f"#!/bin/sh\n/bin/touch {canary}\n")
    path.chmod(0o700)
    return {"hydra": {"job": {"env_set": {"PATH": str(canary.parent)}}}}


def runs_git(config: DictConfig) -> None:
    """What a run does, in the environment Hydra sets up for it."""
    with env_override(OmegaConf.to_container(config.hydra.job.env_set)):
        subprocess.run(["git", "rev-parse", "HEAD"], check=False, capture_output=True)


def slurm(**options: Any) -> dict[str, Any]:
    """Hydra's launcher for SLURM with these options."""
    target = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    return {"hydra": {"launcher": {"_target_": target, **options}}}


def starts(config: DictConfig) -> None:
    """The script that submitit hands to SLURM, run by a shell as SLURM does."""
    pytest.importorskip("submitit", reason="the harm is done only with the extra `sweeps`; the refusal was seen before")
    from submitit.slurm.slurm import _make_sbatch_string

    options = {key: value for key, value in OmegaConf.to_container(config.hydra.launcher).items() if key != "_target_"}
    script = _make_sbatch_string(command="true", folder="out", **options).replace("\nsrun", "\n: srun")
    subprocess.run(["/bin/sh", "-c", script], check=False, capture_output=True)


def filled(canary: Path) -> Path:
    """A file of the user's."""
    canary.with_suffix(".txt").write_text("dear diary")
    return canary.with_suffix(".txt")


def emptied(config: DictConfig) -> None:
    """Hydra opens the log; the canary tells that the file is empty."""
    logs(config)
    path = Path(config.hydra.job_logging.handlers.x.filename)
    logging.getLogger().handlers.clear()
    if path.read_text() == "":
        path.with_suffix(".canary").touch()


IN_CONFIG: dict[str, InConfig] = {
    "a function as target": InConfig(model(touch), built, TOUCH),
    "a target deep in a list": InConfig(
        model(lambda c: {"_target_": "builtins.dict", "x": [[touch(c)]]}), built, TOUCH
    ),
    "a function half applied": InConfig(model(lambda c: {**touch(c), "_partial_": True}), called, TOUCH),
    "a module reached through one of ours": InConfig(
        model(lambda c: {**touch(c), "_target_": "fer.data.store.Path.touch"}), built, "fer.data.store.Path.touch"
    ),
    "a file opened for writing": InConfig(
        model(lambda c: {"_target_": "builtins.open", "_args_": [str(c), "w"]}), built, "builtins.open"
    ),
    "code in a string": InConfig(
        model(lambda c: {"_target_": "numpy.testing.measure", "code_str": f"open({str(c)!r}, 'w')"}),
        built,
        "numpy.testing.measure",
    ),
    "a function looked up by name": InConfig(
        model(lambda c: [{"_target_": "hydra.utils.get_method", "path": TOUCH}, str(c)]),
        called,
        "hydra.utils.get_method",
    ),
    "torch.load of a pickle": InConfig(
        model(lambda c: {"_target_": "torch.load", "f": pickle_file(c), "weights_only": False}), built, "torch.load"
    ),
    "numpy.load of a pickle": InConfig(
        model(lambda c: {"_target_": "numpy.load", "_args_": [array_file(c)], "allow_pickle": True}),
        built,
        "numpy.load",
    ),
    "torch.hub.load of a folder": InConfig(
        model(
            lambda c: {
                **{"_target_": "torch.hub.load", "source": "local", "model": "model"},
                "repo_or_dir": module_file(c, "hubconf"),
            }
        ),
        built,
        "torch.hub.load",
    ),
    "a target made of text (oc.create)": InConfig(
        model(lambda c: f"${{oc.create:{{_target_: {TOUCH}, _args_: ['{c}']}}}}"), built, "oc.create"
    ),
    "a target decoded from text (oc.decode)": InConfig(
        model(lambda c: f"${{oc.decode:\"{{_target_: {TOUCH}, _args_: ['{c}']}}\"}}"), built, "oc.decode"
    ),
    "a target as a default (oc.select)": InConfig(
        model(lambda c: f"${{oc.select:no,{{_target_: {TOUCH}, _args_: ['{c}']}}}}"), built, "oc.select"
    ),
    "a target put together": InConfig(
        lambda c: {"a": "pathlib.Path", "model": {**touch(c), "_target_": "${a}.touch"}}, built, "${a}.touch"
    ),
    "a callback of Hydra's": InConfig(
        lambda c: {"hydra": {"callbacks": {"x": touch(c)}}}, Callbacks, f"hydra.callbacks.x._target_={TOUCH}"
    ),
    "logging that calls ()": InConfig(
        lambda c: job_logging(handlers={"x": {"()": "builtins.open", "file": str(c), "mode": "w"}}), logs, "x.()"
    ),
    "logging that calls (), elsewhere": InConfig(
        lambda c: {
            **{"elsewhere": {"()": "builtins.open", "file": str(c), "mode": "w"}},
            **job_logging(handlers={"x": "${elsewhere}"}),
        },
        logs,
        "elsewhere.()",
    ),
    "logging to a class of any module": InConfig(
        lambda c: job_logging(handlers={"x": {"class": "zipfile.ZipFile", "file": str(c), "mode": "w"}}),
        logs,
        "zipfile",
    ),
    "logging that imports ext://": InConfig(
        lambda c: (
            module_file(c, "birds")
            and job_logging(handlers={"x": {"class": "logging.StreamHandler", "stream": "ext://birds.x"}})
        ),
        logs,
        "ext://birds.x",
    ),
    "a log over a file of one's own": InConfig(
        lambda c: job_logging(
            handlers={"x": {"class": "logging.FileHandler", "filename": str(filled(c)), "mode": "w"}},
            root={"handlers": ["x"]},
        ),
        emptied,
        "handlers.x.filename",
    ),
    "another PATH for a job": InConfig(git, runs_git, "hydra.job.env_set.PATH"),
    "a package in the search path": InConfig(
        package, lambda config: composed_plainly("hydra.searchpath=[pkg://nest]"), "hydra.searchpath"
    ),
    "commands before a job of SLURM's": InConfig(lambda c: slurm(setup=[f"touch {c}"]), starts, "hydra.launcher.setup"),
    "a line break in SLURM's script": InConfig(
        lambda c: slurm(partition=f"gpu\ntouch {c} #"), starts, "hydra.launcher.partition"
    ),
    "other words for srun": InConfig(
        lambda c: slurm(srun_args=["touch", str(c)]),
        lambda config: subprocess.run(list(config.hydra.launcher.srun_args), check=True),  # what would follow srun
        "hydra.launcher.srun_args",
    ),
}

# -- files -------------------------------------------------------------------------------------------------------------


class InFile(NamedTuple):
    """A mechanism of a file: how it is written, from its path and the canary's, and what executes it."""

    write: Callable[[Path, Path], object]
    plain: Callable[[Path], object]


def unpickled(path: Path) -> object:
    """torch.load as it was before version 2.6."""
    return torch.load(path, weights_only=False)


def old_tar(path: Path, canary: Path) -> None:
    """PyTorch's tar file of before 2017: a pickle is the first thing in it that is read."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Bird(canary))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def script(path: Path, canary: Path) -> None:
    """TorchScript whose code, run as it is loaded, makes a file: ``aten::from_file`` is one of its operators."""

    class Nest(torch.nn.Module):
        def __init__(self, path: str) -> None:
            super().__init__()
            self.path = path

        @torch.jit.export
        def __getstate__(self) -> tuple[str, bool]:
            return self.path, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[str, bool]) -> None:
            self.training = state[1]
            made = torch.from_file(state[0], shared=True, size=1)  # what is not used would be left out
            self.path = state[0] + str(made.numel())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.script(Nest(str(canary))).save(str(path))


def forced(path: Path) -> object:
    """torch.load with the variable that brings the old default back."""
    with env_override({"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}):
        return torch.load(path)


IN_FILE: dict[str, InFile] = {
    "a pickle in PyTorch's zip": InFile(lambda p, c: torch.save({"state_dict": Bird(c)}, p), unpickled),
    "a pickle, and a variable that allows it": InFile(lambda p, c: torch.save({"state_dict": Bird(c)}, p), forced),
    "a pickle in PyTorch's older format": InFile(
        lambda p, c: torch.save({"state_dict": Bird(c)}, p, _use_new_zipfile_serialization=False), unpickled
    ),
    "a pickle in PyTorch's oldest format": InFile(old_tar, unpickled),
    "a bare pickle": InFile(lambda p, c: p.write_bytes(pickle.dumps(Bird(c))), unpickled),
    "joblib's": InFile(lambda p, c: joblib.dump({"x": Bird(c)}, p), joblib.load),
    "TorchScript": InFile(script, torch.jit.load),
    "YAML that makes objects": InFile(
        lambda p, c: p.write_text(f"model: !!python/object/apply:builtins.open [{c}, w]\n"),
        lambda p: yaml.unsafe_load(p.read_text()),
    ),
}


def rerun(path: Path) -> object:
    """What --experimental-rerun does with its file."""
    return importlib.import_module("hydra.main")._get_rerun_conf(str(path), [])
