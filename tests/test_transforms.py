"""Augmentation: what moves with the image, what an image's own random numbers decide, both forms of every recipe."""

import dataclasses
import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import albumentations
import cv2
import numpy as np
import pytest
import torch
from conftest import composed
from fakes import write_rafdb
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as reference  # type: ignore[import-untyped]

from fer.config import CONF
from fer.data.base import ExpressionDataModule
from fer.data.batched import uniform
from fer.data.loaders import EpochSampler, StoreDataset, WorkerLoader
from fer.data.manifest import MIRROR, Manifest
from fer.data.per_image import PerImage, WorkerAugment, read
from fer.data.places import follow, inverse
from fer.data.rand_augment import OPERATIONS, PAINTS, RandAugment, _painted
from fer.data.transforms import Augment, Finish
from fer.errors import UserError

RECIPES = sorted(path.stem for path in (CONF / "augment").glob("[!_]*.yaml"))
LIGHT_AND_COLOUR = ("ColorJitter", "RandomBrightnessContrast", "Erasing", "CoarseDropout", "Equalize")
LIGHT_AND_COLOUR += ("Sharpen", "Posterize", "Solarize", "AutoContrast")


@functools.cache
def config(name: str) -> DictConfig:
    return composed(f"augment={name}", "data.store_size=64")


def recipe(name: str, **batched: Any) -> Augment:
    """A recipe of conf/augment, its batched form changed."""
    changed = OmegaConf.merge(config(name), {"augment": {"batched": batched}} if batched else {})
    found = instantiate(changed.augment)
    assert isinstance(found, Augment)
    return found


