"""Mixup and cutmix: each training image blended with another one of its batch, and their labels likewise.

The numbers come from torch's global generator, which `fer.callbacks.Randomness` seeds before every batch: what is mixed
is a pure function of (seed, step, place in the step), so a resumed run sees the same mixtures.
"""

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.functional import one_hot
from torchvision.transforms import v2  # type: ignore[import-untyped]

from fer.errors import UserError
from fer.models.base import ExpressionModule

BLENDED = ("soft", "valence_arousal")  # what a batch may hold besides images and labels that blends with them


class Mixing(Callback):
    """Mixes a share of the training batches; where both kinds are on, a batch gets either with equal odds.

    Mixup (Zhang et al. 2018, arXiv 1710.09412) adds the images, cutmix (Yun et al. 2019, arXiv 1905.04899) pastes a
    rectangle. A mixed batch has ``target`` (B, K), the shares of the classes; ``label`` is the one of the larger share.

    Args:
        mixup: alpha of the Beta(alpha, alpha) the share is drawn from; 0 leaves mixup out.
        cutmix: the same for cutmix.
        probability: share of the batches that are mixed.
        off_last_epochs: epochs at the end that see plain images.

    Raises:
        UserError: a negative alpha or number of epochs, or a probability outside [0, 1].
    """

    def __init__(self, mixup: float, cutmix: float, probability: float, off_last_epochs: int) -> None:
        if min(mixup, cutmix, off_last_epochs) < 0 or not 0 <= probability <= 1:
            raise UserError(
                f"mix.mixup={mixup}, mix.cutmix={cutmix}, mix.off_last_epochs={off_last_epochs} must not be negative, "
                f"and mix.probability={probability} must lie between 0 and 1"
            )
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self.transforms = [kind(alpha=alpha) for kind, alpha in kinds if alpha > 0]
        self.probability, self.off_last_epochs = probability, off_last_epochs

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse a loss that needs one class per image, before the first step.

        Raises:
            UserError: the loss or the model cannot take shares of classes.
        """
        assert isinstance(pl_module, ExpressionModule)
        if self.transforms and not (pl_module.takes_mixed and pl_module.loss_function.takes_mixed):
            raise UserError(
                f"mix blends the labels of images, which {type(pl_module).__name__} with the loss "
                f"{type(pl_module.loss_function).__name__} cannot take: use mix=none, or a loss and a model that do, "
                "such as loss=cross_entropy"
            )

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Mix in place, here rather than in the step itself: SAM's second pass must see the same batch."""
        assert isinstance(pl_module, ExpressionModule)
        assert trainer.max_epochs is not None  # see fer.trainer.Trainer
        ending = trainer.max_epochs <= trainer.current_epoch + self.off_last_epochs
        if self.transforms and not ending:
            batch.update(self.mixed(batch, pl_module.num_classes))

    def mixed(self, batch: dict[str, Tensor], num_classes: int) -> dict[str, Any]:
        """What changes of a batch: nothing, or ``image``, ``label``, ``target`` and the shares the data has itself."""
        if torch.rand(()) >= self.probability:
            return {}
        transform = self.transforms[int(torch.randint(len(self.transforms), ()))]
        parts = {"target": one_hot(batch["label"], num_classes).float()}
        parts |= {key: batch[key] for key in BLENDED if key in batch}
        image, blended = transform(batch["image"], torch.cat(list(parts.values()), dim=1))
        split = blended.split([part.shape[1] for part in parts.values()], dim=1)
        changed = dict(zip(parts, split, strict=True))
        return {"image": image, "label": changed["target"].argmax(1), **changed}
