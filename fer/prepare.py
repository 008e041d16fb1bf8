"""``python -m fer.prepare``: from photographs to a data root of aligned faces.

python -m fer.prepare data=folder data.root=photos output=faces             find and align every face
python -m fer.train data=folder data.root=faces                             train on them
"""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from fer.config import CONF, argument_problems, check_command_line, guarded, resolved
from fer.errors import UserError

if TYPE_CHECKING:
    from fer.data.manifest import Manifest
    from fer.faces.preparation import Summary

CONFIG = "prepare"
SIZES = range(16, 2049)


def run(config: DictConfig) -> None:
    """Prepare one data set.

    Raises:
        UserError: anything the user can mend, all problems of the config at once.
    """
    plain = resolved(config)
    problems = argument_problems({"data": plain["data"], "detector": plain["detector"]}) + _value_problems(plain)
    if problems:
        raise UserError("\n".join(problems))

    from hydra.utils import instantiate

    from fer.data.base import ExpressionDataModule
    from fer.faces.preparation import Preparation

    data = instantiate(config.data)
    if not isinstance(data, ExpressionDataModule):
        raise UserError(f"data._target_={plain['data']['_target_']} is no data set: expected an ExpressionDataModule")
    data.check_root()
    own = plain["use_manifest_landmarks"]
    detector = None if own else instantiate(config.detector)
    manifest = data.manifest()
    preparation = Preparation(
        data,
        manifest,
        detector,
        size=plain["size"],
        margin=float(plain["margin"]),
        output=Path(plain["output"]),
        record={"detector": "the manifest" if own else plain["detector"]},
    )
    _tell(preparation.run(), manifest)


def _value_problems(plain: dict[str, Any]) -> list[str]:
    problems = []
    if not isinstance(plain["output"], str) or plain["output"] in ("", "???"):
        problems.append("output is missing: set output=/path/to/a/new/folder")
    if plain["size"] not in SIZES:
        problems.append(f"size={plain['size']}: expected a whole number of pixels, {SIZES[0]} to {SIZES[-1]}")
    if not isinstance(plain["margin"], int | float) or not -0.25 <= plain["margin"] <= 2:
        problems.append(f"margin={plain['margin']}: expected a share of the face, -0.25 to 2")
    if not isinstance(plain["use_manifest_landmarks"], bool):
        problems.append(f"use_manifest_landmarks={plain['use_manifest_landmarks']}: expected true or false")
    return problems


def _tell(summary: "Summary", manifest: "Manifest") -> None:
    """What was done, and how to train on it."""
    print(
        f"{summary.landmarks + summary.box:,} faces of {len(manifest):,} pictures in {summary.output}: "
        f"{summary.landmarks:,} aligned by landmarks, {summary.box:,} by the box alone"
        + (f"; {summary.kept:,} were done before" if summary.kept else "")
    )
    if summary.no_face or summary.unreadable:
        print(
            f"{summary.no_face:,} without a face, {summary.unreadable:,} unreadable: {summary.output / 'no_face.csv'}"
        )
    left = [
        name
        for name, values in (("soft labels", manifest.soft), ("valence and arousal", manifest.valence_arousal))
        if values is not None
    ]
    if left:
        print(f"not taken along: {' and '.join(left)}, which class folders cannot hold")
    words = ["data=folder", f"data.root={summary.output}", f"data.class_names=[{','.join(manifest.class_names)}]"]
    if not any(manifest.split):
        words.append("protocol=holdout")
    print(f"next: {shlex.join(['python', '-m', 'fer.train', *words])}")


@hydra.main(config_path=str(CONF), config_name=CONFIG, version_base="1.3")
def _job(config: DictConfig) -> None:
    guarded(lambda: run(config))


def main() -> None:
    """The command."""
    check_command_line(CONFIG, sys.argv[1:])
    try:
        _job()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
