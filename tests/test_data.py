"""From a data set's folder to batches: every data set found in conf/, and what makes runs repeatable."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed
from fakes import WRITERS
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy import stats

from fer.config import CONF
from fer.data.base import ExpressionDataModule
from fer.data.batched import BatchAugment, uniform
from fer.data.loaders import EpochSampler
from fer.data.manifest import Manifest
from fer.data.store import fit, open_store
from fer.data.transforms import Augment, Finish
from fer.errors import UserError

DATA_SETS = sorted(path.stem for path in (CONF / "data").glob("*.yaml") if not path.stem.startswith("_"))
SMALL = ["data.train=90", "data.val=21", "data.test=21", "data.subjects=30", "data.batch_size=8"]


def opened(*overrides: str) -> ExpressionDataModule:
    data = instantiate(composed(*overrides).data)
    assert isinstance(data, ExpressionDataModule)
    data.open()
    return data


def epoch(data: ExpressionDataModule, number: int = 0) -> list[dict[str, torch.Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def pixels(data: ExpressionDataModule, number: int = 0) -> dict[int, torch.Tensor]:
    """Image of each row in an epoch."""
    batches = epoch(data, number)
    return {int(i): image for b in batches for i, image in zip(b["index"], b["image"], strict=True)}


def test_every_data_set_has_a_writer_of_its_layout() -> None:
    assert len(DATA_SETS) >= 8
    assert set(DATA_SETS) - {"synthetic", "scenes"} <= set(WRITERS)  # those are drawn


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_data_set_gives_batches(name: str, tmp_path: Path) -> None:
    words = [f"data={name}", "data.num_workers=0", "protocol.val_fraction=0.3"]
    if name in WRITERS:
        WRITERS[name](tmp_path)
        words += [f"data.root={tmp_path}", "data.batch_size=4"]
    else:
        words += SMALL
    config = composed(*words)
    if name == "ckplus":  # it has no official parts
        with pytest.raises(UserError, match="no official test part"):
            opened(*words)
        words += ["protocol=holdout", "protocol.test_fraction=0.3"]
    data = opened(*words)
    batch = next(iter(data.train_dataloader()))
    size = config.model.image_size
    assert batch["image"].shape == (data.batch_size, 3, size, size)
    assert batch["image"].dtype == torch.float32
    assert torch.isfinite(batch["image"]).all()
    assert (batch["label"] == torch.as_tensor(data.label[batch["index"]])).all()
    facts = data.facts()
    assert facts["n"]["train"] == sum(facts["counts"]["train"].values())
    for part in ("val", "test"):
        rows = torch.cat([b["index"] for b in getattr(data, f"{part}_dataloader")()])
        assert sorted(rows.tolist()) == sorted(data.split.part(part).tolist())
    if data.store.manifest.subject is not None:
        assert facts["shared_subjects"] == {}


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_missing_data_says_what_mends_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root=") as found:
        opened(f"data={name}", f"data.root={tmp_path / 'none'}")
    assert str(tmp_path) in str(found.value)


def test_class_order_changes_nothing_but_the_order(tmp_path: Path) -> None:
    """Labels are joined by name: another order of the outputs permutes the labels and moves no image."""
    WRITERS["fer2013"](tmp_path)
    names = list(composed("data=fer2013").data.class_names)
    words = ["data=fer2013", f"data.root={tmp_path}"]
    a, b = opened(*words), opened(*words, f"data.class_names=[{','.join(reversed(names))}]")
    assert [a.class_names[i] for i in a.label] == [b.class_names[i] for i in b.label]
    assert a.facts()["fingerprint"] == b.facts()["fingerprint"]
    six = opened(*words, f"data.class_names=[{','.join(names[:-1])}]")
    assert len(six.split.train) < len(a.split.train)
    assert names[-1] not in {a.class_names[a.label[i]] for i in six.split.train}
    # What is left out on purpose is said, and other spellings are the same classes.
    left = sum(facts["counts"][part][names[-1]] for facts in [a.facts()] for part in ("train", "val", "test"))
    assert six.facts()["skipped"] == {f"class {names[-1]} is not in data.class_names": left}
    angry = opened(*words, "data.class_names=[Angry,disgusted,afraid,happy,sad,surprised,normal]")
    assert angry.class_names == names
    assert angry.fingerprint() == a.fingerprint()


@pytest.mark.parametrize(
    ("name", "chosen", "said"),
    [
        ("fer2013", "anger,joyful,grumpy", "FER2013 has no joyful, grumpy; it has anger, disgust, fear"),
        ("fer2013", "happiness,sad,happy", "happiness twice"),
        ("folder", "anger,contempt", "folder of images has no contempt; it has anger"),
        ("ckplus", "anger,grumpy", "CK\\+ has no grumpy"),
    ],
)
def test_classes_that_the_data_does_not_have_are_refused(name: str, chosen: str, said: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    words = [f"data={name}", f"data.root={tmp_path}", f"data.class_names=[{chosen}]"]
    with pytest.raises(UserError, match=said):
        opened(*words, *(["protocol=holdout"] if name == "ckplus" else []))


@pytest.mark.parametrize("resident", ["yes", "no"])
def test_epochs_differ_and_repeat(resident: str) -> None:
    """Per-worker seeding in albumentations 2.0.8 repeats its draws every epoch and in every worker; ours must not."""
    data = opened("data=synthetic", *SMALL, "augment=strong", f"data.resident={resident}", "data.num_workers=2")
    first, second, again = pixels(data, 0), pixels(data, 1), pixels(data, 0)
    shared = first.keys() & second.keys()
    assert len(shared) > 60
    assert not any(torch.equal(first[row], second[row]) for row in shared)
    assert all(torch.equal(first[row], again[row]) for row in first)
    flips = [
        torch.equal(first[row], first[other]) for row in list(first)[:8] for other in list(first)[:8] if row != other
    ]
    assert not any(flips)


def test_ferplus_draws_labels_by_votes_and_accepts_several(tmp_path: Path) -> None:
    """Barsoum et al. 2016, section 3: the class of an image drawn by its votes in every epoch; any of those seen."""
    WRITERS["ferplus"](tmp_path)
    words = ["data=ferplus", f"data.root={tmp_path}", "augment=light", "data.batch_size=8", "augment.crops_per_image=2"]
    seen: dict[tuple[int, int], list[int]] = {}
    for resident in ("yes", "no"):
        data = opened(*words, "data.mode=probability", f"data.resident='{resident}'", "data.num_workers=0")
        assert data.store.manifest.soft is not None
        for number in range(40):
            loader = data.train_dataloader()
            loader.sampler.set_epoch(number)
            for place, batch in enumerate(loader):
                assert "cumulative" not in batch
                time = 2 * number + place // loader.sampler.pass_batches
                for row, label in zip(batch["index"].tolist(), batch["label"].tolist(), strict=True):
                    seen.setdefault((time, row), []).append(label)
    assert all(len(set(labels)) == 1 for labels in seen.values())  # on either way the same
    assert any(len(labels) == 2 for labels in seen.values())
    drawn = np.zeros_like(data.store.manifest.soft)
    for (_, row), labels in seen.items():
        drawn[row, labels[0]] += 1
    rows = drawn.sum(1) > 60
    assert (drawn[data.store.manifest.soft == 0] == 0).all()
    share = drawn[rows] / drawn[rows].sum(1, keepdims=True)
    assert np.abs(share - data.store.manifest.soft[rows]).max() < 0.25
    assert np.abs((share - data.store.manifest.soft[rows]).mean(0)).max() < 0.03
    val = next(iter(data.val_dataloader()))
    assert torch.equal(val["label"], torch.as_tensor(data.label[val["index"]]))
    several = opened(*words, "data.mode=multi_target")
    batch = next(iter(several.train_dataloader()))
    votes = torch.as_tensor(several.store.manifest.soft)[batch["index"]]
    assert torch.equal(batch["accepted"], votes > 0)


def test_whether_the_data_is_resident_is_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training takes memory, after which the same question had another answer."""
    data = opened("data=synthetic", *SMALL)
    assert data.is_resident()
    free = 3 * data.store.images.nbytes
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (free, 2 * free))
    monkeypatch.setattr(ExpressionDataModule, "device", torch.device("cuda"))
    assert data.is_resident()
    free = 1
    assert data.is_resident()
    again = opened("data=synthetic", *SMALL)
    assert not again.is_resident()
    free = 3 * data.store.images.nbytes
    assert not again.is_resident()
    resumed = opened("data=synthetic", *SMALL)
    resumed.load_state_dict(again.state_dict())
    assert not resumed.is_resident()


