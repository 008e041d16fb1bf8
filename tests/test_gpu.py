"""What a GPU will be asked, without one: no step waits for it, and the call that measures all of it runs through."""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fer.benching import gpu
from fer.benching.device import training_flops
from fer.benching.noise import Noise, on_noise
from fer.benching.windows import Bench
from fer.config import CONF, argument_problems
from fer.data.batched import _GOLDEN, _mix, _mix_number
from fer.data.loaders import EpochSampler, ResidentLoader
from fer.data.transforms import Finish


class Copies(TorchDispatchMode):
    """Counts operators, and copies between host and device, by direction."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if str(func).startswith(("aten._to_copy", "aten.copy_")):
            source = args[1] if str(func).startswith("aten.copy_") else args[0]
            if source.device != out.device:
                self.copies[f"{source.device.type} to {out.device.type}"] += 1
        return out


def config_of(model: str, *words: str) -> Any:
    config = composed(f"experiment=small/{model}", "trainer=cpu", *words)
    config.data.class_names = ["a", "b", "c", "d", "e", "f", "g"]
    return config


FIELDS = {
    "box": (4,),
    "organ_boxes": (4, 4),
    "landmarks": (5, 2),
    "soft": (7,),
    "cumulative": (7,),
    "valence_arousal": (2,),
}


@pytest.mark.parametrize("fields", [(), tuple(FIELDS)], ids=["plain", "places"])
def test_a_resident_batch_costs_no_copy(fields: tuple[str, ...]) -> None:
    """From the store on the device to the network's input on a device that is not there: fake tensors tell."""
    config = composed("augment=strong", "model=convcut")
    augment = instantiate(config.augment)
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(64, 32, 32, 3, dtype=torch.uint8, device="cuda")
        more = {key: torch.empty(64, *FIELDS[key], device="cuda") for key in fields}
        more["label"] = torch.empty(64, dtype=torch.long, device="cuda")
        mean, std = list(config.model.mean), list(config.model.std)
        finish = Finish(size=28, mean=mean, std=std, augment=augment, seed=3, train=True, augmented=False, tta="none")
        sampler = EpochSampler(lambda epoch: np.arange(64), 8, drop_last=True)
        batches = iter(ResidentLoader(sampler, images, more, finish, remember_position=True))
        next(batches)  # the order, and the constants, go to the device once
        with Copies() as counted:
            for _ in range(6):
                batch = next(batches)
        assert batch["image"].shape == (8, 3, 28, 28)
        assert batch["image"].device.type == "cuda"
    assert counted.copies == {}


@pytest.mark.parametrize("model", ["cbam_resnet", "convcut", "resattn_vit", "two_stream"])
def test_a_training_step_waits_for_nothing(model: str) -> None:
    """A step on fake tensors, where a read raises; no copies on a device that is not there.

    The backward pass has to be on a fake CPU: autograd asks a real device for its context.
    """
    module = instantiate(config_of(model).model)
    module.loss_function.setup(torch.full((7,), 10))
    side = module.image_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        for device in ("cuda", "cpu"):
            module.apply(lambda part, device=device: _fake(part, device))
            image = torch.empty(4, 3, side, side, device=device)
            batch = {"image": image, "label": torch.empty(4, dtype=torch.long, device=device)}
            with Copies() as counted:
                loss = module.training_step(batch, 0)
                if device == "cpu":
                    loss.backward()
                    module.optim.clip(module.parameters(), module.optim.norm(module.parameters()))
            assert loss.device.type == device
            assert counted.copies == {}
            with pytest.raises(DataDependentOutputException):
                loss.item()


def _fake(part: torch.nn.Module, device: str) -> None:
    for name, value in list(part._parameters.items()):
        if value is not None:
            fake = torch.empty_like(value, device=device)
            part._parameters[name] = torch.nn.Parameter(fake, requires_grad=value.requires_grad)
    for name, value in list(part._buffers.items()):
        if value is not None:
            part._buffers[name] = torch.empty_like(value, device=device)


def test_random_numbers_of_an_epoch_are_keyed_on_the_host() -> None:
    for seed, epoch in [(0, 0), (3, 17), (2**31 - 1, 999)]:
        on_device = _mix(torch.tensor(seed * 1_000_003 + epoch) * _GOLDEN)
        assert _mix_number((seed * 1_000_003 + epoch) * _GOLDEN) == on_device.item()


