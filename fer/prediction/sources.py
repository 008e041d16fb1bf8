"""What is looked at: a picture, a folder of pictures and videos, a video or a camera, one frame after another.

Few frames are held at a time, however long a video is. A file that cannot be read is listed in `Source.bad`, and the
next one follows.
"""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from fer.data.images import MAX_PIXELS, NO_FILE, BadImage, Pixels, list_images, read_image, subfolders
from fer.errors import UserError

# What FFmpeg and OpenCV have to say of damage is said in a sentence here.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".ogv")
# A picture under a video's name is read as a picture.
PICTURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM")
USUAL_FPS = 25.0  # of a video that does not say
FRAMES, PIXELS = 16, 30_000_000  # of a batch, at most, but one picture at least
CAMERA_FPS = 10.0  # of the video written from a camera, in which frames are repeated to keep time


@dataclass(frozen=True)
class Frame:
    """A picture, or a frame of a video.

    Attributes:
        input: the file's name, relative to the folder that is looked at; ``camera 0``.
        image: (H, W) or (H, W, 3) RGB uint8, upright.
        number: of the frame in its video, from 0; None for a picture.
        time: of the frame in its video, in seconds; None for a picture.
        fps: frames per second of the video that shows every frame given out; None for a picture.
    """

    input: str
    image: Pixels
    number: int | None = None
    time: float | None = None
    fps: float | None = None


def is_video(path: Path) -> bool:
    """Whether to read a file with a video's name as a video: not where its content is a picture.

    Raises:
        BadImage: it is no regular file, or a text: FFmpeg would go and read what a playlist names.
    """
    if not path.is_file():  # opening a FIFO would wait for ever
        raise BadImage(path, "not a regular file" if path.exists() else NO_FILE)
    with path.open("rb") as file:
        head = file.read(64)
    if head and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        raise BadImage(path, "a text, not a video: a playlist is not followed")
    return not head.startswith(PICTURES) and head[8:12] != b"WEBP"


class Source:
    """Everything to look at, in order.

    Args:
        given: a file, a folder, which is searched with all below it, or the number of a camera.
        every: of a video or camera, every n-th frame.
        limit: frames after which a video or camera ends; None: its own end.
        leave_out: a folder that is not searched, the output's.

    Attributes:
        bad: (input, reason) of what could not be read, or not to its end.
        names: the files, relative to the folder.

    Raises:
        UserError: no such file or folder, a folder without pictures, or no such camera.
    """

    def __init__(self, given: str | int, *, every: int, limit: int | None, leave_out: Path) -> None:
        self.every, self.limit = every, limit
        self.bad: list[tuple[str, str]] = []
        self.names: list[str] = []
        self.camera = given if isinstance(given, int) else None
        path = self.folder = Path(str(given))
        if self.camera is not None:
            self._open(self.camera).release()
        elif path.is_dir():
            self._search(path, "", leave_out.resolve(), set())
            if not self.names and not self.bad:
                raise UserError(f"input={given}: there are no pictures or videos in this folder")
        elif path.exists():
            self.folder, self.names = path.parent, [path.name]
        else:
            raise UserError(f"input={given}: no such file or folder; a camera is given by its number, such as input=0")

    def _search(self, folder: Path, prefix: str, leave_out: Path, seen: set[tuple[int, int]]) -> None:
        status = folder.stat()
        if folder.resolve() == leave_out or (status.st_dev, status.st_ino) in seen:  # a link back to a folder above
            return
        seen.add((status.st_dev, status.st_ino))
        pictures, left_out = list_images(folder)
        videos = [name for name in os.listdir(folder) if name.lower().endswith(VIDEOS) and not name.startswith(".")]
        self.names += [prefix + name for name in sorted([*pictures, *videos])]
        self.bad += [(prefix + name, reason) for name, reason in left_out]
        for below in subfolders(folder):
            self._search(below, f"{prefix}{below.name}/", leave_out, seen)

    def __len__(self) -> int:
        """Frames to come, as far as the files tell; 0 where they do not."""
        if self.camera is not None:
            return self.limit or 0
        return sum(self._length(name) if name.lower().endswith(VIDEOS) else 1 for name in self.names)

    def _length(self, name: str) -> int:
        try:
            if not is_video(self.folder / name):
                return 1
        except BadImage:
            return 0
        video = cv2.VideoCapture(str(self.folder / name))
        frames = math.ceil(max(video.get(cv2.CAP_PROP_FRAME_COUNT), 0) / self.every)
        video.release()
        return frames if self.limit is None else min(frames, self.limit)

    def __iter__(self) -> Iterator[Frame]:
        """Read on, one frame after another."""
        if self.camera is not None:
            yield from self._frames(f"camera {self.camera}", self.camera)
        for name in self.names:
            try:
                if name.lower().endswith(VIDEOS) and is_video(self.folder / name):
                    yield from self._frames(name, self.folder / name)
                else:
                    yield Frame(name, read_image(self.folder / name))
            except BadImage as error:
                self.bad.append((name, error.reason))

    def batches(self) -> Iterator[list[Frame]]:
        """Frames to be looked at together: a few, or one of a camera, which does not wait."""
        batch: list[Frame] = []
        for frame in self:
            if batch and sum(one.image.size for one in (*batch, frame)) > 3 * PIXELS:
                yield batch
                batch = []
            batch.append(frame)
            if len(batch) == (FRAMES if self.camera is None else 1):
                yield batch
                batch = []
        if batch:
            yield batch

    def _open(self, given: int | Path) -> cv2.VideoCapture:
        video = cv2.VideoCapture(given if isinstance(given, int) else str(given))
        if isinstance(given, int) and not video.isOpened():
            raise UserError(f"input={given}: there is no camera of that number, or another program uses it")
        return video

    def _frames(self, name: str, given: int | Path) -> Iterator[Frame]:
        video = self._open(given)
        try:
            camera = isinstance(given, int)
            width, height = (int(video.get(what)) for what in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
            if width * height > MAX_PIXELS:
                self.bad.append((name, f"{width} x {height} pixels, more than {MAX_PIXELS // 1_000_000} million"))
                return
            own = video.get(cv2.CAP_PROP_FPS)
            own = own if math.isfinite(own) and 0 < own <= 1000 else USUAL_FPS
            fps = CAMERA_FPS if camera else own / self.every
            number, begun = 0, time.monotonic()
            while self.limit is None or number < self.limit * self.every:
                if not video.grab():
                    break
                if number % self.every == 0:
                    read, image = video.retrieve()
                    if not read:
                        break
                    seconds = time.monotonic() - begun if camera else number / own
                    rgb = np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)
                    yield Frame(name, rgb, number, round(seconds, 3), fps)
                number += 1
            else:
                return  # at the limit
            said = int(max(video.get(cv2.CAP_PROP_FRAME_COUNT), 0))
            if number == 0:
                self.bad.append((name, "no frame can be read: not a video, cut short, or of an unknown kind"))
            elif not camera and number + max(2, said // 50) < said:  # some containers only estimate
                self.bad.append((name, f"cut short: {number:,} of {said:,} frames could be read"))
        finally:
            video.release()
