"""What is installed: its licences, and versions known to be bad. ``python tests/supply_chain.py`` prints a table.

Licences are those that distributions declare: SPDX expression, classifiers, licence field. In the default install (the
`dependencies` of pyproject.toml and all they bring) each must be on `ALLOWED`, or the distribution on `REVIEWED` with
exactly what it declares and why that is acceptable. LGPL, GPL, AGPL and non-commercial terms are never on `ALLOWED`.
"""

import importlib.metadata as metadata
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = Path(__file__).parents[1] / "pyproject.toml"

# SPDX names. MPL-2.0 asks for the source of its own files only.
ALLOWED = {
    *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "HPND", "ISC", "LLVM-exception"),
    *("MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Unlicense", "Zlib"),
}

# What distributions call these, in classifiers and licence fields.
NAMES = {
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "mit license": "MIT",
    "new bsd": "BSD-3-Clause",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
}

NVIDIA = (
    "terms of the CUDA toolkit: free of charge, commercial use included; comes with torch from the package index, and "
    "not with PyTorch's own CPU index"
)
# Distributions whose statement is not on the list: name, or its beginning; what they declare; what a person found.
REVIEWED: dict[str, tuple[tuple[str, ...], str]] = {
    "nvidia-nvtx": (("Apache 2.0", "LicenseRef-NVIDIA-Proprietary"), "Apache-2.0 with the LLVM exception; " + NVIDIA),
    "nvidia-*": (("LicenseRef-NVIDIA-Proprietary", "NVIDIA Proprietary Software"), NVIDIA),
    "cuda-toolkit": (("",), "an empty distribution that names NVIDIA's; " + NVIDIA),
    "python-dateutil": (("Dual License",), "Apache-2.0 or BSD-3-Clause: its classifiers name both"),
}

# Shared libraries that make a wheel GPL or non-commercial; FFmpeg's others are LGPL, linked dynamically.
FORBIDDEN_LIBRARIES = re.compile(r"lib(x264|x265|xvid|postproc|fdk-aac|rubberband|readline|poppler)")


class Bad(NamedTuple):
    """Versions that must not be installed."""

    name: str
    versions: str  # a version specifier; "" is every version
    reason: str


BAD = [
    Bad("lightning", "==2.6.2", "carried a credential stealer that ran on import"),
    Bad("lightning", "==2.6.3", "carried a credential stealer that ran on import"),
    Bad("lightning", "<=2.6.0", "unsafe checkpoint loading, CVE-2026-31221"),
    Bad("pytorch-lightning", "==2.6.2", "carried a credential stealer that ran on import"),
    Bad("pytorch-lightning", "==2.6.3", "carried a credential stealer that ran on import"),
    Bad("pytorch-lightning", "<=2.6.0", "unsafe checkpoint loading, CVE-2026-31221"),
    Bad("torch", "<2.6", "weights_only=True can be bypassed, CVE-2025-32434"),
    Bad("hydra-core", "<1.3.6", "aliases of blocked targets are instantiated"),
    Bad("hydra-core", ">=1.4", "another allow-list of targets, to which ours is not ported"),
    Bad("pillow", "<12.2", "decompression bomb and out-of-bounds write, CVE-2026-40192 and CVE-2026-42311"),
    Bad("albumentations", ">2.0.8", "2.0.8 is the last release under MIT"),
    Bad("albumentationsx", "", "AGPL-3.0 or commercial"),
    Bad("opencv-python-headless", ">=5", "no CascadeClassifier and no cascade files"),
    Bad("opencv-python", "", "a second OpenCV overwrites the headless one's files"),
    Bad("opencv-contrib-python", "", "a second OpenCV overwrites the headless one's files"),
    Bad("opencv-contrib-python-headless", "", "a second OpenCV overwrites the headless one's files"),
    Bad("fer", "", "another project that installs the same import name"),
    Bad("cleanlab", "<2.9", "older releases are AGPL"),
    Bad("ultralytics", "", "AGPL-3.0"),
    Bad("insightface", "", "its models are non-commercial"),
    Bad("ffcv", "", "does not build; unmaintained"),
]


