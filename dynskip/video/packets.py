"""What a video file holds, told by its packets without decoding: its frames, when each is shown, where to seek."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from typing import Any

import av
import numpy as np

from dynskip.video.causes import of_machine

KEYLESS = "it does not begin with a key frame"


@dataclass(frozen=True)
class PacketIndex:
    """The packets of a video stream. A place is a packet's position in decoding order; packets without times have none.

    Attributes:
        pts: `(P,)` when the frame of each packet is shown.
        dts: `(P,)` when it is decoded.
        key: `(P,)` whether decoding can begin here.
        shown: `(F,)` place of each frame that is shown, in order of time.
        times: `(F,)` when each of them is shown.
        count: packets that make a frame which is shown.
        promised: frames that the file's header tells of, which is often wrong.
        one_pass: why frames cannot be told by their times, so that the file has to be read in one pass; else empty.
    """

    pts: np.ndarray
    dts: np.ndarray
    key: np.ndarray
    shown: np.ndarray
    times: np.ndarray
    count: int
    promised: int = 0
    one_pass: str = ""

    def __post_init__(self) -> None:
        places = np.flatnonzero(self.key)
        object.__setattr__(self, "_keys", places[np.argsort(self.pts[places], kind="stable")])

    def start(self, number: int) -> int:
        """Return the place of the last key frame that is shown no later than a frame.

        What is decoded before a key frame matters only to frames that are shown before it, so decoding from here on
        gives the frame as decoding from the file's start does.
        """
        keys: np.ndarray = self._keys  # type: ignore[attr-defined]
        return int(keys[np.searchsorted(self.pts[keys], self.times[number], side="right") - 1])

    def number(self, pts: int | None) -> int:
        """Return the number of the frame that is shown at a time; -1 where there is none."""
        if pts is None:
            return -1
        found = int(np.searchsorted(self.times, pts))
        return found if found < len(self.times) and self.times[found] == pts else -1


def read_index(container: Any, stream: Any) -> PacketIndex:
    """Read the packets of a stream up to its end, or up to where the file is damaged.

    Args:
        container: PyAV's container, at its start.
        stream: its video stream.
    """
    pts, dts, key, hidden = array("q"), array("q"), array("b"), array("b")
    count, timeless, promised = 0, 0, int(stream.frames)
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            count += not packet.is_discard
            if packet.pts is None:
                timeless += 1
                continue
            pts.append(packet.pts)
            dts.append(packet.pts if packet.dts is None else packet.dts)
            key.append(packet.is_keyframe)
            hidden.append(packet.is_discard)
    except (av.error.FFmpegError, OSError, MemoryError) as error:
        if not count or of_machine(error):
            raise  # else the file ends here
    moments = np.array(pts, np.int64)
    places = np.flatnonzero(~np.array(hidden, bool))
    shown = places[np.argsort(moments[places], kind="stable")]
    index = PacketIndex(moments, np.array(dts, np.int64), np.array(key, bool), shown, moments[shown], count, promised)
    return replace(index, one_pass=_why_one_pass(stream, index, timeless))


def _why_one_pass(stream: Any, index: PacketIndex, timeless: int) -> str:
    if timeless:
        return "its packets have no times"
    if not index.count:
        return ""
    if (np.diff(index.times) == 0).any():
        return "several of its frames have the same time"
    if not index.key[0]:
        return KEYLESS
    if index.times[0] < index.pts[0]:
        return "its first frames need frames that were cut off"
    if stream.codec_context.name == "vp8":
        return "VP8 has packets that show nothing"
    return ""
