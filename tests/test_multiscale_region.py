"""Multi-scale region network: counts, stages, boxes and losses against slow references, missing regions."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import composed
from fakes import write_rafdb
from hydra.utils import instantiate
from lightning.pytorch.trainer.states import TrainerFn
from model_builds import batch_of, build, cheap, images, neighbour_dependence, parameter_count, shaken
from torch import nn
from torchvision.ops import box_iou, nms, roi_align

from fer.callbacks import Recorder
from fer.errors import UserError
from fer.experiment import run_experiment
from fer.layers.boxes import best_boxes, decode, encode, grid_anchors
from fer.layers.region_loss import focal_binary, focal_softmax, head_loss, proposal_loss
from fer.layers.region_pyramid import STRIDES, FeaturePyramid, RegionHead, crop
from fer.layers.regions import FACE, Regions, jittered, without_duplicates
from fer.models.multiscale_region import MultiscaleRegion
from fer.runs import RunFolder
from fer.stopping import Patience, Stop


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
    with torch.device("meta"):
        assert build("multiscale_region").network.proposals.anchors.shape == (37_629, 4)
    anchors = grid_anchors([56, 28, 14, 7, 4], STRIDES, [32, 64, 128, 256, 512])
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


def test_crops_are_those_of_torchvision_at_the_level_of_each_box():
    generator = torch.Generator().manual_seed(0)
    head = RegionHead(4, classes=4).eval()
    head.block = nn.Identity()
    pyramid = [torch.randn(2, 4, 448 // s, 448 // s, generator=generator) for s in STRIDES[:3]]
    seen = []
    head.block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    low = 200 * torch.rand(2, 30, 2, generator=generator)
    rois = torch.cat([low, (low + 8 + 500 * torch.rand(2, 30, 2, generator=generator)).clamp(max=448)], dim=2)
    rois[:, 0], rois[:, 1] = torch.tensor([0.0, 0, 448, 448]), torch.tensor([438.0, 0, 448, 10])
    head(pyramid, rois)
    plain = []
    for b in range(2):
        for box in rois[b]:
            level = min(max(math.floor(4 + math.log2(math.sqrt((box[2:] - box[:2]).prod()) / 224)), 3), 5)
            maps, row = pyramid[level - 3][b : b + 1], torch.cat([torch.zeros(1), box])[None]
            plain.append(roi_align(maps, row, 7, 1 / 2**level, sampling_ratio=2, aligned=True))
    torch.testing.assert_close(seen[0], torch.cat(plain), rtol=1e-4, atol=1e-4)


def test_the_smallest_map_has_its_gradient_in_low_precision():
    """P6 of a 64-pixel image is one cell, where bf16 convolutions on a CPU with AMX give gradients of unset memory."""
    torch.manual_seed(0)
    pyramid = FeaturePyramid([8, 8, 8], 16, finest_only=False).to(memory_format=torch.channels_last)
    maps = [torch.randn(2, 8, side, side).contiguous(memory_format=torch.channels_last) for side in (8, 4, 2)]
    gradients = []
    for low in (False, True):
        for _ in range(20):
            del_soon = [torch.full((size,), float("nan")) for size in (500, 2_000, 8_000, 40_000)]
            del del_soon
            pyramid.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = sum(level.float().sum() for level in pyramid(maps))
            loss.backward()
            gradients.append(pyramid.p7.weight.grad.clone())
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=0.1, atol=0.05)


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


def slow_proposal_loss(logits, codes, anchors, truth, present, complete, gamma):
    """Anchor by anchor."""
    total, positives = 0.0, 0
    for b in range(len(truth)):
        if not complete[b]:
            continue
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
    for complete in (torch.tensor([True, True, True]), torch.tensor([False, True, True]), torch.tensor([False] * 3)):
        got = proposal_loss(logits, codes, anchors, truth, present, complete, gamma=2.0)
        expected = slow_proposal_loss(logits, codes, anchors, truth, present, complete, 2.0)
        assert got.item() == pytest.approx(expected, rel=1e-4)


def test_head_loss_against_a_slow_one():
    generator = torch.Generator().manual_seed(0)
    truth, kinds = some_boxes(2, 5, generator=generator), torch.tensor([1, 2, 2, 3, 4])
    present = torch.tensor([[True, True, False, True, True], [False] * 5])
    rois = torch.cat([some_boxes(2, 6, generator=generator), jittered(truth, 100)], dim=1)
    logits, codes = torch.randn(2, 11, 5, generator=generator), torch.randn(2, 11, 4, 4, generator=generator)
    total, positives = 0.0, 0
    counted = torch.ones(2, 11, dtype=torch.bool)
    counted[0, 8] = counted[1, 2] = False
    for b in range(2):
        iou = box_iou(rois[b], truth[b]) * present[b]
        for r in range(11):
            if not counted[b, r]:
                continue
            t = int(iou[r].argmax())
            kind = int(kinds[t]) if iou[r, t] >= 0.5 else 0
            p = logits[b, r].double().softmax(0)[kind].item()
            total -= (1 - p) ** 2 * math.log(p)
            if kind:
                positives += 1
                total += slow_smooth_l1(codes[b, r, kind - 1], encode(truth[b, t], rois[b, r]))
    assert positives >= 3
    got = head_loss(logits, codes, rois, counted, truth, present, kinds, gamma=2.0)
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
    regions = network.detect(network.judge(network.forward_maps(images(2, 64))))
    assert regions.present.all()
    expected = torch.tensor([PLANTED[i] for i in (0, 2, 1, 3, 4)])
    assert torch.equal(regions.boxes[0], expected)
    assert torch.equal(regions.boxes[1], expected)


@pytest.mark.parametrize(("eye", "sides"), [(1, [False, True]), (2, [True, False])])
def test_a_single_eye_keeps_its_side(eye, sides):
    network = answering(cheap("multiscale_region").eval().network, [PLANTED[0], PLANTED[eye]], [1, 2])
    regions = network.detect(network.judge(network.forward_maps(images(1, 64))))
    assert regions.present[0].tolist() == [True, *sides, False, False]


def test_nothing_found_is_the_whole_image():
    module = cheap("multiscale_region", "score=1.1").eval()
    regions = module.network.detect(module.network.judge(module.network.forward_maps(images(2, 64))))
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
    regions = module.network.detect(module.network.judge(module.network.forward_maps(batch["image"])))
    return module, losses, regions, module._known(batch).regions


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
    batch = batch_of(module, 4)
    batch["box"][0] = math.nan
    batch["organ_boxes"][1, 2] = math.nan
    batch["organ_boxes"][3] = math.nan
    truth, _, complete = module._known(batch)
    assert complete.tolist() == [False, True, True, False]
    assert truth.present.tolist() == [
        [False, True, True, True, True], [True, True, True, False, True], [True] * 5, [True, *[False] * 4],
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


# -- every face -------------------------------------------------------------------------------------------------------

# Two faces of 28 pixels in an image of 64, each with two eyes, nose and mouth.
SECOND = [34.0, 30.0]
ORGANS = [[6.0, 8, 12, 14], [18.0, 8, 24, 14], [12.0, 14, 18, 20], [9.0, 21, 21, 26]]
SMALL = [[2.0, 2, 30, 30], *ORGANS]
PAIR = SMALL + [[x1 + 34, y1 + 30, x2 + 34, y2 + 30] for x1, y1, x2, y2 in SMALL]
EVERY = ["detection=true", "max_faces=4"]


def two_faces(module, count):
    """A batch whose images show the two faces, the first with the image's label."""
    batch = batch_of(module, count)
    boxes = torch.tensor(PAIR).view(2, 5, 4)
    boxes[..., 2:] -= boxes[..., :2]
    batch["face_boxes"] = boxes[:, 0].repeat(count, 1, 1)
    batch["face_organ_boxes"] = boxes[:, 1:].repeat(count, 1, 1, 1)
    batch["face_labels"] = torch.stack([batch["label"], (batch["label"] + 3) % 7], dim=1)
    return batch


