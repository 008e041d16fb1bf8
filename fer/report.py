"""``python -m fer.report``: from run folders to tables, pictures and one page.

python -m fer.report runs=outputs                                    everything under outputs
python -m fer.report runs=outputs compare=[convcut,cbam_resnet]      with significance tests
"""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fer.config import CONF, resolved, start
from fer.errors import UserError

CONFIG = "report"


def run(config: DictConfig) -> None:
    """Write one report.

    Raises:
        UserError: anything the user can mend.
    """
    plain = resolved(config)
    problems = _problems(plain)
    if problems:
        raise UserError("\n".join(problems))

    from fer.reporting.claims import load_claims
    from fer.reporting.collect import never_started, read_runs
    from fer.reporting.comparisons import compare
    from fer.reporting.groups import make_groups
    from fer.reporting.publish import Options, write_report
    from fer.reporting.summaries import RECORDS, load_results
    from fer.reporting.tables import writable

    roots = [Path(root) for root in _listed(plain["runs"])]
    claims = load_claims(Path(plain["claims"] or CONF / "claims.yaml"))
    measured = load_results(Path(plain["measured"] or RECORDS))
    runs = read_runs(roots)
    groups = make_groups(runs)
    selectors = _listed(plain["compare"] or [])
    verdicts = compare(groups, selectors, plain["resamples"], plain["seed"]) if selectors else []
    options = Options(
        wrong_images=plain["wrong_images"],
        thumbnails=plain["thumbnails"],
        stores=[Path(store) for store in plain["stores"]],
        root=Path(os.path.commonpath([root.resolve() for root in roots])),
    )
    output = Path(plain["output"])
    write_report(output, runs, groups, claims, measured, verdicts, never_started(roots), options)
    state = ", ".join(f"{n:,} {status}" for status, n in Counter(run.status for run in runs).most_common())
    print(f"{len(runs):,} runs ({state}) in {len(groups):,} groups: {writable(str(output / 'report.html'))}")


def report_on(folder: Path) -> None:
    """The report on all runs under a folder, into its ``report``; every other value as ``conf/report.yaml`` has it."""
    config = OmegaConf.load(CONF / f"{CONFIG}.yaml")
    assert isinstance(config, DictConfig)
    del config["defaults"], config["hydra"]
    config.runs, config.output = str(folder), str(folder / "report")
    run(config)


def _listed(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def _problems(plain: dict[str, Any]) -> list[str]:
    problems = []
    if plain["runs"] in (None, "", "???"):
        problems.append("runs is missing: set runs=outputs, or another folder with run folders in it")
    if not isinstance(plain["output"], str) or not plain["output"]:
        problems.append(f"output={plain['output']}: expected a folder to write to")
    if not isinstance(plain["resamples"], int) or plain["resamples"] < 100:
        problems.append(f"resamples={plain['resamples']}: expected at least 100 bootstrap samples")
    if not isinstance(plain["seed"], int) or plain["seed"] < 0:
        problems.append(f"seed={plain['seed']}: expected a whole number from 0 on")
    if not isinstance(plain["wrong_images"], int) or plain["wrong_images"] < 0:
        problems.append(f"wrong_images={plain['wrong_images']}: expected a number of images, 0 or more")
    if not isinstance(plain["thumbnails"], bool):
        problems.append(f"thumbnails={plain['thumbnails']}: expected true or false")
    if not isinstance(plain["stores"], list):
        problems.append(f"stores={plain['stores']}: expected a list of folders, [] for none")
    return problems


def main() -> None:
    """The command."""
    start(CONFIG, run)


if __name__ == "__main__":
    main()
