"""A camera on the loopback, for tests: it sends what it is told to each that connects, and ends as it is told."""

from __future__ import annotations

import contextlib
import io
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import av
import numpy as np


def transport_stream(
    frames: int = 20, side: int = 48, codec: str = "mpeg2video", grey: int | None = None, good: int = 10**6
) -> bytes:
    """Encode pictures at 25 a second, a key frame every fifth.

    All are different unless `grey` is given. From picture number `good` on, packets hold nothing that can be decoded.
    """
    file = io.BytesIO()
    with av.open(file, "w", format="mpegts") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width = stream.height = side
        stream.pix_fmt, stream.gop_size, stream.max_b_frames = "yuv420p", 5, 0
        for n in range(frames):
            level = 10 * n % 250 if grey is None else grey
            picture = av.VideoFrame.from_ndarray(np.full((side, side, 3), level, np.uint8), format="rgb24")
            for packet in stream.encode(picture):
                container.mux(packet if n < good else _broken(packet))
        container.mux(stream.encode(None))
    return file.getvalue()


def _broken(packet: Any) -> Any:
    broken = av.Packet(bytes(packet)[:6] + bytes(100))  # where a picture begins is kept, or packets would be merged
    broken.stream, broken.pts, broken.dts = packet.stream, packet.pts, packet.dts
    broken.time_base = packet.time_base
    return broken


@dataclass(frozen=True)
class Play:
    """What one connection gets: data, evenly over some seconds, and how and when it ends.

    A reset takes along what was not yet read, so one that is to come after a frame has to wait for it.
    """

    data: bytes
    end: Literal["close", "reset", "silent"] = "close"
    seconds: float = 0.0
    after: threading.Event | None = None


@dataclass
class Camera:
    """A camera; the last of its plays is repeated for all further connections."""

    plays: list[Play]
    links: int = 0
    off: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = self.server.accept()
                play = self.plays[min(self.links, len(self.plays) - 1)]
                self.links += 1
                threading.Thread(target=self._play, args=(link, play), daemon=True).start()

    def _play(self, link: socket.socket, play: Play) -> None:
        parts = max(round(play.seconds / 0.02), 1)
        size = -(-len(play.data) // parts)
        with contextlib.suppress(OSError), link:
            for start in range(0, len(play.data), max(size, 1)):
                link.sendall(play.data[start : start + size])
                self.off.wait(play.seconds / parts)
            if play.after:
                play.after.wait()
            if play.end == "silent":
                self.off.wait()
            if play.end == "reset":
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(self) -> None:
        self.off.set()
        self.server.close()


def closed_port() -> int:
    """Return a port that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def camera(*plays: Play) -> Iterator[Camera]:
    """Run a camera."""
    running = Camera(list(plays))
    try:
        yield running
    finally:
        running.close()
