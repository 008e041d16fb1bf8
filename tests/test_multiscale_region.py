"""Multi-scale region network: counts, stages, boxes and losses against slow references, missing regions."""

import math

import pytest
import torch
from model_builds import batch_of, build, cheap, images, neighbour_dependence, parameter_count
from torch import nn
from torchvision.ops import box_iou, nms

from fer.errors import UserError
from fer.layers.boxes import best_boxes, decode, encode, grid_anchors
from fer.layers.region_loss import focal_binary, focal_softmax, head_loss, proposal_loss
from fer.layers.region_pyramid import BASES, STRIDES, RegionHead, crop
from fer.models.multiscale_region import FACE, Regions, jittered


def test_parameters_and_stages():
    with torch.device("meta"):
        network = build("multiscale_region").network
        image = torch.empty(2, 3, 448, 448)
        assert [c.shape[1:] for c in network.backbone(image)] == [(512, 56, 56), (1024, 28, 28), (2048, 14, 14)]
        maps = network.forward_maps(image)
        assert [p.shape[1:] for p in maps] == [(256, side, side) for side in (56, 28, 14, 7, 4)]
        logits, codes = network.proposals(maps)
        rois = torch.empty(2, 50, 4)
        assert [x.shape for x in network.head(maps, rois)] == [(2, 50, 5), (2, 50, 4, 4)]
        regions = Regions(torch.empty(2, 5, 4), torch.ones(2, 5, dtype=torch.bool))
        assert network.describe(maps, regions).shape == (2, 1536)
        assert crop(maps[0], rois[:, :4], 8, 14).shape == (8, 256, 14, 14)
    assert (logits.shape, codes.shape) == ((2, 37_629), (2, 37_629, 4))
    assert parameter_count(network) == 36_977_545


# -- boxes ------------------------------------------------------------------------------------------------------------


def test_anchors():
    anchors = grid_anchors([56, 28, 14, 7, 4], STRIDES, BASES)
    assert anchors.shape == (37_629, 4)
    size = anchors[:, 2:] - anchors[:, :2]
    centre = (anchors[:, 2:] + anchors[:, :2]) / 2
    expected = [
        (32 * scale / ratio**0.5, 32 * scale * ratio**0.5)
        for ratio in (1, 2, 0.5) for scale in (1, 2 ** (1 / 3), 2 ** (2 / 3))
    ]  # fmt: skip
    torch.testing.assert_close(size[:9], torch.tensor(expected))
    assert centre[0].tolist() == [4, 4]
    assert centre[9].tolist() == [12, 4]  # columns run fastest
    assert centre[56 * 9].tolist() == [4, 12]
    torch.testing.assert_close(size[-9], torch.tensor([512.0, 512.0]))
    assert centre[-1].tolist() == [448, 448]


def some_boxes(*shape, generator):
    low = 60 * torch.rand(*shape, 2, generator=generator)
    return torch.cat([low, low + 4 + 36 * torch.rand(*shape, 2, generator=generator)], dim=-1)


def test_code_round_trips():
    generator = torch.Generator().manual_seed(0)
    boxes, anchors = some_boxes(2, 50, generator=generator), some_boxes(50, generator=generator)
    torch.testing.assert_close(decode(encode(boxes, anchors), anchors, image_size=100), boxes, rtol=1e-4, atol=1e-4)
    wild = decode(torch.tensor([50.0, -50.0, 99.0, -99.0]), torch.tensor([10.0, 10.0, 20.0, 20.0]), 64)
    assert (wild >= 0).all()
    assert (wild <= 64).all()
    assert (wild[2:] - wild[:2] >= 1).all()


def test_best_boxes():
    generator = torch.Generator().manual_seed(0)
    boxes, scores = some_boxes(3, 40, generator=generator), torch.randn(3, 40, generator=generator)
    got = best_boxes(boxes, scores, candidates=20, keep=6, iou=0.3)
    for b in range(3):
        order = scores[b].argsort(descending=True)[:20].tolist()
        overlap = box_iou(boxes[b], boxes[b])
        kept = [i for n, i in enumerate(order) if all(overlap[i, j] <= 0.3 for j in order[:n])]
        assert torch.equal(got[b, : len(kept[:6])], boxes[b][kept[:6]])
        # Where no duplicate has a duplicate this is ordinary suppression.
        assert set(kept) <= set(nms(boxes[b][order], scores[b][order], 0.3).tolist()) or len(kept) <= 20