def test_each_face_gets_its_own_organs_and_expression():
    module = shaken(cheap("multiscale_region", *EVERY))
    network = answering(module.network, [*PAIR, [0.0, 0, 3, 3]], [*[1, 2, 2, 3, 4] * 2, 4])
    x = images(2, 64)
    with torch.inference_mode():
        logits, found = module.find(x)
        torch.testing.assert_close(logits, module(x))
        maps = network.forward_maps(x)
        for i, faces in enumerate(found):
            expected = {}
            for first in (0, 5):
                own = Regions(torch.tensor(PAIR[first : first + 5])[None], torch.ones(1, 5, dtype=torch.bool))
                alone = network.classifier(network.describe([m[i : i + 1] for m in maps], own)).softmax(1)[0]
                expected[tuple(PAIR[first])] = alone
            assert {tuple(box) for box in faces.boxes.tolist()} == set(expected)
            for box, label, score in zip(*(v.tolist() for v in faces), strict=True):
                assert label == expected[tuple(box)].argmax()
                assert score == pytest.approx(expected[tuple(box)].max().item(), rel=1e-4)
            assert faces.scores.tolist() == sorted(faces.scores.tolist(), reverse=True)


def test_naming_every_face_leaves_the_classifier_alone():
    plain, every = shaken(cheap("multiscale_region")), shaken(cheap("multiscale_region", *EVERY))
    assert set(plain.state_dict()) == set(every.state_dict())
    every.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        assert torch.equal(plain(images(3, 64)), every(images(3, 64)))
        torch.testing.assert_close(every.find(images(3, 64))[0], plain(images(3, 64)))


