"""The LightningModule every architecture shares: one step, counts on the device, the injected loss and optimiser."""

import abc
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from fer.models.losses import ExpressionLoss
from fer.models.optim import Recipe, steps_per_epoch
from fer.models.steps import SteppedModule
from fer.models.tally import Tally

Batch = dict[str, Tensor]
Stage = Literal["train", "val", "test"]


class ModuleOptions(TypedDict):
    """Constructor arguments common to all architectures; every value comes from ``conf/model/<name>.yaml``.

    Attributes:
        class_names: names of the K outputs, in output order.
        image_size: side in pixels of the square input.
        mean, std: per-channel normalisation of an image in [0, 1]; applied by the data module, recorded here.
        loss: the training loss.
        optim: optimiser and schedule.
    """

    class_names: list[str]
    image_size: int
    mean: list[float]
    std: list[float]
    loss: ExpressionLoss
    optim: Recipe


class ExpressionModule(SteppedModule, abc.ABC):
    """Base of all architectures.

    A subclass assigns ``self.network``, which has ``forward_features`` and a ``classifier``, and says which layer
    Grad-CAM looks at; it may override `loss` and `parameter_groups`.

    Attributes:
        leaky: a sentence when predictions of an image depend on the other images of its batch, else None; stamped on
            every result.
        takes_mixed: whether the loss takes images blended by mixup or cutmix; False where it needs one class, or
            regions, of each image.
        weights: where the initial weights came from (``random``, ``timm/...``); recorded in every result.
        compiled_parts: names of the submodules that ``trainer.compile`` compiles; a training step must call them as
            modules, since compiling changes nothing else.
        monitor: the validation score whose best epoch is tested.
        scored_from: the first epoch whose score says anything; none before it is the best one or ends a training.
    """

    network: nn.Module
    monitor: str = "val/mean_acc"
    leaky: str | None = None
    takes_mixed: bool = True
    scored_from: int = 0
    weights: str = "random"
    compiled_parts: tuple[str, ...] = ("network",)

    def __init__(
        self,
        *,
        class_names: list[str],
        image_size: int,
        mean: list[float],
        std: list[float],
        loss: ExpressionLoss,
        optim: Recipe,
    ) -> None:
        super().__init__()
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        self.image_size = image_size
        self.mean, self.std = list(mean), list(std)
        self.loss_function = loss
        self.optim = optim
        self.began: list[str] = []  # what results must say of the weights it began with
        self.tallies = nn.ModuleDict({stage: Tally(self.num_classes) for stage in ("train_", "val", "test")})
        # Each device counts for itself; data-parallel training would overwrite the others' counts with the first one's.
        self._ddp_params_and_buffers_to_ignore = [f"tallies.{name}" for name, _ in self.tallies.named_buffers()]

    @property
    def stamps(self) -> list[str]:
        """Sentences every result of this module must carry."""
        return [*([self.leaky] if self.leaky else []), *self.began]

    # -- what a subclass says -------------------------------------------------------------------------------------

    @classmethod
    def from_data(cls, options: Mapping[str, Any], data: Any) -> dict[str, Any]:
        """Values of options that the config leaves to the data; most architectures have none.

        Args:
            options: the model's node of the config.
            data: the opened data module.
        """
        return {}

    @property
    @abc.abstractmethod
    def cam_layer(self) -> nn.Module:
        """The last layer with a spatial output, for Grad-CAM."""

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), what the classifier sees; by default the network's ``forward_features``."""
        forward_features: Any = self.network.forward_features
        features: Tensor = forward_features(image)
        return features

    def classify(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, K) logits, what `forward` does with `features`; by default the network's ``classifier``."""
        logits: Tensor = self.network.get_submodule("classifier")(features)
        return logits

    def feature_size(self) -> int:
        """D of `features`, found by asking for those of one blank image."""
        device = next(self.parameters()).device
        was_training = self.training
        with torch.no_grad():
            size = self.eval().features(torch.zeros(1, 3, self.image_size, self.image_size, device=device)).shape[1]
        self.train(was_training)
        return size

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, K) logits."""
        logits: Tensor = self.network(image)
        return logits

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean loss of a batch and its (B, K) logits."""
        return self.loss_function.objective(self, batch)

    @property
    def splits(self) -> bool:
        """What the injected loss says; a subclass with a loss of its own says it itself."""
        return self.loss_function.splits

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The module's parameters without its loss's, in groups with their own ``lr_scale``, for the optimiser."""
        own = (p for name, p in self.named_parameters() if not name.startswith("loss_function."))
        return [{"params": list(own)}]

    # -- the shared step ------------------------------------------------------------------------------------------

    def tally(self, stage: Stage) -> Tally:
        """Counts of one stage (``train`` is no legal name inside a module, hence the key)."""
        tally = self.tallies["train_" if stage == "train" else stage]
        assert isinstance(tally, Tally)
        return tally

    def probabilities(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K) float32 probabilities; (B, V, 3, H, W) averages over the V views of each image."""
        if image.ndim == 4:
            return self(image).float().softmax(1)  # type: ignore[no-any-return]
        logits = self(image.flatten(0, 1))
        return logits.float().softmax(1).unflatten(0, image.shape[:2]).mean(1)  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch, or a part of it; counts predictions without reading anything back from the device."""
        share = 1.0
        if self.portions is not None:
            batch, share = self.portions.portion(batch)
        loss, logits = self.loss(batch)
        if self.counts:
            self.tally("train").add(logits.detach().argmax(1), batch["label"], loss)
        return loss if share == 1 else loss * share

    def scores(self, stage: Stage) -> dict[str, float]:
        """All scores of what was counted since the stage began."""
        return self.tally(stage).scores(self.class_names)

    def reset(self, stage: Stage) -> None:
        """Start counting anew."""
        self.tally(stage).reset()

    def _evaluate(self, batch: Batch, stage: Literal["val", "test"]) -> Tensor:
        return self._count(self.probabilities(batch["image"]), batch, stage)

    def _count(self, probabilities: Tensor, batch: Batch, stage: Literal["val", "test"]) -> Tensor:
        # The loss people compare across runs is that of the label, whatever the training loss was.
        loss = nn.functional.nll_loss(probabilities.clamp_min(1e-12).log(), batch["label"])
        self.tally(stage).add_probabilities(probabilities, batch["label"], loss)
        return probabilities

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one validation batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Count one test batch and hand its probabilities to the prediction writer."""
        probabilities = self._evaluate(batch, "test")
        return {"index": batch["index"], "label": batch["label"], "probabilities": probabilities}

    def _log_scores(self, stage: Stage, *, keys: tuple[str, ...] | None = None) -> None:
        kept = {k: v for k, v in self.scores(stage).items() if keys is None or k in keys}
        bar = {"train": ("loss",), "val": (self.monitor.removeprefix("val/"),), "test": ()}[stage]
        self.log_dict({f"{stage}/{k}": v for k, v in kept.items() if k not in bar}, sync_dist=False)
        self.log_dict({f"{stage}/{k}": v for k, v in kept.items() if k in bar}, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's training scores, of all devices together, and start counting anew."""
        self.tally("train").restore(self.tally("train").counts())
        self._log_scores("train", keys=("loss", "acc"))
        self.reset("train")

    def on_validation_epoch_start(self) -> None:
        """Start counting anew."""
        self.reset("val")

    def on_validation_epoch_end(self) -> None:
        """Log the validation scores."""
        self._log_scores("val")

    def on_test_epoch_start(self) -> None:
        """Start counting anew."""
        self.reset("test")

    def on_test_epoch_end(self) -> None:
        """Log the test scores."""
        self._log_scores("test")

    # -- optimiser and checkpoint ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Tell the loss how often each class occurs in the training part, and what it is attached to."""
        if stage == "fit":
            counts = self.trainer.datamodule.class_counts("train")  # type: ignore[attr-defined]
            self.loss_function.setup(torch.as_tensor(counts))
            self.loss_function.attach(self)

    def configure_optimizers(self) -> Any:
        """Build optimiser and schedule from the injected recipe."""
        groups = [*self.parameter_groups(), {"params": list(self.loss_function.parameters())}]
        steps = steps_per_epoch(self.trainer)
        return self.optim.configure(groups, steps_per_epoch=steps, max_epochs=self.trainer.max_epochs or 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a checkpoint needs to be understood alone, and the counts of a half-done epoch."""
        checkpoint["fer"] = {
            "class_names": self.class_names,
            "image_size": self.image_size,
            "mean": self.mean,
            "std": self.std,
            "weights": self.weights,
            "leaky": self.leaky,
            "train_tally": self.tally("train").counts(),
            "safety": self.safety_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the counts of a half-done epoch back."""
        self.tally("train").restore(checkpoint["fer"]["train_tally"])
        self.load_safety_state(checkpoint["fer"]["safety"])
