"""``python -m fer.demo``: a local page that names the expressions of faces in a photograph or a camera's picture.

python -m fer.demo run=outputs/.../<run>
"""

from omegaconf import DictConfig

from fer.config import argument_problems, resolved, start
from fer.errors import UserError
from fer.predict import make_recognizer, run_problems

CONFIG = "demo"


def run(config: DictConfig) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: anything the user can mend, all problems of the config at once.
    """
    plain = resolved(config)
    problems = argument_problems({"detector": plain["detector"]}) + run_problems(plain)
    port = plain["port"]
    if isinstance(port, bool) or not isinstance(port, int) or not 1024 <= port <= 65535:
        problems.append(f"port={port}: expected a number, 1024 to 65535")
    if problems:
        raise UserError("\n".join(problems))
    try:
        from fer.prediction.server import serve
    except ImportError as error:
        raise UserError(f"the page needs aiohttp ({error}): pip install 'fer-bench[demo]'") from None
    serve(make_recognizer(config), port)


def main() -> None:
    """The command."""
    start(CONFIG, run)


if __name__ == "__main__":
    main()
