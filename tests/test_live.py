from __future__ import annotations

import asyncio
import contextlib
import http.server
import itertools
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import toy_model, toy_video

pytest.importorskip("av")
for needed in ("PIL", "safetensors", "tqdm"):
    pytest.importorskip(needed)

from loopback import Play, camera, closed_port, transport_stream  # noqa: E402
from media import write_video  # noqa: E402

from dynskip import DynskipError, FrameResult, VideoResult  # noqa: E402
from dynskip.video import LinkLostError, LiveSource, Newest, Preprocessing, VideoError, live  # noqa: E402

PREP = Preprocessing(size=8, num_frames=4, mean=(0.5,) * 3, std=(0.5,) * 3)
DATA = transport_stream(20)
QUICK: dict[str, Any] = {"options": {"analyzeduration": "100000"}}


def level(frame: live.LiveFrame) -> int:
    return int(frame.to_array(16).mean())


def test_frames_have_the_shape_that_players_show(tmp_path: Path) -> None:
    source = LiveSource(str(write_video(tmp_path / "wide.mkv", aspect=(2, 1))))
    frame = next(source)
    source.close()
    assert frame.aspect == 2
    assert frame.to_array(16).shape == (16, round(32 * frame.picture.width / frame.picture.height), 3)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_pauses", lambda: itertools.repeat(0.05))


PAUSES = live._pauses


def test_pauses_grow_to_half_a_minute() -> None:
    assert list(itertools.islice(PAUSES(), 8)) == [1, 2, 4, 8, 16, 30, 30, 30]


# ------------------------------------------------------------------------------------------- a thread in front


def test_whoever_is_slow_gets_the_newest_item_and_the_others_are_counted() -> None:
    go, sent = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        yield 0
        go.wait(60)
        yield from range(1, 50)
        sent.set()
        threading.Event().wait()  # for ever

    newest = Newest(source())
    assert next(newest) == 0
    assert newest.poll() is None
    go.set()
    assert sent.wait(60)
    assert next(newest) == 49
    assert (newest.taken, newest.given, newest.dropped) == (50, 2, 48)
    newest.close()  # while its thread waits for ever
    assert list(newest) == []


def test_a_queue_keeps_the_newest_items_in_order() -> None:
    newest = Newest(range(10), queue=3)
    while newest.poll() is None or newest.taken < 10:
        time.sleep(0.01)
    assert list(newest) in ([], [8, 9], [7, 8, 9], [9])
    assert newest.given + newest.dropped == 10


def test_items_that_are_too_old_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    newest = Newest(range(3), lag=100.0, queue=3)
    newest.poll()
    while not newest._over:
        time.sleep(0.01)
    left = 3 - newest.given
    now = time.monotonic()
    monkeypatch.setattr("dynskip.video.newest.time.monotonic", lambda: now + 1000)
    assert list(newest) == []
    assert newest.dropped == left > 0


def test_nothing_is_dropped_where_the_source_waits() -> None:
    newest = Newest(range(1000), queue=2, drop=False)
    assert list(newest) == list(range(1000))
    assert newest.dropped == 0


def test_errors_and_the_end_come_to_whoever_looks_and_the_source_is_closed() -> None:
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield 1
            raise OSError("unplugged")
        finally:
            closed.set()

    newest = Newest(source(), drop=False)
    assert next(newest) == 1
    for _ in range(2):
        with pytest.raises(OSError, match="unplugged"):
            next(newest)
    assert closed.is_set()

    closed.clear()
    endless = Newest(itertools.count())
    next(endless)
    endless.close()
    with pytest.raises(StopIteration):
        next(endless)


@pytest.mark.parametrize("wrong", [{"lag": 0.0}, {"lag": float("nan")}, {"queue": 0}])
def test_wrong_bounds_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DynskipError, match="positive"):
        Newest([], **wrong)


