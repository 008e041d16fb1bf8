"""What the report counts on in a run's config and ``results.json``, checked before anything of them is believed.

A shape is a type, or None for null; a list of one shape, that of each entry; a dictionary of shapes by key, where a key
that ends with ``?`` may be missing and ``*`` stands for every key; or a tuple of shapes, any of which will do.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fer.errors import UserError

FIGURE = (None, int, float)  # null where it is not known
FIGURES, COUNTS = {"*": FIGURE}, {"*": int}
RESULTS = {
    "classes": [str],
    "n": {"train": int, "val": int, "test": int, "*": int},
    "metrics": {"test": FIGURES},
    "confusion": {"test": [[int]]},
    **dict.fromkeys(("split_fingerprint", "selected_on", "tta", "weights"), str),
    "best_epoch": int,
    "stamps?": [str],
    **dict.fromkeys(("seconds?", "cpu_seconds?", "epochs?", "parameters?", "forward_flops?"), FIGURE),
    "images_per_second?": (None, FIGURES),
    "detection_seconds_per_image?": (None, {"median": FIGURE, "p95": FIGURE, "device": str}),
    "data_facts?": (
        None,
        {
            "counts?": (None, {"*": COUNTS}),
            **dict.fromkeys(("copies?", "shared_subjects?"), (None, COUNTS)),
            **dict.fromkeys(("count_differences?", "warnings?"), (None, [str])),
        },
    ),
}
CONFIG = {"seed?": (None, int), "protocol?": (None, {"fold?": (None, int)}), "data?": (None, {})}
NAMES = {str: "text", int: "whole number", float: "figure", None: "null"}


def check(path: Path, content: Any, shape: Any) -> None:
    """Refuse the content of a file.

    Args:
        path: the file.
        content: what it holds.
        shape: `RESULTS` or `CONFIG`.

    Raises:
        UserError: a key is missing or its value of another kind.
    """
    for problem in _misfits(content, shape, ""):
        raise UserError(f"{path}: {problem}, so the run folder is damaged")


def _misfits(value: Any, shape: Any, name: str) -> Iterator[str]:
    """What is wrong with a value of this dotted name."""
    if isinstance(shape, tuple):
        found = [list(_misfits(value, one, name)) for one in shape]
        yield from found[-1] if all(found) else []
    elif isinstance(shape, list | dict) and not isinstance(value, type(shape)):
        yield f"{name or 'its content'} is no {'list' if isinstance(shape, list) else 'set of keys'}"
    elif isinstance(shape, list):
        for one in value:
            yield from _misfits(one, shape[0], f"an entry of {name}")
    elif isinstance(shape, dict):
        yield from _misfits_of_keys(value, shape, name and f"{name}.")
    elif not (value is None if shape is None else isinstance(value, shape)):
        yield f"{name} is no {NAMES[shape]}"


def _misfits_of_keys(value: Any, shape: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, inner in shape.items():
        name = key.removesuffix("?")
        if key == "*":
            for other in value:
                yield from _misfits(value[other], inner, f"{prefix}{other}")
        elif name in value:
            yield from _misfits(value[name], inner, f"{prefix}{name}")
        elif name == key:
            yield f"{prefix}{name} is missing"
