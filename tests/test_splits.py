"""Protocols: nobody on two sides, every image held out once, folds that depend on the seed alone, honest stamps."""

import dataclasses
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, composed
from fake_wandb import wandb_records
from fakes import WRITERS
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from torch import Tensor, nn

from fer.at_test import Predictions
from fer.config import CONF
from fer.data.base import ExpressionDataModule
from fer.data.ckplus import default_folds
from fer.data.manifest import PARTS, Manifest
from fer.data.protocols import NOT_OFFICIAL, SELECTED_ON_TEST, Holdout, KFold, LeaveOneSubjectOut, Official, Protocol
from fer.data.splits import Split
from fer.errors import UserError
from fer.experiment import print_data, run_experiment
from fer.models.base import ExpressionModule
from fer.runs import RunFolder, read_json

PROTOCOLS = sorted(path.stem for path in (CONF / "protocol").glob("[!_]*.yaml"))
COMMON: dict[str, Any] = {
    **{"split_seed": 0, "val_fraction": 0.25, "select_on": "val", "by": "auto"},
    **{"allow_shared_people": False, "drop_leaks": False, "stamp": None},
}
FOLDS: dict[str, Any] = {**COMMON, "fold": 0, "pool": "auto", "held_out": "test"}


def kfold(**changes: Any) -> KFold:
    return KFold(**{**FOLDS, "folds": 5, "own_folds": True, **changes})


def split(protocol: Protocol, manifest: Manifest, copies: Any = None) -> Split:
    n = len(manifest)
    return protocol.split(manifest, np.arange(n, dtype=np.uint64) if copies is None else copies, np.ones(n, dtype=bool))


def random_manifest(seed: int, known: str, n: int = 200) -> tuple[Manifest, Any]:
    """Unbalanced classes, copies, and people of unequal diligence; ``crossing`` films some of them together."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 9))
    people = rng.choice(40, n, p=rng.dirichlet(np.full(40, 3.0)))
    film = people * 10 + rng.integers(0, 3, n)
    if known == "crossing":
        film[(people % 20 == 1) & (film % 10 == 0)] -= 10
    return Manifest(
        item=np.array([f"{zlib.crc32(bytes([i % 256, i // 256])):08x}.png" for i in range(n)]),
        label=rng.choice(k, n, p=rng.dirichlet(np.full(k, 1.0))),
        class_names=tuple(np.array(list("hgfedcba"))[rng.permutation(k)]),
        split=np.where(people % 4 == 0, "test", "train"),
        form="drawn",
        subject=people.astype(str) if known in ("subject", "both", "crossing") else None,
        sequence=film.astype(str) if known in ("sequence", "both", "crossing") else None,
    ), rng.integers(0, int(0.8 * n), n).astype(np.uint64) if known != "subject" else np.zeros(n, dtype=np.uint64)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99_999),
    known=st.sampled_from(["subject", "sequence", "both", "crossing", "copies"]),
    folds=st.integers(2, 6),
    pool=st.sampled_from(["train", "all"]),
    held_out=st.sampled_from(["test", "val"]),
)
def test_nobody_on_two_sides_and_every_image_held_out_once(
    seed: int, known: str, folds: int, pool: str, held_out: str
) -> None:
    manifest, copies = random_manifest(seed, known)
    pool = "train" if held_out == "val" else pool
    rows = set(np.flatnonzero(manifest.split == "train") if pool == "train" else range(len(manifest)))
    together = [v for v in (manifest.subject, manifest.sequence) if v is not None] or [copies]
    shuffled = np.random.default_rng(seed + 1).permutation(len(manifest))
    times: Counter[int] = Counter()
    for fold in range(folds):
        protocol = kfold(folds=folds, fold=fold, pool=pool, held_out=held_out, split_seed=seed)
        made = split(protocol, manifest, copies)
        held = made.part("test" if held_out == "test" else "val")
        times.update(held.tolist())
        parts = [set(made.part(part).tolist()) for part in PARTS]
        assert sum(map(len, parts)) == len(set.union(*parts))
        if held_out == "test":
            assert set.union(*parts) == rows
        else:
            assert parts[2] == set(np.flatnonzero(manifest.split == "test").tolist())
            assert parts[0] | parts[1] == rows
            parts = parts[:2]
        for values in together:
            sides = [{values[row] for row in part} for part in parts]
            assert sum(map(len, sides)) == len(set.union(*sides))
        # Neither the order of rows nor that of the classes decides anything.
        assert made.fold == fold
        if fold == folds - 1:
            other = dataclasses.replace(
                manifest.select(shuffled),
                class_names=manifest.class_names[::-1],
                label=len(manifest.class_names) - 1 - manifest.label[shuffled],
            )
            again = split(protocol, other, copies[shuffled])
            assert made.fingerprint(manifest) == again.fingerprint(other)
    assert times == dict.fromkeys(rows, 1)


def test_another_split_seed_makes_other_folds_and_classes_stay_in_proportion() -> None:
    manifest, copies = random_manifest(3, "copies", n=1000)
    made = [split(kfold(fold=1, split_seed=seed, pool="all"), manifest, copies) for seed in (0, 0, 1)]
    assert made[0].fingerprint(manifest) == made[1].fingerprint(manifest) != made[2].fingerprint(manifest)
    share = np.bincount(manifest.label) / len(manifest)
    for part in PARTS:
        labels = manifest.label[made[0].part(part)]
        assert np.abs(np.bincount(labels, minlength=len(share)) / len(labels) - share).max() < 0.05


def test_parts_have_the_sizes_asked_for() -> None:
    manifest, _ = random_manifest(0, "copies", n=1200)
    for fraction in (0.05, 0.1, 1 / 6, 0.2, 0.25, 1 / 3, 0.4, 0.5):
        made = split(Holdout(**{**COMMON, "test_fraction": fraction}), manifest)
        assert len(made.test) / 1200 == pytest.approx(fraction, abs=0.01)
    with pytest.raises(UserError, match=r"lie in \(0, 0.5\]"):
        split(Holdout(**{**COMMON, "test_fraction": 0.7}), manifest)


# -- CK+ ----------------------------------------------------------------------------------------------------------


def opened(config: DictConfig, **protocol: Any) -> ExpressionDataModule:
    config = config.copy()
    for key, value in protocol.items():
        config.protocol[key] = value
    data = instantiate(config.data)
    assert isinstance(data, ExpressionDataModule)
    data.open()
    return data


def test_the_published_ck_folds() -> None:
    """The beginning of the list that most papers use, with a person's images scattered."""
    names = ["S005", "S010", "S011", "S014", "S022", "S026", "S028", "S029", "S032", "S034", "S035"]
    subjects = np.array([*names, *names[::-1]])
    expected = dict(zip(names, [*range(10), 0], strict=True))
    assert default_folds(subjects).tolist() == [expected[name] for name in subjects]