class Bends(RandAugment):
    """RandAugment's changes of place alone."""

    def paint(self, image: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return image


def geometry_only(name: str) -> Augment:
    """A recipe without what changes the pixels where they are."""
    full = recipe(name, brightness=0, contrast=0, saturation=0, hue=0, grey=0, erase=0)
    assert full.batched is not None
    per_image = [t for t in full.per_image if type(t).__name__ not in LIGHT_AND_COLOUR]
    for some in per_image:
        if isinstance(some, albumentations.SomeOf):
            some.transforms = [t for t in some.transforms if type(t).__name__ not in LIGHT_AND_COLOUR]
    more = full.batched.rand_augment and Bends(**dataclasses.asdict(full.batched.rand_augment))
    batched = dataclasses.replace(full.batched, rand_augment=more)
    return dataclasses.replace(full, batched=batched, per_image=per_image)


def finish(augment: Augment, size: int, *, augmented: bool = False, train: bool = True) -> Finish:
    return Finish(
        size=size,
        mean=[0.0] * 3,
        std=[1.0] * 3,
        augment=augment,
        seed=0,
        train=train,
        augmented=augmented,
        tta="none",
    )


# -- places -----------------------------------------------------------------------------------------------------------


class Marked(ExpressionDataModule):
    """Pictures of 90 x 70 pixels, dark but for a spot at one landmark (rows 0, 2 ...) or a filled box (1, 3 ...).

    The spot of row r marks landmark (r // 2) % 5 alone; of a box the four corners lie off the pixels' borders.
    """

    title = "marked pictures"
    expected_tree = "(nothing)"
    request = "nowhere"
    on_disk = False
    n: ClassVar[int] = 120

    def source_fingerprint(self) -> str:
        return "marked"

    def manifest(self) -> Manifest:
        rng = np.random.default_rng(0)
        five = np.array([[35, 25], [55, 26], [45, 37], [37, 47], [53, 46]]) + rng.uniform(-6, 6, (self.n, 5, 2))
        box = np.array([25.0, 16, 40, 40]) + rng.uniform(-4, 4, (self.n, 4))
        organs = np.concatenate([np.concatenate([five[:, :3] - 3, np.full((self.n, 3, 2), 7)], axis=2)] * 2, axis=1)
        return Manifest(
            item=np.array([str(i) for i in range(self.n)]),
            label=np.arange(self.n) % 2,
            class_names=("anger", "fear"),
            split=np.array(["train"] * (self.n - 20) + ["val"] * 10 + ["test"] * 10),
            form="drawn",
            landmarks=five.astype(np.float32),
            box=box.astype(np.float32),
            organ_boxes=organs[:, [0, 1, 2, 5]].astype(np.float32),
            face_boxes=np.stack([box, np.full_like(box, np.nan)], axis=1).astype(np.float32),
            face_labels=np.stack([np.arange(self.n) % 2, np.full(self.n, -1)], axis=1),
        )

    def images(self, manifest: Manifest, rows: Any) -> Iterator[Any]:
        assert manifest.landmarks is not None
        assert manifest.box is not None
        y, x = np.mgrid[:70, :90]
        for row in rows:
            if row % 2:
                # Coverage of each pixel by the box, from its borders in corner coordinates.
                left, top, width, height = manifest.box[row]
                across = np.clip(np.minimum(x + 1, left + width) - np.maximum(x, left), 0, 1)
                down = np.clip(np.minimum(y + 1, top + height) - np.maximum(y, top), 0, 1)
                yield np.rint(255 * across * down).astype(np.uint8)
            else:
                px, py = manifest.landmarks[row, (row // 2) % 5]
                yield np.rint(255 * np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 2.0**2))).astype(np.uint8)


def marked(tmp_path: Path, augment: Augment, *, resident: str, crop_to_box: bool = False, size: int = 80) -> Marked:
    protocol = instantiate(config("none").protocol)
    data = Marked(
        root="",
        class_names=None,
        image_size=size,
        mean=[0.0] * 3,
        std=[1.0] * 3,
        store_size=64,
        channels=1,
        batch_size=25,
        eval_batch_size=10,
        num_workers=0,
        resident=resident,
        on_bad_image="fail",
        sampling="plain",
        augment=augment,
        tta="none",
        protocol=protocol,
        seed=0,
        cache=str(tmp_path),
    )
    data.crop_to_box = crop_to_box
    data.open()
    return data


def centre_of_light(image: np.ndarray) -> np.ndarray:
    """x, y of the bright spot: the centroid of what lies within 8 pixels of the brightest."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    top = np.unravel_index(cv2.GaussianBlur(image, (0, 0), 1.5).argmax(), image.shape)
    weight = image * (np.hypot(x - top[1], y - top[0]) < 8)
    return np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()


@pytest.mark.parametrize(
    ("name", "resident", "crop_to_box"),
    [
        ("none", "yes", True),
        ("strong", "yes", False),
        ("strong", "no", True),
        ("resattn_vit", "yes", True),
        ("resattn_vit", "no", False),
        ("convcut", "yes", False),
        ("convcut", "no", False),
    ],
)
def test_places_are_where_the_image_shows_them(name: str, resident: str, crop_to_box: bool, tmp_path: Path) -> None:
    augment = recipe("none") if name == "none" else geometry_only(name)
    data = marked(tmp_path, augment, resident=resident, crop_to_box=crop_to_box)
    manifest, windows = data.store.manifest, data.store.windows
    assert manifest.landmarks is not None
    spots, boxes = [], []
    for number in range(2):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        for batch in loader:
            assert {k: tuple(v.shape[1:]) for k, v in batch.items()} == {
                **{"image": (3, 80, 80), "label": (), "index": (), "face_labels": (2,)},
                **{"box": (4,), "organ_boxes": (4, 4), "face_boxes": (2, 4), "landmarks": (5, 2)},
            }
            assert all(batch[k].dtype == torch.float32 for k in ("box", "organ_boxes", "face_boxes", "landmarks"))
            # One of several faces moves as the only one does; there is no second one.
            assert torch.equal(batch["face_boxes"][:, 0].nan_to_num(-1), batch["box"].nan_to_num(-1))
            assert batch["face_boxes"][:, 1].isnan().all()
            for i, row in enumerate(batch["index"].tolist()):
                image = batch["image"][i, 0].numpy()
                if row % 2:
                    inside = np.argwhere(image > 0.5)
                    low, high = inside.min(0)[::-1], inside.max(0)[::-1] + 1
                    x, y, width, height = batch["box"][i].tolist()
                    if min(x, y) > 0 and max(x + width, y + height) < 80:  # not cut
                        found = np.concatenate([low, high]) - (x, y, x + width, y + height)
                        boxes.append(np.abs(found).max())
                    continue
                # A spot at the border of what is stored leaves a trail of repeated edge pixels.
                place = manifest.landmarks[row, (row // 2) % 5] - windows[row, :2]
                if ((place < 6) | (place > windows[row, 2:] - 7)).any():
                    continue
                # In a mirror image the marked landmark has its counterpart's place in the list.
                candidates = batch["landmarks"][i][[(row // 2) % 5, MIRROR[5][(row // 2) % 5]]].numpy()
                spot = centre_of_light(image)
                if image.max() > 0.5 and ((spot > 6) & (spot < 73)).all():  # whole, so that its centroid is its centre
                    spots.append(np.nanmin(np.hypot(*(candidates - spot).T)))
    assert len(spots) > 40
    assert np.max(spots) < 1, np.sort(spots)[-5:]
    if crop_to_box:  # the box fills the image
        return
    assert len(boxes) > 50
    assert np.max(boxes) < 2.5, np.sort(boxes)[-5:]  # a turned corner is less than half bright
    assert np.median(boxes) < 1


def test_places_follow_a_readers_crop(tmp_path: Path) -> None:
    """RAF-DB's photographs are cut to the box (30, 20) to (130, 120) and shown at 200 pixels."""
    write_rafdb(tmp_path)
    words = ["data=rafdb", "data.image=original", f"data.root={tmp_path}", "data.num_workers=0", "data.resident=no"]
    data = instantiate(composed(*words, "augment=none", "data.image_size=200", "protocol.val_fraction=0.3").data)
    data.open()
    batch = next(iter(data.test_dataloader()))
    assert batch["image"].shape[-1] == 200
    torch.testing.assert_close(batch["box"], torch.tensor([[0.0, 0, 200, 200]]).expand_as(batch["box"]))
    # The left eye's centre, (60.5, 50) of the photograph, is 31 and 30.5 pixels from the crop's corner.
    eye = torch.tensor([31.0, 30.5]) * 2 - 0.5
    torch.testing.assert_close(batch["landmarks"][:, 0], eye.expand(len(batch["landmarks"]), 2))


def test_a_mirror_image_swaps_left_and_right() -> None:
    rng = np.random.default_rng(0)
    off = recipe("light", flip=1.0).batched
    assert off is not None
    for count in (5, 68):
        points = torch.from_numpy(rng.uniform(-0.8, 0.8, (7, count, 2)).astype(np.float32))
        organs = torch.from_numpy(rng.uniform(-0.4, 0.4, (7, 4, 4)).astype(np.float32)).abs()
        image = torch.rand(7, 1, 48, 48)
        _, source = off(image, torch.arange(7), 0, 0, 48, 48)
        out = follow({"landmarks": points, "organ_boxes": organs}, inverse(source), 48)
        x = (points[..., 0] + 1) * 24 - 0.5
        torch.testing.assert_close(out["landmarks"][..., 0], 47 - x[:, list(MIRROR[count])])
        torch.testing.assert_close(out["landmarks"][..., 1], ((points[..., 1] + 1) * 24 - 0.5)[:, list(MIRROR[count])])
        right = 48 - (organs[..., 0] - organs[..., 2] + 1) * 24
        torch.testing.assert_close(out["organ_boxes"][..., 0] + out["organ_boxes"][..., 2], right[:, [1, 0, 2, 3]])
    # By hand: the corners of both mouths, both brows' outer ends, the eyes' inner corners.
    assert MIRROR[5][3] == 4
    assert [MIRROR[68][i] for i in (48, 17, 39, 0, 30, 8)] == [54, 26, 42, 16, 30, 8]


@pytest.mark.parametrize("resident", ["yes", "no"])
def test_the_left_eye_stays_on_the_left(resident: str) -> None:
    words = ["data=synthetic", "data.train=90", "data.val=21", "data.test=21", "data.subjects=30", "data.batch_size=45"]
    data = instantiate(composed(*words, "augment=multiscale_region", f"data.resident={resident}").data)
    data.open()
    for batch in data.train_dataloader():
        assert (batch["landmarks"][:, 0, 0] < batch["landmarks"][:, 1, 0]).all()
        assert (batch["landmarks"][:, 3, 0] < batch["landmarks"][:, 4, 0]).all()
        assert (batch["organ_boxes"][:, 0, 0] < batch["organ_boxes"][:, 1, 0]).all()
        # The eye's landmark lies in the eye's box, the mouth below both.
        x, y, width, height = batch["organ_boxes"][:, :2].unbind(-1)
        eye = batch["landmarks"][:, :2] + 0.5
        inside = (eye[..., 0] >= x) & (eye[..., 0] <= x + width) & (eye[..., 1] >= y) & (eye[..., 1] <= y + height)
        assert inside.float().mean() > 0.97


def test_what_is_outside_or_missing_is_nan() -> None:
    box = torch.tensor([[0.0, 0, 0.5, 0.5], [-0.95, 0, 0.04, 0.5], [-1, 0, 0.5, 0.5], [torch.nan] * 4])
    points = torch.tensor([[[0.0, 0]], [[0.95, 0]], [[0.5, 0.5]], [[torch.nan, 0]]]).expand(-1, 5, -1)
    zoom = torch.tensor([[1.25, 0, 0], [0, 1.25, 0]]).expand(4, 2, 3)
    out = follow({"box": box, "landmarks": points}, zoom, 100)
    torch.testing.assert_close(out["box"][0], torch.tensor([18.75, 18.75, 62.5, 62.5]))
    assert out["box"][1].isnan().all()
    torch.testing.assert_close(out["box"][2], torch.tensor([0, 18.75, 18.75, 62.5]))  # cut at the image's border
    assert out["box"][3].isnan().all()
    assert out["landmarks"].isnan().any(-1)[:, 0].tolist() == [False, True, False, True]


def test_a_pipeline_that_bends_is_refused_where_places_must_follow() -> None:
    bend = albumentations.ElasticTransform(alpha=80, sigma=8, p=1.0)
    image = np.zeros((64, 64, 1), np.uint8)
    assert PerImage([bend], 0, track=False)(image, 0, 0)[0].shape == (64, 64, 1)
    lean = albumentations.Perspective(scale=(0.1, 0.2), p=1.0)
    for transform in (bend, lean, albumentations.SomeOf([lean], n=1)):
        with pytest.raises(UserError, match=r"augment\.per_image"):
            PerImage([transform], 0, track=True)(image, 0, 0)


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_there_is_a_recipe_for_every_paper() -> None:
    assert {"cbam_resnet", "resattn_vit", "two_stream", "convcut", "multiscale_region"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_in_both_forms_on_grey_and_colour(name: str) -> None:
    augment = recipe(name)
    for channels in (1, 3):
        rng = np.random.default_rng(channels)
        stored = cv2.resize(
            rng.integers(0, 256, (24, 8, 8, channels), np.uint8).reshape(24 * 8, 8, channels), (64, 1536)
        )
        images = stored.reshape(24, 64, 64, channels)
        batch = {"image": torch.from_numpy(images), "index": torch.arange(24)}
        batched = finish(augment, 56)(batch, 3)["image"]
        seen = WorkerAugment(augment, 56, 0, track=True)(images, 3, np.arange(24))["image"]
        per_image = finish(augment, 56, augmented=True)({**batch, "image": torch.from_numpy(np.stack(seen))}, 3)[
            "image"
        ]
        plain = finish(augment, 56, train=False)(batch, 3)["image"]
        for out in (batched, per_image):
            assert out.shape == (24, 3, 56, 56)
            assert out.min() > -1e-5
            assert out.max() < 1 + 1e-5
            changed = sum(not torch.allclose(a, b, atol=0.02) for a, b in zip(out, plain, strict=True))
            assert changed == 0 if name == "none" else changed > 15
            # The same picture on the whole, or two thirds of it: not noise, not another image.
            if name in ("light", "cbam_resnet", "standard", "multiscale_region"):
                assert (out.mean((1, 2, 3)) - plain.mean((1, 2, 3))).abs().median() < 0.15


@pytest.mark.parametrize("name", ["light", "crop_flip", "strong"])
def test_workers_move_an_image_as_the_device_does(name: str) -> None:
    """Both forms draw the same geometry; smooth pictures, on which interpolations agree."""
    augment = geometry_only(name)
    y, x = np.mgrid[:64, :64] / 64
    rows = np.arange(40)
    waves = [np.sin(2 * x + 0.1 * r) * np.cos(3 * y - 0.2 * r) + x * (r % 3) / 3 for r in range(40)]
    images = np.rint(100 + 60 * np.stack(waves)[..., None]).astype(np.uint8)
    for size in (56, 59, 80, 40, 28, 17):
        batch = {"image": torch.from_numpy(images), "index": torch.from_numpy(rows)}
        device = finish(augment, size)(batch, 3)["image"][:, 0]
        seen = np.stack(WorkerAugment(augment, size, 0, track=False)(images, 3, rows)["image"])[..., 0]
        assert (device - torch.from_numpy(seen) / 255).abs().max() < 0.02


def detail(images: torch.Tensor) -> float:
    """Mean difference of neighbouring pixels."""
    return float(images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean())


@pytest.mark.parametrize("side", [96, 103])
def test_images_much_larger_than_the_input_are_shrunk_without_false_detail(side: int) -> None:
    """Training shows the network no more fine detail than evaluation, on either way, and places still fit."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, side, side, 1), np.uint8)
    off = {"flip": 0, "shift": 0, "scale": [1.0, 1.0]}
    augment = dataclasses.replace(geometry_only("standard"), crop_pct=1.0)
    assert augment.batched is not None
    turned = dataclasses.replace(augment, batched=dataclasses.replace(augment.batched, **off, rotate=1.0))
    batch = {"image": torch.from_numpy(images), "index": torch.arange(16)}
    shown = detail(finish(turned, 32, train=False)(batch, 0)["image"])
    assert detail(torch.from_numpy(images[:, :32, :32, 0]) / 255) > 3 * shown  # as reading single pixels would have it
    seen = WorkerAugment(turned, 32, 0, track=False)(images, 0, np.arange(16))["image"]
    for way in (finish(turned, 32)(batch, 0)["image"], torch.from_numpy(np.stack(seen)[..., 0]) / 255):
        assert 0.6 * shown < detail(way) < 1.5 * shown  # of pure noise, which area averages keep more of
    # A broad spot lies where the map of its places says.
    y, x = np.mgrid[:side, :side]
    spot = rng.uniform(0.4, 0.6, (16, 2)) * side
    broad = np.exp(-((x - spot[:, :1, None]) ** 2 + (y - spot[:, 1:, None]) ** 2) / 50)
    images = np.rint(255 * broad)[..., None].astype(np.uint8)
    moved = WorkerAugment(augment, 32, 0, track=True)(images, 0, np.arange(16))
    relative = torch.from_numpy((spot * 2 + 1) / side - 1)
    places = torch.einsum("bij,bj->bi", moved["matrix"][:, :, :2].double(), relative) + moved["matrix"][:, :, 2]
    device = finish(augment, 32)({"image": torch.from_numpy(images), "index": torch.arange(16)}, 0)["image"][:, 0]
    for way in (device.numpy(), np.stack(moved["image"])[..., 0] / 255):
        down, across = np.mgrid[:32, :32]
        mass = way.sum((1, 2))
        found = np.stack([(way * across).sum((1, 2)) / mass, (way * down).sum((1, 2)) / mass], axis=1)
        assert np.abs(found - ((places.numpy() + 1) * 16 - 0.5)).max() < 0.25


def test_an_image_is_copied_where_that_suffices() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    np.testing.assert_array_equal(read(image, np.array([[1.0, 0, 3], [0, 1, 2]]), 16), image[2:18, 3:19])
    mirrored = read(image, np.array([[-1.0, 0, 18], [0, 1, 0]]), 16)
    np.testing.assert_array_equal(mirrored, image[:16, 3:19][:, ::-1])
    whole = read(image, np.array([[1.0, 0, 0], [0, 1, 0]]), 20)
    assert not np.shares_memory(whole, image)  # albumentations may write into it
    larger = read(image, np.array([[0.5, 0, -0.25], [0, 0.5, -0.25]]), 40)
    np.testing.assert_array_equal(larger, cv2.resize(image, (40, 40), interpolation=cv2.INTER_LINEAR))
    outside = read(image, np.array([[1.0, 0, -4], [0, 1, 0]]), 20)
    np.testing.assert_array_equal(outside[:, 4:], image[:, :16])
    assert (outside[:, :4] == image[:, :1]).all()  # the edge repeated


def test_a_resized_crop_lies_in_the_image() -> None:
    off = recipe("light", flip=0.0, resized_crop=[0.5, 0.9]).batched
    assert off is not None
    _, source = off(torch.rand(500, 1, 16, 16), torch.arange(500), 0, 0, 16, 16)
    side, place = source[:, 0, 0], source[:, :, 2]
    assert ((side**2 > 0.4999) & (side**2 < 0.9001)).all()
    assert ((place.abs() + side[:, None]) < 1.0001).all()
    assert np.ptp(place.numpy(), axis=0).min() > 0.4


def test_probabilities_are_what_they_say() -> None:
    draws = recipe("resattn_vit").batched
    assert draws is not None
    image = torch.rand(2000, 3, 8, 8)
    out, source = draws(image, torch.arange(2000), 0, 0, 8, 8)
    turned, flipped = source[:, 0, 1] != 0, source[:, 0, 0] < 0
    grey = (out[:, :1] - out).abs().amax((1, 2, 3)) < 1e-5
    for share, expected in ((turned, 0.5), (flipped, 0.5), (grey, 0.2)):
        assert share.float().mean().item() == pytest.approx(expected, abs=0.04)
    assert np.corrcoef(turned, flipped)[0, 1] == pytest.approx(0, abs=0.06)
    degrees = torch.atan2(source[:, 1, 0], source[:, 1, 1]).rad2deg()
    assert degrees.abs().max() < 6.001


def test_colour_turns_about_its_luma() -> None:
    image = 0.35 + 0.3 * torch.rand(50, 3, 6, 6)
    plain = {"flip": 0.0, "crop": 6}
    for changed in ({"saturation": 0.5}, {"hue": 0.1}, {"grey": 1.0}):
        augment = recipe("light", flip=0.0, **changed).batched
        assert augment is not None
        out, _ = augment(image, torch.arange(50), 0, 0, plain["crop"], 6)
        torch.testing.assert_close(luma(out), luma(image), atol=1e-3, rtol=0)
        assert (out - image).abs().amax((1, 2, 3)).gt(1e-3).float().mean() > 0.9
    torch.testing.assert_close(out, reference.rgb_to_grayscale(image, 3), atol=2e-3, rtol=0)


def luma(image: torch.Tensor) -> torch.Tensor:
    return (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)


# -- RandAugment ------------------------------------------------------------------------------------------------------


def test_rand_augments_operations_are_torchvisions() -> None:
    image = torch.rand(4, 3, 16, 16)
    by = torch.tensor([-0.3, -0.1, 0.2, 0.3]).view(4, 1, 1, 1)
    for name in PAINTS:
        out = _painted(name, image, by)
        for one, was, strength in zip(out, image, by.flatten().tolist(), strict=True):
            factor = 1 + 0.9 * strength
            expected = {
                "brightness": lambda x, f=factor: reference.adjust_brightness(x, f),
                "colour": lambda x, f=factor: reference.adjust_saturation(x, f),
                "contrast": lambda x, f=factor: reference.adjust_contrast(x, f),
                "sharpness": lambda x, f=factor: reference.adjust_sharpness(x, f),
                "posterize": lambda x, s=strength: (
                    reference.posterize((x * 255).to(torch.uint8), 8 - round(4 * abs(s))).float().div(255)
                ),
                "solarize": lambda x, s=strength: reference.solarize(x, 1 - abs(s)),
                "autocontrast": reference.autocontrast,
            }[name](was)
            torch.testing.assert_close(one, expected, atol=5e-3, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_rand_augment_draws_every_operation_and_respects_its_magnitude() -> None:
    index = torch.arange(4000)
    many = RandAugment(number=2, magnitude=9)
    u = uniform(0, 0, index, many.draws)
    for slot in range(2):
        operation, strength = many._chosen(u, slot)
        counts = torch.bincount(operation.long(), minlength=len(OPERATIONS))
        assert counts.min() > 0.75 * 4000 / len(OPERATIONS)
        assert strength.abs().max() <= 0.3
        assert strength.std().item() == pytest.approx(0.3 / 3**0.5, abs=0.01)
    still = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(4000, 2, 3)
    bent = many.bend(still, u)
    assert (bent != still).any(2).any(1).float().mean() == pytest.approx(1 - (8 / 13) ** 2, abs=0.04)
    assert bent[:, :, 2].abs().max() <= 2 * 0.9 * 0.3 + 0.1
    none = RandAugment(number=2, magnitude=0)
    image = torch.rand(200, 3, 8, 8)
    torch.testing.assert_close(none.bend(still, u), still)
    changed = (none.paint(image, u[:200]) - image).abs().amax((1, 2, 3)) > 1 / 255
    stretched = [(none._chosen(u[:200], s)[0] == OPERATIONS.index("autocontrast")) for s in range(2)]
    assert not (changed & ~(stretched[0] | stretched[1])).any()


# -- repeatability ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resattn_vit", "convcut"])
def test_pixels_and_places_do_not_depend_on_batches_or_workers(name: str) -> None:
    words = ["data=synthetic", "data.train=40", "data.val=10", "data.test=10", "data.subjects=30", "data.channels=3"]

    def epoch(*more: str) -> dict[int, dict[str, torch.Tensor]]:
        data = instantiate(composed(*words, f"augment={name}", *more).data)
        data.open()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(2)
        return {int(b["index"][i]): {k: v[i] for k, v in b.items()} for b in loader for i in range(len(b["index"]))}

    resident = [epoch("data.resident=yes", f"data.batch_size={b}") for b in (1, 8, 20)]
    read = [epoch("data.resident=no", "data.batch_size=10", f"data.num_workers={w}") for w in (0, 1, 4)]
    for runs in (resident, read):
        for other in runs[1:]:
            for row, seen in other.items():
                for key, values in seen.items():
                    assert torch.equal(values.nan_to_num(-9), runs[0][row][key].nan_to_num(-9)), (key, row)
    assert len(read[0]) == 40


class Flips(Dataset[int]):
    """Whether albumentations mirrors and erases an image, seeded the library's way or ours."""

    def __init__(self, ours: bool) -> None:
        flip, hole = albumentations.HorizontalFlip(p=0.5), albumentations.CoarseDropout(fill=9, p=0.5)
        self.ours = PerImage([flip, hole], 0, track=False) if ours else None
        self.theirs = albumentations.Compose([flip, hole], seed=0)
        self.image = np.tile(np.arange(32, dtype=np.uint8), (32, 1))[..., None]

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, row = place
        image = self.image.copy()
        out = self.ours(image, epoch, row)[0] if self.ours else self.theirs(image=image)["image"]
        return torch.from_numpy(out)

    def read(self, epoch: int) -> torch.Tensor:
        places = [[(epoch, row) for row in range(start, start + 4)] for start in range(0, 32, 4)]
        return torch.cat(list(DataLoader(self, batch_sampler=places, num_workers=2)))


def test_albumentations_own_seeding_repeats_in_workers_and_ours_does_not() -> None:
    """The measured defect of 2.0.8: both workers draw one stream, and every epoch draws it again."""
    theirs = [Flips(ours=False).read(epoch) for epoch in (0, 1)]
    assert torch.equal(theirs[0], theirs[1])
    assert torch.equal(theirs[0][0:4], theirs[0][4:8])  # the first batches of worker 0 and of worker 1
    ours = [Flips(ours=True).read(epoch) for epoch in (0, 1)]
    assert sum(torch.equal(a, b) for a, b in zip(*ours, strict=True)) < 20
    assert not torch.equal(ours[0][0:4], ours[0][4:8])
    assert torch.equal(ours[0], Flips(ours=True).read(0))


def test_transforms_of_an_image_decide_independently() -> None:
    """In 2.0.8 ``set_random_seed`` starts every transform alike: an image is erased if and only if it is mirrored."""
    both = {True: np.zeros((2, 2)), False: np.zeros((2, 2))}
    for ours, counts in both.items():
        flips = Flips(ours)
        for row in range(200):
            if ours:
                out = flips[0, row][..., 0].numpy()
            else:
                flips.theirs.set_random_seed(row)
                out = flips.theirs(image=flips.image)["image"][..., 0]
            mirrored = np.median(np.diff(out.astype(int), axis=1)) < 0
            erased = (out != (flips.image[:, ::-1, 0] if mirrored else flips.image[..., 0])).any()
            counts[int(mirrored), int(erased)] += 1
    assert both[False][0, 1] == both[False][1, 0] == 0
    assert both[True].min() > 30, both[True]


def test_several_crops_of_an_image_in_an_epoch() -> None:
    sampler = EpochSampler(lambda e: np.random.default_rng(e).permutation(20), 6, drop_last=True, passes=3)
    single = EpochSampler(sampler.order, 6, drop_last=True)
    sampler.set_epoch(2)
    seen = list(sampler)
    assert len(seen) == len(sampler) == 9
    expected = []
    for number in (6, 7, 8):
        single.set_epoch(number)
        expected += list(single)
    assert all(a == b and (x == y).all() for (a, x), (b, y) in zip(seen, expected, strict=True))
    for position in range(10):
        sampler.position = position
        rest = list(sampler)
        assert [e for e, _ in rest] == [e for e, _ in seen[position:]]
        assert all((x == y).all() for (_, x), (_, y) in zip(rest, seen[position:], strict=True))


# -- memory -----------------------------------------------------------------------------------------------------------


class Records(StoreDataset):
    """What must not be done: a Python object per image, whose count of references every reading writes to."""

    def __init__(self, images: Any, n: int) -> None:
        super().__init__(images, {}, None)
        self.records = [{"label": random.random(), "item": f"{i}.jpg"} for i in range(n)]

    def __getitems__(self, place: tuple[int, Any]) -> dict[str, torch.Tensor]:
        labels = [self.records[row]["label"] for row in place[1]]
        return {**super().__getitems__(place), "label": torch.tensor(labels)}


def own_memory(pid: int) -> int:
    """Bytes of a process that it shares with nobody and that no file backs."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Private_Dirty")


def growth(dataset: StoreDataset, augment: Augment, n: int, batch_size: int) -> float:
    """Largest growth of a worker's memory per epoch, after the first two, in bytes."""
    sampler = EpochSampler(lambda e: np.random.default_rng(e).permutation(n)[:3000], batch_size, drop_last=False)
    step = finish(augment, 8, augmented=True)
    loader = WorkerLoader(sampler, dataset, 2, torch.device("cpu"), step, remember_position=False)
    sizes = []
    for number in range(5):
        sampler.set_epoch(number)
        for _ in loader:
            pass
        workers = loader.loader._iterator._workers  # type: ignore[union-attr]
        sizes.append([own_memory(w.pid) for w in workers])
    return float((np.diff(np.array(sizes[2:]), axis=0).mean(0)).max())


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux' /proc/<pid>/smaps_rollup")
def test_workers_do_not_grow_with_a_large_manifest(tmp_path: Path) -> None:
    n = 300_000
    images = np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint8, (n, 8, 8, 1))
    images = np.load(tmp_path / "images.npy", mmap_mode="c")
    fields = {
        "label": np.zeros(n, np.int64),
        "soft": np.zeros((n, 8), np.float32),
        "box": np.zeros((n, 4), np.float32),
        "landmarks": np.zeros((n, 5, 2), np.float32),
    }
    augment = recipe("light", flip=0.5)
    worker = WorkerAugment(augment, 8, 0, track=True)
    assert growth(StoreDataset(images, fields, worker), augment, n, 100) < 1_000_000
    assert growth(Records(images, n), augment, n, 100) > 1_000_000  # the measure sees what it should
