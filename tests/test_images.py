"""Names of image files: what a list may name, what a folder holds. What files give is in `test_corpus`."""

import os
from pathlib import Path

import numpy as np
import pytest
from corpus_images import encoded

from fer.data.images import BadImage, list_images, listed_images, read_image, safe_join
from fer.errors import UserError


def write(folder: Path, name: str) -> Path:
    (folder / name).write_bytes(b"x")
    return folder / name


def test_red_comes_first(tmp_path: Path) -> None:
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    write(tmp_path, "a.png").write_bytes(encoded(red, "PNG"))
    assert read_image(tmp_path / "a.png")[0, 0].tolist() == [255, 0, 0]


def test_a_name_with_a_nul(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="null"):
        read_image(tmp_path / "nul\0.jpg")


def test_safe_join(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    write(root / "a", "b.jpg")
    assert safe_join(root, "a/b.jpg") == root / "a" / "b.jpg"
    assert safe_join(root, "a\\b.jpg") == root / "a" / "b.jpg"
    for name in ("/etc/passwd", "../x", "a/../../x", "..\\x", "C:\\x", "", "a\0b"):
        with pytest.raises(UserError, match=r"list.csv row 7: .* must be relative"):
            safe_join(root, name, "list.csv row 7")
    write(tmp_path, "outside.jpg")
    (root / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (root / "inside.jpg").symlink_to(root / "a" / "b.jpg")
    assert safe_join(root, "inside.jpg") == root / "inside.jpg"
    with pytest.raises(UserError, match="leading outside"):
        safe_join(root, "link.jpg", "list.csv row 7")
    with pytest.raises(UserError, match=r"list\.txt: 'link\.jpg' is a link leading outside"):
        listed_images(root, root, root / "list.txt")
    (root / "link.jpg").unlink()
    assert listed_images(root, root, root / "list.txt") == {"inside.jpg"}


def test_list_images(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "._a.png", ".DS_Store", "Thumbs.db", "notes.txt", "c.tif"):
        write(tmp_path, name)
    os.close(os.open(os.fsencode(tmp_path) + b"/\xff.jpg", os.O_CREAT))
    names, left_out = list_images(tmp_path)
    assert names == ["a.png", "b.JPG"]
    assert [name for name, _ in left_out] == ["c.tif", "'\\udcff.jpg'"]
