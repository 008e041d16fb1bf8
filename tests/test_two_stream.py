"""Two-stream network and POSTER++: counts, stages, windows against full attention, and a stream that stays frozen."""

import hashlib

import pytest
import torch
from model_builds import EIGHT, PUBLISHED, batch_of, build, cheap, images, neighbour_dependence, parameter_count
from torch import nn
from torch.nn import functional as F

from fer.errors import UserError
from fer.layers.ir50 import IR50
from fer.layers.mobilefacenet import LandmarkStream, MobileFaceNet
from fer.layers.window_attention import WindowCrossAttention, WindowCrossBlock, from_windows, to_windows


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (["backbone=vit_small_patch14_dinov2"], 47_936_070),
        ([], 112_204_230),
        (["backbone=vit_large_patch14_dinov2"], 329_821_894),
        (["landmark=false"], 110_113_094),
    ],
)
def test_two_stream_parameters(overrides, count):
    with torch.device("meta"):
        assert parameter_count(build("two_stream", *overrides, classes=EIGHT).network) == count


def test_two_stream_stages():
    with torch.device("meta"):
        network = build("two_stream", classes=EIGHT).network
        image = torch.empty(2, 3, 224, 224)
        shapes = [(2, 64, 28, 28), (2, 128, 14, 14), (2, 256, 7, 7)]
        assert [m.shape for m in network.pyramid(image)] == shapes
        assert [m.shape for m in network.landmark_pyramid(image)] == shapes
        assert network.pyramid.taps == [3, 7, 11]
        assert parameter_count(network.pyramid.backbone) == 85_724_928
        assert parameter_count(network.landmarks) == 911_232
        assert network.fusion.position.shape == (1, 148, 768)
        assert network.forward_features(image).shape == (2, 768)


def test_posterpp_parameters_and_stages():
    with torch.device("meta"):
        network = build("posterpp", classes=EIGHT).network
        maps = network.pyramid.backbone(torch.empty(2, 3, 112, 112))
        assert [m.shape[1:] for m in maps] == [(64, 56, 56), (128, 28, 28), (256, 14, 14)]
        assert [m.shape[1:] for m in network.pyramid(torch.empty(2, 3, 224, 224))] == [
            (64, 28, 28), (128, 14, 14), (256, 7, 7),
        ]  # fmt: skip
    assert parameter_count(network) == 43_754_710


@pytest.mark.parametrize("overrides", [["landmark=false"], ["windows=[28,14,7]"]])
def test_two_stream_options_keep_the_contract(overrides):
    assert neighbour_dependence(cheap("two_stream", *overrides), torch.float32) < 1e-4


@pytest.mark.parametrize("windows", ["[7,7]", "[5,7,7]"])
def test_windows_must_fit(windows):
    with pytest.raises(UserError, match="three sides"):
        cheap("two_stream", f"windows={windows}")


# -- window attention -------------------------------------------------------------------------------------------------


def test_windows_round_trip():
    x = torch.arange(2 * 6 * 4 * 3).view(2, 6, 4, 3)
    windows = to_windows(x, 2)
    assert windows.shape == (2 * 3 * 2, 4, 3)
    assert torch.equal(windows[1].view(2, 2, 3), x[0, :2, 2:])
    assert torch.equal(from_windows(windows, 2, 6, 4), x)


