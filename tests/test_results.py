"""Summaries of what was measured: from run folders to docs/results/measured, and from there to pages and report."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import TINY, composed
from fake_runs import write_run
from scipy import stats

from fer import report
from fer.config import CONF, USER_MISTAKE
from fer.errors import UserError
from fer.reporting import leaks, manual, measured, outputs, results, small
from fer.reporting.manual import filled
from fer.reporting.results import record
from fer.reporting.settings import setting_of
from fer.reporting.statistics import effective_images
from fer.reporting.summaries import RECORDS, Result, load_results, packed, save_results
from fer.reporting.tables import DASH, MINUS
from fer.runs import write_json

KFOLD = [*TINY, "protocol=kfold", "protocol.folds=3"]
FILE, FILE_WORD = f"b.pth sha256:{'e' * 64}", f"b.pth@sha256:{'e' * 12}"
COMMAND = "python -m fer.train hydra.mode=RUN experiment=fer2013_cpu protocol.drop_leaks={} seed={} sweep=fer_cpu"


def training(folder: Path, seed: int, accuracy: float, leaks: bool = False, epochs: int = 10) -> Path:
    """A run folder of ``sweep=fer_cpu``, as far as a summary reads it."""
    more = {"command": COMMAND.format(str(leaks).lower(), seed), "tta": "ten_crop"}
    words = ["experiment=fer2013_cpu", f"protocol.drop_leaks={str(leaks).lower()}"]
    return write_run(
        folder,
        words=words,
        data="fer2013",
        seed=seed,
        images=1000,
        accuracy=accuracy,
        settings={"trainer.max_epochs": epochs},
        more=more,
    )


def begun(name: str, letter: str) -> str:
    """What results say of the weights a run began with."""
    return f"run {name} (random) best.ckpt sha256:{letter * 64}"


def evaluation(folder: Path, of: Path, accuracy: float) -> None:
    """A run folder of ``python -m fer.evaluate run=<of> tta=none``."""
    key = json.loads((of / "results.json").read_text())["job_key"]
    more = {"evaluation": {"networks": [{"job_key": key}]}, "tta": "none"}
    stamps = ["evaluated again: a network that another run folder has trained and tested"]
    write_run(folder, data="fer2013", images=1000, accuracy=accuracy, stamps=stamps, more=more)


def kept(rows: list[Result]) -> Result:
    """The row of trainings as published."""
    return next(row for row in rows if "drop_leaks" not in row.setting)


def right(folder: Path) -> float:
    table = pd.read_csv(folder / "predictions.csv")
    return 100 * float((table["label"] == table["predicted"]).mean())


def over_images(runs: Path) -> list[float]:
    """The interval of ten views less one, points: 1,000 images drawn one by one, their three trainings averaged."""
    tables = [
        [pd.read_csv(runs / f"{name}{seed}" / "predictions.csv") for seed in range(3)] for name in ("kept", "single")
    ]
    hits = [np.mean([one["label"] == one["predicted"] for one in side], axis=0) for side in tables]
    rng = np.random.default_rng(8)
    drawn = (hits[0] - hits[1])[rng.integers(0, 1000, (4000, 1000))].mean(1)
    return [100 * float(end) for end in np.quantile(drawn, [0.025, 0.975])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds as published, two of them tested with one view too, and one seed without leaked copies."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, accuracy in enumerate((0.64, 0.66, 0.68)):
        run = training(folder / f"kept{seed}", seed, accuracy)
        evaluation(folder / f"single{seed}", run, accuracy - 0.02)
    training(folder / "dropped0", 0, 0.62, leaks=True)
    write_run(folder / "failed", status="failed", error="no reason")
    return folder


def test_a_table_says_what_the_runs_predicted(runs: Path, tmp_path: Path) -> None:
    save_results(record([runs], []), tmp_path)
    rows = load_results(tmp_path)
    assert [row.setting for row in rows] == [
        "experiment=fer2013_cpu",
        "experiment=fer2013_cpu protocol.drop_leaks=true",
    ]
    assert rows[0].views == ["none", "ten_crop"]
    text = measured.section("fer2013", tmp_path)
    for views, name in (("ten\\_crop", "kept"), ("none", "single")):
        found = [right(runs / f"{name}{seed}") for seed in range(3)]
        line = next(one for one in text.splitlines() if f"fer2013\\_cpu | {views} |" in one)
        half = stats.t.isf(0.025, 2) * np.std(found, ddof=1) / np.sqrt(3)
        assert f"| {np.mean(found):.2f} ± {np.std(found, ddof=1):.2f} |" in line
        assert f"| {np.mean(found) - half:.2f} to {np.mean(found) + half:.2f} |" in line
        assert "| 1,000 | 3 (0, 1, 2) | validation" in line
        assert "a processor, 1 thread" in line
    gain = np.mean([right(runs / f"kept{seed}") - right(runs / f"single{seed}") for seed in range(3)])
    leak = right(runs / "dropped0") - right(runs / "kept0")
    worth = measured.differences_section("fer2013", tmp_path)
    assert f"ten\\_crop instead of none | {gain:.2f} |" in worth
    line = next(one for one in worth.splitlines() if "ten\\_crop instead of none" in one)
    ends = [float(end.replace(MINUS, "-")) for end in line.split("|")[4].split(" to ")]
    assert ends == pytest.approx(over_images(runs), abs=0.25)
    assert (
        f"with protocol.drop\\_leaks=true, views ten\\_crop | {leak:.2f}".replace("-", MINUS) + f" | {DASH} |" in worth
    )
    assert measured.section("fer2013/vit", tmp_path) == "Not measured yet."


def test_later_runs_join_earlier_ones(runs: Path, tmp_path: Path) -> None:
    before = record([runs], [])
    training(tmp_path / "again" / "1", 1, 0.5)  # the same values: the same job
    training(tmp_path / "again" / "3", 3, 0.5)
    joined = kept(record([tmp_path / "again"], before))
    assert [one.seed for one in joined.repeats] == [0, 1, 2, 3]
    assert [len(one.tests) for one in joined.repeats] == [2, 2, 2, 1]
    assert joined.views == ["ten_crop"]  # what every repeat has
    evaluation(tmp_path / "late" / "3", tmp_path / "again" / "3", 0.4)
    assert kept(record([tmp_path / "late"], [joined])).views == ["none", "ten_crop"]
    training(tmp_path / "other" / "0", 0, 0.9, epochs=3)  # the recipe has changed since
    changed = record([tmp_path / "other"], before)
    assert [len(row.repeats) for row in changed] == [1, 1]


def aged(folder: Path, days: int) -> Path:
    """The folder of a run that finished so many days ago."""
    then = time.time() - 86400 * days
    os.utime(folder / "results.json", (then, then))
    return folder


def test_the_newest_run_counts_whatever_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = record([aged(training(tmp_path / "first", 2, 0.6), 9)], [])
    runs = tmp_path / "runs"
    newest = [training(runs / "a" / str(seed), seed, 0.7) for seed in range(2)]
    aged(training(runs / "b" / "0", 0, 0.5), 1)  # the same values
    aged(training(runs / "b" / "1", 1, 0.4, epochs=3), 2)  # of another recipe
    capsys.readouterr()
    (row,) = record([runs], before)
    assert [one.seed for one in row.repeats] == [0, 1, 2]
    assert row.values("ten_crop", "acc")[0, None] == pytest.approx(right(newest[0]) / 100)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"experiment=fer2013_cpu: dropped {runs}/b/1 (seed 1 of commit None), since {runs}/a/")
    training(tmp_path / "later" / "0", 0, 0.4, epochs=3)
    (changed,) = record([tmp_path / "later"], [row])
    assert [one.seed for one in changed.repeats] == [0]
    assert "dropped what was recorded before (seed 0, seed 1, seed 2 of commit None)" in capsys.readouterr().out


def cross_validation(folder: Path, held_out: str, places: list[tuple[int, int]]) -> Result:
    """The row of runs of some seeds and folds; of ``held_out=val`` every one tests the same 300 images."""
    for seed, fold in places:
        protocol = {"folds": 3, "fold": fold, "held_out": held_out}
        more = {"fold": fold, "protocol": protocol, "command": "python -m fer.train model=dan protocol=kfold"}
        part = {"fold": fold, "words": KFOLD} if held_out == "test" else {}
        right = 0.5 + 0.1 * fold
        people = {"images_per_person": 5}
        run = write_run(folder / f"{seed}-{fold}", seed=seed, images=300, accuracy=right, more=more, **part, **people)
        assert len(pd.read_csv(run / "predictions.csv")) == (100 if held_out == "test" else 300)
        if held_out == "val":
            config = yaml.safe_load((run / "config.yaml").read_text())
            config["data"]["protocol"]["fold"] = fold
            (run / "config.yaml").write_text(yaml.safe_dump(config))
    (row,) = record([folder], [])
    return row


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_each_test_image_counts_once(tmp_path: Path, held_out: str) -> None:
    places = [(seed, fold) for seed in range(2) for fold in range(3)]
    row = cross_validation(tmp_path / "runs", held_out, places)
    save_results([row], tmp_path / "records")
    assert load_results(tmp_path / "records") == [row]
    table = measured.table([row], "")
    cells = dict(zip(table.columns, (cell.text for cell in table.rows[0].cells), strict=True))
    assert cells["n"] == "300"
    share = np.array([[right(tmp_path / "runs" / f"{seed}-{fold}") for seed in range(2)] for fold in range(3)])
    low, high = stats.t.interval(0.95, 2, share.mean(), stats.sem(share.mean(1)))
    assert cells["accuracy, %"] == f"{share.mean():.2f} ± {share.mean(1).std(ddof=1):.2f}"
    assert cells["95 % over folds"] == f"{low:.2f} to {high:.2f}"
    # Image by image: each once, by the mean of the runs that tested it, and by people.
    tables = pd.concat(pd.read_csv(tmp_path / "runs" / f"{seed}-{fold}" / "predictions.csv") for seed, fold in places)
    tables["right"] = tables["label"] == tables["predicted"]
    images = tables.groupby("item").agg(right=("right", "mean"), subject=("subject", "first"))
    assert len(images) == 300
    assert images["subject"].nunique() == 60
    hits, person = row.hits("ten_crop" if "ten_crop" in row.views else row.views[0])
    assert sorted(hits) == pytest.approx(sorted(images["right"]))
    by_person = pd.DataFrame({"hits": hits, "person": person}).groupby("person")["hits"].agg(["sum", "count"])
    expected = images.groupby("subject")["right"].agg(["sum", "count"])
    assert sorted(map(tuple, by_person.round(6).to_numpy())) == sorted(map(tuple, expected.round(6).to_numpy()))
    half = np.sqrt(share.mean() * (100 - share.mean()) / effective_images(hits, person)) * 1.96
    found = table.rows[0].cells[table.columns.index("± by images")]
    assert float(found.value or 0) == pytest.approx(half / 100, rel=0.02)  # Wilson's is a little narrower
    assert (cells.get("pooled accuracy, %") == f"{share.mean():.2f}") == (held_out == "test")
    assert table.rows[0].stamps == []


def test_seeds_of_different_folds_are_said(tmp_path: Path) -> None:
    row = cross_validation(tmp_path, "test", [(0, 0), (0, 1), (0, 2), (1, 1)])
    assert round(row.confusion("none").sum()) == 300
    assert measured.table([row], "").rows[0].stamps == ["the seeds have different folds: seed 1 lacks fold 0, 2"]


@pytest.mark.parametrize(
    ("typed", "weights", "kept"),
    [
        ("-m experiment=fer2013_cpu seed=1 trainer.max_epochs=10", "random", "experiment=fer2013_cpu"),
        ("trainer.max_epochs=6 data.root=/x experiment=fer2013_cpu", "", "experiment=fer2013_cpu trainer.max_epochs=6"),
        ("sweep=cv5 protocol.fold=3 model=vit 'model.mean=[0,0,0]'", "", "model=vit sweep=cv5 'model.mean=[0,0,0]'"),
        ("start_from=/home/me/run model=vit", begun("a", "d"), f"model=vit start_from=a@sha256:{'d' * 12}"),
        ("start_from=null model=vit", "random", "model=vit"),
        ("model=vit model.dropout=.5", "random", "model=vit model.dropout=.5"),
        ("model=vit model.pretrained=/a/b.pth", FILE, f"model=vit model.pretrained={FILE_WORD}"),
        ("model=vit model.pretrained=out/b.pth@sha256:e", FILE, f"model=vit model.pretrained={FILE_WORD}"),
        ("model=vit model.ckpt=~/b.pth", f"random; landmarks: {FILE}, frozen", f"model=vit model.ckpt={FILE_WORD}"),
        ("model=vit model.pretrained=../masked.safetensors", "", "model=vit model.pretrained=masked.safetensors"),
        ("model=vit data.identities='/a/people.csv'", "random", "model=vit data.identities=people.csv"),
    ],
)
def test_a_setting_is_what_makes_the_figures(typed: str, weights: str, kept: str) -> None:
    assert setting_of(f"python -m fer.train {typed}", weights) == kept


def test_rows_began_with_the_same_weights(tmp_path: Path) -> None:
    typed = "python -m fer.train experiment=fer2013_cpu seed={} start_from={}"
    starts = [None, ("/x/a", "d"), ("/y/copy_of_a", "d"), ("/x/a", "e")]  # another checksum: trained anew
    for seed, start in enumerate(starts):
        run = training(tmp_path / str(seed), seed, 0.6)
        if start is not None:
            results = json.loads((run / "results.json").read_text())
            results |= {"command": typed.format(seed, start[0]), "weights": begun("small-vit", start[1])}
            write_json(run / "results.json", results)
    rows = record([tmp_path], [])
    found = {row.setting: [one.seed for one in row.repeats] for row in rows}
    started = "experiment=fer2013_cpu start_from=small-vit@sha256:"
    assert found == {"experiment=fer2013_cpu": [0], started + 12 * "d": [1, 2], started + 12 * "e": [3]}
    assert len({row.settings for row in rows}) == 3


def _lacks_commit(row: dict[str, Any]) -> None:
    del row["repeats"][0]["commit"]


def _says_more(row: dict[str, Any]) -> None:
    row["mood"] = "good"


def _forgets_hits(row: dict[str, Any]) -> None:
    row["repeats"][0]["hits"]["ten_crop"] = packed(np.zeros(449, np.uint8))


def _tears_hits(row: dict[str, Any]) -> None:
    row["repeats"][0]["hits"]["ten_crop"] = row["repeats"][0]["hits"]["ten_crop"][:50]


def _lacks_views(row: dict[str, Any]) -> None:
    del row["repeats"][0]["hits"]["none"]


def _tests_other_images(row: dict[str, Any]) -> None:
    row["repeats"][1]["images"] = "0" * 12


def _counts_too_many(row: dict[str, Any]) -> None:
    row["n"]["test"] += 1


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_lacks_commit, r"fer2013\.json, row 1, repeat 1 lacks commit: expected all of seed, fold"),
        (_says_more, r"fer2013\.json, row 1 has mood, expected nothing but"),
        (_forgets_hits, r"repeat 1: its hits with views ten_crop are not those of its confusion matrix"),
        (_tears_hits, r"repeat 1: its hits cannot be unpacked"),
        (_lacks_views, r"repeat 1: its tests have the views ten_crop, none, its hits ten_crop"),
        (_tests_other_images, r"row 1: its repeats tested other images, though the fold is the same"),
        (_counts_too_many, r"its test with views ten_crop counts 3589 images, not n\.test"),
    ],
)
def test_a_damaged_row_gets_one_sentence(spoil: Callable[[dict[str, Any]], None], words: str, tmp_path: Path) -> None:
    shutil.copytree(RECORDS, tmp_path / "measured")
    path = tmp_path / "measured" / "fer2013.json"
    content = json.loads(path.read_text())
    spoil(content["rows"][0])
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words) as caught:
        load_results(path.parent)
    assert "\n" not in str(caught.value)


def test_a_real_run_is_read(whole: Path) -> None:
    (row,) = record([whole.parent], [])
    results = json.loads((whole / "results.json").read_text())
    assert row.values("none", "acc") == {(0, None): pytest.approx(results["metrics"]["test"]["acc"])}
    assert row.setting.startswith("data=synthetic model=cbam_resnet trainer=cpu data.batch_size=20")
    assert "thread" in row.repeats[0].hardware


def test_a_folder_without_trainings_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "failed", status="failed", error="no reason")
    with pytest.raises(UserError, match="holds no finished training"):
        record([tmp_path], [])


@pytest.mark.parametrize("module", [results, leaks, small], ids=lambda module: module.__name__)
def test_commands_write_records_then_pages(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []
    monkeypatch.setattr(manual, "write_pages", lambda: written.append("pages"))
    monkeypatch.setattr("sys.argv", ["results", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stop:
        manual.from_runs(module.__doc__, module.update)
    assert stop.value.code == USER_MISTAKE
    assert capsys.readouterr().err.startswith(f"error: runs={tmp_path}/nowhere: no such folder")
    monkeypatch.setattr("sys.argv", ["results", "--help"])
    manual.from_runs(module.__doc__, module.update)
    assert capsys.readouterr().out == f"{module.__doc__}\n"
    assert written == []
    monkeypatch.setattr("sys.argv", ["results", str(tmp_path)])
    manual.from_runs(module.__doc__, lambda folders: written.extend(map(str, folders)))
    assert written == [str(tmp_path), "pages"]


def test_the_readme_is_what_the_summaries_give() -> None:
    page = (CONF.parent / "README.md").read_text()
    assert page == filled(page), "python -m fer.reporting.results writes it anew"
    assert page.count("<!-- measured ") == 2


def test_the_report_shows_the_same_lines(runs: Path, tmp_path: Path) -> None:
    save_results(record([runs], []), tmp_path / "measured")
    folder = tmp_path / "now"
    training(folder / "0", 7, 0.7)
    words = [f"runs={folder}", f"output={tmp_path / 'out'}", f"measured={tmp_path / 'measured'}", "thumbnails=false"]
    report.run(composed(*words, command="report"))
    page = (tmp_path / "out" / "report.md").read_text()
    lines = [line for line in measured.section("fer2013", tmp_path / "measured").splitlines() if "fer2013" in line]
    assert len(lines) == 3
    assert all(line in page for line in lines)
    assert "Measured earlier on fer2013 (3)" in (tmp_path / "out" / "report.html").read_text()


def test_a_commands_page_is_quoted_with_what_it_cost(tmp_path: Path) -> None:
    folder, records, figures = (tmp_path / name for name in ("one-on-two", "records", "figures"))
    for made in (folder, figures):
        made.mkdir()
    page = "# m on d\n\n- a note\n\n## Calibration\n\n![reliability](reliability.png)\n\nAgain: `python -m x`\n"
    (folder / "evaluation.md").write_text(page)
    (folder / "reliability.png").write_bytes(b"a chart")
    machine = {"cpu": "a processor", "accelerators": []}
    more = {"command": "python -m x", "git_commit": "abc", "cpu_seconds": 90.0, "machine": machine, "threads": 1}
    (folder / "results.json").write_text(json.dumps(more))
    outputs.update([folder], records, figures)
    assert (figures / "one-on-two-reliability.png").read_bytes() == b"a chart"
    assert outputs.section("one-on-two", records).splitlines() == [
        *["- a note", "", "#### Calibration", "", "![reliability](figures/one-on-two-reliability.png)", ""],
        *["Again: `python -m x`", "", "1.5 core-minutes, a processor, 1 thread, commit abc."],
    ]
    assert outputs.section("another", records) == "Not measured yet."
    with pytest.raises(UserError, match=r"has neither evaluation.md nor export.md: expected the output of python -m"):
        outputs.update([figures], records, figures)
