"""What every architecture must keep, found by globbing ``conf/model``, and what single ones promise besides.

A new architecture is tested as soon as its YAML exists; name a cheap variant of it in `CHEAP` to keep this quick.
"""

import copy
import os
import time
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from fer.errors import UserError
from fer.layers.cbam import CBAM
from fer.layers.detail import TokenAttention, separable_conv
from fer.models import pretrained
from fer.models.base import ExpressionModule
from fer.models.cbam_resnet import CBAMResNetwork
from fer.models.convcut import LEAKY, ConvCutNetwork, cut_convnext

CONF = Path(__file__).parents[1] / "conf"
MODELS = sorted(path.stem for path in (CONF / "model").glob("[!_]*.yaml"))
SEVEN = ["anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"]
EIGHT = sorted([*SEVEN, "contempt"])
CHEAP = {
    "cbam_resnet": ["width=32", "layers=[1,1,1,1]"],
    "convcut": ["backbone=convnext_atto", "truncate=2", "image_size=96"],
    "timm": ["backbone=test_resnet", "image_size=64"],
    "vit": ["backbone=test_vit", "image_size=64"],
    "swin": ["image_size=64", "arguments.embed_dim=16", "arguments.depths=[1,1,2,1]", "arguments.window_size=2"],
}


def build(name: str, *overrides: str, classes: list[str] = SEVEN) -> ExpressionModule:
    """The module a YAML describes, without pre-trained weights unless an override says so."""
    model = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    OmegaConf.set_struct(model, True)
    if "arguments" in model:
        OmegaConf.set_struct(model.arguments, False)
    offline = ["pretrained=false"] if "pretrained" in model else []
    model.merge_with_dotlist([*offline, *overrides])
    groups = {
        "data": {"class_names": classes},
        "loss": OmegaConf.load(CONF / "loss" / "cross_entropy.yaml"),
        "optim": OmegaConf.load(CONF / "optim" / "adamw.yaml"),
    }
    torch.manual_seed(0)
    try:
        module = instantiate(OmegaConf.create({**groups, "model": model}).model)
    except InstantiationException as error:
        raise error.__cause__ or error from None
    assert isinstance(module, ExpressionModule)
    return module


def cheap(name: str, *overrides: str, classes: list[str] = SEVEN) -> ExpressionModule:
    return build(name, *CHEAP.get(name, []), *overrides, classes=classes)


def shaken(module: ExpressionModule) -> ExpressionModule:
    """The module in eval mode, with norms, biases and gates moved off the zeros and ones they start from."""
    generator = torch.Generator().manual_seed(3)
    for tensor in module.network.state_dict().values():
        if tensor.is_floating_point() and (tensor.ndim <= 1 or not tensor.any()):
            tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
    return module.eval()


def images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Random coloured patches, in [-1, 1]."""
    patches = 2 * torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) - 1
    return nn.functional.interpolate(patches, size)


def batch_of(module: ExpressionModule, count: int) -> dict[str, torch.Tensor]:
    """Random images whose labels go round the classes."""
    return {"image": images(count, module.image_size), "label": torch.arange(count) % module.num_classes}


def parameter_count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def neighbour_dependence(module: ExpressionModule) -> float:
    """Largest change of an image's logits between being alone, in a batch, permuted, and among other images (T1)."""
    module = shaken(module).double()
    batch, others = images(8, module.image_size).double(), images(3, module.image_size, seed=1).double()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = module(batch)
        alone = torch.cat([module(batch[i : i + 1]) for i in (0, 5)])
        permuted = module(batch[order])
        beside = module(torch.cat([others, batch[2:3]]))[-1]
    assert (logits[0] - logits[1]).abs().max() > 1e-6, "the images must differ for this to say anything"
    differences = [alone - logits[[0, 5]], permuted - logits[order], beside - logits[2]]
    return max(d.abs().max().item() for d in differences)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_all_models_are_found():
    assert {"cbam_resnet", "convcut", "timm", "vit", "swin"} <= set(MODELS)
    assert set(CHEAP) <= set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_yaml_begins_with_its_command(name):
    comment = (CONF / "model" / f"{name}.yaml").read_text().split("_target_")[0]
    assert f"python -m fer.train model={name}" in comment


