"""Run folders, weights, photographs and videos as they come, and what each must give."""

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import safetensors.numpy
import torch
from corpus_data import cut
from corpus_images import CMYK, JPEG, bomb, encoded, patched
from fakes import picture
from omegaconf import OmegaConf

Change = Callable[[Path], object]

# -- run folders: what happens to config.yaml, and the sentence ------------------------------------------------------


def text(content: str | bytes) -> Change:
    """The file holds this."""
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def more(content: str) -> Change:
    """The file ends in this."""
    return lambda path: path.write_text(path.read_text() + content)


def option(key: str, value: Any) -> Change:
    """An option has another value, or is new."""

    def write(path: Path) -> None:
        config = OmegaConf.load(path)
        OmegaConf.update(config, key, value, force_add=True)
        path.write_text(OmegaConf.to_yaml(config))

    return write


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
NO_CONFIG = r"config\.yaml is no config .*expected the file python -m fer\.train wrote"

CONFIGS: dict[str, tuple[Change, str]] = {
    "bytes": (text(b"\xff\xfe\0\1"), NO_CONFIG),
    "empty": (text(""), r"config\.yaml has no model and data"),
    "a word": (text("hello"), r"config\.yaml has no model and data"),
    "a list": (text("[1, 2]"), r"config\.yaml is no config"),
    "cut in a string": (text('model: {_target_: "fer.mo'), NO_CONFIG),
    "a tab": (text("model:\n\t_target_: x\n"), NO_CONFIG),
    "a key twice": (more("\nmodel: {}\n"), f"{NO_CONFIG}"),
    "a key that is a list": (text("[1, 2]: 3\nmodel: {}\n"), NO_CONFIG),
    "aliases of aliases of aliases": (text(ALIASES), r"config\.yaml repeats itself by YAML aliases"),
    "100,000 brackets": (text("model: " + "[" * 100_000), r"config\.yaml .* is nested too deeply"),
    "a model in words": (option("model", "cbam"), "has no model and data"),
    "a value that is itself": (option("model.width", "${model.width}"), "the config does not resolve"),
    "a value that is not there": (option("model.width", "${nowhere}"), "the config does not resolve"),
    "a value left open": (option("model.width", "???"), r"config\.yaml leaves model\.width open"),
    "an unknown option": (option("model.whiskers", 3), r"model\.whiskers: CBAMResNet takes no such argument"),
    "an unknown class of ours": (option("model._target_", "fer.models.dan.Dan"), "dan.py defines no such class"),
    "a class of another kind": (
        option("model", {"_target_": "torch.nn.ReLU"}),
        "is refused: it is not on the allow-list",
    ),
    "a word for a number": (option("model.width", "wide"), "a value its class cannot use"),
    "a negative number": (option("model.width", -8), "a value its class cannot use|does not fit the model"),
    "other classes": (option("model.class_names", ["a", "b"]), r"of other classes .*\['a', 'b'\]"),
    "classes in another order": (
        lambda path: option("model.class_names", OmegaConf.load(path).model.class_names[::-1])(path),
        "of other classes",
    ),
    "another network": (option("model.width", 16), "does not fit the model of its run's config"),
    "results cut": (lambda path: cut(path.with_name("results.json")), r"results\.json is no JSON"),
    "results absent": (lambda path: path.with_name("results.json").unlink(), "was not finished"),
}

COMMANDS: dict[str, tuple[list[str], str]] = {  # a mistyped command line, and Hydra's words for it
    "an unknown option": (["data.batchsize=3"], "Could not override 'data.batchsize'"),
    "an unknown choice": (["model=resnet34"], "Could not find 'model/resnet34'"),
    "an unknown group": (["modell=dan"], "Could not override 'modell'"),
    "no equals sign": (["seed"], "missing EQUAL"),
    "a bracket left open": (["data.class_names=[a"], "no viable alternative at input '[a'"),
    "an equals sign in a path": (["data.root=a/epoch=3"], "mismatched input '='"),
}

# -- checkpoints: what happens to checkpoints/best.ckpt --------------------------------------------------------------


def saved(content: Any) -> Change:
    """The file holds what torch.save makes of this."""
    return lambda path: torch.save(content, path)


def another(**keys: Any) -> Change:
    """The checkpoint has other content, under its own checksum or none."""
    return lambda path: torch.save({**torch.load(path, weights_only=True), **keys}, path)


def flipped(path: Path) -> None:
    """One bit of the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def bare_zip(path: Path) -> None:
    """A zip file of something else."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "x")


