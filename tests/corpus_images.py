"""Image files as they come: what each must give, pixels or a reason. Every file is named .jpg, whatever it holds."""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageCms
from fakes import picture

COLOUR = picture(3, 0, size=40, colour=True)
GREY = picture(3, 1, size=40)
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


class Near(NamedTuple):
    """Pixels that a lossy format may change so much on average."""

    pixels: np.ndarray
    off: float


Expected = np.ndarray | Near | str  # a str is the reason, as a regular expression


def encoded(image: np.ndarray | PIL.Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# -- files that no library writes -------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    """A part of a PNG file with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(
    width: int, height: int, bits: int, colour: int, body: bytes, interlace: int = 0, more: bytes = b""
) -> bytes:
    """A PNG of these uncompressed bytes."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace)
    data = chunk(b"IDAT", zlib.compress(body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + data + chunk(b"IEND", b"")


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises many pixels and whose body is nearly empty."""
    return raw_png(width, height, 8, 0, b"\0" * 9)


def rows(values: np.ndarray) -> bytes:
    """(H, W) or (H, W, C) as PNG's uncompressed rows, without filter, 16 bits with the high byte first."""
    lines = values.astype(values.dtype.newbyteorder(">")).reshape(len(values), -1)
    return b"".join(b"\0" + line.tobytes() for line in lines)


def interlaced(values: np.ndarray) -> bytes:
    """A PNG in the seven passes of Adam7."""
    passes = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
    body = b"".join(rows(values[y::down, x::across]) for y, down, x, across in passes)
    return raw_png(values.shape[1], values.shape[0], 8, 2 if values.ndim == 3 else 0, body, interlace=1)


