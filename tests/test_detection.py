"""Finding faces: anchors, code of boxes, loss, scores, and a run that writes them, against slow references."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import composed
from hydra.utils import instantiate
from model_builds import batch_of, build, cheap, images, parameter_count, shaken
from torch import nn
from torchvision.ops import box_iou, generalized_box_iou

from fer.config import CONF
from fer.detection_metrics import Image, average_precision, detection_scores, match
from fer.errors import UserError
from fer.layers.anchors import AnchorGrid, anchor_shapes, shape_iou
from fer.models.detection import Faces, KnownFaces
from fer.reporting.detections import detections_figure

NAN = float("nan")
# Ten shapes for images of 64 pixels.
SHAPES = [[8.0, 10], [10, 9], [12, 16], [16, 14], [18, 22], [22, 30], [30, 26], [32, 40], [44, 42], [50, 60]]
ANCHORS = f"anchors={SHAPES}"
FINDS = ["detection=true", ANCHORS]


def faces_of(module, count):
    """A batch with up to three faces an image, some of them missing; the first face keeps to the image's label."""
    batch = batch_of(module, count)
    generator = torch.Generator().manual_seed(1)
    corner = module.image_size * 0.6 * torch.rand(count, 3, 2, generator=generator)
    side = module.image_size * (0.1 + 0.3 * torch.rand(count, 3, 2, generator=generator))
    batch["face_boxes"] = torch.cat([corner, side], dim=-1)
    batch["face_labels"] = torch.randint(module.num_classes, (count, 3), generator=generator)
    batch["face_labels"][:, 0] = batch["label"]
    for i in range(count):
        batch["face_boxes"][i, 1 + i % 3 :] = NAN
        batch["face_labels"][i, 1 + i % 3 :] = -1
    return batch


# -- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "grid", "shape"), [(7, None, (1960, 12)), (8, None, (1960, 13)), (7, 1, (10, 12))])
def test_head(classes, grid, shape):
    names = [f"class{k}" for k in range(classes)]
    with torch.device("meta"):
        plain = build("resattn_vit", classes=names)
        network = build("resattn_vit", *FINDS, *([f"detection_grid={grid}"] if grid else []), classes=names).network
        _, raw = network.forward_both(torch.empty(3, 3, 224, 224))
    assert raw.shape == (3, *shape)
    if classes == 7:
        assert parameter_count(network) - parameter_count(plain.network) == 910_456


def test_finding_faces_leaves_the_classifier_alone():
    without, finding = cheap("resattn_vit").eval(), cheap("resattn_vit", *FINDS).eval()
    added = finding.load_state_dict(without.state_dict(), strict=False)
    assert {name.split(".")[1] for name in added.missing_keys} == {"detection"}
    assert not added.unexpected_keys
    with torch.inference_mode():
        logits = without(images(3, 64))
        assert torch.equal(finding(images(3, 64)), logits)
        assert torch.equal(finding.find(images(3, 64))[0], logits)
    # Equal seeds too begin with equal weights.
    fresh = cheap("resattn_vit").state_dict()
    assert all(torch.equal(values, without.state_dict()[name]) for name, values in fresh.items())


def test_faces_do_not_depend_on_neighbours():
    module = shaken(cheap("resattn_vit", *FINDS)).double()
    batch, others = images(8, 64).double(), images(3, 64, seed=1).double()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together = module.find(batch)[1]
        assert (together[0].scores[:5] - together[1].scores[:5]).abs().max() > 1e-6
        for i, found in [
            (0, module.find(batch[:1])[1][0]),
            (5, module.find(batch[5:6])[1][0]),
            (2, module.find(torch.cat([others, batch[2:3]]))[1][3]),
            (int(order[3]), module.find(batch[order])[1][3]),
        ]:
            assert torch.equal(found.labels, together[i].labels)
            assert (found.boxes - together[i].boxes).abs().max() < 1e-9
            assert (found.scores - together[i].scores).abs().max() < 1e-9


@pytest.mark.parametrize("extra", [[], ["detection_loss.box_loss=giou"], ["detection_grid=1"], ["detection_grid=2"]])
def test_every_parameter_learns_to_find(extra):
    module = cheap("resattn_vit", *FINDS, *extra).train()
    built = module.optim.configure(module.parameter_groups(), steps_per_epoch=100, max_epochs=100)["optimizer"]
    assert {p for g in built.param_groups for p in g["params"]} == set(module.parameters())
    batch = faces_of(module, 5)
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = module.loss(batch)
    assert logits.shape == (5, 7)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    assert not [name for name, p in module.network.detection.named_parameters() if not p.grad.any()]
    assert all(p.grad.any() for p in module.network.classifier.parameters())