def test_window_attention_is_masked_full_attention():
    """Full attention over all positions, positions of other windows masked, the bias looked up pair by pair."""
    torch.manual_seed(0)
    dim, heads, window, side = 8, 2, 3, 6
    layer = WindowCrossAttention(dim, heads, window).double()
    image, query = torch.randn(2, side, side, dim).double(), torch.randn(2, side, side, dim).double()
    got = from_windows(layer(to_windows(query, window), to_windows(image, window)), window, side, side)

    places = [(i, j) for i in range(side) for j in range(side)]
    bias = torch.full((heads, len(places), len(places)), -torch.inf, dtype=torch.float64)
    for a, (i, j) in enumerate(places):
        for b, (k, m) in enumerate(places):
            if (i // window, j // window) == (k // window, m // window):
                entry = (i - k + window - 1) * (2 * window - 1) + (j - m + window - 1)
                bias[:, a, b] = layer.bias.relative_position_bias_table[entry]
    keys, values = layer.kv(image).flatten(1, 2).chunk(2, dim=2)
    outputs = []
    for h in range(heads):
        own = slice(h * dim // heads, (h + 1) * dim // heads)
        scores = query.flatten(1, 2)[..., own] @ keys[..., own].transpose(1, 2) / (dim // heads) ** 0.5
        weight = (scores + bias[h]).exp()
        outputs.append(weight / weight.sum(2, keepdim=True) @ values[..., own])
    expected = layer.proj(torch.cat(outputs, dim=2)).view(2, side, side, dim)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("window", "leaves_others"), [(7, True), (28, False)])
def test_a_window_sees_itself_alone(window, leaves_others):
    torch.manual_seed(0)
    block = WindowCrossBlock(8, heads=2, window=window, drop_path=0.0, gain=1.0).eval()
    image, query = torch.randn(1, 8, 28, 28), torch.randn(1, 8, 28, 28)
    moved = image.clone()
    moved[:, :, :7, :7] = image[:, :, :7, :7].roll(1, 3)
    with torch.inference_mode():
        change = (block(moved, query) - block(image, query)).abs().amax((0, 1))
    assert change[:7, :7].max() > 1e-4
    others = change.clone()
    others[:7, :7] = 0
    assert (others.max() == 0) == leaves_others


def test_window_block_against_its_formula():
    torch.manual_seed(0)
    block = WindowCrossBlock(8, heads=2, window=2, drop_path=0.0, gain=0.3).double().eval()
    image, query = torch.randn(1, 8, 4, 4).double(), torch.randn(1, 8, 4, 4).double()
    x = F.layer_norm(image.permute(0, 2, 3, 1), (8,))
    attended = block.attention(to_windows(query.permute(0, 2, 3, 1), 2), to_windows(x, 2))
    x = x + 0.3 * from_windows(attended, 2, 4, 4)
    x = x + 0.3 * block.mlp.fc2(F.gelu(block.mlp.fc1(F.layer_norm(x, (8,)))))
    torch.testing.assert_close(block(image, query), x.permute(0, 3, 1, 2))


# -- the landmark stream ----------------------------------------------------------------------------------------------


@pytest.fixture
def landmark_ckpt(tmp_path):
    """A checkpoint as the public project writes them: wrapped, prefixed, with a landmark head."""
    torch.manual_seed(1)
    weights = {f"module.{name}": value for name, value in MobileFaceNet().state_dict().items()}
    weights["module.output_layer.linear.weight"] = torch.zeros(136, 512)
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "mobilefacenet.tar")
    return tmp_path / "mobilefacenet.tar"


def test_landmark_stream_sees_the_pixels():
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    stream = LandmarkStream(mean, std, checkpoint=None)
    seen = []
    stream.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = torch.randint(256, (2, 3, 112, 112), generator=torch.Generator().manual_seed(0)) / 255
    stream((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    torch.testing.assert_close(seen[0], pixels)


def test_frozen_landmarks_stay(landmark_ckpt):
    module = cheap("two_stream", *PUBLISHED, f"landmark_ckpt={landmark_ckpt}").train()
    checksum = hashlib.sha256(landmark_ckpt.read_bytes()).hexdigest()
    assert module.weights == f"random; landmarks: mobilefacenet.tar sha256:{checksum}, frozen"
    before = {name: value.clone() for name, value in module.network.landmarks.state_dict().items()}
    torch.manual_seed(1)
    assert all(torch.equal(value, before[f"network.{name}"]) for name, value in MobileFaceNet().state_dict().items())
    optimizer = module.optim.configure(module.parameter_groups(), steps_per_epoch=1, max_epochs=1)["optimizer"]
    loss, _ = module.loss(batch_of(module, 4))
    loss.backward()
    optimizer.step()
    assert all(p.grad is None for p in module.network.landmarks.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.network.landmarks.state_dict().items())
    trained = cheap("two_stream").train()
    assert trained.weights == "random; landmarks: random, trained"
    statistics = trained.network.landmarks.network.conv1.bn.running_mean.clone()
    trained.loss(batch_of(trained, 4))
    assert not torch.equal(trained.network.landmarks.network.conv1.bn.running_mean, statistics)


def test_wrong_checkpoints_are_refused(tmp_path, landmark_ckpt):
    with pytest.raises(UserError, match=r"no file .*landmark_ckpt=null"):
        cheap("two_stream", *PUBLISHED, f"landmark_ckpt={tmp_path / 'nowhere'}")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other")
    with pytest.raises(UserError, match="does not hold the MobileFaceNet"):
        cheap("two_stream", *PUBLISHED, f"landmark_ckpt={tmp_path / 'other'}")
    with pytest.raises(UserError, match="is no IR-50, it lacks input_layer"):
        cheap("posterpp", *PUBLISHED, f"backbone_ckpt={landmark_ckpt}")


def test_ir50_checkpoint(tmp_path):
    torch.manual_seed(1)
    published = IR50([1, 1, 1])
    torch.save({**published.state_dict(), "output_layer.0.weight": torch.zeros(512)}, tmp_path / "ir50.pth")
    module = cheap("posterpp", *PUBLISHED, f"backbone_ckpt={tmp_path / 'ir50.pth'}")
    checksum = hashlib.sha256((tmp_path / "ir50.pth").read_bytes()).hexdigest()
    assert module.weights == f"ir50.pth sha256:{checksum}; landmarks: random, trained"
    x = images(1, 112)
    with torch.inference_mode():
        got = module.network.pyramid.backbone.eval()(x)
        assert all(torch.equal(a, b) for a, b in zip(got, published.eval()(x), strict=True))
