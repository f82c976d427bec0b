"""A server: cameras that come and go, for weeks. It decides which frame is looked at; the scheduler does the rest."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from dynskip._check import check_positive
from dynskip.errors import DynskipError
from dynskip.output import FrameResult, VideoResult
from dynskip.runtime.camera import Camera
from dynskip.runtime.counters import StreamCounters, log_line, summed
from dynskip.runtime.mailbox import Mailbox, pull
from dynskip.runtime.scheduler import Event, Scheduler

if TYPE_CHECKING:
    from dynskip.wrapper import StopOrForward

LOG_EVERY = 60.0  # seconds
LONGEST_WAIT = 1.0  # seconds; some systems give a signal to another thread than the one that waits
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamEnd:
    """A stream has ended. Its key is free again.

    Attributes:
        key: name of the stream.
        error: why it ended; `None` if it was removed, or its source has no more frames.
        counters: what became of its frames.
    """

    key: str
    error: Exception | None
    counters: StreamCounters


ServerEvent: TypeAlias = FrameResult | VideoResult | StreamEnd


class StreamServer:
    """Classifies cameras that come and go, for as long as it takes: iterate over it for what happens.

    A camera is an endless series of videos. Each is answered after `num_frames` frames; then the next one begins. Where
    the model ends a video early, the rest of its frames is not looked at. Where the source had to connect again, the
    next video begins at once.

    A thread reads each source, and the newest frame wins. Frames run in the thread that iterates. When there is room
    for a frame, the most urgent camera with a frame gives it: the one for which the time when it began to wait, minus
    `priority * ageing`, is earliest. So important cameras wait for less, and nobody starves: a camera is overtaken only
    by those that began to wait less than `ageing` times the difference in priority after it.

    A stream ends by itself where its source ends, or with an error: if its source raises, a frame does not fit, the
    model raises on one of its frames, or no frame comes for `idle_timeout`. The others do not notice.

    `add`, `remove`, `counters` and `close` may be called from any thread, `close` from signal handlers, too. The logger
    `dynskip.runtime.serving` tells once a minute what happened, and errors of streams at once.

    Args:
        model: a model in evaluation mode.
        max_streams: videos that are open at once. Of more cameras, some wait until others' videos are answered.
        batch_size: most frames in one stage run. At most twice as many are in flight.
        ageing: seconds of waiting that make up for a step of priority.
        clock: returns seconds; for tests.

    Raises:
        DynskipError: if a number is not positive, or the model is in training mode.
    """

    def __init__(
        self,
        model: StopOrForward,
        max_streams: int = 64,
        batch_size: int = 16,
        ageing: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = Scheduler(model, max_streams, batch_size)
        self._in_flight = 2 * batch_size
        self._ageing, self._clock = check_positive(ageing, "ageing"), clock
        self._cameras: dict[str, Camera] = {}
        self._leaving: list[Camera] = []
        self._lock = threading.RLock()  # of the two above, and of counters
        self._closed = False
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # unlike events, it may be rung in signal handlers
        self._threads: list[threading.Thread] = []
        self._gone = summed([])  # counters of streams that have ended
        self._logged, self._logged_at, self._longest_lag = summed([]), clock(), 0.0

    def __repr__(self) -> str:
        """Show counts."""
        return f"StreamServer({len(self._cameras)} streams, {len(self._scheduler.streams)} open videos)"

    def add(
        self,
        key: str,
        source: Iterable[Any] | Mailbox,
        *,
        rate: float | None = None,
        priority: float = 0.0,
        idle_timeout: float = 60.0,
        num_frames: int = 16,
        prepare: Callable[[Any], Any] | None = None,
    ) -> None:
        """Serve a camera from now on.

        Args:
            key: its name, in events and metrics.
            source: an iterable of frames, `(C, H, W)` normalised tensors, which a thread of its own reads and closes.
                Of attributes `reconnects`, `dropped` (frames) and `lag` (age of the last frame in seconds), as live
                sources have them, notice is taken. Or a `Mailbox` that somebody puts frames into.
            rate: most frames a second that are looked at; by default as many as there is room for.
            priority: a step of it is worth `ageing` seconds of waiting.
            idle_timeout: seconds without a frame after which the stream ends.
            num_frames: frames per answer.
            prepare: makes a normalised tensor of what the source gives. Only frames that are looked at are prepared,
                in the thread that iterates.

        Raises:
            DynskipError: if the key is no string or is taken, a number is out of range, or something is closed.
        """
        if not isinstance(key, str):
            raise DynskipError(f"The key {key!r} has to be a string: it is the stream's name in metrics.")
        if not isinstance(num_frames, int) or num_frames < 1:
            raise DynskipError(f"num_frames={num_frames} has to be a positive whole number: frames per answer.")
        if not isinstance(priority, int | float) or not math.isfinite(priority):
            raise DynskipError(f"priority={priority} has to be a finite number.")
        period = 0.0 if rate is None else 1 / check_positive(rate, "rate")
        timeout = check_positive(idle_timeout, "idle_timeout")
        mailbox = source if isinstance(source, Mailbox) else Mailbox(self._clock)
        if mailbox.closed:
            raise DynskipError(f"The mailbox of {key!r} belonged to a stream that has ended. Make a new one.")
        stopped = [0] * self._scheduler.stages
        # What can be polled can be closed while its thread waits; for other iterators that may be fatal.
        close = getattr(source, "close", None) if hasattr(source, "poll") else None
        with self._lock:
            if self._closed:
                raise DynskipError("The server is closed. Make a new one.")
            if key in self._cameras:
                raise DynskipError(f"A stream named {key!r} is served already. Remove it first, or use another key.")
            self._cameras[key] = Camera(key, mailbox, close, prepare, period, priority, timeout, num_frames, stopped)
        mailbox.wake = self._wake
        self._wake()
        if source is not mailbox:
            thread = threading.Thread(target=pull, args=(source, mailbox), name=f"source of {key}", daemon=True)
            thread.start()
            with self._lock:
                self._threads = [other for other in self._threads if other.is_alive()] + [thread]

    def remove(self, key: str) -> bool:
        """End a stream. Its open video is answered from the frames so far; what is in flight is dropped.

        The key is free at once. A source that keeps its thread waiting is closed when it returns.

        Args:
            key: name of the stream.

        Returns:
            Whether it was being served; it may have ended by itself a moment ago.
        """
        with self._lock:
            camera = self._cameras.pop(key, None)
            if camera is not None:
                self._leaving.append(camera)
        self._wake()
        return camera is not None

    def close(self) -> None:
        """Remove all streams. The iteration goes on until they are answered, and ends. Returns at once."""
        self._closed = True  # and nothing else, as signal handlers interrupt anything
        self._bell.put(None)

    def __enter__(self) -> StreamServer:
        return self

    def __exit__(self, *error: object) -> None:
        """Close, without the answers that nobody has asked for, and wait up to a second for sources to be closed."""
        self.close()
        with self._lock:
            for camera in (*self._cameras.values(), *self._leaving):
                camera.leave()
        end = time.monotonic() + 1.0
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0.0))

    def counters(self) -> dict[str, StreamCounters]:
        """Return what became of the frames of each stream that is being served."""
        with self._lock:
            now = self._clock()
            return {key: camera.counters(now) for key, camera in self._cameras.items()}

    def __iter__(self) -> Iterator[ServerEvent]:
        """Serve, until `close`.

        Yields:
            A `FrameResult` for every frame that was looked at, with the frame itself as `image` and its `lag`; a
            `VideoResult` for every video; and a `StreamEnd` for every stream that has ended.
        """
        while True:
            events = self.poll()
            yield from events
            if self._closed and not self._cameras and not self._leaving:
                return
            if not events and not self._scheduler.has_work:
                self._wait()

    def poll(self) -> list[ServerEvent]:
        """Do what can be done now, at most one stage run, without waiting for frames. For loops of your own."""
        while not self._bell.empty():
            self._bell.get_nowait()
        with self._lock:
            if self._closed:
                self._leaving += self._cameras.values()
                self._cameras.clear()
            leaving, self._leaving = self._leaving, []
            cameras = list(self._cameras.values())
        events: list[ServerEvent] = []
        for camera in leaving:
            events += self._end(camera)
        events += self._admit(cameras)
        if self._scheduler.has_work:
            events += self._noted(self._scheduler.step())
        self._log()
        return events

    def _admit(self, cameras: list[Camera]) -> list[ServerEvent]:
        """Take frames out of mailboxes, the most urgent ones first, and end streams without frames."""
        events: list[ServerEvent] = []
        now, waiting, room = self._clock(), [], self._in_flight
        for camera in cameras:
            box = camera.mailbox
            over = box.over  # before looking for the last frame, which may come in between
            if camera.in_flight:
                room -= 1
                continue
            if box.reconnects != camera.link:
                events += self._begin_anew(camera)
            if camera.waits_since <= now:
                if camera.stream is None and camera.taken:  # its video has ended early
                    camera.skip(now)
                else:
                    waiting.append(camera)
            elif over and box.since is None:
                events += self._end(camera, box.error)
            elif box.since is None and now - box.newest >= camera.idle_timeout:
                events += self._end(camera, camera.silence(now))
        for camera in sorted(waiting, key=lambda c: c.waits_since - c.priority * self._ageing):
            if room <= 0:
                break
            if camera.stream is None:
                if not self._scheduler.has_room:
                    continue
                camera.stream = self._scheduler.admit((camera, None))
            events += self._offer(camera, now)
            room -= camera.in_flight
        return events

    def _begin_anew(self, camera: Camera) -> list[ServerEvent]:
        """Answer the open video, since a gap parts its frames from those that come."""
        camera.link = camera.mailbox.reconnects
        events = [] if camera.stream is None else self._noted(self._scheduler.end(camera.stream))
        camera.taken = 0
        return events

    def _offer(self, camera: Camera, now: float) -> list[ServerEvent]:
        """Give a camera's newest frame to the scheduler."""
        assert camera.stream is not None
        camera.in_flight = camera.take(now)
        if not camera.in_flight:
            return []
        try:
            self._scheduler.offer(camera.stream, camera.prepare(camera.frame) if camera.prepare else camera.frame)
        except Exception as error:
            return self._end(camera, error)
        if camera.taken == camera.num_frames:
            self._scheduler.end(camera.stream)
        return []

    def _end(self, camera: Camera, error: Exception | None = None) -> list[ServerEvent]:
        """End a stream, and its open video with it."""
        events: list[ServerEvent] = []
        if camera.stream is not None:
            events += self._noted(self._scheduler.stop(camera.stream, error))
        return events if camera.over else [*events, self._over(camera, error)]

    def _noted(self, results: list[Event]) -> list[ServerEvent]:
        """Count results, and end the streams that failed."""
        now, events = self._clock(), list[ServerEvent]()
        self._scheduler.finished.clear()  # there are no sources to be closed
        for event in results:
            camera = event.key
            assert isinstance(camera, Camera)
            event.key = camera.key
            with self._lock:
                camera.note(event, now)
            self._longest_lag = max(self._longest_lag, camera.lag)
            if isinstance(event, FrameResult) or event.frames_seen:
                events.append(event)
            if isinstance(event, VideoResult) and event.error is not None:
                events.append(self._over(camera, event.error))
        return events

    def _over(self, camera: Camera, error: Exception | None) -> StreamEnd:
        camera.over = True
        camera.leave()
        counters = camera.counters(self._clock())
        for name, value in summed([counters]).items():
            self._gone[name] += value
        with self._lock:
            if self._cameras.get(camera.key) is camera:
                del self._cameras[camera.key]
        if error is not None:
            logger.warning("stream %s ended: %s: %s", camera.key, type(error).__name__, error)
        return StreamEnd(camera.key, error, counters)

    def _log(self) -> None:
        """Log a line a minute."""
        now = self._clock()
        if (passed := now - self._logged_at) < LOG_EVERY:
            return
        with self._lock:
            cameras = (*self._cameras.values(), *(camera for camera in self._leaving if not camera.over))
            current = [camera.counters(now) for camera in cameras]
        total = {name: value + self._gone[name] for name, value in summed(current).items()}
        new = {name: value - self._logged[name] for name, value in total.items()}
        logger.info("%s", log_line(len(self._cameras), passed, new, self._longest_lag))
        self._logged, self._logged_at, self._longest_lag = total, now, 0.0

    def _wake(self) -> None:
        self._bell.put(None)

    def _wait(self) -> None:
        """Wait for a frame, or until it is time for something."""
        now, times = self._clock(), [self._logged_at + LOG_EVERY]
        with self._lock:
            for camera in self._cameras.values():
                silent = camera.mailbox.since is None
                times.append(camera.mailbox.newest + camera.idle_timeout if silent else camera.due)
        # What is due already waits for room, or rings the bell.
        timeout = min((time - now for time in times if time > now), default=LONGEST_WAIT)
        with contextlib.suppress(queue.Empty):
            self._bell.get(timeout=min(timeout, LONGEST_WAIT))
