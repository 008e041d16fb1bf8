"""The one decoding rule: what is accepted, what is refused, and how pixels come out."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from fakes import picture

from fer.data.images import BadImage, list_images, read_image, safe_join
from fer.errors import UserError

COLOUR = picture(3, 0, size=40, colour=True)
GREY = picture(3, 1, size=40)


def encoded(image: np.ndarray | PIL.Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(folder: Path, content: bytes, name: str = "a.jpg") -> Path:
    """A file of these bytes; the name says .jpg whatever they are."""
    (folder / name).write_bytes(content)
    return folder / name


def test_formats_are_told_by_content(tmp_path: Path) -> None:
    for kind in ("PNG", "BMP"):
        assert np.array_equal(read_image(write(tmp_path, encoded(COLOUR, kind))), COLOUR)
        assert np.array_equal(read_image(write(tmp_path, encoded(GREY, kind))), GREY)
    assert np.array_equal(read_image(write(tmp_path, encoded(COLOUR, "WEBP", lossless=True))), COLOUR)
    jpeg = read_image(write(tmp_path, encoded(COLOUR, "JPEG", quality=100, subsampling=0), "a.png"))
    assert jpeg.shape == COLOUR.shape
    assert abs(jpeg.astype(float) - COLOUR).mean() < 2


def test_red_comes_first(tmp_path: Path) -> None:
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    assert read_image(write(tmp_path, encoded(red, "PNG")))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<html><body>404 Not Found</body></html>", "content is not JPEG"),
        (encoded(COLOUR, "JPEG")[:20], "content is not JPEG|cannot be decoded|truncated"),
        (encoded(COLOUR, "JPEG")[: len(encoded(COLOUR, "JPEG")) // 2], "truncated"),
        (encoded(COLOUR, "JPEG", progressive=True)[:-400], "truncated"),
        (encoded(COLOUR, "JPEG")[:-2], "truncated"),  # nothing but the end marker is gone: still refused
        (encoded(COLOUR, "PNG")[:1500], "truncated|cannot be decoded"),
        (encoded(GREY, "GIF", save_all=True, append_images=[PIL.Image.fromarray(255 - GREY)]), "content is not"),
        (encoded(GREY, "PNG", save_all=True, append_images=[PIL.Image.fromarray(255 - GREY)]), "animation"),
        (encoded(COLOUR, "TIFF"), "content is not"),
    ],
    ids=["empty", "html", "header", "half", "progressive", "no-end-marker", "png", "gif", "apng", "tiff"],
)
def test_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(BadImage, match=reason) as caught:
        read_image(path)
    assert caught.value.path == path


def test_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("fifo.jpg", "folder.jpg"):
        with pytest.raises(BadImage, match="not a regular file"):
            read_image(tmp_path / name)
    with pytest.raises(BadImage, match="no such file"):
        read_image(tmp_path / "absent.jpg")
    with pytest.raises(BadImage, match="null"):
        read_image(tmp_path / "nul\0.jpg")


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises many pixels and whose body is nearly empty."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [7200, 14000, 20000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_from_the_header(tmp_path: Path, side: int) -> None:
    with pytest.raises(BadImage, match="50 million"):
        read_image(write(tmp_path, bomb(side, side)))


def test_sixteen_bits_are_divided_by_257(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    values[-1, -1] = 65535
    found = read_image(write(tmp_path, encoded(PIL.Image.fromarray(values), "PNG")))
    assert np.array_equal(found, np.rint(values / 257.0))
    assert found.max() == 255


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    rgba = np.dstack([COLOUR, np.full(COLOUR.shape[:2], 255, np.uint8)])
    rgba[:20, :, 3] = 0
    for kind in ("PNG", "WEBP"):
        found = read_image(write(tmp_path, encoded(rgba, kind, **({"lossless": True} if kind == "WEBP" else {}))))
        assert (found[:20] == 255).all()
        assert np.array_equal(found[20:], COLOUR[20:])
    grey_alpha = PIL.Image.fromarray(np.dstack([GREY, rgba[..., 3]]), "LA")
    assert (read_image(write(tmp_path, encoded(grey_alpha, "PNG")))[:20] == 255).all()
    palette = PIL.Image.fromarray(COLOUR).quantize(16)
    plain = read_image(write(tmp_path, encoded(palette, "PNG")))
    assert np.array_equal(plain, np.asarray(palette.convert("RGB")))
    hole = palette.getpixel((0, 0))
    holed = read_image(write(tmp_path, encoded(palette, "PNG", transparency=hole)))
    where = np.asarray(palette) == hole
    assert (holed[where] == 255).all()
    assert np.array_equal(holed[~where], plain[~where])


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[..., 1:3] = 255  # magenta and yellow make red
    found = read_image(write(tmp_path, encoded(PIL.Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100)))
    assert abs(found.reshape(-1, 3).mean(0) - (255, 0, 0)).max() < 4


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_orientation(tmp_path: Path, orientation: int, upright: object) -> None:
    stored = COLOUR[:30]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    found = read_image(write(tmp_path, encoded(stored, "PNG", exif=exif)))
    assert np.array_equal(found, upright(stored))
    jpeg = read_image(write(tmp_path, encoded(stored, "JPEG", exif=exif, quality=100, subsampling=0)))
    assert abs(jpeg.astype(float) - upright(stored)).mean() < 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_pixels(tmp_path: Path) -> None:
    content = encoded(GREY, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x01")
    assert read_image(write(tmp_path, content)).shape == GREY.shape


def test_safe_join(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    write(root / "a", b"x", "b.jpg")
    assert safe_join(root, "a/b.jpg") == root / "a" / "b.jpg"
    assert safe_join(root, "a\\b.jpg") == root / "a" / "b.jpg"
    for name in ("/etc/passwd", "../x", "a/../../x", "..\\x", "C:\\x", "", "a\0b"):
        with pytest.raises(UserError, match=r"list.csv row 7: .* must be relative"):
            safe_join(root, name, "list.csv row 7")
    write(tmp_path, b"x", "outside.jpg")
    (root / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (root / "inside.jpg").symlink_to(root / "a" / "b.jpg")
    assert safe_join(root, "inside.jpg") == root / "inside.jpg"
    with pytest.raises(UserError, match="leading outside"):
        safe_join(root, "link.jpg", "list.csv row 7")


def test_list_images(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "._a.png", ".DS_Store", "Thumbs.db", "notes.txt", "c.tif"):
        write(tmp_path, b"x", name)
    os.close(os.open(os.fsencode(tmp_path) + b"/\xff.jpg", os.O_CREAT))
    names, left_out = list_images(tmp_path)
    assert names == ["a.png", "b.JPG"]
    assert [name for name, _ in left_out] == ["c.tif", "'\\udcff.jpg'"]