def test_a_slow_source_does_not_age_the_frames_of_another() -> None:
    """The slow source gives its second frame only when the fast one has got all its answers."""
    model, frames = toy_model(), toy_video(1, 12)[0]
    fast_is_done = threading.Event()

    def slow() -> Iterator[torch.Tensor]:
        yield frames[0]
        assert fast_is_done.wait(60)
        yield frames[1]

    sources = {"slow": Newest(slow(), lag=60), "fast": Newest(iter(frames), lag=60, drop=False)}
    ended = []
    for event in model.serve_streams(iter(sources.items()), max_streams=2):
        if isinstance(event, VideoResult):
            assert event.error is None
            ended.append((event.key, event.frames_seen))
            fast_is_done.set()
    assert ended == [("fast", 12), ("slow", 2)]


def test_a_slow_source_does_not_age_the_frames_of_another_in_an_event_loop() -> None:
    model, frames = toy_model(), toy_video(1, 12)[0]
    fast_is_done = threading.Event()

    def slow() -> Iterator[torch.Tensor]:
        yield frames[0]
        assert fast_is_done.wait(60)
        yield frames[1]

    async def serve() -> list[tuple[Any, int]]:
        sources = {"slow": Newest(slow(), lag=60), "fast": Newest(iter(frames), lag=60, drop=False)}
        ended = []
        async for event in model.aserve_streams(iter(sources.items()), max_streams=2):
            if isinstance(event, VideoResult):
                ended.append((event.key, event.frames_seen))
                fast_is_done.set()
        return ended

    assert asyncio.run(serve()) == [("fast", 12), ("slow", 2)]


def test_the_error_of_a_source_in_a_thread_ends_its_stream_alone() -> None:
    model, frames = toy_model(), toy_video(1, 4)[0]

    def broken() -> Iterator[torch.Tensor]:
        yield frames[0]
        raise OSError("unplugged")

    sources = [Newest(broken(), drop=False), Newest(iter(frames), drop=False)]
    results = [event for event in model.serve_streams(sources) if isinstance(event, VideoResult)]
    assert {r.key: str(r.error) for r in results} == {0: "unplugged", 1: "None"}


# ------------------------------------------------------------------------------------------------------- clocks


@pytest.mark.parametrize(
    ("frames", "times"),
    [
        ([(5.0, 0), (5.5, 9), (7.0, 9)], [0, 0.5, 2]),  # a camera that counts from anywhere
        ([(None, 0), (None, 0.25), (None, 0.75)], [0, 0.25, 0.75]),
        ([(1e9, 0), (1e9 + 1, 1), (0.0, 2.5), (0.5, 3)], [0, 1, 2.5, 3]),  # it starts over
        ([(0.0, 0), (0.0, 0), (1.0, 0)], [0, 1e-3, 1.001]),
    ],
)
def test_times_rise_from_zero(frames: list[tuple[float | None, float]], times: list[float]) -> None:
    clock = live.Clock()
    assert [clock.at(stamp, 100 + now) for stamp, now in frames] == pytest.approx(times)


def test_time_goes_on_where_the_link_was_lost_and_does_not_run_ahead() -> None:
    clock = live.Clock()
    clock.at(0.0, 10.0)
    for n in range(1, 40):  # each link gives four seconds at once
        clock.start()
        assert clock.at(0.0, 10 + 10 * n) == pytest.approx(10 * n)
        assert clock.at(4.0, 10 + 10 * n) == pytest.approx(10 * n + 4)


def test_frames_of_a_network_that_catches_up_are_late() -> None:
    clock = live.Clock()
    for n in range(250):
        clock.at(n / 25, n / 25)
        assert clock.late == pytest.approx(0)
    for n in range(250, 375):  # silent for five seconds, which then come within half of one
        clock.at(n / 25, 15 + (n - 250) / 250)
        assert clock.late == pytest.approx(15 + (n - 250) / 250 - n / 25)
    for n in range(388, 500):
        clock.at(n / 25, n / 25)
        assert clock.late == pytest.approx(0)
    for n in range(500, 2000):  # a delay that stays, and a clock that runs slow, are no reason to show nothing
        clock.at(n / 25, 3 + 1.0001 * n / 25)
    assert clock.late < 0.01


# ------------------------------------------------------------------------------------------------------ cameras