def test_a_checkpoint_says_whether_the_data_was_resident(whole: Path) -> None:
    saved = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["Synthetic"] == {"resident": {"cpu": True}}


@pytest.mark.parametrize(("name", "field"), [("ferplus", "soft"), ("synthetic", "landmarks")])
def test_the_fingerprint_knows_votes_and_places(name: str, field: str, tmp_path: Path) -> None:
    """A run is not continued on other votes or boxes, though every image and every label is the same."""
    if name == "synthetic":
        data = opened("data=synthetic", *SMALL)
    else:
        WRITERS[name](tmp_path)
        data = opened(f"data={name}", f"data.root={tmp_path}")
    before, values = data.fingerprint(), getattr(data.store.manifest, field)
    assert data.fingerprint() == before
    values[int(data.split.train[0])] = values[int(data.split.train[0])][::-1].copy()
    assert data.fingerprint() != before


def test_a_loader_goes_on_where_its_state_says() -> None:
    data = opened("data=synthetic", *SMALL)
    whole = [b["index"].tolist() for b in epoch(data, 3)]
    loader = data.train_dataloader()
    loader.sampler.set_epoch(3)
    walk = iter(loader)
    for _ in range(4):
        next(walk)
    fresh = data.train_dataloader()
    fresh.load_state_dict(loader.state_dict())
    fresh.sampler.set_epoch(3)  # Lightning says so again after a resume
    assert [b["index"].tolist() for b in fresh] == whole[4:]
    fresh.sampler.set_epoch(4)
    assert len(list(fresh)) == len(whole)


