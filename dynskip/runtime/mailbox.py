"""Mailboxes: of a live source, the newest frame wins."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any


class Mailbox:
    """The newest frame of a live source. Anybody puts frames in, from any thread; a `StreamServer` takes them out.

    A frame that still waits when the next one comes is dropped. So reading never waits for looking, and what is looked
    at is never old.

    Args:
        clock: returns seconds; by default `time.monotonic`. A server needs to have the same.

    Attributes:
        received: frames that were put in.
        dropped: frames that were put in and replaced by newer ones before their turn.
        reconnects: how often the source had to connect again; whoever puts the frames in counts. Videos do not go on
            across such a gap.
        since: when the first frame came that came after the last taken one; `None` if no frame waits.
        newest: when the newest frame came; before the first, when the mailbox was made.
        over: whether no more frames come.
        error: why no more frames come, if that is an error.
        closed: whether nobody takes frames any more.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.received = self.dropped = self.reconnects = 0
        self.since: float | None = None
        self.newest = clock()
        self.over = self.closed = False
        self.error: Exception | None = None
        self.wake: Callable[[], None] = lambda: None  # a server's, to be told of changes
        self._clock, self._lock = clock, threading.Lock()
        self._frame: tuple[Any, float] = (None, 0.0)

    def put(self, frame: Any, age: float = 0.0, lost: int = 0) -> bool:
        """Leave a frame.

        Args:
            frame: `(C, H, W)` normalised pixels.
            age: how old it is already, in seconds.
            lost: frames before it that the source itself has dropped.

        Returns:
            Whether there is anybody who takes frames. If not, stop sending.
        """
        with self._lock:
            now = self._clock()
            self.received += 1 + lost
            self.dropped += lost + (self.closed or self.since is not None)
            if self.closed:
                return False
            self._frame, self.newest = (frame, now - age), now
            self.since = now if self.since is None else self.since
        self.wake()
        return True

    def take(self) -> tuple[Any, float] | None:
        """Take the newest frame out, with the time when it was new; `None` if none waits."""
        with self._lock:
            if self.since is None:
                return None
            frame, self._frame, self.since = self._frame, (None, 0.0), None
            return frame

    def end(self, error: Exception | None = None) -> None:
        """Say that no more frames come. The one that waits is looked at first.

        Args:
            error: why, if that was not to be expected.
        """
        self.over, self.error = True, error
        self.wake()

    def close(self, lost: int = 0) -> None:
        """Take no more frames. Those that wait are dropped, and so are `lost` frames that were taken."""
        with self._lock:
            self.dropped += lost + (self.since is not None)
            self.closed, self._frame, self.since = True, (None, 0.0), None

    def counts(self) -> tuple[int, int]:
        """Return how many frames came, and how many were dropped, at one moment."""
        with self._lock:
            return self.received, self.dropped


def pull(source: Iterable[Any], mailbox: Mailbox) -> None:
    """Put the frames of a source into a mailbox until one of them is at its end. Run it in a thread of its own."""
    lost = 0
    try:
        frames = iter(source)
        try:
            for frame in frames:
                mailbox.reconnects = getattr(source, "reconnects", 0)
                before, lost = lost, getattr(source, "dropped", 0)
                if not mailbox.put(frame, getattr(source, "lag", 0.0), lost - before):
                    break
        finally:
            if hasattr(frames, "close"):
                frames.close()
    except Exception as error:
        mailbox.end(error)
    else:
        mailbox.end()