def test_faces_found_do_not_depend_on_neighbours():
    module = shaken(cheap("multiscale_region", *EVERY)).double()
    with torch.no_grad():
        module.network.head.kind.bias[FACE] += 5
    batch = images(6, 64).double()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together, permuted = module.find(batch)[1], module.find(batch[order])[1]
        alone = module.find(batch[2:3])[1][0]
    assert len(alone.boxes) >= 1
    for found, i in [(alone, 2), *((permuted[n], int(order[n])) for n in range(6))]:
        assert torch.equal(found.labels, together[i].labels)
        torch.testing.assert_close(found.boxes, together[i].boxes, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.scores, together[i].scores, rtol=0, atol=1e-6)


def test_every_face_teaches():
    """All faces are known to the detector, each with its own expression, as if they came in images of their own."""
    module = cheap("multiscale_region", *EVERY).eval()
    batch = two_faces(module, 3)
    batch["face_boxes"][2, 1] = batch["face_organ_boxes"][2, 1] = math.nan
    batch["face_labels"][2, 1] = -1
    seen = []
    module.network.detection_loss = lambda maps, truth, complete, gamma: seen.append(truth) or torch.zeros(())
    module.network.classifier.register_forward_hook(lambda _m, _i, out: seen.append(out))
    torch.manual_seed(0)
    loss, logits = module.loss(batch)
    every, truth = seen
    assert truth.boxes.shape == (6, 5, 4)
    assert truth.present.sum(1).tolist() == [5, 5, 5, 5, 5, 0]
    assert truth.boxes[1].tolist() == PAIR[5:]
    labels = [0, 3, 1, 4, 2]
    torch.testing.assert_close(loss, nn.functional.cross_entropy(every, torch.tensor(labels)))
    assert torch.equal(logits, every[[0, 2, 4]])


def test_every_face_is_needed_for_all():
    module = cheap("multiscale_region", *EVERY)
    batch = two_faces(module, 2)
    del batch["face_organ_boxes"]
    with pytest.raises(UserError, match="face and organ boxes"):
        module.loss(batch)
    with pytest.raises(UserError, match=r"model\.detection=true needs model\.rois=detector"):
        cheap("multiscale_region", *EVERY, "rois=none")


