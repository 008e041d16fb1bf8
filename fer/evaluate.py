"""``python -m fer.evaluate``: a trained run on its own test part or on another data set.

python -m fer.evaluate run=outputs/.../<run>                        its own test part
python -m fer.evaluate run=outputs/.../<run> data=ferplus robustness=true
python -m fer.evaluate 'run=outputs/sweeps/seeds5-.../*'            an ensemble
"""

import glob
import shlex
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fer.config import USER_MISTAKE, count_problems, resolved, start
from fer.errors import UserError
from fer.runs import RunFolder

CONFIG = "evaluate"
VIEWS = ("none", "flip", "five_crop", "ten_crop")


def run(config: DictConfig) -> None:
    """Evaluate and write the output folder.

    Raises:
        UserError: anything the user can mend.
    """
    plain = resolved(config)
    problems = _problems(plain)
    if problems:
        raise UserError("\n".join(problems))
    paths = run_folders(plain["run"])

    from fer.config import argument_problems
    from fer.evaluation.evaluate import evaluate

    problems = argument_problems({"corruptions": plain["corruptions"]})
    if problems:
        raise UserError("\n".join(problems))
    evaluate(config, paths, shlex.join(["python", "-m", "fer.evaluate", *sys.argv[1:]]))


def run_folders(value: str | list[str]) -> list[Path]:
    """The run folders named: paths, or patterns that match some; each once.

    Raises:
        UserError: a name is no folder, or a pattern matches no run.
    """
    found: dict[Path, None] = {}
    for word in [value] if isinstance(value, str) else value:
        if Path(word).is_dir():
            found[Path(word)] = None
            continue
        matches = [path for path in map(Path, sorted(glob.glob(word))) if RunFolder(path).config.is_file()]
        if not matches:
            raise UserError(f"run={word}: no such run folder; expected one written by python -m fer.train")
        found |= dict.fromkeys(matches)
    return list(found)


def _problems(plain: dict[str, Any]) -> list[str]:
    problems = []
    runs = plain["run"] if isinstance(plain["run"], list) else [plain["run"]]
    if not runs or not all(isinstance(one, str) and one not in ("", "???") for one in runs):
        problems.append("run is missing: set run=outputs/.../<run>, [several], or a pattern")
    if plain["output"] is not None and (not isinstance(plain["output"], str) or not plain["output"]):
        problems.append(f"output={plain['output']}: expected a folder to write to")
    problems += [
        f"{key}={plain[key]} is not one of {', '.join(VIEWS)}"
        for key in ("tta", "robustness_tta")
        if plain[key] not in (*VIEWS, *((None,) if key == "tta" else ()))
    ]
    if plain["device"] not in (None, "cpu", "cuda"):
        problems.append(f"device={plain['device']} is not one of cpu, cuda")
    counts = {"timing_repeats": 0, "orders": 0, "subgroup_values": 1, "seed": 0}
    if plain["robustness_images"] is not None:
        counts["robustness_images"] = 1
    problems += count_problems(plain, counts)
    problems += [
        f"{key}={plain[key]}: expected true or false"
        for key in ("calibration", "robustness")
        if not isinstance(plain[key], bool)
    ]
    if plain["robustness"] is True and not plain["corruptions"]:
        problems.append("corruptions: robustness=true needs at least one")
    return problems


def main() -> None:
    """The command."""
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        print("error: fer.evaluate takes run=[several] for an ensemble, not -m", file=sys.stderr)
        sys.exit(USER_MISTAKE)
    start(CONFIG, run)


if __name__ == "__main__":
    main()
