"""Losses that look at features besides logits; each adds a weighted term to an injected classification loss."""

import abc
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from fer.errors import UserError
from fer.models.losses import Batch, Classifier, ExpressionLoss


class AuxiliaryLoss(ExpressionLoss):
    """``classification + weight * another term``, the term needing more of the module than its logits."""

    def __init__(self, classification: ExpressionLoss, weight: float) -> None:
        super().__init__()
        self.classification = classification
        self.weight = weight

    def setup(self, class_counts: Tensor) -> None:
        """Hand the counts to the classification loss."""
        self.classification.setup(class_counts)

    def forward(self, logits: Tensor, batch: Batch) -> Tensor:
        """Refuse: logits alone are not enough.

        Raises:
            UserError: Always; the model computes its loss from logits alone.
        """
        raise UserError(f"loss {type(self).__name__} needs features, which this model's own loss does not give it")


class FeatureLoss(AuxiliaryLoss, abc.ABC):
    """An auxiliary loss whose term is one of the features and labels of the batch."""

    @abc.abstractmethod
    def term(self, features: Tensor, label: Tensor, num_classes: int) -> Tensor:
        """The scalar added for float32 features (B, D)."""

    def objective(self, module: Classifier, batch: Batch) -> tuple[Tensor, Tensor]:
        """One pass through the module, its features shared by both terms."""
        features = module.features(batch["image"])
        logits = module.classify(features)
        term = self.term(features.float(), batch["label"], logits.shape[1])
        return self.classification(logits, batch) + self.weight * term, logits