def replaced_by_folder(path: Path) -> None:
    """A folder of that name."""
    path.unlink()
    path.mkdir()


NO_CHECKPOINT = r"best\.ckpt cannot be loaded as a checkpoint"

CHECKPOINTS: dict[str, tuple[Change, str]] = {
    "empty": (text(b""), NO_CHECKPOINT),
    "a web page": (text("<html>404</html>"), NO_CHECKPOINT),
    "cut": (cut, NO_CHECKPOINT),
    "one bit flipped": (flipped, r"best\.ckpt is damaged: its content has not the SHA-256"),
    "a zip of something else": (bare_zip, NO_CHECKPOINT),
    "a picture": (text(JPEG), NO_CHECKPOINT),
    "safetensors": (text(safetensors.numpy.save({"a": np.zeros(2)})), NO_CHECKPOINT),
    "numpy": (lambda path: np.save(path.open("wb"), np.zeros(3)), NO_CHECKPOINT),
    "a tensor alone": (saved(torch.zeros(2)), NO_CHECKPOINT),
    "a list": (saved([1, 2]), NO_CHECKPOINT),
    "without classes": (saved({"state_dict": {}}), "of other classes"),
    "of other classes": (another(fer={"class_names": ["a"], "weights": "random"}), r"of other classes .*\['a'\]"),
    "without weights": (another(state_dict={}), "does not fit the model of its run's config"),
    "a folder": (replaced_by_folder, "was not finished"),
    "absent": (os.unlink, "was not finished"),
}

# -- files of weights -------------------------------------------------------------------------------------------------


def safe(header: bytes, length: int | None = None, body: bytes = b"\0" * 8) -> bytes:
    """A safetensors file by hand."""
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def header(**entries: Any) -> bytes:
    """The header of a safetensors file."""
    return json.dumps(
        {name: {"dtype": d, "shape": s, "data_offsets": o} for name, (d, s, o) in entries.items()}
    ).encode()


GOOD = safe(header(a=("F32", [2], [0, 8])))
NO_WEIGHTS = "cannot be read as weights"

WEIGHTS: dict[str, tuple[bytes, str, str | None]] = {  # content, what follows the path, the sentence or None where read
    "safetensors": (GOOD, "", None),
    "empty": (b"", "", NO_WEIGHTS),
    "a web page": (b"<html>404</html>", "", NO_WEIGHTS),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "", NO_WEIGHTS),
    "cut": (GOOD[:-4], "", NO_WEIGHTS),
    "a header of 2^60 bytes": (safe(b"{}", 1 << 60), "", NO_WEIGHTS),
    "a header of 100 MB": (safe(b"{}", 100_000_001), "", NO_WEIGHTS),
    "a header that is no JSON": (safe(b"{x", body=b""), "", NO_WEIGHTS),
    "bytes of two tensors overlap": (safe(header(a=("F32", [2], [0, 8]), b=("F32", [1], [4, 8]))), "", NO_WEIGHTS),
    "a tensor beyond the end": (safe(header(a=("F32", [200], [0, 800]))), "", NO_WEIGHTS),
    "a shape of 2^62": (safe(header(a=("F32", [1 << 62], [0, 8]))), "", NO_WEIGHTS),
    "an unknown type": (safe(header(a=("P64", [1], [0, 8]))), "", NO_WEIGHTS),
    "another checksum": (GOOD, "@sha256:" + "0" * 64, "it is another file, or damaged"),
    "no checksum": (GOOD, "@sha256:hello", "is no SHA-256, expected 64 hexadecimal digits"),
}

# -- photographs: bytes, and how many faces or the reason -------------------------------------------------------------

SCENE = (260, 240, (30, 20))  # width, height, the corner of a face


