"""Self-distillation without labels: a student predicts, from any crop, what its own moving average says of another.

DINO: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, arXiv 2104.14294. Two large
crops go to both networks, further small ones to the student alone; the teacher's outputs are centred and sharpened,
which keeps both from saying the same of every image; the teacher's weights follow the student's.

Deviations: crops are square and come without blur and solarisation (`fer.data.batched.BatchAugment`); weight decay is
constant; batch norms of the teacher use averaged statistics, not those of the batch.
"""

import copy
import math
from dataclasses import replace
from typing import Any, Unpack

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from fer.data.batched import BatchAugment
from fer.errors import UserError
from fer.models.pretrained import timm_network
from fer.pretraining.base import (
    Batch,
    Normalise,
    Pretraining,
    TaskOptions,
    backbone_groups,
    backbone_usage,
    image_options,
)
from fer.pretraining.pictures import image_grid

LARGE = 2  # large crops of an image
SHOWN, NEIGHBOURS = 8, 4  # images of the picture, and the nearest of each


class ProjectionHead(nn.Module):
    """DINO's head: three linear layers to a unit vector, then its cosine with each of K learned directions."""

    def __init__(self, width: int, hidden: int, bottleneck: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.directions = nn.Parameter(torch.empty(outputs, bottleneck))
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) -> (B, outputs)."""
        return F.linear(F.normalize(self.layers(features), dim=1), F.normalize(self.directions, dim=1))


class Branch(nn.Module):
    """A backbone and its head."""

    def __init__(self, backbone: Any, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, outputs)."""
        output: Tensor = self.head(self.backbone(image))
        return output