def test_sharded_samplers_cover_everything_once() -> None:
    rows = np.arange(103)
    parts = [EpochSampler(lambda _: rows, 8, drop_last=False, rank=r, world_size=4) for r in range(4)]
    seen = [int(row) for sampler in parts for _, batch in sampler for row in batch]
    assert sorted(seen) == rows.tolist()


def test_balanced_sampling_draws_classes_equally() -> None:
    words = ["data=synthetic", "data.train=700", "data.val=21", "data.test=21", "data.imbalance=true"]
    shares = {}
    for sampling in ("plain", "balanced", "sqrt"):
        data = opened(*words, f"data.sampling={sampling}")
        order = data._order("train")
        drawn = np.concatenate([order(e) for e in range(30)])
        shares[sampling] = np.bincount(data.label[drawn], minlength=7) / len(drawn)
    counts = data.class_counts("train")
    assert shares["plain"] == pytest.approx(counts / counts.sum())
    assert shares["balanced"] == pytest.approx(np.full(7, 1 / 7), abs=0.02)
    assert shares["sqrt"] == pytest.approx(np.sqrt(counts) / np.sqrt(counts).sum(), abs=0.02)


def test_uniform_is_uniform_and_independent() -> None:
    draws = uniform(3, 5, torch.arange(20_000), 4).double().numpy()
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.03
    other = uniform(3, 6, torch.arange(20_000), 4).double().numpy()
    assert abs(np.corrcoef(draws[:, 0], other[:, 0])[0, 1]) < 0.03
    one = uniform(3, 5, torch.tensor([777]), 4).double().numpy()
    assert (one[0] == draws[777]).all()


def finish(train: bool, tta: str = "none", **batched: Any) -> Finish:
    recipe: Any = OmegaConf.to_container(OmegaConf.load(CONF / "augment" / "_off.yaml").batched)
    recipe = {k: v for k, v in recipe.items() if k != "_target_"} | {"erase_area": (0.1, 0.2), **batched}
    augment = Augment(crop_pct=44 / 48, crops_per_image=1, batched=BatchAugment(**recipe), per_image=[])
    return Finish(
        size=44, mean=[0.0] * 3, std=[1.0] * 3, augment=augment, seed=0, train=train, augmented=False, tta=tta
    )