def test_confidence_begins_low():
    module = cheap("resattn_vit", *FINDS).eval()
    raw = module.network.forward_both(images(4, 64))[1]
    assert raw[..., 7].sigmoid().mean().item() == pytest.approx(0.01, rel=0.3)


def test_a_checkpoint_brings_its_anchors(tmp_path):
    module = shaken(cheap("resattn_vit", *FINDS))
    torch.save(module.state_dict(), tmp_path / "weights")
    other = cheap("resattn_vit", "detection=true", f"anchors={[[9.0, 9.0 + i] for i in range(10)]}").eval()
    other.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    assert other.network.detection.grid.anchors.tolist() == SHAPES
    with torch.inference_mode():
        for a, b in zip(module.find(images(2, 64))[1], other.find(images(2, 64))[1], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["detection=true"], "model.anchors=10 shapes have to be found in data"),
        ([*FINDS, "detection_grid=5"], "model.detection_grid=5: expected 1 to 4"),
        ([*FINDS, "detection_loss.box_loss=iou"], "model.detection_loss.box_loss=iou is not one of smooth_l1, giou"),
    ],
)
def test_mistakes_of_the_config(overrides, message):
    with pytest.raises(UserError, match=message):
        cheap("resattn_vit", *overrides)


def test_mistakes_about_the_data():
    module = cheap("resattn_vit", *FINDS)
    batch = batch_of(module, 2)
    del batch["box"]
    with pytest.raises(UserError, match=r"model\.detection=true learns from face boxes"):
        module.loss(batch)
    with pytest.raises(UserError, match=r"set data\.tta=none"):
        module.validation_step({**batch_of(module, 2), "image": torch.zeros(2, 5, 3, 64, 64)}, 0)

    class Few:
        tta = "none"

        def face_sizes(self, part):
            return np.array([[10.0, 12.0], [10.0, 12.0]], dtype=np.float32)

    options = {"detection": True, "anchors": 10}
    with pytest.raises(UserError, match=r"model\.anchors=10 shapes cannot be found among the 2 face boxes"):
        type(module).from_data(options, Few())
    assert type(module).from_data({**options, "detection": False}, Few()) == {}
    assert type(module).from_data({**options, "anchors": SHAPES}, Few()) == {}
    Few.tta = "ten_crop"  # which the test alone would use, after the whole training
    assert type(module).from_data({**options, "detection": False}, Few()) == {}
    with pytest.raises(UserError, match=r"model\.detection=true looks at one view of an image: set data\.tta=none"):
        type(module).from_data({**options, "anchors": SHAPES}, Few())


# -- anchors ----------------------------------------------------------------------------------------------------------


def test_kmeans_recovers_planted_shapes():
    generator = np.random.default_rng(0)
    planted = np.array([[10, 10], [30, 12], [12, 30], [40, 40], [60, 30], [30, 70], [90, 90]], dtype=float)
    sizes = planted.repeat(50, 0) * generator.uniform(0.95, 1.05, (350, 2))
    sizes = torch.from_numpy(generator.permutation(sizes))
    shapes = anchor_shapes(sizes, 7)
    assert shapes.prod(1).tolist() == sorted(shapes.prod(1).tolist())
    nearest = (shapes[:, None] - torch.from_numpy(planted)).norm(dim=2).argmin(1)
    assert sorted(nearest.tolist()) == list(range(7))
    torch.testing.assert_close(shapes.double(), torch.from_numpy(planted)[nearest], rtol=0.02, atol=0)
    assert torch.equal(shapes, anchor_shapes(sizes, 7))


def test_kmeans_needs_different_boxes():
    with pytest.raises(ValueError, match="3 anchor shapes"):
        anchor_shapes(torch.tensor([[1.0, 2], [1, 2], [3, 4]]), 3)
    assert anchor_shapes(torch.tensor([[3.0, 4], [1, 2], [1, 2]]), 2).tolist() == [[1, 2], [3, 4]]


def random_boxes(count, generator, size=64.0):
    corner = (size - 12) * torch.rand(count, 2, generator=generator)
    side = 4 + 30 * torch.rand(count, 2, generator=generator)
    return torch.cat([corner, (corner + side).clamp(max=size)], dim=1)


def test_code_round_trips():
    grid = AnchorGrid(SHAPES, cells=4, image_size=64)
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(200, generator)[None]
    owner = grid.responsible(boxes, torch.ones(1, 200, dtype=torch.bool)).owner
    kept = owner[0] >= 0
    assert kept.sum() > 50
    known = boxes[:, owner[0].clamp(min=0)]
    decoded = grid.decode(grid.encode(known))
    assert (decoded - known)[0, kept].abs().max() < 1e-4


