"""Every architecture exports to ONNX with a free batch size, and onnxruntime agrees with PyTorch."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from model_builds import MODELS, cheap, images, shaken

from fer.exporting.graph import export_graph
from fer.models.base import ExpressionModule

QUICK = ["timm"]  # and CBAM-ResNet, in test_export.py


def largest_difference(module: ExpressionModule, path: Path) -> float:
    """Of the logits of five images between PyTorch and the exported graph."""
    module = shaken(module)
    batch = images(5, module.image_size, seed=1)
    export_graph(module.network, module.image_size, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    with torch.inference_mode():
        expected = module(batch)
    assert logits.shape == expected.shape
    assert (expected[0] - expected[1]).abs().max() > 2e-4, "the images must differ for this to say anything"
    return (torch.from_numpy(logits) - expected).abs().max().item()


@pytest.mark.parametrize("name", QUICK)
def test_a_small_convolutional_network(name: str, tmp_path: Path) -> None:
    assert largest_difference(cheap(name), tmp_path / "model.onnx") < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name not in QUICK])
def test_every_architecture(name: str, tmp_path: Path) -> None:
    assert largest_difference(cheap(name), tmp_path / "model.onnx") < 1e-4