@pytest.mark.parametrize("name", MODELS)
def test_predictions_do_not_depend_on_neighbours(name):
    assert neighbour_dependence(cheap(name)) < 1e-9


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
    """A finite gradient, not all zero, within two steps of an odd batch (T3); then 16 images are learned (T4)."""
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


@pytest.mark.parametrize("name", MODELS)
def test_overfits(name):
    module = cheap(name).train()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    batch = batch_of(module, 16)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for _ in range(80):
        loss, logits = module.loss(batch)
        if (logits.argmax(1) == batch["label"]).all() and loss < 0.7:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"loss {loss.item():.2f} after 80 steps")


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


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_onnx_agrees(name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    module = shaken(cheap(name))
    example = images(2, module.image_size)
    path = str(tmp_path / "model.onnx")
    dynamic = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(copy.deepcopy(module.network), (example,), path, dynamo=True, dynamic_shapes=dynamic)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    batch = images(5, module.image_size, seed=1)
    (logits,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    with torch.inference_mode():
        assert (torch.from_numpy(logits) - module(batch)).abs().max() < 1e-4


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
    assert module.weights == "timm/test_resnet.r160_in1k"
    assert torch.equal(module.network.conv1[0].weight, published.conv1[0].weight)
    assert module(images(2, 64)).shape == (2, 7)


def test_random_weights_are_named():
    assert build("timm", "backbone=test_resnet").weights == "random"


@pytest.mark.parametrize(("name", "message"), [("resnet81", "did you mean"), ("resnet18.nowhere", "resnet18.tv_in1k")])
def test_unknown_names(name, message):
    with pytest.raises(UserError, match=message):
        pretrained.timm_network(name, pretrained=True, options={})


# -- CBAM-ResNet ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("placement", "count"),
    [("ends", 21_314_675), ("none", 21_280_583), ("first", 21_281_263), ("last", 21_313_995), ("blocks", 21_443_379)],
)
def test_cbam_resnet_parameters(placement, count):
    with torch.device("meta"):
        network = CBAMResNetwork(7, 64, [3, 4, 6, 3], placement, stem_stride=1, dropout=0.5)
    assert parameter_count(network) == count


def test_cbam_resnet_stages():
    network = build("cbam_resnet", classes=EIGHT).network.to("meta")
    x = network.first_attention(network.stem(torch.empty(2, 3, 44, 44, device="meta")))
    shapes = [tuple(x.shape[1:])]
    for stage in network.stages:
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 44, 44), (64, 44, 44), (128, 22, 22), (256, 11, 11), (512, 6, 6)]
    assert network.pool(x).shape == (2, 512, 1, 1)


def test_all_positions_reach_the_pool():
    network = cheap("cbam_resnet").network.eval()
    grid = torch.rand(1, 256, 6, 6, requires_grad=True)
    network.pool(grid).sum().backward()
    assert (grid.grad == 1 / 36).all()


