"""The images of a run's data as its network takes them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fer.data.base import ExpressionDataModule
from fer.errors import UserError
from fer.metrics import Array
from fer.trained import TrainedRun


def opened(run: TrainedRun, root: str | None) -> ExpressionDataModule:
    """The run's data, opened.

    Args:
        run: the run.
        root: the data set's folder, where it has moved since.

    Raises:
        UserError: the data is not there.
    """
    if root is not None:
        run.config.data.root = root
    data = run.data()
    if data.on_disk and not Path(data.root).is_dir():
        raise UserError(f"the data of {run.folder.path} is no longer in {data.root}: set root=/path/to/it")
    data.open()
    return data


def inputs(run: TrainedRun, data: ExpressionDataModule, rows: Array) -> Tensor:
    """Images as the run's network takes them: (B, 3, S, S) on its device, the central crop."""
    crops = torch.from_numpy(np.array(data.store.images[rows])).to(run.device)
    index = torch.from_numpy(np.asarray(rows)).to(run.device)
    return run.finish("none")({"image": crops, "index": index}, epoch=0)["image"]
