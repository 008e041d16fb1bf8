"""``sweep=papers``: every paper's recipe by one command, and the report that sets claimed beside measured."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fakes import write_affectnet, write_ckplus, write_ferplus, write_rafdb
from model_builds import CHEAP
from omegaconf import OmegaConf

from fer.config import CONF
from fer.reporting.claims import load_claims
from fer.runs import read_json

SHRUNK = [
    *("trainer=smoke", "trainer.max_epochs=1", "logger=csv", "protocol.val_fraction=0.25"),
    *("data.batch_size=2", "data.eval_batch_size=16", "data.store_size=64", "data.num_workers=0"),
]


def copy_with_small_networks(house: Path) -> None:
    """The package with small networks: recipes share no option that would make them all small from a command line."""
    shutil.copytree(CONF.parent / "fer", house / "fer", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CONF, house / "conf")
    for name, words in CHEAP.items():
        path = house / "conf" / "model" / f"{name}.yaml"
        model = OmegaConf.load(path)
        model.merge_with_dotlist([*words, *(["pretrained=false"] if "pretrained" in model else [])])
        path.write_text(OmegaConf.to_yaml(model))
    sizes = {word.partition("=")[0] for words in CHEAP.values() for word in words}
    for path in (house / "conf" / "experiment").glob("*.yaml"):
        recipe = OmegaConf.load(path)
        for size in sizes & set(recipe.get("model", {})):  # a recipe's own sizes give way too
            del recipe.model[size]
        path.write_text("# @package _global_\n" + OmegaConf.to_yaml(recipe))


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sweep over all papers' recipes on small copies of their data sets."""
    house, data = tmp_path_factory.mktemp("house"), tmp_path_factory.mktemp("data")
    copy_with_small_networks(house)
    write_ferplus(data / "fer2013")  # FER2013 reads its fer2013.csv
    write_ckplus(data / "ckplus")
    write_rafdb(data / "rafdb")
    write_affectnet(data / "affectnet")
    command = [sys.executable, "-m", "fer.train", "sweep=papers", *SHRUNK]
    environment = {**os.environ, "FER_DATA": str(data), "FER_CACHE": str(house / "store"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    (folder,) = (house / "outputs" / "sweeps").iterdir()
    assert str(folder / "report" / "report.html") in done.stdout
    return folder


@pytest.mark.slow
def test_claimed_stands_beside_measured_for_every_paper_result(papers: Path) -> None:
    recipes = {path.stem for path in (CONF / "experiment").glob("*.yaml")} - {"demo", "fer2013_cpu", "ferplus_cpu"}
    jobs = {path.parent.name.removeprefix("experiment-"): path.parent for path in papers.glob("*/results.json")}
    assert set(jobs) == recipes
    lines = pd.read_csv(papers / "report" / "claims.csv")
    measured = lines[lines["group"].notna()]
    # Every claim on a network of ours, and every recipe's run, has its line.
    for claim in load_claims(CONF / "claims.yaml"):
        same = (measured["paper"] == claim.paper) & (measured["method"] == claim.method)
        assert claim.model is None or (same & (measured["claimed_acc"] == claim.acc)).any(), claim
    groups = pd.read_csv(papers / "report" / "groups.csv")
    assert len(groups) == len(recipes) - 1  # made small, the two of ViT on AffectNet, 8 classes, are the same
    assert set(measured["group"]) == set(groups["group"])
    # What is said to be measured is what the runs predicted.
    accuracy = {}
    for folder in jobs.values():
        table = pd.read_csv(folder / "predictions.csv")
        accuracy[folder.relative_to(papers).as_posix()] = (table["label"] == table["predicted"]).mean()
    runs = pd.read_csv(papers / "report" / "runs.csv").set_index("group")["run"]
    for line in measured.to_dict("records"):
        assert line["measured_acc"] == pytest.approx(100 * accuracy[runs[line["group"]]], abs=1e-9)
        assert line["gap"] == pytest.approx(line["measured_acc"] - line["claimed_acc"], abs=1e-9)


@pytest.mark.slow
def test_the_protocols_differences_are_named(papers: Path) -> None:
    lines = pd.read_csv(papers / "report" / "claims.csv").fillna("")
    by_group = lines.groupby("group")["differences"].agg("; ".join)

    def said(experiment: str) -> str:
        (run,) = papers.glob(f"experiment-{experiment}/results.json")
        results = read_json(run)
        fitting = [text for group, text in by_group.items() if f"{results['data']}-{results['model']}" in group]
        return "; ".join(fitting)

    assert "here 1 of 10 folds" in said("cbam_resnet_ckplus")
    assert "void" in said("convcut_rafdb")
    assert "own 80/20 split" in said("resattn_vit_rafdb")
    assert "3,589 test images; here 53" in said("cbam_resnet_fer2013")
    stamped = pd.read_csv(papers / "report" / "groups.csv").fillna("")
    paper = stamped[stamped["stamps"].str.contains("LEAKY|selected_on: test|not comparable")]
    assert len(paper) == len(list((CONF / "experiment").glob("*_paper.yaml")))
    page = (papers / "report" / "report.html").read_text()
    assert page.count("Claimed and measured") >= 6
    assert np.isfinite(lines["claimed_acc"]).all()
