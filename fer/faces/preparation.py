"""A data set of photographs becomes a data root of aligned faces that ``data=folder`` reads.

<output>/{train,val,test}/<class>/name.png   or <output>/<class>/name.png where the data set has no official parts
<output>/subjects.csv                        path,subject: the people, else the sequences, where the data set knows them
<output>/manifest.csv                        a row per face: where it came from and how it was cut
<output>/no_face.csv                         a row per picture without one, with the reason
<output>/prepared.json                       the settings

The work is done in ``<output>.unfinished``, renamed when complete, so that nobody trains on half a data set. A row is
written before its file and each file appears whole, so whatever is killed, the next start does again only the one
picture that was in hand. Pictures whose file, class, part or subject changed are done anew, those gone are removed.
"""

import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from filelock import FileLock, Timeout
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fer.data.base import ExpressionDataModule, Image
from fer.data.images import BadImage
from fer.data.manifest import Manifest
from fer.errors import UserError
from fer.faces.align import GEOMETRY, align, five_points
from fer.faces.detect import Detector, choose
from fer.faces.tables import Names, Row, Table, write_changed
from fer.runs import read_json, write_bytes, write_json

Array = np.ndarray[Any, Any]

SAME = ("item", "class", "split", "subject", "source")  # a picture is done when these are as they were
FACES = ("file", *SAME, "aligned_by", "box", "landmarks", "confidence", "transform")
NO_FACE = (*SAME, "reason")
UNREADABLE = "cannot be read: "


@dataclass(frozen=True)
class Summary:
    """What a prepared data root holds: numbers of pictures."""

    output: Path
    kept: int  # done by an earlier start
    landmarks: int
    box: int
    no_face: int
    unreadable: int


