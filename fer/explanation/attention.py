"""What a network's own attention modules look at, read by hooks in one forward pass.

Where a network encodes tokens in several layers there is also their rollout, the share of each patch in what the class
token ends up with: attention averaged over the heads, half of it replaced by the residual connection, multiplied layer
by layer (Abnar and Zuidema, ACL 2020, arXiv 2005.00928, eq. 1).
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from timm.layers.attention import Attention as TimmAttention
from timm.layers.attention import AttentionRope
from torch import Tensor, nn

from fer.layers.cbam import ChannelGate, SpatialGate
from fer.layers.detail import TokenAttention
from fer.layers.ema_attention import EMAttention
from fer.layers.local_attention import LocalAttention
from fer.layers.pyramid_fusion import PyramidFusion
from fer.layers.score_attention import ResidualScoreAttention
from fer.layers.window_attention import WindowCrossAttention, from_windows
from fer.models.base import ExpressionModule
from fer.models.dan import CrossAttentionHead

Kind = Literal["tokens", "windows", "gates", "branches", "channels", "rollout"]
_LAYER = re.compile(r"\.\d+(?=\.|$)")  # the number of a layer within a stack


class Attention(NamedTuple):
    """What one module attended to.

    Attributes:
        name: of the module within the network; with ``rollout``: of a stack of them.
        kind: what it attends with, see ``values``.
        values: ``tokens``: (B, heads, N, N), ``windows``: (B, windows, heads, N, N), ``rollout``: (B, N, N), each with
            rows that sum to 1; ``gates``: (B, n, H, W); ``branches``: the same, joined by their maximum; ``channels``:
            (B, C).
        map: (B, H, W) the same as one map to look at; None for channels, and for layers within a stack.
    """

    name: str
    kind: Kind
    values: Tensor
    map: Tensor | None


def attention(module: ExpressionModule, image: Tensor) -> list[Attention]:
    """Pass images through a network and read its attention modules, in the order in which they act.

    Args:
        module: the network, in eval mode.
        image: (B, 3, S, S) normalised.
    """
    seen: list[Attention] = []
    network = module.network
    grids = {name: len(layer.cross) for name, layer in network.named_modules() if isinstance(layer, PyramidFusion)}

    def watch(name: str, kind: Kind, layer: nn.Module, hooked: nn.Module, read: Reader) -> None:
        levels = next((number for fusion, number in grids.items() if name.startswith(f"{fusion}.")), 1)

        def look(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            values = read(layer, inputs, output)
            if kind == "windows":
                values = values.reshape(len(image), -1, *values.shape[1:])
            seen.append(Attention(name, kind, values, _as_map(kind, values, levels)))

        stack.callback(hooked.register_forward_hook(look).remove)

    with ExitStack() as stack, torch.inference_mode():
        for name, layer in network.named_modules():
            if isinstance(layer, TimmAttention | AttentionRope):
                stack.enter_context(_unfused(layer))
                watch(name, "tokens", layer, layer.attn_drop, lambda layer, inputs, output: output)
            elif type(layer) in _READERS:
                kind, read = _READERS[type(layer)]
                watch(name, kind, layer, layer, read)
        network(image)
    return list(_with_rollouts(seen))


@contextmanager
def _unfused(layer: Any) -> Iterator[None]:
    """Let a timm module compute its weights openly, where a fused kernel would keep them."""
    before, layer.fused_attn = layer.fused_attn, False
    try:
        yield
    finally:
        layer.fused_attn = before


def _head(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    reduced = layer.reduce(*inputs)
    branches: Tensor = layer.square(reduced) + layer.row(reduced) + layer.column(reduced)
    return branches.relu().sum(1, keepdim=True)


Reader = Callable[[Any, tuple[Any, ...], Any], Tensor]  # (layer, inputs, output) -> values
_READERS: dict[type[nn.Module], tuple[Kind, Reader]] = {
    TokenAttention: ("tokens", lambda layer, inputs, output: layer.weights(*inputs)[:, None]),
    ResidualScoreAttention: ("tokens", lambda layer, inputs, output: output[1].softmax(3)),
    WindowCrossAttention: ("windows", lambda layer, inputs, output: layer.weights(*inputs)),
    ChannelGate: ("channels", lambda layer, inputs, output: layer.gate(*inputs)[:, :, 0, 0]),
    SpatialGate: ("gates", lambda layer, inputs, output: layer.gate(*inputs)),
    EMAttention: ("gates", lambda layer, inputs, output: layer.gate(*inputs)),
    LocalAttention: ("branches", lambda layer, inputs, output: layer.maps(*inputs)),
    CrossAttentionHead: ("gates", _head),
}


def _as_map(kind: Kind, values: Tensor, levels: int) -> Tensor | None:
    """(B, H, W) of the values of an `Attention`; ``levels`` grids of tokens lie over the same image."""
    if kind == "tokens":
        return _looked_at(values.mean(1), levels)
    if kind == "windows":
        # Within each window 1 is what every place would get if all got the same.
        received = values.mean((2, 3)) * values.shape[4]
        window, across = math.isqrt(values.shape[4]), math.isqrt(values.shape[1])
        side = window * across
        return from_windows(received.flatten(0, 1)[..., None], window, side, side)[..., 0]
    if kind == "channels":
        return None
    return values.amax(1) if kind == "branches" else values.mean(1)


def _looked_at(rows: Tensor, levels: int) -> Tensor:
    """(B, N, N) attention -> (B, side, side): what the class token looks at, or without one all tokens on average.

    Args:
        rows: P class and register tokens, then ``levels`` square grids over the same image, which are added.
        levels: how many.
    """
    side = math.isqrt(rows.shape[1] // levels)
    patches = levels * side * side
    row = rows[:, 0] if rows.shape[1] > patches else rows.mean(1)
    return row[:, -patches:].reshape(len(row), levels, side, side).sum(1)


def _with_rollouts(seen: list[Attention]) -> Iterator[Attention]:
    """After the layers of a stack comes their rollout; of the layers only the last keeps a map of its own."""
    stacks: dict[str, list[Attention]] = {}
    for one in seen:
        if one.kind == "tokens" and _LAYER.search(one.name):
            stacks.setdefault(_LAYER.split(one.name)[0], []).append(one)
    ends = {layers[-1].name: name for name, layers in stacks.items()}
    for one in seen:
        stack = stacks.get(_LAYER.split(one.name)[0], [])
        if one.kind != "tokens" or len(stack) < 2:
            yield one
        elif one.name not in ends:
            yield one._replace(map=None)
        else:
            assert one.map is not None
            yield one
            rolled = rollout([layer.values for layer in stack])
            levels = rolled.shape[1] // one.map[0].numel()
            yield Attention(f"{ends[one.name]} rollout", "rollout", rolled, _looked_at(rolled, levels))


def rollout(weights: list[Tensor]) -> Tensor:
    """How much of each token of the first layer reaches each of the last.

    Args:
        weights: (B, heads, N, N) of each layer, rows summing to 1.

    Returns:
        (B, N, N), rows summing to 1.
    """
    same = torch.eye(weights[0].shape[3], dtype=weights[0].dtype, device=weights[0].device)
    total = same
    for layer in weights:
        total = (layer.mean(1) + same) / 2 @ total
    return total
