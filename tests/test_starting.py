"""``start_from``: a run begins with the weights of a finished one, and says what those have seen."""

import json

import pytest
import torch
from conftest import TINY, composed, leave_out_pictures
from hydra.utils import instantiate

from fer.errors import UserError
from fer.experiment import run_experiment
from fer.runs import read_json
from fer.starting import begin_with, pinned
from fer.weights import sha256_of


def begun(whole, cache, monkeypatch, *overrides, start=None):
    """A new module with the run's weights, and as it was before."""
    monkeypatch.setenv("FER_CACHE", str(cache))
    config = composed(*TINY, *overrides)
    data = instantiate(config.data)
    data.open()
    config.data.class_names = data.class_names
    torch.manual_seed(3)
    module = instantiate(config.model)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    begin_with(module, start or pinned(str(whole)), data)
    return module, before


def best_of(whole):
    return torch.load(whole / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]


def test_every_weight_is_the_run_s(whole, cache, monkeypatch):
    module, before = begun(whole, cache, monkeypatch)
    best = {name: value for name, value in best_of(whole).items() if not name.startswith("tallies.")}
    assert [name for name, value in best.items() if not torch.equal(module.state_dict()[name], value)] == []
    assert [name for name, value in best.items() if not torch.equal(before[name], value)]
    assert sha256_of(whole / "checkpoints" / "best.ckpt") in module.weights
    assert module.stamps == []  # the same split: no test image was learned from


def test_another_number_of_classes_begins_with_a_new_classifier(whole, cache, monkeypatch):
    module, before = begun(whole, cache, monkeypatch, "data.classes=8")
    best, now = best_of(whole), module.state_dict()
    kept = {name for name in before if name.startswith("network.") and not torch.equal(now[name], before[name])}
    assert {name for name in kept if not torch.equal(now[name], best[name])} == set()
    assert "network.classifier.weight" not in kept
    assert kept


def test_test_images_that_were_learned_from_are_told(whole, cache, monkeypatch):
    module, _ = begun(whole, cache, monkeypatch, "protocol=kfold", "protocol.folds=2", "protocol.fold=0")
    assert len(module.stamps) == 2
    for stamp, what in zip(module.stamps, ("images", "people"), strict=True):
        assert f"of the test {what}" in stamp


def test_other_weights_are_refused(whole, cache, monkeypatch):
    with pytest.raises(UserError, match=r"has other weights than this run's model \(network\..*config\.yaml"):
        begun(whole, cache, monkeypatch, "model.width=4")


def test_the_same_classes_in_another_order_tell_which(whole, cache, monkeypatch):
    names = read_json(whole / "results.json")["classes"]
    with pytest.raises(UserError, match=r"in another order: give this one data\.class_names=\[") as caught:
        begun(whole, cache, monkeypatch, f"data.class_names=[{','.join(reversed(names))}]")
    mend = str(caught.value).split()[-1]
    module, _ = begun(whole, cache, monkeypatch, mend)
    assert module.class_names == names


def test_no_run_and_another_run_are_refused(whole, tmp_path):
    with pytest.raises(UserError, match=r"best\.ckpt is missing, expected the folder of a finished run"):
        pinned(str(tmp_path))
    with pytest.raises(UserError, match="it is another run's, or was trained anew"):
        pinned(f"{whole}@sha256:{'0' * 64}")


def test_a_run_that_begins_with_another_s_weights(whole, cache, monkeypatch, tmp_path):
    """No step at all leaves them as they were, so the figures are the earlier run's."""
    monkeypatch.setenv("FER_CACHE", str(cache))
    leave_out_pictures(monkeypatch)
    words = [*TINY, "logger=csv", f"start_from={whole}", "optim.optimizer.lr=0.0", "optim.optimizer.weight_decay=0.0"]
    run_experiment(composed(*words, "trainer.max_epochs=1"), tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["weights"].startswith("run synthetic-")
    after = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    parameters = [name for name in best_of(whole) if name.endswith(("conv1.weight", "classifier.weight"))]
    assert parameters
    assert all(torch.equal(after[name], best_of(whole)[name]) for name in parameters)
