"""Evaluation: the same answers again, ten crops, calibration, coverage, corruption, ensembles, other data."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import call
from conftest import composed
from fakes import write_ferplus
from hydra.utils import instantiate
from omegaconf import DictConfig
from scipy import stats
from sklearn.metrics import log_loss

from fer.data.base import ExpressionDataModule
from fer.data.manifest import Manifest
from fer.errors import UserError
from fer.evaluate import run as command
from fer.evaluate import run_folders
from fer.evaluation.answers import Answers, Reader, mean_answers, probability_scores
from fer.evaluation.calibration import (
    best_temperature,
    calibration_of,
    checkpoint_fingerprint,
    fit_temperature,
    tempered,
)
from fer.evaluation.classes import Matching
from fer.evaluation.corruptions import SEVERITIES, CorruptedImages, Occlusion, aligned_places, own_seed, places_of
from fer.evaluation.coverage import coverage_record, selective_accuracy
from fer.evaluation.robustness import robustness_record
from fer.evaluation.subgroups import subgroup_record
from fer.faces.align import landmark_transform, move_points
from fer.reporting.collect import read_run
from fer.runs import read_json
from fer.trained import TrainedRun, open_run


def config_of(*words: str) -> DictConfig:
    return composed(*words, command="evaluate")


@pytest.fixture(scope="module")
def run_folder(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run that may be written to."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    return Path(shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("wandb")))


@pytest.fixture(scope="module")
def opened(run_folder: Path) -> tuple[TrainedRun, ExpressionDataModule]:
    run = open_run(run_folder)
    data = run.data()
    data.open()
    return run, data


@pytest.fixture(scope="module")
def evaluated(run_folder: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command as a user types it: the run's own test part, with a few corruptions."""
    out = tmp_path_factory.mktemp("evaluated") / "own"
    words = ["robustness=true", "robustness_images=20", "timing_repeats=2"]
    words += [f"~corruptions.{name}" for name in config_of().corruptions if name not in ("occluded_eyes", "noise")]
    words += [f"run={run_folder}", f"output={out}"]
    done = call("evaluate", *words, cwd=out.parent, FER_CACHE=str(cache), COLUMNS="200")
    assert done.returncode == 0, done.stderr
    return out


# -- the same again -----------------------------------------------------------------------------------------------


def test_its_own_test_part_gives_bitwise_the_same(evaluated: Path, whole: Path) -> None:
    assert (evaluated / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
    was, now = read_json(whole / "results.json"), read_json(evaluated / "results.json")
    for key, value in was["metrics"]["test"].items():
        assert now["metrics"]["test"][key] == pytest.approx(value, abs=1e-6), key
    assert now["confusion"]["test"] == was["confusion"]["test"]


def test_its_folder_is_one_the_report_reads(evaluated: Path, whole: Path) -> None:
    run, original = read_run(evaluated), read_run(whole)
    assert run.status == "done", run.error
    assert "evaluated again" in run.stamps[-1]
    assert set(original.results) <= set(run.results)
    # The same network twice: never averaged with the run, nor taken for a newer one of its kind.
    assert original.settings.items() < run.settings.items()
    assert {name for name in run.settings if name not in original.settings} == {
        "evaluation.part",
        *(f"evaluation.networks.0.{key}" for key in ("model", "data", "trained_fold")),
    }
    for name in ("evaluation.md", "reliability.png", "coverage.png", "robustness.png", "confusion_test.png"):
        assert (evaluated / name).stat().st_size > 500


def test_ten_crops_are_those_of_a_literal_cut(opened: tuple[TrainedRun, ExpressionDataModule]) -> None:
    run, data = opened
    # In single precision, so that the comparison can be sharp.
    reader = Reader(dataclasses.replace(run, results=run.results | {"precision": "32-true"}))
    found = reader.read(data, "test", "ten_crop")
    images = np.asarray(data.store.images[found.rows]).astype(np.float32) / 255
    side, crop = images.shape[1], round(images.shape[1] * data.augment.crop_pct)
    far, mid = side - crop, (side - crop) // 2
    assert far > 0
    total = np.zeros((len(images), len(data.class_names)))
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (run.module.mean, run.module.std))
    for top, left in ((0, 0), (0, far), (far, 0), (far, far), (mid, mid)):
        cut = images[:, top : top + crop, left : left + crop]
        for view in (cut, cut[:, :, ::-1]):
            x = torch.from_numpy(np.ascontiguousarray(view)).permute(0, 3, 1, 2)
            x = x if x.shape[1] == 3 else torch.cat([x, x, x], dim=1)
            if crop != run.module.image_size:
                size = (run.module.image_size, run.module.image_size)
                x = torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True)
            with torch.inference_mode():
                logits = run.module((x - mean) / std)
            total += torch.softmax(logits, dim=1).numpy()
    np.testing.assert_allclose(found.probabilities, total / 10, atol=1e-5)
    assert np.abs(found.probabilities - reader.read(data, "test", "none").probabilities).max() > 1e-4


