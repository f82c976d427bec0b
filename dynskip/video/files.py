"""Video files, decoded by FFmpeg."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter

from dynskip.video.causes import check_encryption, explain, is_cut_off
from dynskip.video.decoder import AstrayError, Decoder, one_pass
from dynskip.video.packets import KEYLESS, PacketIndex, read_index
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


MAX_LOSS = 0.5


class VideoFile(FrameSource):
    """A file that FFmpeg can read.

    Its frames are those of a full decode, in order of time. Which there are is read from the file's packets, and single
    frames are decoded by seeking. Where packets do not tell, the whole file is decoded, and `one_pass` says why. A
    damaged packet costs its own frames: each shows what was shown last before it, as in a player.

    Args:
        path: where it is.
        max_loss: a video that lost more than this share of its frames is refused.
    """

    def __init__(self, path: Path, max_loss: float = MAX_LOSS) -> None:
        self.path, self.max_loss = path, max_loss
        self.decoded = 0
        self._count: int | None = None
        self._index: PacketIndex | None = None
        self._opened: contextlib.ExitStack | None = None  # the file, from reading its packets to reading its frames
        self._lost = self._bad = 0
        self._astray = ""

    def __str__(self) -> str:
        return str(self.path)

    def __len__(self) -> int:
        return self.index.count if self._count is None else self._count

    @property
    def index(self) -> PacketIndex:
        """The file's packets."""
        if self._index is None:
            with contextlib.ExitStack() as stack:
                self._video = stack.enter_context(open_video(self.path))
                self._index = read_index(*self._video)
                self._opened = stack.pop_all()
        return self._index

    @property
    def one_pass(self) -> str:  # type: ignore[override]
        """Why the whole file is decoded, whichever frames are wanted; empty where it can be sought."""
        return self.index.one_pass or self._astray

    @property
    def damage(self) -> str:  # type: ignore[override]
        """What of the video is lost, as far as it has been decoded; empty where nothing is."""
        found = []
        if self._bad or self._lost:
            packets = f"{self._bad} of {self.index.count} packets" if self._bad else "packets are missing"
            frames = "no frame" if not self._lost else "1 frame" if self._lost == 1 else f"{self._lost} frames"
            found.append(f"damaged: {packets}, {frames} lost")
        if self.index.promised > self.index.count and is_cut_off(self.path):
            found.append(f"cut off: {self.index.count} of {self.index.promised} frames are there")
        return "; ".join(found)

    def read(self, numbers: Sequence[int], short_side: int) -> list[np.ndarray]:
        """Read some frames; see `FrameSource.read`."""
        if self.index.one_pass:
            return self._read_all(set(numbers), short_side)
        return list(self.read_each([number for number in numbers if number < len(self)], short_side))

    def read_each(self, numbers: Sequence[int], short_side: int) -> Iterator[np.ndarray]:
        """Give some frames one by one, each decoded when it is asked for; see `FrameSource.read_each`."""
        if self.index.one_pass:
            yield from super().read_each(numbers, short_side)
            return
        numbers, given = list(numbers), 0
        try:
            if not self._astray:
                with self._open() as (container, stream):
                    aspect, reformatter = pixel_aspect(stream), VideoReformatter()
                    decoder = Decoder(container, stream, self.index, numbers)
                    for number in numbers:
                        self.decoded -= decoder.walked
                        try:
                            frame = decoder.frame(number)
                        finally:
                            self.decoded += decoder.walked
                        yield to_array(frame, short_side, aspect, reformatter)
                        given += 1
                return
        except AstrayError:
            self._astray = "seeking did not give the frames that its packets promise"
        # Frames that were given are right: each was decoded from a whole key frame.
        yield from self._in_order(numbers[given:], short_side)

    def check(self) -> str:
        """Decode the whole file; see `FrameSource.check`."""
        if self.index.one_pass:
            self._read_all(set(), 1)
        else:
            for _ in self._walk([len(self) - 1] if len(self) else []):
                pass
        return self.damage

    def _in_order(self, numbers: Sequence[int], short_side: int) -> Iterator[np.ndarray]:
        """Give frames of a file that is decoded once, from its start; those that are wanted later are kept."""
        kept: dict[int, np.ndarray] = {}
        walk = self._walk(sorted(set(numbers)))
        for number in numbers:
            while number not in kept:
                found, frame, aspect = next(walk)
                kept[found] = to_array(frame, short_side, aspect)
            yield kept[number]

    def _walk(self, wanted: Sequence[int]) -> Iterator[tuple[int, Any, float]]:
        """Decode from the start; yield wanted numbers, their frames, and the pixels' aspect."""
        index = self.index
        left, last, shown = list(reversed(wanted)), -1, None
        self._lost = self._bad = 0
        with open_video(self.path) as (container, stream):
            aspect = pixel_aspect(stream)
            for frame in itertools.chain(one_pass(container, stream), (_END,)):
                if frame is None:
                    self._bad += 1
                    continue
                number = index.count if frame is _END else index.number(frame.pts)
                if number <= last:
                    continue
                self._lose(number - last - 1)
                if shown is None:  # what is lost before the first frame shows the first
                    shown = frame
                if shown is _END:
                    raise VideoError(f"{self.path}: not a readable video: none of its frames can be decoded.")
                while left and left[-1] < number:
                    yield left.pop(), shown, aspect
                if frame is not _END:
                    self.decoded += 1
                    last, shown = number, frame
                while left and left[-1] == number:
                    yield left.pop(), shown, aspect
                if not left:
                    return

    def _read_all(self, wanted: set[int], short_side: int) -> list[np.ndarray]:
        """Decode the whole file, which also tells the true number of frames."""
        frames, count, self._bad, self._lost = [], 0, 0, 0
        with open_video(self.path) as (container, stream):
            aspect = pixel_aspect(stream)
            for frame in one_pass(container, stream):
                if frame is None:
                    self._bad += 1
                    continue
                if count in wanted:
                    frames.append(to_array(frame, short_side, aspect))
                count += 1
        self.decoded += count
        self._count = count
        if self._bad and not count:
            raise VideoError(f"{self.path}: not a readable video: none of its frames can be decoded.")
        # Of other files without times, packets and frames need not be as many.
        self._lose(max(self.index.count - count, 0) if self.index.one_pass == KEYLESS else self._bad)
        return frames

    def _lose(self, frames: int) -> None:
        self._lost += frames
        if self._lost > self.max_loss * self.index.count:
            raise VideoError(
                f"{self.path}: {self.damage}: more than the share of {self.max_loss} that is allowed. Fetch it again, "
                "or allow more with max_loss."
            )

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        stack, self._opened = self._opened, None
        if stack is None:
            with open_video(self.path) as video:
                yield video
        else:
            with stack:
                yield self._video