def test_decoding_is_the_formula():
    grid = AnchorGrid(SHAPES, cells=4, image_size=64)
    code = torch.randn(2, 160, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    code[0, 33, 2] = 50
    boxes = grid.double().decode(code)
    for n in (0, 9, 10, 33, 47, 159):
        cell, (width, height) = divmod(n, 10)[0], SHAPES[n % 10]
        tx, ty, tw, th = code[0, n].tolist()
        x, y = (cell % 4 + 1 / (1 + math.exp(-tx))) * 16, (cell // 4 + 1 / (1 + math.exp(-ty))) * 16
        w, h = width * math.exp(min(tw, 4)), height * math.exp(min(th, 4))
        assert boxes[0, n].tolist() == pytest.approx([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


def slow_responsible(boxes, present):
    """Prediction by prediction, for SHAPES on 4 x 4 cells of 16 pixels: the box each answers for, and who is close."""
    owner, close = {}, set()
    for f, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        if not present[f]:
            continue
        cell = min(int((y1 + y2) / 32), 3) * 4 + min(int((x1 + x2) / 32), 3)
        iou = []
        for w, h in SHAPES:
            shared = min(w, x2 - x1) * min(h, y2 - y1)
            iou.append(shared / (w * h + (x2 - x1) * (y2 - y1) - shared))
        best = max(range(10), key=lambda a: iou[a])
        owner.setdefault(10 * cell + best, f)
        close |= {10 * cell + a for a in range(10) if iou[a] >= 0.5}
    return owner, close - set(owner)


def test_who_answers_for_a_face():
    grid = AnchorGrid(SHAPES, cells=4, image_size=64)
    generator = torch.Generator().manual_seed(3)
    boxes = torch.stack([random_boxes(6, generator) for _ in range(5)])
    boxes[0, 1] = boxes[0, 0]  # wants the prediction the first face has
    boxes[1, 0] = torch.tensor([50.0, 52, 64, 64])  # in the last cell
    boxes[1, 1] = torch.tensor([0.0, 0, 64, 64])
    present = torch.rand(5, 6, generator=generator) > 0.3
    present[0, :2], present[1, :2], present[4] = True, True, False
    got = grid.responsible(boxes, present)
    for b in range(5):
        owner, close = slow_responsible(boxes[b], present[b])
        assert {n: f for n, f in enumerate(got.owner[b].tolist()) if f >= 0} == owner
        assert set(got.close[b].nonzero().squeeze(1).tolist()) == close
    assert not (got.owner[0] == 1).any()


def test_shape_overlap():
    a, b = torch.tensor([[10.0, 20], [5, 5]]), torch.tensor([[20.0, 10], [5, 5], [10, 20]])
    expected = [[100 / 300, 25 / 200, 1], [25 / 200, 1, 25 / 200]]
    torch.testing.assert_close(shape_iou(a[:, None], b), torch.tensor(expected))


# -- loss -------------------------------------------------------------------------------------------------------------


def known_of(boxes, labels, **more):
    return KnownFaces.of({"face_boxes": torch.tensor(boxes), "face_labels": torch.tensor(labels), **more})


def test_known_faces():
    missing = [NAN] * 4
    known = known_of(
        [[[1.0, 2, 3, 4], [5, 5, 10, 10]], [[1, 1, 9, 9], missing], [missing] * 2, [missing] * 2, [[0, 0, 5, 5]] * 2],
        [[0, 1], [4, -1], [2, -1], [-1, -1], [3, 3]],
    )
    assert known.boxes[0].tolist() == [[1, 2, 4, 6], [5, 5, 15, 15]]
    assert known.boxes.isfinite().all()
    assert known.present.tolist() == [[True, True], [True, False], [False, False], [False, False], [True, True]]
    # The third image has a labelled face without a box, so that nothing found there is known to be wrong.
    assert known.complete.tolist() == [True, True, False, True, True]
    assert known.single.tolist() == [False, True, True, False, True]
    one = KnownFaces.of({"box": torch.tensor([[1.0, 2, 3, 4], missing]), "label": torch.tensor([5, 6])})
    assert one.boxes[0].tolist() == [[1, 2, 4, 6]]
    assert one.labels.tolist() == [[5], [6]]
    assert one.complete.tolist() == [True, False]
    assert one.single.tolist() == [True, True]


def slow_smooth_l1(a, b):
    d = abs(a - b)
    return d * d / 2 if d < 1 else d - 0.5


def slow_terms(raw, grid, known, classes):
    """Prediction by prediction."""
    sums = dict.fromkeys(("expression", "confidence", "background", "centre", "size", "giou"), 0.0)
    positives = 0
    decoded = grid.decode(raw[..., classes + 1 :])
    for b in range(len(raw)):
        if not known.complete[b]:
            continue
        owner, close = slow_responsible(known.boxes[b], known.present[b])
        here = known.boxes[b][known.present[b]]
        for n in range(raw.shape[1]):
            row = raw[b, n].double()
            sure = 1 / (1 + math.exp(-row[classes]))
            if n not in owner:
                near = len(here) and box_iou(decoded[b, n : n + 1], here).max() > 0.5
                if n not in close and not near:
                    sums["background"] -= math.log(1 - sure)
                continue
            positives += 1
            f = owner[n]
            x1, y1, x2, y2 = known.boxes[b, f].tolist()
            label = int(known.labels[b, f])
            if label >= 0:
                sums["expression"] -= row[:classes].log_softmax(0)[label].item()
            sums["confidence"] -= math.log(sure)
            cell = n // 10
            for value, target in (
                (row[classes + 1], (x1 + x2) / 32 - cell % 4),
                (row[classes + 2], (y1 + y2) / 32 - cell // 4),
            ):
                sums["centre"] += slow_smooth_l1(1 / (1 + math.exp(-value)), target)
            for value, target in (
                (row[classes + 3], math.log((x2 - x1) / SHAPES[n % 10][0])),
                (row[classes + 4], math.log((y2 - y1) / SHAPES[n % 10][1])),
            ):
                sums["size"] += slow_smooth_l1(value.item(), target)
            sums["giou"] += 1 - generalized_box_iou(decoded[b, n : n + 1], known.boxes[b, f : f + 1]).item()
    return {name: value / positives for name, value in sums.items()}


@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou"])
def test_loss_against_a_slow_one(box_loss):
    module = cheap("resattn_vit", *FINDS, f"detection_loss.box_loss={box_loss}")
    batch = faces_of(module, 6)
    batch["face_boxes"][3], batch["face_labels"][3] = NAN, -1  # nobody there
    batch["face_boxes"][4] = NAN  # somebody, but where?
    batch["face_labels"][2, 1] = -1  # a face whose expression nobody knows
    known = KnownFaces.of(batch)
    raw = torch.randn(6, 160, 12, generator=torch.Generator().manual_seed(0))
    raw[..., 8:] *= 0.3
    head = module.network.detection
    got = module.detection_loss.terms(head, raw, known)
    expected = slow_terms(raw, head.grid, known, 7)
    assert set(got) == ({"expression", "confidence", "background"} | (
        {"giou"} if box_loss == "giou" else {"centre", "size"}
    ))  # fmt: skip
    for name, value in got.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-4), name
    weight = {"expression": 1, "confidence": 1, "background": 0.5, "centre": 5, "size": 5, "giou": 5}
    total = sum(weight[name] * expected[name] for name in got)
    assert module.detection_loss(head, raw, known).item() == pytest.approx(total, rel=1e-4)


def test_images_of_one_expression_alone_teach_the_classifier():
    module = cheap("resattn_vit", *FINDS).train()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    batch = faces_of(module, 5)
    known = KnownFaces.of(batch)
    assert 0 < known.single.sum() < 5
    loss, logits = module.loss(batch)
    head = module.network.detection
    rows = known.single
    faces = module.detection_loss(head, module.network.forward_both(batch["image"])[1], known)
    expected = nn.functional.cross_entropy(logits[rows], batch["label"][rows]) + faces
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    assert module.single_loss(logits, batch, torch.zeros(5, dtype=torch.bool)).item() == 0


def test_no_faces_at_all():
    module = cheap("resattn_vit", *FINDS).train()
    batch = batch_of(module, 3)
    batch |= {"face_boxes": torch.full((3, 4, 4), NAN), "face_labels": torch.full((3, 4), -1)}
    loss, _ = module.loss(batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    module.eval().validation_step(batch, 0)
    assert math.isnan(module.scores("val")["map50"])


def test_duplicates_go_whatever_their_expression():
    module = cheap("resattn_vit", *FINDS)
    head = module.network.detection
    raw = torch.full((1, 160, 12), -20.0)
    boxes = torch.tensor([[10.0, 10, 40, 44], [11, 10, 41, 44], [40, 40, 60, 60], [10, 10, 30, 44]])
    places = [54, 55, 155, 53]  # anchors of the cells the centres lie in
    raw[..., 8:] = 0
    code = torch.zeros(1, 160, 4)
    for n, box, label, logit in zip(places, boxes, (2, 3, 3, 4), (2.0, 1.0, 0.0, 0.5), strict=True):
        here = torch.zeros(1, 160, 4) + box
        code[0, n] = head.grid.encode(here)[0, n]
        raw[0, n, label], raw[0, n, 7] = 20, logit
    raw[..., 8:] = code
    (found,) = head.faces(raw, iou=0.5, most=100)
    assert found.labels[:2].tolist() == [2, 3]
    torch.testing.assert_close(found.scores[:2], torch.tensor([2.0, 0.0]).sigmoid(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.boxes[:2], boxes[[0, 2]], rtol=0, atol=1e-3)
    (one,) = head.faces(raw, iou=0.5, most=1)
    assert len(one.boxes) == 1


# -- scores -----------------------------------------------------------------------------------------------------------


def image(found, known):
    """Lists of (box, label, score) and of (box, label)."""
    f, k = [list(zip(*rows, strict=True)) if rows else [[], [], []] for rows in (found, known)]
    return Image(
        np.array(f[0], dtype=float).reshape(-1, 4), np.array(f[1], dtype=int), np.array(f[2], dtype=float),
        np.array(k[0], dtype=float).reshape(-1, 4), np.array(k[1], dtype=int),
    )  # fmt: skip


A, B, C = [0, 0, 10, 10], [20, 20, 40, 40], [50, 0, 60, 10]
CLASSES = ["anger", "fear", "joy"]


def test_perfect_and_empty():
    perfect = [image([(A, 0, 0.9), (B, 1, 0.8)], [(A, 0), (B, 1)]), image([(C, 0, 0.6)], [(C, 0)])]
    scores = detection_scores(perfect, CLASSES, 0.5)
    assert set(scores) >= {"ap50_anger", "ap50_fear"}
    assert "ap50_joy" not in scores
    assert all(value == 1 for value in scores.values())
    empty = detection_scores([image([], [(A, 0), (B, 1)])], CLASSES, 0.5)
    assert (empty["map50"], empty["face_ap50"], empty["recall"]) == (0, 0, 0)
    assert math.isnan(empty["matched_acc"])
    nothing = detection_scores([image([], [])], CLASSES, 0.5)
    assert math.isnan(nothing["map50"])
    alarm = detection_scores([image([(A, 0, 0.9)], [])], CLASSES, 0.5)
    assert alarm["drawn_precision"] == 0


def test_scores_by_hand():
    """Two images, four faces. In order: right, second on the same face, wrong expression, right; one face missed."""
    images = [
        image([(A, 0, 0.9), (A, 0, 0.8), (B, 0, 0.7)], [(A, 0), (B, 1)]),
        image([(C, 0, 0.4)], [(C, 0), (A, 0)]),
    ]
    scores = detection_scores(images, CLASSES, 0.5)
    # anger: hit, miss, miss, hit of 3; precision 1 up to recall 1/3 (34 points), 1/2 up to 2/3 (33 points), then 0.
    assert scores["ap50_anger"] == pytest.approx((34 * 1 + 33 * 0.5) / 101)
    assert scores["ap50_fear"] == 0
    assert scores["map50"] == pytest.approx(scores["ap50_anger"] / 2)
    # faces: hit, miss, hit, hit of 4; 26 points at 1, 50 at 3/4.
    assert scores["face_ap50"] == pytest.approx((26 * 1 + 50 * 0.75) / 101)
    assert scores["recall"] == 3 / 4
    assert scores["drawn_recall"] == 2 / 4
    assert scores["drawn_precision"] == 2 / 3
    assert scores["matched_acc"] == 2 / 3


def test_each_known_box_is_taken_once_by_the_best():
    found = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 20], [0, 0, 10, 21]], dtype=float)
    known = np.array([[1, 0, 11, 10], [0, 0, 10, 11]], dtype=float)
    # The first overlaps the second known box most; the second then takes the first.
    assert match(found, known).tolist() == [1, 0, -1, -1]
    assert match(found[2:3], np.array([A], dtype=float)).tolist() == [0]  # IoU 0.5 exactly
    assert match(found[3:], np.array([A], dtype=float)).tolist() == [-1]
    assert match(found, np.empty((0, 4))).tolist() == [-1] * 4
    assert match(np.empty((0, 4)), known).tolist() == []


def test_average_precision_by_hand():
    assert average_precision(np.array([0.9, 0.1]), np.array([True, False]), 1) == 1
    assert average_precision(np.array([0.1, 0.9]), np.array([True, False]), 1) == 0.5
    assert average_precision(np.array([0.9]), np.array([True]), 2) == pytest.approx(51 / 101)
    assert math.isnan(average_precision(np.array([0.9]), np.array([False]), 0))


@pytest.mark.filterwarnings("ignore")
def test_scores_against_coco():
    metrics = pytest.importorskip("torchmetrics.detection")
    pytest.importorskip("pycocotools")
    rng = np.random.default_rng(0)
    images = []
    for _ in range(25):
        true = np.concatenate([c := rng.uniform(0, 60, (rng.integers(0, 5), 2)), c + rng.uniform(8, 30, c.shape)], 1)
        near = true.repeat(2, 0) + rng.normal(0, 3, (2 * len(true), 4))
        far = np.concatenate([c := rng.uniform(0, 60, (3, 2)), c + rng.uniform(8, 30, c.shape)], 1)
        labels = rng.integers(0, 3, len(true))
        said = np.where(rng.random(2 * len(true)) < 0.7, labels.repeat(2), rng.integers(0, 3, 2 * len(true)))
        boxes = np.concatenate([near, far])
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 2)
        images.append(
            Image(boxes, np.concatenate([said, rng.integers(0, 3, 3)]), rng.random(len(boxes)).round(2), true, labels)
        )
    tensors = [[torch.from_numpy(x) for x in one] for one in images]
    found = [{"boxes": b, "labels": k, "scores": s} for b, k, s, _, _ in tensors]
    known = [{"boxes": b, "labels": k} for _, _, _, b, k in tensors]
    scores = detection_scores(images, CLASSES, 0.5)
    # torchmetrics' own recalls are rounded to float32, which moves single points; pycocotools' are these.
    options = {"iou_thresholds": [0.5], "rec_thresholds": np.linspace(0, 1, 101).tolist()}
    coco = metrics.MeanAveragePrecision(**options, class_metrics=True)
    coco.update(found, known)
    official = coco.compute()
    assert scores["map50"] == pytest.approx(official["map_50"].item(), abs=1e-6)
    assert [scores[f"ap50_{c}"] for c in CLASSES] == pytest.approx(official["map_per_class"].tolist(), abs=1e-6)
    coco = metrics.MeanAveragePrecision(**options)
    for row in (*found, *known):
        row["labels"] = torch.zeros_like(row["labels"])
    coco.update(found, known)
    official = coco.compute()
    assert 0.2 < scores["face_ap50"] < 0.99
    assert scores["face_ap50"] == pytest.approx(official["map_50"].item(), abs=1e-6)
    assert scores["recall"] == pytest.approx(official["mar_100"].item(), abs=1e-6)


def test_a_step_counts_what_it_finds():
    """The module's own counting: known faces given back as found score 1, and a new epoch begins at nothing."""
    module = cheap("resattn_vit", *FINDS).eval()
    batch = faces_of(module, 5)
    known = KnownFaces.of(batch)

    def find(image):
        return module(image), [
            Faces(known.boxes[i, p], known.labels[i, p], torch.ones(int(p.sum()))) for i, p in enumerate(known.present)
        ]

    module.find = find
    module.on_validation_epoch_start()
    module.validation_step(batch, 0)
    scores = module.scores("val")
    assert scores["map50"] == scores["face_ap50"] == scores["matched_acc"] == 1
    assert "map50" not in module.scores("train")
    module.reset("val")
    assert math.isnan(module.scores("val")["map50"])
    assert module.monitor == "val/map50"
    assert cheap("resattn_vit").monitor == "val/mean_acc"


def test_faces_found_where_none_is_known_are_not_wrong():
    """The one labelled face of an image has no box: the most confident detection in it says nothing."""
    module = cheap("resattn_vit", *FINDS).eval()
    batch = {"box": torch.tensor([[10.0, 10.0, 40.0, 40.0], [NAN] * 4]), "label": torch.tensor([0, 0])}
    box, label = torch.tensor([[10.0, 10.0, 50.0, 50.0]]), torch.tensor([0])
    module.note([Faces(box, label, torch.tensor([score])) for score in (0.9, 0.95)], batch, "val")
    scores = detection_scores(module.seen["val"], ["a"], 0.5)
    assert scores["map50"] == scores["drawn_precision"] == 1


# -- data, pictures and a run -----------------------------------------------------------------------------------------

SCENES = [
    *["data=scenes", "data.subjects=40", "data.store_size=64", "model.image_size=64", "data.num_workers=0"],
    *["data.face_size=[80,130]", "trainer=cpu", "trainer.threads=1", "trainer.enable_progress_bar=false"],
    *["model=resattn_vit", "model.pretrained=false", "model.detection=true", "model.backbone=test_resnet"],
    *["model.width=64", "model.dim=32", "model.hidden=32", "model.depth=2", "model.heads=4"],
]


def scenes(*overrides):
    config = composed(*SCENES, *overrides)
    data = instantiate(config.data)
    data.open()
    return config, data


@pytest.mark.parametrize("resident", ["yes", "no"])
def test_boxes_follow_a_mirrored_image(resident):
    tiny = ["data.train=8", "data.val=2", "data.test=2", "data.batch_size=8", f"data.resident={resident}"]
    plain = ["augment=light", "augment.crop_pct=1.0", "augment.batched.flip=0.0"]
    flip = [*plain[:2], "augment.batched.flip=1.0"]
    seen = [next(iter(scenes(*tiny, *recipe)[1].train_dataloader())) for recipe in (plain, flip)]
    plain, mirrored = seen
    assert plain["index"].tolist() == mirrored["index"].tolist()
    torch.testing.assert_close(mirrored["image"], plain["image"].flip(-1), rtol=0, atol=1e-3)
    x, y, w, h = plain["face_boxes"].unbind(-1)
    expected = torch.stack([64 - x - w, y, w, h], dim=-1)
    assert expected.isfinite().any()
    torch.testing.assert_close(mirrored["face_boxes"], expected, rtol=0, atol=1e-3, equal_nan=True)


def test_anchors_come_from_the_training_part():
    _, data = scenes("data.train=30", "data.val=4", "data.test=10", "augment=none")
    manifest = data.store.manifest
    boxes = manifest.face_boxes[manifest.split == "train"].reshape(-1, 4)
    boxes = boxes[np.isfinite(boxes).all(1)]
    np.testing.assert_allclose(data.face_sizes("train"), boxes[:, 2:], rtol=1e-4)
    _, cropped = scenes("data.train=30", "data.val=4", "data.test=10", "augment=light")
    np.testing.assert_allclose(cropped.face_sizes("train"), np.minimum(boxes[:, 2:] * 48 / 44, 64), rtol=1e-4)


def test_picture_beside_the_truth():
    pixels = [np.full((64, 64, 3), 90, dtype=np.uint8)] * 2
    shown = [image([(A, 0, 0.9), (B, 0, 0.8), (C, 2, 0.1)], [(A, 0), (B, 1)]), image([], [(C, 2)])]
    figure = detections_figure(pixels, shown, CLASSES, least=0.5)
    axes = np.array(figure.axes).reshape(3, 2)
    texts = [[[t.get_text() for t in cell.texts] for cell in row] for row in axes]
    assert texts == [[[], []], [["anger", "fear"], ["joy"]], [["anger 0.90", "anger 0.80"], []]]
    right, wrong = (patch.get_edgecolor() for patch in axes[2, 0].patches)
    assert right != wrong


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    """One run of seconds from config to run folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FER_CACHE", str(cache))
        patch.setenv("WANDB_MODE", "offline")
        from fer.experiment import run_experiment

        folder = tmp_path_factory.mktemp("run")
        sizes = ["data.train=40", "data.val=8", "data.test=24", "data.batch_size=10", "model.timed_images=30"]
        config = composed(*SCENES, *sizes, "trainer.max_epochs=1", "data.tta=none", "model.draw_score=0.001")
        value = run_experiment(config, folder)
    return folder, value


def test_run_writes_its_detections(run):
    folder, value = run
    results = json.loads((folder / "results.json").read_text())
    record = json.loads((folder / "detections.json").read_text())
    test = results["metrics"]["test"]
    assert {"map50", "face_ap50", "recall", "matched_acc", "acc", "mean_acc"} <= set(test)
    assert record["metrics"]["map50"] == test["map50"]
    assert results["monitor"] == "map50"
    assert results["metrics"]["val"]["map50"] == pytest.approx(value)
    assert sum(map(sum, results["confusion"]["test"])) == 24
    assert len(record["images"]) == 24
    names = set(results["classes"])
    for one in record["images"]:
        assert 1 <= len(one["known"]) <= 4
        assert all(f["label"] in names and f["score"] >= 0.001 and len(f["box"]) == 4 for f in one["found"])
    assert (folder / "detections.png").stat().st_size > 10_000


def test_run_times_its_detection(run):
    folder, _ = run
    took = json.loads((folder / "results.json").read_text())["detection_seconds_per_image"]
    assert 0 < took["median"] <= took["p95"]
    assert (took["images"], took["different_images"], took["warm_ups"], took["batch"]) == (30, 24, 20, 1)
    assert took["device"].startswith("CPU")
    assert took["precision"]


def test_run_keeps_its_anchors(run):
    folder, _ = run
    from omegaconf import OmegaConf

    kept = OmegaConf.load(folder / "config.yaml").model.anchors
    weights = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert len(kept) == 10
    torch.testing.assert_close(weights["network.detection.grid.anchors"], torch.tensor(list(map(list, kept))))
    area = [w * h for w, h in kept]
    assert area == sorted(area)


def test_another_run_begins_with_its_anchors(run, cache, monkeypatch):
    """Which its head knows; the record of the run that begins with them must not name others."""
    from fer.starting import begin_with, options_with, pinned

    folder, _ = run
    monkeypatch.setenv("FER_CACHE", str(cache))
    kept = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    anchors = options_with(pinned(str(folder)), {"anchors": [[1.0, 2.0]]})["anchors"]
    torch.testing.assert_close(torch.tensor(anchors), kept["network.detection.grid.anchors"])
    config, data = scenes("data.train=40", "data.val=8", "data.test=24", f"model.anchors={anchors}")
    config.data.class_names = data.class_names
    begin_with(instantiate(config.model), pinned(str(folder)), data)
    config.model.anchors[0][0] += 1
    with pytest.raises(UserError, match=r"other weights .*anchors\); give model=\.\.\. the options in"):
        begin_with(instantiate(config.model), pinned(str(folder)), data)


def test_run_shows_its_picture_on_wandb(run):
    folder, _ = run
    assert list((folder / "wandb").glob("offline-run-*/files/media/images/test/detections*.png"))


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sixty_four_scenes_are_learned():
    plain = ["augment=none", "model.conv_dropout=0.0", "model.mean=[0.5,0.5,0.5]", "model.std=[0.25,0.25,0.25]"]
    # Boxes on either side of a face may overlap each other by less than half.
    sizes = ["data.train=64", "data.val=2", "data.test=2", "data.batch_size=16", "model.duplicate_iou=0.4"]
    config, data = scenes(*sizes, *plain)
    module_class = type(cheap("resattn_vit"))
    config.data.class_names = data.class_names
    config.model.anchors = module_class.from_data(config.model, data)["anchors"]
    torch.manual_seed(0)
    module = instantiate(config.model).train()
    epochs = 80
    loader = data.train_dataloader()
    optimizer = torch.optim.Adam(module.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=4 * epochs)
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            loss, _ = module.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    module.eval().reset("val")
    loader.sampler.set_epoch(-1)
    with torch.inference_mode():
        for batch in loader:
            module.validation_step(batch, 0)
    assert module.scores("val")["map50"] >= 0.9


# The blocks of the papers, by the names of their modules.
BLOCKS = {
    "resattn_vit": {
        *["backbone", "fine_attention.channel", "fine_attention.local", "coarse_attention.channel"],
        *["coarse_attention.local", "lateral", "deconvolution", "ema.conv1", "ema.conv3", "conv", "tokens"],
        *["encoder.blocks", "head", "detection.hidden", "detection.out", "classifier"],
    },
    "multiscale_region": {
        *["backbone", "pyramid.lateral", "pyramid.smooth", "pyramid.p6", "pyramid.p7", "proposals.objectness"],
        *["proposals.boxes", "head.block", "head.kind", "head.boxes", "organ", "face", "whole.branch", "classifier"],
    },
}


def test_the_documented_figures_are_those_of_the_records():
    """docs/scenes.md against docs/results/small/scenes_*.json."""
    docs = CONF.parent / "docs"
    rows = [line for line in (docs / "scenes.md").read_text().splitlines() if line.startswith("| `small/scenes_")]
    records = [json.loads(path.read_text()) for path in sorted((docs / "results" / "small").glob("scenes_*.json"))]
    assert {record["model"] for record in records} == set(BLOCKS)
    assert len(rows) == len(records)
    for row, one in zip(sorted(rows), records, strict=True):
        shown = [one["experiment"], one["map50"], one["face_ap50"], one["matched_acc"], one["n"]["test"]]
        shown += [one["faces"], one["parameters"], one["core_minutes"], one["git_commit"]]
        formats = ["`{}`", "{:.3f}", "{:.3f}", "{:.3f}", "{}", "{}", "{:,}", "{:.1f}", "{}"]
        assert row == "| " + " | ".join(f.format(x) for f, x in zip(formats, shown, strict=True)) + " |"
        assert one["map50"] >= 0.8
        assert one["n"]["test"] >= 200
        assert one["stamps"] == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", BLOCKS)
def test_the_faces_of_unseen_people_are_found_and_read(name, tmp_path):
    """mAP@0.5 of at least 0.8 on held-out scenes by the recipe of conf/experiment/small, 8 to 10 core-minutes each."""
    from fer.experiment import run_experiment

    config = composed(f"experiment=small/scenes_{name}", "logger=csv", "trainer.enable_progress_bar=false")
    run_experiment(config, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    weights = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert not [b for b in BLOCKS[name] if not any(key.startswith(f"network.{b}.") for key in weights)]
    assert results["stamps"] == []
    assert results["selected_on"] == "val"
    assert results["n"]["test"] >= 200
    assert results["metrics"]["test"]["map50"] >= 0.8
