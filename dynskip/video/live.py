"""Cameras and other live sources, read in a thread that connects again when the link breaks."""

from __future__ import annotations

import logging
import re
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import numpy as np
from torch import Tensor

from dynskip.errors import DynskipError
from dynskip.video.files import open_video, pixel_aspect, to_array
from dynskip.video.newest import Newest, Polled
from dynskip.video.preprocessing import Preprocessing
from dynskip.video.source import VideoError

log = logging.getLogger(__name__)
CATCH_UP = 3.0  # seconds; after so long behind, only key frames are decoded until the newest is reached
_STORED = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")  # what is a file, though it comes over HTTP
FROZEN = 60.0  # seconds after which it is said that the picture stays the same


class LinkLostError(VideoError):
    """A live source that did not come back in time."""


@dataclass(frozen=True, eq=False)
class LiveFrame:
    """A frame of a live source.

    Attributes:
        picture: the `av.VideoFrame`.
        time: seconds since the source's first frame, lost time included.
        link: number of the connection that it came through. Where it changes, frames are missing: start anew.
        aspect: how much wider than high a pixel is shown.
    """

    picture: Any
    time: float
    link: int
    aspect: float = 1.0

    def to_array(self, short_side: int) -> np.ndarray:
        """Return it as players show it, `(H, W, 3)` uint8 RGB, its shorter side scaled to so many pixels."""
        return to_array(self.picture, short_side, self.aspect)


