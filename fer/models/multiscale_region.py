"""Multi-scale region network: expression from the organs, the face and the whole image.

Zhang N. et al., "A Multi-scale Attention-based Facial Emotion Recognition Method Based on Deep Learning",
Instrumentation 9(3), 2022. A Faster R-CNN style detector on a feature pyramid finds face, eyes, nose and mouth; crops
of the finest level describe them. 36,977,545 parameters at 7 classes.
"""

from typing import Any, Literal, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou  # type: ignore[import-untyped]

from fer.errors import UserError
from fer.layers.boxes import decode
from fer.layers.region_loss import head_loss, proposal_loss
from fer.layers.region_pyramid import STRIDES, FeaturePyramid, RegionHead, RegionProposals, ResidualBlock, crop
from fer.models.base import ExpressionModule, ModuleOptions
from fer.models.pretrained import timm_network

FACE, EYE, NOSE, MOUTH = 1, 2, 3, 4  # kinds of regions, 0 being background
REGIONS = (FACE, EYE, EYE, NOSE, MOUTH)  # the five of an image: face, left eye, right eye, nose, mouth
ORGAN_CROP, FACE_CROP = 14, 56


class Regions(NamedTuple):
    """The five regions of each image.

    Attributes:
        boxes: (B, 5, 4) corners in pixels of the image; the whole image where a region is missing.
        present: (B, 5) whether there is one.
    """

    boxes: Tensor
    present: Tensor


