"""Frame sources: where the frames of one video come from."""

from __future__ import annotations

import contextlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from dynskip.errors import DynskipError

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".3gp", ".wmv")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class VideoError(DynskipError):
    """A file or folder that gives no frames."""


class FrameSource(ABC):
    """The frames of one video. Subclass it to read frames from anywhere else.

    The length may be an estimate until `read` has been called: headers of video files are often wrong. Whoever picks
    frames by the length picks again where reading has changed it, as `sample_frames` does.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of frames."""

    @abstractmethod
    def read(self, numbers: Sequence[int], short_side: int) -> list[np.ndarray]:
        """Return some frames.

        Args:
            numbers: which frames, counted from 0; in ascending order, each once.
            short_side: pixels to scale the shorter side to.

        Returns:
            A picture `(H, W, 3)`, uint8 RGB, for each number below the true number of frames.

        Raises:
            VideoError: if frames cannot be read.
        """


def open_source(path: Path) -> FrameSource:
    """Open a video file, a folder of extracted frames or a still picture.

    Args:
        path: where it is. A picture is a video of one frame.

    Returns:
        Its frames.

    Raises:
        VideoError: if there is nothing, or a folder holds no frames.
    """
    if path.is_dir():
        return Pictures(path, list_pictures(path))
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return Pictures(path, [path])
    return VideoFile(path)


def sample_frames(
    source: FrameSource, num_frames: int, short_side: int, rng: random.Random | None = None
) -> np.ndarray:
    """Read frames spread evenly over a video.

    Args:
        source: the video.
        num_frames: frames to return; a shorter video repeats some.
        short_side: pixels to scale the shorter side to.
        rng: draw each frame at random from its part of the video; by default the middle of the part.

    Returns:
        `(T, H, W, 3)` uint8 RGB frames.

    Raises:
        VideoError: if frames cannot be read, there are none, or their sizes differ.
    """
    offsets = [rng.random() if rng else 0.5 for _ in range(num_frames)]
    count = -1
    while count != len(source):
        count = len(source)
        numbers = [int(count / num_frames * (i + offset)) for i, offset in enumerate(offsets)]
        chosen = sorted(set(numbers)) if count else []
        frames = dict(zip(chosen, source.read(chosen, short_side), strict=False))
    if not count:
        raise VideoError(f"{source} holds no frame. Expected at least one picture.")
    if len({frame.shape for frame in frames.values()}) > 1:
        raise VideoError(f"{source}: its frames have different sizes. Extract or encode them in one size.")
    return np.stack([frames[number] for number in numbers])


class VideoFile(FrameSource):
    """A file that FFmpeg can read, decoded from its start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._count: int | None = None

    def __str__(self) -> str:
        return str(self.path)

    def __len__(self) -> int:
        if self._count is None:
            with open_video(self.path) as (container, stream):
                self._count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        return self._count

    def read(self, numbers: Sequence[int], short_side: int) -> list[np.ndarray]:
        """Decode the whole file, which also tells the true number of frames."""
        wanted, frames, count = set(numbers), [], 0
        with open_video(self.path) as (container, stream):
            for frame in container.decode(stream):
                if count in wanted:
                    frames.append(to_array(frame, short_side))
                count += 1
        self._count = count
        return frames


class Pictures(FrameSource):
    """Pictures as the frames of a video, in the given order."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.path, self.files = path, files

    def __str__(self) -> str:
        return str(self.path)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, numbers: Sequence[int], short_side: int) -> list[np.ndarray]:
        """Read the pictures of these numbers."""
        return [_read_picture(self.files[number], short_side) for number in numbers]


def list_pictures(folder: Path) -> list[Path]:
    """List a folder's extracted frames in order: `image_00001.jpg`, `img_00001.jpg`, `00001.jpg`, ..."""
    numbered: dict[str, dict[int, Path]] = {}
    for file in folder.iterdir():
        match = re.fullmatch(r"(.*?)(\d+)", file.stem)
        if match and file.suffix.lower() in PICTURE_SUFFIXES and not match[1].startswith("flow"):  # TSN's optical flow
            numbered.setdefault(match[1], {})[int(match[2])] = file
    if len(numbered) != 1:
        found = "no pictures" if not numbered else f"pictures of several kinds ({', '.join(sorted(numbered))})"
        raise VideoError(f"{folder}: holds {found}. Expected one video's frames, such as image_00001.jpg.")
    (frames,) = numbered.values()
    return [frames[number] for number in sorted(frames)]


def _read_picture(file: Path, short_side: int) -> np.ndarray:
    try:
        with Image.open(file) as picture:
            scale = short_side / min(picture.size)
            width, height = (max(round(side * scale), 1) for side in picture.size)
            return np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    except FileNotFoundError:
        raise VideoError(f"{file}: no such file.") from None
    except (OSError, ValueError, SyntaxError) as error:  # PIL raises SyntaxError for some damaged files
        raise VideoError(f"{file}: not a readable picture ({error}). Extract this video's frames again.") from error


@contextlib.contextmanager
def open_video(address: Path | str, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Open the best video stream of a file or address.

    Args:
        address: a file, or what else FFmpeg opens.
        **options: passed to `av.open`.

    Yields:
        PyAV's container and stream.

    Raises:
        VideoError: if it cannot be opened, or FFmpeg fails while it is open.
    """
    av.logging.set_libav_level(av.logging.PANIC)  # our errors say it better
    try:
        with av.open(str(address), metadata_errors="ignore", **options) as container:
            stream = container.streams.best("video")
            if stream is None or container.format.name == "tty":  # FFmpeg plays plain text as a terminal recording
                raise VideoError(f"{address}: holds no video stream. Expected a video file such as .mp4 or .mkv.")
            yield container, stream
    except av.error.FileNotFoundError:
        raise VideoError(f"{address}: no such file or address.") from None
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"{address}: not a readable video ({error}). Try to play or re-encode it.") from error


def to_array(frame: Any, short_side: int) -> np.ndarray:
    """Turn a frame of PyAV into an upright picture.

    Args:
        frame: an `av.VideoFrame`.
        short_side: pixels to scale the shorter side to.

    Returns:
        `(H, W, 3)` uint8 RGB.
    """
    scale = short_side / min(frame.width, frame.height)
    image = frame.reformat(max(round(frame.width * scale), 1), max(round(frame.height * scale), 1), format="rgb24")
    return np.rot90(image.to_ndarray(), round(frame.rotation / 90)).copy()  # phones store how they were held
