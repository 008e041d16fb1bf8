"""A short watch of what `make soak` watches for longer: no epoch leaves a descriptor, thread or process behind."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, composed, leave_out_pictures
from soak import MEMORY, STEPS_PER_EPOCH, WARM_UP, Sample, growth, problems, sample

from fer.callbacks import Curves
from fer.experiment import run_experiment

EPOCHS, STEPS = 10, 10
FLAT = Sample(800.0, 60, 30, 5)


@pytest.mark.parametrize("leak", [False, True])
def test_no_epoch_leaves_anything_behind(leak: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = EPOCHS // 2 if leak else EPOCHS
    seen: list[Sample] = []
    end, stop, opened = Curves.on_train_epoch_end, threading.Event(), []

    def watched(self: Curves, *arguments: Any) -> None:
        end(self, *arguments)
        if leak:
            opened.append(os.open(os.devnull, os.O_RDONLY))
            threading.Thread(target=stop.wait, daemon=True).start()
        seen.append(sample(os.getpid()))

    leave_out_pictures(monkeypatch)
    monkeypatch.setattr(Curves, "on_train_epoch_end", watched)
    words = [*TINY, "logger=csv", f"data.train={4 * STEPS}", "data.batch_size=4", "data.resident=no"]
    words += ["data.num_workers=1", "trainer.checkpoint_steps=4", f"trainer.max_epochs={epochs}", "model.image_size=32"]
    try:
        run_experiment(composed(*words), tmp_path / "run")
    finally:
        stop.set()
        for descriptor in opened:
            os.close(descriptor)
    assert len(seen) == epochs
    assert seen[-1].processes > 1  # workers were watched too
    found = " ".join(problems(growth(seen)))
    assert ("descriptors" in found) == ("threads" in found) == leak
    assert "processes" not in found


@pytest.mark.parametrize(
    ("leak", "said"),
    [
        (Sample(0, 0, 0, 0), ""),
        (Sample(0.15, 0, 0, 0), "memory"),  # per epoch of 100 steps: 15 MiB in 10,000 steps
        (Sample(0, 1, 0, 0), "descriptors"),
        (Sample(0, 0, 1, 0), "threads"),
        (Sample(0, 0, 0, 1), "processes"),
    ],
)
def test_a_leak_in_every_epoch_is_found(leak: Sample, said: str) -> None:
    """In the figures of a long run, noise of 1 MiB and the filling of pools before the warm-up notwithstanding."""
    epochs = 10_000 // STEPS_PER_EPOCH
    samples = []
    for i in range(epochs):
        noise = Sample((-1) ** i + 50 * min(i / (WARM_UP * epochs), 1), 0, 0, 0)
        samples.append(Sample(*(a + b * i + c for a, b, c in zip(FLAT, leak, noise, strict=True))))
    found = problems(growth(samples))
    assert len(found) == bool(said)
    assert not found or said in found[0]
    assert 0.15 * epochs > MEMORY
