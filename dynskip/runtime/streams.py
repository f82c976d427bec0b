"""Streams: many videos or cameras at once. Frames are pulled from their sources when there is room for them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

from dynskip.errors import DynskipError
from dynskip.runtime.scheduler import Event, Scheduler, Stream

_END = object()
_LATER = object()  # a source that can be polled has no frame yet


def serve(scheduler: Scheduler, sources: Iterator[Any]) -> Iterator[Event]:
    """Classify many videos at once; see `StopOrForward.serve_streams`."""
    more = True
    try:
        while more or scheduler.streams:
            # Fill all room before the next stage run. The limit is for sources that turn out empty: endlessly many of
            # them must not keep the others waiting.
            for _ in range(scheduler.max_streams * scheduler.look_ahead):
                while more and scheduler.has_room:
                    if (item := next(sources, _END)) is _END:
                        more = False
                        break
                    scheduler.admit(item)
                idle, waiting = [stream for stream in scheduler.streams if stream.wants], 0
                for stream in idle:
                    if (events := _take(scheduler, stream, partial(_pull, stream))) is None:
                        waiting += 1
                    else:
                        yield from events
                if waiting == len(idle):
                    break
            if scheduler.has_work:
                yield from scheduler.step()
            elif waiting:
                time.sleep(0.002)
            _close(scheduler.finished)
    finally:
        _close(scheduler.finished + scheduler.streams)
        if hasattr(sources, "close"):
            sources.close()


def _pull(stream: Stream) -> Any:
    if stream.seen == 0 and not stream.images:
        stream.source = iter(stream.source)
    if not hasattr(stream.source, "poll"):
        return next(stream.source, _END)
    try:
        return _LATER if (frame := stream.source.poll()) is None else frame
    except StopIteration:
        return _END


def _take(scheduler: Scheduler, stream: Stream, get: Callable[[], Any]) -> list[Event] | None:
    """Take a stream's next frame; return None if it has none yet. Any error here is the stream's own fault."""
    try:
        if (frame := get()) is _LATER:
            return None
        if frame is not _END:
            scheduler.offer(stream, frame)
            return []
    except Exception as error:
        return scheduler.end(stream, error)
    return scheduler.end(stream)


def _close(streams: list[Stream]) -> None:
    for stream in streams:
        if hasattr(stream.source, "close"):
            with contextlib.suppress(Exception):
                stream.source.close()
    streams.clear()


async def aserve(scheduler: Scheduler, sources: AsyncGenerator[Any]) -> AsyncIterator[Event]:
    """Classify many videos at once, frames arriving asynchronously; see `StopOrForward.aserve_streams`."""
    more = True
    asking: dict[asyncio.Task[Any], Stream | None] = {}  # `None` asks for the next source
    try:
        while more or scheduler.streams:
            for _ in range(2 * scheduler.max_streams):
                if more and scheduler.has_room and None not in asking.values():
                    asking[asyncio.create_task(_next(sources))] = None
                busy = {stream for stream in asking.values() if stream is not None}
                for stream in scheduler.streams:
                    if stream.wants and stream not in busy:
                        asking[asyncio.create_task(_next(stream.source))] = stream
                if not asking:
                    break
                wait = 0 if scheduler.has_work else None
                done, _ = await asyncio.wait(asking, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (asked := asking.pop(task)) is not None:
                        for event in _take(scheduler, asked, partial(_result, task)) or ():
                            yield event
                    elif (item := task.result()) is _END:
                        more = False
                    else:
                        stream = scheduler.admit(item)
                        stream.source = as_async(stream.source)
                if not done:
                    break
            if scheduler.has_work:
                for event in scheduler.step():
                    yield event
            await _aclose(scheduler.finished)
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await _aclose(scheduler.finished + scheduler.streams)
        await sources.aclose()


def _result(task: asyncio.Task[Any]) -> Any:
    try:
        return task.result()
    except asyncio.CancelledError as error:
        raise DynskipError("The source of this stream was cancelled.") from error


async def _next(source: AsyncIterator[Any]) -> Any:
    # A task cannot end in StopAsyncIteration.
    try:
        return await source.__anext__()
    except StopAsyncIteration:
        return _END


async def as_async(source: Any) -> AsyncGenerator[Any]:
    """Iterate over a plain or an asynchronous iterable, and close its iterator at the end."""
    if hasattr(source, "__aiter__"):
        items = source.__aiter__()
        try:
            async for item in items:
                yield item
        finally:
            if hasattr(items, "aclose"):
                await items.aclose()
        return
    plain = iter(source)
    try:
        for item in plain:
            yield item
    finally:
        if hasattr(plain, "close"):
            plain.close()


async def _aclose(streams: list[Stream]) -> None:
    for stream in streams:
        with contextlib.suppress(Exception):
            await stream.source.aclose()
    streams.clear()
