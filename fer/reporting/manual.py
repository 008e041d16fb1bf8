"""``python -m fer.reporting.manual``: what conf/, docstrings and docs/results/ say, in the pages and the README.

What stands in a page between ``<!-- options model/convcut -->`` and ``<!-- end -->`` is written anew, so that it cannot
disagree with its source; the rest of the page is prose. `WRITERS` has the kinds there are.
"""

import ast
import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf

from fer.config import CONF, guarded
from fer.errors import UserError
from fer.reporting import endurance, leaks, measured, outputs, reliability, small
from fer.reporting.claims import Claim, load_claims
from fer.reporting.speed import section
from fer.reporting.summaries import TRAIN, Result, load_results
from fer.reporting.tables import DASH, markdown, mean_std
from fer.runs import write_text

ROOT = CONF.parent
DOCS = ROOT / "docs"
RECORDS = DOCS / "results"
EXPERIMENTS = CONF / "experiment"
_PART = re.compile(r"(<!-- (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_OPTION = re.compile(r"( *)([a-z]\w*):(?: +([^#]*?))? *(?: # ?(.*))?$")
_MEANINGS = {  # of options that most files have and none explains
    "image_size": "side of the network's input, px",
    "mean": "of each channel of an image in [0, 1], subtracted",
    "std": "of each channel, divided by",
}
_SAME_FOR_ALL = ("class_names", "loss", "optim", "root")  # explained elsewhere
_NOT_MEASURED = "not measured here"


def filled(page: str) -> str:
    """A page with its generated parts written anew."""
    return _PART.sub(lambda part: f"{part[1]}\n{WRITERS[part[2]](part[3])}\n\n{part[4]}", page)


# -- options ------------------------------------------------------------------------------------------------------


def options(name: str) -> str:
    """A table of the options of ``conf/<name>.yaml`` with their defaults, explained by the comments there."""
    rows = [
        f"| `{key}` | {f'`{value}`' if value else ''} | {markdown(comment)} |" for key, value, comment in _options(name)
    ]
    return "\n".join(["| option | default | what |", "|---|---|---|", *rows])


def _options(name: str) -> Iterator[tuple[str, str, str]]:
    """(dotted key, value, comment) of each line of a YAML; interpolated values and what Hydra itself reads left out."""
    group = name.partition("/")[0]
    holders: list[str] = []
    for line in (CONF / f"{name}.yaml").read_text().splitlines():
        found = _OPTION.fullmatch(line)
        if found is None or found[2] in (*_SAME_FOR_ALL, "defaults"):
            continue
        depth, key, value, comment = len(found[1]) // 2, found[2], found[3] or "", found[4] or ""
        comment = comment or _MEANINGS.get(key, "")
        holders = [*holders[:depth], key]
        if not value.startswith("${"):
            yield ".".join([group, *holders]), value, comment


def group(name: str) -> str:
    """A table of the options of a config group, explained by the head of each file."""
    rows = []
    for path in sorted((CONF / name).glob("[!_]*.yaml")):
        head = (line.removeprefix("#").strip() for line in _head(path))
        about = itertools.takewhile(lambda line: not line.startswith("python -m"), head)
        text = " ".join(line for line in about if not line.startswith("@"))
        rows.append(f"| `{name}={path.stem}` | {markdown(text)} |")
    return "\n".join(["| option | what |", "|---|---|", *rows])


# -- what the code says -------------------------------------------------------------------------------------------


def docstring(path: str) -> str:
    """The docstring of a module."""
    return (ast.get_docstring(ast.parse((ROOT / path).read_text())) or "").replace("``", "`")


def modules(folder: str) -> str:
    """The directive by which the site shows the docstrings of every module of a folder, not of those below it."""
    names = sorted(path.stem for path in (ROOT / folder).glob("*.py") if path.stem != "__init__")
    return "\n\n".join(f"::: {folder.replace('/', '.')}.{name}" for name in names)


# -- recipes and figures ------------------------------------------------------------------------------------------


@functools.cache
def _recipe(name: str) -> DictConfig:
    """What an experiment sets, the files it starts from included; ``model`` and ``data`` with their names."""
    config = OmegaConf.load(EXPERIMENTS / f"{name}.yaml")
    assert isinstance(config, DictConfig)
    layers: list[Any] = []
    for entry in config.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            layers.append(_recipe(entry))
        elif OmegaConf.is_config(entry):
            layers.append({k.removeprefix("override /"): {"_name_": v} for k, v in entry.items()})
    return cast(DictConfig, OmegaConf.merge(*layers, config))


def _recipes(model: str, data: str | None = None) -> list[str]:
    """Names of the experiments with a network, on a data set."""
    found: list[str] = []
    for path in sorted(EXPERIMENTS.glob("*.yaml")):
        recipe = _recipe(path.stem)
        if recipe.model._name_ == model and data in (None, recipe.data._name_):
            found.append(path.stem)
    return found


def recipes(model: str) -> str:
    """What the head of each experiment with a network says, its command, and what was measured with it."""
    out = []
    for name in _recipes(model):
        head = [line.removeprefix("#").strip() for line in _head(EXPERIMENTS / f"{name}.yaml")]
        commands = [line for line in head if line.startswith("python -m")]
        about = [line for line in head if line not in commands and not line.startswith("@")]
        code = "\n".join(f"    {re.sub('  +', '   # ', line.partition(' (or:')[0].strip())}" for line in commands)
        out.append(f"### `{name}`\n\n{code}\n\n{' '.join(about)}\n\n{_measured(name)}")
    return "\n\n".join([*out, small.network(model)])


def _head(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def _measured(experiment: str) -> str:
    figures = measured_with(experiment)
    return "**Not measured here.**" if figures == _NOT_MEASURED else f"**Measured here:** {figures}."


@functools.cache
def _results() -> list[Result]:
    return load_results()


def measured_with(experiment: str) -> str:
    """Test accuracy of an experiment as ``docs/results/measured`` has it, each variant of its command apart."""
    out = []
    for row in _results():
        if f"experiment={experiment}" not in row.setting.split():
            continue
        for views in reversed(row.views):
            figures = [
                f"{mean_std(*row.interval(views, key)[:2]).text} % {name}"
                for key, name in (("acc", "accuracy"), ("mean_acc", "mean class accuracy"))
            ]
            facts = [
                f"n = {row.confusion(views).sum():,.0f}",
                f"{len(row.repeats)} run{'s' if len(row.repeats) > 1 else ''}",
                f"views: {views}",
                f"epoch chosen on {row.selected_on}",
                *row.stamps,
            ]
            out.append(f"{', '.join(figures)} ({', '.join(facts)}; `{TRAIN} {row.setting}`)")
    return "; ".join(out) or _NOT_MEASURED


# -- claims -------------------------------------------------------------------------------------------------------


def claims(model: str) -> str:
    """A table of what papers claim for a network."""
    found = [claim for claim in _claims() if claim.model == model]
    lines = [
        "| method | on | claimed | how it was measured |",
        "|---|---|---|---|",
    ]
    for claim in found:
        cells = [f"{claim.method} ({claim.paper})", *_figures(claim), _how(claim)]
        lines.append(f"| {' | '.join(map(markdown, cells))} |")
    return "\n".join(lines) if found else "No paper's figure is held against this network."


@functools.cache
def _papers() -> dict[str, str]:
    papers: dict[str, str] = yaml.safe_load((CONF / "claims.yaml").read_text())["papers"]
    return papers


@functools.cache
def _claims() -> list[Claim]:
    return load_claims(CONF / "claims.yaml")


def _figures(claim: Claim) -> tuple[str, str]:
    """Data sets, and the figures claimed."""
    figures = f"{claim.acc:.2f} %" + ("" if claim.mean_acc is None else f", mean class {claim.mean_acc:.2f} %")
    return ", ".join(claim.data), figures + (" (void)" if claim.void else "")


def _how(claim: Claim) -> str:
    return "; ".join([claim.protocol, *claim.remarks])


def paper(key: str) -> str:
    """A paper's table: every figure it prints, the recipes whose head names that figure, and what they gave here."""
    title = _papers()[key]
    lines = [
        "| method | on | claimed | how it was measured | here |",
        "|---|---|---|---|---|",
    ]
    for claim in _claims():
        if claim.paper != title:
            continue
        names = [] if claim.model is None else [n for data in claim.data for n in _recipes(claim.model, data)]
        names = [name for name in names if f"{claim.acc:g}" in " ".join(_head(EXPERIMENTS / f"{name}.yaml"))]
        here = "<br>".join(f"`experiment={name}` {measured_with(name)}" for name in names) or DASH
        cells = [*map(markdown, [claim.method, *_figures(claim), _how(claim)]), here]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


WRITERS: dict[str, Callable[[str], str]] = {
    "options": options,
    "group": group,
    "docstring": docstring,
    "modules": modules,
    "recipes": recipes,
    "claims": claims,
    "paper": paper,
    "measured": measured.section,
    "differences": measured.differences_section,
    "leaks": leaks.section,
    "speed": section,
    "small": small.section,
    "reliability": reliability.section,
    "endurance": endurance.section,
    "output": outputs.section,
}


def write_pages() -> None:
    """Write the generated parts of the README and of every page anew, and name the pages that changed."""
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))):
        old = path.read_text()
        if (new := filled(old)) != old:
            write_text(path, new)
            print(path)


def from_runs(about: str | None, update: Callable[[list[Path]], None]) -> None:
    """A command that puts the figures of run folders on the pages.

    Args:
        about: the command's docstring, its help.
        update: reads the folders of the command line into docs/results; not called without any.
    """
    words = sys.argv[1:]
    if {"--help", "-h"} & set(words):
        print(about)
        return

    def work() -> None:
        if words:
            update([Path(word) for word in words])
        write_pages()

    guarded(work)


def _no_folders(folders: list[Path]) -> None:
    raise UserError(
        f"{folders[0]} is one word too many: python -m fer.reporting.manual takes none, it writes all pages"
    )


if __name__ == "__main__":
    from_runs(__doc__, _no_folders)
