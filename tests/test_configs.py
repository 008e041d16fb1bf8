"""Every YAML under conf/: headed by what it is and its command, composes, and fits the classes it names."""

import pytest
from conftest import composed
from omegaconf import OmegaConf

from fer.config import CONF, argument_problems
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
