"""An ONNX network in 8-bit integers for CPUs, and what that costs: size, accuracy, time per image.

Convolutional networks are quantised statically: ranges of activations come from crops shown beforehand, which must not
be of the test part. Where most weights are in matrix products, as in transformers, ranges are found while running. This
division is onnxruntime's own advice.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from fer.exporting.graph import batches_of
from fer.metrics import Array, confusion_counts, scores
from fer.reporting.statistics import mcnemar, paired_bootstrap

Method = Literal["static", "dynamic"]
WARM_UPS = 3
RESAMPLES = 10_000


class Crops(CalibrationDataReader):  # type: ignore[misc]
    """Hands (n, 3, S, S) crops to onnxruntime in batches."""

    def __init__(self, image: Array, name: str) -> None:
        self.batches, self.name = batches_of(image), name

    def get_next(self) -> dict[str, Array] | None:
        """The next batch, None at the end."""
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch}


def method_for(path: Path) -> Method:
    """``static`` where most weights of an ONNX file are in convolutions, else ``dynamic``."""
    graph = onnx.load(path).graph
    sizes = {one.name: int(np.prod(one.dims)) for one in graph.initializer}
    weights: Counter[str] = Counter()
    for node in graph.node:
        weights[node.op_type] += sum(sizes.get(name, 0) for name in node.input)
    return "static" if weights["Conv"] >= weights["MatMul"] + weights["Gemm"] else "dynamic"


def quantise(path: Path, target: Path, image: Array) -> Method:
    """Write an ONNX file in 8 bits.

    Weights by output channel and in 7 of the 8 bits, so that sums of products also fit the instructions of older CPUs.

    Args:
        path: the float32 file.
        target: the file to write.
        image: (n, 3, S, S) crops for the ranges of static quantisation; not of the test part.

    Returns:
        How it was done.
    """
    method = method_for(path)
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        if method == "dynamic":
            # Some weights are transposed in their place, against the shapes that the preparation noted for them.
            model = onnx.load(prepared)
            model.graph.ClearField("value_info")
            onnx.save(model, prepared)
            quantize_dynamic(
                prepared, target, per_channel=True, reduce_range=True, op_types_to_quantize=["MatMul", "Gemm"]
            )
        else:
            name = onnx.load(prepared).graph.input[0].name
            quantize_static(
                prepared,
                target,
                Crops(image, name),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
    return method


def cost(before: Array, after: Array, label: Array, person: Array, class_names: list[str], seed: int) -> dict[str, Any]:
    """What other answers to the same n images cost.

    Args:
        before: (n, K) answers.
        after: (n, K) the other ones.
        label: (n,) classes.
        person: (n,) who each image shows.
        class_names: K names.
        seed: of the bootstrap.

    Returns:
        ``n``; ``before`` and ``after`` with ``acc`` and ``mean_acc``; ``difference`` of accuracy with its 95 % interval
        (bootstrap over people), ``p`` of McNemar's exact test, ``same``: the share of images named alike.
    """
    told = [answers.argmax(1) for answers in (before, after)]
    was, is_now = (predicted == label for predicted in told)
    kept = ("acc", "mean_acc")
    before_scores, after_scores = (
        {key: scores(confusion_counts(label, predicted, len(class_names)), class_names)[key] for key in kept}
        for predicted in told
    )
    difference = paired_bootstrap(is_now, was, np.zeros(len(label)), RESAMPLES, seed, person=person)
    return {
        "n": len(label),
        "before": before_scores,
        "after": after_scores,
        "difference": difference.difference,
        "interval": [difference.low, difference.high],
        "p": mcnemar(is_now, was, person).p,
        "same": float((told[0] == told[1]).mean()),
    }


def interleaved(works: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Time several ways of doing the same by turns, so that a busy machine is busy for all of them.

    Args:
        works: by name.
        repeats: timed turns, after 3 for warming up.

    Returns:
        By name ``median``, ``low`` and ``high`` quartile of the processor's milliseconds (user and system), which for
        one thread are those of an idle machine's clock.
    """
    spent: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(WARM_UPS + repeats):
        for name, work in works.items():
            start = time.process_time()
            work()
            if turn >= WARM_UPS:
                spent[name].append(1000 * (time.process_time() - start))
    return {
        name: dict(zip(("low", "median", "high"), map(float, np.quantile(values, (0.25, 0.5, 0.75))), strict=True))
        for name, values in spent.items()
    }
