"""Decode the frames that are wanted, by going on or by seeking, whichever decodes less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import av

from dynskip.video.causes import of_machine
from dynskip.video.packets import PacketIndex

_INTRA = 1  # FFmpeg's number of a picture type
# Codecs whose frames that no other frame needs can be left out, without a change to the others.
_SKIPS = ("h264", "mpeg2video", "mpeg4")


class AstrayError(Exception):
    """Decoding after a seek did not give what the index promises."""


class Decoder:
    """Frames of an open file, by their numbers in its index.

    Args:
        container: PyAV's container.
        stream: its video stream.
        index: its packets.
        wanted: numbers of all frames that may be asked for. Others are decoded only where these need them.

    Attributes:
        walked: frames that were decoded.
    """

    def __init__(self, container: Any, stream: Any, index: PacketIndex, wanted: Sequence[int]) -> None:
        self._container, self._stream, self._index = container, stream, index
        self._wanted = {int(index.times[number]) for number in wanted}
        stream.codec_context.thread_count = 1  # several videos are decoded at a time
        self._skips = stream.codec_context.name in _SKIPS
        self._place, self._last = -1, -1  # the packet to come, and the last frame that was given
        self._frames: Iterator[Any] = iter(())
        self.walked = 0

    def frame(self, number: int) -> Any:
        """Return PyAV's frame of a number.

        Raises:
            AstrayError: if it does not come, or is damaged.
        """
        start, pts = self._index.start(number), int(self._index.times[number])
        try:
            if number <= self._last or start > self._place:
                self._frames = self._from(start)
            self._last = number
            for frame in self._frames:
                if frame.pts == pts:
                    return frame
                if frame.pts is None or frame.pts > pts:
                    break
        except av.error.FFmpegError as error:
            raise AstrayError from error
        raise AstrayError

    def _from(self, start: int) -> Iterator[Any]:
        """Seek to a key frame, and decode from there on."""
        times, codec = self._index.pts, self._stream.codec_context
        pts, dts = int(times[start]), int(self._index.dts[start])
        self._container.seek(min(dts, pts), stream=self._stream)
        self._place, proven = -1, False
        for packet in self._container.demux(self._stream):
            if packet.size:
                if self._place < 0:
                    if packet.pts != pts:
                        if packet.dts is not None and packet.dts > dts:
                            raise AstrayError
                        continue  # before the key frame
                    self._place = start
                if self._place >= len(times) or packet.pts != times[self._place]:
                    raise AstrayError
                self._place += 1
                if self._skips:
                    codec.skip_frame = "DEFAULT" if packet.pts in self._wanted else "NONREF"
            for frame in packet.decode():
                self.walked += 1
                if frame.pts is None or frame.is_corrupt:
                    raise AstrayError
                if frame.pts < pts:
                    continue  # it needs frames before the key frame
                if frame.pts == pts:
                    proven = frame.pict_type == _INTRA
                if not proven:  # a container may call any frame a key frame
                    raise AstrayError
                yield frame


def one_pass(container: Any, stream: Any) -> Iterator[Any]:
    """Decode a file from its start; what is damaged is left out.

    Yields:
        PyAV's frames, and `None` for each packet that could not be decoded.
    """
    stream.codec_context.thread_count = 1
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError as error:
            if of_machine(error):
                raise
            return  # the file ends here
        if packet is None:
            return
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            if of_machine(error):
                raise
            yield None
            continue
        yield from frames