class Preparation:
    """Aligns every picture of a data set into a new data root, going on where an earlier start stopped.

    Args:
        data: the data set; its store is not needed.
        manifest: what ``data.manifest()`` said.
        detector: what finds the faces; None to use the manifest's own landmarks and boxes.
        size: side of the crops in pixels.
        margin: see `fer.faces.align`.
        output: the new root.
        record: plain values that say how ``detector`` was made; a start with others is refused.
    """

    def __init__(
        self,
        data: ExpressionDataModule,
        manifest: Manifest,
        detector: Detector | None,
        *,
        size: int,
        margin: float,
        output: Path,
        record: dict[str, Any],
    ) -> None:
        self.data, self.manifest, self.detector = data, manifest, detector
        self.size, self.margin, self.output = size, margin, output.absolute()
        self.unfinished = self.output.with_name(self.output.name + ".unfinished")
        settings = {
            **record,
            "size": size,
            "margin": margin,
            "geometry": GEOMETRY,
            "reader": f"{type(data).__module__}.{type(data).__qualname__}",
            "options": data.manifest_options,
        }
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as it will be read back
        # The group a picture must stay with: its person, else its video.
        people = manifest.sequence if manifest.subject is None else manifest.subject
        self.people = None if people is None else people.tolist()
        self.items: list[str] = manifest.item.tolist()
        self._check()

    def _check(self) -> None:
        root, output, manifest, title = Path(self.data.root), self.output.resolve(), self.manifest, self.data.title
        if self.data.on_disk and output.is_relative_to(root.resolve()):
            raise UserError(f"output={self.output} lies in data.root={root}: choose an output elsewhere")
        if self.detector is None and manifest.landmarks is None and manifest.box is None:
            raise UserError(f"{title} brings neither landmarks nor boxes: set use_manifest_landmarks=false")
        if 0 < (manifest.split == "").sum() < len(manifest):
            raise UserError(f"{title}: some pictures belong to an official part and some to none; prepare them apart")

    def run(self) -> Summary:
        """Do what is not done yet, then give the folder its name.

        Raises:
            UserError: the output is taken, no picture has a face, or some cannot be read under ``on_bad_image=fail``.
        """
        self.output.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.output.with_name(f".{self.output.name}.lock"), timeout=0)
        try:
            with lock:
                try:
                    summary = self._run()
                finally:
                    Path(lock.lock_file).unlink(missing_ok=True)
        except Timeout:
            raise UserError(f"output={self.output} is being prepared by another process: wait for its end") from None
        if not summary.landmarks + summary.box:
            raise UserError(
                f"none of the {len(self.items)} pictures has a face, see {self.output / 'no_face.csv'}: try another "
                "detector, or use_manifest_landmarks=true where the data set brings landmarks"
            )
        return summary

    def _run(self) -> Summary:
        self.folder = self._claim()
        self.faces = Table(self.folder / "manifest.csv", FACES)
        self.no_face = Table(self.folder / "no_face.csv", NO_FACE)
        self.sources = _sources(self.data, self.manifest)
        pending = [row for row in range(len(self.items)) if not self._done(row)]
        kept = set(self.items) - {self.items[row] for row in pending}
        stale = (self.faces.rows.keys() | self.no_face.rows.keys()) - kept
        if (pending or stale) and self.folder == self.output:
            self._move(self.unfinished)
        for item in stale:
            self.no_face.rows.pop(item, None)
            if old := self.faces.rows.pop(item, None):
                (self.folder / old["file"]).unlink(missing_ok=True)
        if pending:
            self._align(pending)
        self._finish()
        reasons = [row["reason"].startswith(UNREADABLE) for row in self.no_face.rows.values()]
        by = [row["aligned_by"] for row in self.faces.rows.values()]
        return Summary(
            output=self.output,
            kept=len(kept),
            landmarks=by.count("landmarks"),
            box=by.count("box"),
            no_face=reasons.count(False),
            unreadable=reasons.count(True),
        )

    def _claim(self) -> Path:
        """The folder of an earlier start with the same settings, else a new one."""
        taken = self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir()))
        folder = self.output if taken else self.unfinished
        said = folder / "prepared.json"
        if taken and not said.exists():
            raise UserError(f"output={self.output} holds other files: choose a folder that is new or empty")
        if taken and self.unfinished.exists():
            raise UserError(f"{self.output} and {self.unfinished} both exist: remove one of them")
        if not said.exists():
            folder.mkdir(exist_ok=True)
            write_json(said, self.settings)
        before = read_json(said)
        differ = [key for key in self.settings if before.get(key) != self.settings[key]]
        if differ:
            raise UserError(
                f"{folder} was prepared with other {', '.join(differ)} (see {said.name}): choose another output, or "
                "remove it"
            )
        return folder

    def _done(self, row: int) -> bool:
        """Whether a picture is as it was and needs nothing; forgets what a redone picture was before a kill."""
        item = self.items[row]
        if item in self.faces.rows and (self.folder / self.faces.rows[item]["file"]).is_file():
            self.no_face.rows.pop(item, None)
            before = self.faces.rows[item]
        else:
            self.faces.rows.pop(item, None)
            before = self.no_face.rows.get(item, {"reason": UNREADABLE})
            if before["reason"].startswith(UNREADABLE):  # tried again: its disk may have been away
                return False
        return self._same(row).items() <= before.items()

    def _same(self, row: int) -> Row:
        return {
            "item": self.items[row],
            "class": self.manifest.class_names[self.manifest.label[row]],
            "split": str(self.manifest.split[row]),
            "subject": "" if self.people is None else self.people[row],
            "source": self.sources[row],
        }

    def _align(self, rows: list[int]) -> None:
        names = Names(row["file"] for row in self.faces.rows.values())
        columns = (TextColumn("aligning"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}")) as progress:
            task = progress.add_task("", total=len(rows), note="")
            without = 0
            for row, image in zip(rows, self.data.images(self.manifest, np.array(rows)), strict=True):
                fields = self._same(row)
                found = UNREADABLE + image.reason if isinstance(image, BadImage) else self._cut(row, image)
                if isinstance(found, str):
                    without += 1
                    self.no_face.add({**fields, "reason": found})
                else:
                    crop, more = found
                    file = names.new("/".join(filter(None, (fields["split"], fields["class"]))), fields["item"])
                    self.faces.add({"file": file, **fields, **more})
                    path = self.folder / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_bytes(path, _png(crop))
                progress.update(task, advance=1, note=f"{without} without a face" if without else "")

    def _cut(self, row: int, image: Image) -> tuple[Image, Row] | str:
        """The crop and how it was cut, or the reason why there is none."""
        box = None if self.manifest.box is None else self.manifest.box[row].astype(np.float64)
        confidence = ""
        if self.detector is None:
            landmarks = None if self.manifest.landmarks is None else five_points(self.manifest.landmarks[row])
        else:
            faces = self.detector.detect(image)
            face = choose(faces, image.shape, box)
            if face is None:
                return f"none of the {len(faces)} faces found lies in the annotated box" if faces else "no face found"
            landmarks, box, confidence = face.landmarks, face.box, f"{face.confidence:.4f}"
        crop = align(image, self.size, self.margin, landmarks, box)
        if crop is None:
            return "the manifest's landmarks and box place no face"
        return crop.image, {
            "aligned_by": crop.by,
            "box": _numbers(box, ".2f"),
            "landmarks": _numbers(landmarks, ".2f"),
            "confidence": confidence,
            "transform": _numbers(crop.transform, ".9g"),
        }

    def _finish(self) -> None:
        """Write the tables in the data set's order and give the folder its name."""
        for table in (self.faces, self.no_face):
            table.write([item for item in self.items if item in table.rows])
        bad = sum(row["reason"].startswith(UNREADABLE) for row in self.no_face.rows.values())
        if bad and self.data.on_bad_image == "fail":
            raise UserError(
                f"{bad} of {len(self.items)} pictures cannot be read, see {self.no_face.path}: mend them, or go on "
                "without them by data.on_bad_image=skip"
            )
        if self.people is not None:
            # A picture of nobody known is a person of its own.
            rows = [(row["file"], row["subject"] or row["file"]) for row in self.faces.rows.values()]
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\n").writerows([("path", "subject"), *sorted(rows)])
            write_changed(self.folder / "subjects.csv", text.getvalue())
        if self.folder == self.unfinished:
            for left in self.folder.rglob(".*.png.*"):  # begun when an earlier start was killed
                left.unlink()
            self._move(self.output)

    def _move(self, target: Path) -> None:
        try:
            self.folder.rename(target)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be renamed to {target} ({error.strerror})") from None
        self.folder = target
        for table in (self.faces, self.no_face):
            table.path = target / table.path.name


def _sources(data: ExpressionDataModule, manifest: Manifest) -> list[str]:
    """What tells that a picture's source has changed.

    Size and modification time of a file; the whole source's fingerprint for a row of a table or a drawn picture.
    """
    sources = []
    for item in manifest.item.tolist():
        try:
            status = os.stat(Path(data.root) / item)
            sources.append(f"{status.st_size} bytes, {status.st_mtime_ns}")
        except (OSError, ValueError):
            sources.append("")
    on_disk = [data.on_disk and bool(source) for source in sources]
    whole = "" if all(on_disk) else data.source_fingerprint()[:16]
    return [source if there else whole for source, there in zip(sources, on_disk, strict=True)]


def _png(crop: Image) -> bytes:
    _, content = cv2.imencode(".png", crop if crop.ndim == 2 else cv2.cvtColor(crop, cv2.COLOR_RGB2BGR))
    return content.tobytes()


def _numbers(values: Array | None, form: str) -> str:
    """Numbers with blanks between them, empty where all are unknown."""
    if values is None or np.isnan(values).all():
        return ""
    return " ".join(format(value, form) for value in np.ravel(values).tolist())
