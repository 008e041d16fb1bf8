"""Every recipe of conf/experiment: headed by its claim and command, composed, and run for two steps on fake data."""

import math
from pathlib import Path

import pytest
import torch
from conftest import composed
from fakes import WRITERS
from hydra.utils import instantiate
from model_builds import CHEAP
from omegaconf import DictConfig, OmegaConf

from fer.at_test import stamps_of
from fer.config import CONF
from fer.experiment import preflight
from fer.models.averaging import WeightAverage
from fer.models.base import ExpressionModule

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
OWN = {"demo", "fer2013_cpu", "ferplus_cpu"}
# What the papers claim, as the head of each recipe must say it (architectures.md 2.5, 3.4, 4.4, 5.5, 6.4, 7).
CLAIMS = {
    "cbam_resnet_ckplus": "95.1 %",
    "cbam_resnet_fer2013": "74.9 %",
    "convcut_ferplus": "95.69 %, which is void",
    "convcut_ferplus_paper": "95.69 %, void",
    "convcut_rafdb": "97.33 %, which is void",
    "convcut_rafdb_paper": "97.33 %, void",
    "dan_rafdb": "89.70 %",
    "multiscale_region_rafdb": "88.23 %",
    "multiscale_region_rafdb_paper": "88.23 %",
    "posterpp_affectnet": "63.77 %",
    "posterpp_affectnet7": "67.49 %",
    "posterpp_rafdb": "92.21 %",
    "resattn_vit_affectnet": "62.2 %",
    "resattn_vit_affectnet_paper": "62.2 %",
    "resattn_vit_rafdb": "85.4 %",
    "resattn_vit_rafdb_paper": "85.4 %",
    "swin_affectnet": "34.16 %",
    "two_stream_affectnet": "57.39 %",
    "two_stream_affectnet_no_landmark": "55.01 %",
    "two_stream_affectnet_paper": "57.39 %",
    "vit_affectnet": "38.65 %",
    "vit_affectnet7": "58.9 %",
    "vit_affectnet_scratch": "no figure",
    "vit_rafdb": "80.2 %",
}
STAMPED = {  # a word of the stamp a result must carry
    "convcut_ferplus_paper": "LEAKY",
    "convcut_rafdb_paper": "LEAKY",
    "multiscale_region_rafdb_paper": "5:1",
    "resattn_vit_affectnet_paper": "80/20",
    "resattn_vit_rafdb_paper": "80/20",
    "two_stream_affectnet_paper": "test",
}
SELECTED_ON_TEST = {"convcut_ferplus_paper", "convcut_rafdb_paper", "two_stream_affectnet_paper"}


def test_no_recipe_is_without_its_claim() -> None:
    assert set(EXPERIMENTS) == set(CLAIMS) | OWN
    assert set(STAMPED) == {name for name in EXPERIMENTS if name.endswith("_paper")}


@pytest.mark.parametrize("name", CLAIMS)
def test_the_head_says_what_is_claimed_and_how_to_run_it(name: str) -> None:
    head = (CONF / "experiment" / f"{name}.yaml").read_text().split("\ndefaults:")[0]
    text = " ".join(line.removeprefix("#").strip() for line in head.splitlines())
    assert CLAIMS[name] in text
    assert f"experiment={name} " in text


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small copies of the data sets the recipes read, written once."""
    root = tmp_path_factory.mktemp("fakes")
    for name in ("fer2013", "ckplus", "rafdb", "affectnet"):
        WRITERS[name](root / name)
    WRITERS["ferplus"](root / "ferplus")
    return root


def small(name: str, fakes: Path) -> DictConfig:
    """A recipe whose data, images and network are small; everything else is the recipe's own."""
    config = composed(f"experiment={name}")
    words = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.max_epochs=1"]
    words += ["data.batch_size=2", "data.eval_batch_size=4", "data.store_size=64", "protocol.val_fraction=0.25"]
    words += [f"model.{word}" for word in CHEAP[config.model_name]]
    words += ["model.pretrained=false"] if "pretrained" in config.model else []
    if config.data_name == "synthetic":
        words += ["data.train=60", "data.val=21", "data.test=21", "data.subjects=30"]
    else:
        words += [f"data.root={fakes / config.data_name.removesuffix('7')}"]
    if "arguments" in config.model:
        OmegaConf.set_struct(config.model.arguments, False)
    config.merge_with_dotlist(words)
    return config


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_two_steps(name: str, fakes: Path, tmp_path: Path) -> None:
    config = small(name, fakes)
    data = preflight(config)
    data.open()
    config.data.class_names = data.class_names
    module = instantiate(config.model)
    assert isinstance(module, ExpressionModule)
    decay = config.trainer.weight_ema
    callbacks = [instantiate(config.mix), *([WeightAverage(decay)] if decay is not None else [])]
    limits = {"limit_train_batches": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = instantiate(
        config.trainer,
        **limits,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    before = [p.detach().clone() for p in module.parameters()]
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    assert math.isfinite(trainer.callback_metrics["train/loss"])
    assert 0 <= trainer.callback_metrics[module.monitor] <= 1
    assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert data.split.selected_on == ("test" if name in SELECTED_ON_TEST else "val")
    stamps = stamps_of(data, module)
    assert any(STAMPED[name] in stamp for stamp in stamps) if name in STAMPED else not stamps