class Center(FeatureLoss):
    """Center loss: Wen et al., ECCV 2016: half the mean squared distance to the class centre.

    The centres are no parameters: after each training batch they move by ``rate`` towards the features of their class,
    c_j -= rate * sum_i (c_j - x_i) / (1 + n_j), equation 4.
    """

    centres: Tensor

    def __init__(self, classification: ExpressionLoss, weight: float, rate: float) -> None:
        super().__init__(classification, weight)
        self.rate = rate
        self.register_buffer("centres", torch.empty(0))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """Take the centres' shape from the checkpoint, since it is known only from the first batch on."""
        if f"{prefix}centres" in state_dict:
            self.centres = torch.empty_like(state_dict[f"{prefix}centres"], device=self.centres.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def term(self, features: Tensor, label: Tensor, num_classes: int) -> Tensor:
        """Pull towards the centres as they were before this batch."""
        if not len(self.centres):
            self.centres = features.new_zeros(num_classes, features.shape[1])
        distance = features - self.centres[label]
        if self.training:
            self._move(-distance.detach(), label)
        return 0.5 * distance.square().sum(1).mean()

    @torch.no_grad()
    def _move(self, difference: Tensor, label: Tensor) -> None:
        """Move the centres, given c_y - x for each image."""
        self.centres = self.centres - self.rate * self._step(difference, label)

    def _step(self, difference: Tensor, label: Tensor) -> Tensor:
        total = torch.zeros_like(self.centres).index_add_(0, label, difference)
        count = torch.zeros(len(self.centres), 1, device=label.device).index_add_(
            0, label, torch.ones(len(label), 1, device=label.device)
        )
        return total / (1 + count)


class Island(Center):
    """Island loss: Cai et al., FG 2018, arXiv 1710.03144: center loss plus ``push`` times the centres' nearness.

    sum_j sum_{k != j} (cos(c_j, c_k) + 1), which moves the centres apart; their step gains its gradient over K - 1.
    """

    def __init__(self, classification: ExpressionLoss, weight: float, rate: float, push: float) -> None:
        super().__init__(classification, weight, rate)
        self.push = push

    def term(self, features: Tensor, label: Tensor, num_classes: int) -> Tensor:
        """Center loss and the centres' nearness, as they were before this batch."""
        before = self.centres if len(self.centres) else features.new_zeros(num_classes, features.shape[1])
        return super().term(features, label, num_classes) + self.push * _nearness(before)

    def _step(self, difference: Tensor, label: Tensor) -> Tensor:
        with torch.enable_grad():
            centres = self.centres.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(_nearness(centres), centres)
        # Each pair stands twice in the sum, and the paper differentiates one of the two.
        return super()._step(difference, label) + self.push / (len(centres) - 1) * gradient / 2


def _nearness(centres: Tensor) -> Tensor:
    """Sum over ordered pairs of different (K, D) centres of their cosine plus 1."""
    squared = centres.square().sum(1, keepdim=True)
    # A class not met yet has its centre at 0, where a cosine has no gradient: it counts as orthogonal to all.
    unit = centres / torch.where(squared > 0, squared, 1.0).sqrt()
    pairs = len(centres) * (len(centres) - 1)
    return (unit @ unit.T).sum() - unit.square().sum() + pairs


class LocalityPreserving(FeatureLoss):
    """Locality-preserving loss: Li, Deng, Du, CVPR 2017 (DLP-CNN), equation 4.

    Half the mean squared distance of an image to the mean of its ``neighbours`` nearest of the same class in the batch.
    """

    def __init__(self, classification: ExpressionLoss, weight: float, neighbours: int) -> None:
        super().__init__(classification, weight)
        self.neighbours = neighbours

    def term(self, features: Tensor, label: Tensor, num_classes: int) -> Tensor:
        """Images alone of their class add nothing."""
        count = len(features)
        same = (label[:, None] == label) & ~torch.eye(count, dtype=torch.bool, device=label.device)
        distance = torch.cdist(features.detach(), features.detach()).masked_fill(~same, torch.inf)
        nearest = distance.topk(min(self.neighbours, count), largest=False)
        near = torch.zeros_like(distance).scatter_(1, nearest.indices, nearest.values.isfinite().float())
        mean = near @ features / near.sum(1, keepdim=True).clamp(min=1)
        apart = (features - mean).square().sum(1) * near.any(1)
        return 0.5 * apart.mean()


class FlipConsistency(AuxiliaryLoss):
    """Attention consistency under flips (EAC): Zhang et al., ECCV 2022, arXiv 2207.10299.

    ``classification + weight * mean (CAM(x) - flip CAM(flip x))^2``, CAM being the last map times the weights of the
    layer that classifies its mean, dropout left out; for models that have one.
    """

    def __init__(self, classification: ExpressionLoss, weight: float) -> None:
        super().__init__(classification, weight)
        self.takes_mixed, self.splits = classification.takes_mixed, classification.splits
        self.layer: str | None = None  # its name: the layer itself is the model's

    def attach(self, module: Classifier) -> None:
        """Find the layer.

        Raises:
            UserError: The model does not classify the mean of its last map by one linear layer.
        """
        self.layer = _classifying_layer(module)

    def objective(self, module: Classifier, batch: Batch) -> tuple[Tensor, Tensor]:
        """Two passes, of the images and of their mirror images."""
        if self.layer is None:
            raise RuntimeError("attach(module) must come before a loss of flip consistency")
        layer = module.get_submodule(self.layer)
        assert isinstance(layer, nn.Linear)
        features, last = _features_and_map(module, batch["image"])
        _, mirrored = _features_and_map(module, batch["image"].flip(3))
        logits = module.classify(features)
        cam, mirrored = (nn.functional.linear(x.permute(0, 2, 3, 1), layer.weight) for x in (last, mirrored))
        term = (cam - mirrored.flip(2)).float().square().mean()
        return self.classification(logits, batch) + self.weight * term, logits


def _features_and_map(module: Classifier, image: Tensor) -> tuple[Tensor, Tensor]:
    """What the classifier sees (B, D), and the last map (B, C, H, W)."""
    seen: list[Tensor] = []
    handle = module.cam_layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        features = module.features(image)
    finally:
        handle.remove()
    return features, seen[0]


@torch.no_grad()
def _classifying_layer(module: Classifier) -> str:
    """Name of the linear layer that, dropout left out, makes the logits of the last map's mean."""
    assert isinstance(module, nn.Module)
    device, was_training = next(module.parameters()).device, module.training
    module.eval()
    side = module.image_size
    image = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    features, last = _features_and_map(module, image)
    logits = module.classify(features)
    module.train(was_training)
    mean = last.mean((2, 3)) if last.ndim == 4 else None
    if mean is not None and mean.shape == features.shape and torch.allclose(mean, features, rtol=2e-6, atol=1e-6):
        layers: dict[str, nn.Module] = dict(module.named_modules())
        for name, layer in layers.items():
            fits = isinstance(layer, nn.Linear) and layer.in_features == features.shape[1]
            if fits and torch.equal(layer(features), logits):
                return name
    raise UserError(
        "loss=flip_consistency needs a model that classifies the mean of its last map by one linear layer: "
        "use model=cbam_resnet or a ResNet of model=timm"
    )


class MultiTask(AuxiliaryLoss):
    """Valence and arousal beside the expression: Kollias and Zafeiriou, BMVC 2019, arXiv 1910.04855.

    One linear layer on the features predicts both; it serves the training alone and is left out of the predictions.

    Args:
        classification: Loss of the expression.
        weight: Of the regression.
        regression: ``concordance``, 1 minus the mean concordance correlation coefficient over the batch's annotated
            images; ``smooth_l1``, their mean smooth absolute error.
    """

    def __init__(
        self, classification: ExpressionLoss, weight: float, regression: Literal["concordance", "smooth_l1"]
    ) -> None:
        super().__init__(classification, weight)
        if regression not in ("concordance", "smooth_l1"):
            raise UserError(f"loss.regression={regression} is not one of concordance, smooth_l1")
        self.regression = regression
        self.takes_mixed = classification.takes_mixed
        self.head: nn.Linear | None = None

    def attach(self, module: Classifier) -> None:
        """Make the layer, unless a checkpoint brought it."""
        if self.head is None:
            self.head = nn.Linear(module.feature_size(), 2)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """Take the layer's size from the checkpoint, for whoever loads one without training."""
        if f"{prefix}head.weight" in state_dict and self.head is None:
            self.head = nn.Linear(state_dict[f"{prefix}head.weight"].shape[1], 2)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def objective(self, module: Classifier, batch: Batch) -> tuple[Tensor, Tensor]:
        """One pass; images without annotation, NaN, count for the expression alone.

        Raises:
            UserError: The data set has no valence and arousal.
        """
        if "valence_arousal" not in batch:
            raise UserError(
                "loss=multi_task needs valence and arousal, which this data set does not have: "
                "use data=affectnet, or loss=cross_entropy"
            )
        if self.head is None:
            raise RuntimeError("attach(module) must come before a multi-task loss")
        features = module.features(batch["image"])
        logits = module.classify(features)
        annotated = batch["valence_arousal"].isfinite().all(1)
        predicted = self.head(features).float()[annotated]
        truth = batch["valence_arousal"][annotated]
        if self.regression == "concordance":
            term = 1 - concordance(predicted, truth).mean()
        else:
            term = smooth_l1_loss(predicted, truth, reduction="sum") / max(truth.numel(), 1)
        return self.classification(logits, batch) + self.weight * term, logits


def concordance(predicted: Tensor, truth: Tensor) -> Tensor:
    """Concordance correlation coefficient, Lin 1989, of each column of two (N, C) tensors; 0 for less than two rows.

    2 cov / (var_1 + var_2 + (mean_1 - mean_2)^2), with the variances over N.
    """
    if len(truth) < 2:
        return 0 * predicted.sum(0)
    apart = predicted.mean(0) - truth.mean(0)
    a, b = predicted - predicted.mean(0), truth - truth.mean(0)
    spread = a.square().mean(0) + b.square().mean(0) + apart.square()
    return 2 * (a * b).mean(0) / spread.clamp_min(1e-8)
