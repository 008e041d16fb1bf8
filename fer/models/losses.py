"""Losses on logits. All work in float32, whatever precision the network ran in."""

import abc
from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fer.errors import UserError
from fer.layers.focal import focal

Batch = Mapping[str, Tensor]


class Classifier(Protocol):
    """What a loss may ask of a module; see `fer.models.base.ExpressionModule`."""

    image_size: int

    @property
    def cam_layer(self) -> nn.Module:
        """The last layer with a spatial output."""

    def __call__(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, K)."""

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""

    def classify(self, features: Tensor) -> Tensor:
        """(B, D) -> logits (B, K)."""

    def feature_size(self) -> int:
        """D."""

    def get_submodule(self, target: str) -> nn.Module:
        """The layer of a name."""


class ExpressionLoss(nn.Module, abc.ABC):
    """A loss over a batch: ``forward(logits (B, K), batch) -> scalar``.

    Attributes:
        takes_mixed: whether it takes ``target`` (B, K) in the batch, the shares of the classes of images blended by
            mixup or cutmix, instead of ``label`` (B,).
        splits: whether the loss of a batch is the mean of its parts' losses, each weighted by its images.
    """

    takes_mixed: bool = False
    splits: bool = False

    def setup(self, class_counts: Tensor) -> None:
        """Learn the training part's images per class, (K,); most losses need none."""

    def attach(self, module: Classifier) -> None:
        """Make what depends on the size of the module's features, before there is an optimiser; most need nothing."""

    @abc.abstractmethod
    def forward(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean loss of the batch, a float32 scalar."""

    def objective(self, module: Classifier, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of a batch through a module, and its (B, K) logits; for losses that need more to override."""
        logits = module(batch["image"])
        loss: Tensor = self(logits, batch)
        return loss, logits


def target_of(batch: Batch) -> Tensor:
    """What `torch.nn.functional.cross_entropy` takes: shares of classes (B, K) of mixed images, else labels (B,)."""
    return batch["target"] if "target" in batch else batch["label"]


class CrossEntropy(ExpressionLoss):
    """Softmax cross-entropy: -log softmax(z)_y.

    Args:
        label_smoothing: Share of the target spread evenly over all classes.
        class_weights: ``none``; ``balanced``, inverse to the class's share of the training part; ``sqrt``, the inverse
            square root of it.
    """

    takes_mixed = True
    weight: Tensor | None

    def __init__(self, label_smoothing: float, class_weights: Literal["none", "balanced", "sqrt"]) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.power = {"none": 0.0, "balanced": 1.0, "sqrt": 0.5}[class_weights]
        self.splits = self.power == 0  # else divided by the sum of the batch's weights
        self.register_buffer("weight", None, persistent=False)

    def setup(self, class_counts: Tensor) -> None:
        """Compute the class weights; their mean over the training images is 1."""
        if self.power > 0:
            weight = class_counts.clamp(min=1).float().pow(-self.power)
            self.weight = weight * (class_counts.sum() / (class_counts * weight).sum())

    def forward(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean over the batch, weighted by class if asked."""
        if self.power > 0 and self.weight is None:
            raise RuntimeError("setup(class_counts) must come before a class-weighted loss")
        target = target_of(batch)
        loss = F.cross_entropy(logits.float(), target, self.weight, label_smoothing=self.label_smoothing)
        if target.ndim == 2 and self.weight is not None:
            # torch divides by the weights of labels, but by the number of images where it is given shares.
            loss = loss * len(target) / (target @ self.weight).sum()
        return loss


class Focal(ExpressionLoss):
    """Focal loss, Lin et al., arXiv 1708.02002: -(1 - p_y)^gamma log p_y; gamma 0 is cross-entropy.

    Of mixed images, the mean over the classes weighted by their shares.
    """

    takes_mixed = splits = True

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean over the batch."""
        log_p = logits.float().log_softmax(1)
        if "target" not in batch:
            return focal(log_p.gather(1, batch["label"][:, None]), self.gamma).mean()
        return (batch["target"] * focal(log_p, self.gamma)).sum(1).mean()


class ClassBalanced(ExpressionLoss):
    """Class-balanced cross-entropy, Cui et al., arXiv 1901.05555, equation 10.

    Weight of class c: (1 - beta) / (1 - beta^n_c), scaled so that the weights of the classes present sum to their
    number.

    Args:
        beta: 0 weighs all classes alike; towards 1 the weights go to inverse frequency.

    Raises:
        UserError: beta is not in [0, 1).
    """

    takes_mixed = splits = True
    weight: Tensor | None

    def __init__(self, beta: float) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise UserError(
                f"loss.beta={beta} must lie from 0 to below 1: 0.9999 comes near to weights by inverse frequency, "
                "which loss=cross_entropy loss.class_weights=balanced has"
            )
        self.beta = beta
        self.register_buffer("weight", None, persistent=False)

    def setup(self, class_counts: Tensor) -> None:
        """Compute the class weights; classes without an image get 0."""
        present = class_counts > 0
        effective = (1 - self.beta ** class_counts.double()) / (1 - self.beta)
        weight = torch.where(present, 1 / effective.clamp(min=1), 0.0)
        self.weight = (weight * present.sum() / weight.sum()).float()

    def forward(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean over the batch of weight times cross-entropy."""
        if self.weight is None:
            raise RuntimeError("setup(class_counts) must come before a class-balanced loss")
        return F.cross_entropy(logits.float(), target_of(batch), self.weight, reduction="none").mean()


class SoftCrossEntropy(ExpressionLoss):
    """Cross-entropy to a distribution of votes, Barsoum et al., arXiv 1608.01041: -sum_k q_k log p_k."""

    takes_mixed = splits = True  # mixing blends the votes as it does the labels

    def forward(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean over the batch.

        Raises:
            UserError: The data set has no vote distributions.
        """
        if "soft" not in batch:
            raise UserError(
                "loss=soft needs vote distributions, which this data set does not have: "
                "use data=ferplus, or loss=cross_entropy"
            )
        return F.cross_entropy(logits.float(), batch["soft"].float())


class MultiTarget(ExpressionLoss):
    """Any of several classes is right, Barsoum et al., arXiv 1608.01041, section 3: -log max_k t_k p_k, t_k 0 or 1."""

    splits = True

    def forward(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean over the batch.

        Raises:
            UserError: The data set does not say which classes are right.
        """
        if "accepted" not in batch:
            raise UserError(
                "loss=multi_target needs images of which several classes may be right: use data=ferplus "
                "data.mode=multi_target, or loss=cross_entropy"
            )
        log_p = logits.float().log_softmax(1)
        return -log_p.masked_fill(~batch["accepted"], -torch.inf).amax(1).mean()
