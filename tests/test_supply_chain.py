"""The environment is the pinned one, its licences are permissive, and nothing in it is known to be bad."""

import re
import sys
import tomllib
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from minimum import minimums
from packaging.requirements import Requirement
from packaging.version import Version
from supply_chain import BAD, PROJECT, bad_version, canonical, direct, installed, licence_problem, problems

CONSTRAINTS = PROJECT.parent / "constraints.txt"
EXTRAS = tuple(tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"])
OWN = {"fer-bench", "pip", "setuptools", "wheel"}  # ours, and what installs the rest


def pins() -> dict[str, str]:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    found = dict(line.split("==") for line in lines)
    return {canonical(name): version for name, version in found.items()}


def about(name: str, *lines: tuple[str, str]) -> Any:
    message = Message()
    for key, value in (("Name", name), ("Version", "1.0"), *lines):
        message[key] = value
    return message


def test_this_environment_has_no_problem() -> None:
    assert problems() == []


@pytest.mark.parametrize(
    ("lines", "fine"),
    [
        ([("License-Expression", "MIT")], True),
        ([("License-Expression", "AGPL-3.0-only")], False),
        ([("License-Expression", "MIT AND GPL-3.0-or-later")], False),
        ([("License-Expression", "GPL-2.0-only OR MIT")], True),  # the user's choice
        ([("License-Expression", "GPL-3.0-only WITH Classpath-exception-2.0")], False),
        ([("License-Expression", "CC-BY-NC-4.0")], False),
        ([("License-Expression", "LGPL-2.1-only")], False),
        ([("License", "BSD"), ("Classifier", "License :: OSI Approved :: BSD License")], True),
        (
            [("License", "MIT"), ("Classifier", "License :: OSI Approved :: GNU Affero General Public License v3")],
            False,
        ),
        ([("Classifier", "License :: Free for non-commercial use")], False),
        ([("License", "Free for non-commercial use")], False),
        ([("License", "Copyright\n" + "a long text " * 20)], False),
        ([], False),
    ],
)
def test_licences_are_told_apart(lines: list[tuple[str, str]], fine: bool) -> None:
    assert (licence_problem(about("something", *lines)) is None) == fine


def test_a_review_holds_for_what_was_reviewed() -> None:
    assert licence_problem(about("python-dateutil", ("License", "Dual License"))) is None
    assert licence_problem(about("python-dateutil", ("License", "Other terms"))) is not None


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad.name}{bad.versions}")
def test_bad_versions_are_found_and_not_admitted(bad: Any) -> None:
    example = {"==": "{}", "<=": "{}", ">=": "{}.1", ">": "{}.1", "<": "0.0.1", "": "1.0"}
    sign, number = re.fullmatch(r"([<>=]*)(.*)", bad.versions).groups()  # type: ignore[union-attr]
    version = example[sign].format(number)
    assert bad_version(bad.name.replace("-", "_").upper(), version) is not None
    for requirement in direct(EXTRAS):
        if canonical(requirement.name) == bad.name:
            assert not requirement.specifier.contains(Version(version)), f"{requirement} admits {version}"
    pinned = pins().get(bad.name)
    assert pinned is None or not Requirement(f"x{bad.versions}").specifier.contains(Version(pinned)) or not bad.versions
    assert bad.versions or pinned is None


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    pinned = pins()
    for requirement in direct(EXTRAS):
        assert requirement.specifier.contains(Version(pinned[canonical(requirement.name)])), str(requirement)
        assert requirement.specifier, f"{requirement} has no bound"


def test_every_bound_has_its_reason() -> None:
    lines = PROJECT.read_text().splitlines()
    asked = [line for line in lines if re.match(r'  "[A-Za-z0-9._-]+(>=|==|<)', line)]
    assert len(asked) == len(direct(EXTRAS))
    assert [line for line in asked if not re.search(r"#\s*\w+", line)] == []


def test_the_whole_environment_is_pinned() -> None:
    made = PROJECT.parent / ".venv"
    if Path(sys.prefix).resolve() != made.resolve() or not (made / ".complete").exists():
        pytest.skip("this environment was not made by `make setup`")
    here = {name: d.version for name, d in installed().items() if name not in OWN}
    assert here == {name: version for name, version in pins().items() if name in here}


def test_minimums_are_lower_bounds() -> None:
    for name, version in minimums().items():
        (requirement,) = [r for r in direct(["dev"]) if r.name == name]
        assert requirement.specifier.contains(Version(version))
        assert not requirement.specifier.contains(Version("0.0.1"))