# -- calibration --------------------------------------------------------------------------------------------------


def drawn(n: int = 400, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are too sure, and labels."""
    rng = np.random.default_rng(seed)
    label = rng.integers(classes, size=n)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), label] += 1.0
    odds = np.exp(3 * logits)
    return odds / odds.sum(1, keepdims=True), label


def test_calibration_reads_the_validation_part_alone(
    opened: tuple[TrainedRun, ExpressionDataModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = opened
    read: list[int] = []
    make = ExpressionDataModule.evaluation_loader

    def spied(self: ExpressionDataModule, part: str, tta: str):  # type: ignore[no-untyped-def]
        loader = make(self, part, tta)  # type: ignore[arg-type]
        read.extend(np.concatenate([rows for _, rows in loader.sampler]).tolist())
        return loader

    def refused(self: ExpressionDataModule) -> None:
        raise AssertionError("the test part was asked for")

    monkeypatch.setattr(ExpressionDataModule, "evaluation_loader", spied)
    monkeypatch.setattr(ExpressionDataModule, "test_dataloader", refused)
    fitted = fit_temperature(run)
    assert sorted(read) == data.split.val.tolist()
    assert not set(read) & set(data.split.test.tolist())
    assert (fitted.fitted_on, fitted.n) == ("val", len(data.split.val))
    # Whatever the test part's labels are, the temperature is the same.
    assert fitted.fingerprint == checkpoint_fingerprint(run)


def test_the_temperature_has_the_smallest_likelihood_of_a_fine_grid() -> None:
    p, label = drawn()
    grid = np.arange(0.5, 8, 0.01)
    powers = [p ** (1 / t) for t in grid]
    losses = [-np.log(x[np.arange(len(x)), label] / x.sum(1)).mean() for x in powers]
    assert best_temperature(p, label) == pytest.approx(grid[int(np.argmin(losses))], abs=0.01)
    assert best_temperature(p, label) > 1.5


def test_a_temperature_divides_logits() -> None:
    logits = torch.randn(20, 6, dtype=torch.float64)
    want = (logits / 1.7).softmax(1).numpy()
    np.testing.assert_allclose(tempered(logits.softmax(1).numpy(), 1.7), want, atol=1e-12)


def test_calibration_scores_are_the_literal_ones() -> None:
    p, label = drawn()
    found = probability_scores(p, label)
    assert found["nll"] == pytest.approx(log_loss(label, p))
    brier = np.mean([sum((row[k] - (k == y)) ** 2 for k in range(5)) for row, y in zip(p, label, strict=True)])
    assert found["brier"] == pytest.approx(brier)
    error = 0.0
    for b in range(15):
        inside = (p.max(1) >= b / 15) & ((p.max(1) < (b + 1) / 15) | (b == 14))
        if inside.any():
            gap = abs(p.max(1)[inside].mean() - (p.argmax(1) == label)[inside].mean())
            error += inside.mean() * gap
    assert found["ece"] == pytest.approx(error)


def test_the_run_keeps_its_temperature_until_it_is_trained_anew(run_folder: Path, evaluated: Path) -> None:
    kept = read_json(run_folder / "calibration.json")
    assert (kept["fitted_on"], kept["n"], kept["tta"]) == ("val", 42, "none")
    assert read_json(evaluated / "calibration.json")["temperature"] == kept["temperature"]
    run = open_run(run_folder)
    (run_folder / "calibration.json").write_text(json.dumps(kept | {"temperature": 7.0}))
    found = calibration_of(run)
    assert found is not None
    assert found.temperature == 7.0  # read, not fitted again
    (run_folder / "calibration.json").write_text(json.dumps(kept | {"temperature": 7.0, "fingerprint": "0" * 16}))
    found = calibration_of(run)
    assert found is not None
    assert found.temperature == pytest.approx(kept["temperature"])
    on_test = copy.copy(run.results) | {"selected_on": "test"}
    assert calibration_of(TrainedRun(run.folder, run.config, on_test, run.module)) is None


# -- coverage and subgroups ---------------------------------------------------------------------------------------


def test_coverage_is_the_literal_curve() -> None:
    p, label = drawn(200)
    order = sorted(range(200), key=lambda i: -p[i].max())
    right = [p[i].argmax() == label[i] for i in order]
    want = [sum(right[:k]) / k for k in range(1, 201)]
    np.testing.assert_allclose(selective_accuracy(p, label), want)
    record = coverage_record(p, label)
    assert record["aurc"] == pytest.approx(1 - np.mean(want))
    wrong = 200 - sum(right)
    best = np.mean([max(0, k - (200 - wrong)) / k for k in range(1, 201)])
    assert record["excess_aurc"] == pytest.approx(record["aurc"] - best)
    half = next(point for point in record["points"] if point["coverage"] == 0.5)
    assert (half["images"], half["accuracy"]) == (100, pytest.approx(want[99]))
    assert record["points"][-1]["accuracy"] == pytest.approx(np.mean(right))


def answers(p: np.ndarray, label: np.ndarray, names: str = "abcde", rows: np.ndarray | None = None) -> Answers:
    rows = np.arange(len(label)) if rows is None else rows
    return Answers(list(names), rows, np.array([f"{row:04d}.png" for row in rows]), label, p.astype(np.float32))


def test_subgroups_count_their_images() -> None:
    p, label = drawn(60)
    rows = np.arange(100, 160)
    gender = np.array(["", "female", "male"])[np.arange(200) % 3]
    one = answers(p, label, rows=rows)
    attributes = {"gender": gender, "name": np.arange(200).astype(str)}
    record = subgroup_record(one, rows, attributes, most=20)
    assert record["left_out"] == {"name": 60}
    assert set(record["groups"]["gender"]) == {"unknown", "female", "male"}
    inside = gender[rows] == "female"
    right, n = int((one.predicted == label)[inside].sum()), int(inside.sum())
    found = record["groups"]["gender"]["female"]
    assert (found["n"], found["right"]) == (n, right)
    z, share = stats.norm.isf(0.025), right / n
    half = z * np.sqrt(share * (1 - share) / n + z * z / 4 / n / n) / (1 + z * z / n)
    centre = (share + z * z / 2 / n) / (1 + z * z / n)
    assert (found["low"], found["high"]) == (pytest.approx(centre - half), pytest.approx(centre + half))
    assert sum(group["n"] for group in record["groups"]["gender"].values()) == 60
    # Five people, each right in all images or in none, are no sixty.
    one = answers(
        np.eye(p.shape[1])[np.where(np.arange(60) % 5 < 3, label, (label + 1) % p.shape[1])], label, rows=rows
    )
    wide = subgroup_record(one, np.arange(60) % 5, attributes, most=20)["groups"]["gender"]["female"]
    apart = subgroup_record(one, rows, attributes, most=20)["groups"]["gender"]["female"]
    assert wide["acc"] == apart["acc"]
    assert wide["high"] - wide["low"] > 1.4 * (apart["high"] - apart["low"])


# -- ensembles and classes ----------------------------------------------------------------------------------------


def test_an_ensemble_is_the_mean_matched_by_name() -> None:
    p, label = drawn(30)
    q, _ = drawn(30, seed=1)
    order = [3, 0, 4, 1, 2]
    shuffled = np.random.default_rng(0).permutation(30)
    other = answers(
        q[shuffled][:, order], np.argsort(order)[label[shuffled]], "".join("abcde"[i] for i in order), shuffled
    )
    found = mean_answers([answers(p, label), other])
    np.testing.assert_allclose(found.probabilities, (p + q) / 2, atol=1e-6)
    assert (found.label == label).all()
    with pytest.raises(UserError, match="the same classes, run 1 has a, b, c, d, e, run 2 v, w, x, y, z"):
        mean_answers([answers(p, label), answers(p, label, "vwxyz")])
    with pytest.raises(UserError, match="tested on different images"):
        mean_answers([answers(p, label), answers(p, label, rows=np.arange(1, 31))])


def manifest(names: tuple[str, ...], label: list[int]) -> Manifest:
    items = np.array([f"{i}.png" for i in range(len(label))])
    return Manifest(items, np.array(label), names, np.full(len(label), "test"), form="drawn")


def test_classes_without_a_counterpart_are_left_out() -> None:
    ours = ["anger", "fear", "happiness", "sadness"]
    found = Matching.of(ours, manifest(("sadness", "contempt", "anger", "happiness"), [0, 1, 1, 2, 3]))
    assert (found.shared, found.only_run, found.only_data) == (
        ["anger", "happiness", "sadness"],
        ["fear"],
        ["contempt"],
    )
    assert found.images_left_out == {"contempt": 2}
    p = np.array([[0.1, 0.5, 0.3, 0.1], [0.6, 0.2, 0.1, 0.1], [0.0, 1.0, 0.0, 0.0]], dtype=np.float32)
    one = Answers(ours, np.arange(3), np.array(["a", "b", "c"]), np.array([2, 0, 3]), p)
    kept = found.restrict(one)
    np.testing.assert_allclose(kept.probabilities, [[0.2, 0.6, 0.2], [0.75, 0.125, 0.125], [1 / 3] * 3], atol=1e-6)
    assert kept.label.tolist() == [1, 0, 2]
    assert kept.scores()["acc"] == pytest.approx(2 / 3)
    record = found.record(one)
    assert (record["renormalised"], record["answers_of_classes_left_out"]) == (True, 2)
    assert record["acc_if_those_count_as_wrong"] == pytest.approx(1 / 3)
    same = Matching.of(ours, manifest(tuple(ours[::-1]), [0]))
    assert same.restrict(one) is one
    assert same.sentences() == []
    with pytest.raises(UserError, match="at least two classes must be the same"):
        Matching.of(ours, manifest(("contempt", "fear"), [0]))


# -- corruption ---------------------------------------------------------------------------------------------------


def suite() -> dict[str, object]:
    return dict(instantiate(config_of().corruptions, _convert_="all"))


def test_corruptions_are_a_pure_function_and_grow(opened: tuple[TrainedRun, ExpressionDataModule]) -> None:
    _, data = opened
    images, places = data.store.images, places_of(data.store.manifest, data.store.windows)[0]
    rows = data.split.test[:8]
    corruptions = suite()
    assert len(corruptions) == 11
    for name, one in corruptions.items():
        differs = []
        for severity in SEVERITIES:
            seed = own_seed(0, name)
            first = CorruptedImages(images, places, one.at(severity, data.store_size, seed))  # type: ignore[attr-defined]
            again = CorruptedImages(images, places, one.at(severity, data.store_size, seed))  # type: ignore[attr-defined]
            seen = np.stack([first[row] for row in rows])
            backwards = np.stack([again[row] for row in rows[::-1]])[::-1]
            assert np.array_equal(seen, backwards), (name, severity)
            assert seen.dtype == np.uint8
            assert seen.shape == images[rows].shape
            differs.append(np.abs(seen.astype(int) - images[rows]).mean())
        assert differs[0] > 0, name
        assert all(np.diff(differs) > 0), (name, differs)
    other = CorruptedImages(images, places, corruptions["noise"].at(3, data.store_size, own_seed(1, "noise")))  # type: ignore[attr-defined]
    same = CorruptedImages(images, places, corruptions["noise"].at(3, data.store_size, own_seed(0, "noise")))  # type: ignore[attr-defined]
    assert not np.array_equal(other[rows[0]], same[rows[0]])


def test_occlusion_covers_what_it_says(opened: tuple[TrainedRun, ExpressionDataModule]) -> None:
    _, data = opened
    places, known = places_of(data.store.manifest, data.store.windows)
    assert known.any()
    row, side = int(np.flatnonzero(known)[0]), data.store_size
    blank = np.zeros((side, side, 1), dtype=np.uint8)
    for region, organs in (("eyes", (0, 1)), ("mouth", (3,))):
        covered = (
            Occlusion(region=region, cover=[1.0] * 5, fill=255).at(1, side, 0)(blank, places[row], row)[..., 0] > 0
        )
        for organ in organs:
            x, y, w, h = data.store.manifest.organ_boxes[row, organ]  # type: ignore[index]
            x0, y0 = data.store.windows[row, :2]
            scale = side / data.store.windows[row, 2]
            assert covered[int((y + h / 2 - y0) * scale), int((x + w / 2 - x0) * scale)]
        assert covered.mean() < 0.4
    half = Occlusion(region="half", cover=[1.0] * 5, fill=255).at(1, side, 0)
    halves = [half(blank, aligned_places(), row)[..., 0] > 0 for row in range(20)]
    assert {(bool(h[:, 0].all()), bool(h[:, -1].all())) for h in halves} == {(True, False), (False, True)}
    assert all(h.mean() == 0.5 for h in halves)


def test_an_aligned_face_has_its_eyes_where_alignment_puts_them() -> None:
    picture = np.array([(100, 100), (160, 100), (130, 135), (108, 166), (152, 166)], dtype=float)
    transform = landmark_transform(picture, 200, 0.1)
    assert transform is not None
    crop = move_points(picture, transform)
    found = (aligned_places()[1:, :2] + 1) / 2 * 200 - 0.5
    np.testing.assert_allclose(found[:2], crop[:2], atol=0.6)
    np.testing.assert_allclose(found[3], crop[3:].mean(0), atol=0.6)


def test_robustness_adds_up(evaluated: Path, opened: tuple[TrainedRun, ExpressionDataModule]) -> None:
    record = read_json(evaluated / "robustness.json")
    assert record["n"] == 20
    assert set(record["corruptions"]) == {"occluded_eyes", "noise"}
    drops = [record["clean"]["acc"] - np.mean(one["acc"]) for one in record["corruptions"].values()]
    assert record["mean_drop"] == pytest.approx(np.mean(drops))
    assert record["places"] == {"of_the_data": 20, "aligned": 0}
    # Its clean answers are those of the uncorrupted reading of the same images.
    run, data = opened
    reader = Reader(run)
    none = {"nothing": Occlusion(region="eyes", cover=[0.0] * 5, fill=0)}
    found = robustness_record(lambda datas, tta: reader.read(datas[0], "test", tta), [data], none, 0, "none", None)
    table = pd.read_csv(evaluated / "predictions.csv")
    assert found["clean"]["acc"] == pytest.approx((table["label"] == table["predicted"]).mean())
    assert found["corruptions"]["nothing"]["acc"] == [found["clean"]["acc"]] * 5


# -- another data set, an ensemble, bad input ---------------------------------------------------------------------


def test_another_data_set_by_an_ensemble(run_folder: Path, tmp_path: Path) -> None:
    write_ferplus(tmp_path / "fer")
    twin = Path(shutil.copytree(run_folder, tmp_path / "twin"))
    words = [f"run=[{run_folder},{twin}]", "data=ferplus", f"data.root={tmp_path / 'fer'}"]
    out = tmp_path / "out"
    command(config_of(*words, f"output={out}", "timing_repeats=1", "tta=flip"))
    run = read_run(out)
    assert run.status == "done", run.error
    results = run.results
    assert run.model == "ensemble of 2: cbam_resnet trained on synthetic"
    assert (run.data, results["tta"], results["n"]["train"]) == ("ferplus", "flip", 0)
    assert "contempt" not in results["classes"]
    assert results["evaluation"]["classes"]["only_data"] == ["contempt"]
    assert results["evaluation"]["identical_to_own_images"] == {"train": 0, "val": 0, "test": 0}
    assert results["evaluation"]["calibration"]["fitted_on"] == "val"
    assert results["evaluation"]["calibration"]["n"] == 42
    assert any("only evaluated on ferplus" in stamp for stamp in run.stamps)
    one = open_run(run_folder)
    node = config_of(*words)
    node.model.update({"image_size": 44, "mean": one.module.mean, "std": one.module.std})
    node.model.update({"class_names": one.module.class_names, "store_size": one.config.data.store_size})
    node.model.update({"channels": one.config.data.channels, "eval_batch_size": 7})
    node.augment = one.config.data.augment
    node.model.image_size = one.module.image_size
    data = instantiate(node.data)
    data.open()
    # Twins: the mean is each one's own, whatever the batch.
    literal = Reader(one).read(data, "test", "flip")
    table = pd.read_csv(out / "predictions.csv")
    assert table["item"].tolist() == literal.item.tolist()
    np.testing.assert_allclose(table[results["classes"]], literal.probabilities, atol=0.02)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run=???"], "run is missing"),
        (["run=/nowhere"], "no such run folder"),
        (["run=.", "tta=six"], "tta=six is not one of"),
        (
            ["run=.", "timing_repeats=-1", "robustness=3"],
            r"timing_repeats=-1.*\n.*robustness=3: expected true or false",
        ),
        (["run=."], r"config\.yaml is missing"),
    ],
)
def test_bad_words(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        command(config_of(*words))


def test_bad_combinations(run_folder: Path, evaluated: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a training run; choose another folder"):
        command(config_of(f"run={run_folder}", f"output={run_folder}"))
    fake = Path(shutil.copytree(run_folder, tmp_path / "fake"))
    shutil.copy(evaluated / "results.json", fake / "results.json")
    with pytest.raises(UserError, match="is an evaluation, expected a run folder"):
        command(config_of(f"run={fake}", f"output={tmp_path / 'out'}"))
    with pytest.raises(UserError, match="one for each severity"):
        Occlusion(region="eyes", cover=[1.0], fill=0)
    assert run_folders(f"{run_folder.parent}/*") == [run_folder]
