"""Shared parts of the tests: composed configs, and the real command line in a subprocess."""

import atexit
import functools
import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb.apis.public  # noqa: F401 - before torch, as in fer/experiment.py
from commands import call
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigSource
from omegaconf import DictConfig

from fer.config import CONF, compose_like_hydra
from fer.sweep import Plan, plan


def pytest_collection() -> None:
    """The million objects that imports make stay until the end; they are not looked through for garbage again."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # or libraries complain of leaks


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
    """The config of a command line of ``fer.<command>``, its `hydra:` values resolvable.

    Merging files costs 0.3 core-seconds, so they are merged once per choice of them, and the values set in a copy, as
    Hydra does.
    """
    files = [word for word in overrides if "@" in word or (CONF / word.lstrip("+~").partition("=")[0]).is_dir()]
    config = pickle.loads(_merged(command, tuple(files)))
    apply([word for word in overrides if word not in files], config)
    HydraConfig.instance().set_config(config)
    del_hydra = config.copy()
    del_hydra._set_flag("struct", False)
    del del_hydra["hydra"]
    del_hydra._set_flag("struct", True)
    return del_hydra


def apply(words: list[str], config: DictConfig) -> None:
    """Set values as Hydra does."""
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(words), config)


@pytest.fixture(scope="session", autouse=True)
def _parsed_once() -> Iterator[None]:
    """Hydra parses each file of conf/ and of its own once: a quarter of the time that 400 compositions take."""
    known: dict[tuple[str, str], bytes] = {}
    Plugins.instance()  # registers the sources
    with pytest.MonkeyPatch.context() as patch:
        for source in map(SourcesRegistry.instance().resolve, ("file", "pkg")):

            def again(self: ConfigSource, config_path: str, load: Any = source.load_config) -> Any:
                if self.path not in (str(CONF), "hydra.conf"):
                    return load(self, config_path)
                if (self.path, config_path) not in known:
                    known[self.path, config_path] = pickle.dumps(load(self, config_path))
                return pickle.loads(known[self.path, config_path])

            patch.setattr(source, "load_config", again)
        yield


@functools.cache
def _merged(command: str, files: tuple[str, ...]) -> bytes:
    """The pickled config of words that choose files, ``hydra`` included."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(command, list(files), return_hydra_config=True)
    GlobalHydra.instance().clear()
    return pickle.dumps(config)


def planned(*words: str) -> Plan:
    """What ``fer.train WORDS`` would sweep; tests/test_safety.py looks into the files that it chooses among."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fer.sweep.check_choices", lambda *_: None)
        return plan(compose_like_hydra("train", list(words)), list(words))


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


def leave_out_pictures(patch: pytest.MonkeyPatch) -> None:
    """Runs draw no confusion matrices, as dear as ten steps each; others do, and tests look at those."""
    patch.setattr("fer.at_test.confusion_figure", lambda *_: SimpleNamespace(savefig=lambda *_, **__: None))


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
    done = call("train", *TINY, "hydra.run.dir=run", cwd=folder, FER_CACHE=str(cache), NETRC=os.devnull, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder / "run"
