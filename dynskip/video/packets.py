"""What a video file holds, told by its packets without decoding: its frames, when each is shown, where to seek."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import av

from dynskip.video.causes import of_machine

KEYLESS = "it does not begin with a key frame"


@dataclass(frozen=True)
class Packet:
    """A packet of the video: when its frame is shown, and whether decoding can begin here."""

    pts: int
    dts: int
    key: bool
    hidden: bool


@dataclass(frozen=True)
class PacketIndex:
    """The packets of a video stream. A place is a packet's position in decoding order.

    Attributes:
        packets: in decoding order; those without a time are left out.
        count: packets that make a frame which is shown.
        missing: frames that the file's header promises and that are not there.
        one_pass: why frames cannot be told by their times, so that the file has to be read in one pass; else empty.
    """

    packets: Sequence[Packet]
    count: int
    missing: int = 0
    one_pass: str = ""
    shown: Sequence[int] = field(init=False)
    _keys: Sequence[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        places = [place for place, packet in enumerate(self.packets) if not packet.hidden]
        object.__setattr__(self, "shown", sorted(places, key=lambda place: self.packets[place].pts))
        keys = sorted((packet.pts, place) for place, packet in enumerate(self.packets) if packet.key)
        object.__setattr__(self, "_keys", keys)

    def start(self, number: int) -> int:
        """Return the place of the last key frame that is shown no later than a frame.

        What is decoded before a key frame matters only to frames that are shown before it, so decoding from here on
        gives the frame as decoding from the file's start does.
        """
        pts = self.packets[self.shown[number]].pts
        return self._keys[bisect_right(self._keys, (pts, len(self.packets))) - 1][1]


def read_index(container: Any, stream: Any) -> PacketIndex:
    """Read the packets of a stream up to its end, or up to where the file is damaged.

    Args:
        container: PyAV's container, at its start.
        stream: its video stream.
    """
    packets: list[Packet] = []
    count = timeless = 0
    promised = int(stream.frames)
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            count += not packet.is_discard
            if packet.pts is None:
                timeless += 1
            else:
                dts = packet.pts if packet.dts is None else packet.dts
                packets.append(Packet(packet.pts, dts, packet.is_keyframe, packet.is_discard))
    except (av.error.FFmpegError, OSError, MemoryError) as error:
        if not count or of_machine(error):
            raise  # else the file ends here
    times = [packet.pts for packet in packets if not packet.hidden]
    missing = max(0, promised - len(packets) - timeless) if promised else 0
    return PacketIndex(packets, count, missing, _why_one_pass(stream, packets, times, timeless))


def _why_one_pass(stream: Any, packets: Sequence[Packet], times: Sequence[int], timeless: int) -> str:
    if timeless:
        return "its packets have no times"
    if not times:
        return ""
    if len(set(times)) < len(times):
        return "several of its frames have the same time"
    if not packets[0].key:
        return KEYLESS
    if min(times) < packets[0].pts:
        return "its first frames need frames that were cut off"
    if stream.codec_context.name == "vp8":
        return "VP8 has packets that show nothing"
    return ""
