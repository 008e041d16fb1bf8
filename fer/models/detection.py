"""Finding every face and naming its expression: known faces, head, loss, duplicates, and the module that reports it."""

import abc
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou, generalized_box_iou_loss, nms  # type: ignore[import-untyped]

from fer.detection_metrics import Image, detection_scores
from fer.errors import UserError
from fer.layers.anchors import CLOSE, AnchorGrid
from fer.layers.regions import whole_image
from fer.metrics import Array
from fer.models.base import Batch, ExpressionModule, ModuleOptions, Stage


class Faces(NamedTuple):
    """What was found in one image, best first.

    Attributes:
        boxes: (n, 4) corners x1, y1, x2, y2 in pixels of the network's input.
        labels: (n,) expression.
        scores: (n,) confidence.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor


class KnownFaces(NamedTuple):
    """The labelled faces of a batch.

    Attributes:
        boxes: (B, F, 4) corners in pixels of the input; an arbitrary one where there is none.
        labels: (B, F) expression, -1 where not known.
        present: (B, F) whether there is a box.
        complete: (B,) whether detections beside the boxes are wrong: not so where the only labelled face has no box.
        single: (B,) whether the image has one label: its faces all show the same expression.
    """

    boxes: Tensor
    labels: Tensor
    present: Tensor
    complete: Tensor
    single: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Read ``face_boxes`` and ``face_labels``, or ``box`` and ``label`` where each image has one labelled face.

        Raises:
            UserError: The data has neither.
        """
        if "face_boxes" in batch:
            boxes, labels = batch["face_boxes"], batch["face_labels"]
        elif "box" in batch:
            boxes, labels = batch["box"][:, None], batch["label"][:, None]
        else:
            raise UserError(
                "model.detection=true learns from face boxes, which this data set does not give: "
                "use data that has them, such as data=scenes, or model.detection=false"
            )
        corners = torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)
        present = boxes.isfinite().all(-1) & (boxes[..., 2:] > 0).all(-1)
        corners = torch.where(present[..., None], corners, whole_image(corners, 1))
        labelled = labels >= 0
        complete = present.any(1) | ~labelled.any(1)
        lowest = torch.where(labelled, labels, labels.amax(1, keepdim=True)).amin(1)
        return cls(corners, labels, present, complete, labelled.any(1) & (lowest == labels.amax(1)))


