"""fer: an honest experiment bench for facial expression recognition."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fer.recognizer import Recognizer as Recognizer

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``fer.Recognizer``, imported when it is asked for: it needs torch, which commands answer --help without."""
    if name == "Recognizer":
        from fer.recognizer import Recognizer

        return Recognizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