@pytest.mark.parametrize("form", ["official", "ck48"])
def test_ck_has_its_customary_folds(form: str, tmp_path: Path) -> None:
    WRITERS["ckplus"](tmp_path, form)
    config = composed("data=ckplus", f"data.root={tmp_path}", "protocol=kfold", "protocol.folds=10")
    held: dict[str, int] = {}
    counts: Counter[int] = Counter()
    for fold in range(10):
        data = opened(config, fold=fold)
        facts = data.facts()
        people = {Path(str(item)).name.split("_")[0] for item in data.store.manifest.item[data.split.test]}
        assert not held.keys() & people
        held |= dict.fromkeys(people, fold)
        counts.update(data.split.test.tolist())
        assert "customary folds" in facts["split"]
        assert facts["fold"] == fold
        assert facts["shared_subjects"] == facts["shared_sequences"] == {}
        # Six images each of some classes, none of the others: a fold need not have all.
        assert 0 in facts["counts"]["test"].values()
    assert held == {name: k % 10 for k, name in enumerate(sorted(held))}
    assert counts == dict.fromkeys(range(len(data.store.manifest)), 1)
    other = opened(config, own_folds=False)
    assert "stratified, grouped by subject" in other.split.rule
    assert "stratified" in opened(config, folds=7).split.rule
    with pytest.raises(UserError, match=r"protocol\.fold=10: there are 10 folds, numbered 0 to 9"):
        opened(config, fold=10)


def test_people_on_both_sides_are_refused_and_when_forced_stamped(tmp_path: Path) -> None:
    WRITERS["ckplus"](tmp_path)
    for protocol in ("kfold", "holdout"):
        config = composed("data=ckplus", f"data.root={tmp_path}", f"protocol={protocol}", "protocol.by=image")
        with pytest.raises(
            UserError, match=r"1\d subjects \(the first is S0\d\d\) on both sides.*by=auto.*allow_shared"
        ):
            opened(config)
        data = opened(config, allow_shared_people=True)
        facts = data.facts()
        for what, names in (("subjects", data.store.manifest.subject), ("sequences", data.store.manifest.sequence)):
            assert names is not None
            both = set(names[data.split.train]) & set(names[data.split.test])
            assert facts[f"shared_{what}"]["train/test"] == len(both) > 10
            assert f"{len(both)} {what} in train/test" in facts["stamps"][0]
        assert opened(config, by="auto", allow_shared_people=True).facts()["stamps"] == []