def test_frozen_parts_count_once() -> None:
    def flops(lr: float) -> int:
        return training_flops(instantiate(config_of("two_stream", f"model.backbone_lr={lr}").model))

    learning, frozen = flops(0.1), flops(0)
    assert learning % 3 == 0
    assert learning / 3 < frozen < learning
    module = instantiate(config_of("two_stream", "model.backbone_lr=0").model)
    trained = {id(p) for group in module.parameter_groups() for p in group["params"] if p.requires_grad}
    backbone = module.network.pyramid.backbone
    assert trained == {id(p) for p in module.parameters()} - {id(p) for p in backbone.parameters()}


# -- the call ---------------------------------------------------------------------------------------------------------


def options(**changed: Any) -> dict[str, Any]:
    merged = OmegaConf.merge(*(OmegaConf.load(CONF / "gpu" / f"{size}.yaml") for size in ("full", "tiny")))
    return {**OmegaConf.to_container(merged), **changed}


def test_the_words_of_the_call_are_good() -> None:
    """Every config the call composes in full size, its goals those of the issue."""
    o = OmegaConf.to_container(OmegaConf.load(CONF / "gpu" / "full.yaml"))
    assert {name: model.get("at_least", model.get("at_most_seconds")) for name, model in o["models"].items()} == {
        "cbam_resnet": 1.3,
        "convcut": 3800,
        "resattn_vit": 2450,
        "two_stream": 16000,
    }
    assert (o["seconds"], o["steps"], o["windows"]) == (530, 100, 5)
    for model in (*o["models"].values(), o["job"]):
        config = on_noise(composed(*model["words"]), model["images"], model["side"], model["channels"])
        plain = OmegaConf.to_container(config, resolve=True)
        assert [p for key in ("data", "model", "mix", "trainer") for p in argument_problems({key: plain[key]})] == []
        assert isinstance(instantiate(config.data), Noise)


def check(rows: dict[str, Any]) -> None:
    assert rows["sections that failed or ran out of time"]["value"] == 0, rows
    assert rows["matmul ceiling"]["value"] > 0
    assert rows["cbam_resnet, batch 8, benchmark"]["value"] > 0
    best = max(rows[f"cbam_resnet, batch {batch}, eager"]["value"] for batch in (4, 8))
    assert 0 < rows["cbam_resnet, an epoch of 40 images"]["value"] < 1.5 * 40 / best
    assert 0 < rows["cbam_resnet, making batches, of a step's time"]["value"] < 100
    assert rows["steps in which a wait for the device would have raised"]["value"] == 2


@pytest.mark.slow
def test_the_call_runs_through(tmp_path: Path) -> None:
    """Every section on a CPU in small; in a process of its own, since one that has trained must not be forked."""
    command = [sys.executable, "-m", "fer.bench", "parts=[gpu]", "gpu=tiny", f"out={tmp_path}"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=600)
    rows = {row["name"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]}
    check(rows)
    assert {"convcut, fastest", "resattn_vit, fastest", "two_stream, fastest"} <= rows.keys()
    assert rows["2 folds one by one over all at once, wall clock"]["details"]["serial"] > 0
    assert rows["tensors of weights that differ in a second run"]["value"] == 0
    assert rows["tensors of weights that differ after SIGKILL and resume"]["value"] == 0


def test_a_section_that_fails_or_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(keep: Any, o: Any) -> None:
        keep({"name": "matmul", "values": [1.0, 2.0]})
        time.sleep(60)

    def fails(keep: Any, *_: Any) -> None:
        raise ValueError("no such kernel")

    monkeypatch.setattr(gpu, "_ceilings", hangs)
    for name in ("_model", "_waits", "_jobs", "_repeats"):
        monkeypatch.setattr(gpu, name, fails)
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    limits = {"ceilings": 1, "model": 9, "waits": 9, "jobs": 9, "repeats": 9}
    begun = time.monotonic()
    rows = gpu.measure(Bench(1, 1, tmp_path, options(measured=["cbam_resnet"], limits=limits)))
    assert time.monotonic() - begun < 20
    assert rows[0]["value"] == 1.5  # what was kept before the end counts
    last = rows[-1]
    assert last["value"] == 5
    assert "ceilings: ended after 1 s" in last["note"]
    assert "model cbam_resnet: ValueError: no such kernel" in last["note"]
    assert not last["holds"]