def few_bits(bits: int) -> tuple[bytes, np.ndarray]:
    """A grey PNG of 1, 2 or 4 bits, and its pixels."""
    values = (GREY >> (8 - bits)).astype(np.uint8)
    packed = np.packbits(np.unpackbits(values[..., None], axis=2)[..., 8 - bits :].reshape(40, -1), axis=1)
    return raw_png(40, 40, bits, 0, rows(packed)), (values * (255 // (2**bits - 1))).astype(np.uint8)


def patched(content: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    """The file with other bytes so far behind a mark."""
    place = content.index(mark) + offset
    return content[:place] + value + content[place + len(value) :]


def webp(kind: bytes, width: int, height: int) -> bytes:
    """A WEBP whose header promises that size."""
    if kind == b"VP8 ":
        return patched(encoded(COLOUR, "WEBP"), b"\x9d\x01\x2a", 3, struct.pack("<HH", width, height))
    if kind == b"VP8L":
        body = b"\x2f" + struct.pack("<I", (width - 1) | ((height - 1) << 14)) + b"\0" * 21
    else:
        body = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    part = kind + struct.pack("<I", len(body)) + body + (b"" if kind == b"VP8L" else encoded(COLOUR, "WEBP")[12:])
    return b"RIFF" + struct.pack("<I", 4 + len(part)) + b"WEBP" + part


def bmp(width: int, height: int) -> bytes:
    """A BMP whose header promises that size."""
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 64, 0, 0, 54) + info + b"\0" * 10


def jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header promises that size."""
    return patched(encoded(COLOUR, "JPEG"), b"\xff\xc0", 5, struct.pack(">HH", height, width))


def turned(orientation: int, kind: str, **options: Any) -> bytes:
    """A file that says how to turn it."""
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return encoded(COLOUR[:30], kind, exif=exif, **options)


def archive() -> bytes:
    """A zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.jpg", "x")
    return buffer.getvalue()


def with_alpha(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An image whose upper half is transparent, and how it looks on white."""
    alpha = np.full(image.shape[:2], 255, np.uint8)
    alpha[:20] = 0
    shown = np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image.copy()
    shown[:20] = 255
    return np.dstack([image, alpha]), shown


# -- the cases ---------------------------------------------------------------------------------------------------------

PNG, JPEG, WEBP = encoded(COLOUR, "PNG"), encoded(COLOUR, "JPEG"), encoded(COLOUR, "WEBP")
WIDE = np.linspace(0, 65535, 1600).astype(np.uint16).reshape(40, 40)
PALETTE = PIL.Image.fromarray(COLOUR).quantize(16)
HOLE = PALETTE.getpixel((0, 0))
SRGB = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
CMYK = PIL.Image.fromarray(COLOUR).convert("CMYK")
RGBA, ON_WHITE = with_alpha(COLOUR)
GREY_ALPHA, GREY_ON_WHITE = with_alpha(GREY)
DECODED = np.asarray(PIL.Image.open(io.BytesIO(JPEG)))
SECOND = [PIL.Image.fromarray(255 - COLOUR)]
BLANKS = zlib.compress(b"\0" * 70_000_000, 9)  # 70 MB in 70 kB


def holed() -> np.ndarray:
    """The palette picture with one colour transparent, on white."""
    shown = np.asarray(PALETTE.convert("RGB")).copy()
    shown[np.asarray(PALETTE) == HOLE] = 255
    return shown


READ: dict[str, tuple[bytes, Expected]] = {
    "png": (PNG, COLOUR),
    "png grey": (encoded(GREY, "PNG"), GREY),
    "png interlaced": (interlaced(COLOUR), COLOUR),
    "png grey interlaced": (interlaced(GREY), GREY),
    "png 1 bit": few_bits(1),
    "png 2 bits": few_bits(2),
    "png 4 bits": few_bits(4),
    "png 16 bits grey": (raw_png(40, 40, 16, 0, rows(WIDE)), np.rint(WIDE / 257.0).astype(np.uint8)),
    "png 16 bits colour": (raw_png(40, 40, 16, 2, rows(COLOUR.astype(np.uint16) * 257)), COLOUR),
    "png 16 bits alpha": (raw_png(40, 40, 16, 6, rows(RGBA.astype(np.uint16) * 257)), ON_WHITE),
    "png 16 bits grey alpha": (raw_png(40, 40, 16, 4, rows(GREY_ALPHA.astype(np.uint16) * 257)), GREY_ON_WHITE),
    "png palette": (encoded(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB"))),
    "png palette with a hole": (encoded(PALETTE, "PNG", transparency=HOLE), holed()),
    "png alpha": (encoded(RGBA, "PNG"), ON_WHITE),
    "png grey alpha": (encoded(PIL.Image.fromarray(GREY_ALPHA, "LA"), "PNG"), GREY_ON_WHITE),
    "png one colour transparent": (
        raw_png(2, 1, 8, 2, bytes([0, 9, 8, 7, 1, 2, 3]), more=chunk(b"tRNS", struct.pack(">HHH", 9, 8, 7))),
        np.array([[[255, 255, 255], [1, 2, 3]]], np.uint8),
    ),
    "png with colour profile": (encoded(COLOUR, "PNG", icc_profile=SRGB), COLOUR),
    "png with gamma": (PNG[:33] + chunk(b"gAMA", struct.pack(">I", 100_000)) + PNG[33:], COLOUR),
    "png with text": (PNG[:33] + chunk(b"tEXt", b"Comment\0<script>") + PNG[33:], COLOUR),
    "png and more behind": (PNG + b"more" * 100, COLOUR),
    "png of one pixel": (encoded(COLOUR[:1, :1], "PNG"), COLOUR[:1, :1]),
    "png of one row": (encoded(np.tile(GREY[:1], (1, 1000)), "PNG"), np.tile(GREY[:1], (1, 1000))),
    "bmp": (encoded(COLOUR, "BMP"), COLOUR),
    "bmp grey": (encoded(GREY, "BMP"), GREY),
    "bmp 1 bit": (encoded(PIL.Image.fromarray(GREY > 128), "BMP"), np.where(GREY > 128, 255, 0).astype(np.uint8)),
    "bmp palette": (encoded(PALETTE, "BMP"), np.asarray(PALETTE.convert("RGB"))),
    "webp lossless": (encoded(COLOUR, "WEBP", lossless=True), COLOUR),
    "webp lossy": (encoded(COLOUR, "WEBP", quality=100), Near(COLOUR, 9)),
    "webp alpha": (encoded(RGBA, "WEBP", lossless=True), ON_WHITE),
    "jpeg": (encoded(COLOUR, "JPEG", quality=100, subsampling=0), Near(COLOUR, 1)),
    "jpeg grey": (encoded(GREY, "JPEG", quality=100), Near(GREY, 1)),
    "jpeg 4:2:0": (encoded(COLOUR, "JPEG", quality=100, subsampling=2), Near(COLOUR, 8)),
    "jpeg progressive": (encoded(COLOUR, "JPEG", progressive=True), DECODED),  # other order, same coefficients
    "jpeg optimised": (encoded(COLOUR, "JPEG", optimize=True), DECODED),
    "jpeg with restart marks": (encoded(COLOUR, "JPEG", restart_marker_blocks=2), DECODED),
    "jpeg with colour profile": (encoded(COLOUR, "JPEG", icc_profile=SRGB), DECODED),
    "jpeg with comment": (encoded(COLOUR, "JPEG", comment=b"x" * 60_000), DECODED),
    "jpeg and more behind": (JPEG + b"more" * 100, DECODED),
    "jpeg and a zip behind": (JPEG + archive(), DECODED),
    "jpeg cmyk": (encoded(CMYK, "JPEG", quality=100), Near(COLOUR, 3)),
    "jpeg with damaged exif": (encoded(COLOUR, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x01"), DECODED),
    "jpeg of several views": (encoded(COLOUR, "MPO", save_all=True, append_images=SECOND), DECODED),
    "jpeg orientation 6": (turned(6, "JPEG", quality=100, subsampling=0), Near(np.rot90(COLOUR[:30], -1), 1)),
    "webp orientation 6": (turned(6, "WEBP", lossless=True), np.rot90(COLOUR[:30], -1)),
    "png orientation 0": (turned(0, "PNG"), COLOUR[:30]),
    "png orientation 9": (turned(9, "PNG"), COLOUR[:30]),
    **{f"png orientation {n}": (turned(n, "PNG"), upright(COLOUR[:30])) for n, upright in UPRIGHT.items()},
}

CUT, OTHER, BOMB = "truncated|cannot be decoded", "content is not JPEG, PNG, WEBP or BMP", "50 million|more than 50"
REFUSED: dict[str, tuple[bytes, Expected]] = {
    "empty": (b"", r"empty \(0 bytes\)"),
    "one byte": (b"\xff", OTHER),
    "zeros": (b"\0" * 5000, OTHER),
    "html": (b"<html><body>404 Not Found</body></html>", OTHER),
    "json": (b'{"error": "log in first"}', OTHER),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', OTHER),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", OTHER),
    "pdf": (encoded(COLOUR, "PDF"), OTHER),
    "zip": (archive(), OTHER),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", OTHER),
    "gif": (encoded(GREY, "GIF"), OTHER),
    "gif animated": (encoded(COLOUR, "GIF", save_all=True, append_images=SECOND), OTHER),
    "tiff": (encoded(COLOUR, "TIFF"), OTHER),
    "jpeg 2000": (encoded(COLOUR, "JPEG2000"), OTHER),
    "avif": (encoded(COLOUR, "AVIF"), OTHER),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 50, OTHER),
    "ico": (encoded(COLOUR, "ICO"), OTHER),
    "ppm": (encoded(COLOUR, "PPM"), OTHER),
    "mp4": (b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2" + b"\0" * 50, OTHER),
    "apng": (encoded(COLOUR, "PNG", save_all=True, append_images=SECOND), "an animation"),
    "webp animated": (encoded(COLOUR, "WEBP", save_all=True, append_images=SECOND), "an animation"),
    "jpeg header alone": (JPEG[:20], f"{OTHER}|{CUT}"),
    "jpeg half": (JPEG[: len(JPEG) // 2], CUT),
    "jpeg without its end mark": (JPEG[:-2], CUT),
    "jpeg progressive cut": (encoded(COLOUR, "JPEG", progressive=True)[:-400], CUT),
    "jpeg fetched as text": (JPEG.decode("latin-1").encode(), f"{OTHER}|{CUT}"),
    "png half": (PNG[: len(PNG) // 2], CUT),
    "png without its end": (PNG[:-12], CUT),
    "png one bit flipped": (patched(PNG, b"IDAT", 40, bytes([PNG[PNG.index(b"IDAT") + 40] ^ 1])), CUT),
    "png checksum wrong": (patched(PNG, b"IEND", -5, bytes([PNG[PNG.index(b"IEND") - 5] ^ 1])), CUT),
    "png header checksum wrong": (patched(PNG, b"IHDR", 17, b"\0\0\0\0"), OTHER),
    "png fetched as text": (PNG.replace(b"\r\n", b"\n"), OTHER),
    "webp half": (WEBP[: len(WEBP) // 2], CUT),
    "bmp half": (encoded(COLOUR, "BMP")[:2400], CUT),
    "png width 0": (bomb(0, 5), OTHER),
    "png 52 million pixels": (bomb(7200, 7200), BOMB),
    "png 196 million pixels": (bomb(14_000, 14_000), BOMB),
    "png 4 quintillion pixels": (bomb(2**31 - 1, 2**31 - 1), BOMB),
    "jpeg 65535 x 65535": (jpeg(65_535, 65_535), BOMB),
    "jpeg that cannot hold its pixels": (jpeg(7000, 7000), "bytes cannot hold 7000 x 7000 pixels"),
    "webp lossy 16383 x 16383": (webp(b"VP8 ", 16_383, 16_383), BOMB),
    "webp lossless 16383 x 16383": (webp(b"VP8L", 16_383, 16_383), BOMB),
    "webp extended 16 million x 128": (webp(b"VP8X", 1 << 24, 128), BOMB),
    "bmp 2 billion x 2 billion": (bmp(2**31 - 1, 2**31 - 1), BOMB),
    "bmp that lacks its pixels": (bmp(7000, 7000), CUT),
    "png text that unpacks to 70 MB": (PNG[:33] + chunk(b"zTXt", b"k\0\0" + BLANKS) + PNG[33:], "too large"),
    "png unicode text that unpacks to 70 MB": (
        PNG[:33] + chunk(b"iTXt", b"k\0\1\0\0\0" + BLANKS) + PNG[33:],
        "too large",
    ),
    "png profile that unpacks to 70 MB": (PNG[:33] + chunk(b"iCCP", b"k\0\0" + BLANKS) + PNG[33:], "too large"),
}


def no_file(path: Path) -> None:
    """Nothing."""


def huge(path: Path) -> None:
    """A WEBP and 3 GB of nothing, which take no place on the disk."""
    path.write_bytes(WEBP)
    os.truncate(path, 3 << 30)


# What makes a path that is no regular file, and the reason.
PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (no_file, "no such file"),
    "folder": (Path.mkdir, "not a regular file"),
    "fifo": (os.mkfifo, "not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "broken link": (lambda path: path.symlink_to("nowhere.jpg"), "no such file"),
    "link to itself": (lambda path: path.symlink_to(path.name), "symbolic links|Symlink"),
    "3 GB": (huge, "bytes, more than a picture needs"),
}
