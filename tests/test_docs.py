"""The documentation: every command in it is valid, its generated parts agree with their sources, its examples run."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from fer.config import CONF, compose_like_hydra
from fer.reporting.manual import filled

ROOT = CONF.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
COMMAND = re.compile(r"python -m (fer[\w.]*)([^`\n]*)")
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")


def navigation(node: Any) -> Iterator[str]:
    """The pages of mkdocs.yml's nav."""
    if isinstance(node, str):
        yield node
    else:
        for below in node.values() if isinstance(node, dict) else node:
            yield from navigation(below)


def test_every_page_is_in_the_navigation_and_every_picture_there() -> None:
    pages = list(navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(pages) == sorted(path.relative_to(DOCS).as_posix() for path in PAGES)
    pictures = [(path, name) for path in PAGES for name in PICTURE.findall(path.read_text())]
    assert len(pictures) > 5
    assert [where for where in pictures if not (where[0].parent / where[1]).is_file()] == []
    linked = re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text())
    assert [name for name in linked if not (ROOT / name).is_file()] == []
    assert len(linked) > 10


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_generated_parts_are_those_of_their_sources(path: Path) -> None:
    page = path.read_text()
    assert page == filled(page), "python -m fer.reporting.manual writes them anew"


def test_a_generated_part_that_was_edited_is_written_anew() -> None:
    page = (DOCS / "models" / "dan.md").read_text()
    assert "| `model.heads` | `4` | attention heads |" in page
    assert filled(page.replace("| `4` | attention heads |", "| `5` | attention heads |")) == page


def test_trees_and_addresses_are_those_of_the_messages() -> None:
    from hydra.utils import get_class

    page = " ".join((DOCS / "datasets.md").read_text().split())
    for path in sorted((CONF / "data").glob("[!_]*.yaml")):
        target = yaml.safe_load(path.read_text()).get("_target_")
        if target is None:  # a variant of another file
            continue
        data = get_class(target)
        if data.on_disk:
            assert " ".join(data.expected_tree.split()) in page, path.stem
            assert data.request.partition(" ")[0].rstrip(",") in page, path.stem


FOREIGN = ("make: python3", "torchvision::nms", "import fer", "Could not override", "Could not find", "LexerNoViable")


def test_messages_that_are_explained_are_those_of_the_code() -> None:
    code = "".join(path.read_text() for path in sorted((ROOT / "fer").rglob("*.py")))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # literals that follow each other are one sentence
    page = (DOCS / "troubleshooting.md").read_text()
    headings = re.findall(r"^\*\*(.*?)\*\*", page, re.MULTILINE | re.DOTALL)
    messages = [" ".join(message.split()) for one in headings for message in re.findall(r"`([^`]+)`", one)]
    pieces = [
        piece.strip()
        for message in messages
        if not any(word in message for word in FOREIGN)
        for piece in re.split(r"\.\.\.|\b\d+\b", message)
        if len(piece.split()) > 2
    ]
    assert len(pieces) > 20
    assert [piece for piece in pieces if piece not in code] == []


# -- commands -----------------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, str, list[str]]]:
    """(page, module, words) of every command line in the README and the pages, placeholders filled in.

    Left out are heads of recipes that a page repeats (tests/test_experiments.py composes every recipe), and commands
    that need files which the page adds (they are run below).
    """
    found = []
    for path in (ROOT / "README.md", *PAGES):
        text = re.sub(r"<!-- recipes .*?<!-- end -->", "", path.read_text(), flags=re.DOTALL)
        for module, rest in COMMAND.findall(re.sub(r"\\\n\s+", "", text)):
            words = shlex.split(re.sub(r"<[^>]+>", "x", rest.partition("|")[0]), comments=True)
            words = [word for word in words if "=" in word and not word.startswith("-")]
            if not {"model=mini_xception", "data=jaffe"} & set(words):
                found.append((path.name, module, words))
    return found