class LiveSource(Newest[LiveFrame]):
    """The frames of a camera or another source that does not wait. The newest frame wins.

    A thread of its own reads and decodes. When the link breaks or falls silent, it connects again, after pauses that
    grow from 1 to 30 seconds. What happens goes to the logger `dynskip.video.live`, with advice. An address that never
    worked, for a reason that does not go away by waiting, raises a `VideoError`.

    Args:
        address: what FFmpeg opens, such as `rtsp://HOST/live`, or the number of a camera.
        lag: seconds; a frame that is older is dropped. The age counts from when the frame was due by its time stamp.
        queue: frames that are kept, the newest ones. With more than 1, frames come in order, the oldest first.
        timeout: seconds without a frame, or for opening, after which the link is given up.
        give_up: seconds without a frame after which a `LinkLostError` is raised; by default it tries for ever.
        format: FFmpeg's name of the format, where the address does not say: `v4l2`, `dshow`, `mjpeg`.
        options: options of FFmpeg, such as `{"rtsp_transport": "tcp"}`.

    Attributes:
        damaged: packets that could not be decoded.
        reconnects: how often a link came back.
        lost: seconds between links.

    Raises:
        DynskipError: if `lag`, `queue` or `timeout` is not positive.
    """

    def __init__(
        self,
        address: str | int,
        *,
        lag: float = 1.0,
        queue: int = 1,
        timeout: float = 20.0,
        give_up: float | None = None,
        format: str | None = None,
        options: dict[str, str] | None = None,
    ) -> None:
        super().__init__((), lag=lag, queue=queue)
        if not timeout > 0:
            raise DynskipError(f"timeout={timeout} has to be a positive number of seconds.")
        self.address, self.timeout, self.give_up = str(address), timeout, give_up
        self._options: dict[str, Any] = {"format": format}
        if isinstance(address, int):
            self.address, self._options = camera_address(address)
        # FFmpeg looks at 5 seconds before it gives the first frame, which is then as old.
        self._options["options"] = {"analyzeduration": "500000", **self._options.get("options", {}), **(options or {})}
        self.damaged = self.reconnects = 0
        self.lost = 0.0
        self._held: LiveFrame | None = None  # of the next video
        self._clock = Clock()
        self._seen = self._changed = time.monotonic()
        self._print = np.zeros(0, np.int16)

    def __str__(self) -> str:
        return re.sub(r"//[^/@]*@", "//", self.address)  # without user and password

    @property
    def quiet(self) -> float:
        """Seconds since the last frame came."""
        return time.monotonic() - self._seen

    @property
    def frozen(self) -> float:
        """For how many seconds the frames that came have shown the same picture."""
        return max(self._seen - self._changed, 0.0)

    def summary(self) -> str:
        """Say in a line what came, what was dropped, and how old the frame given last was."""
        parts = [f"{self.taken} frames came, {self.dropped} dropped, the last one given {self.lag:.1f} s old"]
        parts += [f"{self.damaged} damaged packets"] * (self.damaged > 0)
        parts += [f"{self.reconnects} reconnects ({self.lost:.1f} s lost)"] * (self.reconnects > 0)
        parts += [f"no frame for {self.quiet:.0f} s"] * (self.quiet > 2)
        parts += [f"the same picture for {self.frozen:.0f} s"] * (self.frozen > FROZEN)
        return f"{self}: {'; '.join(parts)}"

    def poll(self) -> LiveFrame | None:
        """Return the newest frame if there is one, else None."""
        held, self._held = self._held, None
        return held or super().poll()

    def video(self, preprocessing: Preprocessing, frames: int | None = None) -> LiveVideo:
        """Return the next frames as a video for `serve_streams`, `aserve_streams` or a session.

        Args:
            preprocessing: how frames become the network's input.
            frames: its length; by default the preprocessing's `num_frames`. A gap ends it earlier.

        Returns:
            An iterator of `(C, H, W)` tensors.
        """
        return LiveVideo(self, preprocessing, frames or preprocessing.num_frames)

    def _read(self) -> Iterator[tuple[LiveFrame, float]]:
        clock, pauses, link = self._clock, _pauses(), 0
        self._seen = self._changed = time.monotonic()
        while not self._closed.is_set():
            error: BaseException | None = None
            before, begun = self.taken, time.monotonic()
            try:
                for picture, aspect in self._connection():
                    now = time.monotonic()
                    if self.taken == before:
                        if link:
                            self.reconnects, self.lost = self.reconnects + 1, self.lost + now - self._seen
                            log.warning("%s: it is back after %.1f s.", self, now - self._seen)
                        link, pauses = link + 1, _pauses()
                        clock.start()
                    self._look(picture, now)
                    yield LiveFrame(picture, clock.at(picture.time, now), link, aspect), clock.late
            except DynskipError as caught:
                error = caught.__cause__ or caught
            if self._closed.is_set():
                return
            now = time.monotonic()
            lasted = now - begun if self.taken > before else None
            if isinstance(error, av.error.InvalidDataError) and lasted is None and now - begun >= self.timeout:
                error = av.error.TimeoutError(0, "")  # RTSP says so when it was silent
            words, hopeless = explain(error, self.address, lasted, self.timeout)
            if hopeless and not self.taken:
                raise VideoError(f"{self}: {words}") from error
            left = float("inf") if self.give_up is None else self.give_up - (now - self._seen)
            if left <= 0:
                raise LinkLostError(
                    f"{self}: {words} Given up after {now - self._seen:.0f} s without a frame."
                ) from error
            pause = min(next(pauses), left)
            log.warning("%s: %s Connecting again in %.3g s.", self, words, pause)
            self._closed.wait(pause)

    def _connection(self) -> Iterator[tuple[Any, float]]:
        """Connect, and yield pictures and their pixels' aspect until the link ends."""
        options = {**self._options, "timeout": (self.timeout, self.timeout)}
        with open_video(self.address, **options) as (container, stream):
            seen = on_time = time.monotonic()
            packets, joined, aspect = 0, False, pixel_aspect(stream)
            for packet in container.demux():  # all streams: sound that goes on must not hide that the pictures stopped
                if self._closed.is_set():
                    return
                pictures = []
                if packet.stream.index == stream.index:
                    packets += 1
                    try:
                        pictures = packet.decode()
                    except av.error.FFmpegError:
                        self.damaged += joined  # what comes before the first key frame lacks its references
                for picture in pictures:
                    yield picture, aspect
                    seen, packets, joined = time.monotonic(), 0, True
                    if self._clock.late <= self.max_lag:
                        on_time, stream.codec_context.skip_frame = seen, "DEFAULT"
                    elif seen - on_time > CATCH_UP:  # decoding is what is slow
                        stream.codec_context.skip_frame = "NONKEY"
                if time.monotonic() - seen > self.timeout:
                    what = f"{packets} packets came, none of which is a picture" if packets else "only sound came"
                    raise VideoError(f"for {self.timeout:g} s, {what}. Restart the camera or its encoder.")

    def _look(self, picture: Any, now: float) -> None:
        """Note that a frame came, and whether it shows something new."""
        bytes_ = np.frombuffer(picture.planes[0], np.uint8)
        sample = bytes_[:: max(len(bytes_) // 1000, 1) | 1].astype(np.int16)
        same = sample.shape == self._print.shape and int(np.abs(sample - self._print).max()) <= 4
        if same and self._seen - self._changed <= FROZEN < now - self._changed:
            log.warning("%s: the picture has been the same for %.0f s. Is the camera frozen?", self, FROZEN)
        if not same:
            self._changed, self._print = now, sample
        self._seen = now


class LiveVideo(Polled[Tensor]):
    """Some frames of a live source as one video; `LiveSource.video` makes it.

    It ends after its number of frames, or at a gap. The source goes on; its next frame begins the next video.

    Attributes:
        times: of the frames given so far, in the source's seconds.
    """

    def __init__(self, source: LiveSource, preprocessing: Preprocessing, frames: int) -> None:
        self.source, self.preprocessing, self.frames = source, preprocessing, frames
        self.news, self.times = source.news, list[float]()
        self._link = 0

    def poll(self) -> Tensor | None:
        """Return the newest frame `(C, H, W)` if there is one, else None."""
        if len(self.times) == self.frames:
            raise StopIteration
        if (frame := self.source.poll()) is None:
            return None
        if self.times and frame.link != self._link:
            self.source._held, self.frames = frame, len(self.times)
            raise StopIteration
        self._link = frame.link
        self.times.append(frame.time)
        picture = frame.to_array(self.preprocessing.short_side)
        return self.preprocessing.normalize(self.preprocessing.crop(picture[None]))[0]


class Clock:
    """The times of frames: they rise from 0, whatever stamps they carry, and go on when the link was lost.

    Attributes:
        time: of the last frame, in seconds.
        late: how much later it came than its stamp says, in seconds. A network that catches up sends old frames.
    """

    WINDOW = 10.0  # seconds; a delay that lasts for longer is how the source is now

    def __init__(self) -> None:
        self.time = self.late = 0.0
        self._now: float | None = None
        self._begun = 0.0
        self.start()

    def start(self) -> None:
        """Forget the stamps: those to come are of another clock."""
        self._stamp: float | None = None
        self._heard = 0.0
        self._least = [float("inf"), float("inf")]  # difference of clocks, in this window and the one before

    def at(self, stamp: float | None, now: float) -> float:
        """Move on to a frame by the stamp that it carries, if any, and by when it came; return its time."""
        step = 0.0 if stamp is None or self._stamp is None else stamp - self._stamp
        if self._now is None:
            self._now = self._begun = now
        elif 0 < step < 3600:
            self.time += step
        else:  # no stamps, others than before, or a clock that was set
            self.time = max(self.time + 1e-3, now - self._begun)
            self.start()
        self._heard += min(now - self._now, 1.0)  # a long silence does not make what comes after it new
        self._now, self._stamp = now, stamp
        if self._heard > self.WINDOW:
            self._heard, self._least = 0.0, [float("inf"), self._least[0]]
        difference = now - stamp if stamp is not None else 0.0
        self._least[0] = min(self._least[0], difference)
        self.late = difference - min(self._least)
        return self.time


def is_live(name: str, format: str | None = None) -> bool:
    """Say whether a source does not wait: a camera, a device or an address.

    Args:
        name: a path, an address or a camera's number. An HTTP address that ends like a video file is a file.
        format: FFmpeg's name of its format, if that is given.
    """
    if name.isdecimal() or (Path(name).exists() and not Path(name).is_file()):
        return True
    parts = urlsplit(name)
    if not name.startswith(f"{parts.scheme}://"):
        return format is not None and not Path(name).exists()
    return parts.scheme not in ("http", "https", "file") or not parts.path.lower().endswith(_STORED)


def camera_address(number: int) -> tuple[str, dict[str, Any]]:
    """Return how FFmpeg calls a camera: its address, and what `av.open` has to know."""
    if sys.platform == "linux":
        return f"/dev/video{number}", {"format": "v4l2"}
    if sys.platform == "darwin":
        return str(number), {"format": "avfoundation", "options": {"framerate": "30"}}
    raise DynskipError("Here a camera goes by its name, as FFmpeg lists it: 'video=NAME', with the format dshow.")


def _pauses() -> Iterator[float]:
    """Yield the seconds to wait before connecting again: 1, 2, 4, ... 30, 30."""
    pause = 1.0
    while True:
        yield pause
        pause = min(2 * pause, 30.0)


def explain(error: BaseException | None, address: str, lasted: float | None, timeout: float) -> tuple[str, bool]:
    """Say why there are no frames, and what helps.

    Args:
        error: what was raised, or None if the source closed the link in order.
        address: of the source.
        lasted: seconds that the link lasted, if frames came.
        timeout: seconds after which a silent link is given up.

    Returns:
        A sentence or two, and whether an address that never worked is not worth another try.
    """
    name = getattr(error, "strerror", None) or str(error)
    parts = urlsplit(address)
    if isinstance(error, VideoError):
        return str(error).partition(f"{address}: ")[2] or str(error), "holds no video" in str(error)
    if isinstance(error, av.error.ExitError | TimeoutError):
        return f"no frame for {timeout:g} s. Is the camera overloaded, its picture damaged, or the network cut?", False
    if isinstance(error, av.error.HTTPUnauthorizedError | av.error.HTTPForbiddenError | PermissionError):
        help_ = f"Give {parts.scheme}://USER:PASSWORD@{parts.hostname}..." if parts.hostname else "May you read it?"
        return f"no permission ({name}). {help_}", True
    if isinstance(error, ConnectionRefusedError):
        return "refused: nothing listens there. Is the camera on, and is the port right?", False
    if isinstance(error, av.error.HTTPNotFoundError | FileNotFoundError):
        return f"nothing is there ({name}). Is the path or the camera's number right?", True
    if isinstance(error, av.error.ProtocolNotFoundError | av.error.DemuxerNotFoundError):
        return f"FFmpeg cannot open such an address ({name}). Try rtsp://, http:// or tcp://.", True
    if lasted is not None:
        return f"the link broke after {lasted:.1f} s ({name if error else 'closed'}).", False
    if parts.hostname and not _is_known(parts.hostname):
        return f"there is no host {parts.hostname}. Is the name right, and the network up?", True
    if isinstance(error, av.error.InvalidDataError):
        return f"what it sends is no video ({name}). Is the address right, or a format missing?", False
    return f"the link broke before the first frame ({name if error else 'closed'}).", False


def _is_known(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True
