"""Multi-scale region network: expression from the organs, the face and the whole image.

Zhang N. et al., "A Multi-scale Attention-based Facial Emotion Recognition Method Based on Deep Learning",
Instrumentation 9(3), 2022. A Faster R-CNN style detector on a feature pyramid finds face, eyes, nose and mouth; crops
of the finest level describe them. 36,977,545 parameters at 7 classes.

The detector learns from the regions the data knows, or that were made from its landmarks (`fer.data.regions`), where
the paper lets RetinaFace find them and removes bad ones by hand.
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from fer.detection_metrics import Image, detection_scores
from fer.errors import UserError
from fer.layers.region_network import MultiscaleRegionNetwork
from fer.layers.regions import (
    FACE,
    KINDS,
    Judged,
    Regions,
    jittered,
    regions_of,
    whole_image,
    without_duplicates,
)
from fer.models.base import Batch, Stage
from fer.models.detection import DetectorOptions, FaceDetector, Faces, numbers, several_views
from fer.models.pretrained import timm_network

log = logging.getLogger(__name__)

CONSIDERED = 0.05  # probability of a region from which on it takes part in the scores of the detector
SCALES = ("organs", "face", "whole")
WHOLE = 0.9  # share of the image from which on a face is as good as the image
ORACLE = "oracle regions: face and organs are where the data says, not where the network finds them"


class Known(NamedTuple):
    """What the data says of the faces of B images, F of each.

    Attributes:
        regions: Of B * F faces.
        labels: (B, F) expressions, -1 where there is none.
        complete: (B,) whether all regions are known. Where landmarks were rejected, or no face is known, what a
            detector finds may be right.
    """

    regions: Regions
    labels: Tensor
    complete: Tensor


class MultiscaleRegion(FaceDetector):
    """`MultiscaleRegionNetwork` on the bench.

    Training needs ``box`` (B, 4) and ``organ_boxes`` (B, 4, 4) in the batch, x, y, width, height in pixels of the
    input, organs in the order left eye, right eye, nose, mouth, NaN where missing: the pseudo-labels of the paper; or
    ``face_boxes``, ``face_organ_boxes`` and ``face_labels`` where the data knows several faces of an image. The label
    is that of the first face; with ``detection`` the expression of every face is learned, and named where it is found.

    Args:
        backbone: Any timm network with maps at an 8th, a 16th and a 32nd of the image.
        pretrained: Start from published weights, or from a file's, see `timm_network`.
        rois: ``detector``: regions as found by the network itself; ``pseudo``: trained likewise, but evaluated on the
            known regions, which bounds what a better detector could give, and is stamped; ``none``: the whole image
            alone, which shows what the regions are worth.
        scales: As in `MultiscaleRegionNetwork`.
        width: As in `MultiscaleRegionNetwork`, and so are the next six.
        anchor: Smallest anchor.
        proposals: Boxes judged.
        organ_crop: Cells of an organ.
        face_crop: Cells of a face.
        score: Threshold of a region.
        dropout: Before the classifier.
        gamma: Focal exponent of the detector; the expression loss is the injected one.
        detector_epochs: Epochs in which the detector alone is trained.
        duplicate_iou: Overlap from which on the less confident of two regions of a kind is dropped.
        max_faces: Faces whose expression is named, with ``detection``.
        options: See `DetectorOptions`.

    Raises:
        UserError: ``rois`` or ``scales`` is none of these, the image is not a multiple of 32 pixels, or faces are
            wanted without a detector.
    """

    network: MultiscaleRegionNetwork
    compiled_parts = ("network.backbone", "network.pyramid")  # how many boxes the rest looks at depends on the image

    def __init__(
        self,
        backbone: str,
        pretrained: bool | str,
        rois: Literal["detector", "pseudo", "none"],
        scales: list[str],
        width: int,
        anchor: float,
        proposals: int,
        organ_crop: int,
        face_crop: int,
        score: float,
        dropout: float,
        gamma: float,
        detector_epochs: int,
        duplicate_iou: float,
        max_faces: int,
        **options: Unpack[DetectorOptions],
    ) -> None:
        super().__init__(**options)
        if rois not in ("detector", "pseudo", "none"):
            raise UserError(f"model.rois={rois} is not one of detector, pseudo, none")
        if not scales or not set(scales) <= set(SCALES):
            raise UserError(f"model.scales={list(scales)} must be some of {list(SCALES)}")
        if self.image_size % 32:
            raise UserError(
                f"model=multiscale_region needs model.image_size to be a multiple of 32, got {self.image_size}"
            )
        if self.detection and rois != "detector":
            raise UserError(f"model.detection=true needs model.rois=detector, got {rois}")
        body, self.weights = timm_network(backbone, pretrained, {"features_only": True, "out_indices": (-3, -2, -1)})
        self.network = MultiscaleRegionNetwork(
            body,
            self.num_classes,
            self.image_size,
            detector=rois != "none",
            scales=scales,
            width=width,
            anchor=anchor,
            proposals=proposals,
            organ_crop=organ_crop,
            face_crop=face_crop,
            score=score,
            dropout=dropout,
        )
        self.rois, self.gamma, self.detector_epochs = rois, gamma, detector_epochs
        self.duplicate_iou, self.max_faces = duplicate_iou, max_faces
        self.takes_mixed = rois == "none"  # a blend of two faces has no regions
        self.scored_from = 0 if rois == "none" else detector_epochs
        self.regions: dict[str, list[Image]] = {"val": [], "test": []}
        self.missing = {"val": [0, 0], "test": [0, 0]}  # faces and organs looked for in vain

    @classmethod
    def from_data(cls, options: Mapping[str, Any], data: Any) -> dict[str, Any]:
        """No values, but a look whether the data knows regions, and a word on those made from landmarks.

        Raises:
            UserError: It does not, or the test will show images in several views.
        """
        if options["rois"] == "none":
            return {}
        if data.tta != "none":
            raise several_views(f"model.rois={options['rois']}")
        manifest = data.store.manifest
        if manifest.organ_boxes is None or not (manifest.organ_boxes > 0).any():
            raise _nothing_known(options["rois"], data.title)
        if data.regions is not None:
            rejected = [f"{count:,} {rule}" for rule, count in data.regions["rejected"].items() if count]
            log.info(
                "regions made from %d landmarks: %s faces; %s without landmarks; rejected: %s",
                data.regions["landmarks"],
                f"{data.regions['accepted']:,}",
                f"{data.regions['no_landmarks']:,}",
                ", ".join(rejected) or "none",
            )
        faces = data.face_sizes("train")
        whole = (faces.prod(axis=1) >= WHOLE * data.image_size**2).mean() if len(faces) else 0.0
        if whole > 0.5:
            log.warning("%.0f %% of the faces fill their image: the scales of face and image are the same", 100 * whole)
        return {}

    def setup(self, stage: str) -> None:
        """The base's.

        Raises:
            UserError: The training would end before the expression is learned.
        """
        epochs = self.trainer.max_epochs
        if stage == "fit" and epochs is not None and self.rois != "none" and epochs <= self.detector_epochs:
            raise UserError(
                f"trainer.max_epochs={epochs} ends before the expression is learned, since the first "
                f"model.detector_epochs={self.detector_epochs} epochs train the detector alone: set the one higher or "
                "the other lower"
            )
        super().setup(stage)

    @property
    def splits(self) -> bool:
        """Not with regions, whose losses are means over the boxes of the batch."""
        return self.rois == "none" and super().splits

    @property
    def stamps(self) -> list[str]:
        """With a word on known regions."""
        return [*super().stamps, *([ORACLE] if self.rois == "pseudo" else [])]

    @property
    def cam_layer(self) -> nn.Module:
        """The backbone's last stage."""
        last: nn.Module = list(self.network.backbone.children())[-1]
        return last

    # -- training -------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Detection against the known regions; from ``detector_epochs`` on, expression from the same regions, jittered.

        The logits are those of each image's first face.

        Raises:
            UserError: The data has no known regions.
        """
        if self.rois == "none":
            return super().loss(batch)
        known = self._known(batch)
        truth, labels = known.regions, known.labels if self.detection else batch["label"][:, None]
        maps = self.network.forward_maps(batch["image"])
        images, most = known.labels.shape
        looked_at = truth.present[:, 0].view(images, most)[:, : labels.shape[1]] & (labels >= 0)
        # A first face that is missing is looked for in the whole image.
        looked_at[:, 0] = True
        if labels.shape[1] == 1:
            image = torch.arange(images, device=labels.device)
            face = torch.zeros_like(image)
        else:  # how many faces there are is asked of the device, once
            image, face = looked_at.nonzero(as_tuple=True)
        before = looked_at.sum(1).cumsum(0) - looked_at.sum(1)
        boxes, present = (values[image * most + face] for values in truth)
        seen = Regions(torch.where(present[..., None], jittered(boxes, self.image_size), boxes), present)
        logits: Tensor = self.classify(self.network.describe(maps, seen, image))
        expression: Tensor = self.loss_function(
            logits, batch if labels.shape[1] == 1 else {"label": labels[image, face]}
        )
        # At first times 0, not left out: every parameter has its gradient on every device.
        joint = float(self.current_epoch >= self.scored_from)
        detection = self.network.detection_loss(maps, truth, known.complete, self.gamma)
        return detection + joint * expression, logits[before]  # of each image's first face

    def _known(self, batch: Batch) -> Known:
        if "face_organ_boxes" in batch:
            face, organs, labels = batch["face_boxes"], batch["face_organ_boxes"], batch["face_labels"]
        elif "box" in batch and "organ_boxes" in batch and "face_boxes" not in batch:
            face, organs, labels = batch["box"], batch["organ_boxes"], batch["label"][:, None]
        else:
            raise _nothing_known(self.rois, "this data set")
        boxes = torch.cat([face.view(-1, 1, 4), organs.view(-1, 4, 4)], dim=1)
        corners = torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=2).clamp(0, self.image_size)
        present = boxes.isfinite().all(2) & (corners[..., 2:] - corners[..., :2] >= 1).all(2)
        regions = Regions(torch.where(present[..., None], corners, whole_image(corners, self.image_size)), present)
        has_face, has_organs = (x.view(labels.shape) for x in (present[:, 0], present[:, 1:].any(1)))
        return Known(regions, labels, has_face.any(1) & (has_organs | ~has_face).all(1))

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
        if self.rois == "none":
            return super()._evaluate(batch, stage)
        if batch["image"].ndim != 4:
            raise several_views(f"model.rois={self.rois}")
        known = self._known(batch)
        maps = self.network.forward_maps(batch["image"])
        judged = self.network.judge(maps)
        regions = self.network.detect(judged)
        if self.rois == "pseudo":
            first = slice(None, None, known.labels.shape[1])
            regions = Regions(*(values[first] for values in known.regions))
        logits: Tensor = self.classify(self.network.describe(maps, regions))
        if self.detection:
            self.note(self._faces(maps, judged), batch, stage)
        self._note_regions(judged, known, stage)
        missing = ~regions.present
        self.missing[stage][0] += int(missing[:, 0].sum())
        self.missing[stage][1] += int(missing[:, 1:].sum())
        return self._count(logits.float().softmax(1), batch, stage)

    def _note_regions(self, judged: Judged, known: Known, stage: Literal["val", "test"]) -> None:
        images, faces = known.labels.shape
        boxes, present = known.regions.boxes.view(images, -1, 4), known.regions.present.view(images, -1)
        kinds = self.network.kinds.repeat(faces) - 1
        for i in range(images):
            box, kind, score = self._regions(judged, i)
            counted = present[i] & known.complete[i]
            found = (x[known.complete[i].expand(len(x))] for x in (box, kind - 1, score))
            self.regions[stage].append(Image(*map(numbers, (*found, boxes[i, counted], kinds[counted]))))

    def reset(self, stage: Stage) -> None:
        """Forget the regions seen too."""
        super().reset(stage)
        if stage != "train":
            self.regions[stage].clear()
            self.missing[stage] = [0, 0]

    def scores(self, stage: Stage) -> dict[str, float]:
        """With average precisions of regions and counts of those missing.

        ``region_ap50_<kind>`` and their mean ``region_map50``, against the known regions; ``faces_missing``, images
        described without a face, and ``organs_missing``, of four each.
        """
        scores = super().scores(stage)
        if stage == "train" or not self.regions[stage]:
            return scores
        of_regions = detection_scores(self.regions[stage], KINDS, self.draw_score)
        scores |= {f"region_{key}": x for key, x in of_regions.items() if key.startswith(("ap50_", "map50"))}
        faces, organs = self.missing[stage]
        return scores | {"faces_missing": float(faces), "organs_missing": float(organs)}


def _nothing_known(rois: str, data: str) -> UserError:
    return UserError(
        f"model.rois={rois} learns from face and organ boxes, and {data} as it is read knows none: use its landmarks "
        "where it has them (RAF-DB: data.image=original; AffectNet: data.landmarks=true; CK+: Landmarks/), or "
        "python -m fer.prepare, which finds landmarks that data=folder reads, or model.rois=none"
    )