class DetectionHead(nn.Module):
    """Two 1x1 convolutions on the patch tokens: for each anchor K expressions, a confidence and a box.

    Args:
        dim: Of the tokens.
        hidden: Channels between.
        num_classes: K.
        anchors: A pairs of width and height in pixels of the input.
        cells: Of a side of the grid of predictions; less than the tokens' own averages them.
        image_size: Side of the input in pixels.
    """

    def __init__(
        self, dim: int, hidden: int, num_classes: int, anchors: list[list[float]], cells: int, image_size: int
    ) -> None:
        super().__init__()
        self.grid = AnchorGrid(anchors, cells, image_size)
        self.num_classes = num_classes
        self.hidden = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GELU())
        self.out = nn.Conv2d(hidden, len(anchors) * (num_classes + 5), 1)
        # Every prediction begins as background with probability 0.99, or their number drowns the few faces.
        with torch.no_grad():
            self.out.bias.view(len(anchors), -1)[:, num_classes] = -4.6  # type: ignore[union-attr]

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S * S, dim) -> (B, N, K + 5): expression logits, confidence logit, t_x, t_y, t_w, t_h, in float32."""
        side = round(tokens.shape[1] ** 0.5)
        x = tokens.transpose(1, 2).reshape(tokens.shape[0], -1, side, side)
        if self.grid.cells != side:
            x = F.adaptive_avg_pool2d(x, self.grid.cells)
        out: Tensor = self.out(self.hidden(x)).permute(0, 2, 3, 1)
        out = out.reshape(out.shape[0], -1, self.num_classes + 5)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def faces(self, raw: Tensor, iou: float, most: int) -> list[Faces]:
        """Decode, score by confidence times expression, and drop duplicates whatever their expression.

        Args:
            raw: (B, N, K + 5).
            iou: Overlap of duplicates.
            most: Faces kept of an image.
        """
        best, labels = raw[..., : self.num_classes].softmax(-1).max(-1)
        scores = raw[..., self.num_classes].sigmoid() * best
        boxes = self.grid.decode(raw[..., self.num_classes + 1 :]).clamp(0, self.grid.image_size)
        kept = [nms(b, s, iou)[:most] for b, s in zip(boxes, scores, strict=True)]
        return [Faces(boxes[i, k], labels[i, k], scores[i, k]) for i, k in enumerate(kept)]


class DetectionLoss(nn.Module):
    """Five terms, summed over the responsible predictions (background: over the others) and divided by their number.

    Args:
        expression: Weight of the cross-entropy of the expression.
        confidence: Of the confidence of responsible predictions.
        background: Of that of all others.
        centre: Of the smooth L1 distance of the centre, in cells.
        size: Of that of width and height, as logarithms.
        box_loss: ``smooth_l1``, or ``giou``: 1 - GIoU in place of centre and size.
        giou: Its weight.
    """

    def __init__(
        self,
        expression: float,
        confidence: float,
        background: float,
        centre: float,
        size: float,
        box_loss: Literal["smooth_l1", "giou"],
        giou: float,
    ) -> None:
        super().__init__()
        if box_loss not in ("smooth_l1", "giou"):
            raise UserError(f"model.detection_loss.box_loss={box_loss} is not one of smooth_l1, giou")
        self.weights = {"expression": expression, "confidence": confidence, "background": background}
        self.weights |= {"giou": giou} if box_loss == "giou" else {"centre": centre, "size": size}
        self.box_loss = box_loss

    def terms(self, head: DetectionHead, raw: Tensor, known: KnownFaces) -> dict[str, Tensor]:
        """Each term before its weight, for raw predictions (B, N, K + 5)."""
        raw, k, grid = raw.float(), head.num_classes, head.grid
        owner, close = grid.responsible(known.boxes, known.present)
        face = owner.clamp(min=0)
        boxes = known.boxes.gather(1, face[..., None].expand(-1, -1, 4))
        label = known.labels.gather(1, face)
        found = grid.decode(raw[..., k + 1 :])
        with torch.no_grad():
            near = ((box_iou(found, known.boxes) * known.present[:, None]) > CLOSE).any(2)
        positive = (owner >= 0) & known.complete[:, None]
        negative = (owner < 0) & ~close & ~near & known.complete[:, None]
        count = positive.sum().clamp(min=1)

        def over(chosen: Tensor, each: Tensor) -> Tensor:
            return torch.where(chosen, each, 0).sum() / count

        surprise = F.cross_entropy(raw[..., :k].transpose(1, 2), label, ignore_index=-1, reduction="none")
        terms = {
            "expression": over(positive, surprise),
            "confidence": over(positive, F.softplus(-raw[..., k])),
            "background": over(negative, F.softplus(raw[..., k])),
        }
        if self.box_loss == "giou":
            return terms | {"giou": over(positive, generalized_box_iou_loss(found, boxes))}
        centre, growth = grid.place(boxes)
        shift, scale = raw[..., k + 1 : k + 3].sigmoid(), raw[..., k + 3 :]
        return terms | {
            "centre": over(positive, F.smooth_l1_loss(shift, centre, reduction="none").sum(-1)),
            "size": over(positive, F.smooth_l1_loss(scale, growth, reduction="none").sum(-1)),
        }

    def forward(self, head: DetectionHead, raw: Tensor, known: KnownFaces) -> Tensor:
        """The weighted sum of `terms`."""
        terms = self.terms(head, raw, known)
        return torch.stack([weight * terms[name] for name, weight in self.weights.items()]).sum()


class DetectorOptions(ModuleOptions):
    """Further constructor arguments of modules that find faces.

    Attributes:
        detection: find every face of an image; False leaves an ordinary classifier.
        draw_score: confidence from which on a face is drawn.
        timed_images: images whose detection is timed after the test.
    """

    detection: bool
    draw_score: float
    timed_images: int


class FaceDetector(ExpressionModule):
    """An expression module that can find faces beside classifying the image; its epoch is chosen by mAP@0.5 then."""

    def __init__(
        self, *, detection: bool, draw_score: float, timed_images: int, **options: Unpack[ModuleOptions]
    ) -> None:
        super().__init__(**options)
        self.detection, self.draw_score, self.timed_images = detection, draw_score, timed_images
        self.seen: dict[str, list[Image]] = {"val": [], "test": []}
        if detection:
            self.monitor, self.takes_mixed = "val/map50", False  # a blend of two faces has no one box

    @classmethod
    def from_data(cls, options: Mapping[str, Any], data: Any) -> dict[str, Any]:
        """No values, but a look whether the test will show images in one view.

        Raises:
            UserError: It will not.
        """
        if options["detection"] and data.tta != "none":
            raise several_views("model.detection=true")
        return {}

    @property
    def splits(self) -> bool:
        """Not with detection, whose losses are means over the faces of the batch."""
        return not self.detection and super().splits

    @abc.abstractmethod
    def find(self, image: Tensor) -> tuple[Tensor, list[Faces]]:
        """(B, 3, H, W) -> logits (B, K) of the images, and the faces of each."""

    def single_loss(self, logits: Tensor, batch: Batch, single: Tensor) -> Tensor:
        """The injected loss over the images (B,) bool that have one label; 0 where there are none."""
        rows = single.nonzero().squeeze(1)
        if not len(rows):
            return 0 * logits.float().sum()
        loss: Tensor = self.loss_function(logits[rows], {key: values[rows] for key, values in batch.items()})
        return loss

    def _evaluate(self, batch: Batch, stage: Literal["val", "test"]) -> Tensor:
        if not self.detection:
            return super()._evaluate(batch, stage)
        if batch["image"].ndim != 4:
            raise several_views("model.detection=true")
        logits, faces = self.find(batch["image"])
        self.note(faces, batch, stage)
        return self._count(logits.float().softmax(1), batch, stage)

    def note(self, faces: list[Faces], batch: Batch, stage: Literal["val", "test"]) -> None:
        """Keep what was found in a batch, and what is known of it, for the scores."""
        known = KnownFaces.of(batch)
        counted = known.present & (known.labels >= 0)
        for i, image in enumerate(faces):
            found = (x[known.complete[i].expand(len(x))] for x in image)
            true = (known.boxes[i, counted[i]], known.labels[i, counted[i]])
            self.seen[stage].append(Image(*(numbers(x) for x in (*found, *true))))

    def reset(self, stage: Stage) -> None:
        """Forget the images seen too."""
        super().reset(stage)
        if stage != "train":
            self.seen[stage].clear()

    def scores(self, stage: Stage) -> dict[str, float]:
        """Those of the image's label, and with detection those of its faces."""
        scores = super().scores(stage)
        if self.detection and stage != "train":
            scores |= detection_scores(self.seen[stage], self.class_names, self.draw_score)
        return scores


def several_views(what: str) -> UserError:
    """The sentence for an option that cannot average over views."""
    return UserError(f"{what} looks at one view of an image: set data.tta=none")


def numbers(values: Tensor) -> Array:
    """The tensor's values in numpy, on the CPU, floats as float64."""
    out = values.detach().cpu()
    return (out.double() if out.is_floating_point() else out).numpy()
