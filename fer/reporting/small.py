"""``python -m fer.reporting.small RUNS``: docs/small.md, what the CPU-sized networks reach whole and without a block.

RUNS is the folder of ``python -m fer.train sweep=ablations``. Its figures go to docs/results/small.json, and from there
to the page; without RUNS the page is written anew from the JSON.
"""

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from scipy.stats import binomtest

from fer.config import CONF
from fer.errors import UserError
from fer.reporting.tables import MINUS
from fer.runs import read_json, write_json, write_text

DOCS = CONF.parent / "docs"
RECORD, PAGE = DOCS / "results" / "small.json", DOCS / "small.md"
EXPERIMENTS = CONF / "experiment"
SMALL, WITHOUT = "small", "without"  # its folders
SHARED = f"{SMALL}/_common"
ABOUT_THE_PLACE = ("hydra.", "fresh=", "logger=", "trainer.enable_progress_bar=")  # words that move no figure

HEAD = """# Every network on one CPU thread, whole and without each of its blocks

    python -m fer.train sweep=ablations                   # all of it
    python -m fer.train experiment=small/convcut          # one network
    python -m fer.train experiment=without/convcut_detail # the same without a block

Each network is the class and the YAML of `conf/model/`, made narrow, shallow and small in `conf/experiment/small/`;
what those files say is in the table. Each block is taken out once, by the option in `conf/experiment/without/`, the
rest and the training unchanged. The figures are in `results/small.json`; `python -m fer.reporting.small` makes this
page from them.

Shared by all: {shared}.

**The faces are easier than usual.** `data=synthetic` draws expressions from half intensity on, a tenth of the faces
covered in part, poses and light over their usual spread (`data.intensity=[0.5,1.0] data.occlusion=0.1 data.pose=1.0
data.light=1.0`). On those, too, `experiment=demo` learns, but in seven core-minutes, more than 28 runs could be given
here; whether every network would has not been measured. Networks whose row names `data.pose` or `data.light` see easier
faces still: transformers from random weights need many more images to find out where in a face to look. So the rows do
not rank the networks.

"""
READING = """
Accuracy on {n} drawn faces of people that were not trained on, the epoch chosen on a validation part; in brackets
Wilson's 95 % interval. A drop is the whole network's accuracy less that without the block, in percentage points; bold
where the figure without the block lies outside the whole network's interval.

How to read this: the table shows that every network learns and that its blocks can be taken out, not what the blocks
are worth. It is one seed, so nothing is known of how far a figure moves by itself; a drop inside the interval is no
evidence that a block helps, nor is a negative one that it harms; with so many comparisons some fall outside by chance;
and networks this small, trained this briefly on drawn faces, need not rank blocks as full ones on photographs do. A
network may also merely learn slower without a block, since the epochs are those chosen for the whole one: Conv-cut
without detail extraction was at 40 % of its training images when they ended.
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


def record(runs: Path) -> dict[str, Any]:
    """The figures of all finished runs of the sweep.

    Args:
        runs: A folder with run folders under it.

    Raises:
        UserError: There is none of them.
    """
    found = {}
    for path in sorted(runs.rglob("results.json")):
        results = read_json(path)
        words = dict(word.split("=", 1) for word in results["command"].split() if "=" in word)
        name = words.get("experiment", "")
        if name.partition("/")[0] not in (SMALL, WITHOUT) or results["data"] != "synthetic":
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
            "command": " ".join(w for w in results["command"].split() if not w.startswith(ABOUT_THE_PLACE)),
        }
    if not found:
        raise UserError(f"{runs} holds no finished run of python -m fer.train sweep=ablations")
    asked = [
        f"{folder}/{path.stem}" for folder in (SMALL, WITHOUT) for path in sorted((EXPERIMENTS / folder).glob("*.yaml"))
    ]
    models = {path.stem for path in (CONF / "model").glob("*.yaml")}
    missing = [x for x in asked if x not in found and (x.startswith(WITHOUT) or x.partition("/")[2] in models)]
    return {"shared": overrides_of(SHARED), "runs": found, "not_run": missing}


def page(figures: dict[str, Any]) -> str:
    """The Markdown of what `record` returns."""
    runs = figures["runs"]
    lines = [
        "| network | what differs | accuracy | drop | core-minutes | parameters |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, whole in sorted(runs.items()):
        if not name.startswith(f"{SMALL}/"):
            continue
        low, high = _interval(whole)
        lines.append(_row(f"`{whole['model']}`", whole, ""))
        for other, run in sorted(runs.items()):
            if run["model"] == whole["model"] and other.startswith(f"{WITHOUT}/"):
                share = run["right"] / run["n"]
                drop = f"{100 * (whole['right'] / whole['n'] - share):.1f}".replace("-", MINUS)
                lines.append(_row(f"without {block_of(other)}", run, drop if low <= share <= high else f"**{drop}**"))
    sizes = sorted({f"{run['n']:,}" for run in runs.values()})
    shared = ", ".join(f"`{word}`" for word in figures["shared"])
    if figures["not_run"]:
        lines += ["", f"Not run: {', '.join(f'`{name}`' for name in figures['not_run'])}."]
    return HEAD.format(shared=shared) + "\n".join(lines) + "\n" + READING.format(n=" or ".join(sizes))


def _interval(run: dict[str, Any]) -> tuple[float, float]:
    interval = binomtest(run["right"], run["n"]).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _row(name: str, run: dict[str, Any], drop: str) -> str:
    low, high = _interval(run)
    accuracy = f"{100 * run['right'] / run['n']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    words = " ".join(f"`{word}`" for word in run["overrides"])
    cells = [name, words, accuracy, drop, f"{run['core_minutes']:.1f}", f"{run['parameters']:,}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """The command."""
    if len(sys.argv) > 2 or sys.argv[1:2] == ["--help"]:
        print(__doc__)
        return
    try:
        if sys.argv[1:]:
            write_json(RECORD, record(Path(sys.argv[1])))
        write_text(PAGE, page(read_json(RECORD)))
    except UserError as error:
        sys.exit(f"error: {error}")
    print(PAGE)


if __name__ == "__main__":
    main()
