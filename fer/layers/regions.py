"""Regions of faces: their kinds, and which of a detector's boxes are the regions of a face (Zhang et al. 2022)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou  # type: ignore[import-untyped]

from fer.layers.boxes import decode

FACE, EYE, NOSE, MOUTH = 1, 2, 3, 4  # kinds of regions, 0 being background
KINDS = ("face", "eye", "nose", "mouth")  # their names, from 1
REGIONS = (FACE, EYE, EYE, NOSE, MOUTH)  # the five of a face: itself, left eye, right eye, nose, mouth
_SAME_EYE = 0.3  # overlap from which on two boxes are one eye


class Regions(NamedTuple):
    """The five regions of each of N faces.

    Attributes:
        boxes: (N, 5, 4) corners in pixels of the image; the whole image where a region is missing.
        present: (N, 5) whether there is one.
    """

    boxes: Tensor
    present: Tensor


class Judged(NamedTuple):
    """What a detector says of R boxes in each of N images.

    Attributes:
        scores: (N, R, 5) probability of each kind, background first.
        boxes: (N, R, 4, 4) corners, were it the kind, the kinds from face on.
    """

    scores: Tensor
    boxes: Tensor

    def rows(self, image: Tensor) -> "Judged":
        """Those of the images with these indices."""
        return Judged(self.scores[image], self.boxes[image])

    def best(self, kind: int, allowed: Tensor, least: float) -> tuple[Tensor, Tensor]:
        """The best box of a kind among the allowed (N, R): (N, 4), and (N,) whether its score is enough."""
        score, place = (self.scores[:, :, kind] * allowed).max(1)
        box = self.boxes[:, :, kind - 1].gather(1, place[:, None, None].expand(-1, 1, 4)).squeeze(1)
        return box, score >= least


def whole_image(like: Tensor, image_size: int) -> Tensor:
    """Boxes of the whole image, as many as ``like`` (..., 4)."""
    # Filled on the device: a tensor of numbers would be copied there in every step, which waits for the copy.
    return torch.cat([torch.zeros_like(like[..., :2]), torch.full_like(like[..., 2:], image_size)], dim=-1)


def best_face(judged: Judged, least: float, image_size: int) -> tuple[Tensor, Tensor]:
    """The best face of each image, else the whole image: (N, 4), and (N,) whether there is one."""
    box, found = judged.best(FACE, torch.ones_like(judged.scores[:, :, 0]), least)
    return torch.where(found[:, None], box, whole_image(box, image_size)), found


def regions_of(face: Tensor, is_face: Tensor, judged: Judged, least: float, image_size: int) -> Regions:
    """Each face's best two eyes, nose and mouth whose centres lie in it.

    Args:
        face: (N, 4).
        is_face: (N,) whether it is one, else the whole image.
        judged: What is said of each face's image.
        least: Probability from which on a region counts as found.
        image_size: Side of the image.
    """

    def inside(kind: int) -> Tensor:
        centre = (judged.boxes[:, :, kind - 1, :2] + judged.boxes[:, :, kind - 1, 2:]) / 2
        within: Tensor = ((centre >= face[:, None, :2]) & (centre <= face[:, None, 2:])).all(2)
        return within

    one, has_one = judged.best(EYE, inside(EYE), least)
    apart = box_iou(judged.boxes[:, :, EYE - 1], one[:, None]).squeeze(2) < _SAME_EYE
    other, has_other = judged.best(EYE, inside(EYE) & apart, least)
    # The eyes are told apart by their place; a single one by the side of the face it is on.
    middle = torch.where(has_other, other[:, 0] + other[:, 2], face[:, 0] + face[:, 2])
    left = (one[:, 0] + one[:, 2] <= middle)[:, None]
    eyes = torch.stack([torch.where(left, one, other), torch.where(left, other, one)], dim=1)
    has_pair = torch.stack([has_one, has_other], dim=1)
    has_eyes = (has_pair & left) | (has_pair.flip(1) & ~left)

    nose, has_nose = judged.best(NOSE, inside(NOSE), least)
    mouth, has_mouth = judged.best(MOUTH, inside(MOUTH), least)
    found = torch.cat([face[:, None], eyes, nose[:, None], mouth[:, None]], dim=1)
    present = torch.cat([is_face[:, None], has_eyes, has_nose[:, None], has_mouth[:, None]], dim=1)
    return Regions(torch.where(present[..., None], found, whole_image(found, image_size)), present)


def without_duplicates(scores: Tensor, boxes: Tensor, iou: float, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """All regions of one image.

    Args:
        scores: (R, 5) of one image's `Judged`.
        boxes: (R, 4, 4).
        iou: Overlap of two boxes of a kind that are one.
        least: Probability from which on a box counts.

    Returns:
        (n, 4) boxes, (n,) kinds and (n,) scores, best first.
    """
    kind = torch.arange(1, len(KINDS) + 1, device=scores.device).expand(len(scores), -1).flatten()
    score, box = scores[:, 1:].flatten(), boxes.flatten(0, 1)
    enough = (score >= least).nonzero().squeeze(1)
    kind, score, box = kind[enough], score[enough], box[enough]
    kept = batched_nms(box.float(), score.float(), kind, iou)
    return box[kept], kind[kept], score[kept]


def jittered(boxes: Tensor, image_size: int, share: float = 0.1) -> Tensor:
    """Boxes (..., 4) with centre and sides changed by up to ``share`` of the sides."""
    code = (2 * torch.rand_like(boxes) - 1) * share
    return decode(torch.cat([code[..., :2], (1 + code[..., 2:]).log()], dim=-1), boxes, image_size)
