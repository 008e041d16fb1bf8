"""Fine-tuning: a run that begins with the best weights of a finished one, ``start_from=<run folder>``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from fer.data.base import ExpressionDataModule
from fer.errors import UserError
from fer.models.base import ExpressionModule
from fer.runs import RunFolder
from fer.safety import read_config
from fer.trained import TrainedRun, open_run
from fer.weights import AT_SHA256, sha256_of

_NOT_WEIGHTS = ("loss_function.", "tallies.")  # of a module: what belongs to a training, not to the network
_LEARNED = ("train", "val")  # parts that moved a run's weights, or chose among them


def pinned(start_from: str) -> str:
    """A run folder with the checksum of its best weights, ``<absolute folder>@sha256:<checksum>``.

    Raises:
        UserError: no such weights, or others than the checksum given with the folder says.
    """
    place, _, given = start_from.partition(AT_SHA256)
    best = RunFolder(Path(place).absolute()).best
    if not best.is_file():
        raise UserError(f"start_from={place}: {best} is missing, expected the folder of a finished run of fer.train")
    found = sha256_of(best)
    if given and given.lower() != found:
        raise UserError(
            f"start_from={start_from}: {best} has SHA-256 {found}; it is another run's, or was trained anew"
        )
    return f"{best.parents[1]}{AT_SHA256}{found}"


def options_with(start_from: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Options that the config leaves to the data, such as anchors, as the run had them whose weights know them.

    Args:
        start_from: the run folder as `pinned` names it.
        found: what this run's data gives.
    """
    config = read_config(RunFolder(Path(start_from.partition(AT_SHA256)[0])).config, "python -m fer.train")
    earlier = {key: OmegaConf.select(config, f"model.{key}") for key in found}
    # A run that looked for none has kept their number.
    known = {key: OmegaConf.to_container(values) for key, values in earlier.items() if OmegaConf.is_list(values)}
    return {**found, **known}


def begin_with(module: ExpressionModule, start_from: str, data: ExpressionDataModule) -> None:
    """Give a new module the weights of a finished run, and the sentences its results must carry for it.

    Where the classes differ, what depends on their number begins at random.

    Args:
        module: of the same architecture and options as the run's.
        start_from: the run folder as `pinned` names it.
        data: what the module will be trained and tested on, opened.

    Raises:
        UserError: no finished run, or one whose weights do not fit.
    """
    place, _, checksum = start_from.partition(AT_SHA256)
    run = open_run(Path(place))
    earlier, own = _weights(run.module), _weights(module)
    other = [name for name in earlier if name not in own or earlier[name].shape != own[name].shape]
    lacking = [name for name in own if name not in earlier]
    same_classes = run.module.class_names == module.class_names
    # The classifier alone may differ, by the number of classes.
    rows = (run.module.num_classes, module.num_classes)
    unfit = [*lacking, *(name for name in other if same_classes or name not in own)]
    unfit += [name for name in other if name in own and (*earlier[name].shape[:1], *own[name].shape[:1]) != rows]
    # An option, not a weight: the record of this run must not name others.
    anchors = [name for name in own if name.endswith(".anchors") and name in earlier]
    unfit += [name for name in anchors if not torch.equal(earlier[name], own[name])]
    if unfit:
        raise UserError(
            f"start_from={place}: that run's {run.results['model']} has other weights than this run's model "
            f"({unfit[0]}); give model=... the options in {run.folder.config}"
        )
    if not same_classes and set(run.module.class_names) == set(module.class_names):
        raise UserError(
            f"start_from={place}: that run has this run's classes in another order: give this one "
            f"data.class_names=[{','.join(run.module.class_names)}]"
        )
    if not same_classes and not other:
        raise UserError(
            f"start_from={place}: that run's classes are {', '.join(run.module.class_names)}, this run's are "
            f"{', '.join(module.class_names)}: as many, but others; choose data with the same or another number"
        )
    module.load_state_dict({name: value for name, value in earlier.items() if name not in other}, strict=False)
    module.weights = f"run {run.results['name']} ({run.results['weights']}) best.ckpt sha256:{checksum}"
    module.began = [f"began with the weights of a run that says: {stamp}" for stamp in run.results["stamps"]]
    module.began += _seen(run, data)


def _weights(module: ExpressionModule) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if not name.startswith(_NOT_WEIGHTS)}


def _seen(run: TrainedRun, data: ExpressionDataModule) -> list[str]:
    """A sentence for each way in which the earlier run has seen the test part."""
    earlier = run.data()
    try:
        earlier.open()
    except UserError:
        return [f"began with the weights of a run on {run.results['data']}, whose images were not at hand to compare"]
    learned = np.concatenate([rows for part, rows in earlier.split.parts() if part in _LEARNED])
    test, out = data.split.test, []
    copies = int(np.isin(data.store.copies[test], earlier.store.copies[learned]).sum())
    if copies:
        out.append(f"began with weights that had learned from or been chosen on {copies:,} of the test images")
    people = [manifest.subject for manifest in (data.store.manifest, earlier.store.manifest)]
    # Another data set calls other people by the same names.
    if type(data) is type(earlier) and people[0] is not None and people[1] is not None:
        shared = np.intersect1d(people[0][test], people[1][learned])
        if len(shared):
            out.append(f"began with weights that had learned from or been chosen on {len(shared):,} of the test people")
    return out