def test_a_link_that_breaks_is_connected_again_with_another_size_and_codec(caplog: pytest.LogCaptureFixture) -> None:
    other = transport_stream(20, side=64, codec="mpeg4")
    read = threading.Event()
    with camera(Play(DATA), Play(other, "reset", after=read), Play(DATA, "silent")) as there:
        source = LiveSource(there.address, lag=60, queue=100, timeout=1.0, **QUICK)
        frames = []
        for frame in source:
            frames.append(frame)
            if frame.link == 2:
                read.set()
            if frame.link == 3:
                break
        source.close()
    assert [frame.link for frame in frames] == sorted(frame.link for frame in frames)
    assert {frame.link: frame.picture.width for frame in frames} == {1: 48, 2: 64, 3: 48}
    assert all(b.time > a.time for a, b in itertools.pairwise(frames))
    assert source.reconnects == 2
    assert source.lost > 0
    assert "2 reconnects" in source.summary()
    assert (
        len([r for r in caplog.records if "the link broke after" in r.message and "Connecting again" in r.message]) == 2
    )
    assert len([r for r in caplog.records if "it is back" in r.message]) == 2


@pytest.mark.parametrize(
    ("play", "message"),
    [
        (Play(DATA, "silent"), "no frame for 0.5 s"),
        (Play(b"", "silent"), "no frame for 0.5 s"),
        (Play(DATA, "close"), r"the link broke after \d+\.\d s \(closed\)"),
        (Play(b"SSH-2.0 " * 999, "close"), "what it sends is no video"),
        (None, "refused: .* is the port right"),
    ],
)
def test_it_gives_up_in_time_and_says_why(play: Play | None, message: str, caplog: pytest.LogCaptureFixture) -> None:
    with camera(play or Play(b""), Play(b"", "silent")) as there:
        address = there.address if play else f"tcp://127.0.0.1:{closed_port()}"
        source = LiveSource(address, timeout=0.5, give_up=0.7, **QUICK)
        with pytest.raises(LinkLostError, match=r"Given up after .* without a frame"):
            list(source)
    assert any(re.search(message, record.getMessage()) for record in caplog.records)


class Status(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(int(self.path[-3:]))
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://user:secret@127.0.0.1:PORT/401", "no permission .*USER:PASSWORD"),
        ("http://127.0.0.1:PORT/404", "nothing is there"),
        ("rtsp://no.such.host.invalid/live", "there is no host no.such.host.invalid"),
        ("nonsense://127.0.0.1/live", "cannot open such an address"),
        ("/dev/no_camera", "nothing is there"),
    ],
)
def test_what_waiting_does_not_cure_is_said_at_once(address: str, message: str) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Status) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = LiveSource(address.replace("PORT", str(server.server_address[1])), timeout=30.0)
        with pytest.raises(VideoError, match=message) as caught:
            next(source)
        server.shutdown()
    assert "secret" not in str(caught.value)
    assert not isinstance(caught.value, LinkLostError)


def test_packets_that_give_no_picture_are_told(caplog: pytest.LogCaptureFixture) -> None:
    data = transport_stream(100, codec="libx264", good=10)
    with camera(Play(data, seconds=4.0), Play(b"", "silent")) as there:
        source = LiveSource(there.address, timeout=1.0, give_up=1.5, **QUICK)
        with pytest.raises(LinkLostError):
            list(source)
    assert "packets came, none of which is a picture" in caplog.text
    assert source.damaged > 0
    assert "damaged packets" in source.summary()


@pytest.mark.parametrize(("grey", "told"), [(90, True), (None, False)])
def test_a_picture_that_stays_the_same_is_told(
    grey: int | None, told: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "FROZEN", 0.2)
    with camera(Play(transport_stream(100, grey=grey), seconds=2.0), Play(b"", "silent")) as there:
        source = LiveSource(there.address, timeout=0.5, give_up=0.5, **QUICK)
        with pytest.raises(LinkLostError):
            list(source)
    assert ("the picture has been the same for" in caplog.text) is told
    assert ("the same picture for" in source.summary()) is told
    assert source.quiet >= 0.5


class Packet:
    """A packet of the pretended video below: with one picture, decoded or passed over."""

    def __init__(self, video: Any, number: int) -> None:
        self.stream, self.video, self.number = video, video, number

    def decode(self) -> list[Any]:
        if self.video.codec_context.skip_frame == "NONKEY" and self.number % 50:
            return []
        self.video.now += 0.1  # decoding takes longer than the 0.04 s between two pictures
        self.video.decoded.append(self.number)
        return [SimpleNamespace(time=self.number / 25, planes=[bytes(100)])]


