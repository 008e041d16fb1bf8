"""Every YAML under conf/: headed by what it is and its command, composes, and fits the classes it names."""

import pytest
from conftest import composed
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fer.config import CONF, USER_MISTAKE, argument_problems, guarded
from fer.safety import unsafe_entries

ALL = sorted(path for path in CONF.rglob("*.yaml"))
CHOICES = [
    f"{path.parent.name}={path.stem}"
    for path in ALL
    if path.parent != CONF
    and not path.stem.startswith("_")
    and path.parent.parent == CONF
    and path.parent.name != "experiment"  # tests/test_experiments.py composes and runs those
]


def test_the_glob_found_them() -> None:
    assert len(CHOICES) >= 40


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(CONF)))
def test_every_yaml_says_what_it_is_and_how_it_is_run(path: object) -> None:
    lines = path.read_text().splitlines()  # type: ignore[attr-defined]
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line)
    assert len(head) >= 2
    assert any("python -m fer." in line for line in head)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_fits_its_classes(choice: str) -> None:
    group = choice.partition("=")[0]
    config = composed(choice, command={"detector": "prepare", "task": "pretrain", "gpu": "bench"}.get(group, "train"))
    assert unsafe_entries(config) == []
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    for key in plain.keys() & {"data", "model", "detector", "task"}:
        assert argument_problems({key: plain[key]}) == []


UNUSABLE = [
    *("data.batch_size=0", "data.eval_batch_size=0", "data.num_workers=-1", "data.batch_size=2.5"),
    *("seed=-1", "seed=4294967296", "split_seed=-1"),
    *("augment.crop_pct=0", "augment.crop_pct=1.5", "augment.crops_per_image=0"),
    *("trainer.max_epochs=-1", "trainer.max_epochs=0", "trainer.max_epochs=null", "trainer.checkpoint_steps=0"),
    *("trainer.patience=-1", "optim=sgd optim.schedule.every=0"),
    *("loss=class_balanced loss.beta=1", "loss=class_balanced loss.beta=-0.1"),
]


@pytest.mark.parametrize("words", UNUSABLE)
def test_a_value_that_cannot_be_used_is_refused_in_one_sentence(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    key = words.split()[-1].partition("=")[0]
    config = composed("data=synthetic", *words.split())
    node = {"seed": "data", "split_seed": "data", "augment": "data"}.get(key.partition(".")[0], key.partition(".")[0])
    with pytest.raises(SystemExit) as ended:
        guarded(lambda: instantiate(config[node]))
    assert ended.value.code == USER_MISTAKE
    said = capsys.readouterr().err
    assert said.startswith(f"error: {key}=")
    assert said.count("\n") == 1