def test_frames_of_a_sequence_are_kept_together_where_people_are_unknown() -> None:
    manifest, copies = random_manifest(1, "sequence")
    with pytest.raises(UserError, match=r"sequences \(the first is .*allow_shared_people=true"):
        split(kfold(by="image", pool="all"), manifest, copies)
    made = split(kfold(by="image", pool="all", allow_shared_people=True), manifest, copies)
    assert "sequences in train/test" in made.stamps[-1]
    assert set(made.copied(copies).values()) == {0}


def test_a_list_without_people_is_stamped(tmp_path: Path) -> None:
    WRITERS["ckplus"](tmp_path, "csv")
    config = composed("data=ckplus", f"data.root={tmp_path}", "protocol=holdout", "protocol.val_fraction=0.3")
    facts = opened(config).facts()
    assert facts["stamps"] == ["not subject-independent: ckextended.csv names no subjects"]
    assert "names no subjects" in facts["warnings"][0]


# -- each protocol ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_works_on_synthetic_faces(name: str) -> None:
    data = opened(composed(*TINY, f"protocol={name}"))
    facts, manifest = data.facts(), data.store.manifest
    pooled = name not in ("official", "paper")
    # Drawn faces are no benchmark: cross-validation pools all of them.
    assert sum(facts["n"][part] for part in PARTS) == 204 if pooled else facts["n"]["test"] == 42
    assert facts["shared_subjects"] == {}
    assert facts["fold"] == (0 if name in ("kfold", "loso", "paper_8020") else None)
    shares = {"kfold": 1 / 5, "paper_8020": 1 / 5, "paper_5to1": 1 / 6, "holdout": 1 / 5}
    if name in shares:
        assert facts["n"]["test"] / 204 == pytest.approx(shares[name], abs=0.04)
    if name.startswith("paper_"):
        assert "not comparable with the official split" in facts["stamps"][0]
    if name == "loso":
        assert set(manifest.subject[data.split.test]) == {"s0000"}
    if name == "paper":
        assert np.array_equal(data.split.val, data.split.test)
        assert (data.split.selected_on, facts["selected_on"], facts["stamps"]) == ("test", "test", [SELECTED_ON_TEST])
        assert (manifest.split[data.split.train] == "train").all()
    batch = next(iter(data.val_dataloader()))
    assert set(batch["index"].tolist()) <= set(data.split.val.tolist())


def test_leaving_one_subject_out() -> None:
    manifest, copies = random_manifest(5, "both")
    assert manifest.subject is not None
    names = sorted(set(manifest.subject.tolist()))
    made = split(LeaveOneSubjectOut(**{**FOLDS, "pool": "all", "fold": 7}), manifest, copies)
    assert set(manifest.subject[made.test]) == {names[7]}
    assert made.shared(manifest.subject) == {}
    with pytest.raises(UserError, match=rf"there are {len(names)} subjects, numbered 0 to {len(names) - 1}"):
        split(LeaveOneSubjectOut(**{**FOLDS, "pool": "all", "fold": len(names)}), manifest, copies)
    with pytest.raises(UserError, match=r"drawn names none: use protocol=kfold"):
        split(LeaveOneSubjectOut(**FOLDS), random_manifest(5, "sequence")[0])


def test_a_benchmarks_test_part_is_left_alone_unless_asked_for() -> None:
    manifest, _ = random_manifest(2, "subject", n=400)
    official = np.flatnonzero(manifest.split == "test")
    made = split(kfold(), manifest)
    assert not np.isin(official, np.concatenate([made.train, made.val, made.test])).any()
    assert made.stamps == (NOT_OFFICIAL,)
    assert split(kfold(pool="all"), manifest).stamps == (NOT_OFFICIAL,)
    rotating = split(kfold(held_out="val"), manifest)
    assert np.array_equal(rotating.test, official)
    assert rotating.stamps == ()
    without = dataclasses.replace(manifest, split=np.full(400, ""))
    assert split(kfold(), without).stamps == ()
    with pytest.raises(UserError, match="no official training part, use pool=all"):
        split(kfold(pool="train"), without)
    with pytest.raises(UserError, match="no official test part, use held_out=test"):
        split(kfold(held_out="val"), without)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"by": "face"}, "protocol.by=face is not one of auto, image"),
        ({"pool": "test"}, "protocol.pool=test is not one of auto, train, all"),
        ({"folds": 1}, "protocol.folds=1: expected at least 2"),
        ({"held_out": "val", "pool": "all"}, "takes protocol.pool=train"),
        ({"held_out": "val", "select_on": "test"}, "takes protocol.select_on=val"),
    ],
)
def test_options_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        kfold(**changes)
    with pytest.raises(InstantiationException):
        instantiate(composed("protocol=kfold", *(f"protocol.{k}={v}" for k, v in changes.items())).protocol)


