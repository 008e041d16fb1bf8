"""Shared parts of the tests: composed configs, and the real command line in a subprocess."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fer.config import CONF

# A run of seconds: few small faces, a tiny network, one thread.
TINY = [
    "data=synthetic",
    "data.train=120",
    "data.val=42",
    "data.test=42",
    "data.subjects=40",
    "data.batch_size=20",
    "model=cbam_resnet",
    "model.width=8",
    "model.layers=[1,1,1,1]",
    "trainer=cpu",
    "trainer.threads=1",
    "trainer.max_epochs=2",
    "trainer.enable_progress_bar=false",
]


def composed(*overrides: str, command: str = "train") -> DictConfig:
    """The config of a command line of ``fer.<command>``, its `hydra:` values resolvable."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(command, list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(config)
    GlobalHydra.instance().clear()
    del_hydra = config.copy()
    del_hydra._set_flag("struct", False)
    del del_hydra["hydra"]
    del_hydra._set_flag("struct", True)
    return del_hydra


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of decoded images for the whole session."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(autouse=True)
def _environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FER_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    monkeypatch.setenv("COLUMNS", "200")


def train(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m fer.train WORDS`` as a user types it."""
    command = [sys.executable, "-m", "fer.train", *words]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=1500, check=False
    )


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A finished run with the default (W&B offline) logger, for all tests that only look at one."""
    folder = tmp_path_factory.mktemp("whole")
    done = train(*TINY, "hydra.run.dir=run", cwd=folder, FER_CACHE=str(cache), NETRC=os.devnull, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder / "run"
