"""Image files: the one decoding rule, used by every reader, by prediction and by serving alike.

The rule, on every machine and in every command:

- JPEG, PNG, WEBP and BMP, told apart by content and never by extension; anything else is refused.
- A file cut short is refused, also a JPEG that lacks only its end marker: libjpeg fills what is missing with grey, so
  nothing shows afterwards that pixels are invented. So is a PNG one of whose checksums is wrong. A JPEG has none: bytes
  changed in the middle of one give other pixels, which only a checksum of the file could tell.
- More than `MAX_PIXELS` are refused from the header, before memory is spent, and so is a JPEG that promises more than
  its bytes can hold.
- 16-bit grey is divided by 257 (65535 becomes 255). 16-bit colour keeps its high byte, at most one level away.
- Transparent pixels are laid over white, as a viewer shows them.
- CMYK and palette pictures become RGB; the EXIF orientation is applied.
- Animations are refused. Of an MPO file (a JPEG with further views) the first view is read.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from fer.errors import UserError

MAX_PIXELS = 50_000_000
MAX_BYTES = 500_000_000  # more than so many pixels need in any format
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

NO_FILE = "no such file"  # a `BadImage.reason`

# Pictures people keep in class folders that the rule above does not read: worth a line in the report, unlike notes.txt.
_OTHER_PICTURES = (".gif", ".tif", ".tiff", ".heic", ".avif", ".jp2")
_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class BadImage(Exception):
    """An image that cannot be used.

    Attributes:
        path: the file.
        reason: why, in a few words for a table.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def read_image(path: Path) -> Pixels:
    """Decode an image file by the rule of this module.

    Returns:
        (H, W) uint8 for a grey file, otherwise (H, W, 3) uint8 RGB.

    Raises:
        BadImage: the file is missing, not a regular file, empty, truncated, too large or of another format.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise BadImage(path, NO_FILE if isinstance(error, FileNotFoundError) else str(error)) from error
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for ever
        raise BadImage(path, "not a regular file")
    if status.st_size == 0:
        raise BadImage(path, "the file is empty (0 bytes)")
    if status.st_size > MAX_BYTES:
        raise BadImage(path, f"a file of {status.st_size:,} bytes, more than a picture needs")
    try:
        with PIL.Image.open(path, formats=FORMATS) as image:
            reason = _header_problem(image, status.st_size)
            if reason is not None:
                raise BadImage(path, reason)
            if image.format != "PNG":
                return _to_uint8(_upright(image))
            image.verify()  # its checksums, which decoding passes over; the picture must then be opened again
        with PIL.Image.open(path, formats=["PNG"]) as image:
            return _to_uint8(_upright(image))
    except BadImage:
        raise
    except PIL.UnidentifiedImageError as error:
        raise BadImage(path, f"content is not {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from error
    except PIL.Image.DecompressionBombError as error:
        raise BadImage(path, f"more than {MAX_PIXELS // 1_000_000} million pixels") from error
    except Exception as error:  # damaged bytes make decoders raise nearly anything
        reason = "cut short (truncated)" if "truncated" in str(error).lower() else f"cannot be decoded ({error})"
        raise BadImage(path, reason) from error


def _header_problem(image: PIL.Image.Image, size: int) -> str | None:
    """Why a picture is not worth decoding, from its header and its ``size`` in bytes."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        return f"{width} x {height} pixels, more than {MAX_PIXELS // 1_000_000} million"
    # Each block of 8 x 8 pixels takes a bit at least.
    if image.format in ("JPEG", "MPO") and (width // 8) * (height // 8) > 8 * size:
        return f"cut short (truncated): {size:,} bytes cannot hold {width} x {height} pixels"
    if image.format != "MPO" and getattr(image, "is_animated", False):
        return "an animation, not a single picture"
    return None


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Apply the EXIF orientation; an EXIF block that cannot be read says nothing about it."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # hostile or damaged EXIF, while the pixels may be sound
        orientation = None
    image.load()
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _to_uint8(image: PIL.Image.Image) -> Pixels:
    """Bring any Pillow mode to 8-bit grey or RGB."""
    if image.mode.startswith("I;16"):
        return np.rint(np.asarray(image, dtype=np.uint16) / 257).astype(np.uint8)
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def valid_boxes(box: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(N, 4) boxes x, y, width, height cut at the image's left and top; NaN where nothing is left or known."""
    corner = np.maximum(box[:, :2], 0)
    size = box[:, 2:] - (corner - box[:, :2])
    good = (size > 0).all(axis=1)  # False for NaN
    return np.where(good[:, None], np.hstack([corner, size]), np.nan).astype(np.float32)


def window(height: int, width: int, box: np.ndarray[Any, Any]) -> tuple[int, int, int, int]:
    """x, y, width, height in whole pixels of an image's part inside a box; the whole image where there is no such."""
    if np.isfinite(box).all():
        left, top, across, down = np.rint(box).astype(int).tolist()
        x, y, right, bottom = max(left, 0), max(top, 0), min(left + across, width), min(top + down, height)
        if right > x and bottom > y:
            return x, y, right - x, bottom - y
    return 0, 0, width, height


def safe_join(root: Path, relative: str, source: str = "") -> Path:
    r"""The file a table names, refused unless it lies under ``root``.

    Args:
        root: folder the name is relative to.
        relative: the name as written in the table, ``/`` or ``\`` between its parts.
        source: the table and row, for the message: ``"training.csv row 7"``.

    Raises:
        UserError: the name is empty, absolute, has a ``..``, or leads through a link to outside ``root``.
    """
    parts = relative.replace("\\", "/").split("/")
    where = f"{source}: " if source else ""
    if not relative or "\0" in relative or parts[0] == "" or parts[0].endswith(":") or ".." in parts:
        raise UserError(f"{where}the path {relative!r} must be relative and stay under {root}; correct that row")
    path = root.joinpath(*parts)
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{where}{relative!r} is a link leading outside {root}; copy the file there or drop that row")
    return path


def listed_images(folder: Path, root: Path, source: Path) -> set[str]:
    """Names of the picture files in ``folder`` that a list of labels may name.

    Raises:
        UserError: one is a link leading outside ``root``; ``source`` is the list, for the message.
    """
    names = set(list_images(folder)[0])
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in names and entry.is_symlink():
                safe_join(root, (folder / entry.name).relative_to(root).as_posix(), str(source))
    return names


def list_images(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Names of the picture files directly in ``folder``, sorted.

    Returns:
        The names with a readable extension, and (name, reason) of pictures that are left out. Hidden files and files
        that are no pictures are passed over in silence.
    """
    names, left_out = [], []
    for name in sorted(os.listdir(folder)):
        extension = os.path.splitext(name)[1].lower()
        if name.startswith(".") or extension not in EXTENSIONS + _OTHER_PICTURES:
            continue
        if any("\udc80" <= letter <= "\udcff" for letter in name):  # bytes that are no UTF-8
            left_out.append((ascii(name), "the file name is not valid text; rename the file"))
        elif extension in _OTHER_PICTURES:
            left_out.append((name, f"{extension} is not read, only {', '.join(FORMATS)}"))
        else:
            names.append(name)
    return names, left_out


def subfolders(folder: Path) -> Iterator[Path]:
    """Folders directly in ``folder``, sorted, without hidden ones and those that archive tools leave behind."""
    with os.scandir(folder) as entries:  # tells folders apart without a stat per file
        names = sorted(entry.name for entry in entries if entry.is_dir())
    yield from (folder / name for name in names if not name.startswith((".", "__MACOSX")))
