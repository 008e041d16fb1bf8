"""What every architecture must keep, found by globbing ``conf/model``; and how pre-trained weights come or do not.

A new architecture is tested as soon as its YAML exists; name a cheap variant of it in `model_builds.CHEAP` to keep this
quick.
"""

import contextlib
import hashlib
import os
import time
from collections import Counter

import pytest
import timm
import torch
from huggingface_hub import constants
from hydra.utils import instantiate
from model_builds import (
    CHEAP,
    CONF,
    EIGHT,
    HEAVY,
    MODELS,
    batch_of,
    build,
    cheap,
    images,
    neighbour_dependence,
    parameter_count,
    shaken,
)
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from fer.errors import UserError
from fer.models import pretrained
from fer.session import compile_parts


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_all_models_are_found():
    papers = {"resattn_vit", "cbam_resnet", "two_stream", "convcut", "multiscale_region"}
    assert papers | {"vit", "swin", "posterpp", "dan", "timm"} <= set(MODELS)
    assert set(CHEAP) <= set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_yaml_begins_with_its_command(name):
    comment = (CONF / "model" / f"{name}.yaml").read_text().split("_target_")[0]
    assert f"python -m fer.train model={name}" in comment


@pytest.mark.parametrize("name", MODELS)
def test_predictions_do_not_depend_on_neighbours(name):
    """An image's logits are its own (T1)."""
    if name in HEAVY:
        assert neighbour_dependence(cheap(name), torch.float32) < 1e-4
    else:
        assert neighbour_dependence(cheap(name)) < 1e-9


OTHER_SIZE = {"cbam_resnet": 48, "convcut": 128, "swin": 128}  # of the rest: 96


@pytest.mark.parametrize("name", MODELS)
def test_another_image_size(name):
    """Three images of it, together and one alone."""
    size = OTHER_SIZE.get(name, 96)
    assert size != cheap(name).image_size
    module = shaken(cheap(name, f"image_size={size}"))
    batch = images(3, size)
    with torch.inference_mode():
        logits = module(batch)
        assert logits.shape == (3, 7)
        assert (logits[0] - logits[1]).abs().max() > 1e-6
        torch.testing.assert_close(module(batch[1:2]), logits[1:2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_classes(name):
    """Logits, features and the class-activation layer fit; the number of classes comes from their names (T2, T7)."""
    module = cheap(name, classes=EIGHT).eval()
    assert module.class_names == EIGHT
    seen = []
    handle = module.cam_layer.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.inference_mode():
        logits = module(images(3, module.image_size))
        handle.remove()
        features = module.features(images(3, module.image_size))
    assert logits.shape == (3, 8)
    assert logits.isfinite().all()
    assert features.shape[0] == 3
    assert features.ndim == 2
    assert len(seen) == 1
    assert seen[0].shape[0] == 3
    assert seen[0].ndim in (3, 4)


@pytest.mark.parametrize("name", MODELS)
def test_every_trainable_parameter_learns(name):
    """A finite gradient, not all zero, within two steps of an odd batch (T3)."""
    module = cheap(name).train()
    built = module.optim.configure(module.parameter_groups(), steps_per_epoch=100, max_epochs=100)["optimizer"]
    in_optimizer = {p for group in built.param_groups for p in group["params"]}
    assert in_optimizer == {p for p in module.parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    silent = set()
    for step in range(2):
        loss, logits = module.loss(batch_of(module, 5))
        assert logits.shape == (5, 7)
        optimizer.zero_grad()
        loss.backward()
        now = {n for n, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
        silent = now if step == 0 else silent & now
        assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)
        assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
        optimizer.step()
    assert not silent


@pytest.fixture
def calls(monkeypatch):
    """How often each compiled module was called; nothing is compiled."""
    calls = Counter()

    def compile_(part, mode):
        def call(*args, **kwargs):
            calls[part, mode] += 1
            return part._call_impl(*args, **kwargs)

        part._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", compile_)
    return calls


FINDS = ["resattn_vit detection=true anchors=[[20,30]]", "multiscale_region detection=true"]


@pytest.mark.parametrize("name", [*MODELS, *FINDS])
def test_a_step_and_a_prediction_use_what_is_compiled(name, calls):
    """A network whose loss goes round the parts it says are compiled would train as before, and nobody would know."""
    module = cheap(*name.split())
    compile_parts(module, None)
    module.loss(batch_of(module, 3))
    assert not calls
    compile_parts(module, "reduce-overhead")
    module.loss(batch_of(module, 3))
    parts = {(module.get_submodule(part), "reduce-overhead") for part in module.compiled_parts}
    assert parts
    assert set(calls) == parts
    calls.clear()
    module.eval()(images(3, module.image_size))
    assert set(calls) == parts
    if name in FINDS:
        calls.clear()
        module.find(images(3, module.image_size))
        assert set(calls) == parts


ROUND = {"center", "flip_consistency", "island", "locality_preserving", "multi_task"}  # losses that ask for features


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "loss").glob("*.yaml")))
def test_every_loss_uses_what_is_compiled_or_is_refused(name, calls):
    module = cheap("cbam_resnet")
    module.loss_function = instantiate(OmegaConf.load(CONF / "loss" / f"{name}.yaml"))
    module.loss_function.setup(torch.ones(7))
    module.loss_function.attach(module)
    if name in ROUND:
        with pytest.raises(UserError, match=r"trainer\.compile=default .* set trainer\.compile=null"):
            compile_parts(module, "default")
        compile_parts(module, None)
        return
    compile_parts(module, "default")
    with contextlib.suppress(UserError):  # a loss that wants data which this batch has not
        module.loss(batch_of(module, 3))
    assert calls[module.network, "default"] == 1


