"""The multi-scale region network: backbone, pyramid, detector, three scales, classifier (Zhang et al. 2022)."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from fer.layers.boxes import decode
from fer.layers.region_loss import head_loss, proposal_loss
from fer.layers.region_pyramid import STRIDES, FeaturePyramid, RegionHead, RegionProposals, ResidualBlock, crop
from fer.layers.regions import KINDS, REGIONS, Judged, Regions, best_face, jittered, regions_of


class MultiscaleRegionNetwork(nn.Module):
    """Backbone, pyramid, detector, three scales, classifier.

    Args:
        backbone: A timm network giving its maps at an 8th, a 16th and a 32nd of the image.
        num_classes: Size of the output.
        image_size: Side of the image, a multiple of 32.
        detector: Find regions; without it the whole image alone is described.
        scales: Which of ``organs``, ``face`` and ``whole`` the description is made of, when there is a detector.
        width: Channels of the pyramid.
        anchor: Side in pixels of the smallest square anchor.
        proposals: Boxes the region head judges.
        organ_crop: Cells of a side of an organ's crop of P3.
        face_crop: Likewise of a face's.
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
        scales: Collection[str],
        width: int,
        anchor: float,
        proposals: int,
        organ_crop: int,
        face_crop: int,
        score: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = FeaturePyramid(backbone.feature_info.channels(), width, finest_only=not detector)
        self.image_size, self.score, self.detector = image_size, score, detector
        self.organ_crop, self.face_crop = organ_crop, face_crop
        self.scales = scales if detector else ("whole",)
        if "whole" in self.scales:
            self.whole = ResidualBlock(width)
        if "organs" in self.scales:
            self.organ = nn.Sequential(nn.Conv2d(width, width, 1), ResidualBlock(width))
        if "face" in self.scales:
            self.face = nn.Sequential(nn.Conv2d(width, width, 1), ResidualBlock(width))
        if detector:
            self.proposals = RegionProposals(width, image_size, anchor, proposals)
            self.head = RegionHead(width, classes=len(KINDS))
            self.register_buffer("kinds", torch.tensor(REGIONS), persistent=False)
        described = sum(len(REGIONS) - 1 if scale == "organs" else 1 for scale in self.scales)
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
        """Organs, face and whole image from P3: (N, 6 * width) of all, zeros for an organ that is missing.

        Args:
            maps: P3 to P7 of B images.
            regions: Where to look; None describes the whole images alone, (B, width).
            image: (N,) image of each face looked at; None where each image has one, in order.
        """
        fine = maps[0]
        parts = []
        if regions is not None and "organs" in self.scales:
            organs = self.organ(crop(fine, regions.boxes[:, 1:], STRIDES[0], self.organ_crop, image)).mean((2, 3))
            organs = organs.view(regions.boxes.shape[0], len(REGIONS) - 1, -1) * regions.present[:, 1:, None]
            parts.append(organs.flatten(1))
        if regions is not None and "face" in self.scales:
            parts.append(self.face(crop(fine, regions.boxes[:, :1], STRIDES[0], self.face_crop, image)).mean((2, 3)))
        if "whole" in self.scales:
            whole: Tensor = self.whole(fine).mean((2, 3))
            parts.append(whole if image is None else whole[image])
        return torch.cat(parts, dim=1)

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 6 * width), with regions as detected."""
        maps = self.forward_maps(image)
        return self.describe(maps, self.detect(self.judge(maps)) if self.detector else None)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        logits: Tensor = self.classifier(self.forward_features(image))
        return logits

    def detection_loss(self, maps: list[Tensor], truth: Regions, complete: Tensor, gamma: float) -> Tensor:
        """Losses of proposals and region head against the known regions.

        Args:
            maps: P3 to P7 of B images.
            truth: Of all faces, as many in each image.
            complete: (B,) images of which all regions are known; the others do not count.
            gamma: Of the focal losses.
        """
        images = maps[0].shape[0]
        boxes, present = truth.boxes.reshape(images, -1, 4), truth.present.reshape(images, -1)
        kinds = self.kinds.repeat(boxes.shape[1] // len(REGIONS))
        logits, codes = self.proposals(maps)
        loss = proposal_loss(logits, codes, self.proposals.anchors, boxes, present, complete, gamma)
        proposed = self.proposals.propose(logits, codes)
        rois = torch.cat([proposed, jittered(boxes, self.image_size)], dim=1)
        counted = torch.cat([present.new_ones(proposed.shape[:2]), present], dim=1) & complete[:, None]
        judged, corrections = self.head(maps, rois)
        return loss + head_loss(judged, corrections, rois, counted, boxes, present, kinds, gamma)