def photographs(scene: np.ndarray) -> dict[str, tuple[bytes, int | str]]:
    """Photographs of a scene with one face."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    lying = PIL.Image.fromarray(np.ascontiguousarray(np.rot90(scene)))
    opaque = np.dstack([scene, np.full(scene.shape[:2], 255, np.uint8)])
    deep = PIL.Image.fromarray(scene[..., 0].astype(np.uint16) * 257)
    return {
        "jpeg": (encoded(scene, "JPEG", quality=95), 1),
        "lying on its side": (encoded(lying, "PNG", exif=exif), 1),
        "grey": (encoded(scene[..., 0], "PNG"), 1),
        "16 bits": (encoded(deep, "PNG"), 1),
        "with alpha": (encoded(opaque, "PNG"), 1),
        "cmyk": (encoded(PIL.Image.fromarray(scene).convert("CMYK"), "JPEG"), 1),
        "black": (encoded(np.zeros((90, 80, 3), np.uint8), "PNG"), 0),
        "one pixel": (encoded(np.zeros((1, 1, 3), np.uint8), "PNG"), 0),
        "one row": (encoded(np.zeros((1, 3000), np.uint8), "PNG"), 0),
        "no face": (encoded(CMYK, "JPEG"), 0),
        "empty": (b"", "empty"),
        "a text": (b"no picture", "content is not JPEG, PNG, WEBP or BMP"),
        "half": (encoded(scene, "JPEG")[:2000], "truncated"),
        "a bomb": (bomb(20_000, 20_000), "50 million"),
        "animated": (
            encoded(scene, "WEBP", save_all=True, append_images=[PIL.Image.fromarray(255 - scene)]),
            "an animation",
        ),
    }


# -- videos: what makes the file, its name, and how many frames or the reason -----------------------------------------


def film(path: Path, frames: int = 12, codec: str = "MJPG") -> bytes:
    """Write a video of 10 frames per second."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10, (64, 48))
    assert writer.isOpened()
    for number in range(frames):
        writer.write(np.repeat(picture(number % 7, number, 64)[:48, :, None], 3, axis=2))
    writer.release()
    return path.read_bytes()


def filmed(change: Callable[[bytes], bytes]) -> Change:
    """A video with other bytes."""
    return lambda path: path.write_bytes(change(film(path)))


def no_video(path: Path) -> None:
    """Bytes without meaning."""
    path.write_bytes(np.random.default_rng(0).bytes(20_000))


def beside(content: str) -> Change:
    """A text that names a video beside it."""

    def write(path: Path) -> None:
        film(path.with_name("private.avi"))
        path.write_text(content)

    return write


def pictured(path: Path) -> None:
    """A picture."""
    path.write_bytes(encoded(picture(0, 0), "PNG"))


VIDEOS: dict[str, tuple[str, Change, int | str]] = {
    "avi": ("a.avi", film, 12),
    "mp4": ("a.mp4", lambda path: film(path, codec="mp4v"), 12),
    "matroska": ("a.mkv", film, 12),
    "avi under the name of an mp4": (
        "a.mp4",
        lambda path: film(path.with_suffix(".avi")) and os.rename(path.with_suffix(".avi"), path),
        12,
    ),
    "a picture": ("a.mp4", pictured, 1),
    "a bomb": ("a.mp4", text(bomb(20_000, 20_000)), "50 million"),
    "cut": ("a.avi", filmed(lambda content: content[: len(content) // 2]), "cut short"),
    "a header alone": ("a.avi", filmed(lambda content: content[:300]), "no frame can be read"),
    "frames that promise 20,000 x 20,000": (
        "a.avi",
        filmed(lambda content: content.replace(struct.pack(">HH", 48, 64), struct.pack(">HH", 20_000, 20_000))),
        "no frame can be read",
    ),
    "a header that promises a billion frames": (
        "a.avi",
        filmed(lambda content: patched(content, b"avih", 24, struct.pack("<I", 10**9))),
        12,
    ),
    "no frame": ("a.avi", lambda path: film(path, frames=0), "no frame can be read"),
    "empty": ("a.mp4", text(""), "no frame can be read"),
    "noise": ("a.mp4", no_video, "no frame can be read"),
    "a text": ("a.mp4", text("no video"), "a text, not a video"),
    "a list of files for FFmpeg": (
        "a.avi",
        beside("ffconcat version 1.0\nfile private.avi\n"),
        "a playlist is not followed",
    ),
    "a playlist": ("a.mp4", beside("#EXTM3U\n#EXTINF:1,\nprivate.avi\n#EXT-X-ENDLIST\n"), "a playlist is not followed"),
    "a stream's description": (
        "a.mp4",
        text("v=0\nc=IN IP4 10.0.0.1\nm=video 5004 RTP/AVP 96\n"),
        "a text, not a video",
    ),
    "an animation": ("a.mp4", text(encoded(JPEG and PIL.Image.open(io.BytesIO(JPEG)), "GIF")), "content is not JPEG"),
    "a fifo": ("a.mp4", os.mkfifo, "not a regular file"),
    "a folder": ("a.mp4", Path.mkdir, "there are no pictures or videos"),
}
