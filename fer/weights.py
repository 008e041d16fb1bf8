"""Files of weights: read as tensors alone, checksum verified and told; written whole, checksum beside them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from fer.errors import UserError
from fer.runs import write_bytes, write_text

AT_SHA256 = "@sha256:"  # path@sha256:<checksum>, as containers are named


@dataclass(frozen=True)
class Weights:
    """What a file of weights holds.

    Attributes:
        path: the file.
        tensors: by name, the prefix ``module.`` of data-parallel training removed.
        metadata: of a safetensors file, empty for others.
        source: the file's name and checksum, for the results.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    source: str


def sha256_of(path: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_sha256(text: str) -> bool:
    """Whether a word can be a SHA-256 in hexadecimal."""
    return len(text) == 64 and not set(text) - set("0123456789abcdef")


def read_weights(place: str, option: str, instead: str) -> Weights:
    """Read a safetensors file, or a PyTorch file of tensors and plain values.

    Args:
        place: its path, or ``path@sha256:<checksum>``. The checksum must fit, and so must that of a file
            ``path.sha256`` in the form of the command ``sha256sum`` where there is one.
        option: the config's key that names the file, for messages.
        instead: what the user can do without it, for messages.

    Raises:
        UserError: no such file, another checksum, or a file that holds something else than weights.
    """
    name, _, given = place.partition(AT_SHA256)
    path, beside = Path(name), Path(f"{name}.sha256")
    if not path.is_file():
        raise UserError(f"{option}: there is no file {path}; {instead}")
    found = sha256_of(path)
    wanted = {f"{option}={place}": given.lower()} if given else {}
    if beside.is_file():
        wanted[str(beside)] = beside.read_text().split(maxsplit=1)[0] if beside.read_text().strip() else ""
    for where, checksum in wanted.items():
        if not is_sha256(checksum):
            raise UserError(
                f"{where}: '{checksum}' is no SHA-256, expected 64 hexadecimal digits; that file has {found}"
            )
        if checksum != found:
            raise UserError(f"{path} has SHA-256 {found}, but {where} says {checksum}: it is another file, or damaged")
    try:
        tensors, metadata = _read(path)
    except Exception as error:  # whatever is wrong with the file, the user wants one sentence
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{option}: {path} cannot be read as weights ({why}); {instead}") from None
    return Weights(path, tensors, metadata, f"{path.name} sha256:{found}")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    else:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content = next((content[key] for key in ("state_dict", "model") if key in content), content)
    tensors = {k.removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}
    return tensors, metadata


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file, and ``<path>.sha256`` beside it in the form of the command ``sha256sum``.

    Returns:
        The SHA-256.
    """
    beside = path.with_name(f"{path.name}.sha256")
    beside.unlink(missing_ok=True)  # never another file's checksum beside this one
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(content, dict(metadata)))
    checksum = sha256_of(path)
    write_text(beside, f"{checksum}  {path.name}\n")
    return checksum
