"""The policy of streams: which frames run next, so that stages get full batches and nobody waits for long."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
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
    """A video in flight.

    Attributes:
        key: its name.
        source: the iterator of its frames.
        row: its row in the engine.
        wants: whether it can take a frame.
        images: its frames in flight.
        held: frames that were in flight behind one that raised, to be run again one by one.
        ahead: most frames of it in flight.
        waiting: those of them that wait in front of a stage.
        over: whether it has no more frames.
        size: of its frames, once that is known.
        lookup: costs at that size; `costs` of a frame by what became of it.
        seen: frames decided; `used` of them were used.
        macs: executed for them.
        logits: the running prediction.
        error: why it fails, once its frames are out of the way.
    """

    key: Hashable
    source: Any
    row: int
    ahead: int
    wants: bool = True
    images: list[Tensor] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)
    waiting: int = 0
    over: bool = False
    size: tuple[int, int] | None = None
    lookup: FLOPsLookup | None = None
    costs: list[float] = field(default_factory=list)
    seen: int = 0
    used: int = 0
    macs: float = 0.0
    logits: Tensor | None = field(default=None, repr=False)
    error: Exception | None = None


class Scheduler:
    """Takes frames of many streams through stages and gates, one stage run at a time.

    At most `look_ahead` frames of a stream are in flight, so what is held is bounded by the number of streams. Frames
    in front of the same stage (and of the same size) run as one batch, whosever they are.

    The next stage to run is a full one, of several the deepest; where none is full, the fullest. A frame that has
    waited for `patience` runs goes first, the oldest of them before all: so none waits for more than
    `patience + max_streams * look_ahead` runs in front of any stage.

    Whatever raises in a batch is tried again frame by frame, so that a stream's fault is its own.

    Args:
        model: a model in evaluation mode.
        max_streams: streams in flight.
        batch_size: most frames in one stage run.
        look_ahead: most frames of a stream in flight.
    """

    def __init__(self, model: StopOrForward, max_streams: int, batch_size: int, look_ahead: int) -> None:
        check_eval(model, "Serving streams")
        if max_streams < 1 or batch_size < 1 or look_ahead < 1:
            raise DynskipError(
                f"max_streams={max_streams}, batch_size={batch_size} and look_ahead={look_ahead} have to be positive: "
                "streams in flight, frames that go through a stage at a time, and frames of a stream in flight."
            )
        self.model, self.stages = model, model.backbone.num_stages
        # Where memories advance gate by gate, a frame's verdict would wait for the one before it all the same.
        self.look_ahead = look_ahead if model.state_update == "used" else 1
        self.max_streams, self.batch_size = max_streams, batch_size
        self.patience = 4 * self.stages
        self.streams: list[Stream] = []
        self.finished: list[Stream] = []  # their sources are to be closed
        self._free = list(range(max_streams))
        self._by_row: dict[int, Stream] = {}
        self._engine = Engine(model, max_streams, self.look_ahead, counts=self.look_ahead > 1)
        self._queues: dict[tuple[int, tuple[int, int]], deque[tuple[int, int]]] = {}  # (frame, runs before it came)
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
        stream = Stream(key, source, self._free.pop(), self.look_ahead)
        self._engine.reset(torch.tensor([stream.row]))
        self.streams.append(stream)
        self._by_row[stream.row] = stream
        return stream

    @torch.no_grad()
    def offer(self, stream: Stream, frame: Any) -> None:
        """Give a stream its next frame.

        Raises:
            DynskipError: if the frame does not fit the model or the stream's earlier frames.
        """
        frames = check_frames(frame, self.model.backbone, 1)
        if frames.device.type == "cpu":  # on a GPU a whole batch is looked at, before it runs
            refuse_not_finite(frames, "frame")
        size = (frames.shape[2], frames.shape[3])
        if stream.size is None:
            if size not in self._tables:
                self._tables[size] = self._costs(size)
            stream.lookup, stream.size = self._tables[size], size
            stream.costs = stream.lookup.by_outcome.tolist()
        elif size != stream.size:
            raise DynskipError(
                "The frame is {}x{} and earlier ones of this stream were ".format(*size)
                + "{}x{}. Resize a stream's frames to one size.".format(*stream.size)
            )
        self._load(stream, frames)

    def _load(self, stream: Stream, image: Tensor) -> None:
        number, before = self._engine.window * stream.row + len(stream.images), len(stream.images)
        self._engine.load(torch.tensor([number]), image, torch.tensor([stream.seen + before]))
        stream.images.append(image)
        stream.wants = not stream.over and not stream.held and len(stream.images) < stream.ahead
        self._enqueue(0, [number])

    @torch.no_grad()
    def end(self, stream: Stream, error: Exception | None = None) -> list[Event]:
        """Take note that a stream has no more frames; answer for it once those in flight are decided."""
        stream.wants, stream.over = False, True
        stream.error = error
        return [] if stream.images or stream.held else self._finish([stream])

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Run one stage on a batch of waiting frames; there has to be work."""
        place = self._choose()
        queue = self._queues[place]
        frames = [queue.popleft()[0] for _ in range(min(len(queue), self.batch_size))]
        if not queue:
            del self._queues[place]
        self._runs += 1
        failed: dict[int, Exception] = {}
        going = self._each(partial(self._advance, place[0]), frames, failed)
        for frame in frames:
            self._stream(frame).waiting -= 1
        if place[0] + 1 < self.stages:
            self._enqueue(place[0] + 1, going)
        events: list[Event] = []
        for frame, error in failed.items():
            events += self._fault(self._stream(frame), frame % self._engine.window, error)
        ready = dict.fromkeys(self._stream(frame) for frame in frames)
        return events + self._decide([s for s in ready if not s.waiting and s.images and s in self.streams])

    def _advance(self, stage: int, frames: list[int]) -> list[int]:
        """Run a stage on frames, and the head on those that get there; return which go on."""
        engine, numbers = self._engine, torch.tensor(frames)
        if stage < self.stages:
            if stage == 0 and engine.device.type != "cpu":
                self._refuse_not_finite(numbers)
            fresh = numbers[
                engine.features.depth[numbers] == stage
            ]  # where a gate raised, the stage need not run again
            if len(fresh):
                engine.run(stage, stage, fresh)
            numbers = numbers[engine.ask(stage, stage, numbers)]
        if stage + 1 >= self.stages and len(numbers):
            engine.run(self.stages, self.stages, numbers)
        return numbers.tolist()

    def _each(
        self, work: Callable[[list[Any]], list[Any]], items: list[Any], failed: dict[Any, Exception]
    ) -> list[Any]:
        """Do something for a batch; where that raises, for each item alone, and note which one it is."""
        try:
            return work(items)
        except Exception as error:
            if len(items) == 1:
                failed[items[0]] = error
                return []
        return [done for item in items for done in self._each(work, [item], failed)]

    def _decide(self, streams: list[Stream]) -> list[Event]:
        """Make decisions on streams' frames in flight final, and go on with what that asks for."""
        if not streams:
            return []
        failed: dict[Stream, Exception] = {}
        events: list[Event] = self._each(self._decided, streams, failed)
        for stream, error in failed.items():
            events += self._fail(stream, error)
        done = [s for s in streams if s.over and not s.images and not s.held and s in self.streams]
        return events + self._finish(done)

    def _decided(self, streams: list[Stream]) -> list[Event]:
        engine, rows = self._engine, torch.tensor([stream.row for stream in streams])
        decisions = engine.decide(rows)
        stopped_at, lacking, ended = engine.learn(decisions)
        shape, index = (engine.videos, engine.window), engine.upload(rows)
        evaluated = torch.arange(self.stages, device=engine.device) <= decisions.stopped_at[..., None]
        gate_logits = rules.known(engine.gate_logits.unflatten(0, shape)[index].to(engine.dtype), evaluated)
        frame_logits = engine.frame_logits.unflatten(0, shape)[index]
        frame_logits = rules.known(frame_logits, decisions.stopped_at == self.stages)
        tables = (gate_logits, frame_logits, decisions.running_logits)
        events: list[Event] = []
        for i, stream in enumerate(streams):
            columns = (stopped_at[i] >= 0).nonzero().squeeze(1).tolist()
            for column in columns:
                gate = int(stopped_at[i, column])
                used, macs = gate == self.stages, stream.costs[gate + 1]
                last = bool(ended[i]) and column == columns[-1]
                parts = [table[i, column] for table in tables]
                events.append(
                    FrameResult(gate, used, parts[0], parts[1], parts[2], last, macs, stream.key, stream.seen)
                )
                stream.seen, stream.used, stream.macs = stream.seen + 1, stream.used + used, stream.macs + macs
                stream.logits = decisions.running_logits[i, column]
            for column in lacking[i].nonzero().squeeze(1).tolist() if self.look_ahead > 1 else ():
                frame = stream.row * engine.window + column
                self._enqueue(int(engine.features.depth[frame]), [frame])
            if not engine.pending.view(shape)[stream.row].any():
                stream.images = []
                if ended[i]:  # whatever the source did further on is no part of the video
                    stream.over, stream.error, stream.held = True, None, []
                stream.wants = not stream.over
                if stream.held:
                    self._load(stream, stream.held.pop(0))
        return events

    def _choose(self) -> tuple[int, tuple[int, int]]:
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

    def _fault(self, stream: Stream, column: int, error: Exception) -> list[Event]:
        """Deal with a frame of a stream that raised: it ends the stream, if the stream really gets to it."""
        if stream not in self.streams or column >= len(stream.images):
            return []
        pending = self._engine.pending.view(-1, self._engine.window)[stream.row]
        if not pending[:column].any():
            return self._fail(stream, error)
        # Frames before it may end the video, or let it stop before it comes that far: it waits until they are decided.
        self._withdraw(stream, column)
        stream.held, stream.images = stream.images[column:] + stream.held, stream.images[:column]
        stream.ahead, stream.wants = 1, False
        return []

    def _fail(self, stream: Stream, error: Exception) -> list[Event]:
        """End a stream whose frames cannot be gone on with."""
        if stream not in self.streams:
            return []
        self._withdraw(stream, 0)
        stream.error = error
        return self._finish([stream])

    def _withdraw(self, stream: Stream, column: int) -> None:
        """Take the frames of a stream out of flight, from one on."""
        own = range(stream.row * self._engine.window + column, (stream.row + 1) * self._engine.window)
        for place in list(self._queues):
            left = deque(item for item in self._queues[place] if item[0] not in own)
            stream.waiting -= len(self._queues[place]) - len(left)
            self._queues[place] = left
            if not left:
                del self._queues[place]
        self._engine.pending[own.start : own.stop] = False

    def _finish(self, streams: list[Stream]) -> list[Event]:
        """Answer for streams that have no more frames, and let them go."""
        failed: dict[Stream, Exception] = {}
        open_ended = [s for s in streams if s.error is None and self._engine.furthest[s.row] is not None]
        answers = dict(self._each(self._complete, open_ended, failed)) if open_ended else {}
        events: list[Event] = []
        for stream in streams:
            furthest, logits = self._engine.furthest[stream.row], answers.get(stream, stream.logits)
            speculative = 0.0
            if self.look_ahead > 1 and stream.lookup is not None:
                speculative = max(0.0, self._engine.executed(stream.row, stream.lookup) - stream.macs)
            if stream in answers and furthest is not None and stream.lookup is not None:
                stream.macs += float(stream.lookup.completion[furthest.stopped_at])
            if logits is None:
                logits = rules.running(self._engine.sums, self._engine.dtype)[stream.row]
            frame = furthest.frame if stream in answers and furthest is not None else -1
            error = failed.get(stream, stream.error)
            events.append(
                VideoResult(
                    logits, stream.used, stream.seen, frame, stream.macs, speculative, key=stream.key, error=error
                )
            )
            self.streams.remove(stream)
            self.finished.append(stream)
            self._free.append(stream.row)
        return events

    def _complete(self, streams: list[Stream]) -> list[tuple[Stream, Tensor]]:
        """Run the furthest frames of streams without a used one to the end."""
        frames = [furthest for stream in streams if (furthest := self._engine.furthest[stream.row]) is not None]
        logits = rules.answer(run_to_end(self.model.backbone, frames)).to(self._engine.dtype)
        return list(zip(streams, logits.unbind(0), strict=True))

    def _refuse_not_finite(self, frames: Tensor) -> None:
        """Look at frames that came on a GPU, a whole batch at once."""
        refuse_not_finite(self._engine.features.gather(frames, self._engine.device)[0].values[0], "frame")

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
