"""``python -m fer.reporting.small RUNS...``: what the CPU-sized networks reach whole and without a block.

RUNS are folders with runs of ``sweep=ablations`` or of ``experiment=usual/...``. Their figures go to
docs/results/small.json in the place of earlier ones, and from there to docs/small.md and the networks' pages; without
RUNS only the pages are written anew.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from scipy.stats import binomtest

from fer.config import CONF, compose_like_hydra
from fer.errors import UserError
from fer.reporting.collect import finished_runs
from fer.reporting.statistics import newcombe
from fer.reporting.tables import MINUS, together
from fer.runs import RunFolder, read_json, write_json

RECORD = CONF.parent / "docs" / "results" / "small.json"
EXPERIMENTS = CONF / "experiment"
SMALL, WITHOUT, USUAL = "small", "without", "usual"  # its folders
SHARED = f"{SMALL}/_common"
START = "start_from=<folder of experiment=small/...>"
# Nodes of the config that decide a run's figures, and their values that are known once the data is open.
DECIDES = ("seed", "split_seed", "protocol", "loss", "mix", "optim", "model", "data", "trainer")
FROM_THE_DATA = ("model.class_names", "data.class_names", "data.root", "data.cache", "trainer.enable_progress_bar")
ABOUT_THE_PLACE = ("hydra.", "fresh=", "logger=", "trainer.enable_progress_bar=")  # words that move no figure


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


def experiment_of(folder: RunFolder, results: dict[str, Any]) -> str | None:
    """The experiment whose values a run has, whatever its command line; options that came later have no say."""
    config = OmegaConf.to_container(OmegaConf.load(folder.config))
    assert isinstance(config, dict)
    own = _settled({str(key): value for key, value in config.items()})
    for path in sorted(EXPERIMENTS.glob("*/*.yaml")):
        name = f"{path.parent.name}/{path.stem}"
        if path.parent.name not in (SMALL, WITHOUT, USUAL) or not path.stem.startswith(results["model"]):
            continue
        if all(own.get(key, value) == value for key, value in settles(name).items()):
            return name
    return None


def record(runs: Sequence[Path], before: dict[str, Any]) -> dict[str, Any]:
    """The figures of all finished runs of these experiments.

    Args:
        runs: folders with run folders under them.
        before: what this returned earlier; its runs stay where there are no newer ones.

    Raises:
        UserError: there is none of them.
    """
    found = {}
    for folder in finished_runs(runs):
        results = read_json(folder.results)
        trained = results["data"] == "synthetic" and "evaluation" not in results
        name = experiment_of(folder, results) if trained else None
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
        named = ", ".join(map(str, runs))
        raise UserError(f"{named}: no finished run of experiment=small/..., without/... or usual/... there")
    found = {**before["runs"], **found}
    asked = [
        f"{folder}/{path.stem}"
        for folder in (SMALL, WITHOUT, USUAL)
        for path in sorted((EXPERIMENTS / folder).glob("*.yaml"))
    ]
    models = {path.stem for path in (CONF / "model").glob("*.yaml")}
    missing = [x for x in asked if x not in found and (x.startswith(WITHOUT) or x.partition("/")[2] in models)]
    return {"shared": overrides_of(SHARED), "runs": found, "not_run": missing}


def section(faces: str) -> str:
    """The table of the networks on the ``usual`` faces, or whole and without a block on ``easier`` ones."""
    return {"usual": usual, "easier": easier}[faces](read_json(RECORD))


def usual(figures: dict[str, Any]) -> str:
    """The Markdown of the networks on the usual faces.

    Args:
        figures: what `record` returns.
    """
    runs = {name: run for name, run in figures["runs"].items() if name.startswith(f"{USUAL}/")}
    lines = ["| network | command | accuracy | core-minutes | parameters |", "|---|---|---:|---:|---:|"]
    for name, run in sorted(runs.items()):
        words = f"`experiment={name}`" + (" `start_from=...`" if START in run["command"] else "")
        lines.append(
            f"| `{run['model']}` | {words} | {_accuracy(run)} | {run['core_minutes']:.1f} | {run['parameters']:,} |"
        )
    return "\n".join([*lines, "", f"{_sizes(runs)} test images."])


def easier(figures: dict[str, Any]) -> str:
    """The Markdown of the networks on easier faces, each whole and without each of its blocks.

    A drop is bold where Newcombe's interval of it excludes zero. Which images two networks are both right on is not in
    the figures, so they count as tested on samples of their own.

    Args:
        figures: what `record` returns.
    """
    runs = {name: run for name, run in figures["runs"].items() if not name.startswith(f"{USUAL}/")}
    shared = ", ".join(f"`{word}`" for word in figures["shared"])
    lines = [
        f"Shared by all: {shared}.",
        "",
        "| network | what differs | accuracy | drop | core-minutes | parameters |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, whole in sorted(runs.items()):
        if not name.startswith(f"{SMALL}/"):
            continue
        lines.append(_row(f"`{whole['model']}`", whole, ""))
        for other, run in sorted(runs.items()):
            if run["model"] == whole["model"] and other.startswith(f"{WITHOUT}/"):
                drop = f"{100 * (whole['right'] / whole['n'] - run['right'] / run['n']):.1f}".replace("-", MINUS)
                low, high = newcombe(whole["right"], whole["n"], run["right"], run["n"])
                lines.append(_row(f"without {block_of(other)}", run, drop if low <= 0 <= high else f"**{drop}**"))
    lines += ["", f"{_sizes(runs)} test images."]
    if figures["not_run"]:
        lines[-1] += f" Not run: {', '.join(f'`{name}`' for name in figures['not_run'])}."
    return "\n".join(lines)


def network(model: str) -> str:
    """The Markdown of what a network's small form reached, for its own page."""
    runs = read_json(RECORD)["runs"]
    lines = [f"### `{SMALL}/{model}`", "", f"    python -m fer.train experiment={SMALL}/{model}", ""]
    lines += ["The same network, small enough for one CPU thread: accuracy on drawn faces, one seed.", ""]
    for folder, faces in ((SMALL, "easier faces"), (USUAL, "usual faces")):
        run = runs.get(f"{folder}/{model}")
        if run is None:
            lines.append(f"- {faces}, `experiment={folder}/{model}`: not measured here")
        else:
            cost = f"{run['core_minutes']:.1f} core-minutes"
            start = f" `{START.partition('=')[0]}=...`" if START in run["command"] else ""
            lines.append(
                f"- {faces}, `experiment={folder}/{model}`{start}: **{_accuracy(run)}**, n = {run['n']:,}, {cost}"
            )
    return "\n".join([*lines, "", "Without each of its blocks: [small networks](../small.md)."])


def _sizes(runs: dict[str, Any]) -> str:
    return " or ".join(sorted({f"{run['n']:,}" for run in runs.values()})) or "no"


def _interval(run: dict[str, Any]) -> tuple[float, float]:
    interval = binomtest(run["right"], run["n"]).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _accuracy(run: dict[str, Any]) -> str:
    low, high = _interval(run)
    share = f"{100 * run['right'] / run['n']:.1f} %"
    return f"{together(share)} {together(f'({100 * low:.1f} to {100 * high:.1f})')}"


def _row(name: str, run: dict[str, Any], drop: str) -> str:
    words = " ".join(f"`{word}`" for word in run["overrides"])
    cells = [name, words, _accuracy(run), drop, f"{run['core_minutes']:.1f}", f"{run['parameters']:,}"]
    return f"| {' | '.join(cells)} |"


def update(folders: list[Path]) -> None:
    """Record the runs under folders."""
    write_json(RECORD, record(folders, read_json(RECORD)))


if __name__ == "__main__":
    from fer.reporting.manual import from_runs  # which reads this module

    from_runs(__doc__, update)
