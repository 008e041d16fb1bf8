"""``trainer.compile`` of each network, in the hand-written loop, where nothing else differs."""

from functools import partial

from fer.benching.models import words
from fer.benching.training import by_hand, composed, prepared, steps_for, twin
from fer.benching.windows import Bench, Row, compare, interleave, timed
from fer.session import compile_parts
from fer.trainer import quieten


def measure(bench: Bench) -> list[Row]:
    """A row of each network."""
    quieten()
    return [_row(bench, model) for model in bench.options["models"]]


def _row(bench: Bench, model: str) -> Row:
    module, data = prepared(composed(*words(bench, model)))
    eager = by_hand(twin(module), data, bf16=True)
    compiled = twin(module)
    compile_parts(compiled, "default")
    with timed() as times:
        window = by_hand(compiled, data, bf16=True)
    steps, _ = steps_for(bench.options["window_seconds"], eager)
    windows = interleave({"compiled": partial(window, steps), "eager": partial(eager, steps)}, bench.windows)
    note = f"compiled in {times.wall:.0f} s, which is not in it"
    return compare(f"`{model}`, `trainer.compile`", windows, "compiled", "eager", note=note)