class MultiscaleRegionNetwork(nn.Module):
    """Backbone, pyramid, detector, three scales, classifier.

    Args:
        backbone: A timm network giving its maps at an 8th, a 16th and a 32nd of the image.
        num_classes: Size of the output.
        image_size: Side of the image, a multiple of 32.
        detector: Find regions; without it the whole image alone is described.
        width: Channels of the pyramid.
        proposals: Boxes the region head judges.
        score: Probability from which on a region counts as found.
        dropout: Before the classifier.
    """

    kinds: Tensor

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        image_size: int,
        detector: bool,
        width: int,
        proposals: int,
        score: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = FeaturePyramid(backbone.feature_info.channels(), width, finest_only=not detector)
        self.image_size, self.score, self.detector = image_size, score, detector
        self.whole = ResidualBlock(width)
        if detector:
            self.proposals = RegionProposals(width, image_size, proposals)
            self.head = RegionHead(width, classes=MOUTH)
            self.organ = nn.Sequential(nn.Conv2d(width, width, 1), ResidualBlock(width))
            self.face = nn.Sequential(nn.Conv2d(width, width, 1), ResidualBlock(width))
            self.register_buffer("kinds", torch.tensor(REGIONS), persistent=False)
        described = len(REGIONS) + 1 if detector else 1
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(described * width, num_classes))

    def forward_maps(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> P3 to P7."""
        maps: list[Tensor] = self.pyramid(self.backbone(image))
        return maps

    @torch.no_grad()
    def detect(self, maps: list[Tensor]) -> Regions:
        """Find the best face, and the best two eyes, nose and mouth whose centres lie in it."""
        rois = self.proposals.propose(*self.proposals(maps))
        logits, codes = self.head(maps, rois)
        scores = logits.softmax(2)
        boxes = decode(codes, rois[:, :, None], self.image_size)  # (B, R, kinds, 4)

        def best(kind: int, allowed: Tensor) -> tuple[Tensor, Tensor]:
            score, place = (scores[:, :, kind] * allowed).max(1)
            box = boxes[:, :, kind - 1].gather(1, place[:, None, None].expand(-1, 1, 4)).squeeze(1)
            return box, score >= self.score

        everywhere = torch.ones_like(scores[:, :, 0])
        face, has_face = best(FACE, everywhere)
        face = torch.where(has_face[:, None], face, self._whole_image(face))

        def inside(kind: int) -> Tensor:
            centre = (boxes[:, :, kind - 1, :2] + boxes[:, :, kind - 1, 2:]) / 2
            within: Tensor = ((centre >= face[:, None, :2]) & (centre <= face[:, None, 2:])).all(2)
            return within

        one, has_one = best(EYE, inside(EYE))
        apart = box_iou(boxes[:, :, EYE - 1], one[:, None]).squeeze(2) < 0.3
        other, has_other = best(EYE, inside(EYE) & apart)
        # The eyes are told apart by their place; a single one by the side of the face it is on.
        middle = torch.where(has_other, other[:, 0] + other[:, 2], face[:, 0] + face[:, 2])
        left = (one[:, 0] + one[:, 2] <= middle)[:, None]
        eyes = torch.stack([torch.where(left, one, other), torch.where(left, other, one)], dim=1)
        has_pair = torch.stack([has_one, has_other], dim=1)
        has_eyes = (has_pair & left) | (has_pair.flip(1) & ~left)

        nose, has_nose = best(NOSE, inside(NOSE))
        mouth, has_mouth = best(MOUTH, inside(MOUTH))
        found = torch.cat([face[:, None], eyes, nose[:, None], mouth[:, None]], dim=1)
        present = torch.cat([has_face[:, None], has_eyes, has_nose[:, None], has_mouth[:, None]], dim=1)
        return Regions(torch.where(present[..., None], found, self._whole_image(found)), present)

    def _whole_image(self, like: Tensor) -> Tensor:
        return like.new_tensor([0.0, 0.0, self.image_size, self.image_size]).expand_as(like)

    def describe(self, maps: list[Tensor], regions: Regions | None) -> Tensor:
        """Organs, face and whole image from P3: (B, 6 * width), zeros for an organ that is missing.

        Args:
            maps: P3 to P7.
            regions: Where to look; None describes the whole image alone, (B, width).
        """
        fine = maps[0]
        whole: Tensor = self.whole(fine).mean((2, 3))
        if regions is None:
            return whole
        organs = self.organ(crop(fine, regions.boxes[:, 1:], STRIDES[0], ORGAN_CROP)).mean((2, 3))
        organs = organs.view(fine.shape[0], len(REGIONS) - 1, -1) * regions.present[:, 1:, None]
        face = self.face(crop(fine, regions.boxes[:, :1], STRIDES[0], FACE_CROP)).mean((2, 3))
        return torch.cat([organs.flatten(1), face, whole], dim=1)

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 6 * width), with regions as detected."""
        maps = self.forward_maps(image)
        return self.describe(maps, self.detect(maps) if self.detector else None)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        logits: Tensor = self.classifier(self.forward_features(image))
        return logits

    def detection_loss(self, maps: list[Tensor], truth: Regions, gamma: float) -> Tensor:
        """Losses of proposals and region head against known regions."""
        logits, codes = self.proposals(maps)
        loss = proposal_loss(logits, codes, self.proposals.anchors, truth.boxes, truth.present, gamma)
        rois = torch.cat([self.proposals.propose(logits, codes), jittered(truth.boxes, self.image_size)], dim=1)
        kinds, corrections = self.head(maps, rois)
        return loss + head_loss(kinds, corrections, rois, truth.boxes, truth.present, self.kinds, gamma)


def jittered(boxes: Tensor, image_size: int, share: float = 0.1) -> Tensor:
    """Boxes (..., 4) with centre and sides changed by up to ``share`` of the sides."""
    code = (2 * torch.rand_like(boxes) - 1) * share
    return decode(torch.cat([code[..., :2], (1 + code[..., 2:]).log()], dim=-1), boxes, image_size)


class MultiscaleRegion(ExpressionModule):
    """`MultiscaleRegionNetwork` on the bench.

    Training needs ``box`` (B, 4) and ``organ_boxes`` (B, 4, 4) in the batch, x, y, width, height in pixels of the
    input, organs in the order left eye, right eye, nose, mouth, NaN where missing: the pseudo-labels of the paper.

    Args:
        backbone: Any timm network with maps at an 8th, a 16th and a 32nd of the image.
        pretrained: Start from published weights.
        rois: ``detector``: regions as found by the network itself; ``none``: the whole image alone, which shows what
            the regions are worth.
        width: As in `MultiscaleRegionNetwork`, and so are the next three.
        proposals: Boxes judged.
        score: Threshold of a region.
        dropout: Before the classifier.
        gamma: Focal exponent of the detector; the expression loss is the injected one.
        detector_epochs: Epochs in which the detector alone is trained.

    Raises:
        UserError: The image is not a multiple of 32 pixels.
    """

    network: MultiscaleRegionNetwork

    def __init__(
        self,
        backbone: str,
        pretrained: bool,
        rois: Literal["detector", "none"],
        width: int,
        proposals: int,
        score: float,
        dropout: float,
        gamma: float,
        detector_epochs: int,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(**options)
        if self.image_size % 32:
            raise UserError(
                f"model=multiscale_region needs model.image_size to be a multiple of 32, got {self.image_size}"
            )
        body, self.weights = timm_network(backbone, pretrained, {"features_only": True, "out_indices": (-3, -2, -1)})
        self.network = MultiscaleRegionNetwork(
            body, self.num_classes, self.image_size, rois == "detector", width, proposals, score, dropout
        )
        self.gamma, self.detector_epochs = gamma, detector_epochs
        self.takes_mixed = rois == "none"  # a blend of two faces has no regions

    @property
    def cam_layer(self) -> nn.Module:
        """The backbone's last stage."""
        last: nn.Module = list(self.network.backbone.children())[-1]
        return last

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Detection against the known regions; from ``detector_epochs`` on, expression from the same regions, jittered.

        Raises:
            UserError: The data has no known regions.
        """
        if not self.network.detector:
            return super().loss(batch)
        truth = self._truth(batch)
        maps = self.network.forward_maps(batch["image"])
        seen = Regions(
            torch.where(truth.present[..., None], jittered(truth.boxes, self.image_size), truth.boxes), truth.present
        )
        logits: Tensor = self.classify(self.network.describe(maps, seen))
        joint = float(self.current_epoch >= self.detector_epochs)
        expression: Tensor = self.loss_function(logits, batch)
        return self.network.detection_loss(maps, truth, self.gamma) + joint * expression, logits

    def _truth(self, batch: dict[str, Tensor]) -> Regions:
        """The known regions as corners; the whole image stands for a missing face."""
        if "box" not in batch or "organ_boxes" not in batch:
            raise UserError(
                "model=multiscale_region learns from face and organ boxes, which this data set does not give: "
                "use data that has them, or model.rois=none"
            )
        boxes = torch.cat([batch["box"][:, None], batch["organ_boxes"]], dim=1)
        corners = torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=2).clamp(0, self.image_size)
        present = boxes.isfinite().all(2) & (corners[..., 2:] - corners[..., :2] >= 1).all(2)
        whole = corners.new_tensor([0.0, 0.0, self.image_size, self.image_size]).expand_as(corners)
        return Regions(torch.where(present[..., None], corners, whole), present)
