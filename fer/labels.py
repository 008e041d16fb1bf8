"""The canonical expressions. Every data set maps its own labels to these names, never to bare indices."""

from collections.abc import Collection, Iterable, Sequence

from fer.errors import UserError

EXPRESSIONS = ("anger", "contempt", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")
BASIC_7 = ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")

_SYNONYMS = {
    "angry": "anger",
    "contemptuous": "contempt",
    "disgusted": "disgust",
    "fearful": "fear",
    "afraid": "fear",
    "happy": "happiness",
    "joy": "happiness",
    "normal": "neutral",
    "sad": "sadness",
    "surprised": "surprise",
} | {name: name for name in EXPRESSIONS}


def canonical(name: str) -> str:
    """Return the canonical name of an expression: ``" Angry " -> "anger"``.

    Raises:
        UserError: ``name`` is neither a canonical expression nor a known synonym.
    """
    try:
        return _SYNONYMS[name.strip().lower()]
    except KeyError:
        raise UserError(
            f"unknown expression name '{name}': expected one of {', '.join(EXPRESSIONS)} or a synonym "
            f"({', '.join(sorted(set(_SYNONYMS) - set(EXPRESSIONS)))})"
        ) from None


def spelled_as(names: Iterable[str], known: Collection[str]) -> list[str]:
    """``names`` as ``known`` has them: ``happy`` is ``happiness`` where only that is known; others stay as they are."""
    found = []
    for name in names:
        other = _SYNONYMS.get(name.strip().lower(), name)
        found.append(other if name not in known and other in known else name)
    return found


def index_map(source: Sequence[str], target: Sequence[str]) -> list[int]:
    """Index of every ``source`` class in ``target``, by name; -1 where ``target`` lacks it."""
    position = {name: i for i, name in enumerate(target)}
    return [position.get(name, -1) for name in source]


def canonical_all(names: Iterable[str]) -> tuple[str, ...]:
    """`canonical` over many names, in order."""
    return tuple(canonical(name) for name in names)
