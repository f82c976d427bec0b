"""Video files, decoded by FFmpeg."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from dynskip.video.causes import check_encryption, explain
from dynskip.video.source import FrameSource, VideoError

# Every usual suffix of what FFmpeg decodes. Suffixes that mostly mean something else (.dat, .ogg, .mp3) are not here.
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mj2", ".f4v", ".flv", ".ismv",
    ".mkv", ".mk3d", ".webm", ".ogv", ".ogm", ".nut",
    ".avi", ".divx", ".wmv", ".asf", ".rm", ".rmvb",
    ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".mp2v", ".mpv", ".vob", ".evo",  # discs
    ".ts", ".m2ts", ".mts", ".m2t", ".trp", ".tod", ".mod", ".dv", ".dif", ".lrv", ".insv", ".360",  # camcorders
    ".mxf", ".gxf", ".lxf", ".wtv", ".dvr-ms", ".ty", ".pva", ".nuv", ".nsv", ".dav", ".h264", ".h265",  # broadcast
    ".264", ".265", ".hevc", ".avc", ".vvc", ".ivf", ".obu", ".vc1", ".h261", ".h263", ".y4m", ".mjpeg", ".mjpg",
    ".gif", ".apng", ".fli", ".flc", ".amv", ".bik", ".smk", ".roq", ".mve",
)  # fmt: skip


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


@contextlib.contextmanager
def open_video(address: Path | str, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Open the best video stream of a file or address.

    Args:
        address: a file, as a `Path`; or, as a string, whatever FFmpeg opens.
        **options: passed to `av.open`.

    Yields:
        PyAV's container and stream.

    Raises:
        VideoError: if it cannot be opened, or FFmpeg fails while it is open.
        MachineError: if that is this machine's fault.
    """
    av.logging.set_libav_level(av.logging.PANIC)  # our errors say it better
    try:
        # To FFmpeg, a relative path with a colon is an address.
        target = os.path.abspath(address) if isinstance(address, Path) else address
        with av.open(target, metadata_errors="ignore", **options) as container:
            stream = best_stream(container, address)
            if os.path.isfile(address):
                check_encryption(Path(address))
            yield container, stream
    except (av.error.FFmpegError, OSError, MemoryError) as error:
        raise explain(error, address) from error


def best_stream(container: Any, address: Path | str) -> Any:
    """Return the best video stream of a container. A cover picture is none.

    Args:
        container: PyAV's container.
        address: its name, for the error.

    Raises:
        VideoError: if there is none.
    """
    cover = av.stream.Disposition.attached_pic
    films = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not films or container.format.name == "tty":  # FFmpeg plays plain text as a terminal recording
        found = "no video, only a cover picture" if not films and container.streams.video else "no video stream"
        raise VideoError(f"{address}: holds {found}. Expected a video file such as .mp4 or .mkv.")
    best = container.streams.best("video")
    return best if best in films else films[0]


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
