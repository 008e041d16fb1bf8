"""``python -m fer.reporting.small RUNS``: docs/small.md, what the CPU-sized networks reach whole and without a block.

RUNS is a folder of runs of ``sweep=ablations`` or of ``experiment=usual/...``. Their figures go to
docs/results/small.json in the place of earlier ones, and from there to the page; without RUNS the page is written anew
from the JSON.
"""

import sys
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from scipy.stats import binomtest

from fer.config import CONF, compose_like_hydra
from fer.errors import UserError
from fer.reporting.tables import MINUS
from fer.runs import read_json, write_json, write_text

DOCS = CONF.parent / "docs"
RECORD, PAGE = DOCS / "results" / "small.json", DOCS / "small.md"
EXPERIMENTS = CONF / "experiment"
SMALL, WITHOUT, USUAL = "small", "without", "usual"  # its folders
SHARED = f"{SMALL}/_common"
START = "start_from=<folder of experiment=small/...>"
# Nodes of the config that decide a run's figures, and their values that are known once the data is open.
DECIDES = ("seed", "split_seed", "protocol", "loss", "mix", "optim", "model", "data", "trainer")
FROM_THE_DATA = ("model.class_names", "data.class_names", "data.root", "data.cache", "trainer.enable_progress_bar")
ABOUT_THE_PLACE = ("hydra.", "fresh=", "logger=", "trainer.enable_progress_bar=")  # words that move no figure

HEAD = """# Every network on one CPU thread, whole and without each of its blocks

    python -m fer.train experiment=usual/timm             # one network on the usual drawn faces
    python -m fer.train sweep=ablations                   # all of the second table, on easier faces
    python -m fer.train experiment=without/convcut_detail # a network of it without a block

Each network is the class and the YAML of `conf/model/`, made narrow, shallow and small. The figures are in
`results/small.json`; `python -m fer.reporting.small` makes this page from them.

## On the usual faces

Drawn faces as `data=synthetic` gives them: expressions from half intensity on, a tenth of the faces covered in part,
poses and light over their usual spread, {n} test images of people nobody has trained on. Of the model's options only
widths, depths and sizes differ from `conf/model/`; weights are random (`pretrained=false`), so learning rates that
spare published ones are off, and inputs are centred. What trains, `conf/experiment/usual/` says; where it says
`tta: flip`, each test image is also read mirrored. Transformers from random weights need very many images to find out
where in a face to look, so where the command says `start_from`, the network begins with the weights of its run of the
second table, on easier faces of the same training people, whose cost comes on top. Not run on these faces
yet: {missing}.

"""
ABLATIONS = """
## Without each block, on easier faces

Shared by all: {shared}.

These faces are easier, so that 28 runs cost an hour: clear expressions, nothing covered, half the spread of pose and
light or, where a row names `data.pose` or `data.light`, less. So the rows do not rank the networks.

"""
READING = """
In both tables: accuracy on drawn faces of people that were not trained on ({n} here), the epoch chosen on a
validation part; in brackets Wilson's 95 % interval. A drop is the whole network's accuracy less that without the block,
in percentage points; bold where the figure without the block lies outside the whole network's interval.

How to read this: the second table shows that every network learns and that its blocks can be taken out, not what the
blocks are worth. It is one seed, so nothing is known of how far a figure moves by itself; a drop inside the interval is
no evidence that a block helps, nor is a negative one that it harms; with so many comparisons some fall outside by
chance; and networks this small, trained this briefly on drawn faces, need not rank blocks as full ones on photographs
do. A network may also merely learn slower without a block, since the epochs are those chosen for the whole one:
Conv-cut without detail extraction was at 40 % of its training images when they ended.
"""


def flat(config: Any, prefix: str = "") -> list[str]:
    """The values of a config as overrides, ``model.width=16``."""
    words: list[str] = []
    for key, value in config.items():
        if isinstance(value, DictConfig):
            words += flat(value, f"{prefix}{key}.")
        else:
            text = str(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)
            words.append(f"{prefix}{key}={text.lower() if isinstance(value, bool) else text.replace(' ', '')}")
    return words


def overrides_of(experiment: str) -> list[str]:
    """What a file of ``conf/experiment`` changes, the groups it chooses first."""
    config = OmegaConf.load(EXPERIMENTS / f"{experiment}.yaml")
    assert isinstance(config, DictConfig)
    chosen = [
        f"{k.split('/')[-1]}={v}"
        for entry in config.pop("defaults")
        if OmegaConf.is_config(entry)
        for k, v in entry.items()
        if k != "override /model"
    ]
    return [*chosen, *flat(config)]


def block_of(experiment: str) -> str:
    """The block an ablation lacks, from the head of its file."""
    head = (EXPERIMENTS / f"{experiment}.yaml").read_text().splitlines()[1]
    return head.partition(" without ")[2].rstrip(".")


@cache
def settles(experiment: str) -> dict[str, str]:
    """What decides an experiment's figures, by its key: every value of its resolved config that a run keeps."""
    config = compose_like_hydra("train", [f"experiment={experiment}"])
    nodes = {key: config[key] for key in DECIDES}
    plain = {k: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for k, v in nodes.items()}
    return _settled(plain)


def _settled(plain: dict[str, Any]) -> dict[str, str]:
    words = flat(OmegaConf.create({key: plain[key] for key in DECIDES}))
    return {key: value for key, _, value in (word.partition("=") for word in words) if key not in FROM_THE_DATA}


