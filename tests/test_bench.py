"""The bench: windows in turn, what is made of them, the page, and the command in small. Nothing here is timed."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, composed
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, RichProgressBar
from scipy.stats import binom

from fer import progress
from fer.bench import run as run_bench
from fer.benching import overhead, startup
from fer.benching import windows as clocks
from fer.benching.report import copy_of
from fer.benching.training import by_hand, prepared, twin
from fer.benching.windows import Times, alone, compare, interleave, timed
from fer.callbacks import Randomness, Recorder
from fer.config import CONF, compose_like_hydra
from fer.errors import UserError
from fer.experiment import examiners, watchers
from fer.progress import Bar
from fer.reporting import speed
from fer.reporting.collect import read_runs
from fer.runs import RunFolder, read_json
from fer.stopping import Stop


def test_every_round_has_every_variant_and_begins_with_another() -> None:
    order: list[str] = []

    def variant(name: str) -> Times:
        order.append(name)
        return Times(cpu=float(len(order)))

    taken = interleave({name: lambda name=name: variant(name) for name in "abc"}, 5)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(one) == list("abc") for one in rounds)
    assert len(rounds) == 6  # the first warms up
    assert {one[0] for one in rounds} == set("abc")
    assert [len(times) for times in taken.values()] == [5, 5, 5]
    assert min(times.cpu for times in taken["a"]) > 3  # nothing of the warm-up is kept
    assert len(interleave({"a": lambda: Times()}, 2, warm_up=False)["a"]) == 2


def test_timed_counts_processors_children_and_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, wall = iter([10.0, 12.5]), iter([100.0, 107.0])
    monkeypatch.setattr(clocks, "cpu_now", lambda: next(cpu))
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(wall))
    with timed(4) as times:
        pass
    assert (times.cpu, times.wall, times.steps) == (2.5, 7.0, 4)
    monkeypatch.undo()
    before = clocks.cpu_now()
    subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True)
    assert clocks.cpu_now() > before  # a finished child's time is in it


def test_a_comparison_is_made_within_each_round() -> None:
    # The machine is ten times slower in every other round: the medians of the times say nothing, the ratios all.
    load = [1.0, 10.0] * 11
    taken = {
        "ours": [Times(cpu=2.04 * slow, wall=9.0, steps=2) for slow in load],
        "theirs": [Times(cpu=1.0 * slow, wall=3.0) for slow in load],
    }
    row = compare("step", taken, "ours", "theirs", at_most=1.03, unit="ms")
    assert [row["median"], row["lo"], row["hi"]] == pytest.approx([1.02] * 3)
    assert (row["n"], row["holds"], row["goal"]) == (22, True, "at most 1.03")
    assert row["value"] == pytest.approx(1020 * statistics.median(load))
    assert row["baseline_value"] == pytest.approx(1000 * statistics.median(load))
    assert compare("step", taken, "ours", "theirs", at_most=1.01)["holds"] is False
    assert compare("step", taken, "ours", "theirs", clock="wall")["median"] == pytest.approx(1.5)
    rates = compare("step", taken, "ours", "theirs", unit="1/s", at_least=0.98)
    assert (rates["median"], rates["holds"]) == (pytest.approx(1 / 1.02), True)
    more = compare("step", taken, "ours", "theirs", figure="difference", unit="ms", at_most=100)
    assert more["median"] == pytest.approx(np.median([20 * slow for slow in load]))
    assert (more["goal"], more["holds"]) == ("at most 100 ms", False)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=40, unique=True))
def test_the_interval_is_the_order_statistics_of_the_binomial_test(values: list[float]) -> None:
    row = alone("x", values, "s")
    # The widest k with P(fewer than k of n below the median) at most 2.5 %.
    n = len(values)
    rank = max(k for k in range(1, n + 1) if binom.cdf(k - 1, n, 0.5) <= 0.025)
    ordered = sorted(values)
    assert (row["lo"], row["hi"]) == (ordered[rank - 1], ordered[n - rank])


def test_too_few_rounds_have_no_interval() -> None:
    row = alone("x", [1.0, 2.0, 3.0], "s", at_least=2)
    assert (row["lo"], row["hi"], row["median"], row["holds"]) == (None, None, 2.0, True)
    assert json.loads(json.dumps(row)) == row


@pytest.fixture
def record() -> dict[str, Any]:
    rows = [
        compare("`a`", {"x": [Times(1.234)] * 20, "y": [Times(1.0)] * 20}, "x", "y", at_most=1.03, note="small"),
        alone("`b`", [3.0] * 20, "s", at_most=15),
    ]
    return {
        "command": "python -m fer.bench",
        "git_commit": "0123abc",
        "taken": "2026-01-02",
        "machine": {"cpu": "Some CPU", "cores": 2, "system": "Linux"},
        "versions": {"torch": "9.9", "lightning": "8.8"},
        "threads": 1,
        "rows": rows,
    }


def test_a_section_says_what_the_figures_say(record: dict[str, Any]) -> None:
    section = speed.section_of(record).replace("\N{NO-BREAK SPACE}", " ")
    assert section.startswith(
        "`python -m fer.bench`, commit 0123abc, 2026-01-02: Some CPU, 2 cores, 1 thread, torch 9.9"
    )
    line = next(line for line in section.splitlines() if line.startswith("| `a`; small"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["`a`; small", "1,234 ms", "y", "1,000 ms", "1.234", "1.234 to 1.234", "1.234 to 1.234", "20",
                     "at most 1.03", "**missed**"]  # fmt: skip
    assert "| `b` | 3 s |  |  | 3 s | 3 to 3 | 3 to 3 | 20 | at most 15 s | holds |" in section


def test_every_measured_part_is_on_the_page() -> None:
    page = (speed.RECORDS.parent.parent / "speed.md").read_text()
    measured = {path.stem for path in speed.RECORDS.glob("*.json")}
    shown = set(re.findall(r"<!-- speed (\S+) -->", page))
    assert measured <= shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["parts=[nothing]"], "parts=['nothing']: expected a list of "),
        (["windows=0"], "windows=0: expected a whole number from 1 on"),
        (["threads=two"], "threads=two"),
        (["out=''"], "expected a folder"),
    ],
)
def test_mistakes_are_named(words: list[str], says: str) -> None:
    config = compose_like_hydra("bench", words)
    config._set_flag("struct", False)
    del config["hydra"]
    with pytest.raises(UserError) as error:
        run_bench(config)
    assert says in str(error.value)


def test_copies_of_a_run_are_runs_of_other_seeds(whole: Path, tmp_path: Path) -> None:
    for seed in (3, 4):
        copy_of(whole, tmp_path / f"seed{seed}", seed)
    found = read_runs([tmp_path])
    assert sorted(run.results["seed"] for run in found) == sorted(run.config["seed"] for run in found) == [3, 4]
    assert {run.config["split_seed"] for run in found} == {0}
    assert {run.status for run in found} == {"done"}
    assert len({run.config["model_name"] for run in found}) == 1


@pytest.mark.filterwarnings("ignore:.*Skipping val loop.*")
def test_overhead_in_small(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, by hand and barebones take the same steps on the same batches, a window at a time."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    words = ("model.dropout=0", "trainer.max_epochs=1", "logger=csv", "trainer.enable_progress_bar=true")
    config = composed(*TINY, *words, f"data.cache={cache}")
    module, data = prepared(config, batches=2)
    beside = twin(module)
    with overhead.ours(config, module, data, tmp_path / "run") as fit:
        window = fit.aside(lambda: by_hand(beside, data, bf16="bf16" in str(module.trainer.precision)))
        times = interleave({"ours": lambda: fit.window(2), "by hand": lambda: fit.aside(lambda: window(2))}, 1)
        assert [one.steps for one in times["ours"] + times["by hand"]] == [2, 2]
        assert module.trainer.global_step == 5  # one to begin with, two to warm up, two in the window
    torch.set_num_threads(threads)
    ours = dict(module.named_parameters())
    for name, parameter in beside.named_parameters():
        # The norm of the gradient is summed in another order.
        torch.testing.assert_close(parameter, ours[name], rtol=1e-4, atol=1e-5)


def test_the_command_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part's rows end in its file, whatever the part."""
    seen = []
    monkeypatch.setattr(startup, "measure", lambda bench: seen.append(bench) or [alone("x", [1.0], "s", at_most=2)])
    config = compose_like_hydra("bench", ["parts=[startup]", "windows=1", f"out={tmp_path}"])
    config._set_flag("struct", False)
    del config["hydra"]
    run_bench(config)
    record = read_json(tmp_path / "startup.json")
    assert [row["holds"] for row in record["rows"]] == [True]
    assert (record["windows"], record["threads"], record["part"]) == (1, 1, "startup")
    assert record["machine"]["cpu"]
    assert seen[0].options["at_most_s"] == 15
    assert not seen[0].folder.exists()