def variants(overrides: list[Override]) -> Iterator[list[str]]:
    """Words of which some sweep over values, as lists of words that do not: every value occurs once."""
    swept = [o.value().list if o.is_choice_sweep() else None for o in overrides]
    for i in range(max((len(values) for values in swept if values), default=1)):
        yield [
            f"{o.input_line.partition('=')[0]}={values[i % len(values)]}" if values else str(o.input_line)
            for o, values in zip(overrides, swept, strict=True)
        ]


def test_every_command_is_valid() -> None:
    """Commands that do not choose different files are composed together, which takes a tenth of the time."""
    together: list[tuple[str, dict[str, str], dict[str, None]]] = []
    for page, module, words in commands():
        assert importlib.util.find_spec(module) is not None, f"{page}: {module}"
        name = module.partition(".")[2]
        if not (CONF / f"{name}.yaml").is_file():  # no command of Hydra's
            continue
        for one in variants(OverridesParser.create().parse_overrides(words)):
            split = [word.split("=", 1) for word in one]
            groups = {key: value for key, value in split if (CONF / key).is_dir()}
            values = dict.fromkeys(word for word, (key, _) in zip(one, split, strict=True) if key not in groups)
            for other, chosen, held in together:
                if other == name and fits(groups, chosen):
                    chosen |= groups
                    held |= values
                    break
            else:
                together.append((name, groups, values))
    assert len(together) > 15
    for name, chosen, held in together:
        assert [file for key, value in chosen.items() if not (file := CONF / key / f"{value}.yaml").is_file()] == []
        if not all(word.startswith(("data.root=", "seed=")) for word in held):  # every file composes in other tests
            compose_like_hydra(name, [*(f"{key}={value}" for key, value in chosen.items()), *held])


def fits(groups: dict[str, str], chosen: dict[str, str]) -> bool:
    """Whether two commands may be composed as one: no group differs, and recipes, which choose groups, are the same."""
    recipes = all(groups.get(key) == chosen.get(key) for key in ("experiment", "sweep"))
    return recipes and all(chosen.get(key, value) == value for key, value in groups.items())


def test_a_mistyped_command_is_found() -> None:
    for words in (["model=convcutt"], ["model=convcut", "model.truncat=3"]):
        with pytest.raises(Exception, match=r"convcutt|truncat"):
            compose_like_hydra("train", words)


# -- the examples -------------------------------------------------------------------------------------------------

DRIVER = """
import runpy, shlex, sys
from pathlib import Path
sys.path.insert(1, "tests")
import fakes
fakes.write_jaffe(Path("jaffe"))
for command in Path("commands").read_text().splitlines():
    python, flag, module, *words = shlex.split(command)
    sys.argv = [module, *words]
    print("$", command, flush=True)
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (command, end.code)
"""


def blocks(page: str) -> dict[str, str]:
    """The code of a page by the title of each block."""
    return dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', (DOCS / page).read_text(), re.DOTALL | re.MULTILINE))


@pytest.mark.docs
def test_adding_a_model_and_a_data_set_works_as_written(tmp_path: Path, cache: Path) -> None:
    for folder in ("fer", "conf", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    typed = ""
    for page in ("add-a-model.md", "add-a-data-set.md"):
        code = blocks(page)
        assert len(code) >= 3
        typed += code.pop("try it")
        for name, text in code.items():
            new = not (tmp_path / name).exists()
            assert new is (name != "tests/fakes.py")
            with (tmp_path / name).open("a") as file:
                file.write(text if new else f"\n\n{text}")
    (tmp_path / "commands").write_text(typed)
    environment = {**os.environ, "FER_CACHE": str(cache), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "mini_xception on synthetic, seed 0" in done.stdout
    assert re.search(r"cbam_resnet on jaffe, .*seed 0", done.stdout)
    assert "210" in done.stdout  # pictures of the small JAFFE
    assert len(list(tmp_path.glob("outputs/*/*/results.json"))) == 2