class SelfDistillation(Pretraining):
    """DINO on the bench. Keeps the teacher's backbone after the last epoch: the loss says little of its worth.

    Args:
        backbone: Any timm network; one of a fixed image size needs ``small_size`` equal to ``image_size``.
        pretrained: Where it starts, as in `timm_network`.
        mean: Normalisation of the backbone's input.
        std: The same.
        large_area: Smallest and largest share of the image that a large crop keeps; its side is ``image_size``.
        small_area: The same of a small crop.
        crop: What else happens to a crop.
        small_crops: How many small crops; 0 leaves them out.
        small_size: Their side in pixels, a multiple of the backbone's patch.
        hidden: Of the head.
        bottleneck: Width of the head's unit vector.
        outputs: Of the head.
        student_temperature: Of the student's softmax.
        teacher_temperature: Of the teacher's, at the start and after ``temperature_epochs``.
        temperature_epochs: Epochs of the rise between them.
        teacher_momentum: Share of the teacher's weights that a step keeps, at the start; rises to 1 by half a cosine.
        centre_momentum: Share of the centre that a step keeps.
        freeze_directions: Epochs in which the head's last layer stays as it is.
        drop_path: Stochastic depth of the student.
        layer_decay: Learning rate of a layer over the next one's.
        options: See `TaskOptions`.

    Raises:
        UserError: The backbone cannot take small crops of that size.
    """

    file = "backbone.safetensors"
    picture = "neighbours.png"
    monitor = None
    centre: Tensor

    def __init__(
        self,
        backbone: str,
        pretrained: bool | str,
        mean: list[float],
        std: list[float],
        large_area: list[float],
        small_area: list[float],
        crop: BatchAugment,
        small_crops: int,
        small_size: int,
        hidden: int,
        bottleneck: int,
        outputs: int,
        student_temperature: float,
        teacher_temperature: list[float],
        temperature_epochs: int,
        teacher_momentum: float,
        centre_momentum: float,
        freeze_directions: int,
        drop_path: float,
        layer_decay: float,
        **options: Unpack[TaskOptions],
    ) -> None:
        super().__init__(**options)
        settings = {"num_classes": 0, **image_options(backbone, self.image_size, several_sizes=True)}
        rates = {"drop_path_rate": drop_path} if drop_path > 0 else {}
        network, self.weights = timm_network(backbone, pretrained, {**settings, **rates}, "task.pretrained")
        self.student = Branch(network, ProjectionHead(network.head_hidden_size, hidden, bottleneck, outputs))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.register_buffer("centre", torch.zeros(outputs))
        self.normalise = Normalise(mean, std)
        self.architecture, self.layer_decay = backbone.partition(".")[0], layer_decay
        large, small = (replace(crop, resized_crop=(least, most)) for least, most in (large_area, small_area))
        self.crops = [(large, self.image_size)] * LARGE + [(small, small_size)] * small_crops
        self.student_temperature, self.teacher_temperature = student_temperature, tuple(teacher_temperature)
        self.temperature_epochs, self.freeze_directions = temperature_epochs, freeze_directions
        self.teacher_momentum, self.centre_momentum = teacher_momentum, centre_momentum
        patch = network.patch_embed.patch_size[0] if hasattr(network, "patch_embed") else 1
        fixed = hasattr(network, "patch_embed") and "dynamic_img_size" not in settings
        if small_crops and (small_size % patch or (fixed and small_size != self.image_size)):
            wanted = f"{self.image_size}, the only size it takes" if fixed else f"a multiple of its patch of {patch}"
            raise UserError(f"task.small_size={small_size}: for {backbone} it must be {wanted}")

    def kept(self) -> nn.Module:
        """The teacher's backbone."""
        network: nn.Module = self.teacher.backbone
        return network

    def usage(self, path: str) -> list[str]:
        """As a backbone."""
        return backbone_usage(self.kept(), self.architecture, path)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D), the student's features, which a step has to make."""
        features: Tensor = self.student.backbone(self.normalise(image))
        return features

    def train(self, mode: bool = True) -> "SelfDistillation":
        """The teacher stays in eval mode: no stochastic depth, averaged statistics."""
        super().train(mode)
        self.teacher.eval()
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The student's backbone with layer decay; its head."""
        return backbone_groups(self.student.backbone, list(self.student.head.parameters()), self.layer_decay)

    # -- the loss -------------------------------------------------------------------------------------------------

    def views(self, batch: Batch, epoch: int) -> list[Tensor]:
        """Normalised crops, each (B, 3, H, H), the large ones first: a pure function of seed, epoch and image."""
        crops = []
        for number, (augment, size) in enumerate(self.crops):
            # Every crop of an image has an epoch's random numbers of its own.
            draw, side = epoch * len(self.crops) + number, batch["image"].shape[-1]
            crop, _ = augment(batch["image"], batch["index"], draw, self.seed, side, size)
            crops.append(self.normalise(crop))
        return crops

    def temperature(self, epoch: int) -> float:
        """The teacher's temperature: a linear rise, then constant."""
        start, end = self.teacher_temperature
        return start + (end - start) * min(epoch / max(self.temperature_epochs, 1), 1.0)

    def momentum(self, step: int) -> float:
        """Share of the teacher's weights that the update after this step keeps."""
        return 1 - (1 - self.teacher_momentum) * (1 + math.cos(math.pi * step / self.total_steps)) / 2

    def distilled(self, student: list[Tensor], teacher: list[Tensor], temperature: float) -> dict[str, Tensor]:
        """Cross-entropy between the teacher's view of one crop and the student's of another, over all such pairs.

        Args:
            student: (B, K) outputs for each crop.
            teacher: (B, K) outputs for the large crops, which are the first.
            temperature: of the teacher.

        Returns:
            (B,) each: ``loss``, and ``entropy``, the teacher's own; 0 or log K on all images is a collapse.
        """
        targets = [((out.float() - self.centre) / temperature).softmax(1) for out in teacher]
        guesses = [(out.float() / self.student_temperature).log_softmax(1) for out in student]
        pairs = [
            -(target * guess).sum(1) for i, target in enumerate(targets) for j, guess in enumerate(guesses) if i != j
        ]
        entropy = [-(target * target.clamp_min(1e-12).log()).sum(1) for target in targets]
        return {"loss": torch.stack(pairs).mean(0), "entropy": torch.stack(entropy).mean(0)}

    def measures(self, batch: Batch, train: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        """DINO's loss; evaluation crops each image as in epoch 0."""
        crops = self.views(batch, self.current_epoch if train else 0)
        count = len(crops[0])
        with torch.no_grad():
            teacher = list(self.teacher(torch.cat(crops[:LARGE])).split(count))
        student = list(self.student(torch.cat(crops[:LARGE])).split(count))
        if crops[LARGE:]:
            student += self.student(torch.cat(crops[LARGE:])).split(count)
        measures = self.distilled(student, teacher, self.temperature(self.current_epoch))
        if train:
            self.update_centre(torch.cat(teacher))
        return measures, None

    # -- the teacher ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_centre(self, outputs: Tensor) -> None:
        """Move the centre towards the mean of (M, K) teacher outputs."""
        self.centre.lerp_(outputs.float().mean(0), 1 - self.centre_momentum)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the teacher's weights, and the statistics of batch norms, towards the student's."""
        for mine, theirs in zip(self.teacher.state_dict().values(), self.student.state_dict().values(), strict=True):
            mine.lerp_(theirs, 1 - momentum) if mine.is_floating_point() else mine.copy_(theirs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The student's step, then the teacher's: before a checkpoint can be written between them."""
        step = self.trainer.global_step
        super().optimizer_step(*args, **kwargs)
        self.update_teacher(self.momentum(step))

    def on_after_backward(self) -> None:
        """Leave the head's last layer out in the first epochs, as DINO does for stability."""
        if self.current_epoch < self.freeze_directions:
            self.student.head.directions.grad = None

    def draw(self, batch: Batch) -> Figure:
        """Images of the batch, and those whose features are nearest."""
        features = F.normalize(self.teacher.backbone(self.normalise(batch["image"])).float(), dim=1)
        nearest = (features @ features.T).fill_diagonal_(-2).topk(min(NEIGHBOURS, len(features) - 1)).indices[:SHOWN]
        rows = [batch["image"][:SHOWN], *(batch["image"][nearest[:, k]] for k in range(nearest.shape[1]))]
        names = ["image", *(f"nearest {k + 1}" for k in range(nearest.shape[1]))]
        return image_grid(rows, names, f"nearest faces by features of {self.architecture}, self-distilled")
