"""Pseudo-labels: planted landmarks give planted boxes, each rule rejects, and batches have what comes of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import composed
from fakes import write_ckplus, write_rafdb
from hydra.utils import instantiate

from fer.data.drawing import render
from fer.data.manifest import Manifest
from fer.data.places import follow
from fer.data.regions import CLOSE, ELSEWHERE, ORDER, OUTSIDE, face_boxes, organ_boxes, with_regions
from fer.errors import UserError
from fer.faces.align import landmark_transform, move_points
from fer.faces.preparation import Preparation

FIVE = np.array([(35.0, 40), (65, 40), (50, 60), (40, 75), (60, 75)])  # of a face of width 80 at (10, 10)
BOX = (10.0, 10, 80, 80)


def manifest_of(*faces: np.ndarray, box: list | None = None) -> Manifest:
    n = len(faces)
    return Manifest(
        item=np.array([f"{i}.png" for i in range(n)]),
        label=np.zeros(n, dtype=np.int64),
        class_names=("neutral",),
        split=np.full(n, ""),
        form="planted",
        landmarks=np.stack(faces).astype(np.float32),
        box=None if box is None else np.array(box, dtype=np.float32),
    )


def windows_of(count: int) -> np.ndarray:
    return np.tile([0, 0, 100, 100], (count, 1))


def test_five_planted_points_give_planted_boxes() -> None:
    made, record = with_regions(manifest_of(FIVE, box=[BOX]), windows_of(1))
    expected = [(35.5 - 13.2, 40.5 - 13.2, 26.4, 26.4), (65.5 - 13.2, 40.5 - 13.2, 26.4, 26.4)]
    expected += [(50.5 - 13.2, 60.5 - 13.2, 26.4, 26.4), (50.5 - 20, 75.5 - 12, 40, 24)]
    np.testing.assert_allclose(made.organ_boxes[0], expected, rtol=1e-5)
    np.testing.assert_allclose(made.box, [BOX])
    none = dict.fromkeys((OUTSIDE, ELSEWHERE, ORDER, CLOSE), 0)
    assert record == {"landmarks": 5, "accepted": 1, "no_landmarks": 0, "rejected": none}


def test_68_planted_points_give_planted_boxes() -> None:
    points = np.full((1, 68, 2), 50.0)
    points[0, 36:42] = [(20, 30), (24, 28), (28, 28), (32, 30), (28, 32), (24, 32)]
    points[0, 48:68] = np.column_stack([np.linspace(35, 65, 20), np.full(20, 80.0)])
    boxes = organ_boxes(points, np.array([np.nan]))
    # 12 x 4 px and 3 around; a closed mouth of no height still has a box.
    np.testing.assert_allclose(boxes[0, 0], (20.5 - 3, 28.5 - 3, 18, 10))
    np.testing.assert_allclose(boxes[0, 3], (35.5 - 7.5, 80.5 - 7.5, 45, 15))
    # The drawn faces' own organ boxes come from other code by the same rule, cut at the face's outline.
    compared = 0
    for index in range(12):
        face = render(0, index, size=200, channels=1, expression="fear", subject=index, intensity=0.8)
        boxes = organ_boxes(face.landmarks68[None], np.array([np.nan]))[0]
        uncut = np.abs(boxes - face.organ_boxes).max(axis=1) < 1e-3
        inside = np.minimum(boxes[:, :2], 200 - boxes[:, :2] - boxes[:, 2:]).min(axis=1) > 0
        compared += int(uncut.sum())
        low, high = face.organ_boxes[:, :2], face.organ_boxes[:, :2] + face.organ_boxes[:, 2:]
        assert (low[inside] >= boxes[inside, :2] - 1e-3).all()
        assert (high[inside] <= (boxes[:, :2] + boxes[:, 2:])[inside] + 1e-3).all()
    assert compared > 30


def test_a_face_without_a_box_gets_the_square_of_the_crop() -> None:
    turned = (FIVE - 50) @ np.array([[0.9, 0.3], [-0.3, 0.9]]) + 50
    found = face_boxes(np.stack([FIVE, turned]))
    for points, (x, y, width, height) in zip((FIVE, turned), found, strict=True):
        transform = landmark_transform(points, 101, margin=0.0)
        assert transform is not None
        assert width == pytest.approx(101 / np.sqrt(np.linalg.det(transform[:, :2])))
        assert height == pytest.approx(width)
        np.testing.assert_allclose(move_points(np.array([x + width / 2 - 0.5, y + width / 2 - 0.5]), transform), 50)


def moved(*shifts: tuple[int, int, int]) -> np.ndarray:
    """The five points, some of them (number, right, down) elsewhere."""
    points = FIVE.copy()
    for number, right, down in shifts:
        points[number] += (right, down)
    return points


WRONG = {
    OUTSIDE: moved((3, 0, 40), (4, 0, 40)),
    ELSEWHERE: moved((0, -30, 0)),
    ORDER: moved((2, 0, 25)),
    CLOSE: moved((0, 12, 0), (1, -12, 0)),
}


def test_each_rule_rejects() -> None:
    exchanged = FIVE[[1, 0, 2, 4, 3]]
    missing = np.where(np.arange(5)[:, None] == 2, np.nan, FIVE)
    faces = [FIVE, *WRONG.values(), exchanged, missing]
    made, record = with_regions(manifest_of(*faces, box=[BOX] * len(faces)), windows_of(len(faces)))
    assert np.isfinite(made.organ_boxes).all(axis=(1, 2)).tolist() == [True] + [False] * 6
    assert np.isfinite(made.box).all()  # the data set's own
    assert record["rejected"] == {OUTSIDE: 1, ELSEWHERE: 1, ORDER: 1, CLOSE: 2}
    assert (record["accepted"], record["no_landmarks"]) == (1, 1)
    # A box that came from rejected landmarks goes with them; each box is known or not as a whole.
    made, _ = with_regions(manifest_of(FIVE, WRONG[ORDER]), windows_of(2))
    assert np.isfinite(made.box).tolist() == [[True] * 4, [False] * 4]
    # What the store cut away is outside.
    made, record = with_regions(manifest_of(FIVE, box=[BOX]), np.array([[10, 50, 80, 40]]))
    assert record["rejected"][OUTSIDE] == 1


def test_own_organ_boxes_and_no_landmarks_stay_as_they_are() -> None:
    data = instantiate(
        composed("data=synthetic", "data.train=12", "data.val=3", "data.test=3", "data.subjects=20").data
    )
    manifest = data.manifest()
    assert with_regions(manifest, windows_of(18)) == (manifest, None)
    data.open()
    assert data.facts()["regions"] is None


def test_rafdb_batches_have_regions(tmp_path: Path) -> None:
    write_rafdb(tmp_path)
    words = ["data=rafdb", f"data.root={tmp_path}", "data.image=original", "data.store_size=160"]
    words += ["model.image_size=160", "protocol.val_fraction=0.34", "augment=none", "data.num_workers=0"]
    whole = instantiate(composed(*words, "data.crop=none").data)
    whole.open()
    n = len(whole.store.manifest)
    assert whole.facts()["regions"]["accepted"] == n
    batch = next(iter(whole.test_dataloader()))
    # Photographs of 200 x 160 px, the annotated face 100 x 100 at (30, 20), an eye at (60.5, 50).
    torch.testing.assert_close(batch["box"][0], torch.tensor([24.0, 20, 80, 100]))
    torch.testing.assert_close(batch["organ_boxes"][0, 0], torch.tensor([(61 - 16.5) * 0.8, 50.5 - 16.5, 26.4, 33]))
    cut = instantiate(composed(*words).data)
    cut.open()
    torch.testing.assert_close(next(iter(cut.test_dataloader()))["box"][0], torch.tensor([0.0, 0, 160, 160]))


def test_ckplus_landmarks_become_regions(tmp_path: Path) -> None:
    write_ckplus(tmp_path)
    folds = ["protocol.folds=2", "protocol.val_fraction=0.5"]
    data = instantiate(composed("data=ckplus", f"data.root={tmp_path}", "protocol=kfold", *folds).data)
    data.open()
    record = data.facts()["regions"]
    assert record["landmarks"] == 68
    n = len(data.store.manifest)
    assert record["accepted"] + record["no_landmarks"] + sum(record["rejected"].values()) == n
    assert data.store.manifest.organ_boxes.shape == (n, 4, 4)


@pytest.mark.filterwarnings("ignore")
def test_prepared_faces_keep_their_landmarks(tmp_path: Path) -> None:
    small = ["data=synthetic", "data.train=6", "data.val=2", "data.test=2", "data.subjects=20", "data.store_size=96"]
    data = instantiate(composed(*small, "data.occlusion=0").data)
    manifest = data.manifest()
    output = tmp_path / "faces"
    Preparation(data, manifest, None, size=64, margin=0.1, output=output, record={}).run()
    words = ["data=folder", f"data.root={output}", "data.store_size=64", "model.image_size=64", "augment=none"]
    words += ["data.class_names=null"]  # so few faces need not show all
    folder = instantiate(composed(*words, "data.num_workers=0").data)
    folder.open()
    found = folder.store.manifest
    assert len(found) == 10
    # Level eyes at the height and distance that fer/faces/align.py promises.
    left, right, nose, *_ = found.landmarks.swapaxes(0, 1)
    np.testing.assert_allclose(left[:, 1], right[:, 1], atol=0.05)
    frontal = right[:, 0] - left[:, 0] > 18
    np.testing.assert_allclose(left[frontal, 1], 63 / 2 - 0.45 / 3.36 * 64, atol=0.1)
    assert (nose[:, 1] > left[:, 1]).all()
    assert folder.facts()["regions"]["accepted"] >= 8
    batch = next(iter(folder.test_dataloader()))
    assert batch["organ_boxes"].shape == (2, 4, 4)
    assert batch["box"].isfinite().all()
    table = output / "manifest.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], lines[1].rpartition(" ")[0], *lines[2:]]))
    with pytest.raises(UserError, match=r"manifest\.csv, row 0: expected \d+ numbers"):
        folder.manifest()


def test_organs_of_every_face_are_mirrored() -> None:
    organs = torch.rand(2, 3, 4, 4) / 4
    matrix = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]], [[1, 0, 0], [0, 1, 0]]])
    out = follow({"face_organ_boxes": organs}, matrix, 100)["face_organ_boxes"]
    one = [follow({"organ_boxes": organs[:, f]}, matrix, 100)["organ_boxes"] for f in range(3)]
    torch.testing.assert_close(out, torch.stack(one, dim=1))
    assert not torch.equal(out[0, :, 0, 2:], 50 * 2 * organs[0, :, 0, 2:])
    torch.testing.assert_close(out[1, :, 0, 2:], 50 * 2 * organs[1, :, 0, 2:])
