"""Every command answers --help and a mistyped option at once: without torch, W&B or plotting."""

import json
import subprocess
import sys
from typing import Any

import pytest

from fer.config import CONF

COMMANDS = sorted(path.stem for path in CONF.glob("*.yaml") if (CONF.parent / f"fer/{path.stem}.py").is_file())
HEAVY = {"torch", "lightning", "wandb", "wandb_workspaces", "matplotlib", "sklearn", "timm"}

# One process for them all. What one imports the next ones have too, so the first to be named is the one at fault.
ASK = """
import contextlib, importlib, io, json, sys
answers = {}
for name in sys.argv[1].split(","):
    command = importlib.import_module(f"fer.{name}")
    for word in ("--help", "no_such_option=1"):
        sys.argv = [f"fer.{name}", word]
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                command.main()
            except SystemExit as end:
                code = end.code or 0
        answers[f"{name} {word}"] = [code, out.getvalue(), err.getvalue(), sorted(sys.modules)]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Exit code, what was printed, and the modules imported then, by command and word."""
    place = tmp_path_factory.mktemp("asked")
    command = [sys.executable, "-c", ASK, ",".join(COMMANDS)]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert list(place.iterdir()) == []
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_the_glob_found_them() -> None:
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_how_it_is_run(answers: dict[str, Any], name: str) -> None:
    code, out, _, modules = answers[f"{name} --help"]
    assert code == 0
    assert f"python -m fer.{name}" in out
    assert not HEAVY & set(modules)
    assert name != "train" or "cbam_resnet" in out  # what there is to choose from


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistyped_option_is_named(answers: dict[str, Any], name: str) -> None:
    code, _, err, modules = answers[f"{name} no_such_option=1"]
    assert code == (2 if name == "check" else 1)  # 1 is a finding there
    assert "no_such_option" in err
    assert not HEAVY & set(modules)