def test_too_few_people_or_images_for_the_folds() -> None:
    manifest, copies = random_manifest(0, "both")
    with pytest.raises(UserError, match="99 folds need at least 99 people, found"):
        split(kfold(folds=99, pool="all"), manifest, copies)
    few, _ = random_manifest(0, "copies", n=12)
    with pytest.raises(UserError, match="no class has an image for each of 11 folds"):
        split(kfold(folds=11, pool="all"), dataclasses.replace(few, label=np.arange(12) % len(few.class_names)))


def test_leaks_leave_train_and_only_train(capsys: pytest.CaptureFixture[str]) -> None:
    manifest = random_manifest(0, "copies", n=100)[0]
    manifest.split[:] = ["train"] * 60 + ["val"] * 20 + ["test"] * 20
    copies = np.arange(100, dtype=np.uint64)
    copies[3], copies[7] = 65, 90  # pixel-identical to a validation and to a test image
    kept, clean = (split(Official(**{**COMMON, "drop_leaks": drop}), manifest, copies) for drop in (False, True))
    assert set(kept.train) - set(clean.train) == {3, 7}
    assert (clean.val == kept.val).all()
    assert (clean.test == kept.test).all()
    assert clean.stamps == ("2 leaked copies left out of train",)
    before = {"val images also in train": 1, "test images also in train": 1, "test images also in val": 0}
    assert kept.copies_before == clean.copies_before == kept.copied(copies) == before
    assert clean.copied(copies) == dict.fromkeys(before, 0)


def test_both_counts_of_copies_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    WRITERS["folder"](tmp_path)
    trained = sorted((tmp_path / "train").rglob("*.jpg"))[0]
    trained.write_bytes(next((tmp_path / "test" / trained.parent.name).glob("*.jpg")).read_bytes())
    config = composed("data=folder", f"data.root={tmp_path}")
    for drop, after in ((False, 1), (True, 0)):
        facts = opened(config, drop_leaks=drop).facts()
        assert facts["copies_before_drop_leaks"]["test images also in train"] == 1
        assert facts["copies"]["test images also in train"] == after
        print_data(facts)
        printed = capsys.readouterr().out
        assert f"drop_leaks={str(drop).lower()}" in printed
        assert f"test images also in train 1 -> {after}" in printed


def test_a_forced_and_test_selected_fold_is_stamped_in_every_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["protocol=kfold", "protocol.folds=4", "protocol.fold=3", "protocol.select_on=test", "protocol.by=image"]
    words += ["protocol.allow_shared_people=true", "trainer.max_epochs=1"]
    run = tmp_path / "run"
    run_experiment(composed(*TINY, *words), run)
    printed = capsys.readouterr().out
    results = read_json(run / "results.json")
    assert results["fold"] == 3
    assert results["selected_on"] == "test"
    assert len(results["stamps"]) == 2
    assert results["stamps"][0] == SELECTED_ON_TEST
    assert "subjects in train/test" in results["stamps"][1]
    for name in ("confusion_val.json", "confusion_test.json", "split.json"):
        assert read_json(run / name)["stamps"] == results["stamps"]
    split_file = read_json(run / "split.json")
    assert split_file["val"] == split_file["test"]
    assert results["confusion"]["val"] == results["confusion"]["test"]
    for word in ("selected_on: test", "chosen on test, epoch 1", "fold 3 of 4 over all 204 images", "fold 3, seed 0"):
        assert word in printed
    config: dict[str, Any] = {}
    for record in wandb_records(run):
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            updates = record.run.config.update if kind == "run" else record.config.update
            config |= {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in updates}
    assert (config["selected_on"], config["fold"], config["stamps"]) == ("test", 3, results["stamps"])


# -- the order of the classes -------------------------------------------------------------------------------------


