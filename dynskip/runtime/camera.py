"""A camera that is being served: an endless series of videos, and what became of its frames."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dynskip.errors import DynskipError
from dynskip.output import FrameResult
from dynskip.runtime.counters import StreamCounters
from dynskip.runtime.mailbox import Mailbox
from dynskip.runtime.scheduler import Event, Stream


@dataclass(eq=False)
class Camera:
    """An endless series of videos, of `num_frames` frames each."""

    key: str
    mailbox: Mailbox
    close: Callable[[], Any] | None  # ends its source, from any thread
    prepare: Callable[[Any], Any] | None
    period: float  # least seconds between two frames
    priority: float
    idle_timeout: float
    num_frames: int
    stopped: list[int]  # frames, by gate
    due: float = -math.inf  # no frame is taken before
    stream: Stream | None = None  # the open video
    taken: int = 0  # frames of the current video, unseen ones included
    frame: Any = None  # the one taken last, as the source gave it
    came: float = 0.0  # when it was new
    link: int = 0  # connections of its source, as far as videos know
    in_flight: bool = False
    over: bool = False
    unseen: int = 0
    used: int = 0
    answers: int = 0
    macs: float = 0.0
    lag: float = 0.0
    lag_sum: float = 0.0

    @property
    def waits_since(self) -> float:
        """Since when it could have given a frame; infinite if it has none."""
        since = self.mailbox.since
        return math.inf if since is None else max(since, self.due)

    def take(self, now: float) -> bool:
        """Take the newest frame out of the mailbox; return whether there was one."""
        if (item := self.mailbox.take()) is None:
            return False
        self.frame, self.came = item
        # A frame that is taken late does not make the next one late; but missed frames are not made up for.
        self.due = (self.due if self.due + self.period > now else now) + self.period
        self.taken += 1
        return True

    def note(self, event: Event, now: float) -> None:
        """Count what became of a frame, or of a video."""
        if isinstance(event, FrameResult):
            self.lag = event.lag = now - self.came
            self.lag_sum += self.lag
            self.macs += event.frame_macs
            event.image, self.frame, self.in_flight = self.frame, None, False
            if event.used:
                self.used += 1
            else:
                self.stopped[event.stopped_at] += 1
            return
        assert self.stream is not None
        self.macs += event.macs - self.stream.macs  # a fallback's
        self.answers += event.error is None and event.frames_seen > 0
        self.stream, self.taken = None, self.taken % self.num_frames

    def skip(self, now: float) -> None:
        """Count a frame of a video that has ended early."""
        self.unseen += self.take(now)
        self.frame = None
        self.taken %= self.num_frames

    def leave(self) -> None:
        """Take no more frames, and tell the source."""
        self.mailbox.close(lost=self.in_flight)
        if self.close is not None:
            with contextlib.suppress(Exception):
                self.close()

    def silence(self, now: float) -> DynskipError:
        """Say that no frame comes."""
        return DynskipError(
            f"No frame has come for {now - self.mailbox.newest:.1f} s; the idle timeout is {self.idle_timeout:g} s. "
            "See whether the source is alive, and add it again."
        )

    def counters(self, now: float) -> StreamCounters:
        """Return its counters."""
        received, dropped = self.mailbox.counts()
        return StreamCounters(
            frames_in=received,
            frames_dropped=dropped,
            frames_unseen=self.unseen,
            frames_stopped=tuple(self.stopped),
            frames_used=self.used,
            answers=self.answers,
            reconnects=self.mailbox.reconnects,
            macs=self.macs,
            lag=self.lag,
            lag_sum=self.lag_sum,
            silent=now - self.mailbox.newest,
        )