def slow_cbam(x: list, cbam: CBAM) -> torch.Tensor:
    """Woo et al.'s formulas for one (C, H, W) image, element by element in float64, in eval mode."""
    w1, b1, w2, b2 = (p.double() for p in cbam.channel.mlp.parameters())
    x = x.double()
    channels, height, width = x.shape

    def perceptron(v):
        hidden = [max(0.0, (w1[j] @ v + b1[j]).item()) for j in range(len(b1))]
        return [sum(w2[c, j].item() * hidden[j] for j in range(len(b1))) + b2[c].item() for c in range(channels)]

    mean = torch.tensor([x[c].sum() / (height * width) for c in range(channels)], dtype=torch.float64)
    top = torch.tensor([max(x[c].flatten().tolist()) for c in range(channels)], dtype=torch.float64)
    scores = torch.tensor([a + b for a, b in zip(perceptron(mean), perceptron(top), strict=True)], dtype=torch.float64)
    refined = x * (1 / (1 + torch.exp(-scores)))[:, None, None]

    kernel, norm = cbam.spatial.conv.weight[0].double(), cbam.spatial.norm
    summary = [refined.max(0).values, refined.sum(0) / channels]
    result = torch.empty_like(refined)
    reach = kernel.shape[-1] // 2
    for i in range(height):
        for j in range(width):
            response = 0.0
            for plane in range(2):
                for di in range(-reach, reach + 1):
                    for dj in range(-reach, reach + 1):
                        if 0 <= i + di < height and 0 <= j + dj < width:
                            response += (kernel[plane, di + reach, dj + reach] * summary[plane][i + di, j + dj]).item()
            scaled = (response - norm.running_mean.item()) / (norm.running_var.item() + norm.eps) ** 0.5
            gate = 1 / (1 + torch.exp(torch.tensor(-(scaled * norm.weight.item() + norm.bias.item()))))
            result[:, i, j] = refined[:, i, j] * gate
    return result


def test_cbam_against_its_formulas():
    torch.manual_seed(0)
    cbam = CBAM(channels=32, reduction=16, kernel=7).double().eval()
    nn.init.normal_(cbam.spatial.norm.weight)
    cbam.spatial.norm.running_mean.fill_(0.3)
    cbam.spatial.norm.running_var.fill_(1.7)
    x = torch.randn(2, 32, 5, 6, dtype=torch.float64)
    with torch.inference_mode():
        got = cbam(x)
        expected = torch.stack([slow_cbam(image, cbam) for image in x])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_cbam_spatial_gate_starts_at_one_half():
    gate = CBAM(channels=64).spatial.gate(torch.randn(4, 64, 11, 11))
    assert (gate == 0.5).all()


# -- Conv-cut ---------------------------------------------------------------------------------------------------------


def convcut_on_meta(truncate, attention="spatial", at="det2", detail=True):
    with torch.device("meta"):
        trunk = cut_convnext(timm.create_model("convnext_base", num_classes=0), truncate)
        return ConvCutNetwork(trunk, 7, detail, attention, at, dropout=0.1)


@pytest.mark.parametrize(
    ("truncate", "attention", "count"),
    [
        (24, "spatial", 54_219_719),
        (24, "none", 53_956_039),
        (24, "batch", 53_956_040),
        ("released", "batch", 51_855_304 + 512),  # the released graph has no norm after the detail block: 2 x 256
    ],
)
def test_convcut_parameters(truncate, attention, count):
    assert parameter_count(convcut_on_meta(truncate, attention)) == count


def test_convcut_trunks():
    """All cuts of one network, from the whole of stage 3 downwards."""
    with torch.device("meta"):
        network = timm.create_model("convnext_base", num_classes=0)
    sizes = {n: parameter_count(cut_convnext(network, n)) for n in (27, 26, 25, 24, 23, 22)}
    assert sizes == {n: 53_740_672 + (n - 24) * 2_126_848 for n in sizes}


def test_convcut_stages():
    network = convcut_on_meta(24)
    x = network.trunk.stem(torch.empty(2, 3, 224, 224, device="meta"))
    shapes = []
    for stage in network.trunk.stages:
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    x = network.detail1(x)
    shapes += [tuple(x.shape[1:]), tuple(network.detail2(x).shape[1:])]
    assert shapes == [(128, 56, 56), (256, 28, 28), (512, 14, 14), (256, 4, 4), (256, 2, 2)]


@pytest.mark.parametrize("overrides", [["attention_at=det1"], ["attention=none"], ["detail=false"], ["truncate=1"]])
def test_convcut_options_keep_the_contract(overrides):
    assert neighbour_dependence(cheap("convcut", *overrides)) < 1e-9


