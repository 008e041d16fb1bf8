"""The oldest versions that pyproject.toml admits, as a constraints file: python tests/minimum.py > minimum.txt."""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def minimums(extras: tuple[str, ...] = ("dev",)) -> dict[str, str]:
    """Name and lower bound of every dependency.

    Args:
        extras: the extras that are counted too.

    Returns:
        Versions by name.

    Raises:
        ValueError: a dependency has no lower bound.
    """
    project = tomllib.loads(PROJECT.read_text())["project"]
    optional = project["optional-dependencies"]
    found = {}
    for line in [*project["dependencies"], *(line for extra in extras for line in optional[extra])]:
        match = re.match(r"([A-Za-z0-9._-]+)\s*(?:>=|==)\s*([0-9][^,\s]*)", line)
        if match is None:
            raise ValueError(f"pyproject.toml: {line!r} has no lower bound, write >= or == first")
        found[match[1]] = match[2]
    return found


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in minimums().items()))