def test_duplicates_of_a_kind_alone_are_dropped():
    scores = torch.zeros(4, 5)
    for i, (kind, score) in enumerate([(1, 0.9), (1, 0.8), (2, 0.7), (1, 0.04)]):
        scores[i, kind] = score
    same = torch.tensor([10.0, 10, 30, 30]).expand(4, 4, 4)
    box, kind, score = without_duplicates(scores, same, iou=0.5, least=0.05)
    assert kind.tolist() == [1, 2]
    torch.testing.assert_close(score, torch.tensor([0.9, 0.7]))
    assert box.tolist() == [[10, 10, 30, 30]] * 2


def test_scores_of_regions():
    """Planted regions score 1; without one of two mouths, that kind alone loses half of its recalls."""
    for missing, expected in ((None, 1.0), (9, 51 / 101)):
        kept = [i for i in range(10) if i != missing]
        module = shaken(cheap("multiscale_region", *EVERY))
        answering(module.network, [PAIR[i] for i in kept], [([1, 2, 2, 3, 4] * 2)[i] for i in kept])
        module.on_validation_epoch_start()
        module.validation_step(two_faces(module, 3), 0)
        scores = module.scores("val")
        assert [scores[f"region_ap50_{kind}"] for kind in ("face", "eye", "nose")] == [1, 1, 1]
        assert scores["region_ap50_mouth"] == pytest.approx(expected)
        assert scores["face_ap50"] == 1
        assert scores["recall"] == 1
        module.reset("val")
        assert "region_ap50_face" not in module.scores("val")


def test_scores_of_regions_without_naming_every_face():
    module = shaken(cheap("multiscale_region"))
    answering(module.network, PLANTED, [1, 2, 2, 3, 4])
    batch = batch_of(module, 2)
    boxes = torch.tensor([PLANTED[i] for i in (0, 2, 1, 3, 4)])
    boxes[:, 2:] -= boxes[:, :2]
    batch |= {"box": boxes[0].repeat(2, 1), "organ_boxes": boxes[1:].repeat(2, 1, 1)}
    module.validation_step(batch, 0)
    scores = module.scores("val")
    assert [scores[f"region_ap50_{kind}"] for kind in ("face", "eye", "nose", "mouth")] == [1] * 4
    assert "map50" not in scores
    assert scores["acc"] == pytest.approx((module(batch["image"]).argmax(1) == batch["label"]).float().mean().item())


# -- modes ------------------------------------------------------------------------------------------------------------


def test_unknown_regions_are_no_background():
    """An image whose organs were rejected teaches the detector nothing, and takes no part in its scores."""
    module = cheap("multiscale_region").eval()
    torch.manual_seed(0)
    batch = batch_of(module, 2)
    batch["organ_boxes"][0] = math.nan
    maps = module.network.forward_maps(batch["image"])
    for m in maps:
        m.retain_grad()
    truth, _, complete = module._known(batch)
    module.network.detection_loss(maps, truth, complete, 2.0).backward()
    assert not any(m.grad[0].any() for m in maps)
    assert any(m.grad[1].any() for m in maps)
    module.validation_step(batch, 0)
    first, second = module.regions["val"]
    assert len(first.boxes) == len(first.true_boxes) == 0
    assert len(second.true_boxes) == 5


def test_scenes_teach_the_detector_all_faces_and_the_label_of_the_first():
    module = cheap("multiscale_region").eval()
    batch = two_faces(module, 3)
    seen = []
    module.network.detection_loss = lambda maps, truth, complete, gamma: seen.append(truth) or torch.zeros(())
    loss, logits = module.loss(batch)
    assert seen[0].present.shape == (6, 5)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, batch["label"]))


def test_known_regions_are_an_oracle_and_say_so():
    module = shaken(cheap("multiscale_region", "rois=pseudo"))
    batch = {**batch_of(module, 3), "index": torch.arange(3)}
    batch["box"][1] = math.nan
    truth = module._known(batch).regions
    with torch.inference_mode():
        expected = module.classify(module.network.describe(module.network.forward_maps(batch["image"]), truth)).softmax(
            1
        )
        torch.testing.assert_close(module.test_step(batch, 0)["probabilities"], expected)
        scores = module.scores("test")
    assert (scores["faces_missing"], scores["organs_missing"]) == (1, 0)
    assert "region_map50" in scores  # the detector's own
    assert any("oracle" in stamp for stamp in module.stamps)
    assert not cheap("multiscale_region").stamps
    with pytest.raises(UserError, match="one view"):
        module.test_step({**batch, "image": batch["image"][:, None]}, 0)
    with pytest.raises(UserError, match=r"model\.rois=all is not one of"):
        cheap("multiscale_region", "rois=all")


