"""Opening a run again: the same predictions, and one sentence for what cannot be opened."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from fer.errors import UserError
from fer.trained import open_run


def test_same_predictions_from_the_stored_crops(whole):
    run = open_run(whole)
    data = run.data()
    data.open()
    rows = data.split.test
    crops = torch.from_numpy(np.array(data.store.images[rows]))
    image = run.finish("none")({"image": crops, "index": torch.from_numpy(rows)}, epoch=0)["image"]
    with torch.inference_mode():
        probabilities = run.module.probabilities(image)
    table = pd.read_csv(whole / "predictions.csv")
    assert table["index"].tolist() == rows.tolist()
    # The run computed in bf16 where the CPU does.
    np.testing.assert_allclose(probabilities, table[data.class_names].to_numpy(), atol=0.02)
    assert not run.module.training
    assert run.module.weights == run.results["weights"]


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("wandb"))


def test_no_run_folder(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml is missing, expected a run folder"):
        open_run(tmp_path)


def test_unfinished(copied):
    (copied / "results.json").unlink()
    with pytest.raises(UserError, match=r"was not finished .*resume="):
        open_run(copied)


def test_half_a_checkpoint(copied):
    best = copied / "checkpoints" / "best.ckpt"
    best.write_bytes(best.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"best\.ckpt cannot be loaded as a checkpoint"):
        open_run(copied)


def changed(folder, **model):
    config = OmegaConf.load(folder / "config.yaml")
    config.model = OmegaConf.merge(config.model, model)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))


def test_other_classes(copied):
    changed(copied, class_names=["a", "b"])
    with pytest.raises(UserError, match=r"of other classes .*\['a', 'b'\]"):
        open_run(copied)


def test_other_network(copied):
    changed(copied, width=16)
    with pytest.raises(UserError, match="does not fit the model of its run's config"):
        open_run(copied)


def test_option_of_other_code(copied):
    changed(copied, whiskers=3)
    with pytest.raises(UserError, match=r"is of other code than this: model\.whiskers: CBAMResNet takes no such"):
        open_run(copied)


def test_hostile_config(copied):
    changed(copied, _target_="os.system")
    with pytest.raises(UserError, match=r"os\.system"):
        open_run(copied)
