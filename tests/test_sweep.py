"""Sweeps: one command, many jobs; restart, failures, the aggregate, W&B's group, launchers."""

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from commands import call
from conftest import TINY, composed, planned, train
from fake_wandb import wandb_records
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy import stats

from fer.config import CONF, compose_like_hydra, is_sweep
from fer.errors import UserError
from fer.models.base import ExpressionModule
from fer.reporting.aggregate import aggregate, failures, markdown
from fer.safety import unsafe_entries
from fer.sweep import alone
from fer.sweep_checks import check_search
from fer.train import run as train_one

# Two folds of few faces and a tiny network: about 8 core-seconds beside the imports.
SMALL = [*TINY, "data.train=84", "data.val=21", "data.test=21", "data.batch_size=10", "model.width=4"]
FOLDS = [*SMALL, "protocol=kfold", "protocol.folds=2", "protocol.fold=0,1", "trainer.checkpoint_steps=1"]
FOLDS += ["model.std=choice([0.5,0.5,0.5])"]  # a sweep's axis whose one value no folder could be called
JOBS = ("model.std-0.5_0.5_0.5+protocol.fold-0", "model.std-0.5_0.5_0.5+protocol.fold-1")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The folder of a finished sweep of two folds with the default (W&B offline) logger."""
    cwd = tmp_path_factory.mktemp("sweep")
    done = call("train", "-m", *FOLDS, cwd=cwd, FER_CACHE=str(cache), NETRC=os.devnull, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    (cwd / "stdout").write_text(done.stdout)
    (folder,) = (cwd / "outputs" / "sweeps").iterdir()
    return folder


def test_a_sweep_ends_with_its_aggregate(sweep: Path) -> None:
    assert sweep.name.startswith("sweep-")
    assert sorted(path.parent.name for path in sweep.glob("*/results.json")) == sorted(JOBS)
    assert not [path for path in sweep.rglob("*") if "=" in path.name]
    (group,) = read(sweep / "aggregate.json")["groups"]
    assert (group["model"], group["data"], group["protocol"]) == ("cbam_resnet", "synthetic", "kfold")
    assert (group["n"], group["folds"], group["seeds"], group["failed"]) == (2, [0, 1], [0], [])
    printed = (sweep.parent.parent.parent / "stdout").read_text()
    page = (sweep / "aggregate.md").read_text()
    for text in (printed, page):
        assert "cbam_resnet on synthetic, kfold" in text
        assert f"{100 * group['mean']['test/acc']:.2f} ± {100 * group['std']['test/acc']:.2f}" in text
    assert "2 jobs: 0 skipped, 0 resumed, 2 run, 0 failed" in printed
    assert str(sweep) in printed


def test_the_aggregate_is_what_numpy_makes_of_the_predictions(sweep: Path) -> None:
    (group,) = read(sweep / "aggregate.json")["groups"]
    classes, figures, held_out = group["classes"], [], []
    confusion = np.zeros((len(classes), len(classes)), dtype=int)
    for job in JOBS:
        table = pd.read_csv(sweep / job / "predictions.csv")
        label = table["label"].map(classes.index).to_numpy()
        probabilities = table[classes].to_numpy(dtype=np.float32).astype(np.float64)
        predicted = probabilities.argmax(1)
        np.add.at(confusion, (label, predicted), 1)
        recall = [(predicted[label == k] == k).mean() for k in np.unique(label)]
        nll = -np.log(probabilities[np.arange(len(label)), label]).mean()
        figures.append({"test/acc": (predicted == label).mean(), "test/mean_acc": np.mean(recall), "test/nll": nll})
        held_out += table["index"].tolist()
    assert sorted(held_out) == list(range(126))  # every face of the pool exactly once
    assert group["confusion"] == confusion.tolist()
    assert group["pooled"]["test/acc"] == pytest.approx(confusion.trace() / 126, abs=1e-9)
    for metric in figures[0]:
        x = np.array([f[metric] for f in figures])
        assert group["values"][metric] == pytest.approx(x, abs=1e-9)
        assert group["mean"][metric] == pytest.approx(x.mean(), abs=1e-9)
        assert group["std"][metric] == pytest.approx(abs(x[0] - x[1]) / np.sqrt(2), abs=1e-9)
        half = 12.706204736432095 * abs(x[0] - x[1]) / 2  # t(0.975, 1)
        assert group["interval"][metric] == pytest.approx([x.mean() - half, x.mean() + half], abs=1e-9)


def test_wandb_holds_a_run_per_fold_and_a_summary_in_one_group(sweep: Path) -> None:
    seen = {}
    for place in (*(sweep / job for job in JOBS), sweep):
        records = wandb_records(place)
        config, summary, logged, epochs = {}, set(), set(), 0
        for record in records:
            kind = record.WhichOneof("record_type")
            if kind in ("run", "config"):
                updates = record.run.config.update if kind == "run" else record.config.update
                config |= {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in updates}
            if kind == "summary":
                summary |= {i.key or "/".join(i.nested_key) for i in record.summary.update}
            if kind == "history":
                keys = {i.key or i.nested_key[0] for i in record.history.item}
                logged |= keys
                epochs += "val/mean_acc" in keys
        run = next(r.run for r in records if r.WhichOneof("record_type") == "run")
        assert run.run_group == sweep.name
        assert {"synthetic", "cbam_resnet", "kfold", "sweep"} <= set(run.tags)
        assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [0]
        seen[place.name] = (run.run_id, run.job_type, config, summary, logged, epochs)
    assert len({entry[0] for entry in seen.values()}) == 3
    for fold, job in enumerate(JOBS):
        _, kind, config, _, logged, epochs = seen[job]
        assert (kind, config["protocol"]["fold"], config["model"]["width"], epochs) == ("fold", fold, 4, 2)
        assert {"test/confusion_image", "test/confusion_table", "val/confusion_table", "train/loss"} <= logged
    _, kind, config, summary, logged, _ = seen[sweep.name]
    assert (kind, config["jobs"]) == ("summary", 2)
    assert "python -m fer.train -m" in config["command"]
    assert {"groups", "runs", "test/confusion_image", "test/confusion_table"} <= logged
    assert any(key.startswith("test/acc") for key in summary)


def test_the_same_command_skips_finished_jobs_at_little_cost(sweep: Path) -> None:
    cwd, files = sweep.parent.parent.parent, [sweep / job / "results.json" for job in JOBS]
    before = [path.stat().st_mtime_ns for path in files]
    aggregated, runs = (sweep / "aggregate.json").read_text(), len(list(sweep.glob("wandb/offline-run-*")))
    command = [sys.executable, "-X", "importtime", "-m", "fer.train", "-m", *FOLDS]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 jobs: 2 skipped, 0 resumed, 0 run, 0 failed" in done.stdout
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "hydra" in modules
    assert not {"torch", "lightning", "wandb"} & modules
    assert [path.stat().st_mtime_ns for path in files] == before
    assert (sweep / "aggregate.json").read_text() == aggregated
    assert len(list(sweep.glob("wandb/offline-run-*"))) == runs == 1


def wait_until(ready: Any, process: subprocess.Popen[bytes], seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.reliability
def test_a_killed_sweep_goes_on_to_the_same_aggregate(sweep: Path, tmp_path: Path) -> None:
    words = ["-m", *FOLDS, "logger=csv"]
    process = subprocess.Popen([sys.executable, "-m", "fer.train", *words], cwd=tmp_path, stdout=subprocess.DEVNULL)
    folder = tmp_path / "outputs" / "sweeps" / sweep.name  # the logger does not make another sweep of it
    first, second = (folder / job for job in JOBS)
    try:
        wait_until((second / "checkpoints" / "last.ckpt").exists, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (folder / "aggregate.json").exists()
    before = (first / "results.json").stat().st_mtime_ns
    if (second / "results.json").exists():
        pytest.skip("the second job was done before the kill came")
    done = call("train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 jobs: 1 skipped, 1 resumed, 0 run, 0 failed" in done.stdout
    assert (first / "results.json").stat().st_mtime_ns == before
    assert read(second / "results.json")["resumed_from_step"] > 0
    assert read(folder / "aggregate.json") == read(sweep / "aggregate.json")
    for job in JOBS:
        assert (folder / job / "predictions.csv").read_bytes() == (sweep / job / "predictions.csv").read_bytes()


def test_a_failing_job_is_named_and_stops_nothing(tmp_path: Path) -> None:
    # Synthetic faces have no vote distributions, which loss=soft needs.
    words = [*SMALL, "logger=csv", "trainer.max_epochs=1", "loss=soft,cross_entropy", "hydra.sweep.dir=here"]
    done = call("train", "-m", *words, cwd=tmp_path)
    assert done.returncode == 1
    assert [read(tmp_path / "here" / f"loss-{x}" / "status.json")["status"] for x in ("soft", "cross_entropy")] == [
        "failed",
        "done",
    ]
    assert "error: loss-soft: failed, " in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    failed, whole = read(tmp_path / "here" / "aggregate.json")["groups"]
    assert (failed["n"], whole["n"]) == (0, 1)
    assert failed["failed"][0]["job"] == "loss-soft"
    assert "loss-soft: failed" in (tmp_path / "here" / "aggregate.md").read_text()


def test_the_configs_of_finished_jobs_are_not_kept() -> None:
    config = compose_like_hydra("train", ["-m", "seed=0,1"])
    ended = JobReturn(cfg=config, hydra_cfg=config, _return_value=0.5)
    for node in config.hydra.callbacks.values():
        instantiate(node).on_job_end(config, ended)
    assert (ended.cfg, ended.hydra_cfg, ended._return_value) == (None, None, 0.5)


# -- launchers, search, several devices: minutes -----------------------------------------------------------------------

LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib"],
    "submitit_local": ["hydra/launcher=submitit_local"],
    "ray": ["hydra/launcher=ray", "hydra.launcher.ray.remote.num_gpus=0"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_the_same_aggregate(sweep: Path, tmp_path: Path, launcher: str) -> None:
    done = train("-m", *FOLDS, "logger=csv", *LAUNCHERS[launcher], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "outputs" / "sweeps" / sweep.name
    assert read(folder / "aggregate.json") == read(sweep / "aggregate.json")
    assert "2 jobs: 0 skipped, 0 resumed, 2 run, 0 failed" in done.stdout
    assert len({read(folder / job / "outcome.json")["pid"] for job in JOBS}) == 2
    again = train("-m", *FOLDS, "logger=csv", *LAUNCHERS[launcher], cwd=tmp_path)
    assert "2 jobs: 2 skipped, 0 resumed, 0 run, 0 failed" in again.stdout


@pytest.mark.slow
def test_nothing_is_carried_from_job_to_job(sweep: Path, tmp_path: Path) -> None:
    """Jobs that come second in their process, after other jobs of other sizes, against the same jobs alone."""
    words = [*FOLDS, "logger=csv", "model.width=8,4"]  # width 8 first: every process has run one when a 4 comes
    done = train("-m", *words, "hydra/launcher=joblib", "hydra.sweep.dir=joblib", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    places = [path.parent for path in (tmp_path / "joblib").glob("*/outcome.json")]
    assert len(places) == 4
    assert len({read(place / "outcome.json")["pid"] for place in places}) == 2
    alone = read(sweep / JOBS[1] / "results.json")["command"]
    assert "hydra.mode=RUN" in alone
    words = shlex.split(alone)[3:]
    assert train(*words, "logger=csv", "hydra.run.dir=alone", cwd=tmp_path).returncode == 0
    reference = (tmp_path / "alone" / "predictions.csv").read_bytes()
    assert (sweep / JOBS[1] / "predictions.csv").read_bytes() == reference  # basic: the second job of its process
    assert (tmp_path / "joblib" / JOBS[1].replace("+", "+model.width-4+") / "predictions.csv").read_bytes() == reference


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", *LAUNCHERS])
def test_control_c_stops_a_sweep(tmp_path: Path, launcher: str) -> None:
    launching = LAUNCHERS.get(launcher, [])
    words = ["-m", *SMALL, "seed=0,1,2", "logger=csv", "trainer.max_epochs=500", *launching, "hydra.sweep.dir=here"]
    command = [sys.executable, "-m", "fer.train", *words]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    wait_until(lambda: list((tmp_path / "here").glob("*/metrics.csv")), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(timeout=300) == 130
    assert not (tmp_path / "here" / "aggregate.json").exists()
    curves = {path: path.read_text() for path in (tmp_path / "here").glob("*/metrics.csv")}
    time.sleep(10)
    assert {path: path.read_text() for path in (tmp_path / "here").glob("*/metrics.csv")} == curves  # no job lives on


@pytest.mark.slow
def test_a_search_draws_the_same_trials_again(tmp_path: Path) -> None:
    words = ["-m", "hydra/sweeper=optuna", *SMALL, "logger=csv", "hydra.sweeper.n_trials=4", "hydra.sweep.dir=here"]
    words += ["loss=soft,cross_entropy"]  # the first fails: synthetic faces have no vote distributions
    found = train(*words, cwd=tmp_path)
    results = [read(path) for path in (tmp_path / "here").glob("*/results.json")]
    assert 0 < len(results) < 4
    assert found.returncode == 1
    assert f"4 jobs: 0 skipped, 0 resumed, {len(results)} run, {4 - len(results)} failed" in found.stdout
    best = max(r["metrics"]["val"]["mean_acc"] for r in results)
    chosen = OmegaConf.load(tmp_path / "here" / "optimization_results.yaml")
    assert chosen.best_value == pytest.approx(best, abs=1e-6)
    groups = read(tmp_path / "here" / "aggregate.json")["groups"]
    assert len(groups) == 4
    assert groups[0]["mean"]["val/mean_acc"] == pytest.approx(best)
    assert f"4 jobs: {len(results)} skipped" in train(*words, cwd=tmp_path).stdout


@pytest.mark.slow
def test_two_devices_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    """A network without batch norm and dropout, for which the two are the same computation."""
    words = [*SMALL[: SMALL.index("model=cbam_resnet")], "data.train=84", "data.val=21", "data.test=21", "logger=csv"]
    words += ["model=timm", "model.backbone=test_vit", "model.pretrained=false", "model.image_size=48"]
    words += ["optim=sgd_onecycle", "optim.optimizer.lr=0.01", "trainer.max_epochs=3", "trainer.precision=32-true"]
    words += ["trainer.enable_progress_bar=false", "trainer.checkpoint_steps=2", "trainer.threads=1"]
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=10", "hydra.run.dir=two"]
    done = train(*words, *two, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one = train(*words, "trainer=cpu", "data.batch_size=20", "hydra.run.dir=one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    a, b = (read(tmp_path / name / "results.json") for name in ("two", "one"))
    assert (a["devices"], b["devices"], a["steps"]) == (2, 1, b["steps"])
    tables = [pd.read_csv(tmp_path / name / "predictions.csv") for name in ("two", "one")]
    assert tables[0]["index"].tolist() == tables[1]["index"].tolist()
    assert len(tables[0]) == tables[0]["index"].nunique() == 21
    assert np.abs(tables[0][a["classes"]] - tables[1][a["classes"]]).to_numpy().max() < 1e-4
    curves = [pd.read_csv(tmp_path / name / "metrics.csv") for name in ("two", "one")]
    for column in ("train/acc", "train/loss", "val/nll"):  # counted over both devices' images
        assert curves[0][column].to_numpy() == pytest.approx(curves[1][column].to_numpy(), abs=1e-4)
    refused = train("-m", *words, *two, "seed=0,1", cwd=tmp_path)
    assert refused.returncode == 2
    assert "leave -m and sweep= out" in refused.stderr
    assert not (tmp_path / "outputs").exists()


# -- the plan: no job is started ---------------------------------------------------------------------------------------


def test_the_folder_belongs_to_what_is_swept_and_nothing_else() -> None:
    reference = planned("-m", "model=dan,convcut", "seed=0,1")
    for same in (
        ("-m", "seed=0,1", "model=dan,convcut"),
        ("-m", "model=dan,convcut", "seed=0,1", "hydra/launcher=joblib", "logger=csv", "fresh=true", "data.root=/x"),
    ):
        assert planned(*same).folder == reference.folder
    for other in (("-m", "model=dan,convcut", "seed=0,1,2"), ("-m", "model=dan,convcut", "seed=0,1", "split_seed=1")):
        assert planned(*other).folder != reference.folder
    assert list(reference.jobs or {}) == [f"model-{m}+seed-{s}" for m in ("dan", "convcut") for s in (0, 1)]
    assert planned("-m", "seed=0,1", "hydra.sweep.dir=here").folder == Path("here").absolute()


def test_a_jobs_folder_is_one_word_of_a_command_line() -> None:
    words = ["experiment=small/vit,small/swin", "model.mean=[0.5,0.5,0.5],[0,0,0]", "seed=0,1"]
    names = list(planned("-m", *words).jobs or {})
    assert names[0] == "experiment-small_vit+model.mean-0.5_0.5_0.5+seed-0"
    assert len(names) == 8
    parser = OverridesParser.create()
    assert [parser.parse_override(f"run=outputs/{name}/").value() for name in names] == [f"outputs/{n}/" for n in names]
    with pytest.raises(UserError, match=r"would share the folder model\.mean-0_0_0: values of a sweep must differ"):
        planned("-m", "model.mean=[0,0,0],'0,0,0'")


def test_sweep_groups_compose_with_any_axis() -> None:
    words = ["sweep=cv5", "model=convcut,cbam_resnet", "data=rafdb,ckplus", "seed=0,1"]
    config = compose_like_hydra("train", words)
    assert is_sweep(config, words)
    assert not is_sweep(compose_like_hydra("train", ["seed=1"]), ["seed=1"])
    found = planned(*words)
    assert found.folder.name.startswith("cv5-")
    assert len(found.jobs or {}) == 5 * 2 * 2 * 2
    assert len(planned("sweep=cv10").jobs or {}) == 10
    assert len(planned("sweep=cv10", "protocol.fold=3,4").jobs or {}) == 2
    assert list(planned("sweep=seeds5").jobs or {}) == [f"seed-{s}" for s in range(5)]
    assert composed("sweep=cv5").protocol._target_.endswith("KFold")
    demo = planned("sweep=demo").jobs or {}
    assert len(demo) == 2 * 5
    last = composed("sweep=demo", *list(demo.values())[-1])  # the sweep's values beat the recipe's
    assert (last.model_name, last.protocol.fold, last.trainer.max_epochs, last.data.train) == ("timm", 4, 7, 1400)


def test_every_paper_is_in_the_papers_sweep() -> None:
    ours = {"demo", "fer2013_cpu", "ferplus_cpu"}
    papers = {path.stem for path in (CONF / "experiment").glob("*.yaml")} - ours
    assert set(planned("sweep=papers").jobs or {}) == {f"experiment-{name}" for name in papers}


@pytest.mark.parametrize("devices", ["2", "-1", "auto", "[0,1]", "'0,1'"])
def test_several_devices_are_refused_in_a_sweep(devices: str) -> None:
    planned("-m", "seed=0,1", "trainer.devices=[3]")
    with pytest.raises(UserError, match="leave -m and sweep= out"):
        planned("-m", "seed=0,1", f"trainer.devices={devices}")


def test_a_search_maximises_the_validation_monitor() -> None:
    config = compose_like_hydra("train", ["-m", "hydra/sweeper=optuna"])
    assert config.hydra.sweeper.direction == "maximize"
    # The space names options that there are, whatever the optimiser.
    for path in (CONF / "optim").glob("*.yaml"):
        optim = composed(f"optim={path.stem}")
        for key in config.hydra.sweeper.params:
            assert OmegaConf.select(optim, key) is not None, (path.stem, key)


@pytest.mark.parametrize("agent", [False, True])
def test_a_search_on_the_test_part_is_refused_or_stamped(monkeypatch: pytest.MonkeyPatch, agent: bool) -> None:
    words = ["-m", "seed=0,1"] if agent else ["-m", "hydra/sweeper=optuna"]
    planned("-m", "seed=0,1", "protocol=paper")  # a grid chooses nothing
    if agent:
        monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    planned(*words)
    for chosen in ("protocol=paper", "protocol.select_on=test"):
        with pytest.raises(UserError, match=r"allow_search_on_test=true"):
            planned(*words, chosen)
    planned(*words, "protocol=paper", "allow_search_on_test=true")
    # In a job, where what is searched is chosen too: a trial of protocol=official,paper.
    with pytest.raises(UserError, match=r"protocol\.select_on=test in a search"):
        check_search(composed("protocol=paper"))
    if agent:
        with pytest.raises(UserError, match=r"protocol\.select_on=test in a search"):
            train_one(composed("protocol=paper"))
    allowed = composed("protocol=paper", "protocol.stamp=mine", "allow_search_on_test=true")
    check_search(allowed)
    assert allowed.protocol.stamp.startswith("mine; SEARCHED ON TEST")
    assert allowed.data.protocol.stamp == allowed.protocol.stamp  # what the split's stamps are made of
    honest = composed()
    check_search(honest)
    assert honest.protocol.stamp is None


def test_wandbs_agents_drive_the_same_command() -> None:
    """What an agent would start (``${args_no_hyphens}`` is ``key=value`` words) composes."""
    recipe = yaml.safe_load((CONF.parent / "docs" / "wandb_sweep.yaml").read_text())
    assert recipe["command"] == ["${env}", "python", "-m", "${program}", "${args_no_hyphens}"]
    assert recipe["program"] == "fer.train"
    assert recipe["metric"] == {"name": f"best/{ExpressionModule.monitor}", "goal": "maximize"}
    spaces = recipe["parameters"].items()
    values = {key: space.get("values", [space.get("value", space.get("min"))]) for key, space in spaces}
    for choice in itertools.product(*values.values()):
        assert composed(*(f"{key}={value}" for key, value in zip(values, choice, strict=True)))


@pytest.mark.parametrize(
    "attack",
    [
        "hydra.launcher.setup=[evil]",
        "hydra.launcher.partition='a\\nevil'",
        "+hydra.launcher.additional_parameters={mail-type: 'END\\nevil'}",
    ],
)
def test_launchers_start_jobs_and_nothing_else(attack: str) -> None:
    words = ["-m", "hydra/launcher=submitit_slurm"]
    assert unsafe_entries(compose_like_hydra("train", words)) == []
    assert unsafe_entries(compose_like_hydra("train", [*words, attack.replace("\\n", "\n")]))


def test_a_job_waits_for_the_process_that_is_at_work_on_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun = threading.Event()

    def work() -> None:
        with alone(tmp_path / "job"):
            begun.set()

    with alone(tmp_path / "job"):
        other = threading.Thread(target=work)
        other.start()
        assert not begun.wait(0.3)
    other.join(timeout=10)
    assert begun.is_set()
    assert "waiting for the process that is at work in" in caplog.text
    with alone(tmp_path / "job"):  # and it is free again
        pass


# -- the aggregate, on folders made up here ----------------------------------------------------------------------------


def forge(
    sweep: Path, jobs: dict[str, dict[str, Any] | None], outcomes: dict[str, dict[str, Any]] | None = None
) -> None:
    """A sweep's folder: results of each job by its folder's name, None for one that never came to an end."""
    plan_of = {name: [word.replace("-", "=", 1) for word in name.split("+")] for name in jobs}
    sweep.mkdir()
    (sweep / "sweep.json").write_text(json.dumps({"command": "c", "jobs": plan_of}))
    for name, results in jobs.items():
        (sweep / name).mkdir()
        if results is not None:
            (sweep / name / "results.json").write_text(json.dumps(results))
            (sweep / name / "outcome.json").write_text(json.dumps({"outcome": "run", "error": None}))
    for name, outcome in (outcomes or {}).items():
        (sweep / name / "outcome.json").write_text(json.dumps(outcome))


def forged(acc: float, **more: Any) -> dict[str, Any]:
    metrics = {"test": {"acc": acc, "mean_acc": acc, "macro_f1": acc, "acc_b": None}, "val": {"mean_acc": acc}}
    standard = {"model": "m", "data": "d", "protocol": {"folds": 3}, "protocol_name": "kfold", "fold": 0, "seed": 0}
    more = {"classes": ["a", "b"], "weights": "random", "split_fingerprint": f"f{more.get('fold', 0)}", **more}
    rest = {"selected_on": "val", "stamps": [], "code_version": "v", "confusion": {"test": [[2, 1], [0, 0]]}}
    return {**standard, **rest, "metrics": metrics, **more}


def test_failed_and_missing_folds_are_named(tmp_path: Path) -> None:
    jobs = {
        "protocol.fold-0": forged(0.5, stamps=["LEAKY"]),
        "protocol.fold-1": forged(0.9, fold=1),
        "protocol.fold-2": None,
    }
    # The second holds whole results of another code version, which it refused to replace.
    forge(tmp_path / "s", jobs, {"protocol.fold-1": {"outcome": "failed", "error": "another code version"}})
    record = aggregate(tmp_path / "s")
    (group,) = record["groups"]
    assert (group["n"], group["folds"], group["mean"]["test/acc"]) == (1, [0], 0.5)
    assert np.isnan(group["std"]["test/acc"])
    states = {entry["job"]: entry["state"] for entry in group["failed"]}
    assert states == {"protocol.fold-1": "failed", "protocol.fold-2": "missing"}
    page = markdown(record, "c")
    named = ("m on d, kfold [LEAKY] |", "protocol.fold-1: failed, another code version", "protocol.fold-2: missing")
    for words in (*named, "1 of 3"):
        assert words in page


def test_groups_differ_in_everything_but_fold_and_seed(tmp_path: Path) -> None:
    axes = [(loss, fold, seed) for loss in ("focal", "center") for fold in (0, 1, 2) for seed in (0, 1)]
    values = np.random.default_rng(0).random(len(axes))
    jobs = {
        f"loss-{loss}+protocol.fold-{fold}+seed-{seed}": forged(value, fold=fold, seed=seed)
        for (loss, fold, seed), value in zip(axes, values, strict=True)
    }
    forge(tmp_path / "s", jobs)
    groups = aggregate(tmp_path / "s")["groups"]
    assert [g["setting"] for g in groups] == [{"loss": "focal"}, {"loss": "center"}]
    for group, x in zip(groups, values.reshape(2, 6), strict=True):
        assert (group["n"], group["folds"], group["seeds"], group["over"]) == (6, [0, 1, 2], [0, 1], "folds")
        folds = x.reshape(3, 2).mean(1)  # the seeds of a fold are no further folds
        low, high = stats.t.interval(0.95, 2, loc=x.mean(), scale=stats.sem(folds))
        assert group["std"]["test/acc"] == pytest.approx(folds.std(ddof=1), abs=1e-12)
        assert group["values"]["test/acc"] == x.tolist()
        assert group["interval"]["test/acc"] == pytest.approx([low, high], abs=1e-12)
        assert group["confusion"] == [[12, 6], [0, 0]]
        assert np.isnan(group["mean"]["test/acc_b"])  # no fold had an image of it


@pytest.mark.parametrize(
    "odd", [{"classes": ["b", "a"]}, {"split_fingerprint": "other"}, {"weights": "run x (random) best.ckpt sha256:d"}]
)
def test_what_does_not_belong_together_is_not_averaged(tmp_path: Path, odd: dict[str, Any]) -> None:
    forge(tmp_path / "s", {"seed-0": forged(0.5), "seed-1": forged(0.7, seed=1, **odd)})
    record = aggregate(tmp_path / "s")
    (group,) = record["groups"]
    assert group["mean"] == {}
    assert "seed-1" in group["refused"]
    assert len(failures(record)) == 1