def test_convcut_released_cut_is_half_a_block():
    torch.manual_seed(0)
    whole = timm.create_model("convnext_atto", depths=(1, 1, 24, 1), dims=(4, 4, 8, 8), num_classes=0)
    blocks = copy.deepcopy(whole.stages[2].blocks)
    x = torch.rand(1, 8, 4, 4)
    expected = blocks[:23](x)
    expected = blocks[23].conv_dw(expected).permute(0, 2, 3, 1)
    expected = nn.functional.layer_norm(expected, (8,), blocks[23].norm.weight, blocks[23].norm.bias, 1e-6)
    got = cut_convnext(whole, "released").stages[2].blocks(x)
    torch.testing.assert_close(got, expected.permute(0, 3, 1, 2))


def test_detail_padding_is_tensorflows_same():
    """At 14 -> 4, TensorFlow pads one row and one column on each side: (4 - 1) * 4 + 4 - 14 = 2, split evenly."""
    torch.manual_seed(0)
    layer = separable_conv(2, 3, kernel=4, padding=1)
    x = torch.randn(1, 2, 14, 14)
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    expected = torch.zeros(1, 3, 4, 4)
    for i in range(4):
        for j in range(4):
            patch = padded[0, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            depth = (patch * layer[0].weight[:, 0]).sum((1, 2))
            expected[0, :, i, j] = (layer[1].weight[:, :, 0, 0] @ depth + layer[1].bias).clamp(min=0)
    torch.testing.assert_close(layer(x), expected)


def test_token_attention_against_its_formula():
    torch.manual_seed(0)
    layer = TokenAttention(16).double()
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    q, k, v = layer.query(x), layer.key(x), layer.value(x)
    weight = torch.exp(torch.einsum("bnd,bmd->bnm", q, k) / 4)
    mixed = torch.einsum("bnm,bmd->bnd", weight / weight.sum(2, keepdim=True), v)
    y = x + layer.out(mixed)
    expected = (y - y.mean(2, keepdim=True)) / (y.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), expected)


def test_batch_attention_leaks_and_is_refused():
    with pytest.raises(UserError, match="allow_batch_attention=true"):
        cheap("convcut", "attention=batch")
    module = cheap("convcut", "attention=batch", "allow_batch_attention=true")
    assert module.leaky == LEAKY
    assert cheap("convcut").leaky is None
    assert neighbour_dependence(module) > 1e-4
    # Permuting one batch shows nothing: the positive control of the other comparisons.
    batch, order = images(8, 96).double(), torch.arange(7, -1, -1)
    with torch.inference_mode():
        torch.testing.assert_close(module(batch)[order], module(batch[order]), rtol=0, atol=1e-9)


def test_batch_attention_of_one_image_is_none():
    leaking = shaken(cheap("convcut", "attention=batch", "allow_batch_attention=true"))
    plain = cheap("convcut", "attention=none").eval()
    plain.load_state_dict({k: v for k, v in leaking.state_dict().items() if not k.endswith("classifier.4.scale")})
    with torch.inference_mode():
        torch.testing.assert_close(leaking(images(1, 96)), plain(images(1, 96)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["image_size=64"], "96 pixels"),
        (["truncate=30"], "model.truncate to 1..6"),
        (["truncate=released"], "model.truncate to 1..6"),
        (["backbone=test_resnet"], "no ConvNeXt"),
    ],
)
def test_convcut_refusals(overrides, message):
    with pytest.raises(UserError, match=message):
        cheap("convcut", *overrides)


def test_convcut_layer_decay():
    module = cheap("convcut", "layer_decay=0.5")
    scale = {id(p): g.get("lr_scale", 1.0) for g in module.parameter_groups() for p in g["params"]}
    names = {n: scale[id(p)] for n, p in module.network.named_parameters()}
    assert len(names) == len(scale)
    assert (
        names["trunk.stem.0.weight"] < names["trunk.stages.0.blocks.0.gamma"] < names["trunk.stages.2.blocks.1.gamma"]
    )
    assert names["classifier.1.weight"] == 1.0


# -- baselines --------------------------------------------------------------------------------------------------------


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