def test_every_part_has_a_module_and_options() -> None:
    config = compose_like_hydra("bench", [])
    for part in config.parts:
        assert part in config
        assert (CONF.parent / "fer" / "benching" / f"{part}.py").is_file()


def test_a_step_draws_what_torchs_own_seed_gives_and_leaves_nothing_behind() -> None:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(global_step=5, global_rank=0, accumulate_grad_batches=2, strategy=strategy)
    torch.manual_seed(3 * 1_000_000_007 + 5)
    expected = torch.rand(4)
    noted = len(torch.cuda._queued_calls)
    Randomness(3).on_train_batch_start(trainer, None, None, 0)
    torch.testing.assert_close(torch.rand(4), expected, rtol=0, atol=0)
    Randomness(3).on_train_batch_start(trainer, None, None, 1)  # of the same step
    assert not torch.equal(torch.rand(4), expected)
    assert len(torch.cuda._queued_calls) == noted  # torch.manual_seed adds one per call where there is no GPU


def test_the_bar_moves_once_a_second_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    monkeypatch.setattr(RichProgressBar, "on_train_batch_end", lambda self, *arguments: moved.append(arguments[-1]))
    monkeypatch.setattr(Bar, "total_train_batches", 10)
    clock = iter([100.0, 100.2, 100.9, 101.1, 101.2, 101.3, 101.4, 101.5, 101.6, 101.7])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    bar = Bar()
    for batch in range(10):
        bar.on_train_batch_end(None, None, None, None, batch)
    assert moved == [0, 3, 9]


def test_the_callbacks_of_the_test_alone_cost_no_training_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning calls every hook of every callback in each step."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    config = composed(*TINY, "trainer.enable_progress_bar=true")
    folder = RunFolder(tmp_path)
    module: Any = object()  # no detector
    training = watchers(config, folder, module, Stop())
    assert [type(callback).__name__ for callback in training] == ["Randomness", "Recorder", "Bar"]
    recorder = next(callback for callback in training if isinstance(callback, Recorder))
    examining = examiners(folder, module, recorder)
    hooks = [name for name in dir(Callback) if "train" in name or "backward" in name or "optimizer" in name]
    assert not [name for c in examining for name in hooks if getattr(type(c), name) is not getattr(Callback, name)]
