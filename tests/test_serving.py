"""Cameras that come and go. Where a clock matters, tests have their own; threads are waited for, never timed."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import BOTH_UPDATES, StateUpdate, toy_model, toy_video
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynskip import (
    DynskipError,
    EarlyTerminator,
    FrameResult,
    Mailbox,
    StopOrForward,
    StreamCounters,
    StreamEnd,
    StreamServer,
    VideoResult,
)


class CameraError(RuntimeError):
    pass


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@functools.cache
def model_of(state_update: StateUpdate = "used", ends: bool = True) -> StopOrForward:
    return toy_model(seed=2, terminator=EarlyTerminator(0.9, 2) if ends else None, state_update=state_update)


@functools.cache
def frame_of(number: int) -> Tensor:
    return toy_video(1, 1, seed=2 * number)[0, 0]


def prepared(number: Any) -> Any:
    """Make the pixels of a frame that is only a number; other things are frames that do not fit."""
    return frame_of(number % 64) if isinstance(number, int) else number


@dataclass
class Life:
    """What a stream that was added has shown, from `add` to its end."""

    key: str
    mailbox: Mailbox
    num_frames: int
    sent: list[Any] = field(default_factory=list)
    videos: list[tuple[list[FrameResult], VideoResult]] = field(default_factory=list)
    open: list[FrameResult] = field(default_factory=list)
    end: StreamEnd | None = None


@dataclass
class Served:
    """A server with a clock of its own, and the lives of its streams."""

    server: StreamServer
    clock: Clock
    lives: list[Life] = field(default_factory=list)

    def add(self, key: str, num_frames: int = 4, **settings: Any) -> Life:
        life = Life(key, Mailbox(self.clock), num_frames)
        self.server.add(key, life.mailbox, num_frames=num_frames, prepare=prepared, **settings)
        self.lives.append(life)
        return life

    def put(self, life: Life, frame: Any) -> None:
        if life.mailbox.put(frame):
            life.sent.append(frame)

    def poll(self, times: int = 1) -> list[Any]:
        found: list[Any] = []
        for _ in range(times):
            for event in self.server.poll():
                # A key has one life at a time: the first that has not ended.
                life = next(life for life in self.lives if life.key == event.key and life.end is None)
                if isinstance(event, FrameResult):
                    assert event.frame == len(life.open)
                    life.open.append(event)
                elif isinstance(event, VideoResult):
                    life.videos.append((life.open, event))
                    life.open = []
                else:
                    life.end = event
                found.append(event)
        return found

    def finish(self) -> None:
        self.server.close()
        self.poll(50)
        assert all(life.end is not None for life in self.lives)


def served(max_streams: int = 4, batch_size: int = 4, *, model: StopOrForward | None = None, **more: Any) -> Served:
    clock = Clock()
    return Served(StreamServer(model or model_of(), max_streams, batch_size, clock=clock, **more), clock)


def assert_alone(model: StopOrForward, life: Life) -> None:
    """Compare every video of a stream with the same frames alone, and its counters with what happened."""
    looked_at = [frame.image for frames, _ in life.videos for frame in frames]
    assert not life.open
    places = [life.sent.index(image) for image in looked_at]
    assert places == sorted(set(places)), "frames were shown in another order, or twice"
    for frames, result in life.videos:
        video = torch.stack([prepared(frame.image) for frame in frames])[None]
        alone = model.run_clip(video, window=1)
        assert [frame.stopped_at for frame in frames] == alone.stopped_at[0].tolist()
        assert result.frames_seen == len(frames) <= life.num_frames
        assert result.frames_used == int(alone.used.sum())
        if result.error is not None:
            continue
        torch.testing.assert_close(result.logits, alone.logits[0])
        assert (result.macs, result.fallback_frame) == (float(alone.macs), int(alone.fallback_frame))
    assert life.end is not None
    counters = life.end.counters
    assert counters.frames_in == len(life.sent)
    assert counters.frames_in == counters.frames_dropped + counters.frames_unseen + counters.frames_seen
    assert counters.frames_seen == len(looked_at)
    assert counters.frames_used == sum(result.frames_used for _, result in life.videos)
    assert counters.answers == sum(result.error is None for _, result in life.videos)
    assert counters.macs == sum(result.macs for _, result in life.videos)
    assert math.isclose(counters.lag_sum, sum(f.lag or 0.0 for frames, _ in life.videos for f in frames), abs_tol=1e-9)


# Results are those of each video alone


KEYS = ("a", "b", "c", "d", "e")
BAD = {"nan": torch.full((3, 8, 8), math.nan).double(), "dtype": torch.zeros(3, 8, 8), "shape": torch.zeros(8, 8)}
ACTIONS = st.one_of(
    st.tuples(st.just("put"), st.sampled_from(KEYS), st.integers(1, 3)),
    st.tuples(st.just("put"), st.sampled_from(KEYS), st.integers(1, 3)),
    st.tuples(st.just("poll"), st.integers(1, 6)),
    st.tuples(st.just("poll"), st.integers(1, 6)),
    st.tuples(st.just("pass"), st.floats(0.01, 1.0)),
    st.tuples(
        st.just("add"), st.sampled_from(KEYS), st.integers(-2, 2), st.sampled_from([None, 2.0]), st.integers(1, 5)
    ),
    st.tuples(st.just("remove"), st.sampled_from(KEYS)),
    st.tuples(st.just("bad"), st.sampled_from(KEYS), st.sampled_from(sorted(BAD))),
    st.tuples(st.just("gap"), st.sampled_from(KEYS)),
    st.tuples(st.just("over"), st.sampled_from(KEYS), st.booleans()),
)


def play(serving: Served, actions: list[tuple[Any, ...]]) -> None:
    """Do what is asked for, as far as it is possible."""
    numbers = itertools.count()
    lives: dict[str, Life] = {}

    def add(key: str, priority: int = 0, rate: float | None = None, num_frames: int = 4) -> None:
        if key not in serving.server.counters():
            lives[key] = serving.add(key, num_frames, priority=priority, rate=rate, idle_timeout=5.0)

    for key in KEYS[:3]:
        add(key)
    for name, *arguments in actions:
        if name == "add":
            add(*arguments)
        elif name == "poll":
            serving.poll(*arguments)
        elif name == "pass":
            serving.clock.now += arguments[0]
        elif (life := lives.get(arguments[0])) is None or life.mailbox.over:
            pass
        elif name == "remove":
            serving.server.remove(life.key)
        elif name == "put":
            for _ in range(arguments[1]):
                serving.put(life, next(numbers))
        elif name == "gap":
            life.mailbox.reconnects += 1
        elif name == "bad":
            serving.put(life, BAD[arguments[1]])
        else:
            life.mailbox.end(CameraError("unplugged") if arguments[1] else None)
    serving.finish()


@pytest.mark.parametrize("update", BOTH_UPDATES)
def test_each_stream_gives_what_it_gives_alone_in_any_order_of_events(update: StateUpdate) -> None:
    @settings(max_examples=40)
    @given(st.integers(1, 5), st.integers(1, 4), st.lists(ACTIONS, min_size=10, max_size=60))
    def check(max_streams: int, batch_size: int, actions: list[tuple[Any, ...]]) -> None:
        serving = served(max_streams, batch_size, model=model_of(update))
        play(serving, actions)
        for life in serving.lives:
            damaged = [frame for frame in life.sent if not isinstance(frame, int)]
            life.sent = [frame if isinstance(frame, int) else -1 for frame in life.sent]
            assert_alone(model_of(update), life)
            assert life.end is not None
            if isinstance(life.end.error, DynskipError):
                assert damaged or "No frame has come" in str(life.end.error)
            elif life.end.error is not None:
                assert life.end.error is life.mailbox.error
        assert serving.server.counters() == {}
        assert not serving.server._scheduler.streams
        assert sorted(serving.server._scheduler._free) == list(range(max_streams))

    check()


def test_a_schedule_in_which_everything_happens() -> None:
    serving = served(max_streams=2, batch_size=1)
    play(serving, [action for t in range(60) for action in everything(t)])
    for life in serving.lives:
        life.sent = [frame if isinstance(frame, int) else -1 for frame in life.sent]
        assert_alone(model_of(), life)
    ends = [life.end for life in serving.lives if life.end]
    assert {type(end.error) for end in ends} == {type(None), CameraError, DynskipError}
    total = {name: sum(getattr(e.counters, name) for e in ends) for name in ("frames_dropped", "frames_unseen")}
    assert all(total.values())
    results = [result for life in serving.lives for _, result in life.videos]
    assert any(result.fallback_frame >= 0 for result in results)
    assert any(result.error is not None for result in results)


def everything(t: int) -> Iterator[tuple[Any, ...]]:
    for i, key in enumerate(KEYS):
        yield ("add", key, i - 2, (None, 2.0)[i % 2], 5)
        yield ("put", key, 1 + (t + i) % 2)
        yield ("poll", 2)
    yield ("pass", 0.1)
    if t % 20 == 19:
        yield from (("bad", "a", "nan"), ("over", "b", True), ("remove", "c"), ("poll", 9))


# Time: rates, priorities, ageing, silence


@pytest.mark.parametrize("rate", [0.5, 4.0, 10.0, 1000.0])
def test_a_rate_bounds_how_many_frames_are_looked_at(rate: float) -> None:
    serving = served()
    life = serving.add("door", rate=rate)
    for t in range(250):  # 25 frames a second
        serving.put(life, t)
        serving.poll(6)
        serving.clock.now += 0.04
    counters = serving.server.counters()["door"]
    assert abs(counters.frames_seen + counters.frames_unseen - min(rate, 25) * 10) <= 1
    assert counters.frames_in == 250
    assert 0 <= 250 - counters.frames_seen - counters.frames_unseen - counters.frames_dropped <= 1


def test_missed_frames_are_not_made_up_for() -> None:
    serving = served(model=model_of(ends=False))
    life = serving.add("door", rate=2.0, num_frames=100)
    serving.put(life, 0)
    serving.poll(8)
    serving.clock.now += 30.0  # a network that was away
    shown = 0
    for t in range(20):  # and sends 20 frames at once
        serving.put(life, t)
        shown += sum(isinstance(event, FrameResult) for event in serving.poll(8))
    assert shown == 1


@pytest.mark.parametrize(("priority", "ageing"), [(0, 1.0), (1, 1.0), (3, 0.5), (2, 3.0)])
@pytest.mark.parametrize("max_streams", [16, 2])
def test_nobody_starves(priority: int, ageing: float, max_streams: int) -> None:
    # All cameras send more than can be looked at: one frame is decided in every quarter of a second.
    cameras, tick, length = 6, 0.25, 3
    serving = served(max_streams, batch_size=1, ageing=ageing)
    serving.server._in_flight = 1  # so that a frame is decided before the next one is taken
    lives = [
        serving.add(f"camera {i}", num_frames=length, priority=priority if i else 0, idle_timeout=1e6)
        for i in range(cameras)
    ]
    waits: list[float] = []
    since = serving.clock.now
    numbers = itertools.count()
    for _ in range(600):
        if len(waits) == 6:
            break
        for life in lives:
            serving.put(life, next(numbers))
        frames: list[Any] = []
        while not frames:
            frames = [event for event in serving.poll() if isinstance(event, FrameResult)]
        serving.clock.now += tick
        if frames[0].key == "camera 0":
            waits.append(serving.clock.now - since)
            since = serving.clock.now
    assert len(waits) == 6
    if max_streams >= cameras:
        # Overtaken for `priority * ageing`; then at most once by each of the others.
        bound = priority * ageing + cameras * tick
        assert max(waits) <= bound + 1e-6
        assert max(waits) >= priority * ageing  # or priority would mean nothing
    else:  # and a place becomes free when a video has been answered
        videos = length * tick * cameras
        assert max(waits) <= priority * ageing + cameras * tick + videos * math.ceil(cameras / max_streams)


def test_the_important_camera_goes_first_and_the_newest_frame_wins() -> None:
    serving = served(batch_size=1, ageing=1.0)
    serving.server._in_flight = 1
    plain, important = serving.add("plain"), serving.add("important", priority=2.0)
    serving.put(plain, 1)
    serving.clock.now += 1.9
    serving.put(important, 2)
    serving.put(important, 3)
    serving.put(plain, 4)  # newer, but the camera waits since its first frame
    events = [event for event in serving.poll(12) if isinstance(event, FrameResult)]
    assert [(event.key, event.image) for event in events] == [("important", 3), ("plain", 4)]
    assert plain.mailbox.dropped == important.mailbox.dropped == 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_frame_is_decided_within_the_documented_number_of_stage_runs(batch_size: int) -> None:
    serving = served(max_streams=24, batch_size=batch_size, model=model_of(ends=False))
    lives = [serving.add(f"camera {i}", num_frames=5) for i in range(24)]
    numbers, polls, most = itertools.count(), 0, 0
    taken: dict[int, int] = {}

    def noted(number: int) -> Tensor:
        taken[number] = polls
        return frame_of(number % 64)

    for camera in serving.server._cameras.values():
        camera.prepare = noted
    for polls in range(400):
        for life in lives:
            serving.put(life, next(numbers))
        for event in serving.poll():
            if isinstance(event, FrameResult):
                most = max(most, polls - taken[event.image])
        assert serving.server._scheduler._engine.pending.sum() <= 2 * batch_size
    assert 3 <= most <= 3 * (4 * 3 + 2 * batch_size)


def test_lag_is_the_age_of_the_frame_when_it_is_decided() -> None:
    serving = served()
    life = serving.add("door")
    serving.put(life, 1)
    serving.clock.now += 0.25
    events: list[Any] = []
    while not events:
        events = serving.poll()
        serving.clock.now += 0.125
    counters = serving.server.counters()["door"]
    assert events[0].lag == counters.lag == counters.lag_sum >= 0.25
    assert events[0].lag == serving.clock.now - 0.125 - 100.0
    assert counters.silent == serving.clock.now - 100.0


def test_a_silent_stream_ends_alone_and_its_place_goes_to_another() -> None:
    serving = served(max_streams=1)
    silent, other = serving.add("silent", idle_timeout=3.0), serving.add("other", idle_timeout=50.0)
    serving.put(silent, 1)
    serving.poll(8)
    for t in range(5):
        serving.put(other, t)
        serving.poll(8)
        serving.clock.now += 1.0
    assert silent.end is not None
    with pytest.raises(DynskipError, match=r"No frame has come for 3\.0 s; the idle timeout is 3 s"):
        raise silent.end.error  # type: ignore[misc]
    assert silent.videos[0][1].error is silent.end.error
    assert other.end is None
    assert other.open or other.videos


def test_a_stream_that_never_sends_ends_too() -> None:
    serving = served()
    life = serving.add("dead", idle_timeout=3.0)
    serving.clock.now += 2.9
    assert serving.poll() == []
    serving.clock.now += 0.2
    (end,) = serving.poll()
    assert isinstance(end.error, DynskipError)
    assert not life.videos


# Ends and errors


@pytest.mark.parametrize("error", [None, CameraError("unplugged")])
def test_the_last_frame_is_looked_at_before_the_stream_ends(error: CameraError | None) -> None:
    serving = served(model=model_of(ends=False))
    life = serving.add("door", rate=1.0)
    serving.put(life, 0)
    serving.poll(9)
    serving.put(life, 1)
    life.mailbox.end(error)
    assert serving.poll(9) == []  # it is not yet time for the frame
    serving.clock.now += 1.0
    serving.poll(9)
    assert life.end is not None
    assert life.end.error is error
    ((frames, result),) = life.videos
    assert [frame.image for frame in frames] == [0, 1]
    assert result.error is error


@pytest.mark.parametrize("kind", [*BAD, "nothing", "prepare", "model"])
def test_an_error_ends_its_stream_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = served(model=model_of(ends=False))
    good, bad = serving.add("good"), serving.add("bad")
    stage = next(model_of(ends=False).backbone.model.children())
    plain = stage.forward

    def raising(value: Tensor) -> Any:
        if value.max() > 1000:
            raise CameraError("this frame cannot be run")
        return plain(value)

    monkeypatch.setattr(stage, "forward", raising)
    frames = {**BAD, "nothing": None, "prepare": "no picture", "model": torch.full((3, 8, 8), 2000.0).double()}
    for t in range(3):
        serving.put(good, t)
        serving.put(bad, 10 + t if t < 2 else frames[kind])
        serving.poll(1)  # so that both run as one batch
        serving.poll(9)
    assert bad.end is not None
    assert isinstance(bad.end.error, CameraError if kind == "model" else DynskipError)
    assert bad.videos[-1][1].error is bad.end.error
    assert (bad.end.counters.frames_dropped, bad.end.counters.frames_seen) == (1, 2)
    assert not bad.mailbox.put(1)
    serving.add("bad")  # its key is free again
    assert good.end is None
    serving.finish()
    assert_alone(model_of(ends=False), good)


def test_removing_answers_from_the_frames_so_far_and_frees_the_key_at_once() -> None:
    serving = served(model=model_of(ends=False))
    life = serving.add("door", num_frames=100)
    for t in range(60):
        serving.put(life, t)
        if t and not serving.poll(1):  # it has passed the first gate and is in flight
            break
        serving.poll(9)
    assert serving.server.remove("door")
    assert not serving.server.remove("door")
    again = serving.add("door", num_frames=1)
    serving.put(again, 7)
    result, end, *others = serving.poll(9)
    assert (result.error, result.frames_seen, end.error) == (None, t, None)
    assert t > 0
    assert [frame.image for frame in life.videos[0][0]] == list(range(t))
    assert [frame.image for frame in again.videos[0][0]] == [7]
    assert len(others) == 2
    serving.finish()
    assert_alone(model_of(ends=False), life)


def test_a_video_that_ends_early_is_followed_by_the_next_only_when_its_frames_have_passed() -> None:
    serving = served()
    life = serving.add("door", num_frames=6)
    for t in range(60):
        serving.put(life, t)
        serving.poll(9)
    begins = [frames[0].image for frames, _ in life.videos]
    assert begins == list(range(0, 60, 6))[: len(begins)]
    assert any(len(frames) < 6 for frames, _ in life.videos)
    counters = serving.server.counters()["door"]
    assert counters.frames_unseen == sum(6 - len(frames) for frames, _ in life.videos)
    assert counters.frames_dropped == 0


def test_a_video_does_not_go_on_across_a_gap() -> None:
    serving = served(model=model_of(ends=False))
    life = serving.add("door", num_frames=3)
    for t in range(8):
        if t in (2, 6):  # in the middle of a video, and after the end of one
            life.mailbox.reconnects += 1
        serving.put(life, t)
        serving.poll(9)
    assert [[frame.image for frame in frames] for frames, _ in life.videos] == [[0, 1], [2, 3, 4], [5]]
    assert [result.error for _, result in life.videos] == [None] * 3
    serving.finish()
    assert_alone(model_of(ends=False), life)
    assert life.end is not None
    assert life.end.counters.reconnects == 2


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        ({"key": 3}, "key 3 has to be a string"),
        ({"key": "taken"}, "'taken' is served already"),
        ({"rate": 0.0}, "rate=0.0 has to be a finite positive"),
        ({"idle_timeout": math.inf}, "idle_timeout=inf has to be a finite positive"),
        ({"num_frames": 0}, "num_frames=0 has to be a positive whole"),
        ({"priority": math.nan}, "priority=nan has to be a finite"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], telling: str) -> None:
    server = StreamServer(model_of())
    server.add("taken", Mailbox())
    with pytest.raises(DynskipError, match=telling):
        server.add(**{"key": "door", "source": Mailbox(), **change})
    assert list(server.counters()) == ["taken"]


def test_what_is_over_is_refused() -> None:
    with pytest.raises(DynskipError, match="ageing=0"):
        StreamServer(model_of(), ageing=0)
    with pytest.raises(DynskipError, match="training mode"):
        StreamServer(toy_model().train())
    server, box = StreamServer(model_of()), Mailbox()
    server.add("door", box)
    server.remove("door")
    server.poll()
    with pytest.raises(DynskipError, match="belonged to a stream that has ended"):
        server.add("door", box)
    server.close()
    with pytest.raises(DynskipError, match="is closed"):
        server.add("door", Mailbox())
    assert list(server) == []


# Sources in threads


class Source:
    """A camera that sends when a test says so. Its thread waits in between."""

    def __init__(self, frames: int, error: Exception | None = None) -> None:
        self.frames, self.error = frames, error
        self.go, self.closed = threading.Semaphore(0), threading.Event()

    def __iter__(self) -> Iterator[int]:
        try:
            for t in range(self.frames):
                self.go.acquire()
                yield t
            self.go.acquire()
            if self.error is not None:
                raise self.error
        finally:
            self.closed.set()


def test_sources_are_read_in_threads_and_closed() -> None:
    ends: dict[str, StreamEnd] = {}
    sources = {"finite": Source(3), "fails": Source(2, CameraError("unplugged")), "endless": Source(10**9)}
    with StreamServer(model_of()) as server:
        for key, source in sources.items():
            server.add(key, source, prepare=prepared, num_frames=3)
            source.go.release()
        for event in server:
            if isinstance(event, StreamEnd):
                ends[event.key] = event
                if len(ends) == 2:
                    server.close()
            else:
                sources[str(event.key)].go.release()
    assert {key: type(end.error) for key, end in ends.items()} == {
        "finite": type(None),
        "fails": CameraError,
        "endless": type(None),
    }
    assert [ends[key].counters.frames_in for key in ("finite", "fails")] == [3, 2]
    assert ends["finite"].counters.answers == 1
    sources["endless"].go.release()  # it learns that nobody takes its frames
    assert all(source.closed.wait(60) for source in sources.values())


def test_a_source_that_never_answers_holds_up_nobody() -> None:
    stuck, lively = Source(1), Source(10**9)
    with StreamServer(model_of()) as server:
        server.add("stuck", stuck)
        server.add("lively", lively, prepare=prepared, num_frames=2)
        lively.go.release()
        for event in server:
            lively.go.release()
            if isinstance(event, VideoResult) and event.frames_seen:
                break
        assert server.counters()["stuck"].frames_in == 0
    for source in (stuck, lively):
        source.go.release()
        assert source.closed.wait(60)


class Live:
    """A source as live ones are: it counts what it drops, knows how old frames are, and is closed while it waits."""

    def __init__(self) -> None:
        self.reconnects, self.dropped, self.lag = 1, 0, 0.5
        self.closed = threading.Event()
        self.numbers = itertools.count()

    def __iter__(self) -> Live:
        return self

    def __next__(self) -> int:
        if (number := next(self.numbers)) == 2:
            self.closed.wait()
            raise StopIteration
        self.dropped += 10
        return number

    def poll(self) -> None:
        raise AssertionError("it has a thread")

    def close(self) -> None:
        self.closed.set()


def test_live_sources_are_closed_while_they_wait_and_what_they_count_counts() -> None:
    source, end = Live(), None
    with StreamServer(model_of()) as server:
        server.add("live", source, prepare=prepared, num_frames=4)
        for event in server:
            if isinstance(event, FrameResult):
                assert event.lag is not None
                assert event.lag >= 0.5
                if event.image == 1:
                    server.remove("live")
            elif isinstance(event, StreamEnd):
                end = event
                server.close()
    assert source.closed.is_set()
    assert end is not None
    counters = end.counters
    assert (counters.frames_in, counters.reconnects) == (22, 1)
    assert counters.frames_dropped + counters.frames_seen + counters.frames_unseen == 22
    for thread in server._threads:
        thread.join(60)
        assert not thread.is_alive()


def test_streams_are_added_and_removed_from_another_thread_while_serving() -> None:
    server, ends, turn = StreamServer(model_of(), max_streams=2), list[StreamEnd](), threading.Semaphore(0)

    def operate() -> None:
        for n in range(30):
            server.add(f"camera {n % 3}", itertools.count(), prepare=prepared, num_frames=2)
            turn.acquire(timeout=60)
            assert server.remove(f"camera {n % 3}")
        server.close()

    operator = threading.Thread(target=operate)
    operator.start()
    for event in server:
        if isinstance(event, StreamEnd):
            ends.append(event)
        else:
            turn.release()
    operator.join()
    assert [end.key for end in ends] == [f"camera {n % 3}" for n in range(30)]
    assert all(end.error is None for end in ends)
    for thread in server._threads:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
def test_a_signal_ends_the_serving_while_it_waits() -> None:
    with StreamServer(model_of()) as server:
        server.add("silent", Mailbox())
        before = signal.signal(signal.SIGTERM, lambda *_: server.close())
        try:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
            (end,) = server
        finally:
            signal.signal(signal.SIGTERM, before)
    assert isinstance(end, StreamEnd)
    assert end.error is None


def test_a_mailbox_keeps_the_newest_frame_and_counts_the_others() -> None:
    clock, rung = Clock(), list[int]()
    box = Mailbox(clock)
    box.wake = lambda: rung.append(1)
    assert box.take() is None
    for t in range(3):
        clock.now += 1.0
        assert box.put(t)
    assert (box.since, box.newest) == (101.0, 103.0)
    assert box.take() == (2, 103.0)
    assert box.take() is None
    box.put(3)
    box.close()
    assert not box.put(4)
    assert box.take() is None
    assert (box.received, box.dropped, len(rung)) == (5, 4, 4)


# What is told


def test_a_line_a_minute_is_logged_and_errors_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dynskip.runtime.serving")
    serving = served()
    life, other = serving.add("door"), serving.add("other")
    for t in range(130):
        serving.put(life, t)
        serving.poll(9)
        serving.clock.now += 1.0
        if t == 30:
            serving.put(other, BAD["nan"])
    lines = [record for record in caplog.records if record.levelno == logging.INFO]
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage().startswith("stream other ended: DynskipError: There are NaN")
    assert len(lines) == 2
    said = [line.getMessage() for line in lines]
    assert "1 streams, 60 s: 62 frames in, 1 dropped" in said[0]  # the other's frame counts, though it has ended
    assert "60 frames in, 0 dropped" in said[1]
    assert all("lag 0.000 s, at most 0.000 s; 0 reconnects" in line for line in said)


def test_counters_as_prometheus_reads_them() -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    from dynskip.runtime.prometheus import prometheus_text

    serving = served()
    for key in ("front door", 'a "quoted" \\ name'):
        life = serving.add(key)
        for t in range(10):
            serving.put(life, t)
            serving.put(life, t)
            serving.poll(9)
    serving.clock.now += 2.0
    life.mailbox.reconnects = 3
    families = {
        family.name: family for family in parser.text_string_to_metric_families(prometheus_text(serving.server))
    }
    counters: dict[str, StreamCounters] = serving.server.counters()
    for key, each in counters.items():

        def value(name: str, key: str = key, **labels: str) -> float:
            (found,) = [
                sample.value
                for family in families.values()
                for sample in family.samples
                if sample.name == f"dynskip_{name}" and sample.labels == {"stream": key, **labels}
            ]
            return float(found)

        for name in ("frames_in", "frames_dropped", "frames_unseen", "frames_used", "answers", "reconnects", "macs"):
            assert value(f"{name}_total") == getattr(each, name)
        assert [value("frames_stopped_total", gate=str(n)) for n in range(3)] == list(each.frames_stopped)
        assert (value("lag_seconds_count"), value("lag_seconds_sum")) == (each.frames_seen, each.lag_sum)
        assert value("silent_seconds") == each.silent == 2.0
        assert each.frames_dropped == 10
        assert each.macs > 0
    assert families["dynskip_streams"].samples[0].value == 2