def experiment_of(folder: Path, results: dict[str, Any]) -> str | None:
    """The experiment whose values a run has, whatever its command line; options that came later have no say."""
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert isinstance(config, dict)
    own = _settled({str(key): value for key, value in config.items()})
    for path in sorted(EXPERIMENTS.glob("*/*.yaml")):
        name = f"{path.parent.name}/{path.stem}"
        if path.parent.name not in (SMALL, WITHOUT, USUAL) or not path.stem.startswith(results["model"]):
            continue
        if all(own.get(key, value) == value for key, value in settles(name).items()):
            return name
    return None


def record(runs: Path, before: dict[str, Any]) -> dict[str, Any]:
    """The figures of all finished runs of these experiments.

    Args:
        runs: A folder with run folders under it.
        before: What this returned earlier; its runs stay where there are no newer ones.

    Raises:
        UserError: There is none of them.
    """
    found = {}
    for path in sorted(runs.rglob("results.json")):
        results = read_json(path)
        name = experiment_of(path.parent, results) if results["data"] == "synthetic" else None
        if name is None:
            continue
        right = sum(row[i] for i, row in enumerate(results["confusion"]["test"]))
        found[name] = {
            "model": results["model"],
            "overrides": overrides_of(name),
            "right": right,
            "n": results["n"]["test"],
            "core_minutes": round(results["cpu_seconds"] / 60, 2),
            "parameters": results["parameters"],
            "stamps": results["stamps"],
            "git_commit": results["git_commit"],
            "command": " ".join(
                START if w.startswith("start_from=") else w
                for w in results["command"].split()
                if not w.startswith(ABOUT_THE_PLACE)
            ),
        }
    if not found:
        raise UserError(f"{runs} holds no finished run of experiment=small/..., without/... or usual/...")
    found = {**before["runs"], **found}
    asked = [
        f"{folder}/{path.stem}"
        for folder in (SMALL, WITHOUT, USUAL)
        for path in sorted((EXPERIMENTS / folder).glob("*.yaml"))
    ]
    models = {path.stem for path in (CONF / "model").glob("*.yaml")}
    missing = [x for x in asked if x not in found and (x.startswith(WITHOUT) or x.partition("/")[2] in models)]
    return {"shared": overrides_of(SHARED), "runs": found, "not_run": missing}


def page(figures: dict[str, Any]) -> str:
    """The Markdown of what `record` returns."""
    runs = figures["runs"]
    usual = {name: run for name, run in runs.items() if name.startswith(f"{USUAL}/")}
    lines = ["| network | command | accuracy | core-minutes | parameters |", "|---|---|---:|---:|---:|"]
    for name, run in sorted(usual.items()):
        words = f"`experiment={name}`" + (" `start_from=...`" if START in run["command"] else "")
        lines.append(
            f"| `{run['model']}` | {words} | {_accuracy(run)} | {run['core_minutes']:.1f} | {run['parameters']:,} |"
        )
    models = {run["model"] for name, run in runs.items() if name.startswith(f"{SMALL}/")}
    missing = ", ".join(f"`{model}`" for model in sorted(models - {run["model"] for run in usual.values()})) or "none"
    head = HEAD.format(n=_sizes(usual), missing=missing) + "\n".join(lines) + "\n"
    lines = [
        "| network | what differs | accuracy | drop | core-minutes | parameters |",
        "|---|---|---:|---:|---:|---:|",
    ]
    easier = {name: run for name, run in runs.items() if name not in usual}
    for name, whole in sorted(easier.items()):
        if not name.startswith(f"{SMALL}/"):
            continue
        low, high = _interval(whole)
        lines.append(_row(f"`{whole['model']}`", whole, ""))
        for other, run in sorted(easier.items()):
            if run["model"] == whole["model"] and other.startswith(f"{WITHOUT}/"):
                share = run["right"] / run["n"]
                drop = f"{100 * (whole['right'] / whole['n'] - share):.1f}".replace("-", MINUS)
                lines.append(_row(f"without {block_of(other)}", run, drop if low <= share <= high else f"**{drop}**"))
    shared = ", ".join(f"`{word}`" for word in figures["shared"])
    if figures["not_run"]:
        lines += ["", f"Not run: {', '.join(f'`{name}`' for name in figures['not_run'])}."]
    tables = ABLATIONS.format(shared=shared) + "\n".join(lines) + "\n"
    return head + tables + READING.format(n=_sizes(easier))


def _sizes(runs: dict[str, Any]) -> str:
    return " or ".join(sorted({f"{run['n']:,}" for run in runs.values()})) or "no"


def _interval(run: dict[str, Any]) -> tuple[float, float]:
    interval = binomtest(run["right"], run["n"]).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _accuracy(run: dict[str, Any]) -> str:
    low, high = _interval(run)
    return f"{100 * run['right'] / run['n']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _row(name: str, run: dict[str, Any], drop: str) -> str:
    words = " ".join(f"`{word}`" for word in run["overrides"])
    cells = [name, words, _accuracy(run), drop, f"{run['core_minutes']:.1f}", f"{run['parameters']:,}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """The command."""
    if len(sys.argv) > 2 or sys.argv[1:2] == ["--help"]:
        print(__doc__)
        return
    try:
        if sys.argv[1:]:
            write_json(RECORD, record(Path(sys.argv[1]), read_json(RECORD)))
        write_text(PAGE, page(read_json(RECORD)))
    except UserError as error:
        sys.exit(f"error: {error}")
    print(PAGE)


if __name__ == "__main__":
    main()
