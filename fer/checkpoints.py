"""Checkpoints: written whole or not at all, with their checksum inside, read as data, the one before at hand.

A checkpoint is the zip file `torch.save` makes. Its SHA-256 stands in the zip's own comment, so that file and checksum
cannot get out of step, and every program that reads zip files reads it still.
"""

import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from fer.errors import UserError
from fer.runs import RunFolder, write_bytes

log = logging.getLogger(__name__)
MARK = b"sha256:"
COMMENT = len(MARK) + 64  # bytes
CHUNK = 1 << 20


class CheckpointFiles(TorchCheckpointIO):
    """How Lightning writes and reads checkpoints here.

    Its own writer stages in the system's temporary folder and moves, which is not atomic across file systems, and
    flushes nothing to the disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint under its name when it is whole.

        Args:
            checkpoint: tensors and plain containers.
            path: the file.
            storage_options: ``{"previous": path}`` keeps what ``path`` was under that name.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()  # torch's writer answers a full disk with errors of its own
        torch.save(checkpoint, buffer)
        _seal(buffer)
        write_bytes(target, buffer.getbuffer(), **(storage_options or {}))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Load tensors and plain containers; anything else in the file is refused, whatever the caller asks."""
        return load_checkpoint(Path(path))


def _seal(buffer: io.BytesIO) -> None:
    """Put the SHA-256 of a zip file without comment into its comment, whose length are the file's last two bytes."""
    with buffer.getbuffer() as content:
        comment = MARK + hashlib.sha256(content).hexdigest().encode()
    buffer.seek(-2, io.SEEK_END)
    buffer.write(len(comment).to_bytes(2, "little") + comment)


def is_damaged(path: Path) -> bool:
    """Whether a checkpoint is not what was written. One without a checksum, which torch alone wrote, is not."""
    size = path.stat().st_size - COMMENT - 2
    with path.open("rb") as file:
        if size < 0:
            return False
        file.seek(size + 2)
        comment = file.read()
        if not comment.startswith(MARK):
            return False
        file.seek(0)
        digest = hashlib.sha256()
        while size:
            piece = file.read(min(CHUNK, size))
            digest.update(piece)
            size -= len(piece)
    digest.update(b"\0\0")  # the comment's length, when there was none
    return comment != MARK + digest.hexdigest().encode()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Raises:
        UserError: missing, damaged, truncated, or holding more than tensors and plain containers.
    """
    try:
        if is_damaged(path):
            raise UserError(f"{path} is damaged: its content has not the SHA-256 it was written with")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"it holds one {type(content).__name__}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: expected a checkpoint written by python -m fer.train") from None
    except UserError:
        raise
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} cannot be loaded as a checkpoint of tensors and plain values ({first_line})") from None
    return content


def load_best(folder: RunFolder) -> dict[str, Any]:
    """The checkpoint of a run's best epoch.

    Raises:
        UserError: it cannot be loaded, and what makes it anew.
    """
    try:
        return load_checkpoint(folder.best)
    except UserError as error:
        command = folder.status().get("command", "python -m fer.train ...")
        again = f"{command} hydra.run.dir={folder.path} fresh=true"
        raise UserError(f"{error}; no other file has these weights, train the run anew: {again}") from None


def resume_point(folder: RunFolder) -> Path:
    """The newest checkpoint of an unfinished run that can be used; says so when that is not the last one.

    Raises:
        UserError: there is none.
    """
    problems = []
    for path in (folder.last, folder.previous):
        if not path.exists():  # a kill between two renames leaves the one before alone
            continue
        try:
            content = load_checkpoint(path)
            if not {"global_step", "loops", "state_dict"} <= set(content):
                raise UserError(f"{path} is no checkpoint of a training")
        except UserError as error:
            problems.append(str(error))
            continue
        if problems:
            log.warning("%s; going on from %s, of step %d", problems[0], path, content["global_step"])
        return path
    raise UserError(f"{'; '.join(problems)}; there is nothing to go on from, fresh=true starts the run anew")