def finished(step: Finish, image: torch.Tensor) -> torch.Tensor:
    return step({"image": image, "index": torch.arange(len(image))}, 0)["image"]


def test_a_random_crop_copies_pixels_exactly() -> None:
    image = torch.randint(0, 256, (64, 48, 48, 1), dtype=torch.uint8)
    out = finished(finish(train=True), image)
    offsets = set()
    for source, crop in zip(image[..., 0].float() / 255, out[:, 0], strict=True):
        places = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.allclose(source[y : y + 44, x : x + 44], crop, atol=1e-4)
        ]
        assert len(places) == 1
        offsets.add(places[0])
    assert len(offsets) > 15  # of 25
    flipped = finished(finish(train=True, flip=1.0), image)
    assert torch.allclose(flipped, out.flip(-1), atol=1e-4)


def test_erasing_fills_the_share_it_should() -> None:
    image = torch.randint(0, 256, (256, 48, 48, 3), dtype=torch.uint8)
    plain, erased = (finished(finish(train=True, erase=e), image) for e in (0.0, 1.0))
    share = (plain != erased).any(1).float().mean((1, 2))
    assert 0.09 < share.mean() < 0.21
    assert (share > 0.05).all()


def test_ten_crops_are_the_ten_crops() -> None:
    image = torch.randint(0, 256, (3, 48, 48, 1), dtype=torch.uint8)
    views = finished(finish(train=False, tta="ten_crop"), image)
    assert views.shape == (3, 10, 3, 44, 44)
    full = image.permute(0, 3, 1, 2).float().div(255).expand(-1, 3, -1, -1)
    places = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]
    expected = [full[..., y : y + 44, x : x + 44] for y, x in places]
    expected += [view.flip(-1) for view in expected]
    assert torch.equal(views, torch.stack(expected, 1))
    assert torch.equal(finished(finish(train=False), image), expected[4])
    assert torch.equal(finished(finish(train=False, tta="five_crop"), image), views[:, :5])


def test_fit_changes_size_and_channels() -> None:
    grey = np.full((30, 20), 77, dtype=np.uint8)
    assert (fit(grey, 48, 3) == 77).all()
    assert fit(np.zeros((60, 60, 3), dtype=np.uint8), 48, 1).shape == (48, 48, 1)


def manifest_of(n: int, seed: int, subjects: int | None) -> Manifest:
    rng = np.random.default_rng(seed)
    return Manifest(
        item=np.array([f"{i}.png" for i in range(n)]),
        label=rng.integers(0, 4, n),
        class_names=("anger", "fear", "neutral", "sadness"),
        split=np.full(n, "", dtype="U5"),
        form="drawn",
        subject=None if subjects is None else rng.integers(0, subjects, n).astype(str),
    )


def test_a_store_is_built_once_and_anew_for_a_changed_source(tmp_path: Path) -> None:
    built = []

    def manifest() -> Manifest:
        built.append(1)
        return manifest_of(10, 0, None)

    def read(_: Manifest, rows: np.ndarray[Any, Any]) -> Any:
        return (np.full((6, 6), row, dtype=np.uint8) for row in rows)

    key = {"size": 4, "channels": 1, "source": "a"}
    for _ in range(2):
        store = open_store(tmp_path, "x", key, manifest, read, sequential=False)
        assert store.images[7].mean() == 7
    assert len(built) == 1
    # A build killed in its middle leaves another name behind, never a half store.
    (tmp_path / "x-half.unfinished").mkdir()
    open_store(tmp_path, "x", {**key, "source": "b"}, manifest, read, sequential=True)
    assert len(built) == 2


def test_unreadable_images_are_named_and_can_be_skipped(tmp_path: Path) -> None:
    WRITERS["folder"](tmp_path)
    victim = sorted(tmp_path.rglob("*.jpg"))[0]
    victim.write_bytes(victim.read_bytes()[:60])
    words = ["data=folder", f"data.root={tmp_path}"]
    with pytest.raises(UserError, match=r"data\.on_bad_image=skip") as found:
        opened(*words)
    assert victim.name in str(found.value)
    data = opened(*words, "data.on_bad_image=skip")
    assert sum(data.facts()["skipped"].values()) == 1
    assert len(data.store.bad) == 1
