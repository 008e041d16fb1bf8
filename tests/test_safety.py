"""Configs are data: hostile ones are refused before anything in them runs."""

from pathlib import Path

import pytest
from conftest import TINY, composed, train
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fer.config import CONF
from fer.safety import target_problem, unsafe_entries
from fer.errors import UserError
from fer.checkpoints import load_checkpoint

HOSTILE_TARGETS = [
    "os.system",
    "subprocess.run",
    "builtins.eval",
    "builtins.open",
    "pathlib.Path.unlink",
    "pathlib.Path.touch",
    "torch.load",
    "torch.hub.load",
    "numpy.load",
    "hydra.utils.get_method",
    "hydra.utils.instantiate",
    "logging.os.system",
    "fer.data.store.shutil.rmtree",
    "fer.data.store.Path",  # imported there, not written there
    "fer.experiment.run_experiment",
    "torch.optim.torch.load",
    "albumentations.os.system",
    "lightning.pytorch.callbacks.ModelCheckpoint.from_file",
    "${oc.env:TARGET}",
    "",
    7,
]


@pytest.mark.parametrize("target", HOSTILE_TARGETS)
def test_hostile_targets_are_refused_by_name(target: object) -> None:
    assert target_problem(target) is not None
    config = OmegaConf.create({"model": {"deep": [{"_target_": target}]}})
    assert any("model.deep" in line for line in unsafe_entries(config))


def test_our_own_targets_are_allowed() -> None:
    allowed = 0
    for path in sorted(CONF.rglob("*.yaml")):
        found = unsafe_entries(OmegaConf.load(path))
        assert found == [], path
        allowed += "_target_" in path.read_text()
    assert allowed >= 25


@pytest.mark.parametrize(
    "attack",
    [
        "++hydra.callbacks.x._target_=pathlib.Path.touch",
        "++hydra.launcher._target_=pathlib.Path.touch",
        "++hydra.sweeper._target_=pathlib.Path.touch",
        "++model.x={_target_:pathlib.Path.touch}",
    ],
)
def test_attacks_on_the_command_line_leave_no_trace(tmp_path: Path, attack: str) -> None:
    holder = attack.partition("=")[0].removesuffix("._target_")
    words = [*TINY, attack, f"++{holder.lstrip('+')}._args_=[canary]"]
    done = train(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "pathlib.Path.touch" in done.stderr
    assert not (tmp_path / "canary").exists()


def test_the_canary_does_sing_under_plain_hydra(tmp_path: Path) -> None:
    """The attack above is real: plain instantiation runs it."""
    instantiate({"_target_": "pathlib.Path.touch", "_args_": [str(tmp_path / "canary")]})
    instantiate({"_target_": "builtins.open", "_args_": [str(tmp_path / "canary2"), "w"]}).close()
    assert (tmp_path / "canary").exists()
    assert (tmp_path / "canary2").exists()


def test_logging_config_may_not_call(tmp_path: Path) -> None:
    config = composed(*TINY)
    assert unsafe_entries(config) == []
    hostile = OmegaConf.create(
        {"hydra": {"job_logging": {"handlers": {"x": {"()": "os.system", "class": "os.popen"}}}}}
    )
    assert len(unsafe_entries(hostile)) == 2


class Canary:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_a_hostile_checkpoint_is_refused(tmp_path: Path) -> None:
    import torch

    path, canary = tmp_path / "evil.ckpt", tmp_path / "canary"
    torch.save({"state_dict": Canary(str(canary))}, path)
    with pytest.raises(UserError, match=r"evil\.ckpt"):
        load_checkpoint(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)["state_dict"].close()
    assert canary.exists()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"evil\.ckpt"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="missing"):
        load_checkpoint(tmp_path / "none.ckpt")
