"""A thread in front of a source that does not wait: whoever looks gets the newest frame."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from dynskip.errors import DynskipError

T = TypeVar("T")
SLICE = 0.1  # seconds that anybody waits before looking whether the source was closed


class News:
    """Wakes whoever waits, in threads and in event loops."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = threading.Condition()
        self._futures: list[asyncio.Future[None]] = []

    def tell(self) -> None:
        """Wake all that wait."""
        with self._changed:
            self.count += 1
            self._changed.notify_all()
            futures, self._futures = self._futures, []
        for future in futures:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                future.get_loop().call_soon_threadsafe(_wake, future)

    def wait(self, count: int) -> None:
        """Wait a while for news after number `count`."""
        with self._changed:
            if self.count == count:
                self._changed.wait(SLICE)

    async def wait_async(self, count: int) -> None:
        """As `wait`, in an event loop."""
        future = asyncio.get_running_loop().create_future()
        with self._changed:
            if self.count != count:
                return
            self._futures.append(future)
        await asyncio.wait([future], timeout=SLICE)
        with self._changed, contextlib.suppress(ValueError):
            self._futures.remove(future)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Polled(Generic[T]):
    """An iterator, plain and asynchronous, over what `poll` gives."""

    news: News

    def poll(self) -> T | None:
        """Return the next item if it is there, else None.

        Raises:
            StopIteration: if there are no more.
        """
        raise NotImplementedError

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        while True:
            count = self.news.count
            if (item := self.poll()) is not None:
                return item
            self.news.wait(count)

    def __aiter__(self) -> Polled[T]:
        return self

    async def __anext__(self) -> T:
        while True:
            count = self.news.count
            try:
                item = self.poll()
            except StopIteration:
                raise StopAsyncIteration from None
            if item is not None:
                return item
            await self.news.wait_async(count)


class Newest(Polled[T]):
    """A thread in front of an iterable that does not wait, such as a camera: whoever is slow gets the newest item.

    The thread takes items as fast as they come, from the first look on. It is an iterator, a plain and an asynchronous
    one, for a loop of your own or as a source of `serve_streams` and `aserve_streams`, in which it does not hold up the
    others. An error of the iterable is raised where the next item is asked for.

    Args:
        source: the iterable. Its items are not None.
        lag: seconds; an item that is older is dropped instead of given.
        queue: items that are kept. When another comes, the oldest is dropped.
        drop: with False, nothing is dropped; instead the thread waits for room. For sources that wait, such as files.

    Attributes:
        taken: items that came.
        given: items that were given to whoever looks.
        dropped: items that were not.
        lag: how old the item given last was, in seconds.

    Raises:
        DynskipError: if `lag` or `queue` is not positive.
    """

    def __init__(self, source: Iterable[T], *, lag: float = 1.0, queue: int = 1, drop: bool = True) -> None:
        if not lag > 0 or queue < 1:
            raise DynskipError(f"lag={lag} (seconds) and queue={queue} (items) have to be positive.")
        self.max_lag, self.queue, self.drop = lag, queue, drop
        self.taken = self.given = self.dropped = 0
        self.lag = 0.0
        self.news = News()
        self._source = source
        self._items: deque[tuple[T, float]] = deque()  # each with the time at which it was new
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._over = False
        self._error: Exception | None = None

    def poll(self) -> T | None:
        """Return the newest item (with a queue, the oldest that is young enough) if there is one, else None.

        Raises:
            StopIteration: if there are no more, or this was closed.
        """
        if self._thread is None:
            # A daemon: where the source does not return, the end of the program does not wait for it.
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        item = None
        with self._lock:
            over, now = self._over, time.monotonic()
            while self._items and item is None and not self._closed.is_set():
                candidate, born = self._items.popleft()
                if self.drop and now - born > self.max_lag:
                    self.dropped += 1
                else:
                    item, self.given, self.lag = candidate, self.given + 1, now - born
        if not self.drop and item is not None:
            self.news.tell()  # there is room
        if item is None and (over or self._closed.is_set()):
            if self._error is not None and not self._closed.is_set():
                raise self._error
            raise StopIteration
        return item

    def close(self) -> None:
        """Take no more items, and end whoever waits for one. Signal handlers may call it.

        It returns at once. Where the source keeps its thread waiting, the thread goes and closes it later.
        """
        self._closed.set()

    async def aclose(self) -> None:
        """As `close`, for asynchronous iteration."""
        self.close()

    def _read(self) -> Iterator[tuple[T, float]]:
        """Yield the items, each with its age in seconds."""
        for item in self._source:
            yield item, 0.0

    def _run(self) -> None:
        items = self._read()
        try:
            for item, age in items:
                if not self._put(item, age):
                    break
        except Exception as error:
            self._error = error
        with contextlib.suppress(Exception):
            items.close()  # type: ignore[attr-defined]
            if hasattr(self._source, "close"):
                self._source.close()
        with self._lock:
            self._over = True
        self.news.tell()

    def _put(self, item: T, age: float) -> bool:
        """Keep an item; return False if none is wanted any more."""
        self.taken += 1
        while not self.drop and not self._closed.is_set():
            count = self.news.count
            if len(self._items) < self.queue:
                break
            self.news.wait(count)
        with self._lock:
            if len(self._items) >= self.queue and self.drop:
                self._items.popleft()
                self.dropped += 1
            self._items.append((item, time.monotonic() - age))
        self.news.tell()
        return not self._closed.is_set()
