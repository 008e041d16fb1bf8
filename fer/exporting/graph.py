"""A network as an ONNX graph with a free batch size, and whether it answers as PyTorch does."""

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from fer.metrics import Array

Answers = Literal["logits", "probabilities"]
TOLERANCE = 1e-4  # largest difference of an answer from PyTorch's in float32
BATCH = 64


class Answering(nn.Module):
    """A network that says probabilities: softmax(logits / temperature)."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, K)."""
        logits: Tensor = self.network(image)
        return (logits / self.temperature).softmax(1)


def export_graph(network: nn.Module, image_size: int, path: Path, answers: Answers = "logits") -> None:
    """Write a network in eval mode as one ONNX file, ``image`` (batch, 3, S, S) float32 -> ``answers`` (batch, K).

    Args:
        network: left as it is.
        image_size: S.
        path: the file.
        answers: the output's name.
    """
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell every node they look at
    example = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    torch.onnx.export(
        copy.deepcopy(network).cpu().float().eval(),
        (example,),
        path,
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=["image"],
        output_names=[answers],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )


def describe(path: Path, facts: dict[str, Any]) -> None:
    """Put facts into an ONNX file's ``metadata_props``: text as it is, everything else as JSON."""
    graph = onnx.load(path)
    values = {f"fer.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    onnx.helper.set_model_props(graph, values)
    onnx.save(graph, path)


def session_of(path: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """An ONNX file opened on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 3  # errors; warnings speak of what the optimiser could not fold
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def batches_of(image: Array) -> Iterator[Array]:
    """(n, 3, S, S) in batches."""
    return (image[start : start + BATCH] for start in range(0, len(image), BATCH))


def answers_of(session: onnxruntime.InferenceSession, image: Array) -> Array:
    """(n, 3, S, S) float32 -> (n, K)."""
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: batch})[0] for batch in batches_of(image)])


def largest_difference(network: nn.Module, session: onnxruntime.InferenceSession, image: Tensor) -> float:
    """Of the answers to (n, 3, S, S) images between PyTorch in float32 and the graph."""
    with torch.inference_mode():
        expected = torch.cat([network(image[start : start + BATCH]) for start in range(0, len(image), BATCH)])
    return float(np.abs(answers_of(session, image.numpy()) - expected.numpy()).max())
