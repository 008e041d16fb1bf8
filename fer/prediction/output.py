"""The folder a prediction leaves.

<output>/predictions.jsonl   a line per picture or frame: input, (frame, time,) calibrated, faces
<output>/predictions.csv     a row per face
<output>/annotated/          the pictures and videos, drawn into
<output>/errors.csv          input,reason: what could not be read, where there is such
<output>/prediction.json     the run, how faces were found and cut, counts

Everything is written in ``<output>.unfinished`` as it comes and renamed at the end, also after Ctrl-C: a folder of the
final name holds whole files only.
"""

import contextlib
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import cv2
import numpy as np

from fer.data.images import EXTENSIONS, Pixels
from fer.errors import UserError
from fer.prediction.sources import Frame
from fer.recognizer import Face
from fer.runs import write_json

PLACE = ("x", "y", "width", "height")
MOST_WEBP = 16_383  # px of a side that WEBP can hold; JPEG holds more, PNG all


class _Video(NamedTuple):
    """A video being written: what of, its width and height, its writer."""

    input: str
    size: tuple[int, int]
    writer: cv2.VideoWriter


class Output:
    """Takes frame after frame; a context, whose end gives the folder its name.

    Args:
        folder: the output, new or empty.
        class_names: columns of the table.
        calibrated: whether probabilities are.

    Attributes:
        counts: ``pictures`` (frames of videos too) and ``faces`` so far.

    Raises:
        UserError: the folder is taken, or cannot be written.
    """

    def __init__(self, folder: Path, class_names: Sequence[str], calibrated: bool) -> None:
        self.folder, self.unfinished = folder, folder.with_name(folder.name + ".unfinished")
        self.class_names, self.calibrated = list(class_names), calibrated
        self.counts = {"pictures": 0, "faces": 0}
        self._video: _Video | None = None
        self._shown = 0  # frames in the video so far
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"output={folder} holds other files: choose a folder that is new or empty")
        if self.unfinished.exists():
            raise UserError(
                f"{self.unfinished} is of a prediction that was killed or still runs: remove it or take another output"
            )
        with _disk(self.unfinished):
            (self.unfinished / "annotated").mkdir(parents=True)
            self._lines = (self.unfinished / "predictions.jsonl").open("w", encoding="utf-8", errors="backslashreplace")
            self._table = (self.unfinished / "predictions.csv").open(
                "w", encoding="utf-8", errors="backslashreplace", newline=""
            )
        self._rows = csv.writer(self._table, lineterminator="\n")
        self._rows.writerow(("input", "frame", "time", "face", *PLACE, "expression", "probability", *self.class_names))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Give what was written its name, whatever the reason to stop."""
        with _disk(self.unfinished):
            self._end_video()
            self._lines.close()
            self._table.close()
            if not any((self.unfinished / "annotated").iterdir()):
                (self.unfinished / "annotated").rmdir()
            if self.folder.is_dir():
                self.folder.rmdir()
            self.unfinished.rename(self.folder)

    def add(self, frame: Frame, faces: Sequence[Face], annotated: Pixels | None) -> None:
        """Write one frame's answers, and the picture drawn into where there is one."""
        place = {} if frame.number is None else {"frame": frame.number, "time": frame.time}
        line = {"input": frame.input, **place, "calibrated": self.calibrated, "faces": [f.as_json() for f in faces]}
        with _disk(self.unfinished):
            self._lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            for number, face in enumerate(faces):
                where = ("", "") if frame.number is None else (frame.number, frame.time)
                values = (*face.box, face.expression, face.probability, *face.probabilities.values())
                self._rows.writerow((frame.input, *where, number, *values))
            if annotated is not None:
                self._draw(frame, annotated)
        self.counts["pictures"] += 1
        self.counts["faces"] += len(faces)

    def finish(self, errors: Sequence[tuple[str, str]], record: dict[str, Any]) -> None:
        """Write what could not be read and how the answers came about."""
        with _disk(self.unfinished):
            if errors:
                with (self.unfinished / "errors.csv").open(
                    "w", encoding="utf-8", errors="backslashreplace", newline=""
                ) as file:
                    csv.writer(file, lineterminator="\n").writerows([("input", "reason"), *errors])
            write_json(self.unfinished / "prediction.json", {**record, **self.counts, "errors": len(errors)})

    def _draw(self, frame: Frame, annotated: Pixels) -> None:
        picture = np.ascontiguousarray(annotated[..., ::-1])  # OpenCV's order of colours
        path = self.unfinished / "annotated" / frame.input
        path.parent.mkdir(parents=True, exist_ok=True)
        if frame.fps is None:
            if path.suffix.lower() not in EXTENSIONS or max(picture.shape[:2]) > MOST_WEBP:
                path = path.with_name(path.name + ".png")
            _, content = cv2.imencode(path.suffix.lower(), picture)
            path.write_bytes(content.tobytes())
            return
        if self._video is None or self._video.input != frame.input:
            self._end_video()
            path = path.with_name(path.name + ("" if path.suffix.lower() == ".mp4" else ".mp4"))
            size = (picture.shape[1], picture.shape[0])
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), frame.fps, size)
            if not writer.isOpened():
                raise UserError(f"{path} cannot be written as a video: set annotate=false to go without pictures")
            self._video, self._shown = _Video(frame.input, size, writer), 0
        if picture.shape[1::-1] != self._video.size:  # a stream may change its size
            picture = np.asarray(cv2.resize(picture, self._video.size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        # A camera gives frames when it can; some are repeated, so that the video keeps time.
        due = round((frame.time or 0) * frame.fps) + 1
        for _ in range(max(due - self._shown, 1)):
            self._video.writer.write(picture)
            self._shown += 1

    def _end_video(self) -> None:
        if self._video is not None:
            self._video.writer.release()
            self._video = None


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A full or read-only disk is told in a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written ({error.strerror}): choose another output"
        ) from None
