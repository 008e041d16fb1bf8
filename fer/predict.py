"""``python -m fer.predict``: every face of photographs or videos, its expression and how probable that is.

python -m fer.predict run=outputs/.../<run> input=photo.jpg
python -m fer.predict run=outputs/.../<run> input=film.mp4 every=5 output=answers

Exit code 0: done, files that could not be read are listed; 2: nothing could be read, or a mistake; 130: stopped, what
was done is kept.
"""

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from fer.config import CONF, argument_problems, check_command_line, guarded, resolved
from fer.errors import UserError

if TYPE_CHECKING:
    from fer.prediction.output import Output
    from fer.prediction.sources import Source
    from fer.recognizer import Recognizer

CONFIG = "predict"
STOPPED = 130
NAMED = 20  # unreadable files that are printed; errors.csv has all


def run(config: DictConfig) -> bool:
    """Look at everything and write the answers.

    Returns:
        Whether it was done to the end, and not stopped by Ctrl-C.

    Raises:
        UserError: anything the user can mend, all problems of the config at once, or nothing could be read.
    """
    plain = resolved(config)
    problems = argument_problems({"detector": plain["detector"]}) + _value_problems(plain)
    if problems:
        raise UserError("\n".join(problems))

    from fer.prediction.output import Output
    from fer.prediction.sources import Source

    folder = Path(plain["output"])
    source = Source(plain["input"], every=plain["every"], limit=plain["limit"], leave_out=folder)
    recognizer = make_recognizer(config)
    with Output(folder, recognizer.class_names, recognizer.calibrated) as output:
        whole = _look(source, recognizer, output, plain["annotate"])
        framing, temperature = recognizer.framing.as_json(), recognizer.temperature
        record = {
            **{key: plain[key] for key in ("run", "input", "detector", "every", "limit")},
            **{"framing": framing, "temperature": temperature, "calibrated": recognizer.calibrated},
            **{"whole": whole, "stamps": recognizer.run.results["stamps"]},
            "command": shlex.join(["python", "-m", "fer.predict", *sys.argv[1:]]),
        }
        output.finish(source.bad, record)
    _tell(source, output)
    return whole


def make_recognizer(config: DictConfig) -> "Recognizer":
    """What ``run=``, ``detector=``, ``device=`` and ``framing`` ask for; fer.demo has them too."""
    from hydra.utils import instantiate

    from fer.recognizer import Recognizer

    framing = {str(key): value for key, value in config.framing.items() if value is not None}
    return Recognizer.load(config.run, detector=instantiate(config.detector), device=config.device, framing=framing)


def _value_problems(plain: dict[str, Any]) -> list[str]:
    problems = run_problems(plain)
    given, every, limit = plain["input"], plain["every"], plain["limit"]
    if given == "???" or isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        problems.append("input is missing: set input= to a picture, a folder, a video, or the number of a camera")
    if not isinstance(plain["output"], str) or not plain["output"]:
        problems.append(f"output={plain['output']}: expected the name of a new folder")
    if not isinstance(plain["annotate"], bool):
        problems.append(f"annotate={plain['annotate']}: expected true or false")
    for key, value in {"every": every, "limit": 1 if limit is None else limit}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            problems.append(f"{key}={value}: expected a number of frames, 1 or more")
    return problems


def run_problems(plain: dict[str, Any]) -> list[str]:
    """What is wrong with the values that fer.demo has too."""
    problems = []
    if not isinstance(plain["run"], str) or plain["run"] in ("", "???"):
        problems.append("run is missing: set run= to a finished run folder, such as outputs/rafdb-convcut/<time>")
    if not isinstance(plain["device"], str) or not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", plain["device"]):
        problems.append(f"device={plain['device']}: expected auto, cpu, cuda, cuda:1 ...")
    for key, (low, high, what) in {
        "size": (16, 2048, "a number of pixels"),
        "margin": (-0.25, 2, "a share of the face"),
        "shift": (-1, 1, "a number of eye distances"),
    }.items():
        value = plain["framing"][key]
        number = int if key == "size" else int | float
        if value is not None and (isinstance(value, bool) or not isinstance(value, number) or not low <= value <= high):
            problems.append(f"framing.{key}={value}: expected {what}, {low} to {high}")
    return problems


def _look(source: "Source", recognizer: "Recognizer", output: "Output", annotated: bool) -> bool:
    """Read, answer and write, a few pictures at a time; False when Ctrl-C ended it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fer.prediction.drawing import annotate

    columns = (TextColumn("looking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}")) as progress:
        task = progress.add_task("", total=len(source) or None, note="")
        try:
            for frames in source.batches():
                for frame, faces in zip(frames, recognizer.predict([frame.image for frame in frames]), strict=True):
                    picture = annotate(frame.image, faces, recognizer.class_names) if annotated else None
                    output.add(frame, faces, picture)
                progress.update(task, completed=output.counts["pictures"], note=f"{output.counts['faces']:,} faces")
        except KeyboardInterrupt:
            return False
    return True


def _tell(source: "Source", output: "Output") -> None:
    """What was found, what could not be read, and where it lies."""
    pictures, faces = output.counts["pictures"], output.counts["faces"]
    if not pictures and len(source.bad) == 1:
        raise UserError("{}: {}".format(*source.bad[0]))
    for name, reason in source.bad[:NAMED]:
        print(f"{name if name.isprintable() else ascii(name)[1:-1]}: {reason}")
    if len(source.bad) > NAMED:
        print(f"and {len(source.bad) - NAMED:,} more: {output.folder / 'errors.csv'}")
    if not pictures and source.bad:
        raise UserError(f"none of {len(source.bad):,} files could be read, see {output.folder / 'errors.csv'}")
    bad = f", {_many(len(source.bad), 'file')} with errors (errors.csv)" if source.bad else ""
    print(f"{_many(faces, 'face')} in {_many(pictures, 'picture')}{bad}: {output.folder}")


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


@hydra.main(config_path=str(CONF), config_name=CONFIG, version_base="1.3")
def _job(config: DictConfig) -> None:
    if not guarded(lambda: run(config)):
        print("interrupted; what was done is kept", file=sys.stderr)
        sys.exit(STOPPED)


def main() -> None:
    """The command."""
    check_command_line(CONFIG, sys.argv[1:])
    try:
        _job()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