class Fixed(ExpressionModule):
    """Logits that depend on the image and on the class's name alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.network = nn.AdaptiveAvgPool2d(6)
        seeds = [zlib.crc32(name.encode()) for name in self.class_names]
        self.weight = torch.stack([torch.randn(108, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    @property
    def cam_layer(self) -> nn.Module:
        return self.network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image).flatten(1) @ self.weight.T


def looked_at(config: DictConfig, order: Any, folder: Path) -> dict[str, Any]:
    """All that a run makes of a data set, by class name, when its manifest lists the classes in ``order``."""
    data = instantiate(config.data)
    original = data.manifest

    def manifest() -> Manifest:
        found = original()
        assert len(order) == len(found.class_names)
        return dataclasses.replace(
            found,
            class_names=tuple(found.class_names[i] for i in order),
            label=np.argsort(order)[found.label],
            soft=None if found.soft is None else found.soft[:, order],
        )

    data.manifest, data.manifest_options = manifest, {**data.manifest_options, "order": np.asarray(order).tolist()}
    data.open()
    names = np.array(data.class_names)
    batches = [batch for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader]
    loss = instantiate(config.loss)
    loss.setup(torch.as_tensor(data.class_counts("train")))
    config.model.class_names = data.class_names
    options = ("class_names", "image_size", "mean", "std", "loss", "optim")
    module = Fixed(**instantiate({key: config.model[key] for key in options}, _convert_="object"))
    lightning.seed_everything(0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    folder.mkdir()
    trainer = lightning.Trainer(callbacks=[Predictions(RunFolder(folder))], default_root_dir=folder, **quiet)
    trainer.test(module, datamodule=data, verbose=False)
    data.sampling = "balanced"
    confusion = read_json(folder / "confusion_test.json")
    return {
        "names": data.class_names,
        "split": {part: rows.tolist() for part, rows in data.split.parts()},
        "fingerprint": data.facts()["fingerprint"],
        "counts": data.facts()["counts"],
        "index": [batch["index"].tolist() for batch in batches],
        "classes": [names[batch["label"]].tolist() for batch in batches],
        "image": torch.cat([batch["image"] for batch in batches]),
        "soft": [dict(zip(names, b["soft"].T.tolist(), strict=True)) for b in batches if "soft" in b],
        "weights": dict(zip(names, loss.weight.tolist(), strict=True)),
        "balanced": data._order("train")(0).tolist(),
        "scores": module.tally("test").scores(module.class_names),
        "confusion": pd.DataFrame(confusion["counts"], names, names),
        "predictions": pd.read_csv(folder / "predictions.csv"),
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ferplus", ["data.mode=crossentropy", "data.eval_mode=crossentropy", "protocol=kfold", "protocol.folds=3"]),
        ("ckplus", ["protocol=kfold", "protocol.folds=4", "data.form=official"]),
        ("fer2013", ["protocol=holdout"]),
    ],
)
def test_another_order_of_a_data_sets_classes_changes_only_the_order(
    name: str, words: list[str], tmp_path: Path
) -> None:
    WRITERS[name](tmp_path / "root")
    words += [f"data={name}", f"data.root={tmp_path / 'root'}", "data.class_names=null", "data.batch_size=8"]
    words += ["loss=class_balanced", "model.image_size=24", "protocol.val_fraction=0.3", "data.num_workers=0"]
    config = composed(*words)
    k = len(composed(f"data={name}").data.class_names)
    a = looked_at(config.copy(), np.arange(k), tmp_path / "a")
    b = looked_at(config.copy(), np.random.default_rng(4).permutation(k), tmp_path / "b")
    assert a["names"] != b["names"]
    assert sorted(a["names"]) == sorted(b["names"])
    for key in ("split", "fingerprint", "counts", "index", "classes", "balanced"):
        assert a[key] == b[key], key
    assert torch.equal(a["image"], b["image"])
    assert len(a["soft"]) == len(b["soft"]) == (len(a["index"]) if name == "ferplus" else 0)
    for one, other in zip(a["soft"], b["soft"], strict=True):
        assert one.keys() == other.keys()
        assert all(one[c] == pytest.approx(other[c], abs=1e-6) for c in one)
    assert a["weights"] == pytest.approx(b["weights"], rel=1e-6)
    assert a["scores"] == pytest.approx(b["scores"], rel=1e-6)
    assert len(a["scores"]) > 5
    assert a["confusion"].equals(b["confusion"].loc[a["names"], a["names"]])
    assert list(a["predictions"].columns[-k:]) == a["names"]
    pd.testing.assert_frame_equal(a["predictions"], b["predictions"][a["predictions"].columns], atol=1e-6)