def canonical(name: str) -> str:
    """A distribution's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, metadata.Distribution]:
    """Every distribution of this environment by its canonical name."""
    return {canonical(d.metadata["Name"]): d for d in metadata.distributions()}


def direct(extras: Iterable[str] = ()) -> list[Requirement]:
    """What pyproject.toml asks for, with the given extras."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    lines = [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e])]
    return [Requirement(line) for line in lines]


def closure(wanted: list[Requirement]) -> dict[str, metadata.Distribution]:
    """Those distributions and all they bring, as far as they are installed."""
    here = installed()
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()

    def walk(requirement: Requirement) -> None:
        name, extras = canonical(requirement.name), frozenset(requirement.extras)
        if name not in here or (name, extras) in seen:
            return
        seen.add((name, extras))
        found[name] = here[name]
        for line in here[name].requires or []:
            inner = Requirement(line)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                walk(inner)

    for requirement in wanted:
        walk(requirement)
    return found


def declared(about: "metadata.PackageMetadata") -> list[str]:
    """A distribution's statements about its licence, the binding one first."""
    if about["License-Expression"]:
        return [about["License-Expression"]]
    classifiers = [c.split(" :: ")[-1] for c in about.get_all("Classifier") or [] if c.startswith("License :: ")]
    field = (about["License"] or "").strip()
    # Some put the whole text there, beside a classifier.
    short = [field] if field and (len(field) < 60 or not classifiers) else []
    return short + [c for c in classifiers if c != "OSI Approved"]


def _allowed(statement: str) -> bool:
    whole = NAMES.get(statement.lower(), statement)
    if whole in ALLOWED:
        return True
    parts = re.split(r"\s+OR\s+", whole)
    if len(parts) > 1 and "(" not in whole:
        return any(_allowed(part) for part in parts)
    names = re.split(r"\s+(?:AND|WITH|OR)\s+", re.sub(r"[()]", "", whole))
    return len(names) > 1 and all(_allowed(name) for name in names)


def reviewed(name: str) -> tuple[tuple[str, ...], str]:
    """What a person found about a distribution: its statements, and why they are acceptable; nothing if none did."""
    return next((entry for pattern, entry in REVIEWED.items() if fnmatch(name, pattern)), ((), ""))


def licence_problem(about: "metadata.PackageMetadata") -> str | None:
    """Why a distribution may not be in the default install, or None."""
    name, statements = canonical(about["Name"]), declared(about)
    if statements and all(_allowed(statement) for statement in statements):
        return None
    said, _ = reviewed(name)
    if (statements[0] if statements else "") in said:
        return None
    said_here = " / ".join(statements)[:80] or "no licence"
    return f"{name} {about['Version']} declares {said_here}: neither allowed nor reviewed"


def bundled_problems(distribution: metadata.Distribution) -> Iterator[str]:
    """Shared libraries in a wheel that would change its licence."""
    for file in distribution.files or []:
        if ".so" in file.name and FORBIDDEN_LIBRARIES.match(file.name):
            yield f"{distribution.metadata['Name']} brings {file.name}"


def bad_version(name: str, version: str) -> Bad | None:
    """The entry of `BAD` that a version falls under."""
    for bad in BAD:
        specifier = Requirement(f"{bad.name}{bad.versions}").specifier
        if canonical(name) == bad.name and specifier.contains(Version(version), prereleases=True):
            return bad
    return None


def problems() -> list[str]:
    """Everything wrong with this environment."""
    found = []
    for distribution in closure(direct()).values():
        problem = licence_problem(distribution.metadata)
        found += [problem] if problem else []
        found += bundled_problems(distribution)
    for name, distribution in installed().items():
        bad = bad_version(name, distribution.version)
        if bad is not None:
            found.append(f"{name} {distribution.version} must not be installed: {bad.reason}")
    return found


def main() -> None:
    """Print the default install with its licences; end with 1 when something is wrong."""
    for name, distribution in sorted(closure(direct()).items()):
        said = " / ".join(declared(distribution.metadata)) or "-"
        note = f"  [{reviewed(name)[1]}]" if reviewed(name)[1] else ""
        print(f"{name:42} {distribution.version:14} {said.splitlines()[0][:60]}{note}")
    found = problems()
    print("\n".join(f"error: {line}" for line in found) or "no licence outside the list, no version known to be bad")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