@pytest.mark.parametrize("name", [pytest.param(m, marks=[pytest.mark.slow] * (m in HEAVY)) for m in MODELS])
def test_overfits(name):
    """Sixteen images are learned (T4)."""
    module = cheap(name).train()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    batch = batch_of(module, 16)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for _ in range(80):
        loss, logits = module.loss(batch)
        cross_entropy = nn.functional.cross_entropy(logits.detach(), batch["label"])
        if (logits.argmax(1) == batch["label"]).all() and cross_entropy < 0.7:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"cross-entropy {cross_entropy.item():.2f} after 80 steps")


@pytest.mark.parametrize("name", MODELS)
def test_weights_round_trip(name, tmp_path):
    module = shaken(cheap(name))
    torch.save(module.state_dict(), tmp_path / "weights")
    fresh = cheap(name).eval()
    fresh.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    with torch.inference_mode():
        assert torch.equal(module(images(2, module.image_size)), fresh(images(2, module.image_size)))


@pytest.mark.parametrize("name", MODELS)
def test_low_precision(name):
    module = cheap(name).train()
    batch = batch_of(module, 4)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = module.loss(batch)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


# -- pre-trained weights ----------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda *_: None)


@pytest.mark.usefixtures("offline")
def test_missing_weights_are_one_sentence():
    with pytest.raises(UserError, match=r"timm/resnet18\.tv_in1k .*HF_HUB_OFFLINE.* model\.pretrained=false"):
        pretrained.timm_network("resnet18.tv_in1k", pretrained=True, options={})


def test_hanging_name_resolution_is_cut_short(monkeypatch):
    class Session:
        def head(self, url, timeout):
            time.sleep(30)

    monkeypatch.setattr(pretrained, "get_session", Session)
    monkeypatch.setattr(pretrained, "_PROBE_SECONDS", 0.2)
    monkeypatch.setattr(pretrained, "is_offline_mode", lambda: False)
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda *_: None)
    start = time.monotonic()
    with pytest.raises(UserError, match="no answer within"):
        pretrained.timm_network("resnet18", pretrained=True, options={})
    assert time.monotonic() - start < 5


@pytest.mark.usefixtures("offline")
def test_cached_weights_need_no_network(monkeypatch, tmp_path):
    published = timm.create_model("test_resnet")
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda *_: os.fspath(tmp_path / "model.safetensors"))
    module = build("timm", "backbone=test_resnet", "pretrained=true")
    checksum = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert module.weights == f"timm/test_resnet.r160_in1k sha256:{checksum}"
    assert torch.equal(module.network.conv1[0].weight, published.conv1[0].weight)
    assert module(images(2, 64)).shape == (2, 7)


@pytest.mark.usefixtures("offline")
def test_damaged_cached_weights_are_refused(monkeypatch, tmp_path):
    blob = tmp_path / hashlib.sha256(b"as published").hexdigest()  # the hub's cache names large files so
    save_file(timm.create_model("test_resnet").state_dict(), blob)
    (tmp_path / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda *_: os.fspath(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: published with SHA-256"):
        build("timm", "backbone=test_resnet", "pretrained=true")


def test_random_weights_are_named():
    assert build("timm", "backbone=test_resnet").weights == "random"


@pytest.mark.parametrize(("name", "message"), [("resnet81", "did you mean"), ("resnet18.nowhere", "resnet18.tv_in1k")])
def test_unknown_names(name, message):
    with pytest.raises(UserError, match=message):
        pretrained.timm_network(name, pretrained=True, options={})


# -- the baselines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "backbone", "count"),
    [
        ("vit", "vit_base_patch16_224.augreg_in1k", 85_804_808),
        ("vit", "vit_large_patch16_224.augreg_in21k_ft_in1k", 303_309_832),
        ("swin", "swin_tiny_patch4_window7_224.ms_in1k", 27_525_506),
        ("swin", "swin_base_patch4_window7_224.ms_in1k", 86_751_424),
    ],
)
def test_baseline_parameters(name, backbone, count):
    with torch.device("meta"):
        module = build(name, f"backbone={backbone}", classes=EIGHT)
    assert parameter_count(module.network) == count