def test_missing_regions_are_counted():
    module = shaken(cheap("multiscale_region"))
    answering(module.network, [PLANTED[0], PLANTED[1], PLANTED[4]], [1, 2, 4])
    module.validation_step(batch_of(module, 3), 0)
    scores = module.scores("val")
    assert (scores["faces_missing"], scores["organs_missing"]) == (0, 6)
    module.reset("val")
    answering(module.network, [[0.0, 0, 3, 3]], [0])
    module.validation_step(batch_of(module, 2), 0)
    assert (module.scores("val")["faces_missing"], module.scores("val")["organs_missing"]) == (2, 8)


def test_stages_of_training():
    """First the detector alone, then the expression too, on regions moved by up to a tenth."""
    module = cheap("multiscale_region", "detector_epochs=1").train()
    batch = batch_of(module, 4)
    seen = []
    describe = module.network.describe
    module.network.describe = lambda maps, regions, image: seen.append(regions) or describe(maps, regions, image)
    loss, _ = module.loss(batch)
    loss.backward()
    assert not any(p.grad.any() for p in module.network.classifier.parameters())
    truth = module._known(batch).regions.boxes
    side = (truth[..., 2:] - truth[..., :2]).repeat(1, 1, 2)
    shift = ((seen[0].boxes - truth) / side).abs()
    assert 0.05 < shift.max() <= 0.15 + 1e-6  # a tenth of the centre and half a tenth of each side
    module.trainer = type("Trainer", (), {"current_epoch": 1})()
    loss, _ = module.loss(batch)
    loss.backward()
    assert all(p.grad.any() for p in module.network.classifier.parameters())


def test_nothing_counts_while_the_detector_is_trained_alone(tmp_path):
    """A score at chance is neither the best one nor the one that others fall short of."""
    module = cheap("multiscale_region", "detector_epochs=2")
    recorder = Recorder(RunFolder(tmp_path), 9, None, Stop())
    patience = Patience(module.monitor, patience=1, mode="max")
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    trainer = SimpleNamespace(strategy=strategy, state=state, sanity_checking=False, fast_dev_run=False)
    trainer.val_check_interval, trainer.check_val_every_n_epoch, trainer.should_stop = 1.0, 1, False
    patience.setup(trainer, module, "fit")
    scores = []
    for trainer.current_epoch, score in enumerate((0.9, 0.1, 0.2, 0.3)):
        trainer.callback_metrics = {module.monitor: torch.tensor(score)}
        scores.append(recorder.score(trainer, module, {module.monitor: score}))
        patience.on_train_epoch_end(trainer, module)
        assert not trainer.should_stop
    assert scores == pytest.approx([math.nan, math.nan, 0.2, 0.3], nan_ok=True)
    patience.on_train_epoch_end(trainer, module)
    assert trainer.should_stop
    assert cheap("multiscale_region", "detector_epochs=2", "rois=none").scored_from == 0


def test_a_training_that_would_never_learn_expressions_is_refused():
    module = cheap("multiscale_region", "detector_epochs=2")
    module.trainer = SimpleNamespace(max_epochs=2)
    with pytest.raises(UserError, match=r"trainer\.max_epochs=2 ends before .* model\.detector_epochs=2 epochs"):
        module.setup("fit")
    module.setup("test")


def test_anchors_and_crops_are_options():
    network = cheap("multiscale_region", "anchor=8", "organ_crop=5", "face_crop=9").network
    sides = network.proposals.anchors[:, 2:] - network.proposals.anchors[:, :2]
    assert sides[0].tolist() == [8, 8]
    assert sides[-9].tolist() == [128, 128]
    seen = []
    for block in (network.organ, network.face):
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    network.eval()(images(3, 64))
    assert [tuple(s) for s in seen] == [(12, 16, 5, 5), (3, 16, 9, 9)]


