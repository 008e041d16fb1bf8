"""``python -m fer.explain``: what trained networks look at and how they see their test part, as figures for print.

python -m fer.explain run=outputs/.../<run>
python -m fer.explain run=[outputs/.../<run>,outputs/.../<run>] figures=[tsne] output=figures
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fer.config import count_problems, resolved, start
from fer.errors import UserError

CONFIG = "explain"
FIGURES = ("tsne", "attention", "confusion", "classes")


def run(config: DictConfig) -> None:
    """Draw the figures of one or several runs.

    Raises:
        UserError: anything the user can mend.
    """
    plain = resolved(config)
    problems = _problems(plain)
    if problems:
        raise UserError("\n".join(problems))

    from fer.explanation.study import Options, explain

    folders = [Path(folder) for folder in _listed(plain["run"])]
    output = (
        Path(plain["output"])
        if plain["output"]
        else (folders[0] / "explain" if len(folders) == 1 else Path("outputs/explain"))
    )
    options = Options(
        figures=plain["figures"],
        points=plain["points"],
        pictures=plain["pictures"],
        maps=plain["maps"],
        seed=plain["seed"],
        device=plain["device"],
        root=plain["root"],
    )
    for path in explain(folders, output, options):
        print(path)


def _listed(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def _problems(plain: dict[str, Any]) -> list[str]:
    problems = []
    if plain["run"] in (None, "", "???", []):
        problems.append("run is missing: set run=outputs/.../<run>, a run folder written by python -m fer.train")
    figures = plain["figures"]
    if not isinstance(figures, list) or not figures or set(map(str, figures)) - set(FIGURES):
        problems.append(f"figures={figures}: expected some of [{','.join(FIGURES)}]")
    return problems + count_problems(plain, {"points": 10, "pictures": 1, "maps": 0, "seed": 0})


def main() -> None:
    """The command."""
    start(CONFIG, run)


if __name__ == "__main__":
    main()
