"""Streams: many videos or cameras at once, what is left of all their frames batched per stage."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynskip._check import check_frames
from dynskip.backbone import Carry
from dynskip.errors import DynskipError
from dynskip.flops import FLOPsLookup
from dynskip.runtime._state import CarryRow, Progress, check_eval, gather

if TYPE_CHECKING:
    from dynskip.wrapper import StopOrForward

_END = object()


@dataclass
class FrameResult:
    """What became of one frame of a stream.

    Attributes:
        key: the stream's name.
        frame: the frame's number in it.
        stopped_at: index of the gate that stopped it; `N` for a used frame.
        used: whether it passed every gate.
        logits: `(K,)` running prediction of the video: mean over its used frames so far, NaN before the first.
        ended: whether the video needs no more frames.
        macs: executed for this frame, in the cost table's unit.
    """

    key: Hashable
    frame: int
    stopped_at: int
    used: bool
    logits: Tensor
    ended: bool
    macs: float


@dataclass
class VideoResult:
    """What became of a stream.

    Attributes:
        key: the stream's name.
        logits: `(K,)` mean over the used frames, or the fallback frame's; NaN where neither exists.
        used: frames used.
        seen: frames looked at.
        fallback_frame: where no frame was used, the frame that was run to the end in their place; else -1.
        macs: executed for the video, the fallback included.
        error: why the stream failed; `None` where it came to its end. The other fields tell how far it had got.
    """

    key: Hashable
    logits: Tensor
    used: int
    seen: int
    fallback_frame: int
    macs: float
    error: Exception | None


Event = FrameResult | VideoResult


def serve(model: StopOrForward, sources: Iterable[Any], max_streams: int, batch_size: int) -> Iterator[Event]:
    """Classify many videos at once; see `StopOrForward.serve_streams`."""
    return _serve(Scheduler(model, max_streams, batch_size), iter(sources))


def aserve(model: StopOrForward, sources: Any, max_streams: int, batch_size: int) -> AsyncIterator[Event]:
    """Classify many videos at once, frames arriving asynchronously; see `StopOrForward.aserve_streams`."""
    return _aserve(Scheduler(model, max_streams, batch_size), _as_async(sources))


@dataclass(eq=False)
class Stream:
    """A video in flight.

    Attributes:
        key: its name.
        source: the iterator of its frames.
        slot: its row among the scheduler's videos.
        idle: whether it can take a frame.
        lookup: costs at its frames' size, once that is known.
    """

    key: Hashable
    source: Any
    slot: int
    idle: bool = True
    size: tuple[int, int] | None = None
    lookup: FLOPsLookup | None = None
    seen: int = 0
    macs: float = 0.0


@dataclass(eq=False)
class _Waiting:
    """A frame in front of a stage."""

    stream: Stream
    at: CarryRow
    since: int  # stage runs before it came
    final: bool = False  # runs to the end without gates, as its video's answer


class Scheduler:
    """Takes frames of many streams through stages and gates, one stage run at a time.

    At most one frame of a stream is in flight, so a stream's frames meet its gates in order and what is held is
    bounded by the number of streams. Frames in front of the same stage (and of the same size) run as one batch,
    whosever they are.

    The next stage to run is a full one, of several the deepest; where none is full, the fullest. A frame that has
    waited for `patience` runs goes first, the oldest of them before all: so none waits for more than
    `patience + max_streams` runs in front of any stage.

    Args:
        model: a model in evaluation mode.
        max_streams: streams in flight.
        batch_size: most frames in one stage run.

    Raises:
        DynskipError: if a number is not positive, or the model is in training mode.
    """

    def __init__(self, model: StopOrForward, max_streams: int, batch_size: int) -> None:
        check_eval(model, "Serving streams")
        if max_streams < 1 or batch_size < 1:
            raise DynskipError(
                f"max_streams={max_streams} and batch_size={batch_size} have to be positive: how many streams are in "
                "flight, and how many frames go through a stage at a time."
            )
        self.model = model
        self.max_streams = max_streams
        self.batch_size = batch_size
        self.patience = 4 * model.backbone.num_stages
        self.streams: list[Stream] = []
        self.finished: list[Stream] = []  # their sources are to be closed
        self._free = list(range(max_streams))
        self._progress = Progress(model, max_streams)
        self._queues: dict[tuple[int, tuple[int, int]], deque[_Waiting]] = {}
        self._runs = 0
        self._tables: dict[tuple[int, int], FLOPsLookup] = {}  # of frame sizes that the model has been seen to take

    @property
    def has_room(self) -> bool:
        """Whether another stream can be taken in."""
        return bool(self._free)

    @property
    def has_work(self) -> bool:
        """Whether a frame waits in front of a stage."""
        return bool(self._queues)

    @torch.no_grad()
    def admit(self, key: Hashable, source: Any) -> Stream:
        """Take in a stream; there has to be room."""
        stream = Stream(key, source, self._free.pop())
        self._progress.reset(torch.tensor([stream.slot]))
        self.streams.append(stream)
        return stream

    @torch.no_grad()
    def offer(self, stream: Stream, frame: Any) -> None:
        """Give an idle stream its next frame.

        Raises:
            DynskipError: if the frame does not fit the model or the stream's earlier frames.
        """
        frames = frame[None] if isinstance(frame, Tensor) and frame.ndim == 3 else frame
        if isinstance(frames, Tensor):
            frames = frames.to(self._progress.device)
        check_frames(frames, self.model.backbone, 1)
        size = (frames.shape[2], frames.shape[3])
        if stream.size is None:
            if size not in self._tables:
                self._tables[size] = self._costs(size)
            stream.lookup = self._tables[size]
            stream.size = size
        elif size != stream.size:
            raise DynskipError(
                "The frame is {}x{} and earlier ones of this stream were ".format(*size)
                + "{}x{}. Resize a stream's frames to one size.".format(*stream.size)
            )
        stream.idle = False
        self._enqueue(0, [_Waiting(stream, (self.model.backbone.start(frames), 0), 0)])

    @torch.no_grad()
    def finish(self, stream: Stream, error: Exception | None = None) -> list[Event]:
        """Answer for an idle stream that has no more frames, now or (where none was used) when a frame got through."""
        furthest = self._progress.furthest[stream.slot]
        if error is not None or furthest is None:
            return [self._result(stream, error=error)]
        assert stream.lookup is not None
        stream.idle = False
        stream.macs += float(stream.lookup.completion[furthest.stopped_at])
        last = _Waiting(stream, (furthest.carry, 0), 0, final=True)
        if furthest.stopped_at + 1 < self.model.backbone.num_stages:
            self._enqueue(furthest.stopped_at + 1, [last])
            return []
        return self._answer([last], furthest.carry)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Run one stage on a batch of waiting frames; there has to be work."""
        stage, size = self._choose()
        queue, backbone = self._queues[stage, size], self.model.backbone
        batch = [queue.popleft() for _ in range(min(len(queue), self.batch_size))]
        if not queue:
            del self._queues[stage, size]
        self._runs += 1
        carry = backbone.run(stage, gather([waiting.at for waiting in batch]))
        events, keep = self._gate(stage, batch, carry)
        if not keep:
            return events
        if len(keep) < len(batch):
            carry = carry.select(torch.tensor(keep))
        going = [batch[i] for i in keep]
        if stage + 1 == backbone.num_stages:
            return events + self._answer(going, carry)
        for i, waiting in enumerate(going):
            waiting.at = (carry, i)
        self._enqueue(stage + 1, going)
        return events

    def _choose(self) -> tuple[int, tuple[int, int]]:
        oldest = min(self._queues, key=lambda place: self._queues[place][0].since)
        if self._runs - self._queues[oldest][0].since >= self.patience:
            return oldest
        return max(self._queues, key=lambda place: (min(len(self._queues[place]), self.batch_size), place[0]))

    def _enqueue(self, stage: int, frames: list[_Waiting]) -> None:
        for waiting in frames:
            assert waiting.stream.size is not None
            waiting.since = self._runs
            self._queues.setdefault((stage, waiting.stream.size), deque()).append(waiting)

    def _gate(self, stage: int, batch: list[_Waiting], carry: Carry) -> tuple[list[Event], list[int]]:
        """Ask the gate about the frames in a batch that it has a say in; return which positions go on."""
        asked = [i for i, waiting in enumerate(batch) if not waiting.final]
        if not asked:
            return [], list(range(len(batch)))
        pooled = self.model.backbone.pool(stage, carry)
        slots = torch.tensor([batch[i].stream.slot for i in asked])
        logits, forward = self._progress.gate(stage, slots, pooled if len(asked) == len(batch) else pooled[asked])
        verdicts = forward.tolist()
        stop = [k for k, passes in enumerate(verdicts) if not passes]
        if not stop:
            return [], list(range(len(batch)))
        stopped = [asked[k] for k in stop]
        streams = [batch[i].stream for i in stopped]
        self._progress.remember(
            [stream.slot for stream in streams],
            [stream.seen for stream in streams],
            torch.full((len(stop),), stage, device=logits.device),
            logits[stop],
            [(carry, i) for i in stopped],
        )
        gone = set(stopped)
        return self._frames_done(streams, stage, None), [i for i in range(len(batch)) if i not in gone]

    def _answer(self, frames: list[_Waiting], carry: Carry) -> list[Event]:
        """Run the head on frames that came to the end: used ones, and those that answer for their videos."""
        logits = self.model.backbone.head(carry).to(self._progress.dtype)
        events: list[Event] = [self._result(w.stream, logits[i].clone()) for i, w in enumerate(frames) if w.final]
        used = [i for i, waiting in enumerate(frames) if not waiting.final]
        if used:
            streams = [frames[i].stream for i in used]
            events += self._frames_done(streams, self.model.backbone.num_stages, logits[used])
        return events

    def _frames_done(self, streams: list[Stream], stopped_at: int, logits: Tensor | None) -> list[Event]:
        """Move streams on after a frame of each; `logits` are those of used frames."""
        slots = torch.tensor([stream.slot for stream in streams])
        if logits is not None:
            self._progress.commit(slots)
        ends = torch.full_like(slots, stopped_at)
        self._progress.advance(slots, ends, self._progress.last[:0] if logits is None else logits)
        running = self._progress.running(slots).to(self._progress.dtype)
        events: list[Event] = []
        for i, (stream, ended) in enumerate(zip(streams, self._progress.ended[slots].tolist(), strict=True)):
            assert stream.lookup is not None
            macs = float(stream.lookup.by_outcome[stopped_at + 1])
            events.append(FrameResult(stream.key, stream.seen, stopped_at, logits is not None, running[i], ended, macs))
            stream.macs += macs
            stream.seen += 1
            stream.idle = True
            if ended:
                events += self.finish(stream)
        return events

    def _result(self, stream: Stream, fallback: Tensor | None = None, error: Exception | None = None) -> VideoResult:
        """Let a stream go."""
        progress, slot = self._progress, stream.slot
        furthest = progress.furthest[slot] if fallback is not None else None
        frame = -1 if furthest is None else furthest.frame
        logits = progress.running(torch.tensor([slot]))[0].to(progress.dtype) if fallback is None else fallback
        self.streams.remove(stream)
        self.finished.append(stream)
        self._free.append(slot)
        progress.furthest[slot] = None
        return VideoResult(stream.key, logits, int(progress.used[slot]), stream.seen, frame, stream.macs, error)

    def _costs(self, size: tuple[int, int]) -> FLOPsLookup:
        """Return the cost table for a size that the model can run; a model of one fixed size cannot run others."""
        backbone = self.model.backbone
        try:
            lookup = self.model.lookup_for(size)
            if lookup.image_size is None and size != backbone.input_size[1:]:
                FLOPsLookup.measure(backbone, size)
        except DynskipError:
            raise
        except Exception as error:
            raise DynskipError(
                "The model cannot run frames of {}x{}: ".format(*size)
                + "{}. Resize them to {}x{}.".format(error, *backbone.input_size[1:])
            ) from error
        return lookup


def _keyed(number: int, item: Any) -> tuple[Hashable, Any]:
    return item if isinstance(item, tuple) and len(item) == 2 else (number, item)


def _serve(scheduler: Scheduler, sources: Iterator[Any]) -> Iterator[Event]:
    admitted = 0
    more = True
    try:
        while more or scheduler.streams:
            # Room is taken at once, by sources that turn out empty as well; but endlessly many of those must not keep
            # the others waiting.
            for _ in range(scheduler.max_streams):
                while more and scheduler.has_room:
                    if (item := next(sources, _END)) is _END:
                        more = False
                        break
                    scheduler.admit(*_keyed(admitted, item))
                    admitted += 1
                idle = [stream for stream in scheduler.streams if stream.idle]
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
        if stream.seen == 0:
            stream.source = iter(stream.source)
        if (frame := next(stream.source, _END)) is not _END:
            scheduler.offer(stream, frame)
            return []
    except Exception as error:
        return scheduler.finish(stream, error)
    return scheduler.finish(stream)


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
                    if stream.idle and stream not in busy:
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
        return scheduler.finish(stream, DynskipError("The source of this stream was cancelled."))
    except Exception as error:
        return scheduler.finish(stream, error)
    return scheduler.finish(stream)


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