def test_where_decoding_is_too_slow_only_key_frames_are_decoded_until_it_has_caught_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codec = SimpleNamespace(skip_frame="DEFAULT")
    video = SimpleNamespace(index=0, codec_context=codec, sample_aspect_ratio=None, now=0.0, decoded=[])

    def demux() -> Iterator[Packet]:
        for number in range(2000):
            video.now = max(video.now, number / 25)  # no packet comes before its time
            yield Packet(video, number)

    @contextlib.contextmanager
    def opened(*_: Any, **__: Any) -> Iterator[Any]:
        yield SimpleNamespace(demux=demux), video

    monkeypatch.setattr(live, "open_video", opened)
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: video.now))
    source = LiveSource("rtsp://here", timeout=1e6, give_up=0.0)
    late = []
    with contextlib.suppress(LinkLostError):
        for frame, age in source._read():
            source.taken += 1
            late.append(video.now - frame.picture.time)
            assert age == pytest.approx(late[-1] - min(late[-100:]), abs=0.5)
    assert max(late) < 8
    assert late[-1] < 8
    assert 200 < len(video.decoded) < 1000
    assert video.decoded[-1] > 1900


@pytest.mark.parametrize("play", [Play(DATA, "silent"), Play(b"", "silent")])
def test_closing_ends_whoever_waits_at_once_whatever_the_source_does(play: Play) -> None:
    with camera(play) as there:
        source = LiveSource(there.address, timeout=300.0, **QUICK)
        threading.Timer(1.0, source.close).start()
        assert len(list(source)) <= 20  # ends, though nothing comes and nothing times out


def test_a_signal_handler_may_close_it_even_while_it_is_being_opened() -> None:
    with camera(Play(b"", "silent")) as there:
        source = LiveSource(there.address, timeout=300.0)
        before = signal.signal(signal.SIGUSR1, lambda *_: source.close())
        threading.Timer(0.5, signal.raise_signal, [signal.SIGUSR1]).start()
        try:
            assert list(source) == []
        finally:
            signal.signal(signal.SIGUSR1, before)


def cameras_model() -> Any:
    return toy_model().float()


def test_a_gap_ends_a_video_and_the_next_one_begins_after_it() -> None:
    model = cameras_model()
    with camera(Play(DATA), Play(DATA), Play(b"", "silent")) as there:
        source = LiveSource(there.address, lag=60, queue=100, timeout=0.5, give_up=0.5, **QUICK)
        videos = []

        def of_camera() -> Iterator[Any]:
            while True:
                videos.append(source.video(PREP, 12))
                yield videos[-1]

        results: list[VideoResult] = []
        frames: list[FrameResult] = []
        for event in model.serve_streams(of_camera(), max_streams=1):
            if isinstance(event, FrameResult):
                frames.append(event)
                continue
            results.append(event)
            if event.error is not None:
                break
    lengths = [result.frames_seen for result in results]
    assert lengths[0] == 12
    assert sum(lengths) == source.given == len(frames)
    assert all(length <= 12 for length in lengths)
    jumps = [b - a for video in videos for a, b in itertools.pairwise(video.times)]
    assert jumps == pytest.approx([0.04] * len(jumps), abs=1e-3)  # no video has a gap within it
    assert isinstance(results[-1].error, LinkLostError)


def test_frames_of_a_camera_are_those_of_its_video_in_a_session_and_in_an_event_loop() -> None:
    model = cameras_model()

    async def first() -> VideoResult:
        source = LiveSource(there.address, lag=60, queue=100, **QUICK)
        async for event in model.aserve_streams([source.video(PREP, 10)]):
            if isinstance(event, VideoResult):
                source.close()
                return event
        raise AssertionError

    with camera(Play(DATA, "silent")) as there:
        with contextlib.closing(LiveSource(there.address, lag=60, queue=100, **QUICK)) as source:
            session = model.stream()
            for frame in source.video(PREP, 10):
                session(frame)
        served = asyncio.run(first())
    torch.testing.assert_close(served.logits, session.result().logits[0])
    assert served.frames_seen == 10
