"""What the tasks of pre-training share: measures averaged by stage, the injected optimiser, the weights to keep."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypedDict

import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fer.data.base import ExpressionDataModule
from fer.models.optim import Recipe, layer_decay_groups, steps_per_epoch
from fer.models.steps import SteppedModule

Batch = dict[str, Tensor]
Stage = Literal["train", "val", "test"]
_STREAM = 104_729  # keeps a task's random numbers apart from those of the data's augmentation, which has the same seed


class TaskOptions(TypedDict):
    """Constructor arguments common to all tasks; every value comes from ``conf/task/<name>.yaml``.

    Attributes:
        image_size: side in pixels of the images that arrive.
        seed: the run's seed.
        optim: optimiser and schedule.
    """

    image_size: int
    seed: int
    optim: Recipe


class Pretraining(SteppedModule, abc.ABC):
    """Base of the tasks. Images arrive as pixels in [0, 1], (B, 3, S, S).

    Attributes:
        file: name of the file of weights, and of its picture.
        picture: name of the picture that shows what was learned.
        monitor: the measure whose lowest validation value is kept; None keeps the last epoch.
        architecture: what the weights belong to.
        weights: where the initial ones came from.
    """

    file: ClassVar[str]
    picture: ClassVar[str]
    monitor: ClassVar[str | None]
    architecture: str
    weights: str = "random"

    def __init__(self, *, image_size: int, seed: int, optim: Recipe) -> None:
        super().__init__()
        self.image_size, self.seed, self.optim = image_size, seed + _STREAM, optim
        self.total_steps = 1
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "val": {}, "test": {}}

    # -- what a task says -----------------------------------------------------------------------------------------

    @classmethod
    def from_data(cls, options: Mapping[str, Any], data: ExpressionDataModule) -> dict[str, Any]:
        """Values of options that the config leaves to the data; most tasks have none."""
        return {}

    @abc.abstractmethod
    def measures(self, batch: Batch, train: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        """(B,) measures of each image, ``loss`` among them, and (B,) bool which images count, None for all."""

    @abc.abstractmethod
    def kept(self) -> nn.Module:
        """The network whose weights are kept."""

    @abc.abstractmethod
    def usage(self, path: str) -> list[str]:
        """Words of ``python -m fer.train`` that take the kept weights from ``path``."""

    @abc.abstractmethod
    def draw(self, batch: Batch) -> Figure:
        """A picture of what was learned, of a batch of the test part."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters in groups with their own ``lr_scale``."""
        return [{"params": list(self.parameters())}]

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D), what the kept network says."""
        output: Tensor = self.kept()(image)
        return output

    # -- steps and measures ---------------------------------------------------------------------------------------

    def _step(self, batch: Batch, stage: Stage) -> Tensor:
        measures, counts = self.measures(batch, train=stage == "train")
        counts = torch.ones_like(batch["index"], dtype=torch.bool) if counts is None else counts
        number = counts.sum()
        sums = self._sums[stage]
        for name, values in measures.items() if self.counts else ():
            # What is not finite is left out of the means; whether it ends the run is the guard's to say.
            counted = counts & values.isfinite()
            added = torch.stack([torch.where(counted, values.detach().float(), 0).sum(), counted.sum().float()])
            sums[name] = sums[name].to(added.device) + added if name in sums else added
        return torch.where(counts, measures["loss"], 0).sum() / number.clamp_min(1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One optimisation step."""
        return self._step(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure one validation batch."""
        self._step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure one test batch."""
        self._step(batch, "test")

    def scores(self, stage: Stage) -> dict[str, float]:
        """Mean of each measure over the images that count; NaN where none does."""
        sums = {name: values.tolist() for name, values in self._sums[stage].items()}
        return {name: total / number if number else float("nan") for name, (total, number) in sums.items()}

    def _log(self, stage: Stage) -> None:
        self.log_dict({f"{stage}/{name}": value for name, value in self.scores(stage).items()}, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's training measures and start anew."""
        self._log("train")
        self._sums["train"] = {}

    def on_validation_epoch_start(self) -> None:
        """Start anew."""
        self._sums["val"] = {}

    def on_validation_epoch_end(self) -> None:
        """Log the validation measures."""
        self._log("val")

    def on_test_epoch_start(self) -> None:
        """Start anew."""
        self._sums["test"] = {}

    def on_test_epoch_end(self) -> None:
        """Log the test measures."""
        self._log("test")

    # -- optimiser and checkpoint ---------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Build optimiser and schedule from the injected recipe."""
        steps, epochs = steps_per_epoch(self.trainer), self.trainer.max_epochs or 1
        self.total_steps = steps * epochs
        return self.optim.configure(self.parameter_groups(), steps_per_epoch=steps, max_epochs=epochs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the sums of a half-done epoch."""
        checkpoint["fer"] = {
            "task": type(self).__name__,
            "weights": self.weights,
            "sums": self._sums["train"],
            "safety": self.safety_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the sums of a half-done epoch back."""
        self._sums["train"] = dict(checkpoint["fer"]["sums"])
        self.load_safety_state(checkpoint["fer"]["safety"])


class Normalise(nn.Module):
    """Pixels in [0, 1] to what a backbone was trained on: (image - mean) / std per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> the same shape."""
        return (image - self.mean) / self.std


def backbone_usage(backbone: nn.Module, architecture: str, path: str) -> list[str]:
    """Words of ``python -m fer.train`` for a backbone: the two-stream network takes transformers, `timm` everything."""
    model = "two_stream" if hasattr(backbone, "blocks") else "timm"
    return [f"model={model}", f"model.backbone={architecture}", f"model.pretrained={path}"]


def backbone_groups(backbone: nn.Module, others: list[nn.Parameter], layer_decay: float) -> list[dict[str, Any]]:
    """Layer decay within the backbone, everything else at the recipe's learning rate."""
    return [*layer_decay_groups(backbone, layer_decay), {"params": others}]


def image_options(backbone: str, image_size: int, several_sizes: bool = False) -> dict[str, Any]:
    """Arguments by which a timm network takes images of this side, or of several sides; convolutions need none."""
    if not timm.is_model(backbone):
        return {}  # whoever builds it says so
    with torch.device("meta"):
        network = timm.create_model(backbone, pretrained=False)
    options: dict[str, Any] = {"img_size": image_size} if hasattr(network, "patch_embed") else {}
    if several_sizes and hasattr(network, "dynamic_img_size"):
        options["dynamic_img_size"] = True
    return options
