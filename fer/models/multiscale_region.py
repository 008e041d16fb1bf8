"""Multi-scale region network: expression from the organs, the face and the whole image.

Zhang N. et al., "A Multi-scale Attention-based Facial Emotion Recognition Method Based on Deep Learning",
Instrumentation 9(3), 2022. A Faster R-CNN style detector on a feature pyramid finds face, eyes, nose and mouth; crops
of the finest level describe them. 36,977,545 parameters at 7 classes.
"""

from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from fer.detection_metrics import Image, detection_scores
from fer.errors import UserError
from fer.layers.boxes import decode
from fer.layers.region_loss import head_loss, proposal_loss
from fer.layers.region_pyramid import STRIDES, FeaturePyramid, RegionHead, RegionProposals, ResidualBlock, crop
from fer.layers.regions import (
    FACE,
    KINDS,
    REGIONS,
    Judged,
    Regions,
    best_face,
    jittered,
    regions_of,
    whole_image,
    without_duplicates,
)
from fer.models.base import Batch, Stage
from fer.models.detection import DetectorOptions, FaceDetector, Faces, numbers
from fer.models.pretrained import timm_network

ORGAN_CROP, FACE_CROP = 14, 56
CONSIDERED = 0.05  # probability of a region from which on it takes part in the scores of the detector


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
            self.head = RegionHead(width, classes=len(KINDS))
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
    def judge(self, maps: list[Tensor]) -> Judged:
        """What the region head says of the proposals."""
        rois = self.proposals.propose(*self.proposals(maps))
        logits, codes = self.head(maps, rois)
        return Judged(logits.softmax(2), decode(codes, rois[:, :, None], self.image_size))

    def detect(self, judged: Judged) -> Regions:
        """The best face of each image, and the best two eyes, nose and mouth whose centres lie in it."""
        face, found = best_face(judged, self.score, self.image_size)
        return regions_of(face, found, judged, self.score, self.image_size)

    def describe(self, maps: list[Tensor], regions: Regions | None, image: Tensor | None = None) -> Tensor:
        """Organs, face and whole image from P3: (N, 6 * width), zeros for an organ that is missing.

        Args:
            maps: P3 to P7 of B images.
            regions: Where to look; None describes the whole images alone, (B, width).
            image: (N,) image of each face looked at; None where each image has one, in order.
        """
        fine = maps[0]
        whole: Tensor = self.whole(fine).mean((2, 3))
        if regions is None:
            return whole
        organs = self.organ(crop(fine, regions.boxes[:, 1:], STRIDES[0], ORGAN_CROP, image)).mean((2, 3))
        organs = organs.view(regions.boxes.shape[0], len(REGIONS) - 1, -1) * regions.present[:, 1:, None]
        face = self.face(crop(fine, regions.boxes[:, :1], STRIDES[0], FACE_CROP, image)).mean((2, 3))
        return torch.cat([organs.flatten(1), face, whole if image is None else whole[image]], dim=1)

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 6 * width), with regions as detected."""
        maps = self.forward_maps(image)
        return self.describe(maps, self.detect(self.judge(maps)) if self.detector else None)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        logits: Tensor = self.classifier(self.forward_features(image))
        return logits

    def detection_loss(self, maps: list[Tensor], truth: Regions, gamma: float) -> Tensor:
        """Losses of proposals and region head against the known regions of all faces, as many in each image."""
        images = maps[0].shape[0]
        boxes, present = truth.boxes.reshape(images, -1, 4), truth.present.reshape(images, -1)
        kinds = self.kinds.repeat(boxes.shape[1] // len(REGIONS))
        logits, codes = self.proposals(maps)
        loss = proposal_loss(logits, codes, self.proposals.anchors, boxes, present, gamma)
        rois = torch.cat([self.proposals.propose(logits, codes), jittered(boxes, self.image_size)], dim=1)
        judged, corrections = self.head(maps, rois)
        return loss + head_loss(judged, corrections, rois, boxes, present, kinds, gamma)


class MultiscaleRegion(FaceDetector):
    """`MultiscaleRegionNetwork` on the bench.

    Training needs ``box`` (B, 4) and ``organ_boxes`` (B, 4, 4) in the batch, x, y, width, height in pixels of the
    input, organs in the order left eye, right eye, nose, mouth, NaN where missing: the pseudo-labels of the paper. With
    ``detection``, which names the expression of every face found, ``face_boxes``, ``face_organ_boxes`` and
    ``face_labels`` of all faces where the data has them.

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
        duplicate_iou: Overlap from which on the less confident of two regions of a kind is dropped.
        max_faces: Faces whose expression is named, with ``detection``.
        options: See `DetectorOptions`.

    Raises:
        UserError: The image is not a multiple of 32 pixels, or faces are wanted without a detector.
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
        duplicate_iou: float,
        max_faces: int,
        **options: Unpack[DetectorOptions],
    ) -> None:
        super().__init__(**options)
        if self.image_size % 32:
            raise UserError(
                f"model=multiscale_region needs model.image_size to be a multiple of 32, got {self.image_size}"
            )
        if self.detection and rois != "detector":
            raise UserError(f"model.detection=true needs model.rois=detector, got {rois}")
        body, self.weights = timm_network(backbone, pretrained, {"features_only": True, "out_indices": (-3, -2, -1)})
        self.network = MultiscaleRegionNetwork(
            body, self.num_classes, self.image_size, rois == "detector", width, proposals, score, dropout
        )
        self.gamma, self.detector_epochs = gamma, detector_epochs
        self.duplicate_iou, self.max_faces = duplicate_iou, max_faces
        self.takes_mixed = rois == "none"  # a blend of two faces has no regions
        self.regions: dict[str, list[Image]] = {"val": [], "test": []}

    @property
    def cam_layer(self) -> nn.Module:
        """The backbone's last stage."""
        last: nn.Module = list(self.network.backbone.children())[-1]
        return last

    # -- training -------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Detection against the known regions; from ``detector_epochs`` on, expression from the same regions, jittered.

        The logits are those of each image's first face, its largest one.

        Raises:
            UserError: The data has no known regions.
        """
        if not self.network.detector:
            return super().loss(batch)
        truth, labels = self._truth(batch), self._labels(batch)
        images, faces = labels.shape
        maps = self.network.forward_maps(batch["image"])
        # A face that is missing stands for its image where that has no other.
        looked_at = truth.present[:, 0].view(images, faces) & (labels >= 0)
        looked_at[:, 0] = True
        rows = looked_at.flatten().nonzero().squeeze(1)
        boxes, present = truth.boxes[rows], truth.present[rows]
        seen = Regions(torch.where(present[..., None], jittered(boxes, self.image_size), boxes), present)
        logits: Tensor = self.classify(self.network.describe(maps, seen, rows // faces))
        joint = float(self.current_epoch >= self.detector_epochs)
        expression: Tensor = self.loss_function(logits, batch if faces == 1 else {"label": labels.flatten()[rows]})
        loss = self.network.detection_loss(maps, truth, self.gamma) + joint * expression
        return loss, logits[(rows % faces == 0).nonzero().squeeze(1)]

    def _labels(self, batch: Batch) -> Tensor:
        """(B, F) expressions of the faces looked at, -1 where there is none."""
        every = self.detection and "face_boxes" in batch
        return batch["face_labels"] if every else batch["label"][:, None]

    def _truth(self, batch: Batch) -> Regions:
        """The known regions of B * F faces as corners; the whole image stands for what is missing."""
        keys = (
            ("face_boxes", "face_organ_boxes") if self.detection and "face_boxes" in batch else ("box", "organ_boxes")
        )
        if any(key not in batch for key in keys):
            raise UserError(
                "model=multiscale_region learns from face and organ boxes, which this data set does not give: "
                "use data that has them, or model.rois=none"
            )
        face, organs = (batch[key] for key in keys)
        boxes = torch.cat([face.view(-1, 1, 4), organs.view(-1, 4, 4)], dim=1)
        corners = torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=2).clamp(0, self.image_size)
        present = boxes.isfinite().all(2) & (corners[..., 2:] - corners[..., :2] >= 1).all(2)
        return Regions(torch.where(present[..., None], corners, whole_image(corners, self.image_size)), present)

    # -- faces and regions found ----------------------------------------------------------------------------------

    def find(self, image: Tensor) -> tuple[Tensor, list[Faces]]:
        """One pass: the best face gives the image's logits, every face found its own expression."""
        maps = self.network.forward_maps(image)
        judged = self.network.judge(maps)
        logits: Tensor = self.network.classifier(self.network.describe(maps, self.network.detect(judged)))
        return logits, self._faces(maps, judged)

    def _regions(self, judged: Judged, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return without_duplicates(judged.scores[i], judged.boxes[i], self.duplicate_iou, CONSIDERED)

    def _faces(self, maps: list[Tensor], judged: Judged) -> list[Faces]:
        """The expression of every face, from it, its organs and the whole image; its confidence times the face's."""
        out = []
        for i in range(judged.scores.shape[0]):
            box, kind, score = self._regions(judged, i)
            box, score = (x[kind == FACE][: self.max_faces] for x in (box, score))
            own = torch.full((len(box),), i, device=box.device)
            there = torch.ones_like(own, dtype=torch.bool)
            network = self.network
            regions = regions_of(box, there, judged.rows(own), network.score, self.image_size)
            share, label = network.classifier(network.describe(maps, regions, own)).float().softmax(1).max(1)
            confidence, order = (share * score).sort(descending=True)
            out.append(Faces(box[order], label[order], confidence))
        return out

    def _evaluate(self, batch: Batch, stage: Literal["val", "test"]) -> Tensor:
        if not self.network.detector or batch["image"].ndim != 4 or "organ_boxes" not in batch:
            return super()._evaluate(batch, stage)
        maps = self.network.forward_maps(batch["image"])
        judged = self.network.judge(maps)
        regions = self.network.detect(judged)
        self._note_regions(judged, batch, stage)
        if self.detection:
            self.note(self._faces(maps, judged), batch, stage)
        logits: Tensor = self.network.classifier(self.network.describe(maps, regions))
        return self._count(logits.float().softmax(1), batch, stage)

    def _note_regions(self, judged: Judged, batch: Batch, stage: Literal["val", "test"]) -> None:
        images = judged.scores.shape[0]
        truth = self._truth(batch)
        boxes, present = truth.boxes.view(images, -1, 4), truth.present.view(images, -1)
        kinds = self.network.kinds.repeat(boxes.shape[1] // len(REGIONS)) - 1
        for i in range(images):
            box, kind, score = self._regions(judged, i)
            known = (boxes[i, present[i]], kinds[present[i]])
            self.regions[stage].append(Image(*(numbers(x) for x in (box, kind - 1, score, *known))))

    def reset(self, stage: Stage) -> None:
        """Forget the regions seen too."""
        super().reset(stage)
        if stage != "train":
            self.regions[stage].clear()

    def scores(self, stage: Stage) -> dict[str, float]:
        """With ``region_ap50_<kind>``, the average precision of each kind of region against the known ones."""
        scores = super().scores(stage)
        if stage != "train" and self.regions[stage]:
            of_regions = detection_scores(self.regions[stage], KINDS, self.draw_score)
            scores |= {f"region_{key}": value for key, value in of_regions.items() if key.startswith("ap50_")}
        return scores