_END = object()


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


def pixel_aspect(stream: Any) -> float:
    """Return how much wider than high players show a stream's pixels; 1 where that is not set, or makes no sense."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 1 / 4 <= aspect <= 4 else 1.0


def to_array(frame: Any, short_side: int, aspect: float = 1.0, reformatter: Any = None) -> np.ndarray:
    """Turn a frame of PyAV into a picture as players show it: upright, in its colours.

    Args:
        frame: an `av.VideoFrame`.
        short_side: pixels to scale the shorter side to.
        aspect: how much wider than high a pixel is shown, as `pixel_aspect` returns it.
        reformatter: PyAV's, to use it for several frames.

    Returns:
        `(H, W, 3)` uint8 RGB.
    """
    shown = frame.width * aspect
    scale = short_side / min(shown, frame.height)
    size = max(round(shown * scale), 1), max(round(frame.height * scale), 1)
    space = _space(frame)
    colours = {"src_colorspace": space, "dst_colorspace": Colorspace.ITU601} if space is not None else {}
    full = frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj")
    image = (reformatter or VideoReformatter()).reformat(
        frame, *size, format="rgb24", src_color_range=_FULL_RANGE if full else None, **colours
    )
    return _upright(image.to_ndarray(), frame.side_data.get("DISPLAYMATRIX"))


# FFmpeg's numbers: of a frame's colour space, and what its scaler calls it.
_UNSPECIFIED, _SPACES, _FULL_RANGE = 2, {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}, 2


def _space(frame: Any) -> int | None:
    """Return the colour space of a frame for the scaler; `None` of one that has no luma.

    Where a file does not say, players take large pictures for BT.709 and small ones for BT.601.
    """
    if frame.colorspace == _UNSPECIFIED and not frame.format.is_rgb:
        return int(Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601)
    return _SPACES.get(frame.colorspace)


def _upright(picture: np.ndarray, matrix: Any) -> np.ndarray:
    """Turn and mirror a picture as a display matrix says; phones store how they were held."""
    if matrix is not None:
        a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
        if abs(b) > abs(a):
            picture, a, d = picture.transpose(1, 0, 2), c, b
        picture = picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(picture)