def test_level_of_a_box():
    """P4 at 224 pixels, a level less for each halving, P3 to P5."""
    torch.manual_seed(0)
    head = RegionHead(4, classes=4).eval()
    head.block = nn.Identity()
    pyramid = [torch.full((1, 4, 448 // s, 448 // s), float(i)) for i, s in enumerate(STRIDES[:3], start=3)]
    seen = []
    head.kind.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sides = [16, 100, 223, 224, 447, 448]
    head(pyramid, torch.tensor([[[0.0, 0.0, side, side] for side in sides]]))
    assert seen[0][0, :, 0].round().tolist() == [3, 3, 3, 4, 4, 5]


# -- losses -----------------------------------------------------------------------------------------------------------


def test_focal_terms():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(50, generator=generator, dtype=torch.float64)
    target = torch.rand(50, generator=generator) > 0.5
    s = torch.where(target, logits.sigmoid(), 1 - logits.sigmoid())
    for gamma in (0.0, 1.0, 2.0):
        torch.testing.assert_close(focal_binary(logits, target, gamma), -((1 - s) ** gamma) * s.log())
    torch.testing.assert_close(
        focal_binary(logits, target, 0.0),
        nn.functional.binary_cross_entropy_with_logits(logits, target.double(), reduction="none"),
    )
    rows, kind = torch.randn(9, 5, generator=generator), torch.randint(5, (9,), generator=generator)
    torch.testing.assert_close(
        focal_softmax(rows, kind, 0.0), nn.functional.cross_entropy(rows, kind, reduction="none")
    )
    sure = torch.tensor([15.0], requires_grad=True)
    focal_binary(sure, torch.tensor([True]), 2.0).sum().backward()
    assert sure.grad.abs() < 1e-8


def slow_smooth_l1(a, b):
    d = (a - b).abs().tolist()
    return sum(0.5 * x * x * 9 if x < 1 / 9 else x - 0.5 / 9 for x in d)


def slow_proposal_loss(logits, codes, anchors, truth, present, gamma):
    """Anchor by anchor."""
    total, positives = 0.0, 0
    for b in range(len(truth)):
        known = [t for t in range(truth.shape[1]) if present[b, t]]
        iou = box_iou(anchors, truth[b])
        for a in range(len(anchors)):
            best = max(known, key=lambda t: iou[a, t].item(), default=None)
            favourite = [t for t in known if iou[a, t] == iou[:, t].max() and iou[a, t] > 0]
            value = iou[a, best].item() if best is not None else 0.0
            positive = value >= 0.5 or bool(favourite)
            p = 1 / (1 + math.exp(-logits[b, a].item()))
            s = p if positive else 1 - p
            if positive or value < 0.4:
                total -= (1 - s) ** gamma * math.log(s)
            if positive:
                positives += 1
                owner = favourite[0] if favourite else best
                total += slow_smooth_l1(codes[b, a], encode(truth[b, owner], anchors[a]))
    return total / max(positives, 1)


def test_proposal_loss_against_a_slow_one():
    generator = torch.Generator().manual_seed(0)
    anchors = grid_anchors([6], [16], [20])
    truth = some_boxes(3, 5, generator=generator)
    present = torch.rand(3, 5, generator=generator) > 0.3
    present[2] = False
    logits, codes = torch.randn(3, 324, generator=generator), torch.randn(3, 324, 4, generator=generator)
    got = proposal_loss(logits, codes, anchors, truth, present, gamma=2.0)
    assert got.item() == pytest.approx(slow_proposal_loss(logits, codes, anchors, truth, present, 2.0), rel=1e-4)


def test_head_loss_against_a_slow_one():
    generator = torch.Generator().manual_seed(0)
    truth, kinds = some_boxes(2, 5, generator=generator), torch.tensor([1, 2, 2, 3, 4])
    present = torch.tensor([[True, True, False, True, True], [False] * 5])
    rois = torch.cat([some_boxes(2, 6, generator=generator), jittered(truth, 100)], dim=1)
    logits, codes = torch.randn(2, 11, 5, generator=generator), torch.randn(2, 11, 4, 4, generator=generator)
    total, positives = 0.0, 0
    for b in range(2):
        iou = box_iou(rois[b], truth[b]) * present[b]
        for r in range(11):
            t = int(iou[r].argmax())
            kind = int(kinds[t]) if iou[r, t] >= 0.5 else 0
            p = logits[b, r].double().softmax(0)[kind].item()
            total -= (1 - p) ** 2 * math.log(p)
            if kind:
                positives += 1
                total += slow_smooth_l1(codes[b, r, kind - 1], encode(truth[b, t], rois[b, r]))
    assert positives >= 3
    got = head_loss(logits, codes, rois, truth, present, kinds, gamma=2.0)
    assert got.item() == pytest.approx(total / positives, rel=1e-4)


# -- regions ----------------------------------------------------------------------------------------------------------


def answering(network, boxes, kinds):
    """The network with a detector that proposes ``boxes`` and is sure of their kinds."""
    boxes = torch.tensor(boxes)
    network.proposals.propose = lambda logits, codes: boxes.expand(len(logits), -1, -1)
    logits = 20 * nn.functional.one_hot(torch.tensor(kinds), 5).float()
    network.head.forward = lambda maps, rois: (logits.expand(len(rois), -1, -1), torch.zeros(*rois.shape[:2], 4, 4))
    return network


PLANTED = [[4.0, 4, 60, 60], [36.0, 16, 52, 28], [12.0, 16, 28, 28], [26.0, 26, 38, 42], [20.0, 44, 44, 54]]


def test_planted_regions_are_found():
    """Both eyes, the image's left one first, whatever the order of the proposals; nothing outside the face."""
    outside = [[0.0, 0, 3, 3]]
    network = answering(cheap("multiscale_region").eval().network, PLANTED + outside, [1, 2, 2, 3, 4, 3])
    regions = network.detect(network.forward_maps(images(2, 64)))
    assert regions.present.all()
    expected = torch.tensor([PLANTED[i] for i in (0, 2, 1, 3, 4)])
    assert torch.equal(regions.boxes[0], expected)
    assert torch.equal(regions.boxes[1], expected)


@pytest.mark.parametrize(("eye", "sides"), [(1, [False, True]), (2, [True, False])])
def test_a_single_eye_keeps_its_side(eye, sides):
    network = answering(cheap("multiscale_region").eval().network, [PLANTED[0], PLANTED[eye]], [1, 2])
    regions = network.detect(network.forward_maps(images(1, 64)))
    assert regions.present[0].tolist() == [True, *sides, False, False]


def test_nothing_found_is_the_whole_image():
    module = cheap("multiscale_region", "score=1.1").eval()
    regions = module.network.detect(module.network.forward_maps(images(2, 64)))
    assert not regions.present.any()
    assert (regions.boxes == torch.tensor([0.0, 0, 64, 64])).all()
    features = module.features(images(2, 64))
    assert (features[:, : 4 * 16] == 0).all()
    assert features[:, 4 * 16 :].any()
    assert module(images(2, 64)).isfinite().all()


def test_images_with_and_without_faces_do_not_disturb_each_other():
    module = cheap("multiscale_region")
    network = module.network.eval()
    with torch.inference_mode():
        scores = network.head(maps := network.forward_maps(images(8, 64)), network.proposals.propose(
            *network.proposals(maps)))[0].softmax(2)[:, :, FACE].amax(1)  # fmt: skip
    network.score = scores.median().item()  # about half of the images keep their face
    assert neighbour_dependence(module) < 1e-9


def trained_detector(steps, *overrides):
    """The module after some steps on two images with faces of two sizes, its first and its last loss, the truth."""
    module = cheap("multiscale_region", "detector_epochs=1", *overrides).train()
    batch = batch_of(module, 2)
    for name in ("box", "organ_boxes"):
        batch[name][1] *= 0.8
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss, _ = module.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    regions = module.network.detect(module.network.forward_maps(batch["image"]))
    return module, losses, regions, module._truth(batch)


def test_first_stage_trains_the_detector_alone():
    module, losses, _, _ = trained_detector(25)
    assert losses[-1] < 0.6 * losses[0]
    assert not any(p.grad.any() for p in module.network.classifier.parameters())


@pytest.mark.slow
def test_detector_learns_its_regions():
    _, _, regions, truth = trained_detector(140, "image_size=128", "width=32", "proposals=20")
    overlap = torch.stack([box_iou(a, b).diagonal() for a, b in zip(regions.boxes, truth.boxes, strict=True)])
    assert regions.present.all()
    assert (overlap > 0.5).float().mean() >= 0.8


def test_missing_labels_of_regions():
    module = cheap("multiscale_region")
    batch = batch_of(module, 3)
    batch["box"][0] = math.nan
    batch["organ_boxes"][1, 2] = math.nan
    truth = module._truth(batch)
    assert truth.present.tolist() == [
        [False, True, True, True, True], [True, True, True, False, True], [True] * 5,
    ]  # fmt: skip
    assert truth.boxes.isfinite().all()
    loss, _ = module.loss(batch)
    assert loss.isfinite()
    with pytest.raises(UserError, match=r"model\.rois=none"):
        module.loss({"image": batch["image"], "label": batch["label"]})


def test_without_regions():
    module = cheap("multiscale_region", "rois=none")
    batch = batch_of(module, 3)
    loss, logits = module.loss({"image": batch["image"], "label": batch["label"]})
    loss.backward()
    assert logits.shape == (3, 7)
    assert module.features(batch["image"]).shape == (3, 16)
    assert all(p.grad is not None for p in module.parameters())
