"""The report: what it averages, what it refuses, what it writes, and the page as a browser shows it."""

import base64
import html
import io
import json
import os
import re
import resource
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from commands import call
from conftest import TINY, composed
from fake_runs import write_run
from PIL import Image
from scipy import stats

from fer.config import CONF
from fer.errors import UserError
from fer.report import run
from fer.reporting import contents
from fer.reporting.benches import make_benches
from fer.reporting.charts import curves
from fer.reporting.claims import Claim, beside, load_claims
from fer.reporting.collect import Run, read_run, read_runs
from fer.reporting.comparisons import compare
from fer.reporting.contents import absent
from fer.reporting.groups import Group, make_groups
from fer.reporting.pictures import most_wrong
from fer.runs import write_json

HOSTILE = "<img src=x onerror=alert(1)>"
LEAKY = "LEAKY: predictions depend on the batch"
FOLDS = [*TINY, "protocol=kfold", "protocol.folds=3"]
RAFDB = ["data=rafdb", "model=convcut"]


def report(runs: Path, output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``python -m fer.report`` as a user types it."""
    return call("report", f"runs={runs}", f"output={output}", *words, cwd=Path.cwd())


def write_house(root: Path) -> None:
    """Three seeds of two models, a leaky run, a cross-validation with holes, a paper's data set, a damaged run."""
    for seed in range(3):
        write_run(root / "a" / str(seed), seed=seed, accuracy=0.7, items=HOSTILE)
        write_run(root / "b" / str(seed), seed=seed, model="dan", accuracy=0.85, items=HOSTILE)
    write_run(root / "leaky", model="convcut", accuracy=0.97, items=HOSTILE, stamps=[LEAKY])
    for fold in range(2):
        write_run(root / "cv" / str(fold), words=FOLDS, fold=fold, accuracy=0.75)
    write_run(root / "cv" / "seed1-0", words=FOLDS, fold=0, seed=1, status="failed", error=f"UserError: {HOSTILE}")
    write_run(root / "paper", words=RAFDB, data="rafdb", model="convcut", accuracy=0.8)
    jobs = {"0": ["protocol.fold=0"], "8": ["protocol.fold=8"], "9": ["model=vit", "protocol.fold=9"]}
    write_json(root / "cv" / "sweep.json", {"jobs": jobs})
    (root / "cv" / "8").mkdir()
    write_json(root / "cv" / "8" / "outcome.json", {"outcome": "failed", "error": "no such fold"})
    broken = write_run(root / "broken", model="vit")
    (broken / "predictions.csv").write_text((broken / "predictions.csv").read_text().replace(",fear,", ",joy,"))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Run folders, and the report on them."""
    root = tmp_path_factory.mktemp("house")
    write_house(root / "runs")
    done = report(root / "runs", root / "report", "compare=[cbam_resnet,dan]")
    assert done.returncode == 0, done.stderr
    assert "11 done" not in done.stderr
    return root / "runs", root / "report"


def one_group(root: Path) -> Group:
    groups = make_groups(read_runs([root]))
    assert len(groups) == 1
    return groups[0]


# -- what is averaged ---------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_predictions(house: tuple[Path, Path]) -> None:
    runs, out = house
    groups = pd.read_csv(out / "groups.csv").set_index("group")
    accuracy, mean_class, confusion = [], [], np.zeros((7, 7), dtype=int)
    for seed in range(3):
        table = pd.read_csv(runs / "a" / str(seed) / "predictions.csv")
        right = table["label"] == table["predicted"]
        accuracy.append(right.mean())
        mean_class.append(right.groupby(table["label"]).mean().mean())
        classes = list(table.columns[5:])
        confusion += pd.crosstab(table["label"], table["predicted"]).reindex(classes, columns=classes).to_numpy(int)
    line = groups.loc["synthetic-cbam_resnet-official"]
    low, high = stats.t.interval(0.95, 2, np.mean(accuracy), stats.sem(accuracy))
    want = [np.mean(accuracy), np.std(accuracy, ddof=1), low, high, np.mean(mean_class)]
    have = line[["acc_mean", "acc_std", "acc_low", "acc_high", "mean_acc_mean"]].to_numpy(float)
    assert have == pytest.approx(want, abs=1e-12)
    assert line["acc_pooled"] == pytest.approx(confusion.trace() / confusion.sum(), abs=1e-12)
    summed = pd.read_csv(out / "confusion.csv").query("group == 'synthetic-cbam_resnet-official'")
    assert np.array_equal(summed[classes].to_numpy(int), confusion)


def test_folds_and_seeds_are_one_group_and_other_settings_another(tmp_path: Path) -> None:
    for fold in range(3):
        for seed in range(2):
            write_run(tmp_path / f"{fold}-{seed}", words=FOLDS, fold=fold, seed=seed)
    group = one_group(tmp_path)
    assert (len(group.runs), group.folds, group.seeds, group.missing) == (6, [0, 1, 2], [0, 1], [])
    assert group.images == 210
    write_run(tmp_path / "other", words=FOLDS, settings={"model.optim.optimizer.lr": 0.2})
    groups = make_groups(read_runs([tmp_path]))
    assert sorted(len(g.runs) for g in groups) == [1, 6]
    assert all("optim.optimizer.lr" in group.label for group in groups)
    assert len({group.id for group in groups}) == 2


def test_several_folds_of_several_seeds_are_as_many_figures_as_folds(tmp_path: Path) -> None:
    runs, accuracy = tmp_path / "runs", np.zeros((3, 2))
    for fold in range(3):
        for seed in range(2):
            write_run(runs / f"{fold}-{seed}", words=FOLDS, fold=fold, seed=seed, accuracy=0.5 + 0.1 * fold)
            table = pd.read_csv(runs / f"{fold}-{seed}" / "predictions.csv")
            accuracy[fold, seed] = (table["label"] == table["predicted"]).mean()
    run(composed(f"runs={runs}", f"output={tmp_path / 'out'}", command="report"))
    low, high = stats.t.interval(0.95, 2, accuracy.mean(), stats.sem(accuracy.mean(1)))
    line = pd.read_csv(tmp_path / "out" / "groups.csv").iloc[0]
    assert line[["acc_mean", "acc_low", "acc_high"]].to_numpy(float) == pytest.approx([accuracy.mean(), low, high])
    # Pooled: all predictions together, which the folds' mean class accuracies do not give.
    every = pd.concat([pd.read_csv(path) for path in runs.glob("*/predictions.csv")])
    recall = (every["label"] == every["predicted"]).groupby(every["label"]).mean().mean()
    assert line["mean_acc_pooled"] == pytest.approx(recall, abs=1e-12)
    assert abs(line["mean_acc_mean"] - recall) > 1e-6
    page = (tmp_path / "out" / "report.md").read_text()
    head = next(text for text in page.splitlines() if text.startswith("| model | accuracy"))
    row = next(text for text in page.splitlines() if text.startswith("| cbam") and " to " in text)
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert "95 % over folds" in head
    assert cells["pooled accuracy, %"] == f"{100 * accuracy.mean():.2f}"
    assert cells["pooled mean class, %"] == f"{100 * recall:.2f}"
    assert "95 % interval over folds" in (tmp_path / "out" / "report.html").read_text()


def test_the_same_fold_and_seed_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "old", accuracy=0.5)
    time.sleep(0.02)
    write_run(tmp_path / "new", accuracy=0.9)
    group = one_group(tmp_path)
    assert [r.path.name for r in group.runs] == ["new"]
    assert [r.path.name for r in group.repeated] == ["old"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"split": "other"}, "another split"),
        ({"classes": ["disgust", "anger", "fear", "happiness", "neutral", "sadness", "surprise"]}, "other classes"),
        ({"images": 240}, "images in all parts"),
    ],
)
def test_runs_that_do_not_belong_together_are_not_averaged(tmp_path: Path, change: dict, reason: str) -> None:
    # A config cannot tell them apart, as when the data root's content has changed between two runs.
    write_run(tmp_path / "a", seed=0)
    other = write_run(tmp_path / "b", seed=1, **change)
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump(config | {"seed": 1}))
    groups = make_groups(read_runs([tmp_path]))
    assert [len(group.runs) for group in groups] == [1, 1]
    assert sum(reason in group.refused for group in groups) == 1
    assert len(make_benches(groups)) == 2


@pytest.mark.parametrize("option", ["start_from", "model.pretrained"])
def test_runs_that_began_with_other_weights_are_not_averaged(tmp_path: Path, option: str) -> None:
    # Of two files of one name the checksum tells; of one file in two places nothing does, and it is the same.
    for seed, (place, letter) in enumerate([("", ""), ("/a/b.pth", "d"), ("/copy/b.pth", "d"), ("/a/b.pth", "e")]):
        checksum = letter * 64
        pinned = f"@sha256:{checksum}" if option == "start_from" else ""
        settings = {option: f"{place}{pinned}"} if place else {}
        weights = {"weights": f"b.pth sha256:{checksum}"} if place else {}
        write_run(tmp_path / str(seed), words=RAFDB, seed=seed, settings=settings, more=weights)
    write_run(tmp_path / "failed", words=RAFDB, seed=9, status="failed", error="none", settings=settings)
    groups = make_groups(read_runs([tmp_path]))
    assert sorted(group.seeds for group in groups) == [[0], [1, 2], [3]]
    assert len({group.label for group in groups}) == 3
    assert all(option.removeprefix("model.") in group.label for group in groups if group.seeds != [0])
    assert next(group.seeds for group in groups if group.unfinished) == [3]


def test_folds_whose_test_parts_overlap_are_not_averaged(tmp_path: Path) -> None:
    write_run(tmp_path / "0", words=FOLDS, fold=0)
    write_run(tmp_path / "1", words=FOLDS, fold=1)
    path = tmp_path / "1" / "predictions.csv"
    path.write_text(path.read_text().replace("test/000001", "test/000000"))
    groups = make_groups(read_runs([tmp_path]))
    assert [len(group.runs) for group in groups] == [1, 1]
    assert any("share 1 test images" in group.refused for group in groups)


def test_rotating_validation_with_one_test_part_belongs_together(tmp_path: Path) -> None:
    for fold in range(3):
        write_run(tmp_path / str(fold), seed=fold, split=str(fold))
        for name in ("config.yaml", "results.json"):
            path = tmp_path / str(fold) / name
            content = yaml.safe_load(path.read_text())
            content["protocol"]["fold"], content["seed"] = fold, 0
            path.write_text(json.dumps(content))
    group = one_group(tmp_path)
    assert (group.folds, group.disjoint, group.over) == ([0, 1, 2], False, "folds")
    assert "pooled accuracy, %" not in contents.results(make_benches([group])[0]).columns


def test_failed_unfinished_and_missing_runs_are_named(house: tuple[Path, Path]) -> None:
    absent = pd.read_csv(house[1] / "absent.csv").fillna("")
    lines = {(line["run"], line["status"]): line["reason"] for line in absent.to_dict("records")}
    assert HOSTILE in lines["cv/seed1-0", "failed"]
    assert "has no column fear" in lines["broken", "damaged"]
    missing = set(absent[absent["status"] == "missing"]["reason"])
    assert missing >= {"seed 0: fold 2 never started", "seed 1: fold 1, 2 never started"}
    assert lines["cv/9", "missing"] == "planned by a sweep, never started: model=vit protocol.fold=9"
    assert lines["cv/8", "failed"] == "no such fold"
    assert ("cv/0", "missing") not in lines


@pytest.mark.parametrize("name", ["results.json", "predictions.csv", "status.json", "config.yaml"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1]", b"item\nx\n"])
def test_a_damaged_file_makes_a_damaged_run_and_no_crash(tmp_path: Path, name: str, content: bytes) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    found = read_run(folder)
    assert found.status == "damaged"
    assert found.error


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("results.json", "best_epoch", None, "best_epoch is no whole number"),
        ("results.json", "stamps", None, "stamps is no list"),
        ("results.json", "stamps", [1], "an entry of stamps is no text"),
        ("results.json", "metrics", {"val": {}}, "metrics.test is missing"),
        ("results.json", "metrics", {"test": {"acc": "high"}}, "metrics.test.acc is no figure"),
        ("results.json", "n", {"train": 1, "test": 210}, "n.val is missing"),
        ("results.json", "split_fingerprint", 3, "split_fingerprint is no text"),
        ("results.json", "seconds", [], "seconds is no figure"),
        (
            "results.json",
            "data_facts",
            {"counts": {"test": {"fear": "few"}}},
            "data_facts.counts.test.fear is no whole",
        ),
        ("config.yaml", "seed", "one", "seed is no whole number"),
        ("config.yaml", "protocol", "official", "protocol is no set of keys"),
    ],
)
def test_a_value_the_report_cannot_show_makes_a_damaged_run(
    tmp_path: Path, name: str, key: str, value: object, said: str
) -> None:
    folder = write_run(tmp_path / "run")
    content = yaml.safe_load((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | {key: value}))
    found = read_run(folder)
    assert found.status == "damaged"
    assert found.error.startswith(f"{folder / name}: {said}")
    assert "so the run folder is damaged" in found.error
    (group,) = make_groups([found])
    assert [line.cells[1].text for line in absent([group], [], tmp_path).rows] == ["damaged"]


def test_figures_that_are_not_known_are_shown_as_such(tmp_path: Path) -> None:
    """What `fer.runs.write_json` writes for NaN; a test that needs the figure is left out."""
    metrics = {"val": {}, "test": {"acc": None, "mean_acc": None}}
    for data in ("rafdb", "ferplus"):
        for fold in range(2):
            write_run(tmp_path / f"{data}-a{fold}", words=FOLDS, data=data, fold=fold, more={"metrics": metrics})
            write_run(tmp_path / f"{data}-b{fold}", words=FOLDS, data=data, fold=fold, model="dan")
    verdicts = compare(make_groups(read_runs([tmp_path])), ["cbam_resnet", "dan"], 200, 0)
    assert {one.test for one in verdicts} == {"McNemar", "paired bootstrap"}


def test_numbers_that_are_none_are_left_out_of_the_curves(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    sound = read_run(folder).curves()
    assert sound.equals(pd.read_csv(folder / "metrics.csv"))
    rows = ["epoch,train/acc,val/mean_acc", "0,0.1,0.2", "1,\x00,0.4", "garbled,0.9,0.9", "2,inf,0.5", "2,0.6,"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    table = read_run(folder).curves()
    assert table["epoch"].tolist() == [0, 1, 2]
    assert table["train/acc"].tolist() == pytest.approx([0.1, np.nan, 0.6], nan_ok=True)
    assert table["val/mean_acc"].tolist() == [0.2, 0.4, 0.5]
    assert "<svg" in curves([sound, table], [3, 2], [])


def test_a_folder_whose_name_is_not_utf_8_is_shown_escaped(tmp_path: Path) -> None:
    runs, out = tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / "report"
    write_run(runs / "a")
    write_run(runs / "b", model="dan", status="failed", error="it broke")
    run(composed(f"runs={tmp_path}", f"output={out}", "thumbnails=false", command="report"))
    for name in ("report.html", "report.md", "runs.csv", "absent.csv"):
        assert "\\udce9/" in (out / name).read_text().replace("\\\\", "\\"), name


def test_predictions_that_contradict_the_results_are_not_believed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    lines = (folder / "predictions.csv").read_text().splitlines()
    (folder / "predictions.csv").write_text("\n".join(lines[:-1]) + "\n")
    assert "do not tell the same test" in read_run(folder).error


# -- stamps and claims --------------------------------------------------------------------------------------------


def test_stamped_runs_stand_apart_and_their_stamp_beside_every_figure(house: tuple[Path, Path]) -> None:
    runs, out = house
    bench = next(b for b in make_benches(make_groups(read_runs([runs]))) if len(b.groups) == 3)
    assert [group.model for group in bench.ranked] == ["dan", "cbam_resnet", "convcut"]  # though convcut has most right
    assert [bench.apart(group) for group in bench.ranked] == [False, False, True]
    page = (out / "report.html").read_text()
    row = re.search(r'<tbody class="apart">\s*<tr><td[^>]*><a href="#synthetic-convcut-official">.*?</td>', page, re.S)
    assert row
    assert LEAKY in row[0]
    section = (out / "report.md").read_text().split("\n## synthetic · official\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| convcut")]
    assert len(lines) == 2  # results and classes
    assert all(LEAKY in line for line in lines)
    for figure in ("curves", "reliability"):
        assert "LEAKY" in (out / "figures" / f"synthetic-convcut-official-{figure}.svg").read_text()
    assert "LEAKY" in (out / "report.tex").read_text()
    stamped = pd.read_csv(out / "groups.csv").set_index("group")["stamps"].fillna("")
    assert stamped["synthetic-convcut-official"] == LEAKY
    assert stamped["synthetic-dan-official"] == ""


def test_selection_on_test_is_stamped_even_where_the_run_forgot(tmp_path: Path) -> None:
    assert read_run(write_run(tmp_path / "run", selected_on="test")).stamps == ("selected_on: test",)


def test_claims_stand_beside_what_was_measured_with_the_differences(house: tuple[Path, Path]) -> None:
    claims = pd.read_csv(house[1] / "claims.csv").fillna("")
    line = claims[claims["group"] == "rafdb-convcut-official"].iloc[0]
    assert line["claimed_acc"] == 97.33
    assert line["gap"] == pytest.approx(line["measured_acc"] - 97.33)
    for part in ("void", "3,068 test images; here 210", "chosen on test; here on val", "ImageNet; here random"):
        assert part in line["differences"]
    assert len(claims) > 10  # the other claims on RAF-DB are listed too


@pytest.mark.parametrize(
    ("claimed", "here", "differs"),
    [
        ("ImageNet", "timm/resnet50.tv_in1k", False),
        ("ImageNet-1k", "timm/vit_large_patch16_224.augreg_in21k_ft_in1k", True),
        ("DINOv2", "timm/vit_base_patch14_dinov2.lvd142m", False),
        ("DINOv2", "timm/vit_base_patch14_dinov2.lvd142m; landmarks: random, trained", True),
        ("MS-Celeb-1M", "timm/resnet18.tv_in1k", True),
        ("ImageNet", "random", True),
        (None, "random", False),
    ],
)
def test_other_weights_than_the_papers_are_named(tmp_path: Path, claimed: str, here: str, differs: bool) -> None:
    write_run(tmp_path / "run", more={"weights": here})
    facts = {"paper": "p", "method": "m", "data": ["synthetic"], "classes": 7, "acc": 50.0, "split": "official"}
    claim = Claim(**facts, selected_on="val", weights=claimed)
    smaller = "here not the network of conf/model/cbam_resnet.yaml: width=8, layers=[1, 1, 1, 1]"
    differences = claim.differences(one_group(tmp_path))
    assert differences == [*([f"weights: {claimed}; here {here}"] if differs else []), smaller]


def test_every_claim_names_data_and_models_that_exist() -> None:
    claims = load_claims(CONF / "claims.yaml")
    assert len(claims) >= 35
    for claim in claims:
        assert all((CONF / "data" / f"{name}.yaml").is_file() for name in claim.data)
        assert claim.model is None or (CONF / "model" / f"{claim.model}.yaml").is_file()
        assert 0 < claim.acc < 100
    # Each paper's own network is set beside its measured figure.
    ours = {(claim.model, data) for claim in claims for data in claim.data}
    papers = {"resattn_vit": "rafdb", "cbam_resnet": "fer2013", "two_stream": "affectnet", "convcut": "ferplus"}
    assert (
        set(papers.items()) | {("cbam_resnet", "ckplus"), ("multiscale_region", "rafdb"), ("convcut", "rafdb")} <= ours
    )


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"paper": "x"}, "paper: x is not one of"),
        ({"paper": "p", "accuracy": 1}, "unknown key accuracy"),
        ({"paper": "p", "method": "m"}, "missing"),
    ],
)
def test_a_claims_file_with_a_mistake_says_where(tmp_path: Path, entry: dict, said: str) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"papers": {"p": "P"}, "claims": [entry]}))
    with pytest.raises(UserError, match=said):
        load_claims(path)
    with pytest.raises(UserError, match="no such file"):
        load_claims(tmp_path / "none.yaml")


def test_a_claim_on_a_variant_goes_to_that_variant(tmp_path: Path) -> None:
    for landmark in (True, False):
        words = ["data=affectnet", "model=two_stream", f"model.landmark={str(landmark).lower()}"]
        write_run(tmp_path / str(landmark), words=words, data="affectnet", model="two_stream")
    bench = make_benches(make_groups(read_runs([tmp_path])))[0]
    pairs = {one.claim.method: one.group for one in beside(bench, load_claims(CONF / "claims.yaml")) if one.group}
    assert pairs["two-stream without landmark stage"].settings["model.landmark"] is False
    assert pairs["complete two-stream, no CelebA pre-training"].settings["model.landmark"] is True


# -- detection ------------------------------------------------------------------------------------------------------


def test_what_a_detector_found_and_how_fast_stands_in_the_report(tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "report"
    write_run(runs / "plain", model="dan")
    found = {"map50": [0.4, 0.6], "face_ap50": [0.8, 0.9], "recall": [0.9, 1.0], "matched_acc": [0.5, None]}
    for seed in range(2):
        folder = write_run(runs / str(seed), seed=seed, model="resattn_vit")
        results = json.loads((folder / "results.json").read_text())
        results["metrics"]["test"] |= {metric: values[seed] for metric, values in found.items()}
        results["detection_seconds_per_image"] = {"median": 0.01 + 0.01 * seed, "p95": 0.05, "device": "CPU, 1 threads"}
        write_json(folder / "results.json", results)
        Image.new("RGB", (2400, 400), (200, 30, 30)).save(folder / "detections.png")
    (runs / "0" / "detections.png").write_bytes(b"no picture")  # the other run has one
    run(composed(f"runs={runs}", f"output={out}", command="report"))
    lines = pd.read_csv(out / "detections.csv")
    assert lines["group"].tolist() == ["synthetic-resattn_vit-official"]
    line = lines.iloc[0]
    assert (line["map50_mean"], line["face_ap50_mean"], line["matched_acc_mean"]) == pytest.approx((0.5, 0.85, 0.5))
    assert line["map50_std"] == pytest.approx(np.std([0.4, 0.6], ddof=1))
    assert (line["milliseconds_median"], line["milliseconds_p95"]) == pytest.approx((15, 50))
    page = (out / "report.html").read_text()
    assert "50.00 ± 14.14" in re.search(r'<table class="sortable detections">.*?</table>', page, re.S)[0]  # type: ignore[index]
    pictures = re.findall(r'<figure class="found"><img src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 1
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size == (1200, 200)
    run(composed(f"runs={runs}", f"output={out}", "thumbnails=false", command="report"))
    assert 'class="found"' not in (out / "report.html").read_text()


# -- comparisons --------------------------------------------------------------------------------------------------


def test_comparisons_of_the_house(house: tuple[Path, Path]) -> None:
    runs, out = house
    table = pd.read_csv(out / "comparisons.csv")
    assert set(table["test"]) == {"McNemar", "paired bootstrap"}
    assert len(table[table["test"] == "McNemar"]) == 3  # one for each seed
    right = {}
    for name in "ab":
        predictions = pd.read_csv(runs / name / "1" / "predictions.csv")
        right[name] = (predictions["label"] == predictions["predicted"]).to_numpy()
    only = int((right["a"] & ~right["b"]).sum()), int((right["b"] & ~right["a"]).sum())
    line = table[(table["test"] == "McNemar") & table["n"].str.contains("seed 1")].iloc[0]
    assert line["p"] == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    assert line["difference"] == pytest.approx(right["a"].mean() - right["b"].mean())
    assert (table["p_holm"] >= table["p"]).all()


def test_cross_validations_are_compared_over_folds_and_data_sets(tmp_path: Path) -> None:
    for data in ("rafdb", "ferplus"):
        for model, accuracy in (("dan", 0.9), ("vit", 0.7)):
            for fold in range(3):
                folder = tmp_path / f"{data}-{model}-{fold}"
                write_run(folder, words=FOLDS, data=data, model=model, fold=fold, accuracy=accuracy, images=600)
    groups = make_groups(read_runs([tmp_path]))
    verdicts = compare(groups, ["dan", "vit"], 500, 0)
    assert {v.test for v in verdicts} == {"McNemar", "paired bootstrap", "corrected resampled t", "Wilcoxon"}
    mcnemar = [v for v in verdicts if v.test == "McNemar"]
    assert [v.n.split()[0] for v in mcnemar] == ["600", "600"]  # each image of the pool once
    assert all(0.1 < v.outcome.difference < 0.3 and v.p_holm < 0.001 for v in mcnemar)
    assert all("2 data sets" in v.n for v in verdicts if v.test == "Wilcoxon")
    again = compare(groups, ["dan", "vit"], 500, 0)
    assert [v.outcome.p for v in again] == [v.outcome.p for v in verdicts]


def test_single_runs_are_compared_by_their_paths(tmp_path: Path) -> None:
    paths = [str(write_run(tmp_path / str(seed), seed=seed)) for seed in range(2)]
    verdicts = compare(make_groups(read_runs([tmp_path])), paths, 500, 0)
    assert [v.test for v in verdicts] == ["McNemar", "paired bootstrap", "paired bootstrap"]


DROPS = "12 leaked copies left out of train"
AGAIN = "evaluated again: a network that another run folder has trained and tested"


def test_a_second_reading_is_compared_image_by_image(tmp_path: Path) -> None:
    """The three tests of a run against the same network by other views, in another order of the images."""
    rng = np.random.default_rng(0)
    first, second = rng.random(600) < 0.7, rng.random(600) < 0.62
    write_run(tmp_path / "run", images=600, right=first)
    views = {"data.tta": "ten_crop", "evaluation": {"part": "own test part"}}
    again = write_run(tmp_path / "again", images=600, right=second, settings=views, stamps=[AGAIN])
    lines = (again / "predictions.csv").read_text().splitlines()
    (again / "predictions.csv").write_text("\n".join([lines[0], *rng.permutation(lines[1:])]) + "\n")
    groups = make_groups(read_runs([tmp_path]))
    mcnemar, images, classes = compare(groups, [str(tmp_path / "run"), str(tmp_path / "again")], 4000, 0)

    tables = [pd.read_csv(tmp_path / name / "predictions.csv") for name in ("run", "again")]
    both = tables[0].merge(tables[1], on="item")
    right = [(both[f"predicted_{side}"] == both["label_x"]).to_numpy() for side in "xy"]
    only = [int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())]
    assert mcnemar.outcome.p == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    assert mcnemar.n.startswith(f"600 images, {only[0]} right by a alone, {only[1]} by b alone")
    difference = right[0].astype(float) - right[1]
    drawn = difference[rng.integers(0, 600, (4000, 600))].mean(1)
    have = images.outcome.difference, images.outcome.low, images.outcome.high
    assert have == pytest.approx([difference.mean(), *np.quantile(drawn, [0.025, 0.975])], abs=0.006)
    assert have[0] == mcnemar.outcome.difference == pytest.approx(difference.mean())
    by_class = pd.Series(difference).groupby(both["label_x"]).mean()
    assert classes.outcome.difference == pytest.approx(by_class.mean())
    assert {one.stamps for one in (mcnemar, images, classes)} == {(f"b alone: {AGAIN}",)}


def test_images_of_one_person_do_not_count_as_many(tmp_path: Path) -> None:
    """Each of 120 people five times, and right five times or never: what 120 images would tell."""
    rng = np.random.default_rng(3)
    right = {name: (rng.random(120) < accuracy) for name, accuracy in (("a", 0.8), ("b", 0.6))}
    for known in (5, None):
        for name, people in right.items():
            folder = tmp_path / str(known) / name
            write_run(folder, images=600, right=people.repeat(5), images_per_person=known)
    known, unknown = (make_groups(read_runs([tmp_path / name])) for name in ("5", "None"))
    mcnemar, images, _ = compare(known, [str(tmp_path / "5" / name) for name in right], 4000, 0)
    only = [int((right[a] & ~right[b]).sum()) for a, b in (("a", "b"), ("b", "a"))]
    assert mcnemar.outcome.p == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    assert mcnemar.n.startswith(f"600 images of 120 people, {5 * only[0]} right by a alone")
    assert images.n == "600 images of 120 people"
    taken_apart = compare(unknown, [str(tmp_path / "None" / name) for name in right], 4000, 0)
    assert taken_apart[0].n.startswith("600 images, ")
    assert taken_apart[0].outcome.p < mcnemar.outcome.p / 100
    widths = [one.outcome.high - one.outcome.low for one in (images, taken_apart[1])]
    assert widths[0] / widths[1] == pytest.approx(np.sqrt(5), rel=0.1)
    assert known[0].effective_images == pytest.approx(120, rel=0.05)
    assert unknown[0].effective_images == 600


def test_stamps_that_are_asked_about_may_stand_on_one_side(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / f"plain-{seed}", seed=seed)
        write_run(tmp_path / f"drop-{seed}", seed=seed, settings={"data.protocol.drop_leaks": True}, stamps=[DROPS])
    views = {"data.tta": "ten_crop", "data.protocol.drop_leaks": True}
    write_run(tmp_path / "again", seed=1, settings=views, stamps=[DROPS, AGAIN])
    groups = make_groups(read_runs([tmp_path]))
    plain, drop, again = (
        next(group.id for group in groups if group.stamps == stamps) for stamps in ([], [DROPS], [DROPS, AGAIN])
    )
    verdicts = compare(groups, [plain, drop, again], 500, 0)
    assert [one.stamps for one in verdicts[:4]] == [(f"b alone: {DROPS}",)] * 4  # two seeds, two bootstraps
    assert {one.stamps for one in verdicts if (one.a, one.b) == (drop, again)} == {(DROPS, f"b alone: {AGAIN}")}
    # The one reading that was repeated is set against the same network's, not against the first seed's.
    assert [one.n.rpartition("; ")[2] for one in verdicts if one.test == "McNemar"][2:] == ["seed 1", "seed 1"]


@pytest.mark.parametrize("stamps", [[LEAKY], [DROPS, LEAKY], [AGAIN, "selected_on: test"], ["parts share people: 3"]])
def test_no_other_stamp_may_stand_on_one_side(tmp_path: Path, stamps: list[str]) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", model="dan", stamps=stamps)
    with pytest.raises(UserError, match=f"only one of them is stamped «{stamps[-1]}»"):
        compare(make_groups(read_runs([tmp_path])), ["cbam_resnet", "dan"], 500, 0)


def test_leaky_runs_are_not_tested_even_against_their_like(tmp_path: Path) -> None:
    write_run(tmp_path / "a", stamps=[LEAKY])
    write_run(tmp_path / "b", settings={"data.protocol.drop_leaks": True}, stamps=[DROPS, LEAKY])
    with pytest.raises(UserError, match=f"both are stamped «{LEAKY}»"):
        compare(make_groups(read_runs([tmp_path])), [str(tmp_path / "a"), str(tmp_path / "b")], 500, 0)


def test_a_run_is_not_compared_with_itself(tmp_path: Path) -> None:
    path = str(write_run(tmp_path / "a"))
    groups = make_groups(read_runs([tmp_path]))
    with pytest.raises(UserError, match="expected different groups, models or run folders"):
        compare(groups, ["cbam_resnet", "cbam_resnet"], 500, 0)
    with pytest.raises(UserError, match="expected different runs on each side"):
        compare(groups, ["cbam_resnet", path], 500, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"items": "elsewhere"}, "0 of them the same"),
        ({"images": 240}, "210 of them the same"),
        ({"stamps": [LEAKY]}, "only one of them is stamped"),
        ({"classes": ["anger", "contempt", "fear", "happiness", "neutral", "sadness", "surprise"]}, "other classes"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, change: dict, said: str) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", model="dan", **change)
    with pytest.raises(UserError, match=said):
        compare(make_groups(read_runs([tmp_path])), ["cbam_resnet", "dan"], 500, 0)


def test_names_that_choose_nothing_or_too_much_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", settings={"model.dropout": 0.1})
    write_run(tmp_path / "c", model="dan")
    groups = make_groups(read_runs([tmp_path]))
    with pytest.raises(UserError, match="no finished group, model or run folder of that name; expected one of"):
        compare(groups, ["dan", "nobody"], 500, 0)
    with pytest.raises(UserError, match="name one of them by its id"):
        compare(groups, ["dan", "cbam_resnet"], 500, 0)
    with pytest.raises(UserError, match="at least two"):
        compare(groups, ["dan"], 500, 0)


# -- files and page -----------------------------------------------------------------------------------------------


def test_everything_of_data_is_escaped_and_nothing_is_fetched(house: tuple[Path, Path]) -> None:
    page = (house[1] / "report.html").read_text()
    assert html.escape(HOSTILE) in page
    assert HOSTILE not in page
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", page)
    assert not re.findall(r"url\(|@import|https?://", re.sub(r'base64,[^"]*', "", page))
    assert HOSTILE not in (house[1] / "report.md").read_text()


def test_latex_is_balanced_and_escaped(house: tuple[Path, Path]) -> None:
    text = (house[1] / "report.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") >= 8
    assert text.count("{") == text.count("}")
    assert r"cbam\_resnet" in text
    for line in text.splitlines():
        if line.endswith(r"\\"):
            assert not re.search(r"(?<!\\)[%#_]", line)


BROWSER = """<!DOCTYPE html><iframe id="f" src="report.html" width="1280" height="3000"></iframe><pre id="out"></pre>
<script>
document.getElementById("f").onload = () => {
  const page = document.getElementById("f").contentDocument;
  const text = (table, n) => [...table.tBodies].map(b => [...b.rows].map(r => r.cells[n].textContent.trim()));
  const table = page.querySelector("table.results tbody.apart").closest("table");
  const before = text(table, 1);
  table.tHead.rows[0].cells[1].querySelector("button").click();
  const up = text(table, 1);
  table.tHead.rows[0].cells[1].querySelector("button").click();
  const down = text(table, 1);
  table.tHead.rows[0].cells[0].querySelector("button").click();
  document.getElementById("out").textContent = JSON.stringify({
    pictures: [...page.images].map(i => i.complete ? i.naturalWidth : 0),
    fetched: page.defaultView.performance.getEntriesByType("resource").map(e => e.name).filter(n => !/^data:/.test(n)),
    before, up, down, names: text(table, 0), title: page.title,
  });
};
</script>"""


def test_the_page_in_a_browser_without_a_network(house: tuple[Path, Path], tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    shutil.copy(house[1] / "report.html", tmp_path)
    (tmp_path / "wrapper.html").write_text(BROWSER)
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-web-security", "--virtual-time-budget=20000"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
    command = [chromium, *words, (tmp_path / "wrapper.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout
    found = re.search(r'<pre id="out">(.+?)</pre>', shown, re.S)
    assert found, shown[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert len(seen["pictures"]) > 10
    assert all(width > 0 for width in seen["pictures"])
    assert seen["fetched"] == []

    def values(part: list[str]) -> list[float]:
        return [float(text.split()[0]) for text in part]

    (honest, apart), (up, apart_up), (down, _) = seen["before"], seen["up"], seen["down"]
    assert values(up) == sorted(values(honest))
    assert values(down) == sorted(values(honest), reverse=True)
    assert apart == apart_up  # what is set apart stays apart, whatever is sorted
    assert values(apart)[0] > max(values(up))


# -- real runs ----------------------------------------------------------------------------------------------------


def keys(value: object, name: str = "") -> set[str]:
    """Dotted names of all keys; those of class names and counts apart."""
    if not isinstance(value, dict):
        return {name}
    return {name} | {key for k, v in value.items() for key in keys(v, f"{name}.{k}")}


def test_fake_runs_are_like_real_ones(whole: Path, tmp_path: Path) -> None:
    fake = write_run(tmp_path / "run")
    for name in ("results.json", "split.json", "status.json", "confusion_test.json"):
        want, have = (json.loads((folder / name).read_text()) for folder in (whole, fake))
        assert keys(have) - keys(want) - {".versions.python"} == set(), name
    for name in ("predictions.csv", "metrics.csv"):
        want, have = (pd.read_csv(folder / name) for folder in (whole, fake))
        assert set(have) == set(want), name
    assert set(read_run(fake).settings) == set(read_run(whole).settings)


def test_a_real_run_shows_its_wrong_images(whole: Path) -> None:
    group = one_group(whole)
    assert isinstance(group.runs[0], Run)
    wrong = most_wrong(group, 5, [], thumbnails=True)
    assert len(wrong) == 5
    assert all(one.thumbnail.startswith("iVBOR") for one in wrong)  # a PNG in base64
    assert wrong == sorted(wrong, key=lambda one: -one.confidence)
    assert not any(one.thumbnail for one in most_wrong(group, 5, [], thumbnails=False))
    table = pd.read_csv(whole / "predictions.csv").set_index("item")
    assert all(table.loc[one.item, "label"] == one.label != one.predicted for one in wrong)


# -- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "runs is missing"),
        (["runs=nowhere"], "no such folder"),
        (["runs=.", "resamples=3", "thumbnails=2"], "resamples=3.*\n.*thumbnails=2"),
        (["runs=."], "no run folder"),
    ],
)
def test_mistakes_are_one_sentence_each(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        run(composed(*words, command="report"))


@pytest.mark.slow
def test_a_thousand_runs_in_a_minute_and_a_gigabyte(tmp_path: Path) -> None:
    for number in range(1000):
        group, seed = divmod(number, 50)
        settings = {"model.dropout": group / 40}
        write_run(tmp_path / "runs" / str(group) / str(seed), seed=seed, settings=settings, images=200)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = report(tmp_path / "runs", tmp_path / "report")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "1,000 runs" in done.stdout
    assert "20 groups" in done.stdout
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{seconds:.1f} s of CPU, {after.ru_maxrss / 1024:.0f} MB")
    assert seconds < 60
    assert after.ru_maxrss < 1024 * 1024  # kilobytes
