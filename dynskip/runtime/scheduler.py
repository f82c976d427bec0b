"""The order of streams: which frames run next, so that batches are full and no frame waits for long."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from dynskip import rules
from dynskip._check import check_eval, check_frames, refuse_not_finite
from dynskip.engine import Engine
from dynskip.errors import DynskipError
from dynskip.features import run_to_end
from dynskip.flops import FLOPsLookup
from dynskip.output import FrameResult, VideoResult

if TYPE_CHECKING:
    from dynskip.wrapper import StopOrForward

Event: TypeAlias = FrameResult | VideoResult


@dataclass(eq=False)
class Stream:
    """A video in flight."""

    key: Hashable
    source: Any  # an iterator of frames, or what makes one
    row: int  # in the engine
    ahead: int  # most frames in flight
    images: list[Tensor] = field(default_factory=list)  # the frames in flight
    held: list[Tensor] = field(default_factory=list)  # a frame that raised, and those behind it, to run one by one
    waiting: int = 0  # frames in front of a stage
    over: bool = False  # no more frames come
    error: Exception | None = None
    size: tuple[int, int] | None = None  # of its frames, once that is known
    lookup: FLOPsLookup | None = None
    costs: list[float] = field(default_factory=list)  # of a frame, by what became of it
    seen: int = 0  # frames decided
    used: int = 0
    macs: float = 0.0
    logits: Tensor | None = None  # the running prediction

    @property
    def wants(self) -> bool:
        """Whether it can take a frame."""
        return not self.over and not self.held and len(self.images) < self.ahead


class Scheduler:
    """Takes frames of many streams through stages and gates, one stage run at a time.

    Frames in front of the same stage, of the same size, run as one batch. The next stage to run is a full one, and the
    deepest of those; if none is full, the fullest. A frame that has waited for `patience` runs goes first, the oldest
    of them before the others: so no frame waits for more than `patience + max_streams * look_ahead` runs in front of a
    stage. If a batch raises, its frames run again one by one, so that a stream's fault is its own.

    Args:
        model: a model in evaluation mode.
        max_streams: streams in flight.
        batch_size: most frames in one stage run.
        look_ahead: most frames of a stream in flight.
    """

    def __init__(self, model: StopOrForward, max_streams: int, batch_size: int, look_ahead: int = 1) -> None:
        check_eval(model, "Serving streams")
        if max_streams < 1 or batch_size < 1 or look_ahead < 1:
            raise DynskipError(
                f"max_streams={max_streams}, batch_size={batch_size} and look_ahead={look_ahead} have to be positive: "
                "streams in flight, frames in one stage run, and frames of a stream in flight."
            )
        self.model, self.stages = model, model.backbone.num_stages
        # If memories advance gate by gate, a frame has to wait for the one before it anyway.
        self.look_ahead = look_ahead if model.state_update == "used" else 1
        self.max_streams, self.batch_size = max_streams, batch_size
        self.patience = 4 * self.stages
        self.streams: list[Stream] = []
        self.finished: list[Stream] = []  # their sources are to be closed
        self._admitted, self._free = 0, list(range(max_streams))
        self._by_row: dict[int, Stream] = {}
        self._engine = Engine(model, max_streams, self.look_ahead, counts=self.look_ahead > 1)
        # Of each stage and frame size: frames, each with the number of runs before it came.
        self._queues: dict[tuple[int, tuple[int, int]], deque[tuple[int, int]]] = {}
        self._runs = 0
        self._sizes: set[tuple[int, int]] = set()  # of frames that the model can run

    @property
    def has_room(self) -> bool:
        """Whether another stream can be taken in."""
        return bool(self._free)

    @property
    def has_work(self) -> bool:
        """Whether a frame waits in front of a stage."""
        return bool(self._queues)

    @torch.no_grad()
    def admit(self, item: Any) -> Stream:
        """Take in a stream, `(key, source)` or a source whose key is its number. There has to be room."""
        key, source = item if isinstance(item, tuple) and len(item) == 2 else (self._admitted, item)
        stream = Stream(key, source, self._free.pop(), self.look_ahead)
        self._admitted += 1
        self._engine.reset(torch.tensor([stream.row]))
        self.streams.append(stream)
        self._by_row[stream.row] = stream
        return stream

    @torch.no_grad()
    def offer(self, stream: Stream, frame: Any) -> None:
        """Give a stream its next frame, or raise a DynskipError if it does not fit."""
        frames = check_frames(frame, self.model.backbone, 1)
        if frames.device.type == "cpu":  # on a GPU, whole batches are looked at before they run
            refuse_not_finite(frames, "frame")
        size = (frames.shape[2], frames.shape[3])
        if stream.size is None:
            stream.lookup, stream.size = self._costs(size), size
            stream.costs = stream.lookup.by_outcome.tolist()
        elif size != stream.size:
            raise DynskipError(
                "The frame is {}x{} and earlier ones of this stream were ".format(*size)
                + "{}x{}. Resize a stream's frames to one size.".format(*stream.size)
            )
        self._load(stream, frames)

    def _costs(self, size: tuple[int, int]) -> FLOPsLookup:
        """Return the cost table for a frame size, or raise a DynskipError if the model cannot run it."""
        backbone = self.model.backbone
        try:
            lookup = self.model.lookup_for(size)
            if lookup.image_size is None and size != backbone.input_size[1:] and size not in self._sizes:
                FLOPsLookup.measure(backbone, size)
            self._sizes.add(size)
        except DynskipError:
            raise
        except Exception as error:
            raise DynskipError(
                "The model cannot run frames of {}x{}: ".format(*size)
                + "{}. Resize them to {}x{}.".format(error, *backbone.input_size[1:])
            ) from error
        return lookup

    def _load(self, stream: Stream, image: Tensor) -> None:
        column = len(stream.images)
        frame = stream.row * self._engine.window + column
        self._engine.load(torch.tensor([frame]), image, torch.tensor([stream.seen + column]))
        stream.images.append(image)
        self._enqueue(0, [frame])

    @torch.no_grad()
    def end(self, stream: Stream, error: Exception | None = None) -> list[Event]:
        """Note that a stream has no more frames. It is answered once those in flight are decided."""
        stream.over, stream.error = True, error
        return [] if stream.images or stream.held else self._finish([stream])

    @torch.no_grad()
    def stop(self, stream: Stream, error: Exception | None = None) -> list[Event]:
        """End a stream at once. Frames in flight are forgotten; it is answered from those before them."""
        self._withdraw(stream, 0)
        stream.images, stream.held = [], []
        return self.end(stream, error)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Run one stage on a batch of waiting frames. There has to be work."""
        stage, size = self._choose()
        queue = self._queues[stage, size]
        frames = [queue.popleft()[0] for _ in range(min(len(queue), self.batch_size))]
        if not queue:
            del self._queues[stage, size]
        self._runs += 1
        going, failed = _each(partial(self._advance, stage), frames)
        for frame in frames:
            self._stream(frame).waiting -= 1
        if stage + 1 < self.stages:
            self._enqueue(stage + 1, going)
        events: list[Event] = []
        for frame, error in failed:
            events += self._fault(self._stream(frame), frame % self._engine.window, error)
        streams = dict.fromkeys(map(self._stream, frames))
        return events + self._decide([s for s in streams if not s.waiting and s.images and s in self.streams])

    def _choose(self) -> tuple[int, tuple[int, int]]:
        """Choose the stage to run next, and the size of its frames."""
        oldest = min(self._queues, key=lambda place: self._queues[place][0][1])
        if self._runs - self._queues[oldest][0][1] >= self.patience:
            return oldest
        return max(self._queues, key=lambda place: (min(len(self._queues[place]), self.batch_size), place[0]))

    def _enqueue(self, stage: int, frames: list[int]) -> None:
        for frame in frames:
            stream = self._stream(frame)
            assert stream.size is not None
            stream.waiting += 1
            self._queues.setdefault((stage, stream.size), deque()).append((frame, self._runs))

    def _stream(self, frame: int) -> Stream:
        return self._by_row[frame // self._engine.window]

    def _advance(self, stage: int, frames: list[int]) -> list[int]:
        """Run a stage on frames, and the head on those that pass the last gate; return the frames that go on."""
        engine, going = self._engine, torch.tensor(frames)
        if stage < self.stages:
            if stage == 0 and engine.device.type != "cpu":
                refuse_not_finite(engine.features.gather(going, engine.device)[0].values[0], "frame")
            # Where a gate raised before, the stage has run already.
            if len(fresh := going[engine.features.depth[going] == stage]):
                engine.run(stage, stage, fresh)
            going = going[engine.ask(stage, stage, going)]
        if stage + 1 >= self.stages and len(going):
            engine.run(self.stages, self.stages, going)
        return going.tolist()

    def _decide(self, streams: list[Stream]) -> list[Event]:
        """Decide on streams' frames in flight, and finish the streams that are over."""
        events, failed = _each(self._decided, streams)
        for stream, error in failed:
            events += self._fail(stream, error)
        return events + self._finish([s for s in streams if s.over and not s.images and s in self.streams])

    def _decided(self, streams: list[Stream]) -> list[Event]:
        engine, rows = self._engine, torch.tensor([stream.row for stream in streams])
        decisions = engine.decide(rows)
        stopped_at, lacking, ended = engine.learn(decisions)
        shape, index = (engine.videos, engine.window), engine.upload(rows)
        evaluated = torch.arange(self.stages, device=engine.device) <= decisions.stopped_at[..., None]
        gate_logits = rules.known(engine.gate_logits.unflatten(0, shape)[index].to(engine.dtype), evaluated)
        frame_logits = engine.frame_logits.unflatten(0, shape)[index]
        frame_logits = rules.known(frame_logits, decisions.stopped_at == self.stages)
        events: list[Event] = []
        for i, stream in enumerate(streams):
            columns = (stopped_at[i] >= 0).nonzero().squeeze(1).tolist()
            for column in columns:
                gate, running = int(stopped_at[i, column]), decisions.running_logits[i, column]
                used, macs = gate == self.stages, stream.costs[gate + 1]
                last = bool(ended[i]) and column == columns[-1]
                logits = gate_logits[i, column], frame_logits[i, column], running
                result = FrameResult(gate, used, *logits, last, macs, stream.key, stream.seen, self.model.activation)
                events.append(result)
                stream.seen, stream.used, stream.macs = stream.seen + 1, stream.used + used, stream.macs + macs
                stream.logits = running
            if self.look_ahead > 1:
                for frame in (stream.row * engine.window + lacking[i].nonzero().squeeze(1)).tolist():
                    self._enqueue(int(engine.features.depth[frame]), [frame])
            if not engine.pending.view(shape)[stream.row].any():
                stream.images = []
                if ended[i]:  # an error of its source further on is not part of the video
                    stream.over, stream.error, stream.held = True, None, []
                if stream.held:
                    self._load(stream, stream.held.pop(0))
        return events

    def _fault(self, stream: Stream, column: int, error: Exception) -> list[Event]:
        """Handle an error on a frame of a stream. It ends the stream once all frames before it are decided."""
        if stream not in self.streams or column >= len(stream.images):
            return []
        if not self._engine.pending.view(-1, self._engine.window)[stream.row, :column].any():
            return self._fail(stream, error)
        # The frames before it may end the video, or stop this one before it gets so far: it waits for their decisions.
        self._withdraw(stream, column)
        stream.held, stream.images, stream.ahead = stream.images[column:] + stream.held, stream.images[:column], 1
        return []

    def _fail(self, stream: Stream, error: Exception) -> list[Event]:
        """End a stream with an error."""
        if stream not in self.streams:
            return []
        self._withdraw(stream, 0)
        stream.error = error
        return self._finish([stream])

    def _withdraw(self, stream: Stream, column: int) -> None:
        """Take the frames of a stream out of flight, from a column on."""
        window = self._engine.window
        own = range(stream.row * window + column, (stream.row + 1) * window)
        for place, queue in list(self._queues.items()):
            left = deque(item for item in queue if item[0] not in own)
            stream.waiting -= len(queue) - len(left)
            self._queues[place] = left
            if not left:
                del self._queues[place]
        self._engine.pending[own.start : own.stop] = False

    def _finish(self, streams: list[Stream]) -> list[Event]:
        """Answer for streams that have no more frames, and let them go."""
        engine = self._engine
        answered, failed = _each(self._answer, [s for s in streams if s.error is None and engine.furthest[s.row]])
        answers, errors = dict(answered), dict(failed)
        events: list[Event] = []
        for stream in streams:
            furthest, frame, macs, speculative = engine.furthest[stream.row], -1, stream.macs, 0.0
            logits = answers.get(stream, stream.logits)
            if logits is None:
                logits = engine.running()[stream.row]
            if self.look_ahead > 1 and stream.lookup is not None:
                speculative = max(engine.executed(stream.row, stream.lookup) - macs, 0.0)  # in this order, NaN stays
            if stream in answers:
                assert furthest is not None
                assert stream.lookup is not None
                frame, macs = furthest.frame, macs + float(stream.lookup.completion[furthest.stopped_at])
            error = errors.get(stream, stream.error)
            numbers = stream.used, stream.seen, frame, macs, speculative
            events.append(VideoResult(logits, *numbers, stream.key, error, self.model.activation))
            self.streams.remove(stream)
            self.finished.append(stream)
            self._free.append(stream.row)
        return events

    def _answer(self, streams: list[Stream]) -> list[tuple[Stream, Tensor]]:
        """Run the furthest frames of streams without a used one to the end."""
        frames = [furthest for stream in streams if (furthest := self._engine.furthest[stream.row]) is not None]
        engine = self._engine
        logits = rules.answer(engine.readout, run_to_end(self.model.backbone, frames)).to(engine.dtype)
        return list(zip(streams, logits.unbind(0), strict=True))


def _each(work: Callable[[list[Any]], list[Any]], items: list[Any]) -> tuple[list[Any], list[tuple[Any, Exception]]]:
    """Do work on items at once, or one by one if that raises; return what was done, and the items that raised."""
    if not items:
        return [], []
    try:
        return work(items), []
    except Exception as error:
        if len(items) == 1:
            return [], [(items[0], error)]
    done, failed = zip(*(_each(work, [item]) for item in items), strict=True)
    return list(chain.from_iterable(done)), list(chain.from_iterable(failed))
