"""Streams: many videos or cameras at once, frames pulled from their sources as they can be taken."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dynskip.errors import DynskipError
from dynskip.runtime.scheduler import Event, Scheduler, Stream

if TYPE_CHECKING:
    from dynskip.wrapper import StopOrForward

_END = object()


def serve(
    model: StopOrForward, sources: Iterable[Any], max_streams: int, batch_size: int, look_ahead: int
) -> Iterator[Event]:
    """Classify many videos at once; see `StopOrForward.serve_streams`."""
    return _serve(Scheduler(model, max_streams, batch_size, look_ahead), iter(sources))


def aserve(model: StopOrForward, sources: Any, max_streams: int, batch_size: int) -> AsyncIterator[Event]:
    """Classify many videos at once, frames arriving asynchronously; see `StopOrForward.aserve_streams`."""
    return _aserve(Scheduler(model, max_streams, batch_size, 1), _as_async(sources))


def _keyed(number: int, item: Any) -> tuple[Hashable, Any]:
    return item if isinstance(item, tuple) and len(item) == 2 else (number, item)


def _serve(scheduler: Scheduler, sources: Iterator[Any]) -> Iterator[Event]:
    admitted = 0
    more = True
    try:
        while more or scheduler.streams:
            # Room is taken at once, by sources that turn out empty as well; but endlessly many of those must not keep
            # the others waiting.
            for _ in range(scheduler.max_streams * scheduler.look_ahead):
                while more and scheduler.has_room:
                    if (item := next(sources, _END)) is _END:
                        more = False
                        break
                    scheduler.admit(*_keyed(admitted, item))
                    admitted += 1
                idle = [stream for stream in scheduler.streams if stream.wants]
                if not idle:
                    break
                for stream in idle:
                    yield from _pull(scheduler, stream)
            if scheduler.has_work:
                yield from scheduler.step()
            _close(scheduler.finished)
    finally:
        _close(scheduler.finished + scheduler.streams)
        if hasattr(sources, "close"):
            sources.close()


def _pull(scheduler: Scheduler, stream: Stream) -> list[Event]:
    """Take a stream's next frame; whatever goes wrong here is its own fault."""
    try:
        if stream.seen == 0 and not stream.images:
            stream.source = iter(stream.source)
        if (frame := next(stream.source, _END)) is not _END:
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


async def _aserve(scheduler: Scheduler, sources: AsyncGenerator[Any]) -> AsyncIterator[Event]:
    admitted = 0
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
                    stream_or_none = asking.pop(task)
                    if stream_or_none is not None:
                        for event in _take(scheduler, stream_or_none, task):
                            yield event
                    elif (item := task.result()) is _END:
                        more = False
                    else:
                        key, source = _keyed(admitted, item)
                        scheduler.admit(key, _as_async(source))
                        admitted += 1
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


def _take(scheduler: Scheduler, stream: Stream, task: asyncio.Task[Any]) -> list[Event]:
    """Take the frame that a stream's task brought; whatever went wrong in it is the stream's own fault."""
    try:
        if (frame := task.result()) is not _END:
            scheduler.offer(stream, frame)
            return []
    except asyncio.CancelledError:
        return scheduler.end(stream, DynskipError("The source of this stream was cancelled."))
    except Exception as error:
        return scheduler.end(stream, error)
    return scheduler.end(stream)


async def _next(source: AsyncIterator[Any]) -> Any:
    # A task cannot end in StopAsyncIteration.
    try:
        return await source.__anext__()
    except StopAsyncIteration:
        return _END


async def _as_async(source: Any) -> AsyncGenerator[Any]:
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