# -- runs -------------------------------------------------------------------------------------------------------------

RUN = [
    *["data=synthetic", "data.train=40", "data.val=14", "data.test=14", "data.subjects=40", "data.store_size=64"],
    *["data.batch_size=10", "data.eval_batch_size=10", "data.num_workers=0", "augment=multiscale_region"],
    *["model=multiscale_region", "model.pretrained=false", "model.backbone=test_resnet", "model.image_size=64"],
    *["model.width=16", "model.proposals=8", "model.anchor=8", "model.organ_crop=3", "model.face_crop=8"],
    *["model.detector_epochs=1", "trainer=cpu", "trainer.threads=1", "trainer.enable_progress_bar=false"],
]


@pytest.fixture(scope="module", params=["detector", "pseudo", "none"])
def run(request, tmp_path_factory, cache):
    """The mode, and the folder of a run of seconds in it; the detector's has W&B's record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FER_CACHE", str(cache))
        patch.setenv("WANDB_MODE", "offline")
        folder = tmp_path_factory.mktemp(request.param)
        one_epoch = ["trainer.max_epochs=1", "model.detector_epochs=0", "logger=csv"]
        more = ["trainer.max_epochs=2"] if request.param == "detector" else one_epoch
        run_experiment(composed(*RUN, f"model.rois={request.param}", *more), folder)
    return request.param, folder


def test_every_mode_runs(run):
    mode, folder = run
    results = json.loads((folder / "results.json").read_text())
    test = results["metrics"]["test"]
    assert ("region_ap50_eye" in test) == ("organs_missing" in test) == (mode != "none")
    assert any("oracle" in stamp for stamp in results["stamps"]) == (mode == "pseudo")
    assert (folder / "regions.png").exists() == (mode != "none")
    assert sum(map(sum, results["confusion"]["test"])) == 14


def test_a_run_draws_its_regions(run):
    mode, folder = run
    if mode != "none":
        assert (folder / "regions.png").stat().st_size > 10_000
    if mode == "detector":
        assert list((folder / "wandb").glob("offline-run-*/files/media/images/test/regions*.png"))


# -- data -------------------------------------------------------------------------------------------------------------


def opened(*words):
    config = composed(*words, "model=multiscale_region", "model.pretrained=false", "augment=none", "data.num_workers=0")
    data = instantiate(config.data)
    data.open()
    return config, data


def test_data_without_regions_are_refused_before_training(tmp_path):
    write_rafdb(tmp_path)
    words = ["data=rafdb", f"data.root={tmp_path}", "protocol.val_fraction=0.34"]
    config, data = opened(*words)
    with pytest.raises(UserError, match=r"RAF-DB.*data\.image=original.*fer\.prepare.*model\.rois=none"):
        MultiscaleRegion.from_data(config.model, data)
    config.model.rois = "none"
    data.tta = "flip"
    assert MultiscaleRegion.from_data(config.model, data) == {}
    config.model.rois = "detector"
    with pytest.raises(UserError, match=r"model\.rois=detector looks at one view of an image: set data\.tta=none"):
        MultiscaleRegion.from_data(config.model, data)


def test_made_regions_and_faces_that_fill_their_images_are_told(tmp_path, caplog):
    write_rafdb(tmp_path)
    words = ["data=rafdb", f"data.root={tmp_path}", "protocol.val_fraction=0.34", "data.image=original"]
    caplog.set_level("INFO")
    assert MultiscaleRegion.from_data(*models_of(opened(*words, "data.crop=none"))) == {}
    assert "regions made from 5 landmarks: " in caplog.text
    assert "fill their image" not in caplog.text
    MultiscaleRegion.from_data(*models_of(opened(*words)))
    assert "100 % of the faces fill their image" in caplog.text


def models_of(opened_data):
    config, data = opened_data
    return config.model, data
