"""Scenes: faces where the boxes say, people of their own in every part, each scene a function of its name."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed
from hydra.utils import instantiate

from fer.data.identities import BACKDROP, identity, stream
from fer.data.scenes import Scenes, backdrop
from fer.errors import UserError

SMALL = ["data=scenes", "data.train=40", "data.val=12", "data.test=12", "data.subjects=40", "data.batch_size=10"]


def scenes(*overrides: str) -> Scenes:
    data = instantiate(composed(*SMALL, "augment=none", *overrides).data)
    assert isinstance(data, Scenes)
    return data


def iou(a: np.ndarray, b: np.ndarray) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[:2] + a[2:], b[:2] + b[2:])
    shared = np.prod(np.maximum(high - low, 0))
    return float(shared / (np.prod(a[2:]) + np.prod(b[2:]) - shared))


def test_boxes_keep_the_promised_sizes_and_distances() -> None:
    manifest = scenes("data.train=250").manifest()
    boxes, labels = manifest.face_boxes, manifest.face_labels
    assert boxes is not None
    assert labels is not None
    there = np.isfinite(boxes).all(2)
    assert (there == (labels >= 0)).all()
    assert (np.sort(there, axis=1)[:, ::-1] == there).all()  # no gaps
    count = there.sum(1)
    assert set(count) == {1, 2, 3, 4}
    assert np.bincount(count).max() < 0.5 * len(count)
    assert manifest.attributes["faces"].tolist() == count.astype(str).tolist()
    sides = boxes[there][:, 2:].max(1)
    assert sides.min() > 31
    assert sides.max() < 161
    assert np.percentile(sides, 90) - np.percentile(sides, 10) > 60
    assert (boxes[there][:, :2] >= -0.5).all()
    assert (boxes[there][:, :2] + boxes[there][:, 2:] <= 224.5).all()
    for row, many in zip(boxes, count, strict=True):
        assert all(iou(row[a], row[b]) < 0.1 for a, b in combinations(range(many), 2))
    # The largest face stands first and speaks for the scene.
    assert (np.nan_to_num(boxes[:, :, 2:].max(2)).argmax(1) == 0).all()
    assert (manifest.label == labels[:, 0]).all()
    assert manifest.box is not None
    np.testing.assert_array_equal(manifest.box, boxes[:, 0])
    assert (np.bincount(manifest.label, minlength=7) > 0.4 * len(count) / 7).all()
    # Landmarks and organs are the largest face's.
    assert manifest.landmarks is not None
    x, y, width, height = manifest.box.T[:, :, None]
    inside = (manifest.landmarks[..., 0] > x) & (manifest.landmarks[..., 0] < x + width)
    inside &= (manifest.landmarks[..., 1] > y) & (manifest.landmarks[..., 1] < y + height)
    assert inside.mean() > 0.98


def test_a_scene_is_a_function_of_its_name() -> None:
    few, more = scenes(), scenes("data.train=80", "data.val=20")
    a, b = few.manifest(), more.manifest()
    row_of = {item: row for row, item in enumerate(b.item.tolist())}
    rows = np.array([0, 33, 39, 45, 60])
    again = np.array([row_of[item] for item in a.item[rows].tolist()])
    for image, other in zip(few.images(a, rows), reversed(list(more.images(b, again[::-1]))), strict=True):
        np.testing.assert_array_equal(image, other)
    assert a.face_boxes is not None
    assert b.face_boxes is not None
    np.testing.assert_array_equal(a.face_boxes[rows], b.face_boxes[again])
    other_world = next(iter(scenes("data.image_seed=1").images(a, rows)))
    assert (other_world != next(iter(few.images(a, rows)))).mean() > 0.9
    parts = [next(iter(few.images(a, np.array([row])))) for row in (0, 40, 52)]  # train/0, val/0, test/0
    assert (parts[0] != parts[1]).mean() > 0.9
    assert (parts[1] != parts[2]).mean() > 0.9


def test_every_part_shows_its_own_people() -> None:
    data = scenes("data.train=80")
    number_of = {id(identity(0, s)): s for s in range(40)}
    seen = {
        part: {number_of[id(f.placed.person)] for n in range(size) for f in data._scene(f"{part}/{n:06d}")}
        for part, size in data.sizes.items()
    }
    assert all(seen.values())
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["val"]
    assert not seen["val"] & seen["test"]


def test_faces_are_where_the_boxes_say() -> None:
    data = scenes("data.pose=0.5", "data.occlusion=0")
    manifest = data.manifest()
    assert manifest.face_boxes is not None
    rows = np.arange(20)
    for row, image in zip(rows, data.images(manifest, rows), strict=True):
        behind = backdrop(stream(0, BACKDROP, data._number(str(manifest.item[row]))), 224)
        changed = (np.abs(image.astype(int) - behind) > 2).any(2)
        near = np.zeros_like(changed)
        for box in manifest.face_boxes[row]:
            if np.isfinite(box).all():
                x, y, width, height = box
                inner = changed[round(y + 0.2 * height) : round(y + 0.8 * height), round(x + 0.2 * width) :]
                assert inner[:, : round(0.6 * width)].mean() > 0.9
                # Hair, ears and a beard reach beyond the face's box.
                top, left = max(0, round(y - 0.6 * height)), max(0, round(x - 0.5 * width))
                near[top : round(y + 1.5 * height), left : round(x + 1.5 * width)] = True
        assert not (changed & ~near).any()


@pytest.mark.parametrize("resident", ["yes", "no"])
def test_batches_hold_all_faces(resident: str) -> None:
    words = ["data.num_workers=0", f"data.resident={resident}", "model.image_size=112"]
    data = scenes("data.train=20", *words)
    data.open()
    plain = {int(i): {k: v[n] for k, v in b.items()} for b in data.train_dataloader() for n, i in enumerate(b["index"])}
    manifest = data.store.manifest
    assert manifest.face_boxes is not None
    assert manifest.face_labels is not None
    for row, seen in plain.items():
        assert seen["face_boxes"].shape == (4, 4)
        assert seen["face_boxes"].dtype == torch.float32
        np.testing.assert_allclose(seen["face_boxes"], manifest.face_boxes[row] / 2, atol=0.01)
        assert seen["face_labels"].tolist() == manifest.face_labels[row].tolist()
        assert seen["face_labels"].dtype == torch.int64
    # Labels are joined by name: another order of the outputs, one class left out.
    names = [*reversed(data.class_names)][:-1]
    other = scenes("data.train=20", *words, f"data.class_names=[{','.join(names)}]")
    other.open()
    for batch in other.train_dataloader():
        for row, labels in zip(batch["index"].tolist(), batch["face_labels"].tolist(), strict=True):
            was = [data.class_names[i] if i >= 0 else "" for i in manifest.face_labels[row]]
            assert [names[i] if i >= 0 else "" for i in labels] == [n if n in names else "" for n in was]


def test_boxes_of_all_faces_are_mirrored() -> None:
    plain, mirrored = scenes("data.train=20"), scenes("data.train=20", "augment.batched=null")
    for data, flip in ((plain, 0.0), (mirrored, 1.0)):
        recipe: Any = instantiate(composed(*SMALL, "augment=light", f"augment.batched.flip={flip}").augment)
        data.augment = recipe.__class__(crop_pct=1.0, crops_per_image=1, batched=recipe.batched, per_image=[])
        data.resident = "yes"
        data.open()
    for a, b in zip(plain.train_dataloader(), mirrored.train_dataloader(), strict=True):
        side = a["image"].shape[-1]
        torch.testing.assert_close(b["image"], a["image"].flip(-1), atol=1e-4, rtol=0)
        x = side - a["face_boxes"][..., 0] - a["face_boxes"][..., 2]
        torch.testing.assert_close(b["face_boxes"][..., 0], x, equal_nan=True, atol=1e-3, rtol=0)
        torch.testing.assert_close(
            b["face_boxes"][..., 1:], a["face_boxes"][..., 1:], equal_nan=True, atol=1e-3, rtol=0
        )
        assert torch.equal(a["face_labels"], b["face_labels"])


def test_grey_scenes_and_refused_options(tmp_path: Path) -> None:
    data = scenes("data.channels=1", "data.store_size=96", "data.train=3", "data.val=1", "data.test=1")
    images = list(data.images(data.manifest(), np.arange(3)))
    assert all(image.shape == (96, 96) and image.std() > 10 for image in images)
    for word in ("data.faces=[0,4]", "data.faces=[2,5]", "data.face_size=[160,32]", "data.face_size=[8,20]"):
        with pytest.raises(Exception, match=word.partition("=")[0].replace(".", r"\.")) as found:
            scenes(word)
        assert isinstance(found.value.__cause__, UserError)
