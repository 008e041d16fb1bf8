"""What is evaluated: trained runs, and the data they are shown."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fer.config import argument_problems
from fer.data.base import ExpressionDataModule
from fer.data.manifest import PARTS
from fer.errors import UserError
from fer.evaluation.answers import Answers, Reader, mean_answers
from fer.evaluation.classes import Matching
from fer.runs import AGAIN, RunFolder, read_json
from fer.trained import TrainedRun, open_run


@dataclass(frozen=True)
class Subject:
    """One network or an ensemble, and the data it is shown.

    Attributes:
        runs: the trained runs.
        readers: one per run.
        datas: one opened data module per run, each preparing images as its run does.
        views: views of each image at test, per run.
        data_name: public name of the data.
        matching: classes matched with another data set's; None for the runs' own test part.
        node: the other data set's node as it was instantiated for the first run, plain; empty for the own test part.
    """

    runs: list[TrainedRun]
    readers: list[Reader]
    datas: list[ExpressionDataModule]
    views: list[str]
    data_name: str
    matching: Matching | None
    node: dict[str, Any]

    @property
    def first(self) -> TrainedRun:
        """The run whose config stands for all."""
        return self.runs[0]

    @property
    def data(self) -> ExpressionDataModule:
        """The first run's view of the data."""
        return self.datas[0]

    def answers(self) -> Answers:
        """On the test part, over all of the network's classes."""
        return mean_answers(
            [r.read(d, "test", v) for r, d, v in zip(self.readers, self.datas, self.views, strict=True)]
        )

    def read(self, datas: Sequence[ExpressionDataModule], tta: str) -> Answers:
        """On the test part of other versions of the data, over the classes that are evaluated."""
        found = mean_answers([r.read(d, "test", tta) for r, d in zip(self.readers, datas, strict=True)])
        return self.matching.restrict(found) if self.matching is not None else found

    @property
    def trained_on(self) -> list[str]:
        """Data sets, each once."""
        return list(dict.fromkeys(str(run.results["data"]) for run in self.runs))

    @property
    def model(self) -> str:
        """What a table calls it; never the bare name of a network that was trained on the data."""
        count, names = len(self.runs), dict.fromkeys(str(run.results["model"]) for run in self.runs)
        out = f"ensemble of {count}: {', '.join(names)}" if count > 1 else ", ".join(names)
        return out if self.matching is None else f"{out} trained on {', '.join(self.trained_on)}"

    def stamps(self) -> list[str]:
        """Sentences every figure must carry: the runs' own and what the evaluation adds."""
        out = [str(stamp) for run in self.runs for stamp in run.results["stamps"]]
        out += self.data.split.stamps
        if len(self.runs) > 1:
            out.append(f"ensemble: mean of the probabilities of {len(self.runs)} runs")
        if self.matching is not None:
            chosen = {"val": "a validation part", "test": "the test part"}
            on = " and ".join(dict.fromkeys(chosen[str(run.results["selected_on"])] for run in self.runs))
            where = ", ".join(self.trained_on)
            out.append(f"trained on {where}, epoch chosen on {on} of {where}; only evaluated on {self.data_name}")
            out += self.matching.sentences()
        elif len(self.runs) == 1:
            out.append(f"{AGAIN}: a network that another run folder has trained and tested")
        return list(dict.fromkeys(out))

    def identical(self) -> dict[str, int] | None:
        """How many test images of another data set are pixel-identical to one of each part of the runs' own data.

        Returns:
            ``{"train": 3, ...}``, the most of any run; None where a run's own data is not at hand.
        """
        tested = self.data.store.copies[self.data.split.test]
        out = dict.fromkeys(PARTS, 0)
        for run in self.runs:
            try:
                own = run.data()
                own.open()
            except UserError:
                return None
            for part, rows in own.split.parts():
                out[part] = max(out[part], int(np.isin(tested, own.store.copies[rows]).sum()))
        return {str(part): count for part, count in out.items()}


def open_subject(config: DictConfig, paths: Sequence[Path]) -> Subject:
    """Open runs and data.

    Args:
        config: the composed config (``conf/evaluate.yaml``).
        paths: the run folders.

    Raises:
        UserError: a run or the data cannot be used, or they do not go together.
    """
    runs = [_open(path, config) for path in paths]
    other = OmegaConf.select(config, "data._target_") is not None
    nodes = [_other_node(config, run) if other else {} for run in runs]
    datas = [_other_data(node, run) if other else _own_data(run) for node, run in zip(nodes, runs, strict=True)]
    views = [str(config.tta or run.results["tta"]) for run in runs]
    readers = [Reader(run) for run in runs]
    matching = Matching.of(datas[0].class_names, datas[0].store.manifest) if other else None
    name = str(config.data_name) if other else str(runs[0].results["data"])
    return Subject(runs, readers, datas, views, name, matching, nodes[0])


def _open(path: Path, config: DictConfig) -> TrainedRun:
    place = config.device
    if place is None:
        results = RunFolder(path).results
        was = str(read_json(results)["device"]).partition(":")[0] if results.is_file() else "cpu"
        place = was if was != "cuda" or torch.cuda.is_available() else "cpu"
    elif place == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: this machine has none that torch can use; leave device= out, or device=cpu")
    run = open_run(path, place)
    if "evaluation" in run.results:
        raise UserError(f"run={path} is an evaluation, expected a run folder written by python -m fer.train")
    for key in ("root", "cache"):
        if config[key] is not None:
            run.config.data[key] = str(Path(config[key]).absolute())
    return run


def _own_data(run: TrainedRun) -> ExpressionDataModule:
    data = run.data()
    data.open()
    found, was = data.split.fingerprint(data.store.manifest), run.results["split_fingerprint"]
    if found != was:
        raise UserError(
            f"run={run.folder.path}: the data under {data.root} is not what it was trained and tested on (its split is "
            f"{found}, was {was}); give the right one by root=, or evaluate on this one by data="
        )
    return data


def _other_node(config: DictConfig, run: TrainedRun) -> dict[str, Any]:
    """Another data set's node with the run's way of showing images: size, channels, crop, normalisation, classes."""
    node = copy.deepcopy(config)
    own, module = run.config.data, run.module
    node.model = {
        "image_size": module.image_size,
        "mean": module.mean,
        "std": module.std,
        "class_names": module.class_names,
        "store_size": own.store_size,
        "channels": own.channels,
        "eval_batch_size": own.eval_batch_size,
    }
    node.augment = own.augment
    plain: dict[str, Any] = OmegaConf.to_container(node.data, resolve=True)  # type: ignore[assignment]
    problems = argument_problems({"data": plain})
    if problems:
        raise UserError("\n".join(problems))
    return plain


def _other_data(node: dict[str, Any], run: TrainedRun) -> ExpressionDataModule:
    data, module = instantiate(node), run.module
    if not isinstance(data, ExpressionDataModule):
        raise UserError(f"data._target_={node['_target_']} is no data set: expected an ExpressionDataModule")
    if data.wanted_classes != module.class_names:
        raise UserError("data.class_names: the classes are the network's, matched by name; leave it out")
    data.open(absent_classes=True)
    return data
